"""The trained models that are a part of the package."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import run_main
from PIL import Image

import keras_resnet
from keras_resnet import archive
from keras_resnet.exporters.source import open_export_source
from keras_resnet.untrusted.manifest import digest
from keras_resnet.weights.sources import open_source

NAME, PATH = "fashion_mnist", archive.TRAINED["fashion_mnist"]


@pytest.fixture(scope="module")
def record():
    return json.loads(PATH.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def fashion_images(idx_folder):
    return keras_resnet.load_dataset("fashion_mnist").splits["test"]


def test_the_file_is_that_of_its_record(record):
    assert digest(PATH) == (record["bytes"], record["sha256"])
    assert record["bytes"] <= 1_000_000


@pytest.mark.thorough
def test_its_accuracy_is_that_of_its_record(record, fashion_images):
    predictor = keras_resnet.load(NAME)
    found = keras_resnet.evaluate(predictor, fashion_images, predictor.class_names)
    # Another processor may round a few images to another class.
    assert abs(found.accuracy - record["accuracy"]) < 0.001
    assert record["accuracy"] > 0.92
    assert abs(record["accuracy"] - record["accuracy_of_the_run"]) < 0.001


@pytest.fixture
def boots(fashion_images, tmp_path):
    """A folder of ankle boots, beside one of bags."""
    folder = tmp_path / "clothes"
    for label, name in ((9, "boots"), (8, "bags")):
        (folder / name).mkdir(parents=True)
        for index in np.flatnonzero(fashion_images.labels == label)[:8]:
            pixels = Image.fromarray(fashion_images.images[index, :, :, 0])
            pixels.save(folder / name / f"{index}.png")
    return folder / "boots"


def test_predict_answers_by_name(boots):
    path = min(boots.iterdir())
    done = run_main("predict", NAME, path)
    assert done.returncode == 0, done.stderr
    assert "Ankle boot" in done.stdout


def test_training_starts_from_it(boots, tmp_path):
    """With its network and its normalization, which need not be given."""
    data, options = f"folder:{boots.parent}", {"epochs": 1, "strategy": "none", "verbose": False}
    run = keras_resnet.train(None, data, weights=NAME, run_dir=tmp_path / "run", **options)
    settings = run.report["config"]["settings"]
    assert settings["model"] == "resnet10_narrow" and settings["normalize"] == "none"


@pytest.mark.parametrize("damaged", [5, {"a": 1}, None, [], "x"])
def test_metadata_of_another_type_name_no_network_and_no_classes(damaged, tmp_path):
    metadata = {"model": damaged, "class_names": damaged, "variant": damaged}
    archive.write_model(archive.load_model(PATH), tmp_path / "a.keras", metadata)
    source = open_source(tmp_path / "a.keras")
    assert source.model is None and source.has_classes(range(10))


@pytest.mark.parametrize(("renamed", "is_new"), [(False, False), (True, True)])
def test_a_head_of_as_many_other_classes_is_new(renamed, is_new, fashion_images, tmp_path, capsys):
    data = keras_resnet.load_dataset("fashion_mnist")
    few = keras_resnet.Split(fashion_images.images[:64], fashion_images.labels[:64])
    names = tuple(map(str, range(10))) if renamed else data.class_names
    data = dataclasses.replace(data, class_names=names, splits={"train": few, "test": few})
    options = {"weights": NAME, "epochs": 1, "strategy": "none", "freeze": None}
    for resume in (False, True):
        options["epochs"] += resume
        keras_resnet.train(None, data, "fast", run_dir=tmp_path / "run", resume=resume, **options)
    said = capsys.readouterr().out
    assert ("new head: 10 classes, the checkpoint has 10 others" in said) == is_new
    assert ("head of 10 classes loaded" in said) != is_new
    frozen = keras_resnet.train(
        None, data, "fast", run_dir=tmp_path / "b", **{**options, "freeze": ["logits"]}
    )
    # With a frozen head the names are those of the user.
    assert "head of 10 classes loaded" in capsys.readouterr().out and frozen.history


def test_a_file_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert archive.find_model(NAME) == PATH
    (tmp_path / NAME).write_bytes(b"")
    assert archive.find_model(NAME) != PATH


def test_an_export_by_name_is_written_to_the_current_folder(boots, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_main("export", NAME, "--to", "onnx", "--photos", boots)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / f"{NAME}-export" / "manifest.json").is_file()
    refused = run_main("predict", f"{NAME}-export", "x.png")
    assert refused.returncode == 2 and "it is an export; name one of its files" in refused.stderr


def test_a_run_folder_is_not_overwritten_by_its_conversion(trained_run):
    before = digest(trained_run / "model.keras")
    out = trained_run / "model.keras"
    done = run_main("convert", trained_run, "--model", "tiny", "--out", out)
    assert done.returncode == 2 and "is the checkpoint itself" in done.stderr
    assert digest(out) == before


def test_a_run_at_home_is_exported_into_its_folder(trained_run, monkeypatch):
    monkeypatch.setenv("HOME", str(trained_run.parent))
    source = open_export_source(f"~/{trained_run.name}")
    assert source.folder == trained_run / "export" and source.record["run"]["model"] == "tiny"


def test_a_run_folder_is_a_checkpoint_to_start_from(trained_run):
    assert open_source(trained_run).sha256 == open_source(trained_run / "model.keras").sha256
