"""The proof: an artifact's own runtime beside the Keras model it was made of, and the gate."""

import dataclasses
import hashlib
import math
import statistics
import time

import numpy as np

from keras_resnet.evaluation.inference import to_probabilities
from keras_resnet.exporters.formats import PRECISIONS
from keras_resnet.runtimes import Tensor, open_runtime
from keras_resnet.runtimes.base import LOGITS
from keras_resnet.utils.errors import InputError

BATCHES = (1, 2, 7)
"""The batch sizes that an artifact must take."""

# Most that an answer may depend on the batch it is asked in. Runtimes sum in another order for
# another batch; a network that saw its batch (BatchNormalization in training) is off by percents.
_BATCH_TOLERANCE = 1e-4

_WARM_UP = 5
_TIMED_RUNS = (20, 200)
_TIMED_SECONDS = 1.0


# Most that a float32 twin may differ from the model, by what the model computes in: root mean
# square of the differences over that of the answers. A network rounds in each of its layers.
_TWIN_TOLERANCES = {"bfloat16": 0.1, "float16": 0.02, "float64": 1e-3}

# How often the answers' spread over the images must hold a gate's largest difference: below it,
# a file that gives one answer to all images would come near to passing.
_LEAST_SPREAD = 10

NOTHING_SHOWN = "nothing was shown"


@dataclasses.dataclass(frozen=True)
class Reference:
    """What the Keras model answers to real test images.

    Attributes:
        images: Raw images, uint8, [count, height, width, channels], as a `Split` holds them.
        labels: int64, [count].
        probabilities: The model's, float32, [count, classes]; those of its float32 twin, if it
            computes in another precision.
        own: The model's in its own precision, float32, [count, classes]; None without a twin.
    """

    images: object
    labels: np.ndarray
    probabilities: np.ndarray
    own: np.ndarray | None = None

    @property
    def accuracy(self):
        """The share of the images that the Keras model itself names rightly."""
        own = self.probabilities if self.own is None else self.own
        return float(np.mean(own.argmax(axis=1) == self.labels))


@dataclasses.dataclass(frozen=True)
class Failure:
    """A check that an artifact did not pass.

    Attributes:
        file: The artifact.
        check: What was checked.
        found: What it gave; a number or words.
        limit: What it had to be.
    """

    file: str
    check: str
    found: object
    limit: object

    def __str__(self):
        return f"{self.check}: {_short(self.found)}, must be {_short(self.limit)}"


def _short(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def open_artifact(path, format, threads=None, prober=None):
    """Opens an artifact by its real runtime; a SavedModel in a process without Keras.

    Args:
        path: The file or folder, which was written here or is trusted.
        format: A row of `FORMATS`.
        threads: How many threads compute one answer; None for the runtime's choice.
        prober: See `open_runtime`.
    """
    if format == "saved_model":
        from keras_resnet.runtimes.saved_model import IsolatedSavedModel

        return IsolatedSavedModel(path, threads)
    return open_runtime(path, threads=threads, prober=prober)


def ask(runtime, inputs, progress=lambda count: None, chunk=256):
    """Returns an artifact's probabilities.

    Args:
        runtime: A `Runtime`.
        inputs: Function of (start, stop) that returns that part of the images as it takes them.
        progress: Called with the number of images of each finished call.
        chunk: Images a call.

    Returns:
        float32, [count, classes].
    """
    parts = []
    start = 0
    while len(batch := inputs(start, start + chunk)):
        parts.append(_probabilities(runtime, batch))
        progress(len(batch))
        start += chunk
    return np.concatenate(parts)


def _probabilities(runtime, batch):
    answers = runtime.run(batch)
    if runtime.output_kind == LOGITS:
        return to_probabilities(answers, LOGITS, runtime.name)
    # As they are: made to sum to 1, wrong ones would look right.
    if not np.isfinite(answers).all():
        raise InputError(f"{runtime.name}: the model answers with numbers that are not finite")
    return answers


def check_contract(file, runtime, contract, batch=None):
    """Returns a `Failure` for each name, shape or dtype that is not what the contract says.

    Args:
        file: The artifact's name.
        runtime: It, opened.
        contract: The `Contract`.
        batch: The batch size it is made for; None for any.
    """
    wanted = {
        "input": Tensor("image", (batch, *contract.image_shape), contract.dtype),
        "output": Tensor(contract.output, (batch, contract.classes), "float32"),
    }
    failures = []
    for side, tensor in wanted.items():
        for what in ("name", "shape", "dtype"):
            found, limit = (getattr(one, what) for one in (getattr(runtime, side), tensor))
            if found != limit:
                failures.append(Failure(file, f"{side} {what}", found, limit))
    return failures


def check_batches(file, runtime, inputs, answers):
    """Returns a `Failure` for each batch size that fails, or whose answers are others.

    Args:
        file: The artifact's name.
        runtime: It, opened.
        inputs: See `ask`.
        answers: What it gave for these images in large batches.
    """
    failures = []
    for count in BATCHES:
        check = f"batch of {count}"
        try:
            found = _probabilities(runtime, inputs(0, count))
        except InputError as error:
            failures.append(Failure(file, check, str(error), "answered"))
            continue
        difference = _largest(found - answers[:count])
        if not difference <= _BATCH_TOLERANCE:
            failures.append(Failure(file, f"{check}, difference", difference, _BATCH_TOLERANCE))
    return failures


def compare(answers, reference):
    """Returns how an artifact's answers differ from the Keras model's.

    Args:
        answers: float32, [count, classes], probabilities.
        reference: The `Reference`.

    Returns:
        A dict: "images", "max_difference", "mean_difference", "agreement", "accuracy",
        "accuracy_change"; and "max_difference_in_own_precision" where the model has a twin.
    """
    difference = np.abs(answers.astype("float64") - reference.probabilities)
    top1 = answers.argmax(axis=1)
    accuracy = float(np.mean(top1 == reference.labels))
    figures = {
        "images": len(answers),
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "agreement": float(np.mean(top1 == reference.probabilities.argmax(axis=1))),
        "accuracy": accuracy,
        "accuracy_change": accuracy - reference.accuracy,
    }
    if reference.own is not None:
        figures["max_difference_in_own_precision"] = _largest(answers - reference.own)
    return figures


def check_twin(name, computed_in, own, twin):
    """Compares a model's answers with those of its float32 twin.

    Args:
        name: The model's name.
        computed_in: The dtypes that the model computes in.
        own: Its answers, floats, [count, classes].
        twin: The twin's to the same images.

    Returns:
        A dict: "computed_in", the dtype that decides; "difference", the root mean square of the
        differences over that of the answers; "tolerance".

    Raises:
        InputError: If they differ by more than the rounding of the dtype.

    Example:
        >>> own, twin = np.full((2, 3), 1.0), np.full((2, 3), 1.01)
        >>> check_twin("mine", {"float16"}, own, twin)["tolerance"]
        0.02
    """
    tolerance, dtype = max((_TWIN_TOLERANCES.get(each, 0), each) for each in computed_in)
    own, twin = (np.asarray(each, "float64") for each in (own, twin))
    size = np.sqrt(np.mean(own**2))
    difference = float(np.sqrt(np.mean((own - twin) ** 2)) / max(size, np.finfo("float32").tiny))
    # nan passes nothing.
    if not difference <= tolerance:
        raise InputError(
            f"{name} computes in {dtype}, and saved and loaded in float32 it answers otherwise: "
            f"relative difference {difference:.2g}, must be at most {tolerance:g}; a layer keeps "
            "state that it does not save, or depends on the precision: build the model in float32"
        )
    return {"computed_in": dtype, "difference": difference, "tolerance": tolerance}


def check_shown(file, precision, reference):
    """Returns a `Failure` if a file that gives one answer to all images could pass the gate.

    An untrained MobileNetV2 answers 1/7 to every image: no comparison with it shows anything.

    Args:
        file: The artifact's name.
        precision: A row of `PRECISIONS`.
        reference: The `Reference`.

    Example:
        >>> alike = Reference(None, np.array([0, 1]), np.full((2, 2), 0.5, "float32"))
        >>> check_shown("model-float32.onnx", "float32", alike)[0].limit
        'at least 0.0001'
    """
    most = PRECISIONS[precision].gate.max_difference
    if most is not None:
        found = float(np.ptp(reference.probabilities, axis=0).max())
        what, limit = "spread of the Keras model's answers over the images", _LEAST_SPREAD * most
        is_shown = found >= limit
        limit = f"at least {limit:g}"
    else:
        top1 = reference.probabilities.argmax(axis=1)
        common = np.bincount(top1).argmax()
        found = float(np.mean(top1 == common))
        accuracy = float(np.mean(reference.labels == common))
        constant = {
            "max_difference": 0.0,
            "agreement": found,
            "accuracy_change": accuracy - reference.accuracy,
        }
        what, limit = "share of the images that the Keras model gives one class", "smaller"
        is_shown = bool(check_gate(file, precision, constant))
    return [] if is_shown else [Failure(file, f"{NOTHING_SHOWN}, {what}", found, limit)]


def check_gate(file, precision, figures):
    """Returns a `Failure` for each figure that the gate of a precision does not let through.

    Args:
        file: The artifact's name.
        precision: A row of `PRECISIONS`.
        figures: What `compare` returns.

    Example:
        >>> figures = {"max_difference": 2e-5, "agreement": 1.0, "accuracy_change": 0.0}
        >>> print(*check_gate("model-float32.onnx", "float32", figures))
        largest difference: 2e-05, must be at most 1e-05
    """
    gate = PRECISIONS[precision].gate
    rows = (
        ("largest difference", figures["max_difference"], "at most", gate.max_difference),
        ("agreement", figures["agreement"], "at least", gate.agreement),
        ("accuracy drop", -figures["accuracy_change"], "at most", gate.accuracy_drop),
    )
    # A figure that is no number (nan) passes nothing.
    return [
        Failure(file, check, found, f"{side} {limit:g}")
        for check, found, side, limit in rows
        if limit is not None and not (found >= limit if side == "at least" else found <= limit)
    ]


def describe_chance(reference, takes_floats):
    """Returns a line about a model that is hardly better than chance; None for a better one.

    Args:
        reference: The `Reference`.
        takes_floats: Whether the model takes floats, which others may have normalised.
    """
    share = np.bincount(reference.labels).max() / len(reference.labels)
    deviation = math.sqrt(share * (1 - share) / len(reference.labels))
    if reference.accuracy > min(share + 2 * deviation, 0.999):
        return None
    line = (
        f"the Keras model names {reference.accuracy:.1%} of the images rightly, and always naming "
        f"the most frequent class {share:.1%}: it is untrained, was trained on other classes"
    )
    if takes_floats:
        return f"{line}, or takes images that are normalised before it: then name --normalize"
    return f"{line}, or on images of another kind"


def measure_latency(runtime, batch):
    """Returns how long an artifact takes for a batch, once it is warm.

    Args:
        runtime: A `Runtime`.
        batch: Images as it takes them.

    Returns:
        A dict: "median" and "p95", in milliseconds.
    """
    for _ in range(_WARM_UP):
        runtime.run(batch)
    least, most = _TIMED_RUNS
    taken, began = [], time.perf_counter()
    while len(taken) < least or (
        len(taken) < most and time.perf_counter() - began < _TIMED_SECONDS
    ):
        taken.append(1000 * runtime.time(batch))
    p95 = sorted(taken)[math.ceil(0.95 * len(taken)) - 1]
    return {"median": statistics.median(taken), "p95": p95}


def digest_order(split):
    """Returns a sha256 (hex) that tells a split from one of other images, or in another order.

    Args:
        split: A `Split`; all its labels count, and some of its images.
    """
    some = np.linspace(0, len(split) - 1, min(64, len(split))).astype(int)
    whole = hashlib.sha256(np.asarray(split.labels, "<i8").tobytes())
    whole.update(np.ascontiguousarray(split.images[some]))
    return whole.hexdigest()


def _largest(difference):
    return float(np.abs(difference).max())
