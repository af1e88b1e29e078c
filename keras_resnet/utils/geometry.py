"""The lengths of images that are resized, and then cut to a square."""

import math

from keras_resnet.utils.errors import InputError


def resized_length(image_size, crop_pct):
    """Returns the edge of the resized image, whose centre of `image_size` pixels is kept.

    It is computed as timm and transformers compute it.

    Example:
        >>> resized_length(224, 0.875), resized_length(224, 0.95), resized_length(224, 1.0)
        (256, 235, 224)
    """
    return math.floor(image_size / crop_pct)


def find_crop_pct(image_size, resize_size):
    """Returns the `crop_pct` of a preprocessing that is published as two lengths.

    Args:
        image_size: Edge of the crop, in pixels.
        resize_size: The length that the image is resized to before, at least `image_size`.

    Raises:
        InputError: If the crop is larger than the resized image.

    Example:
        >>> resized_length(224, find_crop_pct(224, 232))
        232
    """
    if not 0 < image_size <= resize_size:
        raise InputError(
            f"`resize_size` must be at least the size of the crop, {image_size}, got {resize_size}"
        )
    crop_pct = image_size / resize_size
    if resized_length(image_size, crop_pct) == resize_size:
        return crop_pct
    # The quotient was rounded up; the number below it is right.
    return math.nextafter(crop_pct, 0)
