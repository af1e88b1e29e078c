"""Evaluation of classifiers: accuracy, loss, per-class metrics, confusion matrix.

Everything is computed from predicted probabilities, so that a Keras model, a `.tflite` file and a
plain function are evaluated in the same way. The plots are in `plots.py`.
"""

import dataclasses
import functools
import math
import time
from typing import NamedTuple

import numpy as np

from keras_resnet.utils.arrays import as_labels
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.progress import bar

SMALLEST_PROBABILITY = 1e-7
"""The loss clips the probability of the true class at this value from below, as Keras does."""

SUM_TOLERANCE = 1e-3
"""How far from 1 a row of probabilities may sum."""

MAX_BATCH_PIXELS = 256 * 224 * 224
"""The evaluation batch size is reduced for images that are larger than 224×224."""


class ConfusedPair(NamedTuple):
    """Images of one class that were predicted as another class.

    Attributes:
        true: Their true label.
        predicted: Their predicted label.
        count: The number of images.
        indices: Their positions in the split, int64 [count], the most confident error first.
    """

    true: int
    predicted: int
    count: int
    indices: np.ndarray


# eq=False: comparing the arrays of two evaluations would give an array and not a truth value.
@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """The predictions for every image of a split, and the metrics computed from them.

    Attributes:
        labels: The true labels, int64 [n].
        probabilities: One row for each image, float32 [n, k].
        class_names: k names.
        seconds: Time spent inside `predict`; its first call may include compilation.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], "float32")
        >>> evaluation = Evaluation(np.array([0, 1, 1]), probabilities, ("cat", "dog"), 0.5)
        >>> round(evaluation.accuracy, 4), evaluation.images_per_second
        (0.6667, 6.0)
        >>> evaluation.confusion.tolist()
        [[1, 0], [1, 1]]
    """

    labels: np.ndarray
    probabilities: np.ndarray
    class_names: tuple[str, ...]
    seconds: float

    def __len__(self):
        return len(self.labels)

    @functools.cached_property
    def predictions(self):
        """The most probable label of each image, int64 [n]; the lowest label wins a tie."""
        return self.probabilities.argmax(axis=1)

    @property
    def accuracy(self):
        """The fraction of images whose predicted label is the true label."""
        return float(np.mean(self.predictions == self.labels))

    @property
    def accuracy_standard_error(self):
        """The binomial standard error of `accuracy`, which comes from the choice of the images."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self))

    @property
    def loss(self):
        """The mean cross-entropy in nats, probabilities clipped at `SMALLEST_PROBABILITY`."""
        clipped = np.clip(self._true_probabilities.astype("float64"), SMALLEST_PROBABILITY, 1)
        return 0.0 - float(np.log(clipped).mean())  # 0 and not −0 for a perfect model

    @functools.cached_property
    def confusion(self):
        """The number of images with each true label (row) and predicted label, int64 [k, k]."""
        classes = len(self.class_names)
        pairs = self.labels * classes + self.predictions
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    @property
    def per_class(self):
        """One dict for each class: name, precision, recall, f1, support.

        A metric with a zero denominator is None, not 0: the precision of a class that was never
        predicted, the recall of a class without images, and f1 where both hold.
        """
        correct = np.diag(self.confusion)
        support, predicted = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        return [
            {
                "name": name,
                "precision": _ratio(correct[i], predicted[i]),
                "recall": _ratio(correct[i], support[i]),
                "f1": _ratio(2 * correct[i], support[i] + predicted[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(self.class_names)
        ]

    def top_k_accuracy(self, k):
        """Returns the fraction of images whose true label is among the `k` most probable.

        The lower of two equally probable labels ranks first, so that `k=1` is `accuracy`.

        Raises:
            InputError: `k` is not in 1 … number of classes.
        """
        classes = len(self.class_names)
        if not 1 <= k <= classes:
            raise InputError(f"`k` must be in 1 … {classes} (the number of classes), got {k}")
        true, labels = self._true_probabilities[:, None], self.labels[:, None]
        rank = (self.probabilities > true).sum(axis=1)
        rank += ((self.probabilities == true) & (np.arange(classes) < labels)).sum(axis=1)
        return float(np.mean(rank < k))

    def most_confused(self, n):
        """Returns the `n` most frequent errors as `ConfusedPair`s, the most frequent first.

        The list is shorter if fewer pairs of classes were confused.
        """
        errors = self.confusion - np.diag(np.diag(self.confusion))
        # A stable sort keeps equal counts in the order of the labels.
        order = np.argsort(-errors, axis=None, kind="stable")[:n]
        pairs = (divmod(int(flat), len(self.class_names)) for flat in order)
        return [self._confused_pair(*pair) for pair in pairs if errors[pair]]

    def _confused_pair(self, true, predicted):
        indices = np.flatnonzero((self.labels == true) & (self.predictions == predicted))
        confidence = self.probabilities[indices, predicted]
        indices = indices[np.argsort(-confidence, kind="stable")]
        return ConfusedPair(true, predicted, len(indices), indices)

    @property
    def _true_probabilities(self):
        return self.probabilities[np.arange(len(self)), self.labels]

    @property
    def images_per_second(self):
        """The number of images that `predict` processed in a second."""
        return len(self) / max(self.seconds, 1e-9)

    def to_dict(self):
        """Returns all metrics as plain JSON values, without the probabilities."""
        names = self.class_names
        return {
            "num_images": len(self),
            "accuracy": self.accuracy,
            "accuracy_standard_error": self.accuracy_standard_error,
            "loss": self.loss,
            # With five classes or fewer the top-5 accuracy is always 1.
            "top_5_accuracy": self.top_k_accuracy(5) if len(names) > 5 else None,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "class_names": list(names),
            "per_class": self.per_class,
            "confusion_matrix": self.confusion.tolist(),
            "most_confused": [
                {"true": names[p.true], "predicted": names[p.predicted], "count": p.count}
                for p in self.most_confused(10)
            ],
        }


def evaluate(predict, split, class_names, *, batch_size=256):
    """Predicts every image of a split and computes the metrics.

    A progress bar is shown if standard error is a terminal.

    Args:
        predict: A `Predictor`, or any callable from images (uint8, [n, height, width, channels])
            to probabilities (float, [n, number of classes]). If it has a true attribute
            `several_labels`, as the `Predictor` of a multi-label network has, the probabilities
            of an image are independent and may have any sum; the largest one is the prediction.
        split: A `keras_resnet.datasets.base.Split`. Images that keep their own sizes are
            predicted one by one.
        class_names: One name for each label.
        batch_size: The largest number of images in one call of `predict`. It is reduced for
            images that are larger than 224×224.

    Returns:
        An `Evaluation`.

    Raises:
        InputError: The split is empty, a label has no class name, or `predict` returned
            something other than probabilities.

    Example:
        >>> from keras_resnet.datasets.base import Split
        >>> images = np.array([0, 255], "uint8").reshape(2, 1, 1, 1)
        >>> def bright(images):
        ...     light = images[:, 0, 0, 0] / 255
        ...     return np.stack([1 - light, light], axis=1)
        >>> evaluate(bright, Split(images, np.array([0, 1])), ("dark", "light")).accuracy
        1.0
    """
    if len(split) == 0:
        raise InputError("a split needs at least one image to be evaluated, got none")
    if batch_size < 1:
        raise InputError(f"`batch_size` must be at least 1, got {batch_size}")
    labels = as_labels(split.labels, len(class_names))
    height, width = split.images.shape[1:3]
    fitting = MAX_BATCH_PIXELS // (height * width) if height and width else 1
    several_labels = bool(getattr(predict, "several_labels", False))
    rows, seconds = [], 0.0
    with bar(len(split), "evaluation") as shown:
        for images, _ in split.batches(max(1, min(batch_size, fitting))):
            start = time.perf_counter()
            # Some runtimes compute asynchronously: converting the result to an array waits for it.
            probabilities = _as_float32(predict(images))
            seconds += time.perf_counter() - start
            _check_probabilities(probabilities, (len(images), len(class_names)), several_labels)
            rows.append(probabilities)
            shown.update(len(images))
    return Evaluation(labels, np.concatenate(rows), tuple(class_names), seconds)


_RULE = "`predict` must return probabilities: finite, none negative, each row with the sum 1"


def _as_float32(outputs):
    try:
        return np.asarray(outputs, "float32")
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{_RULE}; got {type(outputs).__name__}, not an array ({error})"
        ) from error


def _check_probabilities(probabilities, shape, several_labels):
    if probabilities.shape != shape:
        raise InputError(f"{_RULE}; got shape {probabilities.shape}, not {shape}")
    if not np.isfinite(probabilities).all():
        raise InputError(f"{_RULE}; got {probabilities[~np.isfinite(probabilities)][0]}")
    if probabilities.min() < 0:
        raise InputError(
            f"{_RULE}; got {probabilities.min():.4g} (are these logits? apply a softmax)"
        )
    sums = probabilities.sum(axis=1, dtype="float64")
    worst = sums[np.abs(sums - 1).argmax()]
    if abs(worst - 1) > SUM_TOLERANCE and not several_labels:
        raise InputError(f"{_RULE}; got a row with the sum {worst:.6g} (logits? apply a softmax)")


def _ratio(part, whole):
    return float(part / whole) if whole else None
