"""What every runtime offers, whatever format it reads."""

import collections
import dataclasses
import time

import numpy as np

from keras_resnet.errors import InputError, one_line
from keras_resnet.tables import printable

CHUNK = 256
"""Images a call of a model that takes any number of them."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of a model.

    Attributes:
        name: Its name.
        shape: Its sizes, a tuple; None is any size.
        dtype: NumPy's name of its type, such as "uint8".
    """

    name: str
    shape: tuple
    dtype: str

    @property
    def described(self):
        """What messages say of it, however much a hostile file says."""
        return f"{self.dtype} {self.shape!s:.80}"


class Runtime:
    """A model that was loaded from a file, and what runs it.

    Args:
        path: The file, for messages; None for a model that came from none.
        card: What the file says about itself, a dict.
        threads: How many threads compute one answer; None leaves it to the runtime.

    Attributes:
        format: "keras", "saved_model", "tflite" or "onnx".
        input: The model's only input, a `Tensor`.
        output: Its only output, a `Tensor`.
        gives_probabilities: Whether the output is a softmax's.
        operators: How many there are of each operator, a dict.
        input_range: The least and the largest number that a quantized input can stand for; None
            for an input that is not quantized.
    """

    input_range = None
    format = None
    input = output = None
    gives_probabilities = False

    def __init__(self, path, card=None, threads=None):
        self.path = path
        self.card = card or {}
        self.threads = threads
        self.operators = {}

    @property
    def name(self):
        """What messages call the model."""
        return str(self.path)

    @property
    def takes_images(self):
        """Whether the model takes images as they are, with numbers from 0 to 255."""
        return self.input.dtype == "uint8"

    def run(self, images):
        """Returns the model's answers.

        Args:
            images: [count, height, width, channels], of the input's type.

        Returns:
            [count, classes], floats: what the graph's output holds.

        Raises:
            InputError: If the images do not fit the input, or the runtime gives up.
        """
        images = self._as_input(images)
        size = self.input.shape[0] or CHUNK
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        if not parts:
            return np.zeros((0, self.output.shape[-1] or 0), "float32")
        return np.concatenate([self._answer(part) for part in parts])

    def _as_input(self, images):
        images = np.asarray(images)
        shape = self.input.shape
        fits = images.ndim == len(shape) and all(
            size in (None, own) for size, own in zip(shape[1:], images.shape[1:], strict=True)
        )
        if not fits or not np.can_cast(images.dtype, self.input.dtype, "same_kind"):
            raise InputError(
                f"{self.name}: it takes {self.input.described}, got {images.dtype} {images.shape}"
            )
        return images.astype(self.input.dtype, copy=False)

    def _answer(self, images):
        """Returns the answers to one batch; pads it where the model's batch is fixed."""
        count, fixed = len(images), self.input.shape[0]
        if fixed and count < fixed:
            images = np.concatenate([images, np.repeat(images[-1:], fixed - count, axis=0)])
        try:
            answers = np.asarray(self.call(images))
        except InputError:
            raise
        # Each runtime has its own kinds; all of them mean that the model does not run.
        except Exception as error:
            raise InputError(f"{self.name}: it cannot be run: {reason(error)}") from error
        if answers.ndim != 2 or len(answers) != len(images) or answers.dtype.kind != "f":
            raise InputError(
                f"{self.name}: it must answer {len(images)} images with floats (batch, classes), "
                f"got {answers.dtype} {answers.shape!s:.80}"
            )
        return answers[:count]

    def time(self, images):
        """Returns how many seconds the answers to one batch take; see `run`."""
        start = time.perf_counter()
        self.run(images)
        return time.perf_counter() - start

    def close(self):
        """Ends what the runtime keeps outside of this process: nothing, for most."""

    def call(self, images):
        """Returns the output for one batch; a format's own part."""
        raise NotImplementedError


def reason(error):
    """Returns in one printable line why a runtime did not load or run a model."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return printable(one_line(error))[:300]


def only_one(name, what, tensors):
    """Returns the only one of a model's inputs or outputs.

    Raises:
        InputError: If there are more, or none.
    """
    if len(tensors) != 1:
        raise InputError(f"{name}: a model must have one {what}, this one has {len(tensors)}")
    return tensors[0]


def count(names):
    """Returns how many there are of each name, the most frequent first."""
    return dict(collections.Counter(names).most_common())


def ends_in_softmax(last, producers, softmax, passing):
    """Tells whether an output is a softmax's, perhaps behind operators that change no number.

    Args:
        last: The output's name.
        producers: name of a tensor -> (operator, name of the operator's first input).
        softmax: The operator's name.
        passing: Names of operators to look behind.

    Example:
        >>> producers = {"y": ("Cast", "x"), "x": ("Softmax", "logits")}
        >>> ends_in_softmax("y", producers, "Softmax", {"Cast"})
        True
    """
    seen = set()
    while last in producers and last not in seen:
        seen.add(last)
        operator, last = producers[last]
        if operator not in passing:
            return operator == softmax
    return False
