"""Fixtures that more than one test module uses."""

import os

# Tests run in several processes, one for each core: more threads would wait for each other. Set
# before TensorFlow and PyTorch are imported, and inherited by the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "OMP_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import contextlib
import dataclasses
import io
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from keras_resnet.datasets import Split, fashion_mnist, load_dataset

# The command line with one more row in the table of depths: a network that trains in seconds.
TINY_COMMAND = """
import sys
from keras_resnet import models
from keras_resnet.distribution import launch
models.SPECS["tiny"] = models.Spec((1, 1), (8, 16))
launch.PROGRAM = sys.orig_argv[:3]
from keras_resnet.cli import main
sys.exit(main())
"""


def run_main(*arguments):
    """Runs the command line, knowing the network "tiny", in this process.

    Processes of their own cost seconds: `run_command` is for tests about processes.

    Returns:
        A `subprocess.CompletedProcess`.
    """
    from keras_resnet import models
    from keras_resnet.cli import main

    words = [str(argument) for argument in arguments]
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(models.SPECS, tiny=models.Spec((1, 1), (8, 16))),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            status = main(words)
        except SystemExit as stop:  # raised by argparse
            status = stop.code
    return subprocess.CompletedProcess(words, status, out.getvalue(), err.getvalue())


def command(*arguments):
    """Returns the words that run the command line, knowing the network "tiny", in a process."""
    return [sys.executable, "-c", TINY_COMMAND, *map(str, arguments)]


def run_command(*arguments, timeout=300, **environment):
    """Runs the command line in a process of its own; returns what `subprocess.run` does."""
    return subprocess.run(
        command(*arguments),
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment},
    )


def default_signals():
    """Restores signals that a shell in the background or `nohup` has had this process ignore."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def backend_environment(backend):
    """Returns the environment for a process with Keras on `backend`."""
    environment = {**os.environ, "KERAS_BACKEND": backend}
    if backend == "jax":
        # JAX compiles each operation by itself, most of them for a single call.
        environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    return environment


def check(what, difference, bound):
    """Holds a difference to its bound; `pytest -rP` shows what was measured."""
    print(f"{what}: {difference:.1e}, bound {bound:.0e}")
    assert difference < bound, what


@pytest.fixture(scope="module")
def one_torch_thread():
    """Two libraries' threads on the same cores wait for each other more than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch):
    """Makes "tiny" a row of SPECS in this process."""
    from keras_resnet import models

    monkeypatch.setitem(models.SPECS, "tiny", models.Spec((1, 1), (8, 16)))
    return "tiny"


def write_tiny(path, num_classes=12, channels=3, variant="torchvision", layout="torchvision"):
    """Writes weights of "tiny" as a PyTorch checkpoint; returns the network they are of."""
    from keras_resnet import models, weights

    spec = models.Spec((1, 1), (8, 16))
    network = models.build_resnet(spec, (28, 28, channels), num_classes, variant=variant)
    random = np.random.default_rng(0)
    for weight in network.weights:
        # The same at every call, and none that another network has by chance.
        kernel = weight.path.endswith("kernel")
        low, high = (-0.2, 0.2) if kernel else (0.5, 1.5)
        weight.assign(random.uniform(low, high, weight.shape))
    weights.save_torch_weights(network, path, layout)
    return network


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A checkpoint of "tiny": torchvision's names, colour images, 12 classes."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny.safetensors"
    write_tiny(path)
    return path


@pytest.fixture(scope="session")
def idx_folder():
    """Debian's folder with the four real Fashion-MNIST files."""
    if not fashion_mnist.DEBIAN_FOLDER.is_dir():
        # Skipped by hand on other systems; where a change is checked nothing may go untested.
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop("needs Debian's package dataset-fashion-mnist, which `make data` installs")
    return fashion_mnist.DEBIAN_FOLDER


@pytest.fixture(scope="session")
def fashion(idx_folder):
    """The first 1,200 training and 400 test images of Fashion-MNIST, in memory."""
    whole = load_dataset("fashion_mnist", data_dir=idx_folder)
    parts = {"train": 1200, "test": 400}
    return dataclasses.replace(
        whole,
        splits={
            name: Split(split.images[: parts[name]], split.labels[: parts[name]])
            for name, split in whole.splits.items()
        },
    )


@pytest.fixture(scope="session")
def fashion_folder(idx_folder, tmp_path_factory):
    """A folder of 250 real images of each of four classes, as PNG files."""
    whole = load_dataset("fashion_mnist", data_dir=idx_folder)
    split = whole.splits["train"]
    folder = tmp_path_factory.mktemp("fashion")
    for label in (1, 5, 7, 8):
        name = folder / whole.class_names[label]
        name.mkdir()
        for index in np.flatnonzero(split.labels == label)[:250]:
            Image.fromarray(split.images[index, :, :, 0]).save(name / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def trained_run(fashion_folder, tmp_path_factory):
    """The folder of a finished run of three epochs, trained from the command line."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    done = run_main(
        *("train", "--model", "tiny", "--dataset", f"folder:{fashion_folder}"),
        *("--recipe", "quick", "--run-dir", run_dir, "--image-size", 28, "--batch-size", 32),
        *("--epochs", 3, "--precision", "float32"),
    )
    assert done.returncode == 0, done.stderr
    (run_dir / "stdout.txt").write_text(done.stdout)
    return run_dir


@pytest.fixture(scope="session")
def small_model(fashion):
    """A small network that is right more often than not: raw uint8 images to ten logits."""
    import keras

    from keras_resnet import Spec, build_resnet, with_preprocessing

    keras.utils.set_random_seed(0)
    network = build_resnet(Spec((1, 1), (8, 16)), (28, 28, 1), 10)
    model = with_preprocessing(network, (28, 28, 1))
    split, epochs, batch_size = fashion.splits["train"], 10, 32
    rate = keras.optimizers.schedules.CosineDecay(5e-3, epochs * len(split) // batch_size)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss)
    model.fit(split.images, split.labels, batch_size=batch_size, epochs=epochs, verbose=0)
    split = fashion.splits["test"]
    assert np.mean(model.predict(split.images, verbose=0).argmax(1) == split.labels) > 0.6
    return model


@pytest.fixture(scope="session")
def serving(small_model):
    """What every exported file of `small_model` holds."""
    from keras_resnet.exporters.graph import Serving

    return Serving(small_model)
