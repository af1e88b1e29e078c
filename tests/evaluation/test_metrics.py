import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.image import imread

from keras_resnet.datasets.base import Split
from keras_resnet.evaluation import metrics as ev
from keras_resnet.evaluation.metrics import Evaluation, evaluate
from keras_resnet.utils.errors import InputError


def make_split(labels, shape=(4, 4, 1), seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), *shape), "uint8")
    return Split(images, np.asarray(labels, "int64"))


def make_evaluation(labels, predictions, classes, confidence=0.9):
    """Every image gets `confidence` for what is predicted and shares the rest evenly."""
    rows = np.full((len(labels), classes), (1 - confidence) / (classes - 1), "float32")
    rows[np.arange(len(labels)), predictions] = confidence
    return Evaluation(np.array(labels), rows, tuple(f"class {i}" for i in range(classes)), 2.0)


@st.composite
def evaluations(draw):
    classes = draw(st.integers(2, 6))
    count = draw(st.integers(1, 30))
    labels = draw(hnp.arrays("int64", count, elements=st.integers(0, classes - 1)))
    # Small integers, so that equal probabilities are common.
    scores = draw(hnp.arrays("int64", (count, classes), elements=st.integers(0, 3))) + 0.5
    probabilities = (scores / scores.sum(axis=1, keepdims=True)).astype("float32")
    return Evaluation(labels, probabilities, tuple("abcdef"[:classes]), 1.0)


# ---------------------------------------------------------------------------------- the figures


@given(evaluations())
def test_figures_equal_a_naive_count(e):
    predictions = [max(range(len(row)), key=lambda i: (row[i], -i)) for row in e.probabilities]
    assert e.predictions.tolist() == predictions
    pairs = list(zip(e.labels.tolist(), predictions, strict=True))
    k = range(len(e.class_names))
    assert e.confusion.tolist() == [[pairs.count((t, p)) for p in k] for t in k]
    assert e.accuracy == pytest.approx(sum(t == p for t, p in pairs) / len(pairs))
    for label, row in zip(k, e.per_class, strict=True):
        right = pairs.count((label, label))
        predicted = predictions.count(label)
        support = e.labels.tolist().count(label)
        assert row["name"] == e.class_names[label]
        assert row["support"] == support
        assert row["precision"] == (pytest.approx(right / predicted) if predicted else None)
        assert row["recall"] == (pytest.approx(right / support) if support else None)
        both = predicted + support
        assert row["f1"] == (pytest.approx(2 * right / both) if both else None)


@given(evaluations(), st.data())
def test_top_k_equals_a_stable_ranking(e, data):
    k = data.draw(st.integers(1, len(e.class_names)))
    ranked = np.argsort(-e.probabilities, axis=1, kind="stable")[:, :k]
    expected = np.mean([label in row for label, row in zip(e.labels, ranked, strict=True)])
    assert e.top_k_accuracy(k) == pytest.approx(expected)
    assert e.top_k_accuracy(1) == e.accuracy
    assert e.top_k_accuracy(len(e.class_names)) == 1


@given(evaluations())
def test_most_confused_holds_every_error_once_most_frequent_first(e):
    pairs = e.most_confused(1000)
    assert all(pair.true != pair.predicted for pair in pairs)
    counts = [pair.count for pair in pairs]
    assert counts == sorted(counts, reverse=True)
    assert all(pair.count == len(pair.indices) > 0 for pair in pairs)
    found = sorted(index for pair in pairs for index in pair.indices)
    assert found == np.flatnonzero(e.predictions != e.labels).tolist()
    for pair in pairs:
        assert set(e.labels[pair.indices]) == {pair.true}
        assert set(e.predictions[pair.indices]) == {pair.predicted}
        chances = e.probabilities[pair.indices, pair.predicted]
        assert (np.diff(chances) <= 0).all()


def test_most_confused_returns_at_most_n():
    e = make_evaluation([0, 0, 0, 1, 2], [1, 1, 2, 0, 1], 3)
    assert [pair[:3] for pair in e.most_confused(2)] == [(0, 1, 2), (0, 2, 1)]


def test_loss_is_the_mean_cross_entropy_and_finite_where_the_truth_had_no_chance():
    sure = Evaluation(np.array([0, 1]), np.array([[1, 0], [1, 0]], "float32"), ("a", "b"), 1.0)
    assert sure.loss == pytest.approx(-math.log(ev.SMALLEST_PROBABILITY) / 2)
    half = Evaluation(np.array([0]), np.array([[0.25, 0.75]], "float32"), ("a", "b"), 1.0)
    assert half.loss == pytest.approx(math.log(4))
    perfect = Evaluation(np.array([0]), np.array([[1.0, 0.0]], "float32"), ("a", "b"), 1.0)
    assert str(perfect.loss) == "0.0"  # and not -0.0


def test_standard_error_is_the_binomial_one():
    e = make_evaluation([0] * 100, [0] * 90 + [1] * 10, 2)
    assert e.accuracy_standard_error == pytest.approx(0.03)
    assert e.images_per_second == 50


@pytest.mark.parametrize("k", [0, 4])
def test_top_k_outside_the_classes_is_refused(k):
    with pytest.raises(InputError, match=rf"`k` must be in 1 … 3 .* got {k}"):
        make_evaluation([0], [0], 3).top_k_accuracy(k)


def test_to_dict_is_strict_json_and_whole():
    e = make_evaluation([0, 1, 2], [0, 1, 1], 7)
    loaded = json.loads(json.dumps(e.to_dict(), allow_nan=False))
    assert loaded == e.to_dict()
    assert loaded["num_images"] == 3
    assert loaded["confusion_matrix"][2][1] == 1
    assert loaded["most_confused"] == [{"true": "class 2", "predicted": "class 1", "count": 1}]
    assert loaded["per_class"][2]["precision"] is None
    assert loaded["top_5_accuracy"] == e.top_k_accuracy(5)


def test_top_5_of_five_classes_says_nothing_and_is_none():
    assert make_evaluation([0], [1], 5).to_dict()["top_5_accuracy"] is None


# ------------------------------------------------------------------------------------- evaluate


@settings(max_examples=30)
@given(st.integers(1, 23), st.integers(1, 30))
def test_every_image_is_predicted_once_in_order_whatever_the_batch_size(count, batch_size):
    split = Split(np.arange(count, dtype="uint8").reshape(-1, 1, 1, 1), np.zeros(count, "int64"))
    seen, steps = [], []

    def predict(images):
        assert len(images) <= batch_size
        seen.extend(images.ravel())
        share = images.reshape(-1, 1) / 255
        return np.hstack([share, 1 - share])

    result = evaluate(
        predict,
        split,
        ["a", "b"],
        batch_size=batch_size,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert seen == list(range(count))
    np.testing.assert_allclose(result.probabilities[:, 0], np.arange(count) / 255, rtol=1e-6)
    assert result.probabilities.dtype == "float32"
    assert result.class_names == ("a", "b")
    assert result.seconds > 0
    assert [total for _, total in steps] == [count] * math.ceil(count / batch_size)
    assert [done for done, _ in steps] == [
        min(count, batch_size * (i + 1)) for i in range(len(steps))
    ]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ([[0.5, 0.5]], r"got shape \(1, 2\), not \(2, 2\)"),
        ([0.5, 0.5], r"got shape \(2,\), not \(2, 2\)"),
        ([[0.5, 0.5], [math.nan, 1]], "got nan"),
        ([[0.5, 0.5], [math.inf, 1]], "got inf"),
        ([[0.5, 0.5], [-1.5, 2.5]], r"got -1\.5 .*logits"),
        ([[0.5, 0.5], [3.0, 2.5]], r"sum 5\.5 .*logits"),
        ([[0.5, 0.5], [0.5, 0.502]], r"sum 1\.002"),
        ([[0.5, 0.5], [0.5]], "got list, not an array"),
        (None, r"got shape \(\)"),
    ],
)
def test_what_is_not_probabilities_is_refused(answer, complaint):
    with pytest.raises(InputError, match=f"must return probabilities.*{complaint}") as caught:
        evaluate(lambda images: answer, make_split([0, 1]), ["a", "b"])
    assert "\n" not in str(caught.value)


def test_rounding_in_the_sum_is_accepted():
    answer = [[0.5, 0.5005]]
    assert evaluate(lambda images: answer, make_split([1]), ["a", "b"]).accuracy == 1


@pytest.mark.parametrize("label", [-1, 2])
def test_label_without_a_class_name_is_refused_before_predicting(label):
    with pytest.raises(InputError, match=rf"in 0 … 1, .* 2 class names, got {label}"):
        evaluate(pytest.fail, make_split([0, label, 1]), ["a", "b"])


def test_empty_split_and_batch_size_zero_are_refused():
    with pytest.raises(InputError, match="at least one image"):
        evaluate(pytest.fail, make_split([]), ["a", "b"])
    with pytest.raises(InputError, match="`batch_size` must be at least 1, got 0"):
        evaluate(pytest.fail, make_split([0]), ["a", "b"], batch_size=0)


@pytest.mark.thorough
def test_nothing_heavy_is_imported():
    # None in sys.modules makes an import fail, also where the package had imported it before.
    code = (
        "import sys, keras_resnet\n"
        "sys.modules.update(dict.fromkeys(['keras', 'tensorflow', 'matplotlib']))\n"
        "import keras_resnet.evaluation.metrics, keras_resnet.evaluation.report"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------- pictures

EPOCH = {"epoch": 1, "loss": 0.7, "accuracy": 0.6, "val_loss": 0.8, "val_accuracy": 0.5}


def painted(path, colour):
    """How many pixels of the PNG have about the colour "#rrggbb"."""
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int((np.abs(imread(path)[..., :3] - wanted).max(axis=-1) < 0.02).sum())


@pytest.mark.parametrize("epochs", [1, 3, 60])
def test_learning_curves_show_the_held_out_curve_where_there_is_one(tmp_path, epochs):
    history = [{**EPOCH, "epoch": i + 1, "loss": 1 / (i + 1)} for i in range(epochs)]
    ev.plot_learning_curves(history, tmp_path / "with.png")
    assert painted(tmp_path / "with.png", ev.BLUE) > 20
    assert painted(tmp_path / "with.png", ev.RED) > 20
    assert painted(tmp_path / "with.png", ev.GREEN) == 0
    bare = [{key: row[key] for key in ("epoch", "loss", "accuracy")} for row in history]
    ev.plot_learning_curves(bare, tmp_path / "without.png")
    assert painted(tmp_path / "without.png", ev.BLUE) > 20
    assert painted(tmp_path / "without.png", ev.RED) == 0


def test_learning_curves_leave_out_what_is_not_finite(tmp_path):
    history = [
        {**EPOCH, "val_loss": math.nan, "val_accuracy": None},
        {**EPOCH, "epoch": 2, "loss": math.inf, "val_loss": math.nan, "val_accuracy": None},
    ]
    ev.plot_learning_curves(history, tmp_path / "curves.png")
    assert painted(tmp_path / "curves.png", ev.RED) == 0
    with pytest.raises(InputError, match="finite loss"):
        ev.plot_learning_curves([{"epoch": 1, "loss": math.nan}], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("classes", [2, 26, 101])
def test_confusion_matrix_numbers_its_cells_while_they_can_be_read(tmp_path, classes, monkeypatch):
    written = []
    real = ev._write_counts
    monkeypatch.setattr(ev, "_write_counts", lambda *a: (written.append(True), real(*a)))
    labels = np.arange(classes * 2) % classes
    ev.plot_confusion_matrix(make_evaluation(labels, labels, classes), tmp_path / "matrix.png")
    height, width, _ = imread(tmp_path / "matrix.png").shape
    assert 300 < height < 2600
    assert 300 < width < 2600
    assert written == ([True] if classes <= ev.MAX_NUMBERED_CLASSES else [])


@pytest.mark.parametrize("shape", [(5, 5, 1), (4, 7, 3)])
def test_confused_pairs_ask_the_split_only_for_what_they_show(tmp_path, shape):
    class Files:
        """Images that stay on disk: only `images[indices]` works."""

        def __init__(self, array):
            self.array, self.shape, self.asked = array, array.shape, []

        def __len__(self):
            return len(self.array)

        def __getitem__(self, indices):
            self.asked.extend(np.asarray(indices).tolist())
            return self.array[indices]

    labels = [0, 0, 0, 1, 1, 2]
    split = make_split(labels, shape)
    files = Files(split.images)
    e = make_evaluation(labels, [1, 1, 0, 1, 0, 2], 3)
    ev.plot_confused_pairs(e, Split(files, split.labels), tmp_path / "pairs.png")
    assert sorted(files.asked) == [0, 1, 4]
    assert imread(tmp_path / "pairs.png").ndim == 3


def test_confused_pairs_without_errors_is_a_notice(tmp_path):
    e = make_evaluation([0, 1], [0, 1], 2)
    ev.plot_confused_pairs(e, make_split([0, 1]), tmp_path / "pairs.png")
    assert imread(tmp_path / "pairs.png").shape[0] < 200


def test_predictions_mark_the_wrong_ones_and_only_them(tmp_path):
    labels = [0] * 30
    split = make_split(labels)
    right = make_evaluation(labels, labels, 2)
    ev.plot_predictions(right, split, tmp_path / "right.png", rows=2, columns=3)
    assert painted(tmp_path / "right.png", ev.RED) == 0
    some = make_evaluation(labels, [1] * 10 + [0] * 20, 2)
    ev.plot_predictions(some, split, tmp_path / "some.png", rows=2, columns=3)
    assert painted(tmp_path / "some.png", ev.RED) > 500


@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 24), st.integers(0, 5))
def test_sample_is_a_third_wrong_where_there_are_enough_and_fills_the_grid(n, wrong, count, seed):
    wrong = min(wrong, n)
    e = make_evaluation([0] * n, [1] * wrong + [0] * (n - wrong), 2)
    shown = ev._sample(e, count, np.random.default_rng(seed))
    assert len(shown) == len(set(shown)) == min(count, n)
    shown_wrong = (shown < wrong).sum()
    if n - wrong >= count:
        assert shown_wrong == min(wrong, count // 3)
    assert ev._sample(e, count, np.random.default_rng(seed)).tolist() == shown.tolist()


def test_pictures_of_another_split_are_refused(tmp_path):
    e = make_evaluation([0, 1], [0, 1], 2)
    for plot in (ev.plot_confused_pairs, ev.plot_predictions):
        with pytest.raises(InputError, match="same images in the same order"):
            plot(e, make_split([1, 0]), tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []


def test_any_class_name_is_drawn_without_a_word(tmp_path, recwarn):
    labels = [0, 1]
    e = make_evaluation(labels, [1, 0], 2)
    # Matplotlib fails on this one where it takes it as a formula.
    odd = Evaluation(e.labels, e.probabilities, (r"$\nonsense{$", "🐈 x" * 90), 1.0)
    ev.plot_confusion_matrix(odd, tmp_path / "matrix.png")
    ev.plot_confused_pairs(odd, make_split(labels), tmp_path / "pairs.png")
    ev.plot_predictions(odd, make_split(labels), tmp_path / "grid.png")
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
def test_label_is_one_short_line_with_both_ends(name, label):
    assert ev._label(name, 12) == label
