"""Verification of one artifact by its real runtime: contract, batch sizes, tolerances.

`export` compares an artifact's predictions with those of its Keras model, `verify` with those on
record.
"""

import contextlib
import dataclasses
import math
import statistics
import time

import numpy as np

from keras_resnet.evaluation.inference import to_probabilities
from keras_resnet.exporters.formats import BATCH_SIZES, PRECISIONS
from keras_resnet.formats import EXPORTED
from keras_resnet.runtimes import Tensor, find_opener, open_runtime
from keras_resnet.runtimes.base import CHUNK, LOGITS
from keras_resnet.untrusted.manifest import digest
from keras_resnet.utils.environment import cores
from keras_resnet.utils.errors import ExportError, InputError
from keras_resnet.utils.progress import bar

INCONCLUSIVE = "inconclusive"

# Largest difference between the predictions for an image in batches of different sizes. Runtimes
# add in another order for another size; BatchNormalization in training mode is off by percents.
_BATCH_TOLERANCE = 1e-4

# The predictions must spread over the images by this many times the largest difference allowed: an
# artifact with one output for all images must not pass.
_MIN_SPREAD = 10

# Latency: runs before timing starts, the smallest and largest number of timed runs, and the time
# after which they end.
_WARM_UP, _MIN_RUNS, _MAX_RUNS, _MAX_SECONDS = 5, 20, 200, 1.0


@dataclasses.dataclass(frozen=True)
class Failure:
    """A check that an artifact did not pass.

    Attributes:
        check: The name of the check.
        found: Its result; a number or words.
        limit: The required result.
        file: The artifact.
    """

    check: str
    found: object
    limit: object
    file: str = ""

    def __str__(self):
        found, limit = (
            f"{value:.3g}" if isinstance(value, float) else value
            for value in (self.found, self.limit)
        )
        return f"{self.check}: {found}, must be {limit}"


def verify_artifact(path, artifact, contract, inputs, reference, recorded):
    """Compares a file that was just written with its Keras model, and measures its latency.

    Args:
        path: The file, or the folder of a SavedModel.
        artifact: The `Artifact`.
        contract: The `Contract`.
        inputs: All test images; see `predict`.
        reference: The `Reference`.
        recorded: The `Recorded`; the artifact's predictions for its images are added to it.

    Returns:
        The artifact's row of the manifest, and a list of `Failure`s.

    Raises:
        ExportError: If its runtime does not load or run it.
    """
    size, sha256 = digest(path)
    contract = dataclasses.replace(contract, output_dtype=PRECISIONS[artifact.precision].output)
    latency = {}
    *fewer, most = sorted({1, cores()})
    try:
        with contextlib.closing(open_artifact(path, artifact.format, most, trust=True)) as runtime:
            predictions, failures = run_checks(runtime, contract, artifact.batch, recorded.images)
            with bar(len(inputs), artifact.file) as shown:
                probabilities = predict(runtime, inputs, shown.update)
            latency[str(most)] = measure_latency(runtime, inputs[np.arange(1)])
        # The number of threads is fixed when a file is opened.
        for threads in fewer:
            with contextlib.closing(
                open_artifact(path, artifact.format, threads, trust=True)
            ) as other:
                latency[str(threads)] = measure_latency(other, inputs[np.arange(1)])
    except InputError as error:
        # A file that does not run has no figures: `force` cannot publish it either.
        raise ExportError(
            f"{artifact.file} is not run by its own runtime: nothing was written",
            [Failure("loads and runs", str(error), "yes", artifact.file)],
        ) from error
    recorded.predictions[artifact.file] = predictions
    figures = compare_with_reference(probabilities, reference)
    outside = check_tolerance(artifact.precision, figures)
    if inconclusive := check_conclusive(artifact.precision, reference):
        # The largest of nearly equal predictions depends on rounding.
        outside = [failure for failure in outside if failure.check != "agreement"]
    failures = [
        dataclasses.replace(failure, file=artifact.file)
        for failure in [*failures, *outside, *inconclusive]
    ]
    row = {
        "file": artifact.file,
        **dataclasses.asdict(artifact),
        "bytes": size,
        "sha256": sha256,
        "input": dataclasses.asdict(runtime.input),
        "output": dataclasses.asdict(runtime.output),
        **figures,
        "tolerance": dataclasses.asdict(PRECISIONS[artifact.precision].tolerance),
        "failures": [str(failure) for failure in failures],
        "published_by_force": bool(failures),
        "latency_ms": latency,
        "operators": runtime.operators,
    }
    return row, failures


def open_artifact(path, format, threads=None, *, trust=False, prober=None):
    """Opens an artifact with its real runtime; a SavedModel runs in a process without Keras.

    Args:
        path: The file or folder; a SavedModel is trusted.
        format: A row of `formats.EXPORTED`.
        threads: The number of threads that compute one batch; None for the runtime's choice.
        trust: See `open_runtime`.
        prober: See `open_runtime`.
    """
    if EXPORTED[format].isolated:
        return find_opener(format, isolated=True)(path, threads)
    return open_runtime(path, threads=threads, trust=trust, prober=prober)


def run_checks(runtime, contract, batch, images):
    """Runs an artifact on some images, and checks its contract and its batch sizes.

    Args:
        runtime: Its `Runtime`.
        contract: The `Contract`.
        batch: The batch size that it is made for; None for any.
        images: The images of a `Recorded`.

    Returns:
        Its probabilities, float32, [count, classes], and a list of `Failure`s.
    """
    failures = check_contract(runtime, contract, batch)
    probabilities = predict(runtime, images)
    return probabilities, failures + check_batch_sizes(runtime, images, probabilities)


def predict(runtime, inputs, progress=lambda count: None):
    """Returns the probabilities of an artifact, float32, [count, classes].

    Args:
        runtime: Its `Runtime`.
        inputs: The images as it takes them, [count, height, width, channels]: an array, or another
            object with a `shape` and a length that an array of positions can index, such as
            `ImageFiles`. Images of several sizes, None in `shape`, are taken one at a time.
        progress: Called with the number of images of each finished call.
    """
    parts = []
    chunk = 1 if None in inputs.shape[1:] else CHUNK
    for start in range(0, len(inputs), chunk):
        batch = inputs[np.arange(start, min(start + chunk, len(inputs)))]
        parts.append(_probabilities(runtime, batch))
        progress(len(batch))
    return np.concatenate(parts)


def _probabilities(runtime, batch):
    outputs = runtime.run(batch)
    if runtime.output_kind == LOGITS:
        return to_probabilities(outputs, LOGITS, runtime.name)
    # Not normalised: wrong probabilities would look right.
    if not np.isfinite(outputs).all():
        raise InputError(f"{runtime.name}: the model gives numbers that are not finite")
    return outputs


def check_contract(runtime, contract, batch=None):
    """Returns a `Failure` for each name, shape or dtype that breaks the contract."""
    wanted = {
        "input": Tensor("image", (batch, *contract.image_shape), contract.dtype),
        "output": Tensor(contract.output, (batch, contract.classes), contract.output_dtype),
    }
    return [
        Failure(f"{side} {name}", found, limit)
        for side, tensor in wanted.items()
        for name, limit in vars(tensor).items()
        if (found := getattr(getattr(runtime, side), name)) != limit
    ]


def check_batch_sizes(runtime, inputs, probabilities):
    """Returns a `Failure` for each batch size that fails, or changes the predictions."""
    failures = []
    for count in BATCH_SIZES:
        check = f"batch of {count}"
        try:
            found = _probabilities(runtime, inputs[np.arange(count)])
        except InputError as error:
            failures.append(Failure(check, str(error), "predicted"))
            continue
        difference = float(np.abs(found - probabilities[:count]).max())
        if not difference <= _BATCH_TOLERANCE:
            failures.append(Failure(f"{check}, difference", difference, _BATCH_TOLERANCE))
    return failures


def compare(probabilities, expected):
    """Returns the difference between an artifact's predictions and others.

    Args:
        probabilities: float32, [count, classes].
        expected: The same of the Keras model, or of the artifact itself at its export.

    Returns:
        A dict: "max_difference", "mean_difference", "agreement".
    """
    difference = np.abs(probabilities.astype("float64") - expected)
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "agreement": float(np.mean(probabilities.argmax(axis=1) == expected.argmax(axis=1))),
    }


def compare_with_reference(probabilities, reference):
    """Returns the dict of `compare` for the Keras model on all test images, and more.

    Returns:
        "images", "accuracy" and "accuracy_change", too, which are None without labels, and
        "max_difference_in_own_precision" if the model has a twin.
    """
    accuracy = change = None
    if reference.labels is not None:
        accuracy = float(np.mean(probabilities.argmax(axis=1) == reference.labels))
        change = accuracy - reference.accuracy
    figures = {
        "images": len(probabilities),
        **compare(probabilities, reference.probabilities),
        "accuracy": accuracy,
        "accuracy_change": change,
    }
    if reference.own is not None:
        difference = np.abs(probabilities - reference.own).max()
        figures["max_difference_in_own_precision"] = float(difference)
    return figures


def check_tolerance(precision, figures):
    """Returns a `Failure` for each figure outside the tolerance of a precision.

    Args:
        precision: A row of `PRECISIONS`.
        figures: "max_difference", "agreement" and "accuracy_change"; those that are missing or None
            are not checked. With "images", their number, one image may differ however few there
            are: one of seven is not evidence of a fault.

    Example:
        >>> figures = {"max_difference": 2e-5, "agreement": 1.0, "accuracy_change": 0.0}
        >>> print(*check_tolerance("float32", figures))
        largest difference: 2e-05, must be at most 1e-05
    """
    tolerance = PRECISIONS[precision].tolerance
    agreement, drop = tolerance.agreement, tolerance.accuracy_drop
    if images := figures.get("images"):
        agreement = min(agreement, math.floor(round(agreement * images, 9)) / images)
        drop = drop and max(drop, 1 / images)
    # The accuracy change is negative where the accuracy drops.
    rows = (
        ("largest difference", "max_difference", 1, "at most", tolerance.max_difference),
        ("agreement", "agreement", 1, "at least", agreement),
        ("accuracy drop", "accuracy_change", -1, "at most", drop),
    )
    failures = []
    for check, key, sign, side, limit in rows:
        if limit is not None and figures.get(key) is not None:
            found = sign * figures[key]
            # A figure that is not a number fails.
            if not (found >= limit if side == "at least" else found <= limit):
                failures.append(Failure(check, found, f"{side} {limit:g}"))
    return failures


def check_conclusive(precision, reference):
    """Returns a `Failure` if an artifact with one output for all images would be within tolerance.

    An untrained MobileNetV2 gives 1/7 for every image: a comparison with it shows nothing.

    Args:
        precision: A row of `PRECISIONS`.
        reference: The `Reference`.

    Example:
        >>> from keras_resnet.exporters.reference import Reference
        >>> alike = Reference(np.array([0, 1]), np.full((2, 2), 0.5, "float32"))
        >>> check_conclusive("float32", alike)[0].limit
        'at least 0.0001'
    """
    max_difference = PRECISIONS[precision].tolerance.max_difference
    if max_difference is not None:
        check = "spread of the Keras model's predictions over the images"
        found, least = (
            float(np.ptp(reference.probabilities, axis=0).max()),
            _MIN_SPREAD * max_difference,
        )
        is_conclusive, limit = found >= least, f"at least {least:g}"
    else:
        check, limit = "share of the images that the Keras model gives one class", "smaller"
        top1 = reference.probabilities.argmax(axis=1)
        common = np.bincount(top1).argmax()
        found = float(np.mean(top1 == common))
        figures = {"agreement": found}
        if reference.labels is not None:
            share = float(np.mean(reference.labels == common))
            figures["accuracy_change"] = share - reference.accuracy
        is_conclusive = bool(check_tolerance(precision, figures))
    return [] if is_conclusive else [Failure(f"{INCONCLUSIVE}, {check}", found, limit)]


def measure_latency(runtime, batch):
    """Returns the latency of a model for a batch, after warm-up.

    Args:
        runtime: A `Runtime`.
        batch: Images as it takes them.

    Returns:
        A dict: "median" and "p95", in milliseconds.
    """
    for _ in range(_WARM_UP):
        runtime.run(batch)
    taken, began = [], time.perf_counter()
    while len(taken) < _MIN_RUNS or (
        len(taken) < _MAX_RUNS and time.perf_counter() - began < _MAX_SECONDS
    ):
        taken.append(1000 * runtime.time(batch))
    p95 = sorted(taken)[math.ceil(0.95 * len(taken)) - 1]
    return {"median": statistics.median(taken), "p95": p95}
