"""A model of images that were resized and cropped already, together with that step."""

import keras
import numpy as np

from keras_resnet.preprocessing import ImagePreprocessing
from keras_resnet.runtimes.base import Runtime, Tensor
from keras_resnet.utils.errors import InputError, one_line

RESIZING = ("resize", "crop_pct", "interpolation", "antialias", "resampler", "rounding")
"""The arguments of `ImagePreprocessing` that describe how images are resized and cropped."""


def make_resizer(image_size, channels, **resizing):
    """Returns a function that resizes and crops images as a model's preprocessing does.

    Args:
        image_size: Edge of the result, in pixels.
        channels: Channels of the result.
        **resizing: The arguments in `RESIZING`.

    Returns:
        A function from uint8 images, [count, height, width, channels], to uint8 images of one size.

    Example:
        >>> resize = make_resizer(4, 3, resize="shorter_edge", antialias=True)
        >>> resize(np.zeros((1, 9, 12, 3), "uint8")).shape
        (1, 4, 4, 3)
    """
    levels = {"mean": 0.0, "std": 1 / 255}  # the normalised image is that of 0 … 255
    layer = ImagePreprocessing(image_size, channels, **levels, **resizing, dtype="float32")
    return lambda images: np.rint(keras.ops.convert_to_numpy(layer(images))).astype("uint8")


def find_resizing(metadata):
    """Returns the resizing that the caller of an exported file must do; None if the file does it.

    Args:
        metadata: The metadata of the file, or the manifest of its folder: a dict.
    """
    described = metadata.get("preprocessing")
    step = described.get("resizing") if isinstance(described, dict) else None
    return step if isinstance(step, dict) and step.get("done_by") == "caller" else None


def resized(runtime):
    """Returns a runtime of images of any size, where the file's metadata say how to resize them.

    Args:
        runtime: A `Runtime`; one of a file that resizes images itself is returned unchanged.

    Raises:
        InputError: If the metadata are damaged.
    """
    step = find_resizing(runtime.metadata)
    if step is None or not runtime.takes_images:
        return runtime
    return ResizedRuntime(runtime, {name: step[name] for name in RESIZING if name in step})


class ResizedRuntime(Runtime):
    """A model of resized images that gets images of any size; see `Runtime`.

    Args:
        runtime: The `Runtime` of the model.
        resizing: The arguments in `RESIZING`, a dict.
    """

    def __init__(self, runtime, resizing):
        super().__init__(runtime.path, runtime.metadata, runtime.threads)
        self._runtime = runtime
        self.format, self.operators = runtime.format, runtime.operators
        size, channels = runtime.input.shape[1], runtime.input.shape[-1]
        try:
            self._resize = make_resizer(size, channels, **resizing)
        except (InputError, TypeError, ValueError) as error:
            raise InputError(f"{self.name}: damaged: its metadata: {one_line(error)}") from error
        self.input = Tensor(runtime.input.name, (None, None, None, channels), "uint8")
        self.output = runtime.output
        self.graph_kind = runtime.graph_kind

    def call(self, images):
        """Returns the output for one batch of images of one size."""
        # The model can have a fixed batch size.
        return self._runtime.run(self._resize(images))

    def close(self):
        """Closes the runtime of the model."""
        self._runtime.close()
