"""Pillow's resizing with the two passes in the order of one of its versions."""

import numpy as np
import PIL
from PIL import Image

# The row of `resampling.RESAMPLERS` that the installed Pillow is.
PILLOW = "pillow" if int(PIL.__version__.partition(".")[0]) >= 13 else "pillow12"

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def pillow_resize(image, new_height, new_width, interpolation, version=PILLOW):
    """Returns an image of 8 bits, channels last, resized by Pillow; each pass is a call of its own.

    Args:
        image: (height, width, 3), uint8.
        new_height: The new height.
        new_width: The new width.
        interpolation: "bilinear" or "bicubic".
        version: "pillow" for Pillow 13's order of the passes, "pillow12" for that of before.
    """
    height, width = image.shape[:2]
    between = (new_width, height)
    if version == "pillow" and height - new_height > 2 * max(0, width - new_width):
        between = (width, new_height)
    resized = Image.fromarray(image)
    for size in (between, (new_width, new_height)):
        resized = resized.resize(size, FILTERS[interpolation])
    return np.asarray(resized)
