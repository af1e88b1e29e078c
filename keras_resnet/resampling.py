"""Pillow's resampling inside a graph: two matrix products, whatever the image's height and width.

Pure `keras.ops`: any backend, and built-in operators of TFLite and ONNX. Height and width may be
unknown until the graph runs; the weights are computed from them.
"""

from collections.abc import Callable
from typing import NamedTuple

from keras import ops


def _triangle(distance, unit, dtype):
    return ops.maximum(unit - distance, 0)


def _cubic(distance, unit, dtype):
    """Keys's cubic with a = −0.5, in factors: 1 − t, which both of its parts have, is exact."""
    t, rest = (ops.cast(x, dtype) / ops.cast(unit, dtype) for x in (distance, unit - distance))
    outside = ops.square(ops.maximum(2 - t, 0)) / 2
    return rest * ops.where(t < 1, 1 + t - 1.5 * ops.square(t), outside)


class Filter(NamedTuple):
    """The filter of an interpolation.

    Attributes:
        reach: The distance from which on the weights are 0, in units of the filter.
        function: Function of distances between pixels, of the filter's unit, both whole numbers,
            and of a type. It returns weights up to a common factor, whole numbers or of that type.
    """

    reach: int
    function: Callable


FILTERS = {"bilinear": Filter(1, _triangle), "bicubic": Filter(2, _cubic)}


class Resampler(NamedTuple):
    """How a library resamples 8-bit images in two passes, each of which rounds to grey levels.

    Attributes:
        rows_first: Function of height, width, new height and new width that returns whether the
            vertical pass is the first; None where it never is.
        short_weights: Whether the weights of a pass have as many bits behind the point as let the
            largest have 16 in all; otherwise they have 22.
    """

    rows_first: Callable | None = None
    short_weights: bool = False


RESAMPLERS = {
    "pillow": Resampler(
        lambda height, width, new_height, new_width: (
            height - new_height > 2 * _maximum(0, width - new_width)
        )
    ),
    # Pillow until 12.
    "pillow12": Resampler(),
    # PyTorch's tensors; torchvision leaves images of Pillow to Pillow.
    "torch": Resampler(short_weights=True),
}

# name -> function of the pixels that a crop removes in total that returns how many come before it.
OFFSETS = {
    # int(round(margin / 2)) in Python, where halves go to the even number; timm uses it.
    "torchvision": lambda margin: margin // 2 + (margin % 4) // 3,
    "transformers": lambda margin: margin // 2,
}

# name -> function of height, width and the length asked for that returns the new height and width.
LENGTHS = {
    "squash": lambda height, width, length: (length, length),
    # The ratio is kept, and the longer edge rounded down.
    "shorter_edge": lambda height, width, length: tuple(
        length * edge // _minimum(height, width) for edge in (height, width)
    ),
}


def resample(
    images,
    image_size,
    resize,
    length,
    interpolation="bilinear",
    antialias=True,
    resampler="pillow",
    rounding="torchvision",
    dtype="float32",
):
    """Returns the centre of resized images; only the rows and columns that it holds are computed.

    With `antialias` it is `Image.resize` of 8-bit images: the filter grows with the scale, and each
    of two passes rounds to whole grey levels in 0 … 255. Without, it is `tf.image.resize`, which
    does neither.

    Args:
        images: (batch, height, width, channels), whole numbers in 0 … 255 of any type. height × the
            resized height must be below 2**30, and so for the width.
        image_size: Edge of the square that is returned, in pixels.
        resize: A row of `LENGTHS`: "squash" or "shorter_edge".
        length: The new length of both edges, or of the shorter one; at least `image_size`.
        interpolation: A row of `FILTERS`: "bilinear" or "bicubic".
        antialias: Whether to resample as Pillow does.
        resampler: A row of `RESAMPLERS`, where `antialias`: "pillow", "pillow12" or "torch".
        rounding: A row of `OFFSETS`: the library whose crop it is, "torchvision" or "transformers".
        dtype: The type to compute in, "float32" or "float64".

    Returns:
        (batch, image_size, image_size, channels), of `dtype`.

    Source:
        The rules of the resampling: Pillow, `src/libImaging/Resample.c`; PyTorch,
        `aten/src/ATen/native/cpu/UpSampleKernel.cpp`.

    Example:
        >>> images = ops.reshape(ops.arange(2 * 4), (1, 2, 4, 1))
        >>> ops.convert_to_numpy(resample(images, 2, "squash", 2))[0, :, :, 0].tolist()
        [[1.0, 2.0], [5.0, 6.0]]
    """
    height, width = ops.shape(images)[1:3]
    new_height, new_width = LENGTHS[resize](height, width, length)
    library = RESAMPLERS[resampler]
    rows_first = (
        antialias
        and library.rows_first is not None
        and library.rows_first(height, width, new_height, new_width)
    )
    sides = []
    for old, new in ((height, new_height), (width, new_width)):
        unit = 2 * (_maximum(old, new) if antialias else new)
        offset = OFFSETS[rounding](new - image_size)
        span = _span(old, new, offset, image_size, FILTERS[interpolation].reach * unit)
        sides.append((old, new, unit, offset, *span))
    x = images[:, slice(*sides[0][-2:]), slice(*sides[1][-2:])]
    # The columns first; or the image is turned around, before and after.
    x = _swapped_if(rows_first, ops.transpose(x, (0, 3, 1, 2)))
    for side, other in (sides[::-1], sides):
        old, new, unit, offset, begin, end = (
            _where(rows_first, b, a) for a, b in zip(side, other, strict=True)
        )
        pixels = ops.arange(end - begin, dtype="int32") + begin
        kept = ops.arange(image_size, dtype="int32") + offset
        weights = _weights(old, new, unit, pixels, kept, interpolation, dtype)
        total = ops.sum(weights, axis=0, keepdims=True)
        x = ops.cast(x, dtype)
        if antialias:
            scale = 2**22
            if library.short_weights:
                # The largest weights can be those at the edge, which a crop may not keep.
                edge = ops.minimum(ops.arange(4, dtype="int32"), new - 1)
                pixels = ops.arange(old, dtype="int32")
                edge = _weights(old, new, unit, pixels, edge, interpolation, dtype)
                scale = ops.minimum(_short_scale(weights, dtype), _short_scale(edge, dtype))
            x = _product_in_grey_levels(x, weights, total, scale)
        else:
            x = ops.matmul(x, ops.cast(weights, dtype) / ops.cast(total, dtype))
        x = ops.swapaxes(x, 2, 3)
    return ops.transpose(_swapped_if(rows_first, x), (0, 2, 3, 1))


def _span(old, new, offset, count, reach):
    """Returns the first input pixel with a weight in `count` output pixels, and the last plus 1.

    Args:
        old: The old length.
        new: The new length.
        offset: The first of the output pixels.
        count: How many output pixels there are.
        reach: The distance from which on weights are 0, see `_weights`.
    """
    first, last = 2 * offset + 1, 2 * (offset + count) - 1
    begin = _maximum(first * old - reach, 0) // (2 * new)
    return begin, _minimum((last * old + reach) // (2 * new) + 1, old)


def _where(condition, yes, no):
    """Returns `yes` or `no`, both whole numbers; the graph chooses if it knows the condition."""
    if isinstance(condition, bool):
        return yes if condition else no
    return ops.where(condition, yes, no)


def _swapped_if(condition, x):
    """Returns `x` with its last two axes swapped if a condition holds.

    TFLite's `IF` would do, but LiteRT 2.3 writes beside its memory where an image has another
    height and width than the one before.
    """
    if isinstance(condition, bool):
        return ops.swapaxes(x, 2, 3) if condition else x
    batch, channels, rows, columns = ops.shape(x)
    flat = [ops.reshape(each, (-1,)) for each in (x, ops.swapaxes(x, 2, 3))]
    x = ops.take(ops.stack(flat), ops.where(condition, 1, 0), axis=0)
    shape = (_where(condition, columns, rows), _where(condition, rows, columns))
    return ops.reshape(x, (batch, channels, *shape))


def _weights(old, new, unit, pixels, rows, interpolation, dtype):
    """Returns the weights of input pixels for the output pixels `rows`, up to a factor each.

    Distances are in units of 1 / (2 × new) input pixels, where the centres of all pixels, counted
    from the centre of the image, are whole numbers: rounding begins only behind the filter.
    """
    pixels = ops.expand_dims(2 * pixels + 1 - old, 1)
    distances = ops.abs((2 * rows + 1 - new) * old - pixels * new)
    return FILTERS[interpolation].function(distances, unit, dtype)


def _short_scale(weights, dtype):
    """Returns the largest power of two, at most 2**22, that leaves all weights below 2**15."""
    weights = ops.cast(weights, dtype)
    largest = ops.max(weights / ops.sum(weights, axis=0, keepdims=True))
    scales = ops.array([2**power for power in range(23)], "int32")
    return ops.max(ops.where(ops.cast(scales, dtype) * largest < 2**15 - 0.5, scales, 0))


def _product_in_grey_levels(x, weights, total, scale):
    """Returns x @ (weights / total) as a library of 8-bit images does, in 0 … 255.

    The library's weights are whole multiples of 1 / `scale`. Here each has two parts of 11 bits:
    float32 (and TensorFloat-32) adds the products of such parts and of 0 … 255 without an error, in
    any order, as long as their sum is below 2**24. So every runtime gets the library's grey levels.
    """
    exact = ops.cast(total, x.dtype)
    weights = weights * ops.cast(scale // 2**11, weights.dtype)
    high = ops.floor(ops.cast(weights, x.dtype) / exact + 0.5)
    rest = ops.cast(weights - ops.cast(high, weights.dtype) * total, x.dtype)
    low = ops.floor(rest * 2**11 / exact + 0.5)
    x, count = ops.matmul(x, ops.concatenate([high, low], axis=1)), high.shape[1]
    scale = ops.cast(scale, x.dtype)
    high, low = x[..., :count] * 2**11 / scale + 0.5, x[..., count:] / scale
    whole = ops.floor(high)
    return ops.clip(whole + ops.floor((high - whole) + low), 0, 255)


def _minimum(a, b):
    """Returns the smaller of two whole numbers; a number of Python if both are."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else ops.minimum(a, b)


def _maximum(a, b):
    """Returns the larger of two whole numbers; a number of Python if both are."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else ops.maximum(a, b)
