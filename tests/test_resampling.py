"""Resampling to the grey level: beside Pillow, PyTorch's tensors and TensorFlow."""

import numpy as np
import PIL
import pytest
import tensorflow as tf
import torch
from keras import ops
from PIL import Image
from pillow_resize import PILLOW, pillow_resize

from keras_resnet.resampling import FILTERS, LENGTHS, OFFSETS, RESAMPLERS, resample


@pytest.fixture(scope="module")
def photograph():
    """A colour photograph, 606 × 512 pixels, that matplotlib brings."""
    from matplotlib import cbook

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        return np.asarray(Image.open(file))


def cut(photograph, generator):
    """Returns a part of a photograph at random."""
    height, width = (int(generator.integers(1, edge + 1)) for edge in photograph.shape[:2])
    top, left = (
        int(generator.integers(0, edge - part + 1))
        for edge, part in zip(photograph.shape[:2], (height, width), strict=True)
    )
    return photograph[top : top + height, left : left + width]


def grey_levels(images, *arguments, **options):
    return ops.convert_to_numpy(resample(images, *arguments, **options))


def torch_resize(image, height, width, interpolation):
    """Returns an image resized by PyTorch as a tensor of 8 bits."""
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    resize = {
        "bilinear": torch.ops.aten._upsample_bilinear2d_aa,
        "bicubic": torch.ops.aten._upsample_bicubic2d_aa,
    }[interpolation]
    return resize(tensor, [height, width], False)[0].permute(1, 2, 0).numpy()


def expected_levels(image, size, resize, length, interpolation, resampler, rounding):
    """Returns an image as the libraries themselves prepare it."""
    height, width = image.shape[:2]
    short = min(height, width)
    new = (length, length)
    if resize == "shorter_edge":
        new = tuple(
            length if edge == short else int(length * edge / short) for edge in image.shape[:2]
        )
    if resampler == "torch":
        resized = torch_resize(image, *new, interpolation)
    else:
        resized = pillow_resize(image, *new, interpolation, resampler)
    top, left = (
        round((edge - size) / 2.0) if rounding == "torchvision" else (edge - size) // 2
        for edge in new
    )
    return resized[top : top + size, left : left + size]


@pytest.mark.parametrize("resampler", RESAMPLERS)
@pytest.mark.parametrize("interpolation", FILTERS)
def test_random_sizes_become_what_the_library_makes_of_them(photograph, interpolation, resampler):
    generator = np.random.default_rng(0)
    differences = []
    for index in range(16):
        image = cut(photograph, generator)
        size = int(generator.integers(1, 230))
        case = (
            size,
            list(LENGTHS)[index % 2],
            size + int(generator.integers(0, 50)),
            interpolation,
        )
        rounding = list(OFFSETS)[index // 2 % 2]
        found = grey_levels(image[None], *case, resampler=resampler, rounding=rounding)[0]
        expected = expected_levels(image, *case, resampler, rounding)
        differences.append(np.abs(found - expected).ravel())
    differences = np.concatenate(differences)
    assert differences.max() <= (0 if interpolation == "bilinear" else 1)
    assert (differences > 0).mean() <= 1e-4


def test_the_pillow_that_is_installed_is_the_one_that_is_repeated(photograph):
    """The order of the passes is by Pillow 13's rule, or columns come first, as until Pillow 12."""
    generator, seen = np.random.default_rng(1), set()
    for _ in range(40):
        image = generator.integers(0, 256, (*generator.integers(2, 40, 2), 3)).astype("uint8")
        new = generator.integers(2, 40, 2).tolist()
        expected = np.asarray(Image.fromarray(image).resize(new[::-1], Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(pillow_resize(image, *new, "bilinear", PILLOW), expected)
        other = {"pillow": "pillow12", "pillow12": "pillow"}[PILLOW]
        seen.add(bool((pillow_resize(image, *new, "bilinear", other) == expected).all()))
    assert seen == {True, False}, f"Pillow {PIL.__version__}"


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("shape", [(606, 512), (40, 130), (7, 5)])
def test_without_antialiasing_it_is_that_of_tensorflow(photograph, shape, interpolation):
    images = np.ascontiguousarray(photograph[None, : shape[0], : shape[1]]).astype("float32")
    found = grey_levels(images, 33, "squash", 33, interpolation, antialias=False)
    expected = tf.image.resize(images, (33, 33), interpolation)
    # TensorFlow has a table of the cubic at 1,024 distances.
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.1)
    assert np.abs(found - np.round(found)).max() > 0.3


def test_images_of_a_batch_and_channels_are_independent(photograph):
    images = np.stack([photograph[:90, :200], photograph[100:190, 50:250]])
    together = grey_levels(images, 24, "shorter_edge", 30)
    for image, result in zip(images, together, strict=True):
        for channel in range(3):
            alone = grey_levels(image[None, ..., channel, None], 24, "shorter_edge", 30)
            np.testing.assert_array_equal(alone[0, ..., 0], result[..., channel])


def test_numbers_in_double_precision_are_the_same(photograph):
    found = grey_levels(photograph[None], 32, "shorter_edge", 36, dtype="float64")
    assert found.dtype == "float64"
    np.testing.assert_array_equal(found, grey_levels(photograph[None], 32, "shorter_edge", 36))


@pytest.mark.parametrize("margin", range(9))
def test_offsets_are_rounded_by_the_library_s_rule(margin):
    assert OFFSETS["torchvision"](margin) == round(margin / 2.0)
    assert OFFSETS["transformers"](margin) == margin // 2
