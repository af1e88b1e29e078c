"""Grad-CAM: which part of an image speaks for a class."""

import keras
import numpy as np
from keras import ops
from PIL import Image

from keras_resnet.preprocessing import ImagePreprocessing
from keras_resnet.utils.arrays import as_images
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.geometry import resized_length


def grad_cam(model, images, classes=None):
    """Returns where each image speaks for a class, by Grad-CAM.

    Grad-CAM weighs the channels of the last feature map by the mean gradient of the class's logit.
    Behind global average pooling and one dense layer that gradient is the weight of the dense layer
    divided by the number of positions, everywhere, so no gradient has to be computed: the map is
    that of CAM (Zhou et al. 2016), on every backend.

    Args:
        model: A network of `build_resnet`, which takes floats, or one with preprocessing before it,
            which takes uint8.
        images: Images of one size, (count, height, width, 1 or 3), as the model takes them.
        classes: The class to look for in each image, whole numbers (count,); by default the
            predicted one.

    Returns:
        float32, (count, height, width): from 0 to 1, the largest value of each image; all 0 where
        nothing speaks for the class, and outside of the part that the preprocessing cuts out.

    Raises:
        InputError: If the model is no network of global average pooling and one dense layer, or
            `classes` are not one of its classes for each image.

    Source:
        Selvaraju et al., Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
        Localization, 2017, section 3, equations 1 and 2.

    Example:
        >>> from keras_resnet import Spec, build_resnet
        >>> network = build_resnet(Spec((1,), (4,)), (32, 32, 3), 2)
        >>> maps = grad_cam(network, np.random.default_rng(0).random((5, 32, 32, 3), "float32"))
        >>> maps.shape, bool(0 <= maps.min() <= maps.max() <= 1)
        ((5, 32, 32), True)
    """
    network, before = _find_network(model)
    if before:
        images = as_images(images, "grad_cam")
    pooling = network.get_layer("global_avg_pool")
    features = keras.Model(network.inputs, [pooling.input, network.outputs[0]])
    x = ops.convert_to_tensor(images)
    for layer in before:
        x = layer(x, training=False)
    maps, logits = (ops.convert_to_numpy(each) for each in features(x, training=False))
    if classes is None:
        classes = logits.argmax(axis=-1)
    classes = _check_classes(classes, *logits.shape)
    kernel = ops.convert_to_numpy(network.get_layer("logits").kernel)
    weights = kernel[:, classes].astype("float32")
    heat = np.maximum(np.einsum("nhwc,cn->nhw", maps.astype("float32"), weights), 0)
    heat /= np.maximum(heat.max(axis=(1, 2), keepdims=True), np.finfo("float32").tiny)
    height, width = images.shape[1:3]
    box = _find_box(before, height, width)
    return np.stack([_place(each, box, height, width) for each in heat])


def _check_classes(classes, images, count):
    """Returns `classes` as an array."""
    found = np.asarray(classes)
    whole = found.shape == (images,) and np.issubdtype(found.dtype, np.integer)
    if not whole or np.any((found < 0) | (found >= count)):
        raise InputError(
            f"`classes` must be {images} whole numbers from 0 to {count - 1}, got {classes}"
        )
    return found


def _find_network(model):
    """Returns the network in a model, and the layers before it, without the input."""
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    inner = layers[-1] if isinstance(layers[-1], keras.Model) else None
    network = inner or model
    names = [layer.name for layer in network.layers]
    if names[-2:] != ["global_avg_pool", "logits"]:
        raise InputError(
            "Grad-CAM needs a network that ends in global_avg_pool and logits, as those of "
            f"`build_resnet` do, got {model.name}, which ends in {', '.join(names[-2:])}"
        )
    return network, layers[:-1] if inner else []


def _find_box(layers, height, width):
    """Returns (left, top, right, bottom) of the part of an image that the network sees."""
    layer = next((each for each in layers if isinstance(each, ImagePreprocessing)), None)
    if layer is None:
        return 0, 0, width, height
    share = layer.image_size / resized_length(layer.image_size, layer.crop_pct)
    seen_height, seen_width = share * height, share * width
    if layer.resize == "shorter_edge":
        seen_height = seen_width = share * min(height, width)
    left, top = round((width - seen_width) / 2), round((height - seen_height) / 2)
    return left, top, left + round(seen_width), top + round(seen_height)


def _place(heat, box, height, width):
    """Returns a map (height, width) with `heat` in the box and zeros around it."""
    left, top, right, bottom = box
    size = (right - left, bottom - top)
    placed = np.zeros((height, width), "float32")
    resized = Image.fromarray(heat).resize(size, Image.Resampling.BILINEAR)
    placed[top:bottom, left:right] = np.clip(np.asarray(resized), 0, 1)
    return placed
