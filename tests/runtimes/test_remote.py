"""Objects in other processes: what comes back, what is an error, and when the process ends."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from keras_resnet.runtimes.remote import Remote, RemoteError
from keras_resnet.utils.errors import InputError

pytestmark = pytest.mark.thorough

TARGET = """
import os, sys, time
import numpy as np
from keras_resnet.runtimes.remote import limited
from keras_resnet.utils.errors import InputError

class Target:
    def __init__(self, factor=1):
        self.factor = factor

    def multiply(self, array, offset=0):
        print("noise")
        return array * self.factor + offset

    def add(self, a, b):
        return {"sum": a + b}

    def refuse(self):
        raise InputError("a rule")

    def fail(self):
        raise KeyError("a bug\\nand more")

    def objects(self):
        return np.array([self])

    def sleep(self, seconds):
        time.sleep(seconds)

    def exit(self, status):
        os._exit(status)

    def imported(self, name):
        __import__(name)
        return True

    def path(self):
        return sys.path

    def variable(self, name):
        return os.environ.get(name)

    def allocate(self, size, limit):
        with limited(limit, 60):
            bytearray(size)

    def spin(self, seconds):
        with limited(2**30, seconds):
            while True:
                pass
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Returns a function that starts a process with a `Target`."""
    (tmp_path / "remote_target.py").write_text(TARGET)
    monkeypatch.syspath_prepend(tmp_path)
    started = []

    def start(arguments=None, **options):
        started.append(Remote("remote_target:Target", arguments, **options))
        return started[-1]

    yield start
    for remote in started:
        remote.close()
        assert not psutil.pid_exists(remote.pid)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype="float32").reshape(1, 2, 3),
        np.arange(300000, dtype="uint8")[::2],
        np.zeros((0, 3), "float16"),
    ],
    ids=["floats", "not contiguous", "empty"],
)
def test_arrays_and_json_values_go_there_and_back(start, array):
    remote = start({"factor": 2})
    found = remote.call("multiply", array, offset=1)
    assert found.dtype == array.dtype and found.shape == array.shape
    np.testing.assert_array_equal(found, array * 2 + array.dtype.type(1))
    assert remote.call("add", a="x", b="y") == {"sum": "xy"}


def test_errors_keep_their_kind_and_the_process_lives(start):
    remote = start()
    with pytest.raises(InputError, match=r"^a rule$"):
        remote.call("refuse")
    with pytest.raises(RemoteError, match=r"^KeyError: 'a bug"):
        remote.call("fail")
    with pytest.raises(RemoteError, match=r"AttributeError: .*'unknown'"):
        remote.call("unknown")
    assert remote.call("add", a=1, b=2) == {"sum": 3}


def test_a_class_that_cannot_be_made_is_an_error(start):
    with pytest.raises(RemoteError, match=r"TypeError: .*'other'"):
        start({"other": 1}).call("path")


def test_python_objects_are_not_sent(start):
    """An answer with pickled objects could run code here."""
    with pytest.raises(RemoteError, match="the process"):
        start().call("objects")


def test_a_call_has_a_time_limit(start):
    remote = start(timeout=3)
    assert remote.call("sleep", seconds=0.2) is None
    assert 0.2 <= remote.seconds < 3
    before = time.monotonic()
    with pytest.raises(RemoteError, match="the process took more than 3 s"):
        remote.call("sleep", seconds=60)
    assert time.monotonic() - before < 20
    assert not psutil.pid_exists(remote.pid)
    with pytest.raises(RemoteError):
        remote.call("path")


@pytest.mark.parametrize(("status", "reason"), [(0, "status 0"), (7, "ended with status 7")])
def test_a_process_that_ends_is_an_error(start, status, reason):
    with pytest.raises(RemoteError, match=reason):
        start().call("exit", status=status)


def test_a_process_that_crashes_is_an_error(start):
    remote = start()
    assert remote.call("path")
    os.kill(remote.pid, signal.SIGSEGV)
    with pytest.raises(RemoteError, match=r"the process crashed \(SIGSEGV\)"):
        remote.call("path")


def test_memory_and_processor_time_are_limited(start):
    remote = start(timeout=60)
    with pytest.raises(RemoteError, match="MemoryError"):
        remote.call("allocate", size=2**30, limit=2**24)
    assert remote.call("allocate", size=2**24, limit=2**30) is None  # the limit is lifted again
    with pytest.raises(RemoteError, match="SIGXCPU"):
        remote.call("spin", seconds=1)


def test_the_environment_and_the_current_folder_replace_no_module(start, tmp_path, monkeypatch):
    for folder in ("here", "python"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "python"))
    monkeypatch.syspath_prepend("")
    paths = start().call("path")
    assert "" not in paths and set(paths) >= {entry for entry in sys.path if entry}


def test_blocked_packages_cannot_be_imported(start):
    remote = start(blocked=("keras", "keras_resnet"), environment={"COLOUR": "blue"})
    assert remote.call("imported", name="fractions")
    for name in ("keras", "keras_resnet", "keras_resnet.utils.errors", "keras_resnet.models"):
        with pytest.raises(RemoteError, match="ModuleNotFoundError"):
            remote.call("imported", name=name)
    assert remote.call("variable", name="COLOUR") == "blue"


@pytest.fixture
def interruptible():
    """Ctrl-C interrupts: a shell may have started pytest with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_only_the_caller_is_interrupted(start, interruptible):
    """Ctrl-C reaches both; the process ends as the caller closes it."""
    remote = start()
    assert remote.call("path")
    os.kill(remote.pid, signal.SIGINT)
    assert remote.call("path")
    timer = threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        remote.call("sleep", seconds=60)
    assert not psutil.pid_exists(remote.pid)


def test_the_process_ends_with_its_caller_in_the_middle_of_a_call(start):
    remote = start()
    assert remote.call("path")
    threading.Timer(0.5, remote._process.stdin.close).start()  # as when the caller is killed
    before = time.monotonic()
    with pytest.raises(RemoteError, match="ended with status 0"):
        remote.call("sleep", seconds=60)
    assert time.monotonic() - before < 20


def test_the_process_is_small(start):
    remote = start()
    assert remote.call("path")
    loaded = Path(f"/proc/{remote.pid}/maps").read_text()
    assert "tensorflow" not in loaded and "h5py" not in loaded
