"""Mixed training batches: images, labels and weights."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_resnet import Split
from keras_resnet.datasets.mixing import MIXINGS, BatchReader, mix
from keras_resnet.losses import Accuracy, make_loss

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (40, 12, 9, 3), "uint8")
LABELS = RANDOM.integers(0, 5, 40)
SPLIT = Split(IMAGES, LABELS)


@pytest.mark.parametrize("name", MIXINGS)
@given(
    count=st.integers(1, 6), height=st.integers(1, 9), width=st.integers(1, 9), seed=st.integers(0)
)
@settings(max_examples=50, deadline=None)
def test_labels_are_mixed_in_the_shares_of_the_images(name, count, height, width, seed):
    # Each image has one grey level, and a class of its own.
    levels = 40 * np.arange(count, dtype="uint8")
    images = np.broadcast_to(levels[:, None, None, None], (count, height, width, 1))
    mixed, shares = mix(name, images, np.arange(count), count, np.random.default_rng(seed))
    assert mixed.dtype == "uint8" and mixed.shape == images.shape
    assert shares.dtype == "float32" and shares.shape == (count, count)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    # mixup rounds to whole grey levels.
    np.testing.assert_allclose(mixed.mean((1, 2, 3)), shares @ levels, atol=0.51)


def test_cutmix_pastes_a_rectangle():
    mixed, shares = mix("cutmix", IMAGES, np.arange(40), 40, np.random.default_rng(1))
    partners = np.random.default_rng(1).permutation(40)
    covered = 0
    for image, own, other, share in zip(mixed, IMAGES, IMAGES[partners], shares, strict=True):
        pasted = (image != own).any(-1)
        rows, columns = pasted.any(1), pasted.any(0)
        assert np.array_equal(image[pasted], other[pasted])
        # The box around the pasted pixels holds no pixel of the image.
        box = np.outer(rows, columns)
        covered += (box == pasted).all()
        assert share.max() == pytest.approx(max(pasted.mean(), 1 - pasted.mean()), abs=1e-6)
    assert covered == 40 and 0.1 < (mixed != IMAGES).mean() < 0.6


def test_mixup_is_the_weighted_mean():
    mixed, shares = mix("mixup", IMAGES, np.arange(40), 40, np.random.default_rng(1))
    expected = np.tensordot(shares, IMAGES.astype("float32"), 1)
    np.testing.assert_allclose(mixed, expected, atol=0.501)


def test_a_batch_is_mixed_by_seed_and_place():
    chosen = np.arange(7, 30)
    reader = BatchReader(SPLIT, mixing="cutmix", classes=5, seed=3)
    first, again = reader.read(chosen, 0, 2), reader.read(chosen, 0, 2)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    others = [reader.read(chosen, 1, 2), reader.read(chosen, 0, 3)]
    others += [BatchReader(SPLIT, mixing="cutmix", classes=5, seed=4).read(chosen, 0, 2)]
    assert not any(np.array_equal(first[0], other[0]) for other in others)


@pytest.mark.parametrize("mixing", [None, *MIXINGS])
@pytest.mark.parametrize("class_weights", [None, [0.2, 0.5, 1.0, 1.5, 4.0]])
def test_what_is_read_has_the_signature(mixing, class_weights):
    reader = BatchReader(SPLIT, class_weights, mixing, 5)
    batch = reader.read(np.arange(8), 0)
    assert [(each.shape[1:], each.dtype) for each in batch] == reader.signature
    if class_weights:
        _, labels, weights = batch
        shares = labels if mixing else np.eye(5)[labels]
        np.testing.assert_allclose(weights, shares @ np.array(class_weights), rtol=1e-6)
    if not mixing:
        np.testing.assert_array_equal(batch[0], IMAGES[:8])
        np.testing.assert_array_equal(batch[1], LABELS[:8])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_shares_is_keras_own(smoothing):
    logits = ops.array(RANDOM.normal(size=(40, 5)).astype("float32"))
    _, shares = mix("cutmix", IMAGES, LABELS, 5, np.random.default_rng(0))
    own = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing)
    found = float(make_loss(smoothing, "cutmix")(ops.array(shares), logits))
    assert found == pytest.approx(float(own(shares, logits)), rel=1e-6)
    # Class numbers, as the evaluation has them, and the same as shares.
    numbers = make_loss(smoothing, "cutmix")(ops.array(LABELS), logits)
    whole = make_loss(smoothing, "cutmix")(ops.array(np.eye(5, dtype="float32")[LABELS]), logits)
    assert float(numbers) == pytest.approx(float(whole), rel=1e-6)


def test_accuracy_takes_numbers_and_shares():
    logits = ops.array(RANDOM.normal(size=(40, 5)).astype("float32"))
    expected = (np.argmax(logits, -1) == LABELS).mean()
    for labels in (LABELS, LABELS[:, None], 0.6 * np.eye(5)[LABELS] + 0.08):
        accuracy = Accuracy()
        accuracy.update_state(ops.array(labels), logits)
        assert float(accuracy.result()) == pytest.approx(expected)
