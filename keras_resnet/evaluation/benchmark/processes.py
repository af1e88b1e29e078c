"""Workers as the benchmark sees them: started, asked with a time limit, ended in any case."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

WORKER = Path(__file__).with_name("worker.py")

# All are measured on the processor: TensorFlow alone would otherwise take a GPU.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


class WorkerError(Exception):
    """A worker failed, ended or took too long; the message says so in one line."""


class Worker:
    """A process with one runtime; a context manager that ends it.

    Args:
        runtime: A row of `worker.RUNTIMES`.
        threads: How many threads the runtime gets.
        timeout: Seconds that an answer may take.

    Attributes:
        pid: The process's number.
    """

    def __init__(self, runtime, threads, timeout):
        self._timeout = timeout
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (`end` closes it)
        try:
            self._process = subprocess.Popen(
                # -I: no module of the folder it is started in can take a library's place.
                [sys.executable, "-I", WORKER, runtime, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env={**os.environ, **ENVIRONMENT},
                # Ctrl-C reaches the parent alone, which ends the workers.
                start_new_session=True,
            )
        except BaseException:
            self._errors.close()
            raise
        self.pid = self._process.pid

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.end()

    def ask(self, do, **request):
        """Returns the worker's answer to a request, a dict.

        Args:
            do: A row of `worker.COMMANDS`.
            **request: Its arguments.

        Raises:
            WorkerError: If the worker reports an error, ends, or does not answer in time.
        """
        late = threading.Event()
        timer = threading.Timer(self._timeout, self._give_up, [late])
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise WorkerError(self._why_late(do) if late.is_set() else self._why_ended())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _give_up(self, late):
        late.set()
        self._process.kill()

    def _why_late(self, do):
        return f"`{do}` took longer than {self._timeout:g} s"

    def _why_ended(self):
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").strip().splitlines()
        return f"the process ended with status {status}" + (f": {lines[-1]}" if lines else "")

    def end(self):
        """Ends the process, whatever it does, and waits until it is gone."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            # What could not be written any more is of no use.
            with contextlib.suppress(BrokenPipeError):
                stream.close()
