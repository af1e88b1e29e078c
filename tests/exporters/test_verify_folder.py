"""`verify`: an export folder checked again, elsewhere and after damage of many kinds."""

import hashlib
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import run_main

import keras_resnet
from keras_resnet import archive
from keras_resnet.evaluation.inference import load
from keras_resnet.exporters import saved_model
from keras_resnet.exporters.exporter import Job
from keras_resnet.exporters.formats import REFERENCE, Artifact
from keras_resnet.exporters.graph import Serving
from keras_resnet.exporters.verify_folder import CHANGED, DIFFERS, NOT_RUN, SOUND
from keras_resnet.untrusted.manifest import MANIFEST, digest, read_manifest
from keras_resnet.utils.errors import InputError

pytestmark = pytest.mark.thorough

PRECISIONS = ["float32", "int8"]
ARTIFACTS = [
    "saved_model",
    "model-float32.tflite",
    "model-float32-batch1.tflite",
    "model-int8.tflite",
    "model-int8-batch1.tflite",
    "model-float32.onnx",
    "model-int8.onnx",
]


@pytest.fixture(scope="module")
def exported(trained_run, fashion_folder, tmp_path_factory):
    """An export whose model and data are not there any more; not to be changed."""
    home = tmp_path_factory.mktemp("home")
    run = shutil.copytree(trained_run, home / "run")
    data = shutil.copytree(fashion_folder, home / "data")
    folder = tmp_path_factory.mktemp("exported") / "export"
    keras_resnet.export(run, folder, precision=PRECISIONS, dataset=f"folder:{data}")
    shutil.rmtree(home)
    assert [row["file"] for row in read_manifest(folder)["artifacts"]] == ARTIFACTS
    return folder


@pytest.fixture(scope="module")
def other_export(trained_run, tmp_path_factory):
    """The same of a model that is biased towards one class."""
    predictor = load(trained_run)
    predictor.model.layers[-1].weights[-1].assign_add([2.0, 0, 0, 0])
    folder = tmp_path_factory.mktemp("other")
    archive.save_model(predictor.model, folder / "other.keras", predictor.metadata)
    out = folder / "export"
    # Whether 8 bits can hold it, too, is not the question here.
    formats = ["tflite", "onnx"]
    keras_resnet.export(folder / "other.keras", out, to=formats, precision=PRECISIONS, force=True)
    # Its verification in a process of its own would take ten seconds.
    job = Job(Serving(predictor.model), predictor.metadata, {}, None)
    saved_model.write(job, Artifact("saved_model", "float32"), out / "saved_model")
    return out


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "elsewhere" / "copy"))


def relist(folder, *files):
    """Writes the new sizes and checksums of files into the manifest, as an attacker could."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for row in [manifest["reference"], *manifest["artifacts"]]:
        if row["file"] in files:
            row["bytes"], row["sha256"] = digest(folder / row["file"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


def keep(folder, *files):
    """Removes all other files from the manifest, which would take time."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["artifacts"] = [row for row in manifest["artifacts"] if row["file"] in files]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def verdicts(found):
    return {row["file"]: row["verdict"] for row in found["files"]}


def replace(folder, other, file):
    """Puts another export's file in the place of this one's, and lists it."""
    if (folder / file).is_dir():
        shutil.rmtree(folder / file)
        shutil.copytree(other / file, folder / file)
    else:
        shutil.copy(other / file, folder / file)
    relist(folder, file)


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[min(int(position * len(content)), len(content) - 1)] ^= 1
    path.write_bytes(content)


# ----------------------------------------------------------------------------------------------
# Nothing has changed
# ----------------------------------------------------------------------------------------------


def test_a_copy_elsewhere_is_sound_without_its_model_and_data(copy):
    done = run_main("verify", copy, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    expected = {REFERENCE: SOUND, **dict.fromkeys(ARTIFACTS, SOUND), "saved_model": NOT_RUN}
    assert found["passed"] and verdicts(found) == expected
    # On the machine of the export every prediction is the same again.
    assert {row["max_difference"] for row in found["files"][2:]} == {0}
    assert {row["agreement"] for row in found["files"][2:]} == {1}


def test_with_trust_the_saved_model_runs_too(copy):
    found = keras_resnet.verify(copy, trust=True)
    assert found["passed"] and {*verdicts(found).values()} == {SOUND}


def test_verification_changes_nothing(copy):
    before = digest(copy)
    keras_resnet.verify(str(copy), trust=True)
    assert digest(copy) == before


def test_with_a_data_set_all_its_images_are_evaluated(exported, fashion_folder):
    done = run_main("verify", exported, "--dataset", f"folder:{fashion_folder}", "--json")
    assert done.returncode == 0, done.stderr
    found = {row["file"]: row for row in json.loads(done.stdout)["files"]}
    for row in read_manifest(exported)["artifacts"]:
        ran = row["format"] != "saved_model"
        assert found[row["file"]].get("accuracy") == (row["accuracy"] if ran else None)


def test_floats_instead_of_images_are_verified_alike(trained_run, fashion_folder, tmp_path):
    out = tmp_path / "out"
    keras_resnet.export(trained_run, out, to=["onnx"], precision=["float32"], preprocessing=False)
    assert keras_resnet.verify(out)["passed"]
    with pytest.raises(InputError, match="--dataset needs artifacts that take images"):
        keras_resnet.verify(out, dataset=f"folder:{fashion_folder}")


# ----------------------------------------------------------------------------------------------
# Something has changed
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [*ARTIFACTS[1:], "saved_model/saved_model.pb"])
@pytest.mark.parametrize("position", [0, 0.37, 1])
def test_one_flipped_byte_is_found(file, position, copy):
    artifact = file.split("/")[0]
    keep(copy, artifact)
    flip(copy / file, position)
    found = keras_resnet.verify(copy, trust=True)
    assert not found["passed"] and verdicts(found) == {REFERENCE: SOUND, artifact: CHANGED}
    assert "sha256" in found["files"][1]["failures"][0]


def test_a_changed_file_is_named_and_the_status_is_1(copy):
    flip(copy / "model-int8.tflite")
    done = run_main("verify", copy)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = f"keras-resnet: {copy}: the files differ from the exported ones"
    assert done.stderr.splitlines()[-1] == line
    (line,) = [line for line in done.stdout.splitlines() if CHANGED in line]
    assert line.startswith("model-int8.tflite ")
    # The others are checked all the same.
    assert done.stdout.count(SOUND) == len(ARTIFACTS) - 1


def remove_artifact(folder):
    (folder / "model-float32.onnx").unlink()


def remove_saved_model(folder):
    shutil.rmtree(folder / "saved_model")


def swap(folder):
    one, other = folder / "model-float32.onnx", folder / "model-int8.onnx"
    one.rename(folder / "kept")
    other.rename(one)
    (folder / "kept").rename(other)


def add_to_saved_model(folder):
    (folder / "saved_model" / "assets" / "more.txt").write_text("more")


def remove_metadata(folder):
    (folder / "saved_model" / "assets.extra" / "keras_resnet.json").unlink()


def link_in_saved_model(folder):
    (folder / "saved_model" / "assets" / "link").symlink_to("/etc/passwd")


def replace_by_folder(folder):
    (folder / "model-int8.onnx").unlink()
    (folder / "model-int8.onnx").mkdir()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (remove_artifact, {"model-float32.onnx"}),
        (remove_saved_model, {"saved_model"}),
        (swap, {"model-float32.onnx", "model-int8.onnx"}),
        (add_to_saved_model, {"saved_model"}),
        (remove_metadata, {"saved_model"}),
        (link_in_saved_model, {"saved_model"}),
        (replace_by_folder, {"model-int8.onnx"}),
    ],
)
def test_a_change_is_found_and_named(change, named, copy):
    keep(copy, "saved_model", "model-float32.onnx", "model-int8.onnx")
    change(copy)
    found = keras_resnet.verify(copy)
    assert not found["passed"]
    assert {row["file"] for row in found["files"] if row["verdict"] == CHANGED} == named
    assert {row["file"] for row in found["files"] if row["failures"]} == named


def test_a_changed_reference_stops_the_rest(copy):
    flip(copy / REFERENCE)
    found = keras_resnet.verify(copy)
    assert not found["passed"] and verdicts(found).pop(REFERENCE) == CHANGED
    assert SOUND not in verdicts(found).values()


@pytest.mark.parametrize("file", ARTIFACTS)
def test_a_file_that_was_changed_and_listed_again_is_found_by_its_answers(file, copy, other_export):
    keep(copy, file)
    replace(copy, other_export, file)
    found = keras_resnet.verify(copy, trust=True)
    assert not found["passed"] and verdicts(found) == {REFERENCE: SOUND, file: DIFFERS}
    assert "agreement" in " ".join(found["files"][1]["failures"])


def test_a_saved_model_is_not_run_without_trust(copy):
    keep(copy, "saved_model")
    (copy / "saved_model" / "saved_model.pb").write_bytes(b"no model")
    relist(copy, "saved_model")
    found = keras_resnet.verify(copy)
    assert found["passed"] and verdicts(found)["saved_model"] == NOT_RUN


@pytest.mark.parametrize(
    ("file", "other"),
    [
        ("model-float32.tflite", "model-float32-batch1.tflite"),
        ("model-float32-batch1.tflite", "model-float32.tflite"),
        ("model-float32.onnx", "model-int8.onnx"),
    ],
)
def test_another_file_of_the_same_model_under_its_name_is_found(file, other, copy):
    keep(copy, file)
    shutil.copy(copy / other, copy / file)
    relist(copy, file)
    found = keras_resnet.verify(copy)
    assert verdicts(found)[file] == DIFFERS and not found["passed"]


def test_no_model_at_all_under_its_name_is_found(copy):
    keep(copy, "model-float32.onnx", "model-int8.onnx")
    (copy / "model-float32.onnx").write_bytes(b"no model")
    relist(copy, "model-float32.onnx")
    found = keras_resnet.verify(copy)
    assert verdicts(found)["model-float32.onnx"] == DIFFERS
    assert verdicts(found)["model-int8.onnx"] == SOUND


# ----------------------------------------------------------------------------------------------
# Refused in one line
# ----------------------------------------------------------------------------------------------


def test_other_data_are_refused(exported, fashion_folder, tmp_path):
    fewer = shutil.copytree(fashion_folder, tmp_path / "fewer")
    sorted((fewer / "Bag").iterdir())[0].unlink()
    for dataset in (f"folder:{fewer}", "fashion_mnist"):
        with pytest.raises(InputError, match="not the data of the export: fingerprint"):
            keras_resnet.verify(exported, dataset=dataset)


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def arrays_of(folder):
    with np.load(folder / REFERENCE) as arrays:
        return dict(arrays)


def change(**others):
    """Returns a function that writes the reference with arrays replaced; None leaves one out."""

    def write(folder):
        arrays = arrays_of(folder)
        for name, new in others.items():
            name = f"answers/{ARTIFACTS[5]}" if name == "answers" else name
            arrays[name] = new(arrays[name]) if new else None
        kept = {name: array for name, array in arrays.items() if array is not None}
        np.savez(folder / REFERENCE, **kept)

    return write


def write_pickle(folder):
    array = np.empty(4, object)
    array[:] = [Payload(folder / "unpickled")] * 4
    np.savez(folder / REFERENCE, **{**arrays_of(folder), "images": array})


def write_bare_pickle(folder):
    (folder / REFERENCE).write_bytes(pickle.dumps(Payload(folder / "unpickled")))


def write_huge(folder):
    more = np.zeros(300 * 2**20, "uint8")
    np.savez_compressed(folder / REFERENCE, **arrays_of(folder), more=more)


def write_claim(folder):
    """A header that promises far more than there is."""
    with zipfile.ZipFile(folder / REFERENCE, "w") as archive, archive.open("images.npy", "w") as m:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 28, 28, 10**4)}
        np.lib.format.write_array_header_1_0(m, header)
        m.write(bytes(100))


def make_nan(array):
    array[0, 0] = np.nan
    return array


HOSTILE = {
    "a pickle inside": write_pickle,
    "a pickle": write_bare_pickle,
    "huge when unpacked": write_huge,
    "huge by its header": write_claim,
    "empty": lambda folder: (folder / REFERENCE).write_bytes(b""),
    "text": lambda folder: (folder / REFERENCE).write_text("images"),
    "a plain array": lambda folder: np.save((folder / REFERENCE).open("wb"), np.zeros(3)),
    "no images": change(images=None),
    "no predictions": change(answers=None),
    "no top1": change(top1=None),
    "one image": change(images=lambda a: a[:1]),
    "fewer images": change(images=lambda a: a[:-1]),
    "flat images": change(images=lambda a: a.reshape(len(a), -1)),
    "a number for images": change(images=lambda a: np.uint8(3)),
    "fewer classes": change(probabilities=lambda a: a[:, :2]),
    "fewer predictions": change(answers=lambda a: a[:3]),
    "predictions that are NaN": change(answers=make_nan),
    "predictions of text": change(answers=lambda a: a.astype(str)),
    "fewer top1": change(top1=lambda a: a[:-1]),
    "images of text": change(images=lambda a: a.astype(str)),
    "images of another size": change(images=lambda a: a[:, :14]),
    "images of another kind": change(images=lambda a: a.astype("complex64")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_reference_is_one_line_or_a_failure(case, copy):
    file = ARTIFACTS[5]
    keep(copy, file)
    HOSTILE[case](copy)
    relist(copy, REFERENCE)
    try:
        found = keras_resnet.verify(copy)
    except InputError as error:
        message = str(error)
        assert message.startswith(f"{copy / REFERENCE}: damaged: ")
        assert message.isprintable() and len(message) < 500
    else:
        # The arrays fit each other, and not the model.
        assert case.startswith("images of") and verdicts(found)[file] == DIFFERS
    assert not (copy / "unpickled").exists()


def test_a_pickle_on_the_command_line_is_status_2(copy):
    write_pickle(copy)
    relist(copy, REFERENCE)
    done = run_main("verify", copy)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith(f"keras-resnet: {copy / REFERENCE}: damaged:")
    assert not (copy / "unpickled").exists()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "coreml", "`format` must be one of saved_model, tflite, onnx, got 'coreml'"),
        ("precision", "int4", "`precision` must be one of float32, .*, got 'int4'"),
        ("batch", 7, "`batch` must be null or 1, got 7"),
        ("sha256", hashlib.md5(b"").hexdigest(), "must be 64 hexadecimal digits"),
        ("file", "../model.onnx", "must be the name of a file in the manifest's own folder"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_one_line(key, value, message, copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["artifacts"][1][key] = value
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message) as caught:
        keras_resnet.verify(copy)
    assert str(caught.value).startswith(f"{copy / MANIFEST}: ")


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [[], [None, 28], [None, 28, 28, 1, 1], [None, None, None, None]])
@pytest.mark.parametrize("with_data", [False, True])
def test_a_shape_in_the_manifest_that_is_no_images_is_no_traceback(
    side, shape, with_data, copy, fashion_folder
):
    keep(copy, "model-float32.onnx")
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["artifacts"][0][side]["shape"] = shape
    (copy / MANIFEST).write_text(json.dumps(manifest))
    try:
        found = keras_resnet.verify(copy, dataset=f"folder:{fashion_folder}" if with_data else None)
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert not found["passed"]


def test_a_manifest_without_artifacts_is_no_traceback(copy, fashion_folder):
    keep(copy)
    assert verdicts(keras_resnet.verify(copy)) == {REFERENCE: SOUND}
    with pytest.raises(InputError):
        keras_resnet.verify(copy, dataset=f"folder:{fashion_folder}")


def test_a_folder_without_a_manifest_is_status_2(tmp_path):
    done = run_main("verify", tmp_path)
    assert done.returncode == 2
    message = f"keras-resnet: {tmp_path / MANIFEST}: there is no such manifest"
    assert done.stderr.splitlines()[-1] == message
