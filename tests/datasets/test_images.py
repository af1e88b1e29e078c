import io

import numpy as np
import pytest
from PIL import Image

from keras_resnet.datasets.images import ImageFiles, check_image_size, decode_image
from keras_resnet.errors import InputError


def encoded(image, form="png", **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def pixels(source, channels=3):
    """The one colour of a uniform image."""
    array = decode_image(source, (2, 3), channels)
    assert array.dtype == np.uint8
    assert array.shape == (2, 3, channels)
    assert (array == array[0, 0]).all()
    return array[0, 0].tolist()


def test_every_mode_becomes_rgb():
    size = (3, 2)
    red = Image.new("RGB", size, (200, 10, 0))
    assert pixels(encoded(red)) == [200, 10, 0]
    assert pixels(encoded(red.quantize(4))) == [200, 10, 0]
    assert pixels(encoded(Image.new("1", size, 1))) == [255, 255, 255]
    assert pixels(encoded(Image.new("L", size, 77))) == [77, 77, 77]
    sixteen = Image.fromarray(np.full((2, 3), 0xAB12, np.uint16))
    assert pixels(encoded(sixteen)) == [0xAB] * 3
    assert pixels(encoded(sixteen, "tiff")) == [0xAB] * 3
    assert pixels(encoded(Image.new("F", size, 77.5), "tiff")) == [77] * 3
    # No ink but black at one half.
    np.testing.assert_allclose(
        pixels(encoded(Image.new("CMYK", size, (0, 0, 0, 128)), "tiff")), [127] * 3, atol=1
    )


def test_transparency_is_laid_on_white():
    size = (3, 2)
    assert pixels(encoded(Image.new("RGBA", size, (0, 0, 0, 0)))) == [255] * 3
    assert pixels(encoded(Image.new("RGBA", size, (200, 0, 0, 255)))) == [200, 0, 0]
    assert pixels(encoded(Image.new("LA", size, (0, 51))), 1) == [204]
    palette = Image.new("P", size, 0)
    palette.putpalette([9, 9, 9])
    assert pixels(encoded(palette, transparency=0), 1) == [255]
    assert pixels(encoded(Image.new("L", size, 40), transparency=40), 1) == [255]


def test_grey_is_the_luma():
    assert pixels(encoded(Image.new("RGB", (3, 2), (255, 0, 0))), 1) == [76]


def test_exif_orientation_is_applied():
    upright = np.zeros((4, 2, 3), np.uint8)
    upright[0] = 255
    stored = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[0x0112] = 6  # To be turned by 90° clockwise.
    array = decode_image(encoded(stored, exif=exif), (4, 2), 3)
    np.testing.assert_array_equal(array, upright)


def test_resizing_is_bilinear():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    wanted = np.asarray(image.resize((5, 4), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(decode_image(encoded(image), (4, 5), 3), wanted)


@pytest.fixture
def four(tmp_path):
    """Four grey images, 10, 20, 30, 40, from paths and from bytes."""
    for value in (10, 20):
        Image.new("L", (3, 3), value).save(tmp_path / f"{value}.png")
    raw = [encoded(Image.new("L", (3, 3), value)) for value in (30, 40)]
    return ImageFiles([tmp_path / "10.png", tmp_path / "20.png", *raw], 2, 1)


@pytest.mark.parametrize(
    "indices",
    [
        np.array([3, 0, 0]),
        [1, 2],
        slice(1, None),
        np.array([True, False, False, True]),
        np.array([-1]),
        np.array([], int),
        2,
    ],
)
def test_indexing_is_that_of_an_array(four, indices):
    array = np.array([10, 20, 30, 40], np.uint8).reshape(4, 1, 1, 1) * np.ones((2, 2, 1), np.uint8)
    assert (four.shape, len(four), four.dtype) == ((4, 2, 2, 1), 4, np.uint8)
    np.testing.assert_array_equal(four[indices], array[indices], strict=True)


def test_index_out_of_range(four):
    with pytest.raises(IndexError):
        four[np.array([4])]


def test_images_damaged_after_loading(tmp_path, four):
    (tmp_path / "20.png").write_bytes(b"no")
    with pytest.raises(InputError, match=r"20\.png: cannot be decoded"):
        four[np.arange(4)]
    whole = encoded(Image.new("RGB", (30, 30), "red"), "jpeg")
    with pytest.raises(InputError, match=r"image 1: cannot be decoded: .*[Tt]runcated"):
        ImageFiles([whole, whole[:-30]], 2, 1)[np.arange(2)]


@pytest.mark.parametrize("size", [0, -1, 2.5, "28", (1, 2, 3), (0, 4), None, True])
def test_bad_image_sizes(size):
    with pytest.raises(InputError, match="must be a positive whole number or"):
        check_image_size(size)


@pytest.mark.parametrize("channels", [0, 2, 4, None])
def test_bad_channels(channels):
    with pytest.raises(InputError, match=f"must be 1 .* or 3 .*got {channels}"):
        ImageFiles([], 2, channels)
