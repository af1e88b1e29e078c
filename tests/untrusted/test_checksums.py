"""Metadata and checksums inside .tflite and .onnx files."""

import hashlib
import io
import json
import zipfile

import pytest

from keras_resnet.untrusted import checksums
from keras_resnet.utils.errors import InputError

METADATA = {"class_names": ["cat", "größer", "狗"], "data": {"dataset": "mine"}}
BODY = bytes(range(256)) * 20


def entries(content):
    """Returns the metadata that the onnx package reads."""
    import onnx

    model = onnx.load_model_from_string(content)
    return [(entry.key, entry.value) for entry in model.metadata_props]


def test_a_tflite_file_with_a_checksum_starts_with_its_flatbuffer_and_is_a_zip_archive():
    file = checksums.add_tflite_checksum(BODY, METADATA)
    assert file.startswith(BODY)
    assert checksums.read_tflite_metadata(file, "a.tflite") == METADATA
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        assert archive.read("labels.txt").decode() == "cat\ngrößer\n狗\n"
    assert checksums.add_tflite_checksum(BODY, METADATA) == file  # it contains no time


def test_the_metadata_key_of_earlier_exports_is_read():
    digest = hashlib.sha256(BODY).hexdigest()
    trailer = {"card": METADATA, "bytes": len(BODY), "sha256": digest}
    file = zipped(keras_resnet_json=json.dumps(trailer))
    assert checksums.read_tflite_metadata(file, "a.tflite") == METADATA


def test_an_onnx_file_with_a_checksum_is_one_message_with_metadata_and_provenance():
    file = checksums.add_onnx_checksum(b"", METADATA, {"tool": "x" * 300})
    assert checksums.check_onnx_checksum(file, "a.onnx")
    assert dict(entries(file))["tool"] == "x" * 300
    assert json.loads(dict(entries(file))["class_names"]) == METADATA["class_names"]
    assert checksums.read_onnx_metadata(entries(file), True, "a.onnx") == METADATA


@pytest.mark.parametrize(
    ("add", "read"),
    [
        (checksums.add_tflite_checksum, checksums.read_tflite_metadata),
        (checksums.add_onnx_checksum, checksums.check_onnx_checksum),
    ],
)
def test_a_changed_byte_is_found(add, read):
    file = add(BODY, METADATA)
    for place in range(0, len(BODY), 97):
        changed = bytearray(file)
        changed[place] ^= 1
        with pytest.raises(InputError, match=r"^a: damaged or changed: its metadata states sha256"):
            read(bytes(changed), "a")


def test_bytes_between_flatbuffer_and_archive_are_found():
    file = checksums.add_tflite_checksum(BODY, METADATA)
    with pytest.raises(InputError, match="its metadata states bytes 5120, and the file has 5124"):
        checksums.read_tflite_metadata(BODY + b"more" + file[len(BODY) :], "a.tflite")


def test_a_cut_archive_is_found():
    file = checksums.add_tflite_checksum(BODY, METADATA)
    for end in range(len(BODY) + 4, len(file)):
        with pytest.raises(InputError, match="damaged"):
            checksums.read_tflite_metadata(file[:end], "a.tflite")


def test_a_lost_onnx_checksum_is_found():
    file = checksums.add_onnx_checksum(b"", METADATA)
    metadata = entries(file)[:-1]
    without = file[: file.rindex(b"keras_resnet.sha256") - 4]
    assert not checksums.check_onnx_checksum(without, "a.onnx")
    assert entries(without) == metadata
    with pytest.raises(InputError, match=r"damaged: it has metadata .* without its checksum"):
        checksums.read_onnx_metadata(metadata, False, "a.onnx")


def zipped(**members):
    file = io.BytesIO(BODY)
    with zipfile.ZipFile(file, "a") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_txt", ".txt").replace("_json", ".json"), content)
    return file.getvalue()


def test_files_of_other_programs_are_read():
    assert checksums.read_tflite_metadata(BODY, "a.tflite") == {}
    assert checksums.read_tflite_metadata(b"", "a.tflite") == {}
    assert checksums.read_tflite_metadata(zipped(notes_txt="x"), "a.tflite") == {}
    labels = checksums.read_tflite_metadata(zipped(labels_txt="cat\r\ndog"), "a.tflite")
    assert labels == {"class_names": ["cat", "dog"]}
    assert not checksums.check_onnx_checksum(BODY, "a.onnx")
    assert not checksums.check_onnx_checksum(b"", "a.onnx")
    assert checksums.read_onnx_metadata([("author", "x")], False, "a.onnx") == {}


DIRECTORY = b"PK\x05\x06" + bytes(8) + (2**24).to_bytes(4, "little") + bytes(6)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped(labels_txt=bytes(checksums.MAX_MEMBER_BYTES + 1)), "labels.txt is larger than"),
        (zipped(labels_txt=b"\xff"), "can't decode"),
        (zipped(keras_resnet_json="["), "must be a JSON object with metadata"),
        (zipped(keras_resnet_json="[" * 10**5), "must be a JSON object with metadata"),
        (zipped(keras_resnet_json="{}"), "must be a JSON object with metadata"),
        (zipped(keras_resnet_json='{"metadata": {}}'), "states bytes None"),
        (zipped(**{f"m{i}": "" for i in range(17)}), "over 16"),
        (zipped(labels_txt=b"a").replace(b"labels.txt", b"labels.TXT", 1), "differ"),
        (BODY + DIRECTORY, "its directory has 16777216 bytes"),
    ],
    ids=["large", "no text", "cut", "nested", "no metadata", "no sum", "many", "name", "directory"],
)
def test_damaged_zip_archives_are_refused(content, reason):
    with pytest.raises(InputError, match=reason) as error:
        checksums.read_tflite_metadata(content, "a.tflite")
    assert str(error.value).startswith("a.tflite: damaged") and "\n" not in str(error.value)


def test_two_members_of_one_name_are_refused():
    file = io.BytesIO(checksums.add_tflite_checksum(BODY, METADATA))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("labels.txt", "others")
    with pytest.raises(InputError, match="two members of one name"):
        checksums.read_tflite_metadata(file.getvalue(), "a.tflite")


@pytest.mark.parametrize("metadata", ["[", "[]", "[" * 10**5])
def test_damaged_onnx_metadata_is_refused(metadata):
    with pytest.raises(InputError, match="its metadata must be a JSON object"):
        checksums.read_onnx_metadata(
            [("keras_resnet", metadata), ("keras_resnet.sha256", "")], True, "a.onnx"
        )
