"""A SavedModel run in a process of its own, where its code finds neither Keras nor this package."""

import contextlib
import json
import subprocess
import sys
import tempfile

from keras_resnet.exporters import fresh_child
from keras_resnet.runtimes import open_runtime
from keras_resnet.runtimes.base import Runtime
from keras_resnet.utils.errors import InputError, one_line


class FreshSavedModel(Runtime):
    """A `Runtime` whose answers come from another process.

    Args:
        path: The SavedModel's folder, which is trusted.
        threads: How many threads TensorFlow computes in; None for its own choice.
    """

    format = "saved_model"

    def __init__(self, path, threads=None):
        here = open_runtime(path, trust=True)
        super().__init__(path, here.metadata, threads)
        for name in ("input", "output", "output_kind", "operators"):
            setattr(self, name, getattr(here, name))
        stack = self._open = contextlib.ExitStack()
        # Not a pipe, which would fill up while nobody reads.
        self._errors = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-I", fresh_child.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        paths = [entry for entry in sys.path if entry]
        task = {"path": str(path), "threads": threads, "import_path": paths}
        self._process.stdin.write(json.dumps(task).encode() + b"\n")

    def call(self, images):
        """Returns the output for one batch."""
        try:
            fresh_child.send(self._process.stdin, images)
            answers = fresh_child.receive(self._process.stdout)
            self._seconds = fresh_child.receive(self._process.stdout)
        except BrokenPipeError:
            answers = None
        if answers is None:
            raise InputError(f"{self.path}: a process without Keras cannot run it: {self._why()}")
        return answers

    def time(self, images):
        """Returns how many seconds the answers take there."""
        self.run(images)
        return float(self._seconds)

    def _why(self):
        self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return one_line(lines[-1]) if lines else f"it ended with {self._process.returncode}"

    def close(self):
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()
        self._open.close()
