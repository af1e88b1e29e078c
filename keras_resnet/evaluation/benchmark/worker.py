"""One contestant of a benchmark, alone in its process; asked and answering in JSON lines.

    python -I worker.py RUNTIME THREADS

It is run by its path and imports NumPy and the one runtime, so that its peak memory is what an
application with that runtime needs. A request is {"do": a row of `COMMANDS`, …}; an answer is
what that returned, or {"error": one line}. The process ends when its standard input does.
"""

import json
import os
import queue
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
WARM_UP_SECONDS = 0.05

# ----------------------------------------------------------------------------------------------
# Runtimes. Each row imports one and returns load(path, **options), which returns
# run(images) -> probabilities, both NumPy arrays.
# ----------------------------------------------------------------------------------------------


def prepare_tflite(threads):
    """LiteRT, which maps the file into memory."""
    from ai_edge_litert.interpreter import Interpreter

    def load(path):
        interpreter = Interpreter(model_path=path, num_threads=threads)
        taken, given = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
        interpreter.allocate_tensors()
        shape = tuple(taken["shape"])

        def run(images):
            nonlocal shape
            if images.shape != shape:
                interpreter.resize_tensor_input(taken["index"], images.shape)
                interpreter.allocate_tensors()
                shape = images.shape
            interpreter.set_tensor(taken["index"], images)
            interpreter.invoke()
            return interpreter.get_tensor(given["index"])

        return run

    return load


def prepare_onnx(threads):
    """ONNX Runtime, given bytes: a file cannot make it open others."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)

    def load(path):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        content = Path(path).read_bytes()
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda images: session.run(None, {name: images})[0]

    return load


def _import_tensorflow(threads):
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    return tf


def prepare_saved_model(threads):
    """TensorFlow, by the signature "serving_default"."""
    tf = _import_tensorflow(threads)

    def load(path):
        serve = tf.saved_model.load(path).signatures["serving_default"]
        (name,) = serve.structured_input_signature[1]

        def run(images):
            (answer,) = serve(**{name: tf.constant(images)}).values()
            return answer.numpy()

        return run

    return load


def prepare_keras(threads):
    """Keras on TensorFlow, asked as `keras-resnet predict` does."""
    _import_tensorflow(threads)
    sys.path.append(str(HERE.parents[2]))
    from keras_resnet.evaluation import inference

    return inference.load


def prepare_torch(threads):
    """The d2l network in PyTorch, eager."""
    import torch

    torch.set_num_threads(threads)
    sys.path.append(str(HERE))
    import torch_network

    return torch_network.load


# runtime -> (what imports it, the distribution that tells its version, its name).
RUNTIMES = {
    "tflite": (prepare_tflite, "ai-edge-litert", "LiteRT"),
    "onnx": (prepare_onnx, "onnxruntime", "ONNX Runtime"),
    "saved_model": (prepare_saved_model, "tensorflow", "TensorFlow"),
    "keras": (prepare_keras, "keras", "Keras"),
    "torch": (prepare_torch, "torch", "PyTorch"),
}

# ----------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------


class Contestant:
    """A runtime, and the network loaded in it."""

    def __init__(self, runtime, threads):
        prepare, distribution, name = RUNTIMES[runtime]
        self.load_network = prepare(threads)
        self.version = f"{name} {metadata.version(distribution)}"
        self.run = self.images = None

    def load(self, path, images, options):
        """Loads the network, and opens the images without reading them."""
        self.images = np.load(images, mmap_mode="r")
        start = time.perf_counter()
        self.run = self.load_network(path, **options)
        return {"seconds": time.perf_counter() - start, "runtime": self.version}

    def measure(self, batch, seconds, least):
        """Times calls of `batch` images one by one, `least` calls or as many as take `seconds`."""
        images = np.resize(self.images[:batch], (batch, *self.images.shape[1:]))
        warm = time.perf_counter() + WARM_UP_SECONDS
        self.run(images)  # the first call of a size allocates and compiles
        self.run(images)
        while time.perf_counter() < warm:
            self.run(images)
        calls, end = [], time.perf_counter() + seconds
        while len(calls) < least or time.perf_counter() < end:
            start = time.perf_counter()
            self.run(images)
            calls.append(time.perf_counter() - start)
        return {"calls": calls}

    def answer(self, batch):
        """Returns the probabilities of all images."""
        starts = range(0, len(self.images), batch)
        parts = [self.run(np.array(self.images[start : start + batch])) for start in starts]
        return {"probabilities": np.concatenate(parts).astype("float64").tolist()}

    def peak_memory(self):
        """Returns the most memory that the process has had since it began, in bytes."""
        try:
            # Linux hands the parent's own peak down to `ru_maxrss`, but not to this.
            with open("/proc/self/status", encoding="ascii") as file:
                lines = dict(line.split(":", 1) for line in file)
            return {"bytes": int(lines["VmHWM"].split()[0]) * 1024}
        except (OSError, KeyError):
            import resource

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return {"bytes": peak if sys.platform == "darwin" else peak * 1024}


COMMANDS = ("load", "measure", "answer", "peak_memory")


def _read_requests(requests):
    for line in sys.stdin:
        requests.put(json.loads(line))
    # The parent has gone, perhaps in the middle of a measurement.
    os._exit(0)


def main():
    """Answers requests until there are no more."""
    # What a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=[requests], daemon=True).start()
    contestant = None
    while True:
        request = requests.get()
        try:
            contestant = contestant or Contestant(sys.argv[1], int(sys.argv[2]))
            command = request.pop("do")
            if command not in COMMANDS:
                raise ValueError(f"`do` must be one of {', '.join(COMMANDS)}, got {command!r}")
            answer = getattr(contestant, command)(**request)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            answer = {"error": f"{type(error).__name__}: {first}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
