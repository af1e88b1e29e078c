"""The command line, as a user runs it."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_main
from PIL import Image

from keras_resnet.cli import main

SCRIPT = Path(sys.executable).with_name("keras-resnet")


def run_script(*arguments, **environment):
    """Runs the installed console script."""
    return subprocess.run(
        [SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_help_loads_no_framework():
    done = run_script("--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0 and "summary" in done.stdout
    assert "argparse" in done.stderr
    assert not re.search(r"\b(tensorflow|keras|jax|torch|numpy)\b", done.stderr)


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "predict", "convert", "models", "summary"]
)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "usage: keras-resnet" in capsys.readouterr().out


@pytest.mark.thorough
def test_summary_prints_the_walk():
    done = run_script("summary", "resnet18", "--input-shape", 224, 224, 1)
    assert done.returncode == 0
    # TensorFlow's lines about the machine are kept back.
    assert done.stderr == ""
    rows = [line.split() for line in done.stdout.splitlines()[2:]]
    assert rows == [
        ["stem", "1×56×56×64", "3,328"],
        ["stage1", "1×56×56×64", "148,224"],
        ["stage2", "1×28×28×128", "525,952"],
        ["stage3", "1×14×14×256", "2,100,480"],
        ["stage4", "1×7×7×512", "8,395,264"],
        ["global_avg_pool", "1×512", "0"],
        ["logits", "1×10", "5,130"],
        ["total", "11,178,378"],
    ]


def test_summary_of_the_dense_network(capsys):
    assert main(["summary", "dense_resnet", "--input-shape", "12"]) == 0
    assert "block10" in capsys.readouterr().out


def test_summary_takes_a_variant_and_a_stem(capsys):
    words = ["summary", "resnet50", "--input-shape", "32", "32", "3", "--num-classes", "1000"]
    assert main([*words, "--variant", "torchvision", "--stem", "small"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    # 7×7 to 3×3: torchvision's 25,557,032 less 40 weights for each of 3×64 pairs of channels.
    assert rows[0][:2] == ["stem", "1×32×32×64"] and rows[-1] == ["total", "25,549,352"]


def test_convert_prints_what_it_found(checkpoint, tiny, tmp_path, capsys):
    out = tmp_path / "model.keras"
    words = ["convert", str(checkpoint), "--model", "tiny", "--num-classes", "12"]
    assert main([*words, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    for name, value in {
        "layout": "torchvision",
        "variant": "torchvision",
        "num classes": "12",
        "parameters": "6,260",
        "tensors": "32",
        "path": str(out),
    }.items():
        assert re.search(rf"^{name} +{re.escape(value)}$", printed, re.MULTILINE), name
    assert main([*words, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["tensors"]) == (6260, 32)
    # The network alone takes no images, and says what would.
    image = tmp_path / "image.png"
    Image.new("RGB", (40, 30)).save(image)
    assert main(["predict", str(out), str(image)]) == 2
    assert "--normalize imagenet" in capsys.readouterr().err
    assert main([*words, "--out", str(out), "--normalize", "imagenet"]) == 0
    assert main(["predict", str(out), str(image), "--top", "1"]) == 0
    assert re.search(r"image\.png +no +class \d+ +0\.\d+", capsys.readouterr().out)


@pytest.mark.slow
def test_fine_tuning_from_a_shell(checkpoint, fashion_folder, tmp_path):
    done = run_main(
        *("train", "--model", "tiny", "--dataset", f"folder:{fashion_folder}"),
        *("--recipe", "quick", "--weights", checkpoint, "--freeze", "stem,stage1"),
        *("--normalize", "imagenet"),
        *("--learning-rate", 1e-3, "--epochs", 3, "--batch-size", 32),
        *("--run-dir", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    assert "new head: 4 classes, the checkpoint has 12" in done.stdout
    assert "frozen: stem, stage1" in done.stdout
    # Four classes; a network that learned nothing has 0.25.
    assert float(re.search(r"accuracy +(\d\.\d+) ±", done.stdout)[1]) > 0.5


def test_evaluate_prints_a_table_or_json(trained_run, capsys):
    report = json.loads((trained_run / "report.json").read_text())
    assert main(["evaluate", str(trained_run)]) == 0
    out = capsys.readouterr().out
    assert f"accuracy {report['accuracy']:.4f}" in out
    assert "Trouser" in out
    assert main(["evaluate", str(trained_run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == report["accuracy"]


def test_predict_prints_a_table_or_json(trained_run, fashion_folder, capsys):
    images = [str(path) for path in sorted((fashion_folder / "Trouser").iterdir())[:2]]
    assert main(["predict", str(trained_run), *images, "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 2
    assert images[0] in lines[2] and images[1] in lines[4]
    assert main(["predict", str(trained_run), *images, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["image"] for row in rows] == images
    assert {label["label"] for label in rows[0]["labels"]} <= {
        "Bag",
        "Sandal",
        "Sneaker",
        "Trouser",
    }


# ----------------------------------------------------------------------------------------------
# Bad input: one clear line, exit status 2
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path, tiny, trained_run, fashion_folder, checkpoint):
    """What the words in braces below stand for."""
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-100])
    torch.save({"state_dict": {}, "args": Payload(tmp_path / "ran")}, tmp_path / "evil.pth")
    (tmp_path / "bad.png").write_bytes(b"no image")
    (tmp_path / "old.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "text.keras").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    mixed = tmp_path / "mixed"
    for name in ("a", "b"):
        (mixed / name).mkdir(parents=True)
        for index in range(3):
            Image.new("L", (8, 8)).save(mixed / name / f"{index}.png")
    (mixed / "a" / "spoilt.png").write_bytes(b"no image")
    idx = tmp_path / "idx"
    idx.mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (idx / f"{name}-ubyte.gz").write_bytes(b"\x1f\x8b broken")
    return {
        "tmp": tmp_path,
        "run": trained_run,
        "data": fashion_folder,
        "null": os.devnull,
        "weights": checkpoint,
    }


class Payload:
    """What a pickle runs when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


BAD = {
    "no command": ("", "required: COMMAND"),
    "unknown command": ("fly", "invalid choice: 'fly'"),
    "unknown recipe": (
        "train --recipe slow",
        "`recipe` must be one of quick, fast, d2l, photos, best, got 'slow'",
    ),
    "unknown precision": ("train --precision int4", "invalid choice: 'int4'"),
    "no epochs": ("train --epochs 0", "--epochs: must be positive and at most 1e+06, got 0"),
    "negative batch": (
        "train --batch-size -3",
        "at most 1e+06, got -3",
    ),
    "fraction of a pixel": ("train --image-size 9.5", "invalid int value: '9.5'"),
    "rate that is no number": (
        "train --learning-rate nan",
        "must be positive and",
    ),
    "share of one": ("train --validation-split 1", "must be between 0 and 1, got 1"),
    "negative seed": ("train --seed -1 --run-dir {tmp}/r", "`seed` must be"),
    "more epochs than a number holds": ("train --epochs 1" + 400 * "0", "at most 1e+06"),
    "home of nobody": (
        "train --dataset folder:~nosuchuser/x --run-dir {tmp}/r",
        "there is no such home folder",
    ),
    "name too long": ("evaluate " + 300 * "x", "File name too long"),
    "unknown model": ("train --model vgg --run-dir {tmp}/r", "must be one of resnet18, resnet34"),
    "unknown data set": ("train --dataset mnist --run-dir {tmp}/r", "got 'mnist'"),
    "resume of nothing": ("train --resume", "`resume` needs the `run_dir`"),
    "resume of no run": ("train --resume --run-dir {tmp}/none", "nothing to resume"),
    "resume with another rate": (
        "train --resume --run-dir {run} --learning-rate 3",
        "`learning_rate` was None, got 3.0",
    ),
    "folder in use": ("train --run-dir {tmp}/full", "not empty"),
    "run folder below a file": ("train --run-dir {null}/run", "cannot be written to"),
    "no data folder": ("train --data-dir {tmp}/none --run-dir {tmp}/r", "none"),
    "broken gzip": ("train --data-dir {tmp}/idx --run-dir {tmp}/r", "ubyte.gz"),
    "no images": ("train --dataset folder:{tmp}/empty --run-dir {tmp}/r", "empty"),
    "spoilt image": ("train --dataset folder:{tmp}/mixed --run-dir {tmp}/r", "spoilt.png"),
    "no such TFDS set": (
        "train --dataset tfds:no_such_set --data-dir {tmp} --run-dir {tmp}/r",
        "no_such_set",
    ),
    "model that is not there": ("evaluate {tmp}/none.keras", "no such model file"),
    "model in HDF5": ("evaluate {tmp}/old.h5", "HDF5 models can carry code"),
    "model that is text": ("predict {tmp}/text.keras {tmp}/bad.png", "not a .keras file"),
    "folder that is no run": ("evaluate {tmp}/empty", "no model.keras there"),
    "data of other classes": ("evaluate {run} --dataset fashion_mnist", "knows the classes Bag"),
    "spoilt picture": ("predict {run} {tmp}/bad.png", "bad.png: cannot be read"),
    "missing picture": ("predict {run} {tmp}/none.png", "no such image file"),
    "no labels": (
        "predict {run} {tmp}/bad.png --top 0",
        "must be positive and at most 1e+06, got 0",
    ),
    "no checkpoint": ("convert {tmp}/none.pth --model tiny --out {tmp}/m.keras", "no such checkp"),
    "checkpoint cut short": (
        "convert {tmp}/cut.safetensors --model tiny --out {tmp}/m.keras",
        "cut.safetensors: cannot be read",
    ),
    "checkpoint with code": (
        "convert {tmp}/evil.pth --model tiny --out {tmp}/m.keras",
        "evil.pth: refused: it holds posix.mkdir",
    ),
    "checkpoint of another depth": (
        "convert {weights} --model resnet18 --out {tmp}/m.keras",
        "tiny.safetensors: tensors: 70 missing",
    ),
    "checkpoint of other classes": (
        "convert {weights} --model tiny --num-classes 10 --out {tmp}/m.keras",
        "the checkpoint's head has 12 classes, got `num_classes` 10: leave that out, or",
    ),
    "checkpoint without a network": (
        "convert {weights} --out {tmp}/m.keras",
        "weights alone do not state their network: name it, --model NAME",
    ),
    "checkpoint to no folder": (
        "convert {weights} --model tiny --out {tmp}/no/m.keras",
        "there is no folder",
    ),
    "checkpoint to PyTorch": ("convert {weights} --model tiny --out {tmp}/m.pth", "end in .keras"),
    "start from a file cut short": (
        "train --model tiny --weights {tmp}/cut.safetensors --run-dir {tmp}/r",
        "cut.safetensors: cannot be read",
    ),
    "start from code": (
        "train --model tiny --weights {tmp}/evil.pth --run-dir {tmp}/r",
        "evil.pth: refused: it holds posix.mkdir",
    ),
    "start from another depth": (
        "train --model resnet18 --dataset folder:{data} --weights {weights} --run-dir {tmp}/r",
        "tiny.safetensors: tensors: 70 missing",
    ),
    "freeze an unknown module": (
        "train --model tiny --dataset folder:{data} --weights {weights} --freeze stage9 "
        "--run-dir {tmp}/r",
        "stem, stage1, stage2, logits, got 'stage9'",
    ),
    "freeze what is random": ("train --freeze stem --run-dir {tmp}/r", "--freeze needs --weights"),
    "unknown normalization": (
        "train --normalize zca --run-dir {tmp}/r",
        "`normalize` must be one of none, imagenet, inception, caffe, 1/255, 0-255, got 'zca'",
    ),
    "unknown variant": ("summary resnet18 --variant v9", "`variant` must be one of d2l"),
    "variant of the dense network": ("summary dense_resnet --variant v1", "has no `variant`"),
    "unknown network": ("summary vgg", "`model` must be one of"),
    "shape of two numbers": ("summary resnet18 --input-shape 224 224", "`input_shape` must be"),
    "shape of three numbers": (
        "summary dense_resnet --input-shape 1 2 3",
        "`input_shape` of dense_resnet must be one number",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, places, capfd):
    words, expected = BAD[case]
    before = sorted(places["tmp"].rglob("*"))
    try:
        status = main([word.format(**places) for word in words.split()])
    except SystemExit as stop:  # how argparse ends
        status = stop.code
    error = capfd.readouterr().err
    assert status == 2
    message = error.strip().splitlines()[-1]
    assert expected in message
    assert "Traceback" not in error
    # argparse puts the usage before its line; ours stand alone.
    assert error.startswith("usage:") or len(error.splitlines()) == 1
    # Nothing was begun: no folder, no file.
    assert sorted(places["tmp"].rglob("*")) == before


@pytest.mark.slow
def test_bad_input_from_a_shell(tmp_path):
    done = run_script("evaluate", tmp_path / "none.keras")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"keras-resnet: {tmp_path}/none.keras: no such model file\n"


@pytest.mark.thorough
def test_a_backend_that_is_not_there_is_one_line():
    done = run_script("summary", "resnet18", KERAS_BACKEND="mxnet")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "KERAS_BACKEND mxnet" in done.stderr


@pytest.mark.thorough
def test_output_that_cannot_be_written_is_no_traceback():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [SCRIPT, "summary", "dense_resnet"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "keras-resnet: No space left on device\n"


def test_a_terminal_without_the_multiplication_sign_gets_an_answer(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["summary", "dense_resnet"]) == 0
    assert b"1?24" in terminal.buffer.getvalue()


@pytest.mark.thorough
def test_a_failed_run_is_one_line_and_status_1(fashion_folder, tmp_path):
    done = run_main(
        *("train", "--model", "tiny", "--dataset", f"folder:{fashion_folder}"),
        *("--image-size", 28, "--learning-rate", 1e30, "--run-dir", tmp_path / "run"),
        *("--recipe", "quick", "--precision", "float32"),
    )
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert re.match(r"keras-resnet: the loss became (nan|inf) in epoch 1, step \d+ of \d+", message)
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "model.keras").exists()


def changed(data, offset, value):
    """Returns `data` with one byte replaced."""
    return data[:offset] + bytes([value]) + data[offset + 1 :]


# file -> (what is done to its unpacked bytes, what the line then says). None: no such file.
FAULTS = {
    "missing file": ("train-labels-idx1-ubyte", None, "missing"),
    "wrong magic number": (
        "t10k-labels-idx1-ubyte",
        lambda data: changed(data, 3, 9),
        "magic",
    ),
    "label out of range": ("t10k-labels-idx1-ubyte", lambda data: changed(data, 20, 10), "10"),
    "count in the header": ("train-labels-idx1-ubyte", lambda data: changed(data, 7, 1), "60000"),
    "cut short": ("t10k-images-idx3-ubyte", lambda data: data[:-1], "bytes"),
    "one pixel": ("t10k-images-idx3-ubyte", lambda data: changed(data, 5000, 77), "sha256"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "gzip"])
def test_faulty_fashion_mnist_is_one_line_and_status_2(fault, packed, idx_folder, tmp_path, capfd):
    name, change, expected = FAULTS[fault]
    folder = tmp_path / "data"
    folder.mkdir()
    for path in idx_folder.glob("*.gz"):
        if path.name != f"{name}.gz":
            (folder / path.name).symlink_to(path)
    if change is not None:
        data = change(gzip.decompress((idx_folder / f"{name}.gz").read_bytes()))
        file = folder / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(data, 1) if packed else data)
    assert main(["train", "--data-dir", str(folder), "--run-dir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert name in error and expected in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [lambda data: data[:-9], lambda data: changed(data, 3000, 0)])
def test_a_damaged_gzip_is_one_line_and_status_2(change, idx_folder, tmp_path, capfd):
    for path in idx_folder.glob("*.gz"):
        (tmp_path / path.name).symlink_to(path)
    damaged = tmp_path / "t10k-images-idx3-ubyte.gz"
    data = change(damaged.read_bytes())
    damaged.unlink()
    damaged.write_bytes(data)
    assert main(["train", "--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1 and str(damaged) in error
