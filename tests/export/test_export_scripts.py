"""The scripts that export a model and run the files, run as a reader runs them."""

import contextlib
import io
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import keras_resnet
from keras_resnet import archive
from keras_resnet.evaluation.inference import load
from keras_resnet.untrusted.manifest import read_manifest

pytestmark = pytest.mark.thorough

EXPORT = Path(__file__).parents[2] / "export"
SCRIPTS = ("saved_model", "tflite", "onnx")


def run_process(name, *arguments, folder):
    """Runs a copy of a script in a process, from the folder it was copied to."""
    words = [sys.executable, f"export_{name}.py", *map(str, arguments)]
    shutil.copy(EXPORT / words[1], folder)
    return subprocess.run(
        words,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


@pytest.fixture
def run_script(tmp_path, monkeypatch):
    """Returns a function that runs a script in this process, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        words = [f"export_{name}.py", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        out, err, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(EXPORT / words[0]), run_name="__main__")
            except SystemExit as stop:
                status = stop.code or 0
        return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())

    return run


def answers(done):
    """Returns {file: [(class, number), …]} of the lines about one image."""
    found = {}
    for line in done.stdout.splitlines():
        file, *rest = line.split(": ")
        if rest and rest[0] in ("probabilities", "logits"):
            pairs = [pair.rsplit(" ", 1) for pair in rest[1].split(", ")]
            found[file] = [(name, float(number)) for name, number in pairs]
    return found


def refusal(done, status):
    """Returns the last line of standard error, once it is seen that nothing broke."""
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr and answers(done) == {}
    return done.stderr.splitlines()[-1]


def test_all_three_write_to_one_folder_and_agree(trained_run, tmp_path, run_script):
    found = {}
    for name in SCRIPTS:
        words = (trained_run, "--precision", "float32")
        # One process is enough: the three scripts have the same imports.
        is_first = name == SCRIPTS[0]
        done = run_process(name, *words, folder=tmp_path) if is_first else run_script(name, *words)
        assert done.returncode == 0, done.stderr
        own = answers(done)
        assert own
        found |= own
    folder = tmp_path / "exported"
    files = ["saved_model", "model-float32.tflite", "model-float32-batch1.tflite"]
    assert {*found} == {*files, "model-float32.onnx"}
    assert all(file in os.listdir(folder) for file in found)
    assert keras_resnet.verify(folder, trust=True)["passed"]
    first = found["saved_model"]
    assert len(first) == 3 and first == sorted(first, key=lambda pair: -pair[1])
    assert {name for name, _ in first} < {"Bag", "Sandal", "Sneaker", "Trouser"}
    for own in found.values():
        assert [name for name, _ in own] == [name for name, _ in first]
        numbers = zip(own, first, strict=True)
        assert all(abs(number - other) < 2e-4 for (_, number), (_, other) in numbers)


@pytest.mark.parametrize(
    "name", [pytest.param("saved_model", marks=pytest.mark.slow), "tflite", "onnx"]
)
def test_without_preprocessing_they_predict_from_floats(name, trained_run, tmp_path, run_script):
    options = ["--no-preprocessing", "--precision", "float32", "--out", "a folder/out"]
    done = run_script(name, *options, trained_run)
    assert done.returncode == 0, done.stderr
    assert answers(done) and done.stdout.splitlines()[-1].split(": ")[1] == "logits"
    assert (tmp_path / "a folder" / "out" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("saved_model", ["missing.keras"], "keras-resnet: missing.keras: no such model file"),
        ("saved_model", ["RUN", "--precision", "int8"], "comes in float32, not in int8"),
        ("onnx", ["RUN", "--precision", "dynamic"], "onnx comes in float32, float16, int8, not"),
        ("onnx", ["RUN", "--out", ".."], "an export is written to a new folder, an empty one"),
        ("tflite", ["RUN", "--dataset", "folder:nowhere"], "nowhere"),
        ("tflite", [], "the following arguments are required: RUN_OR_MODEL"),
        ("tflite", ["RUN", "--precision", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    name, arguments, message, trained_run, tmp_path, run_script
):
    arguments = [trained_run if each == "RUN" else each for each in arguments]
    assert message in refusal(run_script(name, *arguments), 2)
    assert os.listdir(tmp_path) == []


@pytest.fixture(scope="module")
def coarse_model(trained_run, tmp_path_factory):
    """A model whose answers 8 bits cannot hold: a thousand is added to every logit."""
    predictor = load(trained_run)
    predictor.model.layers[-1].weights[-1].assign_add([1000.0] * 4)
    path = tmp_path_factory.mktemp("coarse") / "coarse.keras"
    archive.save_model(predictor.model, path, predictor.metadata)
    return path


@pytest.mark.parametrize("name", ["tflite", "onnx"])
def test_a_failed_verification_is_a_table_and_status_1(name, coarse_model, tmp_path, run_script):
    done = run_script(name, coarse_model, "--precision", "int8")
    assert "differ from the Keras model" in refusal(done, 1)
    (line, *_) = [line for line in done.stdout.splitlines() if "at least 0.98" in line]
    assert line.startswith("model-int8") and " agreement " in line
    assert os.listdir(tmp_path) == []


def test_force_publishes_what_failed_and_says_so(coarse_model, tmp_path, run_script):
    options = ["--precision", "int8", "--force"]
    done = run_script("onnx", coarse_model, *options)
    assert done.returncode == 0, done.stderr
    assert {*answers(done)} == {"model-int8.onnx"} and "FAILED" in done.stdout
    (row,) = read_manifest(tmp_path / "exported")["artifacts"]
    assert row["published_by_force"] and row["failures"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_the_options(name, run_script):
    done = run_script(name, "--help")
    assert done.returncode == 0
    assert "RUN_OR_MODEL" in done.stdout and "--out DIR" in done.stdout
