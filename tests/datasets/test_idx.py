import gzip
import hashlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keras_resnet.datasets.idx import find_idx, read_idx
from keras_resnet.utils.errors import InputError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)


def idx_bytes(array, magic=None):
    header = magic or bytes([0, 0, 8, array.ndim])
    return header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(path, raw):
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_reads_a_written_file(tmp_path, name):
    raw = idx_bytes(IMAGES)
    path = write(tmp_path / name, raw)
    array = read_idx(path, IMAGES.shape, sha256=hashlib.sha256(raw).hexdigest())
    assert array.dtype == np.uint8
    np.testing.assert_array_equal(array, IMAGES)


FAULTS = {
    "empty": (b"", "magic number must be 00000803, got an empty file"),
    "labels for images": (idx_bytes(np.zeros(5, np.uint8)), "got 00000801"),
    "floats": (idx_bytes(IMAGES, bytes([0, 0, 13, 3])), "got 00000d03"),
    "header cut": (idx_bytes(IMAGES)[:9], "header takes 16 bytes, found 9"),
    "count": (idx_bytes(IMAGES[:4]), "must hold 5 items, the header says 4"),
    "size": (idx_bytes(IMAGES.reshape(5, 3, 4)), "each item must be 4×3, the header says 3×4"),
    "data cut": (idx_bytes(IMAGES)[:-1], "promises 60 bytes of data, found 59"),
    "data added": (idx_bytes(IMAGES) + b"x", "promises 60 bytes of data, found more than 60"),
}


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("fault", FAULTS)
def test_structural_faults_are_one_line_that_names_the_file(tmp_path, fault, suffix):
    raw, message = FAULTS[fault]
    path = write(tmp_path / f"images{suffix}", raw)
    with pytest.raises(InputError) as caught:
        # The digest is wrong as well: the structure is looked at first.
        read_idx(path, IMAGES.shape, sha256="0" * 64)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_value_out_of_range_is_named_with_its_place(tmp_path):
    path = write(tmp_path / "labels", idx_bytes(np.array([9, 0, 10, 3], np.uint8)))
    with pytest.raises(InputError, match="must be in 0–9, got 10 at item 2"):
        read_idx(path, (4,), values=10)
    assert read_idx(path, (4,), values=11).tolist() == [9, 0, 10, 3]


def test_wrong_digest_gives_both_and_the_advice(tmp_path):
    raw = idx_bytes(IMAGES)
    path = write(tmp_path / "images", raw)
    with pytest.raises(InputError) as caught:
        read_idx(path, IMAGES.shape, sha256="ab" * 32, advice="; do this")
    assert f"expected {'ab' * 32}, got {hashlib.sha256(raw).hexdigest()}; do this" in str(
        caught.value
    )


def test_gzip_faults(tmp_path):
    whole = gzip.compress(idx_bytes(IMAGES))
    wrong_sum = bytearray(whole)
    wrong_sum[-6] ^= 1
    for name, raw, message in [
        ("cut.gz", whole[:-1], "cut short"),
        ("plain.gz", idx_bytes(IMAGES), "damaged"),
        ("sum.gz", bytes(wrong_sum), "CRC check failed"),
        ("tail.gz", whole + b"tail", "damaged"),
    ]:
        path = tmp_path / name
        path.write_bytes(raw)
        with pytest.raises(InputError, match=message) as caught:
            read_idx(path, IMAGES.shape)
        assert str(path) in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.gz: cannot be read: No such file"):
        read_idx(tmp_path / "nothing.gz", (1,))
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_idx(tmp_path, (1,))


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    # 400 MB of zeros behind a right header; it is written in pieces, and must be read in one.
    packer = zlib.compressobj(wbits=31)
    pieces = [packer.compress(idx_bytes(IMAGES))]
    pieces += [packer.compress(bytes(2**20)) for _ in range(400)]
    path = tmp_path / "bomb.gz"
    path.write_bytes(b"".join([*pieces, packer.flush()]))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="found more than 60"):
            read_idx(path, IMAGES.shape)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_unpacked_files_are_found_first(tmp_path):
    assert find_idx(tmp_path, "images") is None
    packed = write(tmp_path / "images.gz", b"")
    assert find_idx(tmp_path, "images") == packed
    plain = write(tmp_path / "images", b"")
    assert find_idx(tmp_path, "images") == plain


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), packed=st.booleans(), checked=st.booleans())
def test_any_damage_is_an_input_error_or_harmless(tmp_path, data, packed, checked):
    raw = idx_bytes(IMAGES)
    stored = bytearray(gzip.compress(raw, mtime=0) if packed else raw)
    places = st.integers(0, len(stored) - 1)
    flips = st.lists(st.tuples(places, st.integers(1, 255)), max_size=6)
    for place, mask in data.draw(flips):
        stored[place] ^= mask
    stored = stored[: data.draw(st.just(len(stored)) | places)]
    path = tmp_path / ("images.gz" if packed else "images")
    path.write_bytes(stored)
    try:
        array = read_idx(
            path, IMAGES.shape, sha256=hashlib.sha256(raw).hexdigest() if checked else None
        )
    except InputError as error:
        assert "\n" not in str(error)
        return
    if checked:
        np.testing.assert_array_equal(array, IMAGES)
    assert array.shape == IMAGES.shape
