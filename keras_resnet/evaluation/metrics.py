"""How good anything that predicts is: accuracy, per-class figures, confusion matrix, pictures.

Nothing here knows what predicts: a Keras model, a `.tflite` file or a plain function give the
same figures from the same probabilities. Matplotlib is imported when a picture is drawn.
"""

import dataclasses
import functools
import math
import time
import warnings
from typing import NamedTuple

import numpy as np

from keras_resnet.utils.arrays import as_labels
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.files import replacing
from keras_resnet.utils.tables import printable

SMALLEST_PROBABILITY = 1e-7
"""The loss takes a smaller probability of the true class as this one, as Keras does."""

SUM_TOLERANCE = 1e-3
"""How far from 1 a row of probabilities may sum."""

# ----------------------------------------------------------------------------------------------
# Figures
# ----------------------------------------------------------------------------------------------


class ConfusedPair(NamedTuple):
    """Images of one class that were taken for one other class.

    Attributes:
        true: The label they have.
        predicted: The label they were given.
        count: How many there are.
        indices: Their positions in the split, int64 [count], the most confident error first.
    """

    true: int
    predicted: int
    count: int
    indices: np.ndarray


# Two evaluations have no useful equality: comparing arrays gives an array, not a truth value.
@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """What was predicted for every image of a split, and the figures that follow from it.

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
        """The most probable label of each image, int64 [n]; of equals, the lowest."""
        return self.probabilities.argmax(axis=1)

    @property
    def accuracy(self):
        """The share of images whose predicted label is the true one."""
        return float(np.mean(self.predictions == self.labels))

    @property
    def accuracy_standard_error(self):
        """The binomial standard error of `accuracy`: what drawing other n images would vary it."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / len(self))

    @property
    def loss(self):
        """The mean cross-entropy in nats, probabilities clipped at `SMALLEST_PROBABILITY`."""
        clipped = np.clip(self._true_probabilities.astype("float64"), SMALLEST_PROBABILITY, 1)
        return 0.0 - float(np.log(clipped).mean())  # of a perfect model 0, and not −0

    @functools.cached_property
    def confusion(self):
        """How often a label (row) was predicted as a label (column), int64 [k, k]."""
        classes = len(self.class_names)
        pairs = self.labels * classes + self.predictions
        return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)

    @property
    def per_class(self):
        """One dict for each class: name, precision, recall, f1, support.

        A rate with nothing to divide by is None, not 0: the precision of a class that was never
        predicted, the recall of a class that has no images, and f1 where both hold.
        """
        right = np.diag(self.confusion)
        support, predicted = self.confusion.sum(axis=1), self.confusion.sum(axis=0)
        return [
            {
                "name": name,
                "precision": _ratio(right[i], predicted[i]),
                "recall": _ratio(right[i], support[i]),
                "f1": _ratio(2 * right[i], support[i] + predicted[i]),
                "support": int(support[i]),
            }
            for i, name in enumerate(self.class_names)
        ]

    def top_k_accuracy(self, k):
        """Returns the share of images whose true label is among the `k` most probable.

        Of equally probable labels the lower comes first, so that `k=1` is `accuracy`.

        Raises:
            InputError: `k` is not in 1 … number of classes.
        """
        classes = len(self.class_names)
        if not 1 <= k <= classes:
            raise InputError(f"`k` must be in 1 … {classes} (the number of classes), got {k}")
        true, ours = self._true_probabilities[:, None], self.labels[:, None]
        before = (self.probabilities > true).sum(axis=1)
        before += ((self.probabilities == true) & (np.arange(classes) < ours)).sum(axis=1)
        return float(np.mean(before < k))

    def most_confused(self, n):
        """Returns the `n` most frequent errors as `ConfusedPair`s, the most frequent first.

        There are fewer where fewer pairs of classes were confused.
        """
        errors = self.confusion - np.diag(np.diag(self.confusion))
        # Stable, so that equal counts stay in the order of the labels.
        order = np.argsort(-errors, axis=None, kind="stable")[:n]
        pairs = (divmod(int(flat), len(self.class_names)) for flat in order)
        return [self._pair(*pair) for pair in pairs if errors[pair]]

    @property
    def images_per_second(self):
        """How many images `predict` answered in a second."""
        return len(self) / max(self.seconds, 1e-9)

    def to_dict(self):
        """Returns every figure as plain JSON values; the probabilities stay out."""
        names = self.class_names
        return {
            "num_images": len(self),
            "accuracy": self.accuracy,
            "accuracy_standard_error": self.accuracy_standard_error,
            "loss": self.loss,
            # Among five classes or fewer every answer is a top-5 answer.
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

    @property
    def _true_probabilities(self):
        return self.probabilities[np.arange(len(self)), self.labels]

    def _pair(self, true, predicted):
        indices = np.flatnonzero((self.labels == true) & (self.predictions == predicted))
        confidence = self.probabilities[indices, predicted]
        indices = indices[np.argsort(-confidence, kind="stable")]
        return ConfusedPair(true, predicted, len(indices), indices)


def evaluate(predict, split, class_names, *, batch_size=256, progress=None):
    """Predicts every image of a split and returns the figures.

    Args:
        predict: Any callable from images (uint8, [n, height, width, channels], n at most
            `batch_size`) to probabilities (float, [n, number of classes]). If it has an attribute
            `several_labels` that is true, as a `Predictor` of a several-label network has, each
            number stands alone and a row has any sum; the prediction is the label with the
            largest number.
        split: A `keras_resnet.datasets.base.Split`.
        class_names: One name for each label.
        batch_size: How many images one call of `predict` gets.
        progress: None, or called as `progress(images done, images in all)` after each batch.

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
    labels = _checked_labels(split, class_names)
    if batch_size < 1:
        raise InputError(f"`batch_size` must be at least 1, got {batch_size}")
    several = bool(getattr(predict, "several_labels", False))
    rows, seconds = [], 0.0
    for images, _ in split.batches(batch_size):
        start = time.perf_counter()
        # Some runtimes answer before they have computed: turning the answer into an array waits.
        answer = _as_float32(predict(images))
        seconds += time.perf_counter() - start
        rows.append(_checked_probabilities(answer, (len(images), len(class_names)), several))
        if progress is not None:
            progress(sum(map(len, rows)), len(split))
    return Evaluation(labels, np.concatenate(rows), tuple(class_names), seconds)


def _checked_labels(split, class_names):
    if len(split) == 0:
        raise InputError("a split needs at least one image to be evaluated, got none")
    return as_labels(split.labels, len(class_names))


_RULE = "`predict` must return probabilities: finite, none negative, each row with the sum 1"


def _as_float32(answer):
    try:
        return np.asarray(answer, "float32")
    except (TypeError, ValueError) as error:
        raise InputError(f"{_RULE}; got {type(answer).__name__}, not an array ({error})") from error


def _checked_probabilities(answer, shape, several):
    if answer.shape != shape:
        raise InputError(f"{_RULE}; got shape {answer.shape}, not {shape}")
    if not np.isfinite(answer).all():
        raise InputError(f"{_RULE}; got {answer[~np.isfinite(answer)][0]}")
    if answer.min() < 0:
        raise InputError(f"{_RULE}; got {answer.min():.4g} (are these logits? apply a softmax)")
    if several:
        return answer
    sums = answer.sum(axis=1, dtype="float64")
    worst = sums[np.abs(sums - 1).argmax()]
    if abs(worst - 1) > SUM_TOLERANCE:
        raise InputError(f"{_RULE}; got a row with the sum {worst:.6g} (logits? apply a softmax)")
    return answer


def _ratio(part, whole):
    return float(part / whole) if whole else None


# ----------------------------------------------------------------------------------------------
# Pictures
# ----------------------------------------------------------------------------------------------

# From the palette of Okabe and Ito, which people with any form of colour blindness can tell apart.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
# The red is too light for small letters; this is the same hue at a contrast of 6:1 on white.
_RED_INK, _INK, _FAINT = "#A84A00", "#222222", "#d9d9d9"

MAX_NUMBERED_CLASSES = 25
"""A confusion matrix of more classes shows colours alone."""

_MAX_NAMED_CLASSES = 100


def plot_learning_curves(history, path, *, split_name="validation"):
    """Draws loss, accuracy and learning rate by epoch into a PNG file.

    Args:
        history: One mapping for each epoch, with the keys of `report.HISTORY_COLUMNS`; absent,
            None and non-finite values are left out.
        path: The PNG file.
        split_name: What the `val_` columns were measured on.

    Raises:
        InputError: No epoch has a finite loss.
    """
    from matplotlib.ticker import MaxNLocator

    if not _points(history, "loss"):
        raise InputError(f"learning curves need an epoch with a finite loss, got {list(history)}")
    panels = (
        ("Loss", (("loss", "training", BLUE, "o"), ("val_loss", split_name, RED, "s"))),
        ("Accuracy", (("accuracy", "training", BLUE, "o"), ("val_accuracy", split_name, RED, "s"))),
        ("Learning rate", (("learning_rate", "", GREEN, "o"),)),
    )
    panels = [panel for panel in panels if any(_points(history, key) for key, *_ in panel[1])]
    figure = _figure(4 * len(panels), 3.7, layout="constrained")
    places = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(places, panels, strict=True):
        for curve in curves:
            _draw_curve(axes, history, *curve)
        _title(axes, title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        _widen(axes, [row["epoch"] for row in history])
        axes.grid(color=_FAINT, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    _save(figure, path)


def _draw_curve(axes, history, key, label, colour, marker):
    points = _points(history, key)
    if not points:
        return
    style = {"marker": marker if len(points) <= 40 else "", "markersize": 4.5, "color": colour}
    line = "-" if len(points) > 1 else ""
    axes.plot(*zip(*points, strict=True), linestyle=line, label=label or None, **style)


def _points(history, key):
    values = ((row["epoch"], row.get(key)) for row in history)
    return [(epoch, v) for epoch, v in values if v is not None and math.isfinite(v)]


def _widen(axes, epochs):
    # One epoch alone would get an axis of fractions around it.
    margin = 0.5 if len(epochs) == 1 else 0.04 * (max(epochs) - min(epochs))
    axes.set_xlim(min(epochs) - margin, max(epochs) + margin)


def plot_confusion_matrix(evaluation, path):
    """Draws the confusion matrix into a PNG file: true labels down, predicted ones across.

    The colour is the share of the true class, on a square-root scale so that errors of a few
    per cent are seen beside the diagonal. Up to `MAX_NUMBERED_CLASSES` the cells hold the counts.

    Args:
        evaluation: An `Evaluation`.
        path: The PNG file.
    """
    from matplotlib.colors import PowerNorm

    classes = len(evaluation.class_names)
    numbered = classes <= MAX_NUMBERED_CLASSES
    cell = (0.62 if classes <= 12 else 0.46) if numbered else min(0.14, 14 / classes)
    side = max(3.0, cell * classes)
    figure = _figure(side + 2.6, side + 1.7, layout="constrained")
    axes = figure.subplots()
    shares = evaluation.confusion / np.maximum(evaluation.confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if numbered:
        _write_counts(axes, evaluation.confusion, shares)
    _name_axes(axes, evaluation.class_names, size=9 if numbered else 7)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, ticks=[0, 0.01, 0.1, 0.3, 0.6, 1])
    bar.ax.set_yticklabels(["0%", "1%", "10%", "30%", "60%", "100%"])
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    _title(axes, f"Accuracy {evaluation.accuracy:.2%} of {len(evaluation):,} images")
    _save(figure, path)


def _write_counts(axes, confusion, shares):
    size = 9 if len(confusion) <= 12 and confusion.max() < 100_000 else 7
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            colour = "white" if shares[row, column] > 0.35 else _INK
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=size)


def _name_axes(axes, class_names, size):
    ticks = range(0, len(class_names), math.ceil(len(class_names) / _MAX_NAMED_CLASSES))
    names = [_label(class_names[tick]) for tick in ticks]
    upright = max(map(len, names)) > 4 or len(names) > MAX_NUMBERED_CLASSES
    axes.set_xticks(ticks, names, rotation=90 if upright else 0, fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_color(_FAINT)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")


def plot_confused_pairs(evaluation, split, path, *, pairs=6, images=8):
    """Draws the most confused pairs of classes into a PNG file, one row of images for each pair.

    A row shows the most confident errors; under each image is the probability that the wrong
    class was given.

    Args:
        evaluation: An `Evaluation` of `split`.
        split: The `Split`, for its images.
        path: The PNG file.
        pairs: How many pairs at most.
        images: How many images of each at most.

    Raises:
        InputError: `evaluation` is of another split.
    """
    _check_same(evaluation, split)
    confused = evaluation.most_confused(pairs)
    if not confused:
        _save(_notice(f"None of the {len(evaluation):,} images was misclassified."), path)
        return
    # Four columns at least, so that the heading has room.
    columns = max(4, min(images, max(pair.count for pair in confused)))
    grid = _Grid(len(confused), columns, cell=1.0, below=0.26, left=2.3, above=0.5)
    grid.heading("The most confused classes (true → predicted), most confident errors first")
    support = evaluation.confusion.sum(axis=1)
    for row, pair in enumerate(confused):
        name = evaluation.class_names
        share = f"{pair.count} of {support[pair.true]:,} ({pair.count / support[pair.true]:.1%})"
        grid.row_label(
            row, f"{_label(name[pair.true], 20)}\n→ {_label(name[pair.predicted], 20)}", share
        )
        shown = pair.indices[:images]
        chances = evaluation.probabilities[shown, pair.predicted]
        for column, image in enumerate(split.images[shown]):
            grid.image(row, column, image, _percent(chances[column]))
    _save(grid.figure, path)


def plot_predictions(evaluation, split, path, seed=0, *, rows=4, columns=6):
    """Draws a grid of images with what was predicted for them into a PNG file.

    Errors are rarer than a small sample would show, so a third of the grid is drawn from them
    (where there are enough) and the heading says so. They have a red frame and the true label.

    Args:
        evaluation: An `Evaluation` of `split`.
        split: The `Split`, for its images.
        path: The PNG file.
        seed: Which images are drawn.
        rows: Rows of the grid.
        columns: Columns of the grid.

    Raises:
        InputError: `evaluation` is of another split.
    """
    _check_same(evaluation, split)
    shown = _sample(evaluation, rows * columns, np.random.default_rng(seed))
    wrong = int((evaluation.predictions[shown] != evaluation.labels[shown]).sum())
    grid = _Grid(math.ceil(len(shown) / columns), columns, cell=1.45, below=0.42, above=0.62)
    grid.heading(
        f"{len(shown) - wrong} right and {wrong} wrong predictions, drawn at random from each",
        f"accuracy on all {len(evaluation):,} images: {evaluation.accuracy:.2%}",
    )
    for place, (index, image) in enumerate(zip(shown, split.images[shown], strict=True)):
        is_wrong = evaluation.predictions[index] != evaluation.labels[index]
        caption = _caption(evaluation, index)
        grid.image(*divmod(place, columns), image, caption, is_wrong=is_wrong)
    _save(grid.figure, path)


def _sample(evaluation, count, random):
    is_wrong = evaluation.predictions != evaluation.labels
    wrong = random.permutation(np.flatnonzero(is_wrong))
    right = random.permutation(np.flatnonzero(~is_wrong))
    # Where there are too few right ones, more wrong ones fill the grid.
    take = max(min(count // 3, len(wrong)), min(count - len(right), len(wrong)))
    return random.permutation(np.concatenate([wrong[:take], right[: count - take]]))


def _caption(evaluation, index):
    predicted, true = evaluation.predictions[index], evaluation.labels[index]
    name = evaluation.class_names
    chance = _percent(evaluation.probabilities[index, predicted])
    text = f"{_label(name[predicted], 15)}  {chance}"
    # The word says it, too: the frame's colour alone is not enough for everyone.
    return text if predicted == true else f"{text}\ntrue: {_label(name[true], 15)}"


class _Grid:
    """A figure with images in rows and columns, laid out in inches so that no text is squeezed.

    One axes holds all images and texts, in inches from the figure's lower left corner: an axes
    for each image takes several times as long to draw.
    """

    def __init__(self, rows, columns, *, cell, below, above, left=0.15):
        self.step_x, self.step_y, self.cell = cell + 0.16, cell + below, cell
        self.left = left
        width, self.height = left + columns * self.step_x, above + rows * self.step_y + 0.05
        self.top = self.height - above
        self.figure = _figure(width, self.height)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, self.height))
        self.axes.set_axis_off()

    def text(self, x, y, text, **options):
        """Writes `text` with its place in inches."""
        self.axes.text(x, y, text, **{"color": _INK, **options})

    def heading(self, text, second=""):
        """Writes the title at the top left, with a second line."""
        options = {"va": "top", "fontsize": 10}
        self.text(0.15, self.height - 0.1, text, fontweight="bold", **options)
        self.text(0.15, self.height - 0.31, second, **options)

    def row_label(self, row, text, second):
        """Writes a row's label and a fainter second line to the left of its images."""
        middle = self.top - row * self.step_y - self.cell / 2
        self.text(0.15, middle, text, fontsize=10.5, va="bottom")
        self.text(0.15, middle - 0.07, second, fontsize=9, color="#555555", va="top")

    def image(self, row, column, image, caption, *, is_wrong=False):
        """Draws `image` (uint8, [h, w, 1 or 3]) with a caption below it, and a frame."""
        from matplotlib.patches import Rectangle

        left = self.left + column * self.step_x
        bottom = self.top - row * self.step_y - self.cell
        height, width = (self.cell * size / max(image.shape[:2]) for size in image.shape[:2])
        x, y = left + (self.cell - width) / 2, bottom + (self.cell - height) / 2
        self.axes.imshow(
            image[..., 0] if image.shape[-1] == 1 else image,
            cmap="gray",
            vmin=0,
            vmax=255,
            extent=(x, x + width, y, y + height),
            aspect="auto",
        )
        colour, line, text = (RED, 3, _RED_INK) if is_wrong else (_FAINT, 0.8, _INK)
        frame = Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=line)
        self.axes.add_patch(frame)
        middle = left + self.cell / 2
        self.text(middle, y - 0.05, caption, fontsize=9, color=text, ha="center", va="top")


def _check_same(evaluation, split):
    if not np.array_equal(evaluation.labels, split.labels):
        raise InputError(
            "the evaluation and the split must be of the same images in the same order, "
            f"got {len(evaluation)} and {len(split)} labels that differ"
        )


def _notice(text):
    figure = _figure(6, 1.2)
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=11, color=_INK)
    return figure


def _figure(width, height, **options):
    # A Figure of its own and not pyplot: nothing stays open, and no window system is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", **options)
    if figure.get_layout_engine() is not None:
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def _save(figure, path):
    with replacing(path) as temporary, warnings.catch_warnings():
        # A font without the letters of a class name draws boxes in their place.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=130)


def _title(axes, text):
    axes.set_title(text, fontsize=11, fontweight="bold", loc="left", color=_INK)


def _label(name, longest=24):
    # Names of many classes often differ at one end only, so both ends stay.
    name, half = printable(name), (longest - 1) // 2
    short = name if len(name) <= longest else f"{name[: longest - 1 - half]}…{name[-half:]}"
    # Matplotlib would read what stands between two dollar signs as a formula.
    return short.replace("$", r"\$")


def _percent(probability):
    # Rounded, 0.997 would read as certain.
    return "> 99%" if 0.99 < probability < 1 else f"{probability:.0%}"
