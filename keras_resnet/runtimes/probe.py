"""Tries a file in another process before this one loads it.

LiteRT and ONNX Runtime do not validate their input completely: a damaged file can crash the process
that loads it, or use all its memory or time. The other process limits both.
"""

import importlib
import math

import numpy as np

from keras_resnet.formats import FORMATS
from keras_resnet.runtimes import remote
from keras_resnet.runtimes.base import reason
from keras_resnet.utils.errors import InputError

MEMORY = 4 * 2**30
"""Bytes of address space that a small model may use, in addition to the libraries'."""
MEMORY_PER_BYTE = 8
"""Further bytes of address space for each byte of the file."""
SECONDS = 60
"""Seconds that a model may take to load and to predict a few batches."""
MAX_ELEMENTS = 2**26
"""The most numbers that an input or output of two images may have."""

# Height and width of the images for a model that takes any.
_PIXELS = 64


class Prober:
    """Tries files, one after the other, in a process that is started when first needed.

    Args:
        memory: Bytes that a file may use; by default `MEMORY` and `MEMORY_PER_BYTE`.
        seconds: Seconds that a file may take.

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
        self._remote = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Ends the process."""
        if self._remote is not None:
            self._remote.close()
            self._remote = None

    def probe(self, path, form, content):
        """Loads and runs a model in the process.

        Args:
            path: The file's path, for messages.
            form: A row of `FORMATS` with a parser.
            content: The file, bytes.

        Raises:
            InputError: If the model is refused there, or the process ends, runs out of memory,
                or does not finish in time.
        """
        if self._remote is None or not self._remote.is_alive():
            self.close()
            self._remote = remote.Remote(
                f"{__name__}:Trial",
                timeout=self.seconds,
                # NumPy's threads would take gigabytes of address space on a large machine.
                environment={"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
            )
        try:
            self._remote.call(
                "load_and_run",
                np.frombuffer(content, "uint8"),
                path=str(path),
                form=form,
                memory=self.memory or MEMORY + MEMORY_PER_BYTE * len(content),
                # Reached only where the calling process has ended.
                seconds=2 * self.seconds,
            )
        except remote.RemoteError as error:
            raise InputError(f"{path}: damaged or hostile: {error} on loading it") from None


class Trial:
    """The object in the process."""

    def load_and_run(self, content, path, form, memory, seconds):
        """Loads a model and runs it on zeros and on noise, in batches of one and two.

        Args:
            content: The file, a uint8 array.
            path: See `Prober.probe`.
            form: See `Prober.probe`.
            memory: See `remote.limited`.
            seconds: See `remote.limited`.

        Raises:
            InputError: If the model cannot be loaded or run.
        """
        from keras_resnet.runtimes import find_opener

        try:
            open_model = find_opener(form)
            importlib.import_module(FORMATS[form].parser)
            with remote.limited(memory, seconds):
                _run(open_model(content.tobytes(), path, threads=1))
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{path}: cannot be loaded: {reason(error)}") from error


def _run(runtime):
    for tensor in (runtime.input, runtime.output):
        if 2 * math.prod(size or 1 for size in tensor.shape) > MAX_ELEMENTS:
            raise InputError(
                f"{runtime.path}: an input or output of two images must have at most "
                f"{MAX_ELEMENTS} numbers, got {tensor.described}"
            )
    batch, *image = runtime.input.shape
    image = [_PIXELS if size is None else size for size in image]
    random = np.random.default_rng(0)
    for count in [batch] if batch else [1, 2, 1]:
        shape = [count, *image]
        runtime.run(np.zeros(shape, runtime.input.dtype))
        runtime.run(random.integers(0, 256, shape).astype(runtime.input.dtype))
