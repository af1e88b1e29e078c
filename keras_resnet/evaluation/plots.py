"""Plots of a run, and the palette, figures and PNG files of all plots of this project.

Matplotlib is imported when a plot is drawn.
"""

import math
import warnings

import numpy as np

from keras_resnet.utils.errors import InputError
from keras_resnet.utils.files import replacing
from keras_resnet.utils.tables import printable

# The palette of Okabe and Ito: people with any form of colour blindness can tell its colours apart.
BLUE, RED, GREEN = "#0072B2", "#D55E00", "#009E73"
PURPLE, ORANGE, SKY = "#CC79A7", "#E69F00", "#56B4E9"
INK, FAINT = "#222222", "#d9d9d9"
# RED is too light for small letters; this is the same hue at a contrast of 6:1 on white.
_RED_INK = "#A84A00"

MAX_NUMBERED_CLASSES = 25
"""The cells of a confusion matrix of more classes have colours, but no counts."""

_MAX_NAMED_CLASSES = 100

# ----------------------------------------------------------------------------------------------
# Shared by all plots
# ----------------------------------------------------------------------------------------------


def new_figure(width, height, layout="constrained"):
    """Returns a white Matplotlib figure; `width` and `height` are in inches."""
    # pyplot would keep the figure open and look for a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", layout=layout)
    if layout is not None:
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    return figure


def save_png(figure, path):
    """Writes a figure to a PNG file, whole or not at all."""
    with replacing(path) as temporary, warnings.catch_warnings():
        # A font without the letters of a class name draws boxes in their place.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(temporary, format="png", dpi=130)


def set_title(axes, text):
    """Writes a title at the top left of the axes."""
    axes.set_title(text, fontsize=11, fontweight="bold", loc="left", color=INK)


def draw_grid(axes, axis="both"):
    """Draws faint grid lines behind the data, and no frame at the top and at the right."""
    axes.grid(color=FAINT, linewidth=0.6, axis=axis)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def shorten(text, longest=24):
    """Returns `text` in one line of at most `longest` characters, for Matplotlib.

    The middle is left out, since the names of many classes differ at one end only.

    Example:
        >>> shorten("abcdefghijklm", 12)
        'abcdef…ijklm'
    """
    text, half = printable(text), (longest - 1) // 2
    short = text if len(text) <= longest else f"{text[: longest - 1 - half]}…{text[-half:]}"
    # Matplotlib reads the text between two dollar signs as a formula.
    return short.replace("$", r"\$")


# ----------------------------------------------------------------------------------------------
# Learning curves
# ----------------------------------------------------------------------------------------------


def plot_learning_curves(history, path, *, split_name="validation"):
    """Draws loss, accuracy and learning rate by epoch into a PNG file.

    Args:
        history: One mapping for each epoch, with the keys of `report.HISTORY_COLUMNS`; absent,
            None and non-finite values are left out.
        path: The PNG file.
        split_name: The split of the `val_` columns.

    Raises:
        InputError: No epoch has a finite loss.
    """
    from matplotlib.ticker import MaxNLocator

    if not _points(history, "loss"):
        raise InputError(f"learning curves need an epoch with a finite loss, got {list(history)}")
    panels = {
        "Loss": [("loss", "training", BLUE, "o"), ("val_loss", split_name, RED, "s")],
        "Accuracy": [("accuracy", "training", BLUE, "o"), ("val_accuracy", split_name, RED, "s")],
        "Learning rate": [("learning_rate", None, GREEN, "o")],
    }
    panels = {
        title: drawn
        for title, curves in panels.items()
        if (drawn := [curve for curve in curves if _points(history, curve[0])])
    }
    figure = new_figure(4 * len(panels), 3.7)
    epochs = [row["epoch"] for row in history]
    # A single epoch would otherwise get an axis of fractions around it.
    margin = 0.5 if len(epochs) == 1 else 0.04 * (max(epochs) - min(epochs))
    for place, (title, curves) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), place)
        for key, label, colour, marker in curves:
            points = _points(history, key)
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                label=label,
                marker=marker if len(points) <= 40 else "",
                markersize=4.5,
            )
        set_title(axes, title)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        axes.set_xlim(min(epochs) - margin, max(epochs) + margin)
        draw_grid(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    save_png(figure, path)


def _points(history, key):
    values = ((row["epoch"], row.get(key)) for row in history)
    return [(epoch, v) for epoch, v in values if v is not None and math.isfinite(v)]


# ----------------------------------------------------------------------------------------------
# Confusion matrix
# ----------------------------------------------------------------------------------------------


def plot_confusion_matrix(evaluation, path):
    """Draws the confusion matrix into a PNG file: true labels down, predicted labels across.

    The colour is the fraction of the true class, on a square-root scale so that errors of a few
    per cent are visible beside the diagonal. Up to `MAX_NUMBERED_CLASSES` the cells hold the
    counts.

    Args:
        evaluation: An `Evaluation`.
        path: The PNG file.
    """
    from matplotlib.colors import PowerNorm

    classes, confusion = len(evaluation.class_names), evaluation.confusion
    numbered = classes <= MAX_NUMBERED_CLASSES
    cell = (0.62 if classes <= 12 else 0.46) if numbered else min(0.14, 14 / classes)
    side = max(3.0, cell * classes)
    figure = new_figure(side + 2.6, side + 1.7)
    axes = figure.subplots()
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="nearest")
    if numbered:
        _write_counts(axes, confusion, shares)
    _name_axes(axes, evaluation.class_names, size=9 if numbered else 7)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, aspect=30, ticks=[0, 0.01, 0.1, 0.3, 0.6, 1])
    bar.ax.set_yticklabels(["0%", "1%", "10%", "30%", "60%", "100%"])
    bar.set_label("fraction of the true class")
    bar.outline.set_visible(False)
    set_title(axes, f"Accuracy {evaluation.accuracy:.2%} of {len(evaluation):,} images")
    save_png(figure, path)


def _write_counts(axes, confusion, shares):
    size = 9 if len(confusion) <= 12 and confusion.max() < 100_000 else 7
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            colour = "white" if shares[row, column] > 0.35 else INK
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=size)


def _name_axes(axes, class_names, size):
    ticks = range(0, len(class_names), math.ceil(len(class_names) / _MAX_NAMED_CLASSES))
    names = [shorten(class_names[tick]) for tick in ticks]
    upright = max(map(len, names)) > 4 or len(names) > MAX_NUMBERED_CLASSES
    axes.set_xticks(ticks, names, rotation=90 if upright else 0, fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_color(FAINT)
    axes.set(xlabel="predicted", ylabel="true")


# ----------------------------------------------------------------------------------------------
# Images with their predictions
# ----------------------------------------------------------------------------------------------


def plot_confused_pairs(evaluation, split, path, *, pairs=6, images=8):
    """Draws the most confused pairs of classes into a PNG file, one row of images for each pair.

    A row shows the most confident errors; the number under each image is the probability of the
    wrong class.

    Args:
        evaluation: An `Evaluation` of `split`.
        split: The `Split`, for its images.
        path: The PNG file.
        pairs: The largest number of pairs.
        images: The largest number of images of each pair.

    Raises:
        InputError: `evaluation` is of another split.
    """
    _check_same_split(evaluation, split)
    confused = evaluation.most_confused(pairs)
    if not confused:
        figure = new_figure(6, 1.2)
        text = f"None of the {len(evaluation):,} images was misclassified."
        figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=11, color=INK)
        save_png(figure, path)
        return
    # The heading needs the width of four columns.
    columns = max(4, min(images, max(pair.count for pair in confused)))
    grid = _Grid(len(confused), columns, cell=1.0, below=0.26, left=2.3, above=0.5)
    grid.heading("The most confused classes (true → predicted), most confident errors first")
    for row, pair in enumerate(confused):
        true, predicted = (shorten(evaluation.class_names[label], 20) for label in pair[:2])
        support = evaluation.confusion[pair.true].sum()
        grid.row_label(
            row,
            f"{true}\n→ {predicted}",
            f"{pair.count} of {support:,} ({pair.count / support:.1%})",
        )
        shown = pair.indices[:images]
        probabilities = evaluation.probabilities[shown, pair.predicted]
        for column, image in enumerate(split.images[shown]):
            grid.image(row, column, image, _percent(probabilities[column]))
    save_png(grid.figure, path)


def plot_predictions(evaluation, split, path, seed=0, *, rows=4, columns=6):
    """Draws a grid of images with their predictions into a PNG file.

    A small sample would hold hardly any errors, so a third of the images is drawn from the errors
    (if there are enough) and the heading says so. Errors have a red frame and the true label.

    Args:
        evaluation: An `Evaluation` of `split`.
        split: The `Split`, for its images.
        path: The PNG file.
        seed: Seed of the choice of images.
        rows: Rows of the grid.
        columns: Columns of the grid.

    Raises:
        InputError: `evaluation` is of another split.
    """
    _check_same_split(evaluation, split)
    shown = _sample(evaluation, rows * columns, np.random.default_rng(seed))
    wrong = int((evaluation.predictions[shown] != evaluation.labels[shown]).sum())
    grid = _Grid(math.ceil(len(shown) / columns), columns, cell=1.45, below=0.42, above=0.62)
    grid.heading(
        f"{len(shown) - wrong} right and {wrong} wrong predictions, drawn at random from each",
        f"accuracy on all {len(evaluation):,} images: {evaluation.accuracy:.2%}",
    )
    for place, (index, image) in enumerate(zip(shown, split.images[shown], strict=True)):
        predicted, true = evaluation.predictions[index], evaluation.labels[index]
        probability = _percent(evaluation.probabilities[index, predicted])
        caption = f"{shorten(evaluation.class_names[predicted], 15)}  {probability}"
        if predicted != true:
            # In words too: a coloured frame alone is not visible to everyone.
            caption += f"\ntrue: {shorten(evaluation.class_names[true], 15)}"
        grid.image(*divmod(place, columns), image, caption, is_wrong=predicted != true)
    save_png(grid.figure, path)


def plot_heat_maps(evaluation, split, heat_maps, path, *, rows=6):
    """Draws images beside the heat maps of the predicted and of the true class, into a PNG.

    The most confident errors come first; correct predictions, the least confident first, fill the
    rows that are left.

    Args:
        evaluation: An `Evaluation` of `split`.
        split: The `Split`, for its images.
        heat_maps: Function of images (uint8) and classes that returns maps in 0 … 1, (count,
            height, width); see `grad_cam`.
        path: The PNG file.
        rows: The largest number of images.

    Raises:
        InputError: `evaluation` is of another split.
    """
    _check_same_split(evaluation, split)
    confidence = evaluation.probabilities.max(axis=1)
    is_wrong = evaluation.predictions != evaluation.labels
    order = np.argsort(np.where(is_wrong, -confidence, 1 + confidence), kind="stable")[:rows]
    images = split.images[order]
    predicted, true = evaluation.predictions[order], evaluation.labels[order]
    maps = [heat_maps(images, classes) for classes in (predicted, true)]
    grid = _Grid(len(order), 3, cell=1.7, below=0.42, above=0.62)
    grid.heading("Heat maps of the predicted and of the true class (Grad-CAM)", "brighter: more")
    for row, image in enumerate(images):
        wrong = predicted[row] != true[row]
        names = [shorten(evaluation.class_names[each[row]], 17) for each in (predicted, true)]
        grid.image(row, 0, image, f"true: {names[1]}", is_wrong=wrong)
        for column in range(1 + wrong):
            probability = evaluation.probabilities[order[row], (predicted, true)[column][row]]
            caption = f"{names[column]}  {_percent(probability)}"
            grid.image(row, 1 + column, _lit(image, maps[column][row]), caption)
    save_png(grid.figure, path)


def _lit(image, heat):
    """Returns an image in grey, dark where `heat` is 0 and tinted orange where it is 1."""
    grey = image.mean(axis=-1, keepdims=True)
    tint = np.array([230, 159, 0])  # `ORANGE`
    heat = heat[..., None]
    return (grey * (0.35 + 0.25 * heat) + 0.4 * heat * tint).clip(0, 255).astype("uint8")


def _sample(evaluation, count, random):
    is_wrong = evaluation.predictions != evaluation.labels
    wrong = random.permutation(np.flatnonzero(is_wrong))
    right = random.permutation(np.flatnonzero(~is_wrong))
    # More errors fill the grid if there are too few correct predictions.
    take = max(min(count // 3, len(wrong)), min(count - len(right), len(wrong)))
    return random.permutation(np.concatenate([wrong[:take], right[: count - take]]))


class _Grid:
    """A figure with images in rows and columns, placed in inches so that no text is squeezed.

    One axes holds all images and texts, in inches from the figure's lower left corner: one axes
    for each image takes several times as long to draw.
    """

    def __init__(self, rows, columns, *, cell, below, above, left=0.15):
        self.step_x, self.step_y, self.cell = cell + 0.16, cell + below, cell
        self.left = left
        width, self.height = left + columns * self.step_x, above + rows * self.step_y + 0.05
        self.top = self.height - above
        self.figure = new_figure(width, self.height, layout=None)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, self.height))
        self.axes.set_axis_off()

    def text(self, x, y, text, **options):
        """Writes `text` at a position in inches."""
        self.axes.text(x, y, text, **{"color": INK, **options})

    def heading(self, text, second=""):
        """Writes the title at the top left, and a second line."""
        options = {"va": "top", "fontsize": 10}
        self.text(0.15, self.height - 0.1, text, fontweight="bold", **options)
        self.text(0.15, self.height - 0.31, second, **options)

    def row_label(self, row, text, second):
        """Writes a row's label and a fainter second line to the left of its images."""
        middle = self.top - row * self.step_y - self.cell / 2
        self.text(0.15, middle, text, fontsize=10.5, va="bottom")
        self.text(0.15, middle - 0.07, second, fontsize=9, color="#555555", va="top")

    def image(self, row, column, image, caption, *, is_wrong=False):
        """Draws `image` (uint8, [h, w, 1 or 3]) in a frame, with a caption below it."""
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
        colour, line, text = (RED, 3, _RED_INK) if is_wrong else (FAINT, 0.8, INK)
        frame = Rectangle((x, y), width, height, fill=False, edgecolor=colour, linewidth=line)
        self.axes.add_patch(frame)
        middle = left + self.cell / 2
        self.text(middle, y - 0.05, caption, fontsize=9, color=text, ha="center", va="top")


def _check_same_split(evaluation, split):
    if not np.array_equal(evaluation.labels, split.labels):
        raise InputError(
            "the evaluation and the split must be of the same images in the same order, "
            f"got {len(evaluation)} and {len(split)} labels that differ"
        )


def _percent(probability):
    # 0.997 rounded to 100% would look certain.
    return "> 99%" if 0.99 < probability < 1 else f"{probability:.0%}"
