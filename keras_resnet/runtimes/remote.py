"""Objects in a separate Python process; their methods are called over pipes.

The process is a new interpreter. `multiprocessing` is unsuitable for two reasons. It unpickles the
data that the process sends: a malicious file, parsed there, could run code in this process. Its
"spawn" method imports the caller's main script again. A message is one line of JSON and the bytes
of at most one array.
"""

import contextlib
import importlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from keras_resnet.utils.errors import InputError, one_line

_ROOT = str(Path(__file__).resolve().parents[2])
_MAIN = """
import json, sys
task = json.loads(sys.argv[1])
sys.path[:] = task.pop("import_path")
from keras_resnet.runtimes import remote
remote.serve(**task)
"""


class RemoteError(Exception):
    """The process ended, took too long, or raised an unexpected error; the message is one line."""


class Remote:
    """An object in another process; a context manager that ends the process.

    Args:
        target: The object's class, as "module:name". That module is imported in the process; it
            decides which libraries the process loads.
        arguments: Arguments for the class, a dict that JSON can hold.
        timeout: Seconds that a call may take; None for no limit.
        environment: Additional environment variables for the process.
        blocked: Top-level packages that the process cannot import after `target`.

    Attributes:
        pid: The process's id.
        seconds: How long the last call took in the process, without the transfer.

    Example:
        >>> with Remote("datetime:timedelta", {"days": 2}) as duration:
        ...     duration.call("total_seconds")
        172800.0
    """

    def __init__(self, target, arguments=None, *, timeout=None, environment=None, blocked=()):
        # An empty entry is the current folder, which may hold anything.
        paths = [entry for entry in sys.path if entry]
        task = {
            "import_path": paths if _ROOT in paths else [_ROOT, *paths],
            "target": target,
            "arguments": arguments or {},
            "blocked": blocked,
        }
        self._timeout = timeout
        self._process = subprocess.Popen(
            # -I: neither the environment nor the current folder can replace a module.
            [sys.executable, "-I", "-c", _MAIN, json.dumps(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
        )
        self.pid = self._process.pid
        self.seconds = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def is_alive(self):
        """Returns whether the process is running."""
        return self._process.poll() is None

    def close(self):
        """Kills the process, and waits until it has ended."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # the buffer holds an unsent request
                pipe.close()

    def call(self, method, *array, **arguments):
        """Calls a method of the object.

        Args:
            method: Its name.
            *array: At most one NumPy array.
            **arguments: Further arguments, which JSON can hold.

        Returns:
            The method's result: an array, or a value that JSON can hold.

        Raises:
            InputError: If the method raised one.
            RemoteError: If it raised another error, or the process ended or took too long. In the
                last two cases no further calls are possible.
        """
        answer = None
        start = time.monotonic()
        timer = threading.Timer(self._timeout or 0, self._process.kill)
        if self._timeout:
            timer.start()
        try:
            _send(self._process.stdin, {"method": method, "arguments": arguments}, *array)
            answer, *result = _receive(self._process.stdout)
        except (OSError, EOFError, ValueError, TypeError):
            late = self._timeout and time.monotonic() - start >= self._timeout
        finally:
            timer.cancel()
            if answer is None:  # also on Ctrl-C: a later call would receive this result
                self.close()
        if answer is None:
            raise RemoteError(f"the process {self._fate(late)}")
        if not isinstance(answer, dict):
            raise RemoteError("the process sent no answer to the call")
        if "error" in answer:
            if answer["type"] == InputError.__name__:
                raise InputError(answer["error"])
            raise RemoteError(f"{answer['type']}: {answer['error']}")
        self.seconds = answer["seconds"]
        return result[0] if result else answer["result"]

    def _fate(self, late):
        status = self._process.returncode
        if late:
            return f"took more than {self._timeout:g} s"
        if status >= 0:
            return f"ended with status {status}"
        with contextlib.suppress(ValueError):
            return f"crashed ({signal.Signals(-status).name})"
        return f"crashed (signal {-status})"


def _send(stream, message, *array):
    """Writes a message: JSON and, where there is one, the description and bytes of an array."""
    array = [np.ascontiguousarray(each) for each in array]
    form = [[each.dtype.str, each.shape] for each in array]
    stream.write(json.dumps([message, *form]).encode() + b"\n")
    for each in array:
        stream.write(each.reshape(-1).view("uint8"))
    stream.flush()


def _receive(stream):
    """Returns a list of a message and, where there is one, its array."""
    line = stream.readline()
    if not line:
        raise EOFError
    message, *form = json.loads(line)
    if not form:
        return [message]
    ((dtype, shape),) = form
    content = stream.read(np.dtype(dtype).itemsize * math.prod(shape))
    # `frombuffer` refuses types that hold Python objects.
    return [message, np.frombuffer(content, dtype).reshape(shape)]


# ----------------------------------------------------------------------------------------------
# In the process
# ----------------------------------------------------------------------------------------------


def serve(target, arguments, blocked):
    """Answers calls in the process of a `Remote`; never returns.

    Args:
        target: See `Remote`.
        arguments: See `Remote`.
        blocked: See `Remote`.
    """
    # Ctrl-C also reaches the caller, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that a library prints must not come between the answers
    requests = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=[requests], daemon=True).start()
    served = None
    while True:
        request, *array = requests.get()
        try:
            if served is None:
                served = _create(target, arguments, blocked)
            start = time.perf_counter()
            result = getattr(served, request["method"])(*array, **request["arguments"])
            answer = {"seconds": time.perf_counter() - start}
            array = [result] if isinstance(result, np.ndarray) else []
            if not array:
                answer["result"] = result
        except Exception as error:
            answer, array = {"error": one_line(error), "type": type(error).__name__}, []
        _send(answers, answer, *array)


def _read_requests(requests):
    # An error means that the caller has ended, perhaps in the middle of a call.
    with contextlib.suppress(Exception):
        while True:
            requests.put(_receive(sys.stdin.buffer))
    os._exit(0)


def _create(target, arguments, blocked):
    module, name = target.split(":")
    kind = getattr(importlib.import_module(module), name)
    for loaded in [*sys.modules, *blocked]:
        if loaded.partition(".")[0] in blocked:
            sys.modules[loaded] = None  # an import of it raises ModuleNotFoundError
    return kind(**arguments)


@contextlib.contextmanager
def limited(memory, seconds):
    """Limits this process's memory and processor time inside the block; has no effect off Linux.

    Args:
        memory: Bytes of address space beyond those in use; a larger allocation raises MemoryError.
        seconds: Processor time, after which the kernel ends the process, even if its parent has
            ended and native code blocks all of Python's threads.
    """
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        yield
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    limits = {
        resource.RLIMIT_AS: pages * resource.getpagesize() + memory,
        resource.RLIMIT_CPU: int(used.ru_utime + used.ru_stime + seconds) + 1,
    }
    before = {kind: resource.getrlimit(kind) for kind in limits}
    for kind, limit in limits.items():
        with contextlib.suppress(ValueError):  # there is a lower limit already
            resource.setrlimit(kind, (limit, before[kind][1]))
    try:
        yield
    finally:
        for kind, limit in before.items():
            resource.setrlimit(kind, limit)
