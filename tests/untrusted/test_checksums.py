"""What .tflite and .onnx files say about themselves, and whether they are whole."""

import io
import json
import zipfile

import pytest

from keras_resnet.untrusted import checksums
from keras_resnet.utils.errors import InputError

METADATA = {"class_names": ["cat", "größer", "狗"], "data": {"dataset": "mine"}}
BODY = bytes(range(256)) * 20


def entries(content):
    """Returns what the onnx package reads as metadata."""
    import onnx

    model = onnx.load_model_from_string(content)
    return [(entry.key, entry.value) for entry in model.metadata_props]


def test_a_sealed_tflite_file_starts_with_its_flatbuffer_and_is_a_zip_archive():
    sealed = checksums.seal_tflite(BODY, METADATA)
    assert sealed.startswith(BODY)
    assert checksums.read_tflite_seal(sealed, "a.tflite") == METADATA
    with zipfile.ZipFile(io.BytesIO(sealed)) as archive:
        assert archive.read("labels.txt").decode() == "cat\ngrößer\n狗\n"
    assert checksums.seal_tflite(BODY, METADATA) == sealed  # nothing of the moment is in it


def test_a_sealed_onnx_file_is_one_message_with_its_card_and_provenance():
    sealed = checksums.seal_onnx(b"", METADATA, {"tool": "x" * 300})
    assert checksums.read_onnx_seal(sealed, "a.onnx")
    assert dict(entries(sealed))["tool"] == "x" * 300
    assert json.loads(dict(entries(sealed))["class_names"]) == METADATA["class_names"]
    assert checksums.onnx_metadata(entries(sealed), True, "a.onnx") == METADATA


@pytest.mark.parametrize(
    ("seal", "read"),
    [
        (checksums.seal_tflite, checksums.read_tflite_seal),
        (checksums.seal_onnx, checksums.read_onnx_seal),
    ],
)
def test_a_changed_byte_is_found(seal, read):
    sealed = seal(BODY, METADATA)
    for place in range(0, len(BODY), 97):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(InputError, match=r"^a: damaged or changed: its seal says sha256"):
            read(bytes(changed), "a")


def test_bytes_between_flatbuffer_and_seal_are_found():
    sealed = checksums.seal_tflite(BODY, METADATA)
    with pytest.raises(InputError, match="its seal says bytes 5120, and the file has 5124"):
        checksums.read_tflite_seal(BODY + b"more" + sealed[len(BODY) :], "a.tflite")


def test_a_cut_seal_is_found():
    sealed = checksums.seal_tflite(BODY, METADATA)
    for end in range(len(BODY) + 4, len(sealed)):
        with pytest.raises(InputError, match="damaged"):
            checksums.read_tflite_seal(sealed[:end], "a.tflite")


def test_a_lost_onnx_seal_is_found():
    sealed = checksums.seal_onnx(b"", METADATA)
    metadata = entries(sealed)[:-1]
    without = sealed[: sealed.rindex(b"keras_resnet.sha256") - 4]
    assert not checksums.read_onnx_seal(without, "a.onnx")
    assert entries(without) == metadata
    with pytest.raises(InputError, match="damaged: its metadata have our metadata"):
        checksums.onnx_metadata(metadata, False, "a.onnx")


def zipped(**members):
    file = io.BytesIO(BODY)
    with zipfile.ZipFile(file, "a") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_txt", ".txt").replace("_json", ".json"), content)
    return file.getvalue()


def test_files_of_others_are_read():
    assert checksums.read_tflite_seal(BODY, "a.tflite") == {}
    assert checksums.read_tflite_seal(b"", "a.tflite") == {}
    assert checksums.read_tflite_seal(zipped(notes_txt="x"), "a.tflite") == {}
    labels = checksums.read_tflite_seal(zipped(labels_txt="cat\r\ndog"), "a.tflite")
    assert labels == {"class_names": ["cat", "dog"]}
    assert not checksums.read_onnx_seal(BODY, "a.onnx")
    assert not checksums.read_onnx_seal(b"", "a.onnx")
    assert checksums.onnx_metadata([("author", "x")], False, "a.onnx") == {}


DIRECTORY = b"PK\x05\x06" + bytes(8) + (2**24).to_bytes(4, "little") + bytes(6)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped(labels_txt=bytes(checksums.MAX_MEMBER_BYTES + 1)), "labels.txt is larger than"),
        (zipped(labels_txt=b"\xff"), "can't decode"),
        (zipped(keras_resnet_json="["), "must be a JSON object with a card"),
        (zipped(keras_resnet_json="[" * 10**5), "must be a JSON object with a card"),
        (zipped(keras_resnet_json="{}"), "must be a JSON object with a card"),
        (zipped(keras_resnet_json='{"card": {}}'), "seal says bytes None"),
        (zipped(**{f"m{i}": "" for i in range(17)}), "over 16"),
        (zipped(labels_txt=b"a").replace(b"labels.txt", b"labels.TXT", 1), "differ"),
        (BODY + DIRECTORY, "its directory has 16777216 bytes"),
    ],
    ids=["large", "no text", "cut", "nested", "no card", "no sum", "many", "name", "directory"],
)
def test_damaged_zip_archives_are_refused(content, reason):
    with pytest.raises(InputError, match=reason) as error:
        checksums.read_tflite_seal(content, "a.tflite")
    assert str(error.value).startswith("a.tflite: damaged") and "\n" not in str(error.value)


def test_two_members_of_one_name_are_refused():
    file = io.BytesIO(checksums.seal_tflite(BODY, METADATA))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("labels.txt", "others")
    with pytest.raises(InputError, match="two members of one name"):
        checksums.read_tflite_seal(file.getvalue(), "a.tflite")


@pytest.mark.parametrize("metadata", ["[", "[]", "[" * 10**5])
def test_damaged_onnx_cards_are_refused(metadata):
    with pytest.raises(InputError, match="its metadata must be a JSON object"):
        checksums.onnx_metadata(
            [("keras_resnet", metadata), ("keras_resnet.sha256", "")], True, "a.onnx"
        )
