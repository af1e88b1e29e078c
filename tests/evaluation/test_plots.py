import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread
from test_metrics import make_evaluation, make_split

from keras_resnet.datasets.base import Split
from keras_resnet.evaluation import plots
from keras_resnet.evaluation.metrics import Evaluation
from keras_resnet.utils.errors import InputError

EPOCH = {"epoch": 1, "loss": 0.7, "accuracy": 0.6, "val_loss": 0.8, "val_accuracy": 0.5}


def painted(path, colour):
    """How many pixels of the PNG have about the colour "#rrggbb"."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((np.abs(imread(path)[..., :3] - wanted).max(axis=-1) < 0.02).sum())


@pytest.mark.parametrize("epochs", [1, 3, 60])
def test_learning_curves_show_the_held_out_curve_where_there_is_one(tmp_path, epochs):
    history = [{**EPOCH, "epoch": i + 1, "loss": 1 / (i + 1)} for i in range(epochs)]
    plots.plot_learning_curves(history, tmp_path / "with.png")
    assert painted(tmp_path / "with.png", plots.BLUE) > 20
    assert painted(tmp_path / "with.png", plots.RED) > 20
    assert painted(tmp_path / "with.png", plots.GREEN) == 0
    bare = [{key: row[key] for key in ("epoch", "loss", "accuracy")} for row in history]
    plots.plot_learning_curves(bare, tmp_path / "without.png")
    assert painted(tmp_path / "without.png", plots.BLUE) > 20
    assert painted(tmp_path / "without.png", plots.RED) == 0


def test_learning_curves_leave_out_values_that_are_not_finite(tmp_path):
    history = [
        {**EPOCH, "val_loss": math.nan, "val_accuracy": None},
        {**EPOCH, "epoch": 2, "loss": math.inf, "val_loss": math.nan, "val_accuracy": None},
    ]
    plots.plot_learning_curves(history, tmp_path / "curves.png")
    assert painted(tmp_path / "curves.png", plots.RED) == 0
    with pytest.raises(InputError, match="finite loss"):
        plots.plot_learning_curves([{"epoch": 1, "loss": math.nan}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("classes", [2, 26, 101])
def test_confusion_matrix_numbers_its_cells_while_they_can_be_read(tmp_path, classes, monkeypatch):
    written = []
    real = plots._write_counts
    monkeypatch.setattr(plots, "_write_counts", lambda *a: (written.append(True), real(*a)))
    labels = np.arange(classes * 2) % classes
    plots.plot_confusion_matrix(make_evaluation(labels, labels, classes), tmp_path / "matrix.png")
    height, width, _ = imread(tmp_path / "matrix.png").shape
    assert 300 < height < 2600
    assert 300 < width < 2600
    assert written == ([True] if classes <= plots.MAX_NUMBERED_CLASSES else [])


@pytest.mark.parametrize("shape", [(5, 5, 1), (4, 7, 3)])
def test_confused_pairs_read_only_the_images_that_they_show(tmp_path, shape):
    class Files:
        """Images that stay on disk: only `images[indices]` works."""

        def __init__(self, array):
            self.array, self.shape, self.read = array, array.shape, []

        def __len__(self):
            return len(self.array)

        def __getitem__(self, indices):
            self.read.extend(np.asarray(indices).tolist())
            return self.array[indices]

    labels = [0, 0, 0, 1, 1, 2]
    split = make_split(labels, shape)
    files = Files(split.images)
    e = make_evaluation(labels, [1, 1, 0, 1, 0, 2], 3)
    plots.plot_confused_pairs(e, Split(files, split.labels), tmp_path / "pairs.png")
    assert sorted(files.read) == [0, 1, 4]
    assert imread(tmp_path / "pairs.png").ndim == 3


def test_confused_pairs_without_errors_is_a_notice(tmp_path):
    e = make_evaluation([0, 1], [0, 1], 2)
    plots.plot_confused_pairs(e, make_split([0, 1]), tmp_path / "pairs.png")
    assert imread(tmp_path / "pairs.png").shape[0] < 200


def test_predictions_mark_the_wrong_ones_and_only_them(tmp_path):
    labels = [0] * 30
    split = make_split(labels)
    right = make_evaluation(labels, labels, 2)
    plots.plot_predictions(right, split, tmp_path / "right.png", rows=2, columns=3)
    assert painted(tmp_path / "right.png", plots.RED) == 0
    some = make_evaluation(labels, [1] * 10 + [0] * 20, 2)
    plots.plot_predictions(some, split, tmp_path / "some.png", rows=2, columns=3)
    assert painted(tmp_path / "some.png", plots.RED) > 500


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 24), st.integers(0, 5))
def test_sample_is_a_third_wrong_where_there_are_enough_and_fills_the_grid(n, wrong, count, seed):
    wrong = min(wrong, n)
    e = make_evaluation([0] * n, [1] * wrong + [0] * (n - wrong), 2)
    shown = plots._sample(e, count, np.random.default_rng(seed))
    assert len(shown) == len(set(shown)) == min(count, n)
    shown_wrong = (shown < wrong).sum()
    if n - wrong >= count:
        assert shown_wrong == min(wrong, count // 3)
    assert plots._sample(e, count, np.random.default_rng(seed)).tolist() == shown.tolist()


def test_heat_maps_show_the_most_confident_errors_first(tmp_path):
    labels = [0] * 20
    e = make_evaluation(labels, [1] * 3 + [0] * 17, 2)
    asked = []

    def heat_maps(images, classes):
        asked.append((len(images), classes.tolist()))
        return np.full(images.shape[:3], 0.5, "float32")

    plots.plot_heat_maps(e, make_split(labels), heat_maps, tmp_path / "maps.png", rows=4)
    # The predicted and the true class: of three errors and a correct prediction.
    assert asked == [(4, [1, 1, 1, 0]), (4, [0, 0, 0, 0])]
    assert painted(tmp_path / "maps.png", plots.RED) > 500


def test_plots_of_another_split_are_refused(tmp_path):
    e = make_evaluation([0, 1], [0, 1], 2)
    heat_maps = functools.partial(plots.plot_heat_maps, heat_maps=None)
    for plot in (plots.plot_confused_pairs, plots.plot_predictions, heat_maps):
        with pytest.raises(InputError, match="same images in the same order"):
            plot(e, make_split([1, 0]), path=tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_any_class_name_is_drawn_without_a_warning(tmp_path, recwarn):
    labels = [0, 1]
    e = make_evaluation(labels, [1, 0], 2)
    # Matplotlib fails on this one where it takes it as a formula.
    odd = Evaluation(e.labels, e.probabilities, (r"$\nonsense{$", "🐈 x" * 90), 1.0)
    plots.plot_confusion_matrix(odd, tmp_path / "matrix.png")
    plots.plot_confused_pairs(odd, make_split(labels), tmp_path / "pairs.png")
    plots.plot_predictions(odd, make_split(labels), tmp_path / "grid.png")
    assert len(list(tmp_path.iterdir())) == 3
    assert not recwarn.list  # of letters that the font lacks


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("two\nlines", "two?lines"),
        ("abcdefghijkl", "abcdefghijkl"),
        ("abcdefghijklm", "abcdef…ijklm"),
    ],
)
def test_shortened_text_is_one_line_with_both_ends(name, label):
    assert plots.shorten(name, 12) == label
