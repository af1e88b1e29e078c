"""Loads and runs models in a process of its own: what crashes there harms no one.

A script, started by `probe.Prober`: for each model a line of JSON comes in, then the file's
bytes, and a line of JSON goes out.
"""

import contextlib
import json
import os
import sys
import types
from pathlib import Path

# Where the size of an image is not fixed.
_PIXELS = 64
MAX_ELEMENTS = 2**26
"""Numbers that an input or output of two images may have."""


def examine(runtime):
    """Runs a model on zeros, and on noise, in batches of one and two.

    Args:
        runtime: A `Runtime`.

    Raises:
        InputError: If it fails, or asks for more than any image classifier does.
    """
    import math

    import numpy as np

    from keras_resnet.utils.errors import InputError

    batch, *image = runtime.input.shape
    image = [_PIXELS if size is None else size for size in image]
    for tensor in (runtime.input, runtime.output):
        if 2 * math.prod(size or 1 for size in tensor.shape) > MAX_ELEMENTS:
            raise InputError(f"{runtime.path}: {tensor.described} is beyond any use")
    random = np.random.default_rng(0)
    for count in [batch] if batch else [1, 2, 1]:
        shape = [count, *image]
        runtime.run(np.zeros(shape, runtime.input.dtype))
        runtime.run(random.integers(0, 256, shape).astype(runtime.input.dtype))


def _limit(memory, seconds):
    """Bounds what the process may take from now on: memory and processor time."""
    # Where the system has no such limits, the parent's patience is all there is.
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        # Twice the parent's patience, for the case that there is no parent any more.
        seconds = int(used.ru_utime + used.ru_stime + 2 * seconds) + 1
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory += pages * resource.getpagesize()
        for kind, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, memory)):
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(kind, (most, hard))


def _opener(form):
    """Returns what opens a format, with all that it imports."""
    if form == "tflite":
        import ai_edge_litert.interpreter
        import ai_edge_litert.schema_py_generated  # noqa: F401

        from keras_resnet.runtimes.tflite import TFLiteRuntime

        return TFLiteRuntime
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

    from keras_resnet.runtimes.onnx import OnnxRuntime

    return OnnxRuntime


def _answer(task, content):
    from keras_resnet.runtimes import base
    from keras_resnet.utils.errors import InputError

    try:
        opened = _opener(task["format"])
        _limit(task["memory"], task["seconds"])
        examine(opened(content, task["path"], threads=1))
    except InputError as error:
        return {"refused": str(error)}
    except Exception as error:
        return {"refused": f"{task['path']}: cannot be loaded: {base.reason(error)}"}
    return {}


def main():
    """Answers for one model after the other, until there are no more."""
    # The package itself would import Keras, which is a second and a gigabyte for nothing.
    package = types.ModuleType("keras_resnet")
    package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["keras_resnet"] = package
    # What a runtime prints must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    while line := sys.stdin.buffer.readline():
        task = json.loads(line)
        sys.path[:] = task["import_path"]
        content = sys.stdin.buffer.read(task["bytes"])
        print(json.dumps(_answer(task, content)), file=answers, flush=True)


if __name__ == "__main__":
    main()
