"""What every runtime offers, whatever format it reads."""

import collections
import dataclasses
import functools
import time

import numpy as np

from keras_resnet.utils import arrays
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.tables import printable

CHUNK = 256
"""Images a call of a model that takes any number of them."""

LOGITS, SOFTMAX, SIGMOID = "logits", "softmax", "sigmoid"
BINARY_LOGIT, BINARY_SIGMOID = "binary_logit", "binary_sigmoid"
OUTPUT_KINDS = {
    LOGITS: "one score a class: a softmax makes probabilities of them",
    SOFTMAX: "the probabilities of classes, of which an image has one",
    SIGMOID: "the probabilities of labels, of which an image can have several",
    BINARY_LOGIT: "one score for two classes: a sigmoid makes the probability of class 1 of it",
    BINARY_SIGMOID: "one number for two classes: the probability of class 1",
}
"""What a model's output can be."""

OUTPUT_KIND_KEY = "output_kind"
"""Where a file's metadata hold a row of `OUTPUT_KINDS`."""

# Roles of operators in a graph, beside the kinds of output that they give.
PASSING, AVERAGE, ARITHMETIC = "passing", "average", "arithmetic"

# How an operator's one number for two classes is called.
_OF_ONE_NUMBER = {LOGITS: BINARY_LOGIT, SIGMOID: BINARY_SIGMOID}
_SAMPLE_PIXELS = 64
_DEPTH = 64
# How far beyond 0 and 1, and from the sum 1, rounded probabilities may be.
_NUMBER_TOLERANCE, _SUM_TOLERANCE = 1e-3, 1e-2


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
        metadata: What the file says about itself, a dict.
        threads: How many threads compute one answer; None leaves it to the runtime.

    Attributes:
        format: "keras", "saved_model", "tflite" or "onnx".
        input: The model's only input, a `Tensor`.
        output: Its only output, a `Tensor`.
        graph_kind: `LOGITS`, `SOFTMAX` or `SIGMOID` if the graph says what the output is, else
            None.
        operators: How many there are of each operator, a dict.
        input_range: The least and the largest number that a quantized input can stand for; None
            for an input that is not quantized.
    """

    input_range = None
    format = None
    input = output = None
    graph_kind = None

    def __init__(self, path, metadata=None, threads=None):
        self.path = path
        self.metadata = metadata or {}
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

    @property
    def columns(self):
        """How many numbers the model gives for one image; None if that is open."""
        _, *sizes = self.output.shape or (None, None)
        *ones, columns = sizes or [1]
        return columns if set(ones) <= {1} else None

    @functools.cached_property
    def output_kind(self):
        """A row of `OUTPUT_KINDS`: what the model's numbers are.

        The file's metadata say it, else the graph; else the numbers that the model gives for a
        few images made here, always the same.

        Raises:
            InputError: If the metadata do not fit the output.
        """
        said = self.stated_kind
        if said is not None:
            is_known = isinstance(said, str) and said in OUTPUT_KINDS
            if not is_known or (said in _OF_ONE_NUMBER.values()) != (self.columns == 1):
                raise InputError(
                    f"{self.name}: damaged: its metadata say the output kind {said!r:.40}, and it "
                    f"gives {self.columns} numbers"
                )
            return said
        kind = self.graph_kind
        if kind is None and self.output.name == "probabilities" and self.columns != 1:
            kind = SOFTMAX
        kind = kind or kind_by_numbers(self.run(self._sample()))
        if self.columns != 1:
            return kind
        if kind not in _OF_ONE_NUMBER:
            raise InputError(
                f"{self.name}: a softmax over one number is always 1: end the model in a sigmoid, "
                "or give it two outputs"
            )
        return _OF_ONE_NUMBER[kind]

    @property
    def stated_kind(self):
        """What the file's metadata say of the output; None if nothing."""
        return self.metadata.get(OUTPUT_KIND_KEY)

    def _sample(self):
        """Returns four images as the model takes them: black, white, noise, and a gradient."""
        shape = [_SAMPLE_PIXELS if size is None else size for size in self.input.shape[1:]]
        images = np.zeros((4, *shape), "uint8")
        images[1] = 255
        images[2] = np.random.default_rng(0).integers(0, 256, shape)
        images[3] = np.linspace(0, 255, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
        if self.takes_images:
            return images
        return (images / 255).astype(self.input.dtype)

    def run(self, images):
        """Returns the model's answers.

        Args:
            images: [count, height, width, channels], uint8; of the input's own type where
                the model takes floats.

        Returns:
            [count, columns], floats: what the graph's output holds.

        Raises:
            InputError: If the images do not fit the input, or the runtime gives up.
        """
        images = self._as_input(images)
        size = self.input.shape[0] or CHUNK
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        if not parts:
            return np.zeros((0, self.columns or 0), "float32")
        return np.concatenate([self._answer(part) for part in parts])

    def _as_input(self, images):
        """Returns images as the graph takes them; no other images reach a model."""
        shape = self.input.shape
        if self.takes_images and len(shape) == 4:
            return arrays.as_images(images, self.name, shape[1:])
        images = arrays.as_array(images, f"{self.name}: it takes {self.input.described}")
        fits = images.ndim == len(shape) and all(
            size in (None, own) for size, own in zip(shape[1:], images.shape[1:], strict=True)
        )
        # Raw images are no normalised floats: they would be answered, and wrongly.
        is_alike = images.dtype.kind == np.dtype(self.input.dtype).kind
        if not fits or not is_alike:
            raise InputError(
                f"{self.name}: it takes {self.input.described}, got {images.dtype} {images.shape}"
            )
        return np.ascontiguousarray(images, self.input.dtype)

    def _answer(self, images):
        """Returns the answers to one batch; pads it where the model's batch is fixed."""
        count, fixed = len(images), self.input.shape[0]
        if fixed and count < fixed:
            images = np.concatenate([images, np.repeat(images[-1:], fixed - count, axis=0)])
        try:
            answers = as_rows(np.asarray(self.call(images)))
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


def as_rows(answers):
    """Returns answers of shape [count], or [count, 1, 1, columns], as [count, columns].

    Example:
        >>> as_rows(np.zeros((5, 1, 1, 3))).shape, as_rows(np.zeros(5)).shape
        ((5, 3), (5, 1))
    """
    count, *sizes = answers.shape or (0, 0)
    *ones, columns = sizes or [1]
    return answers.reshape(count, columns) if set(ones) <= {1} else answers


def only_one(name, what, tensors):
    """Returns the only one of a model's inputs or outputs.

    Args:
        name: The model's name, for messages.
        what: "input" or "output".
        tensors: name -> the input or output.

    Raises:
        InputError: If there are more, or none; the message names them.
    """
    if len(tensors) != 1:
        shown = ", ".join(printable(str(each))[:40] for each in list(tensors)[:8])
        hint = f" ({shown}): save it again with one of them alone" if tensors else ""
        raise InputError(f"{name}: a model must have one {what}, this one has {len(tensors)}{hint}")
    return next(iter(tensors.values()))


def count(names):
    """Returns how many there are of each name, the most frequent first."""
    return dict(collections.Counter(names).most_common())


def kind_by_graph(last, look_up):
    """Returns what kind of numbers an output holds, if the graph says it.

    Args:
        last: The output.
        look_up: Function of an output that returns (role, inputs) of its operator: a row of
            `OUTPUT_KINDS` that the operator gives, `PASSING` if it changes no number of a row,
            `AVERAGE`, `ARITHMETIC`, or None; and the operator's inputs, which can be looked up too.

    Returns:
        `LOGITS`, `SOFTMAX`, `SIGMOID`, or None where the graph does not say it.

    Example:
        >>> operators = {"y": (PASSING, ["x"]), "x": (SOFTMAX, ["logits"])}
        >>> kind_by_graph("y", lambda name: operators.get(name, (None, [])))
        'softmax'
    """
    # Each is looked up once: a hostile graph can have loops, or as many ways as there are atoms.
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
            # Logits keep a bias or a factor; the sum of two softmax outputs is no softmax.
            role = LOGITS if LOGITS in {kind(each, depth - 1) for each in inputs} else None
        known[name] = role
        return role

    return kind(last, _DEPTH)


def kind_by_numbers(answers):
    """Returns what kind of numbers answers look like.

    Args:
        answers: [count, columns], floats, of images that differ.

    Example:
        >>> kind_by_numbers(np.array([[0.2, 0.8], [0.5, 0.5]]))
        'softmax'
        >>> kind_by_numbers(np.array([[0.9, 0.8], [0.1, 0.3]]))
        'sigmoid'
        >>> kind_by_numbers(np.array([[-3.0, 2.0]]))
        'logits'
    """
    sums = answers.sum(axis=1, dtype="float64")
    low, high = answers.min(), answers.max()
    # A number that is none (nan) passes no comparison. A head of zeros gives logits.
    if not (low >= -_NUMBER_TOLERANCE and 0 < high <= 1 + _NUMBER_TOLERANCE):
        return LOGITS
    is_shared = answers.shape[1] > 1 and (abs(sums - 1) <= _SUM_TOLERANCE).all()
    return SOFTMAX if is_shared else SIGMOID
