"""Checks and conversions of a model's inputs: a batch of images, and labels.

`Split` and every `Runtime` use them, so that all accept and refuse the same images.
"""

import numpy as np

from keras_resnet.utils.errors import InputError, one_line

_OPEN = ("height", "width", "1 or 3")
_LAYOUT = "uint8 images (count, height, width, 1 or 3)"
# The types of NumPy arithmetic and Python lists: accepted if all values are in 0 … 255.
_WIDE_INTEGERS = ("int32", "int64", "uint32", "uint64")


def check_image_shape(shape, name, wanted=(None, None, None)):
    """Checks the shape of a batch of images.

    Args:
        shape: (count, height, width, channels).
        name: The model or split, for messages.
        wanted: (height, width, channels); None is any size.

    Raises:
        InputError: The shape does not match; the message says how to correct it.

    Example:
        >>> check_image_shape((28, 28, 1), "model.keras", (28, 28, 1))
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: model.keras: it takes uint8 images (count, 28, \
28, 1), got the shape (28, 28, 1): one image needs its batch axis, `images[None]`
    """
    shape, wanted = tuple(shape), tuple(wanted)
    if _matches(shape, wanted):
        return
    sizes = [size or word for size, word in zip(wanted, _OPEN, strict=True)]
    hint = _shape_hint(shape, wanted)
    raise InputError(
        f"{name}: it takes uint8 images ({', '.join(map(str, ['count', *sizes]))}), got the shape "
        f"{shape!s:.80}{hint and ': '}{hint}"
    )


def _matches(shape, wanted):
    """Returns whether a batch has the wanted sizes; open channels are 1 or 3."""
    if len(shape) != 4 or shape[-1] not in (wanted[-1], 1, 3):
        return False
    return all(limit in (None, size) for size, limit in zip(shape[1:], wanted, strict=True))


def _shape_hint(shape, wanted):
    """Returns how to correct a shape; an empty string if there is no single way."""
    corrected = {
        "one image needs its batch axis, `images[None]`": (1, *shape),
        "grey images need a channel axis, `images[..., None]`": (*shape, 1),
        "one grey image needs a batch and a channel axis, `images[None, ..., None]`": (
            1,
            *shape,
            1,
        ),
        "channels come last, `images.transpose(0, 2, 3, 1)`": (*shape[:1], *shape[2:], *shape[1:2]),
    }
    for hint, result in corrected.items():
        if _matches(result, wanted):
            return hint
    if len(shape) != 4:
        return ""
    channels = wanted[-1]
    if channels == 3 and shape[-1] == 1:
        return "it takes colour: repeat the grey channel, `np.repeat(images, 3, axis=-1)`"
    if channels == 1 and shape[-1] == 3:
        return "it takes grey images: convert them first"
    return "resize the images first" if shape[-1] in (channels, 1, 3) else ""


def as_images(images, name, wanted=(None, None, None)):
    """Converts images to a batch for a model.

    Args:
        images: uint8, [count, height, width, channels]: an array, a tensor, or nested lists.
            Wider integers are accepted if all of them are in 0 … 255.
        name: The model or split, for messages.
        wanted: (height, width, channels); None is any size.

    Returns:
        uint8, [count, height, width, channels].

    Raises:
        InputError: The type or the shape is another one; the message says how to correct it.

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
        name: The model or split, for messages.
        images: The images, an array, if they are in memory. Integers are accepted by their range.

    Raises:
        InputError: The type is neither uint8 nor an integer with all values in 0 … 255.
    """
    dtype = np.dtype(dtype)
    if dtype == np.uint8:
        return
    low = high = None
    if images is not None and images.dtype.kind in "biuf":
        low, high = (images.min().item(), images.max().item()) if images.size else (0, 0)
    if str(dtype) in _WIDE_INTEGERS and low is not None and 0 <= low <= high <= 255:
        return
    found = f"{dtype}" if low is None else f"{dtype} in {low:g} … {high:g}"
    raise InputError(f"{name}: it takes {_LAYOUT}, got {found}: {_type_hint(dtype, low, high)}")


def _type_hint(dtype, low, high):
    """Returns how to convert values of a type and range to bytes."""
    known = low is not None
    if dtype.kind == "b" or (dtype.kind == "f" and known and 0 <= low <= high <= 1):
        return '`(images * 255).round().astype("uint8")`'
    if dtype.kind == "f" and known and 0 <= low <= high <= 255:
        return 'if they are in 0 … 255, `images.round().astype("uint8")`'
    if dtype.kind in "iu" and known and 0 <= low <= high <= 65535:
        return (
            'if they are in 0 … 255, `images.astype("uint8")`, and for 16 bits '
            '`(images // 257).astype("uint8")`'
        )
    return "give the raw images, numbers from 0 to 255, not normalised ones"


def as_array(values, rule):
    """Converts arrays, tensors or nested lists to a NumPy array.

    Args:
        values: The values.
        rule: The requirement, for messages.

    Raises:
        InputError: NumPy cannot convert them, or makes Python objects of them.
    """
    try:
        array = np.asarray(values)
    except Exception as error:  # tensors on another device, or symbolic ones, raise their own
        raise InputError(f"{rule}, got {type(values).__name__}: {one_line(error)}") from error
    if array.dtype.kind == "O":
        raise InputError(f"{rule}, got {type(values).__name__} of objects that are not numbers")
    return array


def as_labels(labels, classes=None):
    """Converts labels to int64.

    Args:
        labels: Whole numbers, [count] or [count, 1]: an array, a tensor or a list.
        classes: The number of classes; None if it is not known yet. TFDS gives images without a
            label the label −1, and a loader leaves them out.

    Returns:
        int64, [count].

    Raises:
        InputError: The labels are one-hot, floats, or out of range; the message says how to
            correct them.

    Example:
        >>> as_labels([[2], [0]], classes=3).tolist()
        [2, 0]
        >>> as_labels(np.eye(3, dtype=int))
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: labels must be whole numbers, one for each image, \
got int64 of the shape (3, 3): convert one-hot labels with `labels.argmax(axis=1)`
    """
    rule = "labels must be whole numbers, one for each image"
    labels = as_array(labels, rule)
    got = f"{rule}, got {labels.dtype} of the shape {labels.shape}"
    if labels.ndim == 2 and labels.shape[1] != 1:
        raise InputError(f"{got}: convert one-hot labels with `labels.argmax(axis=1)`")
    if labels.ndim not in (1, 2):
        raise InputError(got)
    # NumPy makes an array of floats from an empty list.
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
