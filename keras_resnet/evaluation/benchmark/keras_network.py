"""The Keras model that an export was made from, as a candidate of a benchmark."""

from keras_resnet.evaluation import inference
from keras_resnet.runtimes.saved_model import set_tensorflow_threads


def open_bare(path, threads):
    """Returns a function from uint8 images to probabilities, as `predict` computes them.

    Args:
        path: The .keras file.
        threads: How many threads compute one batch.
    """
    set_tensorflow_threads(threads)
    return inference.load(path)
