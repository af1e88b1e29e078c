"""The gap in Keras 3's multi-worker `fit`: there without the fix, and nowhere else."""

import json
import subprocess
import sys

import numpy as np
import pytest
import replica_job

import keras_resnet
from keras_resnet.distribution import keras_patch

pytestmark = pytest.mark.thorough

PATCHED = ("reduce_per_replica", "_maybe_symbolic_build", "_make_function")

# The state of Keras's functions, for one case after another in one process, restored in between.
LOOK = f"""
import importlib, json, pkgutil, warnings
import keras
import keras.src.backend.tensorflow.trainer as trainer
import keras_resnet
from keras_resnet.distribution import choose_strategy, keras_patch

OWNERS = (trainer, trainer.TensorFlowTrainer, trainer.TensorFlowTrainer)
NAMES = {PATCHED}

def functions():
    return [getattr(owner, name) for owner, name in zip(OWNERS, NAMES)]

def import_all():
    for module in pkgutil.walk_packages(keras_resnet.__path__, "keras_resnet."):
        if "child" not in module.name and "__main__" not in module.name:
            importlib.import_module(module.name)

def apply_twice():
    keras_patch.apply()
    first = functions()
    keras_patch.apply()
    assert functions() == first

def apply_to_another_version():
    keras.__version__ = "3.99.0"
    keras_patch.apply()

own = functions()
found = {{}}
for name, act in {{
    "import": import_all,
    "none": lambda: choose_strategy("none", say=None),
    "mirrored": lambda: choose_strategy("mirrored", say=None),
    "twice": apply_twice,
    "another version": apply_to_another_version,
}}.items():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    said = [str(warning.message) for warning in caught if warning.category is UserWarning]
    found[name] = [functions() == own, said]
    for owner, name, function in zip(OWNERS, NAMES, own):
        setattr(owner, name, function)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def looks():
    """Returns {case: [whether Keras's functions are its own, warnings]}."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("action", "untouched"),
    [("import", True), ("none", True), ("mirrored", True), ("twice", False)],
)
def test_keras_is_touched_under_several_workers_alone(looks, action, untouched):
    assert looks[action][0] == untouched
    assert not [text for text in looks[action][1] if "keras" in text.lower()]


def test_another_version_of_keras_is_left_alone_with_a_warning(looks):
    untouched, said = looks["another version"]
    assert untouched and any("this is 3.99.0" in text for text in said)


def test_this_keras_was_tested():
    import keras

    assert ".".join(keras.__version__.split(".")[:2]) in keras_patch.TESTED_VERSIONS


@pytest.mark.slow
def test_without_it_fit_fails(tmp_path, idx_folder):
    # When Keras's own passes, the fix is to go.
    job = {"strategy": "multiworker", "fix": False, "tasks": {"epoch": ["train_epoch", {}]}}
    with pytest.raises(AssertionError) as error:
        replica_job.run(job, tmp_path / "job", workers=2)
    log = (tmp_path / "job" / "log.txt").read_text()
    assert "task epoch" in log and "values.PerReplica'>) to a Tensor" in log
    assert "ended with exit status 1" in str(error.value)


def test_the_check_of_compiled_models_is_public():
    assert keras_resnet.distribution.check_compiled is keras_patch.check_compiled


@pytest.mark.slow
@pytest.mark.parametrize("minor", keras_patch.TESTED_VERSIONS)
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
        for name in replica_job.shared_names(mine):
            np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    assert str(np.load(chief / "epoch.npz")["keras"]).startswith(f"{minor}.")
