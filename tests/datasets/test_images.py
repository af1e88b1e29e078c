import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from keras_resnet.datasets.images import (
    ImageFiles,
    check_image_size,
    content_marks,
    decode_image,
    open_upright,
    split_marks,
)
from keras_resnet.utils.errors import InputError


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


# ----------------------------------------------------------------------------------------------
# Images as cameras and programs write them
# ----------------------------------------------------------------------------------------------


def exif_with(*entries):
    """EXIF, little-endian, of IFD entries (tag, type, count, four bytes)."""
    rows = b"".join(struct.pack("<HHL", *entry[:3]) + entry[3] for entry in entries)
    head = b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries))
    return head + rows + struct.pack("<L", 0)


def orientation(value, kind=3):
    return (0x0112, kind, 1, struct.pack("<HH", value, 0))


BAD_TAG = (0x0102, 4, 1, struct.pack("<L", 100_000))  # Pillow writes it as 16 bits, and cannot
LOOSE_TAG = (0x010F, 2, 1000, struct.pack("<L", 10**6))  # a text far behind the end
BROKEN_EXIF = {
    "no TIFF header": (b"Exif\0\0" + bytes(20), False),
    "cut in the header": (b"Exif\0\0II*\0", False),
    "a folder behind the end": (b"Exif\0\0II*\0" + struct.pack("<L", 10**8), False),
    "random": (b"Exif\0\0" + bytes(range(7, 90)), False),
    "orientation 0": (exif_with(orientation(0)), False),
    "orientation 9": (exif_with(orientation(9)), False),
    "orientation as text": (exif_with(orientation(0x36, kind=2)), False),
    "a tag out of range": (exif_with(BAD_TAG, orientation(6)), True),
    "a tag behind the end": (exif_with(LOOSE_TAG, orientation(6)), True),
    "cut in the entries": (exif_with(BAD_TAG, orientation(6))[:-14], False),
}


@pytest.mark.parametrize("form", ["jpeg", "png", "webp", "mpo"])
@pytest.mark.parametrize("case", BROKEN_EXIF)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_exif_leaves_the_pixels(form, case):
    exif, is_turned = BROKEN_EXIF[case]
    half = np.zeros((8, 16, 3), np.uint8)
    half[:, :8] = 255
    image = open_upright(encoded(Image.fromarray(half), form, exif=exif))
    assert image.size == ((8, 16) if is_turned else (16, 8))
    array = np.asarray(image.convert("L"))
    assert array[0, 0] > 200 and array[-1, -1] < 50


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("form", ["png", "tiff"])
def test_every_orientation_is_as_pillow_turns_it(form, value):
    image = Image.fromarray(np.arange(24, dtype="uint8").reshape(2, 4, 3) * 10)
    exif = Image.Exif()
    exif[0x0112] = value
    stored = encoded(image, form, exif=exif)
    plain = encoded(image, "png", exif=exif)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(plain))))
    np.testing.assert_array_equal(np.asarray(open_upright(stored)), wanted)


def floats(*values):
    return encoded(Image.fromarray(np.array([values], "float32")), "tiff")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ((0, 0.5, 1), [0, 127, 255]),
        ((-0.001, 0.25, 1.001), [0, 63, 255]),
        ((np.nan, 0.5, np.inf), [0, 127, 255]),
        ((0, 0, 0), [0, 0, 0]),
        ((0, 2, 3), [0, 2, 3]),
        ((0, 77.5, 255), [0, 77, 255]),
        ((0, 0xAB12, 65535), [0, 0xAB, 255]),
    ],
)
def test_floats_are_brought_to_eight_bits(values, wanted):
    assert np.asarray(open_upright(floats(*values)))[0].tolist() == wanted


@pytest.mark.parametrize(
    "values",
    [(-1, 0, 1), (0, 0.3, 1.4), (0, 0.5, 300), (290.2, 301.5), (0, 70_000), (np.nan, np.nan)],
)
def test_floats_of_an_ambiguous_range_are_refused(values):
    with pytest.raises(
        InputError, match=r"image 0: cannot be decoded: floats from .*: must lie in"
    ):
        ImageFiles([floats(*values)], (1, 2), 1)[0]


@pytest.mark.parametrize("kind", ["<u2", ">u2", "<i4"])
def test_whole_numbers_keep_their_upper_eight_bits(kind):
    array = np.array([[0, 0x1234, 0xFFFF]], kind)
    image = {"<u2": "I;16", ">u2": "I;16B", "<i4": "I"}[kind]
    stored = encoded(Image.frombytes(image, (3, 1), array.tobytes()), "tiff")
    assert np.asarray(open_upright(stored))[0].tolist() == [0, 0x12, 0xFF]
    if kind == "<i4":
        stored = encoded(Image.fromarray(np.array([[-5, 70_000]], kind)), "tiff")
        with pytest.raises(OSError, match="whole numbers from -5 to 70000"):
            open_upright(stored)


def test_images_of_their_own_sizes_are_taken_one_at_a_time():
    sources = [encoded(Image.new("L", (3, height), height)) for height in (2, 2, 5)]
    images = ImageFiles(sources, (None, 4), 1)
    assert images.shape == (3, None, 4, 1)
    assert images[2].shape == (5, 4, 1) and images[[0, 1]].shape == (2, 2, 4, 1)
    with pytest.raises(InputError, match="one at a time"):
        images[np.arange(3)]


def test_a_copy_has_the_same_mark(tmp_path):
    raw = [encoded(Image.new("L", (3, 3), value)) for value in (1, 2)]
    (tmp_path / "copy.png").write_bytes(raw[1])
    first, second = split_marks(content_marks(ImageFiles(raw, 3, 1)), list)
    assert first != second
    assert content_marks(ImageFiles([tmp_path / "copy.png"], 5, 3)) == second


@pytest.mark.parametrize("size", [(50, 31), (31, 50), (40, 40), (300, 20), (9, 7), (33, 64)])
@pytest.mark.parametrize("edge", [16, 21])
def test_the_shorter_edge_is_that_of_the_trained_model(size, edge):
    from keras_resnet.preprocessing import ImagePreprocessing

    # Shown equal to torchvision's elsewhere. Here it gives grey levels.
    layer = ImagePreprocessing(edge, 3, std=1 / 255, resize="shorter_edge", antialias=True)
    image = Image.effect_noise(size, 80).convert("RGB")
    found = decode_image(encoded(image), (edge, edge), 3, "shorter_edge")
    difference = np.abs(found - np.asarray(layer(np.asarray(image)[None]))[0])
    assert difference.max() <= 1 and (difference > 0.5).mean() < 0.01


def test_images_that_are_kept_are_decoded_once(tmp_path, monkeypatch):
    for index in range(3):
        Image.new("L", (4, 4), 50 * index).save(tmp_path / f"{index}.png")
    sources = [tmp_path / f"{index}.png" for index in range(3)]
    images = ImageFiles(sources, 2, 1)
    # Memory for two of the three.
    monkeypatch.setattr("keras_resnet.datasets.images.MOST_KEPT", 9)
    images.keep()
    assert images[:][:, 0, 0, 0].tolist() == [0, 50, 100]
    for path in sources[:2]:
        path.unlink()
    assert images[[1, 0, 2]][:, 0, 0, 0].tolist() == [50, 0, 100]
    sources[2].unlink()
    with pytest.raises(InputError, match=r"2\.png: cannot be decoded"):
        images[[2]]
    # A part of the images keeps none of them.
    with pytest.raises(InputError, match=r"0\.png: cannot be decoded"):
        images.select([0])[:]
