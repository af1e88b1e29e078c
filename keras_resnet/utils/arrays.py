"""The rules for what goes into a model: a batch of images, and labels.

`Split` and every `Runtime` ask here, so that images are accepted or refused in one way.
"""

import numpy as np

from keras_resnet.utils.errors import InputError, one_line

_OPEN = ("height", "width", "1 or 3")
_LAYOUT = "uint8 images (count, height, width, 1 or 3)"
# NumPy arithmetic and Python lists give these; their numbers are checked one by one.
_WIDE_INTEGERS = ("int32", "int64", "uint32", "uint64")


def check_image_shape(shape, name, wanted=(None, None, None)):
    """Checks the shape of a batch of images.

    Args:
        shape: That of the batch: (count, height, width, channels).
        name: What takes the images, for messages.
        wanted: (height, width, channels); None is any size.

    Raises:
        InputError: If it does not fit; the message says how to correct it.

    Example:
        >>> check_image_shape((28, 28, 1), "model.keras", (28, 28, 1))
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: model.keras: it takes uint8 images (count, 28, \
28, 1), got the shape (28, 28, 1): one image needs its batch axis, `images[None]`
    """
    shape, wanted = tuple(shape), tuple(wanted)
    if len(shape) == 4 and _fits(shape[1:], wanted):
        return
    sizes = [size or word for size, word in zip(wanted, _OPEN, strict=True)]
    hint = _shape_hint(shape, wanted)
    raise InputError(
        f"{name}: it takes uint8 images ({', '.join(map(str, ['count', *sizes]))}), got the shape "
        f"{shape!s:.80}{hint and ': '}{hint}"
    )


def _fits(found, wanted):
    """Returns whether (height, width, channels) are those wanted; open channels are 1 or 3."""
    return all(limit in (None, size) for size, limit in zip(found, wanted, strict=True)) and found[
        -1
    ] in (wanted[-1], 1, 3)


def _shape_hint(shape, wanted):
    """Returns how to correct a shape; an empty string where there is no one way."""
    channels = wanted[-1]
    if len(shape) == 3 and shape[-1] in (1, 3) and _fits(shape, wanted):
        return "one image needs its batch axis, `images[None]`"
    if len(shape) == 3 and channels in (None, 1) and _fits((*shape[1:], 1), wanted):
        return "grey images need a channel axis, `images[..., None]`"
    if len(shape) == 2 and channels in (None, 1) and _fits((*shape, 1), wanted):
        return "one grey image needs a batch axis and a channel axis, `images[None, ..., None]`"
    if len(shape) != 4:
        return ""
    _, first, *rest = shape
    if first in (1, 3) and rest[-1] not in (1, 3) and _fits((*rest, first), wanted):
        return "channels come last, `images.transpose(0, 2, 3, 1)`"
    if channels == 3 and shape[-1] == 1:
        return "it takes colour: repeat the grey channel, `np.repeat(images, 3, axis=-1)`"
    if channels == 1 and shape[-1] == 3:
        return "it takes grey images: convert them first"
    return "resize the images first" if shape[-1] in (channels, 1, 3) else ""


def as_images(images, name, wanted=(None, None, None)):
    """Returns a batch of images as a model takes them.

    Args:
        images: uint8, [count, height, width, channels]: an array, a tensor, or nested lists;
            wider integers are accepted if all of them are in 0 … 255.
        name: What takes the images, for messages.
        wanted: (height, width, channels); None is any size.

    Returns:
        uint8, [count, height, width, channels].

    Raises:
        InputError: If they are no such images; the message says how to correct them.

    Example:
        >>> as_images([[[[0], [255]]]], "model.keras").dtype
        dtype('uint8')
        >>> as_images(np.full((1, 2, 2, 1), 0.5), "model.keras")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: model.keras: it takes uint8 images (count, height, \
width, 1 or 3), got float64 in 0.5 … 0.5: `(images * 255).round().astype("uint8")`
    """
    images = as_array(images, f"{name}: it takes {_LAYOUT}")
    check_image_type(images.dtype, name, images)
    check_image_shape(images.shape, name, wanted)
    return np.ascontiguousarray(images, "uint8")


def check_image_type(dtype, name, images=None):
    """Checks the type of a batch of images.

    Args:
        dtype: The type.
        name: What takes the images, for messages.
        images: The images, an array, where there are any: their range decides about integers.

    Raises:
        InputError: If it is not uint8, or integers with numbers beyond 0 … 255.
    """
    dtype = np.dtype(dtype)
    if dtype == np.uint8:
        return
    low, high = _range(images)
    if str(dtype) in _WIDE_INTEGERS and low is not None and 0 <= low <= high <= 255:
        return
    found = f"{dtype}" if low is None else f"{dtype} in {low:g} … {high:g}"
    raise InputError(f"{name}: it takes {_LAYOUT}, got {found}: {_type_hint(dtype, low, high)}")


def _range(images):
    """Returns the smallest and the largest number; None twice where there are no numbers."""
    if images is None or images.dtype.kind not in "biuf":
        return None, None
    return (images.min().item(), images.max().item()) if images.size else (0, 0)


def _type_hint(dtype, low, high):
    """Returns how numbers of a type and range become bytes."""
    known = low is not None
    if dtype.kind == "b" or (dtype.kind == "f" and known and 0 <= low <= high <= 1):
        return '`(images * 255).round().astype("uint8")`'
    if dtype.kind == "f" and known and 0 <= low <= high <= 255:
        return 'if they are in 0 … 255, `images.round().astype("uint8")`'
    if dtype.kind in "iu" and known and 0 <= low <= high <= 65535:
        return (
            'if they are in 0 … 255, `images.astype("uint8")`, and of 16 bits '
            '`(images // 257).astype("uint8")`'
        )
    return "give the raw images, numbers from 0 to 255, not normalised ones"


def as_array(values, rule):
    """Returns an array of what NumPy can convert: arrays, tensors, nested lists.

    Args:
        values: The values.
        rule: What they must be, for messages.

    Raises:
        InputError: If NumPy cannot convert them, or makes Python objects of them.
    """
    try:
        array = np.asarray(values)
    # Tensors on another device, or of a graph that is not run, have errors of their own.
    except Exception as error:
        raise InputError(f"{rule}, got {type(values).__name__}: {one_line(error)}") from error
    if array.dtype.kind == "O":
        raise InputError(f"{rule}, got {type(values).__name__} of objects that are no numbers")
    return array


def as_labels(labels, classes=None):
    """Returns labels as whole numbers.

    Args:
        labels: Whole numbers, [count] or [count, 1]: an array, a tensor or a list.
        classes: How many classes there are; None where that is not known yet. TFDS marks images
            without a label by −1, and a loader leaves them out.

    Returns:
        int64, [count].

    Raises:
        InputError: If they are one-hot, floats, or outside the classes; the message says how to
            correct them.

    Example:
        >>> as_labels([[2], [0]], classes=3).tolist()
        [2, 0]
        >>> as_labels(np.eye(3, dtype=int))
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: labels must be whole numbers, one an image, got \
int64 of the shape (3, 3): of one-hot labels take `labels.argmax(axis=1)`
    """
    rule = "labels must be whole numbers, one an image"
    labels = as_array(labels, rule)
    got = f"{rule}, got {labels.dtype} of the shape {labels.shape}"
    if labels.ndim == 2 and labels.shape[1] != 1:
        raise InputError(f"{got}: of one-hot labels take `labels.argmax(axis=1)`")
    if labels.ndim not in (1, 2):
        raise InputError(got)
    # An empty list is one of floats.
    if labels.size and labels.dtype.kind not in "biu":
        hint = ': `labels.astype("int64")`' if labels.dtype.kind == "f" else ""
        raise InputError(f"{got}{hint}")
    for label in (labels.min(), labels.max()) if labels.size and classes is not None else ():
        if not 0 <= label < classes:
            raise InputError(
                f"each label must be in 0 … {classes - 1}, since there are {classes} class names, "
                f"got {label}"
            )
    return labels.reshape(-1).astype("int64", copy=False)
