"""The choice of a strategy, and its line."""

import json
import re
import subprocess
import sys
import types
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest

import keras_resnet
from keras_resnet.distribution import is_chief, local_output_path, strategies
from keras_resnet.utils.errors import InputError

WORKERS = ["a:1", "b:2", "c:3"]


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """As on a machine that nothing is set on."""
    for name in ("TF_CONFIG", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def test_alone_without_gpus_there_is_no_strategy():
    decision = strategies.decide()
    assert (decision.name, decision.num_replicas, decision.is_chief) == ("none", 1, True)
    assert str(decision) == "strategy: none (no GPU, one process), 1 replica"


@pytest.mark.parametrize("name", ["auto", "multiworker"])
@pytest.mark.parametrize("index", [0, 2])
def test_a_tf_config_means_multiworker(monkeypatch, name, index):
    task = {"type": "worker", "index": index}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": {"worker": WORKERS}, "task": task}))
    decision = strategies.decide(name)
    assert (decision.name, decision.num_replicas) == ("multiworker", 3)
    assert decision.is_chief == (index == 0)
    assert f"TF_CONFIG, worker {index} ({WORKERS[index]})" in str(decision)


@pytest.mark.parametrize("name", ["auto", "multiworker"])
def test_a_slurm_step_without_tf_config_is_refused(monkeypatch, name):
    for variable, value in {"STEP_ID": 0, "PROCID": 1, "STEP_NUM_TASKS": 2}.items():
        monkeypatch.setenv(f"SLURM_{variable}", str(value))
    with pytest.raises(InputError, match="each of 2 tasks of a Slurm step needs a TF_CONFIG"):
        strategies.decide(name)
    assert strategies.decide("none").name == "none"


@pytest.mark.parametrize("name", ["none", "mirrored"])
def test_what_is_asked_for_goes_before_tf_config(monkeypatch, name):
    monkeypatch.setenv("TF_CONFIG", "{nonsense")
    assert strategies.decide(name).name == name


def test_several_gpus_mean_mirrored(monkeypatch):
    import tensorflow as tf

    # There is no GPU to test on: TensorFlow's answer is replaced, and nothing is started.
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [f"{kind}:0", f"{kind}:1"])
    decision = strategies.decide()
    assert str(decision) == "strategy: mirrored (2 GPUs), 2 replicas"


@pytest.mark.parametrize(
    ("name", "reason"),
    [("mirored", "one of auto, none"), ("multiworker", "keras-resnet launch -n N")],
)
def test_what_cannot_be_is_said(name, reason):
    with pytest.raises(InputError, match=reason):
        strategies.decide(name)


def test_a_pool_that_tensorflow_left_open_is_not_shown(monkeypatch):
    # Python prints one in hundreds of them: `test_restarts_do_that_by_themselves` may see none.
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)
    strategies._hide_unclosed_pools()
    of_pool, other = (types.SimpleNamespace(object=o) for o in (ThreadPool.__del__, print))
    sys.unraisablehook(of_pool)
    sys.unraisablehook(other)
    assert shown == [other]


@pytest.mark.thorough
def test_other_backends_train_alone_or_not_at_all():
    code = """
from keras_resnet.distribution import strategies
print(strategies.decide())
strategies.decide("mirrored")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={"KERAS_BACKEND": "torch", "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
    )
    assert "strategy: none (tf.distribute is not for the torch backend)" in done.stdout
    assert "needs KERAS_BACKEND tensorflow, got torch" in done.stderr


LATE = """
import os, tensorflow as tf
tf.constant(1) + 1
from keras_resnet.distribution import choose_strategy
choose_strategy("multiworker")
"""


@pytest.mark.thorough
def test_chosen_too_late_it_says_so():
    config = {"cluster": {"worker": ["localhost:23456"]}, "task": {"type": "worker", "index": 0}}
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import os; os.environ['TF_CONFIG'] = {json.dumps(config)!r}{LATE}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "InputError" in done.stderr and "before anything else is done" in done.stderr


def test_alone_a_process_is_the_chief_and_writes_where_it_was_told(tmp_path):
    strategy = strategies.choose_strategy("none", say=None)
    assert (
        is_chief(strategy) and local_output_path(tmp_path / "here", strategy) == tmp_path / "here"
    )


FEW_IMAGES = """
import numpy as np
images, labels = np.zeros((16, 28, 28, 1), "float32"), np.arange(16) % 10
"""


@pytest.mark.slow
def test_the_script_in_the_guide_runs(tmp_path):
    guide = Path(keras_resnet.__file__).parents[1] / "docs" / "cluster.md"
    blocks = re.findall("```python\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    (script,) = [block for block in blocks if "choose_strategy" in block]
    done = subprocess.run(
        [sys.executable, "-c", FEW_IMAGES + script],
        capture_output=True,
        text=True,
        timeout=200,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "best.keras").is_file()
