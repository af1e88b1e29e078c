"""The interface of all runtimes, for every format."""

import collections
import dataclasses
import functools
import time

import numpy as np

from keras_resnet.untrusted import checksums
from keras_resnet.utils import arrays
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.tables import printable

CHUNK = 256
"""How many images a call gets, where the model takes any number."""

LOGITS, SOFTMAX, SIGMOID = "logits", "softmax", "sigmoid"
BINARY_LOGIT, BINARY_SIGMOID = "binary_logit", "binary_sigmoid"
OUTPUT_KINDS = {
    LOGITS: "a score for each class; a softmax turns them into probabilities",
    SOFTMAX: "the probability of each class; an image has one class",
    SIGMOID: "the probability of each label; an image can have several labels",
    BINARY_LOGIT: "one score for two classes; a sigmoid turns it into the probability of class 1",
    BINARY_SIGMOID: "one number for two classes: the probability of class 1",
}
"""The kinds of numbers that a model can give."""

OUTPUT_KIND_KEY = "output_kind"
"""The key of a file's metadata for a row of `OUTPUT_KINDS`."""

# Roles of operators in a graph, in addition to the kinds of output that they give.
PASSING, AVERAGE, ARITHMETIC = "passing", "average", "arithmetic"

# The kind of a model that gives one number for two classes, by the kind of its last operator.
_OF_ONE_NUMBER = {LOGITS: BINARY_LOGIT, SIGMOID: BINARY_SIGMOID}
_SAMPLE_PIXELS = 64
_DEPTH = 64
# How far rounded probabilities may exceed 0 and 1, and their sum may differ from 1.
_NUMBER_TOLERANCE, _SUM_TOLERANCE = 1e-3, 1e-2


@dataclasses.dataclass(frozen=True)
class Tensor:
    """An input or output of a model.

    Attributes:
        name: Its name.
        shape: A tuple of sizes; None is any size.
        dtype: NumPy's name of its type, such as "uint8".
    """

    name: str
    shape: tuple
    dtype: str

    @property
    def described(self):
        """Type and shape for messages, cut because a hostile file can have any."""
        return f"{self.dtype} {self.shape!s:.80}"


class Runtime:
    """A loaded model that can be run.

    Args:
        path: The file, for messages; None for a model that was not loaded from one.
        metadata: The file's metadata, a dict.
        threads: How many threads compute one batch; None for the runtime's choice.

    Attributes:
        format: "keras", "saved_model", "tflite" or "onnx".
        input: The model's only input, a `Tensor`.
        output: Its only output, a `Tensor`.
        graph_kind: `LOGITS`, `SOFTMAX` or `SIGMOID` if the graph determines it, else None.
        operators: A dict: operator -> how many there are.
        input_range: The smallest and the largest number that a quantized input can represent;
            None for an input that is not quantized.
    """

    input_range = None
    format = None
    input = output = None
    graph_kind = None

    def __init__(self, path, metadata=None, threads=None):
        self.path = path
        self.metadata = checksums.rename_old_keys(metadata or {})
        self.threads = threads
        self.operators = {}

    @property
    def name(self):
        """The model's name in messages."""
        return str(self.path)

    @property
    def takes_images(self):
        """Whether the model takes raw images, with numbers from 0 to 255."""
        return self.input.dtype == "uint8"

    @property
    def columns(self):
        """How many numbers the model gives for one image; None if the graph leaves it open."""
        _, *sizes = self.output.shape or (None, None)
        *ones, columns = sizes or [1]
        return columns if set(ones) <= {1} else None

    @functools.cached_property
    def output_kind(self):
        """The kind of the model's numbers, a row of `OUTPUT_KINDS`.

        The file's metadata state it, else the graph determines it, else the numbers that the
        model gives for a few fixed images.

        Raises:
            InputError: If the metadata do not fit the output.
        """
        stated = self.stated_kind
        if stated is not None:
            is_known = isinstance(stated, str) and stated in OUTPUT_KINDS
            if not is_known or (stated in _OF_ONE_NUMBER.values()) != (self.columns == 1):
                raise InputError(
                    f"{self.name}: damaged: its metadata state the output kind {stated!r:.40}, but "
                    f"it gives {self.columns} numbers"
                )
            return stated
        kind = self.graph_kind
        if kind is None and self.output.name == "probabilities" and self.columns != 1:
            kind = SOFTMAX
        kind = kind or kind_by_numbers(self.run(self._sample()))
        if self.columns != 1:
            return kind
        if kind not in _OF_ONE_NUMBER:
            raise InputError(
                f"{self.name}: a softmax over one number is always 1: use a sigmoid as the last "
                "layer, or two outputs"
            )
        return _OF_ONE_NUMBER[kind]

    @property
    def stated_kind(self):
        """The output kind in the file's metadata; None if it is not there."""
        return self.metadata.get(OUTPUT_KIND_KEY)

    def _sample(self):
        """Returns four images of the input's type: black, white, noise, and a gradient."""
        shape = [_SAMPLE_PIXELS if size is None else size for size in self.input.shape[1:]]
        images = np.zeros((4, *shape), "uint8")
        images[1] = 255
        images[2] = np.random.default_rng(0).integers(0, 256, shape)
        images[3] = np.linspace(0, 255, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        if self.takes_images:
            return images
        return (images / 255).astype(self.input.dtype)

    def run(self, images):
        """Returns the model's outputs.

        Args:
            images: [count, height, width, channels], uint8; floats of the input's type where the
                model takes floats.

        Returns:
            The graph's output: floats, [count, columns].

        Raises:
            InputError: If the images do not fit the input, or the runtime fails.
        """
        images = self._as_input(images)
        size = self.input.shape[0] or CHUNK
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        if not parts:
            return np.zeros((0, self.columns or 0), "float32")
        return np.concatenate([self._run_batch(part) for part in parts])

    def _as_input(self, images):
        """Returns the images in the input's type; refuses images that do not fit."""
        shape = self.input.shape
        if self.takes_images and len(shape) == 4:
            return arrays.as_images(images, self.name, shape[1:])
        images = arrays.as_array(images, f"{self.name}: it takes {self.input.described}")
        fits = images.ndim == len(shape) and all(
            size in (None, own) for size, own in zip(shape[1:], images.shape[1:], strict=True)
        )
        # A model of normalised floats would give wrong outputs for raw images.
        is_alike = images.dtype.kind == np.dtype(self.input.dtype).kind
        if not fits or not is_alike:
            raise InputError(
                f"{self.name}: it takes {self.input.described}, got {images.dtype} {images.shape}"
            )
        return np.ascontiguousarray(images, self.input.dtype)

    def _run_batch(self, images):
        """Returns the outputs for one batch; pads it where the model's batch is fixed."""
        count, fixed = len(images), self.input.shape[0]
        if fixed and count < fixed:
            images = np.concatenate([images, np.repeat(images[-1:], fixed - count, axis=0)])
        try:
            outputs = as_rows(np.asarray(self.call(images)))
        except InputError:
            raise
        # Each runtime raises errors of its own; all mean that the model cannot be run.
        except Exception as error:
            raise InputError(f"{self.name}: it cannot be run: {reason(error)}") from error
        if outputs.ndim != 2 or len(outputs) != len(images) or outputs.dtype.kind != "f":
            raise InputError(
                f"{self.name}: {len(images)} images must give floats (images, classes), got "
                f"{outputs.dtype} {outputs.shape!s:.80}"
            )
        return outputs[:count]

    def time(self, images):
        """Returns how many seconds the outputs for one batch take; see `run`."""
        start = time.perf_counter()
        self.run(images)
        return time.perf_counter() - start

    def close(self):
        """Ends the process of the runtime, if it has one of its own."""

    def call(self, images):
        """Returns the output for one batch; each runtime defines it."""
        raise NotImplementedError


def reason(error):
    """Returns an error's message as one printable line."""
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    return printable(one_line(error))[:300]


def as_rows(outputs):
    """Returns outputs of shape [count], or [count, 1, 1, columns], as [count, columns].

    Example:
        >>> as_rows(np.zeros((5, 1, 1, 3))).shape, as_rows(np.zeros(5)).shape
        ((5, 3), (5, 1))
    """
    count, *sizes = outputs.shape or (0, 0)
    *ones, columns = sizes or [1]
    return outputs.reshape(count, columns) if set(ones) <= {1} else outputs


def only_one(name, side, tensors):
    """Returns a model's only input or output.

    Args:
        name: The model's name, for messages.
        side: "input" or "output".
        tensors: name -> the input or output.

    Raises:
        InputError: If there are several, which the message names, or none.
    """
    if len(tensors) != 1:
        shown = ", ".join(printable(str(each))[:40] for each in list(tensors)[:8])
        hint = f" ({shown}): save it again with one of them only" if tensors else ""
        raise InputError(f"{name}: a model must have one {side}, got {len(tensors)}{hint}")
    return next(iter(tensors.values()))


def count(names):
    """Returns a dict: name -> how often it occurs, the most frequent first."""
    return dict(collections.Counter(names).most_common())


def kind_by_graph(last, look_up):
    """Returns the kind of an output's numbers, if the graph determines it.

    Args:
        last: The output.
        look_up: Function of an output that returns the role of its operator and the operator's
            inputs, which can be looked up too. The role is the row of `OUTPUT_KINDS` that the
            operator gives, `PASSING` if it keeps the numbers of each row, `AVERAGE`, `ARITHMETIC`,
            or None.

    Returns:
        `LOGITS`, `SOFTMAX`, `SIGMOID`, or None where the graph does not determine it.

    Example:
        >>> operators = {"y": (PASSING, ["x"]), "x": (SOFTMAX, ["logits"])}
        >>> kind_by_graph("y", lambda name: operators.get(name, (None, [])))
        'softmax'
    """
    # Each is looked up once: a hostile graph can have loops, or exponentially many paths.
    known = {}

    def kind(name, depth):
        if name in known or not depth:
            return known.get(name)
        known[name] = None
        role, inputs = look_up(name)
        if role == PASSING:
            role = kind(inputs[0], depth - 1) if inputs else None
        elif role == AVERAGE:
            kinds = {kind(each, depth - 1) for each in inputs}
            role = kinds.pop() if len(kinds) == 1 else None
        elif role == ARITHMETIC:
            # Logits plus a bias are logits; the sum of two softmax outputs is no softmax.
            role = LOGITS if LOGITS in {kind(each, depth - 1) for each in inputs} else None
        known[name] = role
        return role

    return kind(last, _DEPTH)


def kind_by_numbers(outputs):
    """Returns the kind of numbers that outputs look like.

    Args:
        outputs: [count, columns], floats, for images that differ.

    Example:
        >>> kind_by_numbers(np.array([[0.2, 0.8], [0.5, 0.5]]))
        'softmax'
        >>> kind_by_numbers(np.array([[0.9, 0.8], [0.1, 0.3]]))
        'sigmoid'
        >>> kind_by_numbers(np.array([[-3.0, 2.0]]))
        'logits'
    """
    sums = outputs.sum(axis=1, dtype="float64")
    low, high = outputs.min(), outputs.max()
    # NaN fails every comparison. A head of zeros gives logits.
    if not (low >= -_NUMBER_TOLERANCE and 0 < high <= 1 + _NUMBER_TOLERANCE):
        return LOGITS
    is_shared = outputs.shape[1] > 1 and (abs(sums - 1) <= _SUM_TOLERANCE).all()
    return SOFTMAX if is_shared else SIGMOID
