"""Checks of one artifact, run by its real runtime: contract, batch sizes, answers, tolerances.

`export` compares an artifact with the answers of the Keras model, `verify` with those on record.
"""

import dataclasses

import numpy as np

from keras_resnet.evaluation.inference import to_probabilities
from keras_resnet.exporters.formats import BATCH_SIZES, PRECISIONS
from keras_resnet.runtimes import Tensor, open_runtime
from keras_resnet.runtimes.base import CHUNK, LOGITS
from keras_resnet.utils.errors import InputError

INCONCLUSIVE = "inconclusive"

# Largest difference between the answers to an image in batches of different sizes. Runtimes add in
# another order for another size; BatchNormalization in training mode is off by percents.
_BATCH_TOLERANCE = 1e-4

# The answers must spread over the images by this many times the largest difference allowed: an
# artifact with one answer to all images must not come near to passing.
_MIN_SPREAD = 10


@dataclasses.dataclass(frozen=True)
class Failure:
    """A check that an artifact did not pass.

    Attributes:
        file: The artifact.
        check: The name of the check.
        found: Its result; a number or words.
        limit: The required result.
    """

    file: str
    check: str
    found: object
    limit: object

    def __str__(self):
        return f"{self.check}: {_short(self.found)}, must be {_short(self.limit)}"


def _short(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def open_artifact(path, format, threads=None, *, trust=False, prober=None):
    """Opens an artifact with its real runtime; a SavedModel in a process without Keras.

    Args:
        path: The file or folder; a SavedModel is trusted.
        format: A row of `FORMATS`.
        threads: The number of threads that compute one answer; None for the runtime's choice.
        trust: See `open_runtime`.
        prober: See `open_runtime`.
    """
    if format == "saved_model":
        from keras_resnet.exporters.fresh import FreshSavedModel

        return FreshSavedModel(path, threads)
    return open_runtime(path, threads=threads, trust=trust, prober=prober)


def run_artifact(file, runtime, contract, batch, inputs, progress=lambda count: None):
    """Runs an artifact on all images, and checks its contract and its batch sizes.

    Args:
        file: The artifact's name.
        runtime: Its `Runtime`.
        contract: The `Contract`.
        batch: The batch size that it is made for; None for any.
        inputs: The images as it takes them, [count, height, width, channels]: an array, or another
            object with a length that an array of positions can index.
        progress: Called with the number of images of each finished call.

    Returns:
        Its probabilities, float32, [count, classes], and a list of `Failure`s.
    """
    failures = check_contract(file, runtime, contract, batch)
    probabilities = predict(runtime, inputs, progress)
    return probabilities, failures + check_batches(file, runtime, inputs, probabilities)


def predict(runtime, inputs, progress=lambda count: None):
    """Returns the probabilities of an artifact, float32, [count, classes].

    Args:
        runtime: Its `Runtime`.
        inputs: See `run_artifact`.
        progress: See `run_artifact`.
    """
    parts = []
    for start in range(0, len(inputs), CHUNK):
        batch = inputs[np.arange(start, min(start + CHUNK, len(inputs)))]
        parts.append(_probabilities(runtime, batch))
        progress(len(batch))
    return np.concatenate(parts)


def _probabilities(runtime, batch):
    answers = runtime.run(batch)
    if runtime.output_kind == LOGITS:
        return to_probabilities(answers, LOGITS, runtime.name)
    # Not normalised: wrong probabilities would look right.
    if not np.isfinite(answers).all():
        raise InputError(f"{runtime.name}: the model answers with numbers that are not finite")
    return answers


def check_contract(file, runtime, contract, batch=None):
    """Returns a `Failure` for each name, shape or dtype that breaks the contract.

    Args:
        file: The artifact's name.
        runtime: Its `Runtime`.
        contract: The `Contract`.
        batch: The batch size that it is made for; None for any.
    """
    wanted = {
        "input": Tensor("image", (batch, *contract.image_shape), contract.dtype),
        "output": Tensor(contract.output, (batch, contract.classes), "float32"),
    }
    return [
        Failure(file, f"{side} {name}", getattr(getattr(runtime, side), name), limit)
        for side, tensor in wanted.items()
        for name, limit in vars(tensor).items()
        if getattr(getattr(runtime, side), name) != limit
    ]


def check_batches(file, runtime, inputs, probabilities):
    """Returns a `Failure` for each batch size that fails, or changes the answers.

    Args:
        file: The artifact's name.
        runtime: Its `Runtime`.
        inputs: See `run_artifact`.
        probabilities: Its answers to these images in large batches.
    """
    failures = []
    for count in BATCH_SIZES:
        check = f"batch of {count}"
        try:
            found = _probabilities(runtime, inputs[np.arange(count)])
        except InputError as error:
            failures.append(Failure(file, check, str(error), "answered"))
            continue
        difference = float(np.abs(found - probabilities[:count]).max())
        if not difference <= _BATCH_TOLERANCE:
            failures.append(Failure(file, f"{check}, difference", difference, _BATCH_TOLERANCE))
    return failures


def compare(probabilities, expected):
    """Returns the difference between the answers of an artifact and other answers.

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
    """Returns the difference between an artifact and its Keras model on all test images.

    Args:
        probabilities: float32, [count, classes].
        reference: The `Reference`.

    Returns:
        The dict of `compare`, with "images", "accuracy" and "accuracy_change"; and
        "max_difference_in_own_precision" if the model has a twin.
    """
    accuracy = float(np.mean(probabilities.argmax(axis=1) == reference.labels))
    figures = {
        "images": len(probabilities),
        **compare(probabilities, reference.probabilities),
        "accuracy": accuracy,
        "accuracy_change": accuracy - reference.accuracy,
    }
    if reference.own is not None:
        difference = np.abs(probabilities - reference.own).max()
        figures["max_difference_in_own_precision"] = float(difference)
    return figures


def check_tolerance(file, precision, figures):
    """Returns a `Failure` for each figure outside the tolerance of a precision.

    Args:
        file: The artifact's name.
        precision: A row of `PRECISIONS`.
        figures: "max_difference", "agreement" and "accuracy_change"; those that are missing are
            not checked.

    Example:
        >>> figures = {"max_difference": 2e-5, "agreement": 1.0, "accuracy_change": 0.0}
        >>> print(*check_tolerance("model-float32.onnx", "float32", figures))
        largest difference: 2e-05, must be at most 1e-05
    """
    tolerance = PRECISIONS[precision].tolerance
    rows = (
        ("largest difference", "max_difference", 1, "at most", tolerance.max_difference),
        ("agreement", "agreement", 1, "at least", tolerance.agreement),
        ("accuracy drop", "accuracy_change", -1, "at most", tolerance.accuracy_drop),
    )
    failures = []
    for check, key, sign, side, limit in rows:
        if limit is not None and key in figures:
            found = sign * figures[key]
            # A figure that is not a number fails.
            if not (found >= limit if side == "at least" else found <= limit):
                failures.append(Failure(file, check, found, f"{side} {limit:g}"))
    return failures


def check_conclusive(file, precision, reference):
    """Returns a `Failure` if an artifact with one answer to all images would be within tolerance.

    An untrained MobileNetV2 answers 1/7 to every image: a comparison with it shows nothing.

    Args:
        file: The artifact's name.
        precision: A row of `PRECISIONS`.
        reference: The `Reference`.

    Example:
        >>> from keras_resnet.exporters.reference import Reference
        >>> alike = Reference(np.array([0, 1]), np.full((2, 2), 0.5, "float32"))
        >>> check_conclusive("model-float32.onnx", "float32", alike)[0].limit
        'at least 0.0001'
    """
    max_difference = PRECISIONS[precision].tolerance.max_difference
    if max_difference is not None:
        check = "spread of the Keras model's answers over the images"
        found, limit = float(np.ptp(reference.probabilities, axis=0).max()), max_difference
        limit *= _MIN_SPREAD
        is_conclusive, limit = found >= limit, f"at least {limit:g}"
    else:
        check = "share of the images that the Keras model gives one class"
        top1 = reference.probabilities.argmax(axis=1)
        common = np.bincount(top1).argmax()
        found, limit = float(np.mean(top1 == common)), "smaller"
        change = float(np.mean(reference.labels == common)) - reference.accuracy
        constant = {"max_difference": 0.0, "agreement": found, "accuracy_change": change}
        is_conclusive = bool(check_tolerance(file, precision, constant))
    return [] if is_conclusive else [Failure(file, f"{INCONCLUSIVE}, {check}", found, limit)]
