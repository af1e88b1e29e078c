"""The gap in Keras 3's multi-worker `fit`: there without the fix, and nowhere else."""

import subprocess
import sys

import numpy as np
import pytest
import replica_job

import keras_resnet
from keras_resnet.distribution import keras_fix

PATCHED = ("reduce_per_replica", "_maybe_symbolic_build", "_make_function")

LOOK = f"""
import keras.src.backend.tensorflow.trainer as trainer
import tensorflow as tf
def functions():
    owners = (trainer, trainer.TensorFlowTrainer, trainer.TensorFlowTrainer)
    return [getattr(o, name) for o, name in zip(owners, {PATCHED})]
before = functions()
{{}}
print(functions() == before)
"""


def look(code):
    """Returns whether Keras's functions are Keras's own after `code`, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", LOOK.format(code)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.splitlines()[-1:] == ["True"], done.stderr


IMPORT_ALL = """
import importlib, pkgutil
import keras_resnet
for module in pkgutil.walk_packages(keras_resnet.__path__, "keras_resnet."):
    if "child" not in module.name and "__main__" not in module.name:
        importlib.import_module(module.name)
"""


@pytest.mark.parametrize(
    ("code", "untouched"),
    [
        (IMPORT_ALL, True),
        ("from keras_resnet.distribution import choose_strategy\nchoose_strategy('none')", True),
        (
            "from keras_resnet.distribution import choose_strategy\nchoose_strategy('mirrored')",
            True,
        ),
        ("from keras_resnet.distribution import keras_fix\nkeras_fix.apply()", False),
    ],
    ids=["import", "none", "mirrored", "apply"],
)
def test_keras_is_touched_under_several_workers_alone(code, untouched):
    same, stderr = look(code)
    assert same == untouched, stderr


def test_another_version_of_keras_is_left_alone_with_a_warning():
    code = """
import keras
keras.__version__ = "3.99.0"
from keras_resnet.distribution import keras_fix
keras_fix.apply()"""
    same, stderr = look(code)
    assert not same and "UserWarning" in stderr and "this is 3.99.0" in stderr
    code = f"import warnings; warnings.simplefilter('ignore'){code}"
    assert look(code)[0]


def test_this_keras_was_tested():
    import keras

    assert ".".join(keras.__version__.split(".")[:2]) in keras_fix.TESTED_VERSIONS


def test_without_it_fit_fails(tmp_path, idx_folder):
    # When Keras's own passes, the fix is to go.
    job = {"strategy": "multiworker", "fix": False, "tasks": {"epoch": ["train_epoch", {}]}}
    with pytest.raises(AssertionError) as error:
        replica_job.run(job, tmp_path / "job", workers=2)
    log = (tmp_path / "job" / "log.txt").read_text()
    assert "task epoch" in log and "values.PerReplica'>) to a Tensor" in log
    assert "ended with exit status 1" in str(error.value)


def test_applied_twice_it_is_applied_once():
    code = """
from keras_resnet.distribution import keras_fix
keras_fix.apply()
before = functions()
keras_fix.apply()"""
    assert look(code)[0]
    assert keras_resnet.distribution.check_compiled is keras_fix.check_compiled


@pytest.mark.slow
@pytest.mark.parametrize("minor", keras_fix.TESTED_VERSIONS)
def test_every_release_that_the_fix_names(minor, tmp_path, idx_folder, monkeypatch):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    wanted = ["--target", str(tmp_path / "keras"), f"keras=={minor}.*"]
    if subprocess.run([*pip, *wanted], check=False).returncode:
        pytest.skip(f"Keras {minor} cannot be installed here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "keras"))
    tasks = {
        "epoch": ["train_epoch", {"stages": 2}],
        "arrays": ["plain_arrays", {}],
        "four steps": ["plain_arrays", {"steps_per_execution": 4}],
    }
    job = {"strategy": "multiworker", "tasks": tasks}
    chief, other = replica_job.run(job, tmp_path / "job", workers=2)
    for task in tasks:
        mine, theirs = (np.load(folder / f"{task}.npz") for folder in (chief, other))
        for name in mine.files:
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert str(np.load(chief / "epoch.npz")["keras"]).startswith(f"{minor}.")
