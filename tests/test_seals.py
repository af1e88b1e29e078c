"""What .tflite and .onnx files say about themselves, and whether they are whole."""

import io
import json
import zipfile

import pytest

from keras_resnet import seals
from keras_resnet.errors import InputError

CARD = {"class_names": ["cat", "größer", "狗"], "data": {"dataset": "mine"}}
BODY = bytes(range(256)) * 20


def entries(content):
    """Returns what the onnx package reads as metadata."""
    import onnx

    model = onnx.load_model_from_string(content)
    return [(entry.key, entry.value) for entry in model.metadata_props]


def test_a_sealed_tflite_file_starts_with_its_flatbuffer_and_is_a_zip_archive():
    sealed = seals.seal_tflite(BODY, CARD)
    assert sealed.startswith(BODY)
    assert seals.read_tflite_seal(sealed, "a.tflite") == CARD
    with zipfile.ZipFile(io.BytesIO(sealed)) as archive:
        assert archive.read("labels.txt").decode() == "cat\ngrößer\n狗\n"
    assert seals.seal_tflite(BODY, CARD) == sealed  # nothing of the moment is in it


def test_a_sealed_onnx_file_is_one_message_with_its_card_and_provenance():
    sealed = seals.seal_onnx(b"", CARD, {"tool": "x" * 300})
    assert seals.read_onnx_seal(sealed, "a.onnx")
    assert dict(entries(sealed))["tool"] == "x" * 300
    assert json.loads(dict(entries(sealed))["class_names"]) == CARD["class_names"]
    assert seals.onnx_card(entries(sealed), True, "a.onnx") == CARD


@pytest.mark.parametrize(
    ("seal", "read"),
    [
        (seals.seal_tflite, seals.read_tflite_seal),
        (seals.seal_onnx, seals.read_onnx_seal),
    ],
)
def test_a_changed_byte_is_found(seal, read):
    sealed = seal(BODY, CARD)
    for place in range(0, len(BODY), 97):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(InputError, match=r"^a: damaged or changed: its seal says sha256"):
            read(bytes(changed), "a")


def test_bytes_between_flatbuffer_and_seal_are_found():
    sealed = seals.seal_tflite(BODY, CARD)
    with pytest.raises(InputError, match="its seal says bytes 5120, and the file has 5124"):
        seals.read_tflite_seal(BODY + b"more" + sealed[len(BODY) :], "a.tflite")


def test_a_cut_seal_is_found():
    sealed = seals.seal_tflite(BODY, CARD)
    for end in range(len(BODY) + 4, len(sealed)):
        with pytest.raises(InputError, match="damaged"):
            seals.read_tflite_seal(sealed[:end], "a.tflite")


def test_a_lost_onnx_seal_is_found():
    sealed = seals.seal_onnx(b"", CARD)
    metadata = entries(sealed)[:-1]
    without = sealed[: sealed.rindex(b"keras_resnet.sha256") - 4]
    assert not seals.read_onnx_seal(without, "a.onnx")
    assert entries(without) == metadata
    with pytest.raises(InputError, match="damaged: its metadata have our card"):
        seals.onnx_card(metadata, False, "a.onnx")


def zipped(**members):
    file = io.BytesIO(BODY)
    with zipfile.ZipFile(file, "a") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_txt", ".txt").replace("_json", ".json"), content)
    return file.getvalue()


def test_files_of_others_are_read():
    assert seals.read_tflite_seal(BODY, "a.tflite") == {}
    assert seals.read_tflite_seal(b"", "a.tflite") == {}
    assert seals.read_tflite_seal(zipped(notes_txt="x"), "a.tflite") == {}
    labels = seals.read_tflite_seal(zipped(labels_txt="cat\r\ndog"), "a.tflite")
    assert labels == {"class_names": ["cat", "dog"]}
    assert not seals.read_onnx_seal(BODY, "a.onnx")
    assert not seals.read_onnx_seal(b"", "a.onnx")
    assert seals.onnx_card([("author", "x")], False, "a.onnx") == {}


DIRECTORY = b"PK\x05\x06" + bytes(8) + (2**24).to_bytes(4, "little") + bytes(6)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (zipped(labels_txt=bytes(seals.MAX_MEMBER_BYTES + 1)), "labels.txt is larger than"),
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
        seals.read_tflite_seal(content, "a.tflite")
    assert str(error.value).startswith("a.tflite: damaged") and "\n" not in str(error.value)


def test_two_members_of_one_name_are_refused():
    file = io.BytesIO(seals.seal_tflite(BODY, CARD))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("labels.txt", "others")
    with pytest.raises(InputError, match="two members of one name"):
        seals.read_tflite_seal(file.getvalue(), "a.tflite")


@pytest.mark.parametrize("card", ["[", "[]", "[" * 10**5])
def test_damaged_onnx_cards_are_refused(card):
    with pytest.raises(InputError, match="its card must be a JSON object"):
        seals.onnx_card([("keras_resnet", card), ("keras_resnet.sha256", "")], True, "a.onnx")
