"""A candidate of a benchmark, alone in its process; see `runtimes.remote`.

Only the modules of its runtime are imported, so that the peak memory is that of an
application with this runtime.
"""

import importlib
import sys
import time
from importlib import metadata

import numpy as np

from keras_resnet.formats import EXPORTED, FORMATS

WARM_UP_SECONDS = 0.05

# Name -> the module with its `open_bare`; distribution and name of its library.
RUNTIMES = {
    "torch": ("keras_resnet.evaluation.benchmark.torch_network", ("torch", "PyTorch")),
    "keras": ("keras_resnet.evaluation.benchmark.keras_network", FORMATS["keras"].library),
    **{
        name: (f"keras_resnet.runtimes.{row.module}", row.library) for name, row in EXPORTED.items()
    },
}


class Worker:
    """A runtime, and the network loaded in it.

    Args:
        runtime: A row of `RUNTIMES`.
        threads: How many threads the runtime gets.
        images: The path of the reference images, an .npy file, which is mapped into memory.
    """

    def __init__(self, runtime, threads, images):
        module, (distribution, name) = RUNTIMES[runtime]
        # Before the time of `load` is taken.
        self._open = importlib.import_module(module).open_bare
        self._threads = threads
        self._images = np.load(images, mmap_mode="r")
        self._version = f"{name} {metadata.version(distribution)}"

    def load(self, path, options):
        """Loads the network; returns the runtime's name and version."""
        self._run = self._open(path, self._threads, **options)
        return self._version

    def time_calls(self, batch, seconds, least):
        """Returns the times of at least `least` calls of `batch` images, or of all in `seconds`."""
        images = np.resize(self._images[:batch], (batch, *self._images.shape[1:]))
        warm = time.perf_counter() + WARM_UP_SECONDS
        self._run(images)  # the first call of a size allocates and compiles
        self._run(images)
        while time.perf_counter() < warm:
            self._run(images)
        calls, end = [], time.perf_counter() + seconds
        while len(calls) < least or time.perf_counter() < end:
            start = time.perf_counter()
            self._run(images)
            calls.append(time.perf_counter() - start)
        return calls

    def predict(self, batch):
        """Returns the probabilities of all images, computed in batches."""
        starts = range(0, len(self._images), batch)
        parts = [self._run(np.array(self._images[start : start + batch])) for start in starts]
        return np.concatenate(parts)

    def peak_memory(self):
        """Returns the most memory that the process has had since it began, in bytes."""
        try:
            # On Linux `ru_maxrss` starts with the peak of the parent, this does not.
            with open("/proc/self/status", encoding="ascii") as file:
                lines = dict(line.split(":", 1) for line in file)
            return int(lines["VmHWM"].split()[0]) * 1024
        except (OSError, KeyError):
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024
