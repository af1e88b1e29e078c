"""Images and labels are accepted, or refused in one line with a remedy."""

import numpy as np
import pytest
import torch

from keras_resnet import Dataset, InputError, Split
from keras_resnet.utils.arrays import as_images, as_labels

IMAGES = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype="uint8")
IMAGES[0, 0, 0] = 0, 255, 7
GREY = IMAGES[..., :1]


@pytest.mark.parametrize(
    "given",
    [
        IMAGES.tolist(),
        IMAGES.astype("int64"),
        IMAGES[:, ::-1][:, ::-1],
        np.asfortranarray(IMAGES),
        torch.from_numpy(IMAGES),
        list(IMAGES),
    ],
    ids=["lists", "int64", "reversed", "Fortran", "torch", "list of arrays"],
)
def test_images_that_are_accepted(given):
    found = as_images(given, "a model", (6, 5, 3))
    assert found.dtype == "uint8" and found.flags.c_contiguous
    np.testing.assert_array_equal(found, IMAGES)
    np.testing.assert_array_equal(Split(given, range(4)).images, IMAGES)


def test_no_images_are_accepted():
    assert as_images(IMAGES[:0], "a model", (6, 5, 3)).shape == (0, 6, 5, 3)


@pytest.mark.parametrize(
    ("given", "wanted", "hint"),
    [
        ((IMAGES / 255).astype("float32"), 3, "(images * 255).round().astype"),
        (GREY > 128, 1, "(images * 255).round().astype"),
        (IMAGES.astype("float64"), 3, "images.round().astype"),
        (IMAGES / 127.5 - 1, 3, "give the raw images"),
        (np.full((1, 6, 5, 3), np.nan), 3, "give the raw images"),
        (IMAGES.astype("uint16"), 3, "(images // 257).astype"),
        (IMAGES.astype("int64") * 257, 3, "(images // 257).astype"),
        (IMAGES.astype("int64") - 128, 3, "give the raw images"),
        (IMAGES.astype("U"), 3, "give the raw images"),
        (IMAGES[0], 3, "images[None]"),
        (GREY[..., 0], 1, "images[..., None]"),
        (GREY[0, ..., 0], 1, "images[None, ..., None]"),
        (IMAGES.transpose(0, 3, 1, 2), 3, "images.transpose(0, 2, 3, 1)"),
        (GREY.transpose(0, 3, 1, 2), 1, "images.transpose(0, 2, 3, 1)"),
        (GREY, 3, "np.repeat(images, 3, axis=-1)"),
        (IMAGES, 1, "it takes grey images"),
        (IMAGES[:, :4], 3, "resize the images"),
        ([], 3, "got float64"),
        ([[1, 2], [3]], 3, "got list"),
        (None, 3, "got NoneType"),
    ],
)
def test_images_that_are_refused(given, wanted, hint):
    with pytest.raises(InputError) as error:
        as_images(given, "a model", (6, 5, wanted))
    assert str(error.value).startswith("a model: it takes uint8 images (count, ")
    assert hint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "images",
    [
        IMAGES.transpose(0, 3, 1, 2),
        GREY[..., 0],
        IMAGES / 255,
        IMAGES.astype("uint16"),
        np.zeros((4, 6, 5, 2), "uint8"),
    ],
    ids=["channels first", "no channels", "floats", "16 bits", "two channels"],
)
def test_a_split_is_checked_when_it_is_made(images):
    with pytest.raises(InputError, match="a split: it takes uint8 images"):
        Split(images, np.zeros(4, "int64"))


@pytest.mark.parametrize(
    "labels",
    [[2, 0, 1], [[2], [0], [1]], np.array([2, 0, 1], "uint8"), torch.tensor([2, 0, 1])],
)
def test_labels_that_are_accepted(labels):
    found = as_labels(labels, 3)
    assert found.dtype == "int64" and found.tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("labels", "hint"),
    [
        (np.eye(3, dtype=int), "argmax"),
        (np.eye(3, dtype="float32"), "argmax"),
        ([0.0, 1.0, 2.0], 'astype("int64")'),
        (["cat", "dog", "dog"], "whole numbers"),
        (np.zeros((3, 1, 1), int), "whole numbers"),
        (3, "whole numbers"),
    ],
)
def test_labels_that_are_refused(labels, hint):
    with pytest.raises(InputError, match="labels must be whole numbers") as error:
        Split(IMAGES[:3], labels)
    assert hint in str(error.value)


@pytest.mark.parametrize("label", [-1, 3, 2**63])
def test_labels_outside_the_classes_are_refused_before_training(label):
    split = Split(IMAGES[:2], np.array([0, label], "uint64" if label > 0 else "int64"))
    with pytest.raises(InputError, match=r"each label must be in 0 … 2"):
        Dataset("made", ("a", "b", "c"), {"train": split}, "here", "0" * 64)
