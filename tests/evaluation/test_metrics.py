import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from keras_resnet.datasets.base import Split
from keras_resnet.evaluation.metrics import SMALLEST_PROBABILITY, Evaluation, evaluate
from keras_resnet.utils.errors import InputError


def make_split(labels, shape=(4, 4, 1), seed=0):
    images = np.random.default_rng(seed).integers(0, 256, (len(labels), *shape), "uint8")
    return Split(images, np.asarray(labels, "int64"))


def make_evaluation(labels, predictions, classes, confidence=0.9):
    """The predicted class has the probability `confidence`; the others share the rest evenly."""
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


@given(evaluations())
def test_metrics_equal_a_naive_count(e):
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
    assert sure.loss == pytest.approx(-math.log(SMALLEST_PROBABILITY) / 2)
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


# ----------------------------------------------------------------------------------------------
# evaluate
# ----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(st.integers(1, 23), st.integers(1, 30))
def test_every_image_is_predicted_once_in_order_whatever_the_batch_size(count, batch_size):
    split = Split(np.arange(count, dtype="uint8").reshape(-1, 1, 1, 1), np.zeros(count, "int64"))
    seen = []

    def predict(images):
        assert len(images) <= batch_size
        seen.extend(images.ravel())
        share = images.reshape(-1, 1) / 255
        return np.hstack([share, 1 - share])

    result = evaluate(predict, split, ["a", "b"], batch_size=batch_size)
    assert seen == list(range(count))
    np.testing.assert_allclose(result.probabilities[:, 0], np.arange(count) / 255, rtol=1e-6)
    assert result.probabilities.dtype == "float32"
    assert result.class_names == ("a", "b")
    assert result.seconds > 0


@pytest.mark.parametrize(
    ("shape", "batches"),
    [((4, 4, 1), [5]), ((2240, 2240, 1), [2, 2, 1]), ((3584, 7168, 1), [1] * 5)],
)
def test_large_images_are_predicted_in_smaller_batches(shape, batches):
    class Files:
        """Images of `shape` that stay on disk."""

        def __len__(self):
            return 5

        def __getitem__(self, indices):
            return indices

    Files.shape = (5, *shape)
    sizes = []

    def predict(images):
        sizes.append(len(images))
        return np.full((len(images), 2), 0.5)

    evaluate(predict, Split(Files(), np.zeros(5, "int64")), ["a", "b"])
    assert sizes == batches


def test_a_terminal_shows_how_many_images_are_done(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, shown in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        evaluate(lambda images: np.full((len(images), 2), 0.5), make_split([0, 1, 0]), ["a", "b"])
        assert ("evaluation" in stream.getvalue() and "/3" in stream.getvalue()) == shown


@pytest.mark.parametrize(
    ("output", "complaint"),
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
def test_other_outputs_than_probabilities_are_refused(output, complaint):
    with pytest.raises(InputError, match=f"must return probabilities.*{complaint}") as caught:
        evaluate(lambda images: output, make_split([0, 1]), ["a", "b"])
    assert "\n" not in str(caught.value)


def test_rounding_in_the_sum_is_accepted():
    output = [[0.5, 0.5005]]
    assert evaluate(lambda images: output, make_split([1]), ["a", "b"]).accuracy == 1


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
