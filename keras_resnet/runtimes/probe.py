"""Tries a file in another process before this one loads it.

LiteRT and ONNX Runtime are C++ that trusts its input: a damaged file can end the process that
loads it, or take all its memory or time. The other process has a limit of each.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading

from keras_resnet.runtimes import child
from keras_resnet.utils.errors import InputError

MEMORY = 4 * 2**30
"""Bytes of address space that a small model may take, beyond what the libraries have."""
MEMORY_A_BYTE = 8
"""Further bytes of address space for each byte of the file."""
SECONDS = 60
"""How long a model may take to load and to answer a few times."""


class Prober:
    """Tries one file after the other in a child process, which is started when first needed.

    Args:
        memory: Bytes that a file may take; by default `MEMORY` and `MEMORY_A_BYTE`.
        seconds: How long a file may take.

    Example:
        >>> with Prober() as prober:  # doctest: +ELLIPSIS
        ...     prober.probe("model.tflite", "tflite", b"no model")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: model.tflite: cannot be loaded: ...
    """

    def __init__(self, memory=None, seconds=SECONDS):
        self.memory = memory
        self.seconds = seconds
        self._process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the child process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            with contextlib.suppress(OSError):
                process.stdin.close()
            process.stdout.close()

    def probe(self, path, form, content):
        """Loads and runs a model in the child process.

        Args:
            path: The file's path, for messages.
            form: "tflite" or "onnx".
            content: The file, bytes.

        Raises:
            InputError: If the model is refused there, or the process ends, runs out of memory,
                or does not answer in time.
        """
        task = {
            "path": str(path),
            "format": form,
            "bytes": len(content),
            "memory": self.memory or MEMORY + MEMORY_A_BYTE * len(content),
            "seconds": self.seconds,
            # An empty entry is the folder that the caller happens to be in.
            "import_path": [entry for entry in sys.path if entry],
        }
        answer, late = self._ask(json.dumps(task).encode() + b"\n", content)
        if answer is not None:
            if "refused" in answer:
                raise InputError(answer["refused"])
            return
        status = self._process.wait()
        self.close()
        what = f"took more than {self.seconds} s for it" if late else _fate(status)
        raise InputError(f"{path}: damaged or hostile: the process that tried it {what}")

    def _ask(self, line, content):
        """Returns the child's answer, None if it ended, and whether its time ran out."""
        process = self._started()
        late = threading.Event()

        def stop():
            late.set()
            process.kill()

        timer = threading.Timer(self.seconds, stop)
        timer.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.write(content)
                process.stdin.flush()
            answer = process.stdout.readline()
        finally:
            timer.cancel()
        try:
            return json.loads(answer), False
        except ValueError:
            # It is ending; if it talks nonsense instead, it is ended.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            return None, late.is_set()

    def _started(self):
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-I", child.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # NumPy's threads would take gigabytes of address space on a large machine.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        return self._process


def _fate(status):
    """Returns in words how a process ended."""
    if status >= 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"crashed ({signal.Signals(-status).name})"
    return f"crashed (signal {-status})"
