"""Exports of a model of photographs: files that take any size, or one size, or whole numbers."""

import json
import re
import runpy
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from conftest import run_main
from photo_files import COUNT, NAMES, PREPROCESSING, write_model, write_photos
from PIL import Image

from keras_resnet import InputError, export, with_preprocessing
from keras_resnet.evaluation.inference import evaluate_file, load, predict_files
from keras_resnet.exporters.verify_folder import NOT_RUN, SOUND, verify
from keras_resnet.untrusted.manifest import read_manifest

pytestmark = pytest.mark.thorough

SIZE = 24
SCRIPTS = Path(__file__).parents[2] / "export"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of small photographs."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, SIZE)
    return folder


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory):
    """The .keras file of a network with the preprocessing of a published one."""
    path = tmp_path_factory.mktemp("models") / "any.keras"
    write_model(path, photos, SIZE)
    return path


@pytest.fixture(scope="module")
def any_size(model, photos, tmp_path_factory):
    """The export folder of files that take any size, and the lines that were printed."""
    folder, lines = tmp_path_factory.mktemp("export") / "any", []
    export(model, folder, photos=photos, report=lines.append)
    return folder, lines


@pytest.fixture(scope="module")
def one_size(model, photos, tmp_path_factory):
    """The export folder of files that take images which were resized and cropped already."""
    folder = tmp_path_factory.mktemp("export") / "one"
    done = run_main(
        *("export", model, "--photos", *sorted(photos.iterdir()), "--out", folder),
        *("--precision", "float32", "integer", "--to", "tflite", "onnx"),
        *("--input-size", SIZE, SIZE),
    )
    assert done.returncode == 0, done.stderr
    return folder


def files(folder, suffixes=("tflite", "onnx")):
    return sorted(path for path in folder.iterdir() if path.suffix[1:] in suffixes)


def test_every_format_and_precision_takes_any_size(any_size):
    folder, lines = any_size
    manifest = read_manifest(folder)
    assert [row["file"] for row in manifest["artifacts"]] == [
        "saved_model",
        *(f"model-{name}.tflite" for name in ("float32", "float16", "dynamic", "int8")),
        *(f"model-{name}.onnx" for name in ("float32", "float16", "int8")),
    ]
    for row in manifest["artifacts"]:
        assert row["input"]["shape"] == [None, None, None, 3]
        assert row["images"] == COUNT and not row["failures"]
    # On the photographs at their own sizes, and without a number that nobody measured.
    assert manifest["artifacts"][1]["max_difference"] < 1e-5
    assert {row["accuracy"] for row in (manifest["keras"], *manifest["artifacts"])} == {None}
    assert lines[0].startswith(f"the accuracy cannot be measured on {COUNT} photographs")


def test_what_a_phone_needs_stands_beside_the_file_and_in_it(any_size, one_size):
    for folder, resized_by in ((any_size[0], "file"), (one_size, "caller")):
        assert (folder / "labels.txt").read_text() == "cat\ndog\nnewt\nowl\n"
        described = read_manifest(folder)["preprocessing"]
        assert described["colours"] == "red, green, blue" and described["values"] == [0, 255]
        assert described["image_size"] == [SIZE, SIZE]
        assert described["resizing"] == {
            "done_by": resized_by,
            "resampler": "pillow",
            "rounding": "torchvision",
            **{key: PREPROCESSING[key] for key in ("resize", "crop_pct", "interpolation")},
            "antialias": True,
        }
        assert described["normalization"]["done_by"] == "file"
        for path in files(folder):
            inside = load(path, trust=True).metadata
            assert inside["preprocessing"] == described and inside["class_names"] == NAMES


def test_verify_needs_the_folder_alone(any_size, one_size):
    for folder in (any_size[0], one_size):
        found = verify(folder)
        assert found["passed"]
        verdicts = {row["file"]: row["verdict"] for row in found["files"]}
        assert verdicts.pop("saved_model", NOT_RUN) == NOT_RUN
        assert {*verdicts.values()} == {SOUND}
        with pytest.raises(InputError, match=r"--dataset needs .* images with labels"):
            verify(folder, dataset="fashion_mnist")


def probabilities(path, images):
    rows = predict_files(path, images, top=len(NAMES), trust=True)
    return np.array([[row["probability"] for row in sorted(r["labels"], key=str)] for r in rows]), [
        [row["label"] for row in r["labels"]] for r in rows
    ]


def test_predict_gives_the_same_for_every_file(model, photos, any_size, one_size):
    images = sorted(photos.iterdir())
    expected, labels = probabilities(model, images)
    assert np.ptp(expected, axis=0).max() > 0.1
    for folder in (any_size[0], one_size):
        for path in files(folder):
            found, own_labels = probabilities(path, images)
            if "float32" in path.name:
                np.testing.assert_allclose(found, expected, atol=2e-4)
                assert own_labels == labels
            else:
                alike = [a[0] == b[0] for a, b in zip(own_labels, labels, strict=True)]
                assert np.mean(alike) > 0.8


@pytest.mark.parametrize("suffix", ["tflite", "onnx"])
def test_the_scripts_for_a_device_prepare_images_alike(
    model, photos, any_size, one_size, suffix, monkeypatch, capsys
):
    images = [str(path) for path in sorted(photos.iterdir())]
    expected = predict_files(model, images, top=2)
    for folder in (any_size[0], one_size):
        path = folder / f"model-float32.{suffix}"
        script = SCRIPTS / f"run_{suffix}.py"
        words = [str(script), str(path), *images, "--top", "2", "--json"]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(script), run_name="__main__")
        for row, wanted in zip(json.loads(capsys.readouterr().out), expected, strict=True):
            assert [x["label"] for x in row["labels"]] == [x["label"] for x in wanted["labels"]]
            numbers = [[x["probability"] for x in r["labels"]] for r in (row, wanted)]
            np.testing.assert_allclose(*numbers, atol=2e-4)


def test_a_file_of_whole_numbers_has_no_float_in_it(one_size):
    for name in ("model-integer.tflite", "model-integer-batch1.tflite"):
        interpreter = Interpreter(model_path=str(one_size / name))
        (image,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
        assert image["dtype"] == output["dtype"] == np.uint8
        assert image["quantization"] == (1.0, 0)  # a grey level stands for itself
        dtypes = {np.dtype(each["dtype"]).kind for each in interpreter.get_tensor_details()}
        assert "f" not in dtypes
    row = next(row for row in read_manifest(one_size)["artifacts"] if "integer" in row["file"])
    assert row["output"]["dtype"] == "uint8" and row["agreement"] >= 0.985


def test_a_folder_of_classes_measures_the_accuracy(model, photos, tmp_path):
    expected = predict_files(model, sorted(photos.iterdir()), top=1)
    for number, row in enumerate(expected):
        # Every third label is a wrong one.
        wrong = NAMES[(NAMES.index(row["labels"][0]["label"]) + 1) % len(NAMES)]
        name = wrong if number % 3 == 0 else row["labels"][0]["label"]
        (tmp_path / "set" / name).mkdir(parents=True, exist_ok=True)
        Image.open(row["image"]).save(tmp_path / "set" / name / Path(row["image"]).name)
    for name in NAMES:
        (tmp_path / "set" / name).mkdir(exist_ok=True)
    manifest = export(
        model,
        tmp_path / "export",
        to=["tflite"],
        precision=["float32"],
        dataset=f"folder:{tmp_path / 'set'}",
    )
    (row,) = manifest["artifacts"]
    assert manifest["keras"]["accuracy"] == row["accuracy"] == pytest.approx(2 / 3)
    name = f"folder:{tmp_path / 'set'}"
    assert evaluate_file(tmp_path / "export" / row["file"], name).accuracy == row["accuracy"]
    # Again by `verify`, which measures photographs of several sizes one by one.
    found = verify(tmp_path / "export", dataset=name)
    assert found["passed"] and found["files"][1]["accuracy"] == row["accuracy"]
    # Files of one size in the same folder replace those of any size.
    options = {"to": ["onnx"], "precision": ["float32"], "dataset": name}
    manifest = export(model, tmp_path / "export", input_size=(SIZE, SIZE), **options)
    assert [row["file"] for row in manifest["artifacts"]] == ["model-float32.onnx"]
    found = verify(tmp_path / "export", dataset=name)
    assert found["passed"] and found["files"][1]["accuracy"] == row["accuracy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input-size", 20, 20], "--input-size must be the size .*, 24 24, got 20 20"),
        (["--input-size", 24, 24, "--no-preprocessing"], "either --input-size or --no-pre"),
        (["--precision", "integer"], "--precision integer needs .* --input-size 224 224"),
        (["--dataset", "fashion_mnist"], "--dataset or --photos, not both"),
        (["--photos", "missing.jpg"], "missing.jpg: no such image file"),
        ([], "does not record a data set .* --photos FOLDER, or --dataset"),
    ],
)
def test_bad_choices_are_one_line_and_status_2(model, photos, tmp_path, arguments, message):
    if arguments and arguments[0] != "--photos":
        arguments = ["--photos", photos, *arguments]
    done = run_main("export", model, "--out", tmp_path / "export", "--to", "tflite", *arguments)
    assert done.returncode == 2 and not (tmp_path / "export").exists()

    assert re.search(message, done.stderr.splitlines()[-1])


def test_a_model_that_resizes_without_rounding_is_not_cut(photos, tmp_path):
    network = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])
    model = with_preprocessing(network, (None, None, 3))
    with pytest.raises(InputError, match="whole grey levels"):
        export(model, tmp_path / "export", photos=photos, input_size=(8, 8))
