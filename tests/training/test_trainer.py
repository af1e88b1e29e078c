"""Runs: what they leave, and how they end early and go on."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import keras
import numpy as np
import pytest
from conftest import backend_environment, command, default_signals, run_main, write_tiny
from PIL import Image

import keras_resnet
from keras_resnet import models
from keras_resnet.archive import load_model, read_metadata
from keras_resnet.evaluation.report import read_history
from keras_resnet.losses import Crossentropy
from keras_resnet.recipes import RECIPES
from keras_resnet.training import fine_tuning, optimizers, records, run_folder, trainer
from keras_resnet.training.inputs import Batches
from keras_resnet.training.trainer import train
from keras_resnet.utils.errors import InputError, Interrupted, TrainingError

pytestmark = pytest.mark.thorough

SMALL = {"image_size": 28, "batch_size": 64, "precision": "float32", "verbose": False}


@pytest.fixture(scope="module")
def finished(fashion, tmp_path_factory):
    """The folder of a finished run of one epoch by the recipe "d2l"; not to be changed."""
    with mock.patch.dict(models.SPECS, tiny=models.Spec((1, 1), (8, 16))):
        run_dir = tmp_path_factory.mktemp("finished") / "run"
        return train("tiny", fashion, "d2l", epochs=1, run_dir=run_dir, **SMALL).run_dir


@pytest.fixture
def copied(finished, tmp_path, tiny, fashion):
    """Arguments that resume a copy of it."""
    run_dir = shutil.copytree(finished, tmp_path / "run")
    return {"dataset": fashion, "run_dir": run_dir, "resume": True, "verbose": False}


def test_a_run_folder_holds_everything(trained_run):
    names = {path.relative_to(trained_run).as_posix() for path in trained_run.rglob("*")}
    assert names >= {
        *("config.json", "history.csv", "model.keras", "report.json", "report.md"),
        *("checkpoints/last.keras", "checkpoints/best.keras"),
        *("learning_curves.png", "confusion_matrix.png", "confused_pairs.png", "predictions.png"),
    }
    assert not [name for name in names if "partial" in name]


def test_config_says_what_was_run(trained_run, fashion_folder):
    config = json.loads((trained_run / "config.json").read_text())
    assert config["settings"]["dataset"] == f"folder:{fashion_folder}"
    assert config["dataset"]["class_names"] == ["Bag", "Sandal", "Sneaker", "Trouser"]
    assert config["dataset"]["splits"] == {"train": 900, "validation": 100}
    assert re.fullmatch("[0-9a-f]{64}", config["dataset"]["fingerprint"])
    assert config["versions"]["keras"] == keras.__version__
    assert config["recipe"]["epochs"] == 3 and config["recipe"]["image_size"] == 28
    assert (config["seed"], config["precision"]) == (0, "float32")
    assert config["git_commit"] is None or re.match("[0-9a-f]{40}", config["git_commit"])


def test_report_agrees_with_history_and_model(trained_run, fashion_folder):
    history = read_history(trained_run / "history.csv")
    report = json.loads((trained_run / "report.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3]
    # model.keras is the last epoch's network, in the precision it was trained in here.
    assert report["accuracy"] == pytest.approx(history[-1]["val_accuracy"], abs=1e-6)
    assert report["accuracy"] > 0.5  # four classes; a network that learned nothing has 0.25
    split = keras_resnet.load_dataset(f"folder:{fashion_folder}").splits["validation"]
    logits = keras_resnet.load(trained_run).model.predict(np.asarray(split.images[:]), verbose=0)
    # The loss of training is smoothed as the recipe says, that of the report is not.
    for smoothing, loss in ((0.1, history[-1]["val_loss"]), (0.0, report["loss"])):
        assert float(Crossentropy(smoothing)(split.labels, logits)) == pytest.approx(loss, rel=1e-3)
    assert report["wall_seconds"] == pytest.approx(sum(row["seconds"] for row in history))
    assert np.sum(report["confusion_matrix"]) == 100


def test_output_has_one_line_an_epoch(trained_run):
    lines = (trained_run / "stdout.txt").read_text().splitlines()
    epochs = [line for line in lines if line.startswith("epoch ")]
    assert [line.split()[1] for line in epochs] == ["1/3", "2/3", "3/3"]
    assert all("images/s" in line and "val_accuracy" in line for line in epochs)
    assert any(line.startswith("data: image folder") for line in lines)
    assert any(line.startswith("precision: float32") for line in lines)


def test_tensorboard_events_can_be_read(trained_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = read_history(trained_run / "history.csv")
    for side, prefix in (("train", ""), ("validation", "val_")):
        events = EventAccumulator(str(trained_run / "tensorboard" / side)).Reload()
        found = [(event.step, event.value) for event in events.Scalars("epoch_loss")]
        assert [step for step, _ in found] == [1, 2, 3]
        expected = [row[f"{prefix}loss"] for row in history]
        np.testing.assert_allclose([value for _, value in found], expected, rtol=1e-6)


def test_the_model_takes_raw_images(trained_run):
    model = load_model(trained_run / "model.keras")
    assert (model.input.dtype, model.input_shape) == ("uint8", (None, 28, 28, 1))
    assert {layer.dtype_policy.name for layer in model.layers[1:]} == {"float32"}
    metadata = read_metadata(trained_run / "model.keras")
    assert metadata["class_names"] == ["Bag", "Sandal", "Sneaker", "Trouser"]
    assert metadata["background"] == "dark"


def test_the_background_is_known_of_grey_sets_alone():
    random = np.random.default_rng(0)
    dark = np.zeros((20, 8, 8, 1), "uint8")
    dark[:, 2:6, 2:6] = 200
    scenes = dark.copy()
    scenes[:10] = random.integers(0, 256, (10, 1, 1, 1))
    expected = [(dark, "dark"), (scenes, None), (255 - dark, None), (dark.repeat(3, axis=-1), None)]
    for images, background in expected:
        assert records.find_background(keras_resnet.Split(images, np.zeros(20, int))) == background


def test_best_checkpoint_is_the_best_epoch(trained_run):
    accuracies = [row["val_accuracy"] for row in read_history(trained_run / "history.csv")]
    metadata = read_metadata(trained_run / "checkpoints" / "best.keras")
    # The lowest loss decides among equal accuracies.
    assert accuracies[len(metadata["history"]) - 1] == max(accuracies)
    assert len(read_metadata(trained_run / "checkpoints" / "last.keras")["history"]) == 3


def test_precision_reaches_the_layers_and_the_artifact_is_float32(tmp_path, tiny, fashion):
    before = keras.config.dtype_policy().name
    settings = {**SMALL, "precision": "bfloat16"}
    run = train(tiny, fashion, epochs=1, run_dir=tmp_path / "run", **settings)
    trained = load_model(tmp_path / "run" / "checkpoints" / "last.keras")
    assert trained.get_layer("tiny").get_layer("stem_conv").compute_dtype == "bfloat16"
    assert run.model.get_layer("tiny").get_layer("stem_conv").compute_dtype == "float32"
    for a, b in zip(trained.get_weights(), run.model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert keras.config.dtype_policy().name == before


@pytest.mark.slow
def test_float16_trains_with_loss_scaling(tmp_path, tiny, fashion):
    settings = {**SMALL, "precision": "float16"}
    run = train(tiny, fashion, epochs=2, run_dir=tmp_path / "run", **settings)
    assert run.history[1]["loss"] < run.history[0]["loss"]


def test_schedules_and_optimizers_are_rows(tmp_path, tiny, fashion, monkeypatch):
    recipe = dataclasses.replace(
        RECIPES["quick"], optimizer="sgd", augmentation=("flip", "shift", "erase")
    )
    monkeypatch.setitem(RECIPES, "other", recipe)
    settings = {**SMALL, "learning_rate": 0.05}
    run = train(tiny, fashion, "other", epochs=2, run_dir=tmp_path / "run", **settings)
    rates = [row["learning_rate"] for row in run.history]
    assert 0.05 > rates[0] > rates[1] == pytest.approx(0, abs=1e-9)  # the cosine ends at zero
    assert run.history[1]["loss"] < run.history[0]["loss"]


def test_a_resumed_run_mixes_as_an_unbroken_one(tmp_path, tiny, fashion, monkeypatch):
    recipe = dataclasses.replace(RECIPES["fast"], schedule="constant", mixing="cutmix")
    monkeypatch.setitem(RECIPES, "mixed", recipe)
    settings = {**SMALL, "learning_rate": 1e-3}
    unbroken = train(tiny, fashion, "mixed", epochs=2, run_dir=tmp_path / "unbroken", **settings)
    first = train(tiny, fashion, "mixed", epochs=1, run_dir=tmp_path / "run", **settings)
    again = train(dataset=fashion, epochs=2, run_dir=first.run_dir, resume=True, verbose=False)
    for ours, expected in zip(again.history, unbroken.history, strict=True):
        for name in ("loss", "accuracy", "val_loss"):
            assert ours[name] == pytest.approx(expected[name], rel=0.02)
    # Mixed images are harder: the training loss is higher.
    assert unbroken.history[1]["loss"] > unbroken.history[1]["val_loss"]


def test_the_recipe_best_trains_end_to_end(tmp_path, tiny, fashion):
    run = train(tiny, fashion, "best", epochs=2, run_dir=tmp_path / "run", **SMALL)
    recipe = run.report["config"]["recipe"]
    assert (recipe["mixing"], recipe["variant"], recipe["stem"]) == ("cutmix", "v2", "small")
    assert run.history[1]["val_loss"] < 2.31  # better than chance
    assert run.report["accuracy"] > 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "adamax"),
        ("schedule", "step"),
        ("augmentation", "mixup"),
        ("mixing", "flip"),
        ("variant", "v3"),
        ("stem", "large"),
    ],
)
def test_a_recipe_of_unknown_rows_is_refused_before_the_data_are_loaded(
    tmp_path, monkeypatch, field, value
):
    monkeypatch.setitem(RECIPES, "other", dataclasses.replace(RECIPES["quick"], **{field: value}))
    with pytest.raises(InputError, match=f"`{field}` must be one of .*, got '{value}'"):
        train(dataset="folder:missing", recipe="other", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------
# Batches
# ----------------------------------------------------------------------------------------------


def test_batches_hold_every_image_once_an_epoch(fashion):
    split = fashion.splits["test"]
    batches = Batches(split, 64)
    assert len(batches) == 7
    for epoch in range(2):
        batches.shuffle(seed=1, epoch=epoch)
        images, labels = (
            np.concatenate(part) for part in zip(*(batches[i] for i in range(7)), strict=True)
        )
        assert images.dtype == "uint8"
        np.testing.assert_array_equal(images, split.images[batches.order])
        np.testing.assert_array_equal(labels, split.labels[batches.order])
        assert sorted(batches.order) == list(range(400))


def test_the_order_is_a_function_of_seed_and_epoch(fashion):
    split = fashion.splits["train"]
    orders = {(seed, epoch): tuple(split.order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    assert tuple(split.order(1, 1)) == orders[1, 1]


def test_fit_takes_each_epoch_in_its_own_order(tmp_path, tiny, fashion, monkeypatch):
    seen = []
    get = Batches.__getitem__

    def note(self, index):
        images, labels = get(self, index)
        if self.split is fashion.splits["train"]:
            seen.append(labels)
        return images, labels

    monkeypatch.setattr(Batches, "__getitem__", note)
    train(tiny, fashion, epochs=2, run_dir=tmp_path / "run", seed=3, **SMALL)
    split = fashion.splits["train"]
    # Keras looks at a few batches before it begins; what it trains on comes last.
    trained = np.concatenate(seen[-2 * len(range(0, 1200, 64)) :])
    expected = [split.labels[split.order(3, epoch)] for epoch in (0, 1)]
    np.testing.assert_array_equal(trained, np.concatenate(expected))


@pytest.mark.parametrize(
    ("image_size", "count", "sizes"),
    [
        (8, 65, [65]),  # maps of one pixel: BatchNormalization has no variance of one image
        pytest.param(9, 65, [64, 1], marks=pytest.mark.slow),  # maps of two pixels by two
        pytest.param(8, 129, [64, 65], marks=pytest.mark.slow),
        pytest.param(8, 66, [64, 2], marks=pytest.mark.slow),
        pytest.param(8, 1, [1], marks=pytest.mark.slow),
    ],
)
def test_a_last_batch_of_one_image_joins_the_one_before(
    tmp_path, tiny, fashion, monkeypatch, image_size, count, sizes
):
    seen, split = [], fashion.splits["train"]
    get = Batches.__getitem__

    def note(self, index):
        images, labels = get(self, index)
        if self.split is part:
            seen.append(len(labels))
        return images, labels

    part = keras_resnet.Split(split.images[:count], split.labels[:count])
    few = dataclasses.replace(fashion, splits={**fashion.splits, "train": part})
    monkeypatch.setattr(Batches, "__getitem__", note)
    planned = []
    constant = lambda rate, steps, warmup: planned.append(steps) or rate  # noqa: E731
    monkeypatch.setitem(optimizers.SCHEDULES, "cosine", constant)
    settings = {**SMALL, "image_size": image_size}
    run = train(tiny, few, epochs=2, run_dir=tmp_path / "run", **settings)
    assert planned == [2 * len(sizes)]
    assert seen[-2 * len(sizes) :] == 2 * sizes
    assert len(run.history) == 2


# ----------------------------------------------------------------------------------------------
# Ending early and going on
# ----------------------------------------------------------------------------------------------


def start(run_dir, folder, *more):
    arguments = ["train", "--model", "tiny", "--dataset", f"folder:{folder}", "--run-dir", run_dir]
    arguments += ["--image-size", 28, "--batch-size", 32, "--epochs", 3, "--precision", "float32"]
    arguments += ["--recipe", "quick"]
    return subprocess.Popen(
        command(*arguments, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"},
        preexec_fn=default_signals,
    )


def wait_for(process, prefix):
    for line in process.stdout:
        if line.startswith(prefix):
            return
    raise AssertionError(f"no line {prefix!r}: {process.stderr.read()}")


def test_killed_and_resumed_ends_where_an_unbroken_run_ends(trained_run, fashion_folder, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, fashion_folder)
    # SIGKILL leaves no time to tidy up: in the middle of the second epoch.
    wait_for(process, "epoch 1/3")
    time.sleep(0.2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert len(read_metadata(run_dir / "checkpoints" / "last.keras")["history"]) in (1, 2)

    resumed = run_main("train", "--resume", "--run-dir", run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert re.search("resumed after epoch [12]", resumed.stdout)
    history = read_history(run_dir / "history.csv")
    unbroken = read_history(trained_run / "history.csv")
    assert [row["epoch"] for row in history] == [1, 2, 3]
    # Same seed, same order of images, optimizer and rate schedule restored: the same losses, but
    # for the order in which threads add up.
    for ours, theirs in zip(history, unbroken, strict=True):
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], abs=1e-9)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    accuracy = json.loads((run_dir / "report.json").read_text())["accuracy"]
    expected = json.loads((trained_run / "report.json").read_text())["accuracy"]
    assert accuracy == pytest.approx(expected, abs=0.03)


@pytest.mark.slow
def test_killed_before_its_first_checkpoint_a_run_starts_again(fashion_folder, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, fashion_folder, "--epochs", 1)
    wait_for(process, "run folder:")
    process.kill()
    process.wait()
    # What a writer that was killed in mid-write leaves.
    partial = run_dir / "checkpoints" / ".last.0123abcd.partial.keras"
    partial.write_bytes(b"PK half a file")
    resumed = run_main("train", "--resume", "--run-dir", run_dir)
    assert resumed.returncode == 0, resumed.stderr
    assert [row["epoch"] for row in read_history(run_dir / "history.csv")] == [1]
    assert not partial.exists()


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_stop_signal_saves_and_exits(number, fashion_folder, tmp_path):
    run_dir = tmp_path / "run"
    process = start(run_dir, fashion_folder, "--epochs", "1000")
    wait_for(process, "epoch 1/1000")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted in epoch" in stderr or "interrupted during" in stderr
    assert f"--resume --run-dir {run_dir}" in stderr
    assert "Traceback" not in stderr
    load_model(run_dir / "checkpoints" / "interrupted.keras")
    assert len(read_history(run_dir / "history.csv")) >= 1


@pytest.mark.slow
def test_killed_while_data_are_loaded_a_run_keeps_its_settings(tmp_path, tiny, fashion, finished):
    settings = json.loads((finished / "config.json").read_text())["settings"]
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "config.json").write_text(json.dumps({"settings": settings}))
    run = train(dataset=fashion, run_dir=killed, resume=True, verbose=False)
    config = json.loads((killed / "config.json").read_text())
    assert config["settings"] == settings and config["recipe"]["name"] == "d2l"
    assert len(run.history) == 1


def test_a_finished_run_resumed_writes_what_is_missing(copied):
    run_dir = copied["run_dir"]
    history, report = (run_dir / name for name in ("history.csv", "report.json"))
    before, accuracy = read_history(history), json.loads(report.read_text())["accuracy"]
    for name in ("model.keras", "report.md"):
        (run_dir / name).unlink()
    again = train(**copied)
    assert again.history == before
    assert again.report["accuracy"] == accuracy
    assert (run_dir / "report.md").exists() and (run_dir / "model.keras").exists()


def test_a_finished_run_can_be_continued_with_more_epochs(copied, tmp_path, tiny, fashion):
    run_dir = copied["run_dir"]
    before = json.loads((run_dir / "config.json").read_text())
    run = train(epochs=2, command="train --resume --epochs 2", **copied)
    assert [row["epoch"] for row in run.history] == [1, 2]
    assert run.history[0] == read_history(run_dir / "history.csv")[0]
    assert run.report["accuracy"] == pytest.approx(run.history[-1]["val_accuracy"], abs=1e-6)
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["settings"]["epochs"], config["recipe"]["epochs"]) == (2, 2)
    command = "train --resume --epochs 2"
    assert config["continued"] == [{"after_epoch": 1, "epochs": 2, "command": command}]
    assert f"Continued after epoch 1 by\n\n    {command}\n" in (run_dir / "report.md").read_text()
    for changed in (before, config):
        changed.pop("continued", None)
        changed["settings"]["epochs"] = changed["recipe"]["epochs"] = None
    assert config == before
    # At a constant rate it is the run that was started with two epochs.
    unbroken = train(tiny, fashion, "d2l", epochs=2, run_dir=tmp_path / "unbroken", **SMALL)
    for ours, theirs in zip(run.history, unbroken.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.02)
    # Resumed without a number it is the run of two epochs.
    assert train(**copied).history == run.history
    with pytest.raises(
        InputError, match=r"`epochs` must be at least the number of finished epochs, 2, got 1"
    ):
        train(epochs=1, **copied)
    assert json.loads((run_dir / "config.json").read_text())["settings"]["epochs"] == 2


@pytest.mark.slow
def test_the_schedule_of_a_continued_run_is_that_of_the_new_total(trained_run, tmp_path):
    run_dir = shutil.copytree(trained_run, tmp_path / "run")
    words = ("train", "--resume", "--run-dir", run_dir, "--epochs", 4)
    done = run_main(*words)
    assert done.returncode == 0, done.stderr
    rates = [row["learning_rate"] for row in read_history(run_dir / "history.csv")]
    assert rates[2] == pytest.approx(0, abs=1e-9)  # the cosine of three epochs
    assert rates[3] == pytest.approx(0, abs=1e-9)  # the cosine of four
    # The weights moved: the fourth epoch was not trained at a rate of zero.
    before, after = (load_model(d / "model.keras").get_weights() for d in (trained_run, run_dir))
    assert not np.allclose(before[0], after[0], atol=1e-4)
    refused = run_main(*words[:-1], 3)
    assert refused.returncode == 2 and "number of finished epochs, 4, got 3" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def test_a_run_that_cannot_be_continued_keeps_its_number_of_epochs(copied):
    other = dataclasses.replace(copied["dataset"], fingerprint="0" * 64)
    with pytest.raises(InputError, match="the data are not those"):
        train(epochs=5, **{**copied, "dataset": other})
    config = json.loads((copied["run_dir"] / "config.json").read_text())
    assert config["settings"]["epochs"] == config["recipe"]["epochs"] == 1


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, tiny, fashion, monkeypatch):
    def explode(rate, steps, warmup):
        return keras.optimizers.schedules.PiecewiseConstantDecay([steps // 2 + 2], [rate, 1e30])

    monkeypatch.setitem(optimizers.SCHEDULES, "cosine", explode)
    with pytest.raises(TrainingError) as error:
        train(tiny, fashion, epochs=2, run_dir=tmp_path / "run", **SMALL)
    message = str(error.value)
    assert re.search(r"the loss became (nan|inf) in epoch 2, step \d+ of 19", message)
    assert re.search(r"last finite mean loss was [\d.]+", message)
    assert "--learning-rate" in message
    # What the finished epoch left stays, and is whole.
    best = load_model(tmp_path / "run" / "checkpoints" / "best.keras")
    assert all(np.isfinite(weights).all() for weights in best.get_weights())
    assert not (tmp_path / "run" / "model.keras").exists()


# Images that take their time: whenever a step ends, TensorFlow is waiting for the next batch.
SLOW_AND_DIVERGING = """
import sys, time
import numpy as np
from keras_resnet import Dataset, Spec, Split, models, train

class Slow:
    shape = (64, 8, 8, 1)
    __len__ = lambda self: 64

    def __getitem__(self, chosen):
        time.sleep(0.2)
        shape = (len(chosen), *self.shape[1:])
        return np.random.default_rng(0).integers(0, 256, shape, dtype="uint8")

models.SPECS["small"] = Spec((1,), (4,))
split = Split(Slow(), np.arange(64) % 2)
data = Dataset("slow", ("a", "b"), {"train": split, "test": split}, "made here", "0")
train("small", data, batch_size=4, learning_rate=1e38, run_dir=sys.argv[1], precision="float32")
"""


@pytest.mark.slow
def test_a_script_that_lets_the_error_pass_ends(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SLOW_AND_DIVERGING, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert "TrainingError: the loss became" in done.stderr


def test_a_loss_that_breaks_in_the_last_step_is_not_saved(tmp_path, tiny, fashion):
    # One step: its own loss is from before the update, the measured one is not.
    settings = {**SMALL, "batch_size": 1200, "learning_rate": 1e30}
    with pytest.raises(TrainingError, match=r"epoch 1, step 1, the evaluation loss .*(nan|inf)"):
        train(tiny, fashion, "d2l", epochs=1, run_dir=tmp_path / "run", **settings)
    assert not list((tmp_path / "run").rglob("*.keras"))


@pytest.mark.slow
def test_memory_that_runs_out_is_named(tmp_path, tiny, fashion):
    settings = {**SMALL, "image_size": 200_000}
    with pytest.raises(TrainingError, match="out of memory at --batch-size 64 and --image-size"):
        train(tiny, fashion, epochs=1, run_dir=tmp_path / "run", **settings)


def test_an_image_lost_in_mid_run_is_named(tmp_path, tiny, fashion_folder):
    copy = tmp_path / "images"
    shutil.copytree(fashion_folder, copy)
    data = keras_resnet.load_dataset(f"folder:{copy}")
    lost = data.splits["validation"].images.sources[-1]
    os.unlink(lost)
    with pytest.raises(TrainingError, match=f"{lost}.*--resume"):
        train(tiny, data, "quick", epochs=1, run_dir=tmp_path / "run", **SMALL)


@pytest.mark.slow
def test_killed_between_two_checkpoint_files_nothing_is_lost(tmp_path, tiny, fashion):
    # The process ends, as by SIGKILL, with best.keras written and last.keras not renamed yet.
    script = """
import os, sys
from keras_resnet.training import callbacks
from keras_resnet import load_dataset, models, train
models.SPECS["tiny"] = models.Spec((1, 1), (8, 16))
callbacks.shutil.copyfile = lambda a, b: os._exit(9)
train("tiny", "folder:" + sys.argv[1], "quick", run_dir=sys.argv[2], epochs=1, image_size=28,
      precision="float32")
"""
    folder = tmp_path / "images"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(20):
            pixels = fashion.splits["train"].images[index, :, :, 0]
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    run_dir = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", script, folder, run_dir], capture_output=True)
    assert done.returncode == 9, done.stderr
    assert all("partial" in path.name for path in run_dir.rglob("*.keras"))
    run = train(run_dir=run_dir, resume=True, verbose=False)
    assert len(run.history) == 1
    names = {path.name for path in (run_dir / "checkpoints").iterdir()}
    assert names == {"best.keras", "last.keras"}


def test_a_write_that_fails_leaves_the_last_checkpoint_whole(copied):
    run_dir = copied["run_dir"]
    (run_dir / "model.keras").unlink()
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # a full disk, for large files
    try:
        with pytest.raises(TrainingError, match="--resume"):
            train(**copied)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not (run_dir / "model.keras").exists()
    load_model(run_dir / "checkpoints" / "last.keras")
    assert train(**copied).report


def test_too_little_space_is_found_before_training(tmp_path, tiny, fashion, monkeypatch):
    # The one thing here that is not real: no test may fill the disk it runs on.
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"need \d+ MiB of disk space, and 1 MiB are free"):
        train(tiny, fashion, epochs=1, run_dir=tmp_path / "run", **SMALL)


def test_the_space_is_that_of_all_layers_also_while_the_head_alone_is_trained():
    network, sizes = keras_resnet.build_resnet(models.Spec((1,), (64,)), (28, 28, 1)), []
    for head_only in (True, False):
        fine_tuning.set_trainable(network, head_only=head_only)
        network.compile("adam")
        network.optimizer.build(network.trainable_variables)
        sizes.append(trainer._bytes_on_disk(network))
    assert sizes[0] == sizes[1]


# ----------------------------------------------------------------------------------------------
# Fine-tuning
# ----------------------------------------------------------------------------------------------

TUNED = {**SMALL, "freeze": ["stem", "stage1"], "learning_rate": 1e-3, "normalize": "imagenet"}


def weights_of(model):
    return {weight.path: np.array(weight) for weight in model.weights}


@pytest.fixture(scope="module")
def tuned(fashion, checkpoint, tmp_path_factory):
    """A fine-tuned run, and what it printed."""
    settings = {**TUNED, "freeze": "stem, stage1", "verbose": True}
    printed = io.StringIO()
    with (
        mock.patch.dict(models.SPECS, tiny=models.Spec((1, 1), (8, 16))),
        contextlib.redirect_stdout(printed),
    ):
        run_dir = tmp_path_factory.mktemp("tuned") / "run"
        run = train("tiny", fashion, epochs=1, weights=checkpoint, run_dir=run_dir, **settings)
    return run, printed.getvalue()


def test_fine_tuning_moves_what_is_not_frozen_and_nothing_else(tmp_path, tuned):
    run, out = tuned
    before = weights_of(write_tiny(tmp_path / "again.safetensors"))
    # Grey images: what the colours' kernels would have given for equal colours.
    before["stem_conv/kernel"] = before["stem_conv/kernel"].sum(axis=2, keepdims=True)
    after = weights_of(run.model.get_layer("tiny"))
    frozen = {path for path in after if path.startswith(("stem_", "stage1_"))}
    assert frozen and set(after) == set(before)
    for path, weight in after.items():
        same = weight.shape == before[path].shape and np.array_equal(weight, before[path])
        assert same == (path in frozen), path  # moving statistics are among them
    assert "variant torchvision, stem imagenet, 30 tensors loaded; new head: 10 classes" in out
    assert "the checkpoint has 12; first convolution adapted from 3 channels to 1" in out
    assert "frozen: stem, stage1; 3,850 of 5,442 parameters are trained" in out


def test_a_fine_tuned_run_says_what_it_came_from(tuned, tiny, checkpoint):
    run, _ = tuned
    config = json.loads((run.run_dir / "config.json").read_text())
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert config["settings"]["weights"] == str(checkpoint)
    assert config["settings"]["freeze"] == ["stem", "stage1"]
    assert config["weights"]["sha256"] == digest and config["weights"]["layout"] == "torchvision"
    assert config["recipe"]["variant"] == "torchvision"
    assert (config["num_parameters"], config["num_trained_parameters"]) == (5442, 3850)
    report = (run.run_dir / "report.md").read_text()
    assert all(text in report for text in (checkpoint.name, digest, "stem, stage1", "imagenet"))
    metadata = read_metadata(run.run_dir / "model.keras")
    assert (metadata["variant"], metadata["normalize"]) == ("torchvision", "imagenet")
    assert metadata["origin"] == {"file": checkpoint.name, "sha256": digest}
    # The model is whole: its preprocessing is inside. What was frozen is frozen.
    model = load_model(run.run_dir / "model.keras")
    assert model.get_layer("preprocessing").mean == pytest.approx(0.449)
    plain = keras_resnet.build_resnet(tiny, (28, 28, 1), variant="torchvision")
    trained = [w.path for w in plain.trainable_weights if not w.path.startswith(("stem", "stage1"))]
    for path in ("model.keras", "checkpoints/last.keras"):
        loaded = keras.models.load_model(run.run_dir / path, compile=False)
        assert [weight.path for weight in loaded.trainable_weights] == trained
    model.trainable = False
    model.trainable = True
    assert len(model.trainable_weights) == len(plain.trainable_weights)


def test_a_head_of_the_same_classes_is_loaded(tmp_path, tiny, fashion, capsys):
    source = tmp_path / "ten.safetensors"
    network = write_tiny(source, 10, 1, "v2", "timm_v2")
    settings = {**SMALL, "verbose": True, "learning_rate": 1e-30}
    run = train(tiny, fashion, epochs=1, weights=str(source), run_dir=tmp_path / "run", **settings)
    assert "head of 10 classes loaded" in (out := capsys.readouterr().out)
    assert "adapted" not in out and "frozen" not in out
    # At a rate of nothing weights stay, but for the moving statistics.
    after, before = weights_of(run.model.get_layer("tiny")), weights_of(network)
    for name in ("logits/kernel", "stage2_block1/conv1/kernel", "final_bn/gamma"):
        np.testing.assert_allclose(after[name], before[name], atol=1e-6)


@pytest.mark.slow
def test_a_variant_that_was_asked_for_goes_before_the_checkpoints(
    tmp_path, tiny, fashion, checkpoint
):
    settings = {**SMALL, "variant": "v1"}
    run = train(tiny, fashion, epochs=1, weights=checkpoint, run_dir=tmp_path / "run", **settings)
    assert run.report["config"]["recipe"]["variant"] == "v1"
    assert run.report["config"]["weights"]["variant"] == "torchvision"


@pytest.mark.slow
def test_resumed_it_needs_the_file_only_before_its_first_checkpoint(
    tmp_path, tiny, fashion, checkpoint
):
    source = tmp_path / "tiny.safetensors"
    shutil.copyfile(checkpoint, source)
    run = train(tiny, fashion, epochs=1, weights=source, run_dir=tmp_path / "run", **TUNED)
    again = {"dataset": fashion, "run_dir": run.run_dir, "resume": True, "verbose": False}
    source.unlink()
    (run.run_dir / "model.keras").unlink()
    resumed = train(freeze="stem,stage1", **again)
    assert resumed.report["accuracy"] == run.report["accuracy"]
    # As a run that was killed before its first checkpoint.
    shutil.rmtree(run.run_dir / "checkpoints")
    with pytest.raises(InputError, match="no such checkpoint file"):
        train(**again)
    write_tiny(source, 13)
    with pytest.raises(InputError, match="not the file that the run was started with: sha256"):
        train(**again)
    shutil.copyfile(checkpoint, source)
    assert train(**again).history[0]["loss"] == pytest.approx(run.history[0]["loss"], rel=0.02)
    config = json.loads((run.run_dir / "config.json").read_text())
    config["weights"] = {"sha256": 1}
    (run.run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="damaged: its weights are"):
        train(**again)


def test_ones_own_model_is_a_source(tmp_path, tuned, tiny, fashion, capsys):
    source = tuned[0].run_dir / "model.keras"
    classes = fashion.class_names[:4]
    few = np.flatnonzero(fashion.splits["train"].labels < 4)[:64]
    images, labels = (getattr(fashion.splits["train"], n)[few] for n in ("images", "labels"))
    split = keras_resnet.Split(images, labels)
    data = dataclasses.replace(
        fashion, class_names=classes, splits={"train": split, "test": split}, fingerprint="1"
    )
    settings = {**SMALL, "verbose": True, "freeze": "stem,stage1,stage2"}
    run = train(tiny, data, epochs=1, weights=source, run_dir=tmp_path / "run", **settings)
    out = capsys.readouterr().out
    assert "a network of this package; variant torchvision, stem imagenet, 30 tensors" in out
    assert "new head: 4 classes, the checkpoint has 10" in out
    before, after = (weights_of(each.model.get_layer("tiny")) for each in (tuned[0], run))
    for path in before:
        if not path.startswith("logits"):
            np.testing.assert_array_equal(after[path], before[path], err_msg=path)
    config = json.loads((run.run_dir / "config.json").read_text())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert (config["weights"]["layout"], config["weights"]["sha256"]) == ("keras_resnet", digest)
    # The images are normalised as the source's were, unless another way is asked for.
    assert config["settings"]["normalize"] == "imagenet"
    assert run.model.get_layer("preprocessing").mean == pytest.approx(0.449)
    origin = read_metadata(run.run_dir / "model.keras")["origin"]
    assert origin == {"file": "model.keras", "sha256": digest}
    resumed = train(dataset=data, run_dir=run.run_dir, resume=True, verbose=False)
    assert resumed.history == run.history


NOT_TUNED = {
    "nothing to start from": ({"weights": None}, "`freeze` needs `weights`"),
    "no such file": ({"weights": "none.pth"}, "no such checkpoint file"),
    "no path": ({"weights": {}}, "`weights` must be the path of a checkpoint, got dict"),
    "no names": ({"freeze": 1}, "`freeze` must be a list of names of modules, got 1"),
    "unknown module": (
        {"freeze": "stem,stage3"},
        "names modules of the network, stem, stage1, stage2, logits, got 'stage3'",
    ),
    "all": ({"freeze": "stem,stage1,stage2,logits"}, "must leave something to train"),
    "unknown normalization": ({"normalize": "zca"}, "`normalize` must be one of none, imagenet"),
    "unknown variant": ({"variant": "v3"}, "`variant` must be one of"),
    "another depth": ({"model": "resnet18"}, r"tiny\.safetensors: tensors: \d+ missing"),
    "another stem": ({"stem": "small"}, r"must be \(8, 1, 3, 3\)"),
}


@pytest.mark.parametrize("case", NOT_TUNED)
def test_fine_tuning_that_cannot_begin_leaves_no_folder(tmp_path, tiny, fashion, checkpoint, case):
    changes, expected = NOT_TUNED[case]
    settings = {"model": tiny, "weights": checkpoint, **TUNED, **changes}
    with pytest.raises(InputError, match=expected) as caught:
        train(dataset=fashion, epochs=1, run_dir=tmp_path / "a" / "run", **settings)
    assert len(str(caught.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------
# What cannot be run
# ----------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused(tmp_path, tiny, fashion):
    names = ["note.txt", ".download.partial", ".last.0123abcd.partial.keras"]
    for name in names:
        (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        train(tiny, fashion, epochs=1, run_dir=tmp_path, **SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_what_cannot_begin_leaves_no_folder(tmp_path, tiny):
    with pytest.raises(InputError, match="no_such"):
        train(tiny, f"folder:{tmp_path}/no_such", run_dir=tmp_path / "a" / "b", verbose=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "own").mkdir()
    with pytest.raises(InputError, match="no_such"):
        train(tiny, f"folder:{tmp_path}/no_such", run_dir=tmp_path / "own", verbose=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["own"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, "`learning_rate` was None, got 0.5"),
        ({"epochs": 7, "seed": 1}, "`seed` was 0, got 1"),
        ({"epochs": 0}, "`epochs` must be a whole number of at least 1, got 0"),
        ({"model": "resnet18"}, "`model` was 'tiny', got 'resnet18'"),
    ],
)
def test_resume_refuses_other_settings(copied, change, message):
    with pytest.raises(InputError, match=re.escape(message)):
        train(**{**copied, **change})


def test_resume_refuses_settings_of_another_version(copied):
    path = copied["run_dir"] / "config.json"
    record = json.loads(path.read_text())
    record["settings"]["init"] = record["settings"].pop("weights")
    path.write_text(json.dumps(record))
    with pytest.raises(InputError, match="of another version: this version lacks init; start a"):
        train(**copied)


def test_resume_refuses_a_recipe_that_was_edited(copied, monkeypatch):
    edited = dataclasses.replace(RECIPES["d2l"], warmup=0.5)
    monkeypatch.setitem(RECIPES, "d2l", edited)
    with pytest.raises(InputError, match=r"the recipe has changed .*\(warmup\)"):
        train(**copied)


def test_runs_whose_recipe_did_not_name_the_network_are_resumed(copied):
    path = copied["run_dir"] / "config.json"
    record = json.loads(path.read_text())
    del record["recipe"]["model"]
    path.write_text(json.dumps(record))
    assert len(train(**copied).history) == record["recipe"]["epochs"]


def test_resume_refuses_other_data(copied):
    other = dataclasses.replace(copied["dataset"], fingerprint="0" * 64)
    with pytest.raises(InputError, match="the data are not those"):
        train(**{**copied, "dataset": other})


def test_a_damaged_checkpoint_is_named(copied):
    path = copied["run_dir"] / "checkpoints" / "last.keras"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(InputError, match=re.escape(str(path))):
        train(**copied)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_other_backends_train_without_tensorflow(backend, idx_folder, tmp_path):
    script = f"""
import sys
import dataclasses, keras_resnet
from keras_resnet import models
models.SPECS["tiny"] = models.Spec((1,), (8,))
whole = keras_resnet.load_dataset("fashion_mnist")
splits = {{n: keras_resnet.Split(s.images[:320], s.labels[:320]) for n, s in whole.splits.items()}}
data = dataclasses.replace(whole, splits=splits)
run = keras_resnet.train("tiny", data, epochs=2, image_size=28, run_dir={str(tmp_path / "r")!r})
assert run.history[1]["loss"] < run.history[0]["loss"], run.history
keras_resnet.load(run.run_dir)
mixed = keras_resnet.train("tiny", data, "best", epochs=1, run_dir={str(tmp_path / "m")!r})
assert mixed.history[0]["loss"] > 0 and mixed.history[0]["val_accuracy"] > 0, mixed.history
print("tensorflow" in sys.modules)
"""
    done = subprocess.run(
        [*command()[:2], script],
        capture_output=True,
        text=True,
        env=backend_environment(backend),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_public_names_are_there():
    for name in keras_resnet.__all__:
        assert getattr(keras_resnet, name) is not None
    assert issubclass(Interrupted, TrainingError)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = keras_resnet.no_such_name


def test_what_a_run_leaves_that_was_killed_at_once_is_no_run(tmp_path):
    for name in (".probe", "..probe.0123abcd.partial", ".config.0123abcd.partial.json"):
        (tmp_path / name).write_text("")
    run_folder.check_empty(tmp_path)
    (tmp_path / ".hidden").write_text("someone's")
    with pytest.raises(InputError, match="not empty"):
        run_folder.check_empty(tmp_path)
