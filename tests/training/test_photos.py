"""The recipe for photographs: a folder as people have it, from scratch and from weights."""

import contextlib
import dataclasses
import io
import json
import time
from unittest import mock

import keras
import numpy as np
import pytest
from conftest import run_main, write_tiny
from PIL import Image

from keras_resnet import Split, models
from keras_resnet.archive import load_model, read_metadata
from keras_resnet.config import TrainConfig, given_settings
from keras_resnet.datasets import load_dataset
from keras_resnet.datasets.photos import load_photos
from keras_resnet.distribution.strategies import decide
from keras_resnet.evaluation.report import find_best
from keras_resnet.recipes import RECIPES
from keras_resnet.training import callbacks, fine_tuning, trainer
from keras_resnet.training.inputs import Batches
from keras_resnet.training.trainer import train
from keras_resnet.utils.errors import InputError, Interrupted

COLOURS = {"blue": (30, 60, 200), "red": (200, 60, 30)}
COUNTS = {"train": {"blue": 30, "red": 6}, "val": {"blue": 5, "red": 5}, "test": {"red": 8}}
SMALL = {"image_size": 32, "batch_size": 8, "precision": "float32", "verbose": False}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of splits: noisy images of two colours, of many sizes, five times as many blue."""
    root, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, counts in COUNTS.items():
        for name, count in counts.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                height, width = random.integers(40, 90, 2)
                noise = random.normal(0, 40, (height, width, 3))
                pixels = (noise + COLOURS[name]).clip(0, 255).astype("uint8")
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def run(photographs, tmp_path_factory):
    """The folder of a run with the options of a beginner, but small; and its output."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    done = run_main(
        *("train", "--model", "tiny", "--dataset", f"folder:{photographs}", "--run-dir", run_dir),
        *("--image-size", 32, "--batch-size", 8, "--epochs", 4, "--precision", "float32"),
    )
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


def test_a_folder_is_trained_by_the_recipe_for_photographs(run):
    run_dir, output = run
    config = json.loads((run_dir / "config.json").read_text())
    assert config["recipe"]["name"] == config["settings"]["recipe"] == "photos"
    assert config["dataset"]["splits"] == {"train": 36, "validation": 10, "test": 8}
    assert config["dataset"]["class_counts"] == [30, 6]
    assert "training images per class: blue 30, red 6" in output
    assert "note: the largest class has 5 times the images of the smallest: with --class" in output
    assert "note: test has no images of blue" in output


def test_validation_chooses_and_the_test_images_are_measured_once(run):
    run_dir, output = run
    report = json.loads((run_dir / "report.json").read_text())
    text = (run_dir / "report.md").read_text()
    assert (report["evaluation_split"], report["num_images"]) == ("test", 8)
    assert f"Epoch {report['best_epoch']} was chosen, as the best on the validation split." in text
    assert "of the time waiting for data" in text
    assert "## Where the network looked" in text and (run_dir / "grad_cam.png").is_file()
    assert "test accuracy" in output


def test_the_model_takes_photographs_of_any_size(run, photographs):
    run_dir, _ = run
    assert load_model(run_dir / "model.keras").input_shape == (None, None, None, 3)
    report = json.loads((run_dir / "report.json").read_text())
    done = run_main("evaluate", run_dir, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_images"] == 8
    assert found["confusion_matrix"] == report["confusion_matrix"]
    assert found["loss"] == pytest.approx(report["loss"], rel=1e-6)
    done = run_main("predict", run_dir, photographs / "test" / "red" / "0.png", "--json")
    assert done.returncode == 0, done.stderr


def test_a_finished_run_is_resumed_without_training(run):
    run_dir, _ = run
    before = json.loads((run_dir / "report.json").read_text())
    with mock.patch.dict(models.SPECS, tiny=models.Spec((1, 1), (8, 16))):
        again = train(run_dir=run_dir, resume=True, verbose=False)
    assert again.report["loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert again.report["final_epoch"] == before["final_epoch"]


# ----------------------------------------------------------------------------------------------
# Fine-tuning
# ----------------------------------------------------------------------------------------------


def fine_tune(photographs, checkpoint, run_dir):
    options = {"dataset": f"folder:{photographs}", "weights": checkpoint, "epochs": 4}
    options |= {**SMALL, "class_weights": "balanced", "verbose": True}
    return train("tiny", run_dir=run_dir, **options)


@pytest.fixture(scope="module")
def tuned(photographs, checkpoint, tmp_path_factory):
    """A run of four epochs from weights of another task, its output, and its images' weights."""
    output, weights, get = io.StringIO(), {}, Batches.__getitem__

    def note(self, index):
        batch = get(self, index)
        weights.setdefault(len(self.split), {}).update(
            zip(*batch[1:], strict=True) if batch[2:] else ()
        )
        return batch

    with (
        mock.patch.dict(models.SPECS, tiny=models.Spec((1, 1), (8, 16))),
        mock.patch.object(Batches, "__getitem__", note),
        contextlib.redirect_stdout(output),
    ):
        run = fine_tune(photographs, checkpoint, tmp_path_factory.mktemp("tuned") / "run")
    return run, output.getvalue(), weights


def statistics(model):
    return {v.path: np.asarray(v) for v in model.weights if "moving" in v.path}


@pytest.mark.thorough
def test_fine_tuning_trains_the_head_first_and_keeps_statistics(tuned, tmp_path):
    run, output, _ = tuned
    assert "epochs 1 to 2: the head alone; 34 parameters are trained" in output
    assert "epochs 3 to 4: all layers, BatchNormalization as in the checkpoint; 5," in output
    network, start = run.model.get_layer("tiny"), write_tiny(tmp_path / "again.safetensors")
    for name, value in statistics(start).items():
        np.testing.assert_array_equal(statistics(network)[name], value)
    recipe = json.loads((run.run_dir / "config.json").read_text())["recipe"]
    assert (recipe["variant"], recipe["head_epochs"]) == ("torchvision", 2)
    # The cosine of each phase ends at zero; the second one is lower.
    rates = [row["learning_rate"] for row in run.history]
    assert rates[1] == rates[3] == pytest.approx(0, abs=1e-9) and rates[0] > 5 * rates[2] > 0
    # The trained model has no frozen layers.
    assert len(network.trainable_variables) == len(start.trainable_variables)


@pytest.mark.thorough
def test_balanced_weights_are_those_of_the_training_images(tuned):
    _, output, weights = tuned
    assert "--class-weights" not in output
    # 36 images of two classes, 30 and 6. The held-out loss has no weights.
    assert {label: round(float(weight), 5) for label, weight in weights[36].items()} == {
        0: 0.6,
        1: 3.0,
    }
    assert not weights[10]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "stop", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_run_resumed_in_any_phase_ends_where_an_unbroken_run_ends(
    photographs, tmp_path, tiny, checkpoint, stop, tuned, monkeypatch
):
    monkeypatch.setattr(callbacks.StopEarly, "on_epoch_end", interrupt_after(stop))
    with pytest.raises(Interrupted, match=f"{stop} of 4 epochs are finished"):
        fine_tune(photographs, checkpoint, tmp_path / "run")
    monkeypatch.undo()
    with mock.patch.dict(models.SPECS, tiny=models.Spec((1, 1), (8, 16))):
        run = train(run_dir=tmp_path / "run", resume=True, verbose=False)
    for key in ("loss", "val_loss", "learning_rate"):
        found, expected = ([row[key] for row in each.history] for each in (run, tuned[0]))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-9)


def interrupt_after(epochs):
    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 == epochs:
            raise Interrupted("by the test")

    return on_epoch_end


@pytest.mark.thorough
@pytest.mark.parametrize(("stop", "epochs"), [(3, 4), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_a_run_resumed_to_fewer_epochs_keeps_its_phases(
    photographs, tmp_path, tiny, checkpoint, stop, epochs, monkeypatch
):
    options = {"dataset": f"folder:{photographs}", "weights": checkpoint, "epochs": 8, **SMALL}
    monkeypatch.setattr(callbacks.StopEarly, "on_epoch_end", interrupt_after(stop))
    with pytest.raises(Interrupted):
        train(tiny, run_dir=tmp_path / "run", **options)
    monkeypatch.undo()
    with mock.patch.dict(models.SPECS, tiny=models.Spec((1, 1), (8, 16))):
        run = train(run_dir=tmp_path / "run", resume=True, epochs=epochs, verbose=False)
    assert len(run.history) == epochs
    recipe = json.loads((run.run_dir / "config.json").read_text())["recipe"]
    assert (recipe["epochs"], recipe["head_epochs"]) == (epochs, 3)


@pytest.mark.parametrize(
    ("classes", "freeze", "first"),
    [(12, None, 2), (2, None, 0), (12, "logits", 0), (12, "stem", 2)],
)
def test_only_a_new_head_is_trained_first(photographs, tmp_path, tiny, classes, freeze, first):
    write_tiny(tmp_path / "tiny.safetensors", classes)
    settings = {"model": tiny, "dataset": f"folder:{photographs}", "freeze": freeze, "epochs": 4}
    settings |= {"weights": tmp_path / "tiny.safetensors", "image_size": 32}
    options = {"resume": False, "worker_timeout": 1, "verbose": False, "command": None}
    begun = trainer.Trainer(
        given_settings(settings), decide("none"), dataset=None, run_dir=tmp_path / "run", **options
    )
    with contextlib.ExitStack() as lock:
        begun.open_run(lock)
        begun.load_data()
    assert [phase.head_only for phase in begun.phases] == ([True, False] if first else [False])
    assert (begun.phases[0].start, begun.phases[-1].start, begun.phases[-1].stop) == (0, first, 4)


def test_a_record_keeps_where_the_weights_are_from(checkpoint):
    settings = TrainConfig(weights=str(checkpoint))
    origin = {"name": "timm/resnet18.a1_in1k", "revision": None, "license": "apache-2.0"}
    source = dataclasses.replace(fine_tuning.find_source(settings), recorded_origin=origin)
    recorded = json.loads(json.dumps(fine_tuning.record(source)))
    again = fine_tuning.find_source(settings, recorded, needed=False)
    assert again.origin == origin and fine_tuning.record(again)["origin"] == origin
    for wrong in (None, "timm", {"revision": 1}):
        with pytest.raises(InputError, match="is damaged: its weights are"):
            fine_tuning.find_source(settings, {**recorded, "origin": wrong}, needed=False)


def test_data_that_cannot_be_trained_on_are_refused(photographs, tmp_path, tiny):
    pictures = load_photos(photographs, ["a", "b"], image_size=32)
    sizes = load_dataset(f"folder:{photographs}", image_size=(None, None))
    for data, reason in ((pictures, "needs labels"), (sizes, "needs images of one size")):
        with pytest.raises(InputError, match=reason):
            train(tiny, data, "photos", run_dir=tmp_path / "run", epochs=1, **SMALL)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------
# Early stop
# ----------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_a_run_stops_where_nothing_gets_better_and_keeps_the_best(
    photographs, tmp_path, tiny, monkeypatch, capsys
):
    recipe = dataclasses.replace(RECIPES["photos"], patience=0.01, schedule="constant")
    monkeypatch.setitem(RECIPES, "photos", recipe)
    monkeypatch.setattr(trainer, "LEAST_PATIENCE", 2)
    options = {**SMALL, "image_size": 16, "learning_rate": 0.1, "verbose": True, "epochs": 60}
    run_dir = tmp_path / "run"
    run = train(tiny, f"folder:{photographs}", run_dir=run_dir, **options)
    best = find_best(run.history) + 1
    assert len(run.history) == best + 2 < 60
    assert f"stopped after epoch {best + 2}: none is better than epoch {best}" in (
        capsys.readouterr().out
    )
    assert len(read_metadata(run_dir / "checkpoints" / "best.keras")["history"]) == best
    kept = load_model(run_dir / "checkpoints" / "best.keras")
    for a, b in zip(kept.get_weights(), run.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    # Resumed, it does not go on.
    again = train(run_dir=run_dir, resume=True, verbose=False)
    assert len(again.history) == len(run.history)


def test_find_best_prefers_accuracy_and_then_loss():
    rows = [(0.5, 1.0), (0.75, 2.0), (0.75, 1.5), (0.75, 1.5), (0.6, 0.1)]
    history = [{"val_accuracy": accuracy, "val_loss": loss} for accuracy, loss in rows]
    assert find_best(history) == 2


def test_the_wait_for_data_is_that_of_slow_images():
    class Slow:
        """Images on a slow disk."""

        shape, dtype = (12, 4, 4, 1), np.dtype("uint8")

        def __len__(self):
            return 12

        def __getitem__(self, indices):
            time.sleep(0.2)
            return np.zeros((len(indices), 4, 4, 1), "uint8")

    batches = Batches(Split(Slow(), np.zeros(12, int)), 4)
    timer = callbacks.EpochTimer(12, batches)
    inputs = keras.Input((4, 4, 1))
    model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Flatten()(inputs)))
    model.compile("sgd", "mse")
    rows = []
    record = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: rows.append(logs))
    model.fit(batches, epochs=2, verbose=0, shuffle=False, callbacks=[timer, record])
    assert 0.4 < rows[1]["waiting"] <= 1  # the step itself takes milliseconds
