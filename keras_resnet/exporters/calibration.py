"""Training images for int8, which find the range of each tensor."""

import numpy as np

from keras_resnet.evaluation.inference import resize_to_model
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.progress import note

CALIBRATION_IMAGES = 300


def calibration_images(serving, data, options):
    """Returns training images, evenly over the classes, as inputs of the exported file.

    Args:
        serving: The `Serving`.
        data: The `Dataset`. If all its images are evaluated, some of them calibrate, too.
        options: The options that it was loaded with.

    Returns:
        An array; a list of arrays for images of several sizes.

    Raises:
        InputError: If it has no training images.
    """
    if not len(data.splits.get("train", ())):
        raise InputError(f"{data.name}: int8 needs training images, and there are none")
    if data.evaluation_split == "validation" and options.get("validation_split", 0) is None:
        note(
            f"{data.name}: int8 is calibrated on some of the images that it is evaluated on, since "
            "all are evaluated"
        )
    split = resize_to_model(data.splits["train"], serving.raw_shape)
    some = draw_evenly(split.labels, CALIBRATION_IMAGES)
    if None in split.images.shape[1:]:
        return [serving.prepare(split.images[[index]])[0] for index in some]
    return serving.prepare(split.images[some])


def draw_evenly(labels, count):
    """Draws images as evenly over the classes as their numbers allow.

    Args:
        labels: int64, [images].
        count: The number of images to draw; all if there are fewer.

    Returns:
        Their positions, int64, [count], ascending.

    Example:
        >>> draw_evenly(np.array([0, 0, 0, 0, 1, 2]), 4).tolist()
        [0, 1, 4, 5]
    """
    labels = np.asarray(labels)
    # The rank of an image within its class: 0 for the first of each.
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), "int64")
    ranks[order] = np.arange(len(labels)) - starts
    return np.sort(np.argsort(ranks, kind="stable")[:count])
