"""Encoded images (files, or bytes in memory), which are decoded when a batch needs them."""

import base64
import contextlib
import hashlib
import io
import math
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from keras_resnet.utils import tables
from keras_resnet.utils.errors import InputError, look_up, one_line

# Modes with one grey value for each pixel. A palette counts as colour, whatever its colours are.
GREY_MODES = frozenset({"1", "L", "LA", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
_COLOUR_MODES = frozenset({"P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
# Pillow's own conversion of these to 8 bits clips at 255: a 16-bit image would become white.
_SIXTEEN_BIT_MODES = frozenset({"I", "I;16", "I;16L", "I;16B", "I;16N"})
_MODES = {1: "L", 3: "RGB"}
# EXIF orientation -> the transposition that turns the image upright. Other values change nothing.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Resampling moves floats in 0…1 outside by at most half of one of 255 levels.
_HALF_LEVEL = 0.5 / 255
# The smallest maximum of floats with fractions that are taken for values in 0…255.
_LEAST_OF_255 = 16
_MARK_LENGTH = 8
MOST_KEPT = 2**30
"""Bytes of decoded images that an `ImageFiles` keeps at most: 5,461 images of 256×256 in colour."""
# Pillow releases the interpreter lock while it decodes.
_THREADS = min(8, os.cpu_count() or 1)


def check_channels(channels):
    """Raises an `InputError` unless `channels` is 1 or 3."""
    if channels not in _MODES:
        raise InputError(f"`channels` must be 1 (grey) or 3 (colour), got {channels}")


def check_image_size(image_size):
    """Converts `image_size`, a positive whole number or a pair of them, to (height, width).

    None in a pair means each image's own height or width.

    Example:
        >>> check_image_size(32), check_image_size([24, 32]), check_image_size((None, None))
        ((32, 32), (24, 32), (None, None))
    """
    sizes = (
        tuple(image_size) if isinstance(image_size, (tuple, list, np.ndarray)) else (image_size,)
    )
    if len(sizes) not in (1, 2) or not all(
        (size is None and len(sizes) == 2)
        or (isinstance(size, (int, np.integer)) and not isinstance(size, bool) and size >= 1)
        for size in sizes
    ):
        raise InputError(
            f"`image_size` must be a positive whole number or (height, width), got {image_size}"
        )
    height, width = (None if size is None else int(size) for size in (sizes[0], sizes[-1]))
    return height, width


def open_upright(source):
    """Decodes an image to 8 bits a channel, upright by its orientation tag.

    16-bit grey images keep their upper 8 bits; see `float_scale` for floats.

    Args:
        source: A path, or the bytes of a file. The first frame of an animation is used.

    Returns:
        A Pillow image.

    Raises:
        Exception: Pillow raises many kinds on a damaged file (OSError, SyntaxError, ValueError,
            struct.error and more); callers treat all of them as "unreadable".
    """
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        # Up to twice its limit Pillow only warns, and warnings can be switched off.
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels")
        # Pillow can open images in other modes, such as LAB, but not convert them.
        if image.mode not in GREY_MODES | _COLOUR_MODES:
            raise OSError(f"pixels in the mode {image.mode} are not supported")
        image.load()
        return _to_eight_bits(_turn(image))


def explain_unreadable(error):
    """Returns the reason of an error that `open_upright` raised, without the file's name."""
    # Pillow's message names the buffer in memory and not the file.
    return "not an image" if isinstance(error, UnidentifiedImageError) else one_line(error)


def _turn(image):
    """Turns an image upright by its EXIF (or XMP) orientation; unchanged if that is unreadable.

    `ImageOps.exif_transpose` also rewrites the tags, and fails if another tag is broken.
    """
    try:
        method = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # broken tags raise many kinds of errors
        return image
    return image if method is None else image.transpose(method)


def _squash(image, width, height):
    """Resizes to the size, whatever the image's proportions."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _cover(image, width, height):
    """Resizes to the smallest size of the image's proportions that covers the size; cuts it out.

    The lengths and the offsets are those of torchvision's `Resize` and `CenterCrop`.
    """
    if image.width * height <= image.height * width:
        image = _squash(image, width, max(height, int(width * image.height / image.width)))
    else:
        image = _squash(image, max(width, int(height * image.width / image.height)), height)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


# How an image gets a size: "shorter_edge" resizes the shorter edge to it and cuts the middle out.
RESIZES = {"squash": _squash, "shorter_edge": _cover}


def decode_image(source, image_size, channels, resize="squash"):
    """Decodes one image.

    Transparent images get a white background; palettes, CMYK and other colour spaces become RGB.
    Grey is the luma of ITU-R 601-2. See `open_upright` for more than 8 bits a channel.

    Args:
        source: A path, or the bytes of a file.
        image_size: (height, width) of the result, by bilinear resizing with antialiasing; None for
            the image's own.
        channels: 1 or 3.
        resize: A row of `RESIZES`.

    Returns:
        A uint8 array, [height, width, channels].
    """
    image = open_upright(source)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(_MODES[channels])
    height, width = image_size[0] or image.height, image_size[1] or image.width
    image = RESIZES[resize](image, width, height)
    return np.asarray(image).reshape(height, width, channels)


def _to_eight_bits(image):
    """Converts an image to a mode of at most 8 bits a channel."""
    if image.mode in _SIXTEEN_BIT_MODES:
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise OSError(
                f"whole numbers from {pixels.min()} to {pixels.max()}: must lie in 0…65535"
            )
        return Image.fromarray((pixels >> 8).astype("uint8"))
    if image.mode == "F":
        pixels = np.asarray(image)
        scaled = np.nan_to_num(pixels.astype("float64") * float_scale(pixels), posinf=255)
        return Image.fromarray(scaled.clip(0, 255).astype("uint8"))
    return image


def float_scale(pixels):
    """Returns the factor that scales an image of floats to 0 … 255.

    Floats in 0 … 1 are multiplied by 255, floats up to 255 are not scaled, whole numbers up to
    65535 are taken for 16 bits. Other ranges are refused: a guess could give a black or a white
    image.

    Args:
        pixels: Floats, [height, width]; NaN and infinities are ignored.

    Raises:
        OSError: The range is ambiguous, or no pixel is finite.

    Example:
        >>> float_scale(np.array([[0.2, 0.9]])), float_scale(np.array([[0, 254.5]]))
        (255.0, 1.0)
    """
    finite = pixels[np.isfinite(pixels)]
    low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
    is_whole = bool((finite == finite.round()).all())
    if low >= -_HALF_LEVEL and high <= 1 + _HALF_LEVEL:
        return 255.0
    # Fractions with a maximum a little above 1 are rather an overshoot of 0…1 than a dark image.
    if low >= 0 and high <= 255 and (is_whole or high > _LEAST_OF_255):
        return 1.0
    if low >= 0 and high <= 65535 and is_whole:
        return 1 / 256
    raise OSError(
        f"floats from {low:.4g} to {high:.4g}: must lie in 0…1 or 0…255, or be whole numbers "
        "in 0…65535"
    )


@contextlib.contextmanager
def no_bomb_warnings():
    """Silences Pillow's warning of very large images, which `open_upright` refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def map_threads(function, items):
    """Yields `function(item)` for each item, in order, computed by a few threads.

    The threads end with the call: the threads of a permanent pool do not exist in a forked process.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        yield from pool.map(function, items)


def square_size(edges, image_size):
    """Returns the size of the squares that images of many sizes are decoded as.

    Args:
        edges: The images' shorter edges, in pixels.
        image_size: (height, width) that were asked for; None for the median shorter edge. An edge
            of None, for the images' own sizes, stays.

    Returns:
        (height, width): at most the median shorter edge, so that few images are enlarged.

    Example:
        >>> square_size([40, 50, 90], (64, 64)), square_size([40, 50, 90], (32, 32))
        ((50, 50), (32, 32))
    """
    if image_size is not None and None in image_size:
        return image_size
    median = int(np.median(edges))
    edge = median if image_size is None else min(*image_size, median)
    return edge, edge


def border_level(images):
    """Returns the median of the outermost pixels, an estimate of the background.

    Args:
        images: uint8, [count, height, width, channels].

    Returns:
        A number in 0 … 255; 0 is black.

    Example:
        >>> images = np.full((1, 5, 5, 1), 255, "uint8")
        >>> images[:, 1:-1, 1:-1] = 0
        >>> border_level(images)
        255.0
    """
    sides = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
    return float(np.median(np.concatenate([side.reshape(-1) for side in sides])))


class ImageFiles:
    """Encoded images with the interface of a uint8 array [count, height, width, channels].

    Indexing decodes images. Decoded images are not kept, unless `keep` was called.

    Attributes:
        sources: A tuple of paths, or of the bytes of files.
        shape: (count, height, width, channels).
        resize: The way in which images get their size, a row of `RESIZES`.

    Args:
        sources: Paths, or the bytes of files.
        image_size: (height, width), or one number for a square; see `check_image_size`. None
            stands for each image's own size, also in `shape`; images of several sizes must then
            be indexed one at a time.
        channels: 1 or 3.
        resize: A row of `RESIZES`.

    Raises:
        InputError: An argument is out of range; when indexed, an image cannot be decoded, or the
            images have several sizes.

    Example:
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (6, 4), "red").save(file, "png")
        >>> images = ImageFiles([file.getvalue()] * 3, image_size=(2, 3), channels=3)
        >>> images.shape, images[np.array([2, 0])].shape, images[1][0, 0].tolist()
        ((3, 2, 3, 3), (2, 2, 3, 3), [255, 0, 0])
    """

    dtype = np.dtype("uint8")

    def __init__(self, sources, image_size, channels, resize="squash"):
        check_channels(channels)
        look_up(RESIZES, resize, "resize")
        self.sources = tuple(sources)
        self.shape = (len(self.sources), *check_image_size(image_size), channels)
        self.resize = resize
        self._kept, self._is_kept = None, ()

    def __len__(self):
        return len(self.sources)

    def select(self, indices):
        """Returns the `ImageFiles` of an array of indices."""
        sources = (self.sources[i] for i in indices)
        return ImageFiles(sources, self.shape[1:3], self.shape[3], self.resize)

    @property
    def _has_size(self):
        return None not in self.shape[1:]

    def keep(self):
        """Keeps images in memory once they are decoded, the first `MOST_KEPT` bytes of them.

        Decoding a photograph of a telephone takes longer than a training step on it.
        """
        if self._has_size:
            count = min(len(self), MOST_KEPT // math.prod(self.shape[1:]))
            # The memory of an image is taken when it is written.
            self._kept = np.empty((count, *self.shape[1:]), self.dtype)
            self._is_kept = np.zeros(count, bool)

    def __getitem__(self, indices):
        """Decodes the images at `indices`, which index the first axis as those of an array do."""
        picked = np.arange(len(self))[indices]
        if picked.ndim == 0:
            return self._decode(picked)
        if not self._has_size:
            images = list(map_threads(self._decode, picked))
            if len({image.shape for image in images}) != 1:
                raise InputError("images of their own sizes must be taken one at a time")
            return np.stack(images)
        batch = np.empty((len(picked), *self.shape[1:]), self.dtype)
        for place, image in enumerate(map_threads(self._decode, picked)):
            batch[place] = image
        return batch

    def _decode(self, index):
        if index < len(self._is_kept) and self._is_kept[index]:
            return self._kept[index]
        source = self.sources[index]
        try:
            image = decode_image(source, self.shape[1:3], self.shape[3], self.resize)
        except Exception as error:  # see `open_upright`
            name = f"image {index}" if isinstance(source, bytes) else printable_path(source)
            raise InputError(f"{name}: cannot be decoded: {one_line(error)}") from error
        if index < len(self._is_kept):
            self._kept[index] = image
            self._is_kept[index] = True  # after the image: another thread may look
        return image


def content_marks(images):
    """Returns a short checksum of each encoded image's bytes, by which a copy is recognised.

    Args:
        images: An `ImageFiles`.

    Returns:
        A string of `_MARK_LENGTH` characters for each image: 48 bits of its sha256 in base64.

    Example:
        >>> images = ImageFiles([b"one", b"two", b"one"], 8, 1)
        >>> len(content_marks(images)), len(split_marks(content_marks(images)))
        (24, 2)
    """

    def mark(source):
        raw = source if isinstance(source, bytes) else Path(source).read_bytes()
        return base64.b64encode(hashlib.sha256(raw).digest()[:6]).decode()

    return "".join(map_threads(mark, images.sources))


def split_marks(marks, kind=set):
    """Returns the marks in a string of `content_marks`, as a set or another `kind`."""
    return kind(marks[i : i + _MARK_LENGTH] for i in range(0, len(marks), _MARK_LENGTH))


def printable_path(path):
    """Returns `path` as text that can be printed, even if its bytes are not UTF-8."""
    return tables.printable(os.fsencode(path).decode("utf-8", "replace"))
