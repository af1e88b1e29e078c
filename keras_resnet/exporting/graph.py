"""The one function that every exported file holds: raw images to probabilities."""

import contextlib
import dataclasses

import keras
import tensorflow as tf

from keras_resnet.errors import InputError
from keras_resnet.preprocessing import ImagePreprocessing
from keras_resnet.runtimes import base
from keras_resnet.runtimes.keras_file import KerasRuntime

IMAGE = "image"
PROBABILITIES = "probabilities"
LOGITS = "logits"


@dataclasses.dataclass(frozen=True)
class Contract:
    """Names, shapes and dtypes that an exported file must have.

    Attributes:
        image_shape: (height, width, channels).
        dtype: Of the input: "uint8" with preprocessing inside, "float32" without.
        output: "probabilities" or "logits".
        classes: How many.
    """

    image_shape: tuple[int, int, int]
    dtype: str
    output: str
    classes: int


class Serving:
    """A Keras model as TensorFlow functions of one named input and one named output.

    Args:
        model: A Keras model with one image input and one output of class scores.
        preprocessing: Whether the file takes raw uint8 images and gives probabilities. Without,
            it takes what the network behind the `ImagePreprocessing` layer takes (the model
            itself, if it has none) and gives logits, if the network does. A network of one number
            for two classes gives two, in either case.
        image_size: Height and width of the images, where the model leaves them open.

    Attributes:
        model: What is exported: the model, in float32; or the network behind its preprocessing.
        raw_shape: (height, width, channels) of the raw images.
        contract: The `Contract`.
        source_kind: What the Keras model gives, a row of `runtimes.base.OUTPUT_KINDS`.
        output_kind: What the exported file gives, another row: one of more than one number.

    Raises:
        InputError: If the size is open in both, or the model is quantized already.
    """

    def __init__(self, model, preprocessing=True, image_size=None):
        model = in_float32(model)
        source = KerasRuntime(model)
        self.raw_shape = _image_shape(model, image_size)
        self._before = None
        if not preprocessing:
            self._before, model = split_preprocessing(model)
        self.model = model
        shape = _image_shape(model, image_size)
        self.source_kind = source.output_kind
        self.output_kind = _exported_kind(self.source_kind, preprocessing)
        self.contract = Contract(
            shape,
            "uint8" if preprocessing else "float32",
            LOGITS if self.output_kind == base.LOGITS else PROBABILITIES,
            max(source.columns, 2),
        )

    def prepare(self, images):
        """Returns raw uint8 images as the exported file takes them."""
        if self._before is None:
            return images.astype(self.contract.dtype)
        return keras.ops.convert_to_numpy(self._before(images, training=False))

    def module(self, batch=None):
        """Returns a `tf.Module` with the variables and the function `serve`, and nothing of Keras.

        Args:
            batch: A fixed batch size; None for any.
        """
        spec = tf.TensorSpec([batch, *self.contract.image_shape], self.contract.dtype, IMAGE)
        module = tf.Module()
        # Tracked, so that a SavedModel holds each once.
        module.variables_ = [variable.value for variable in self.model.variables]
        module.serve = tf.function(self._serve, input_signature=[spec], autograph=False)
        return module

    def _serve(self, image):
        images = tf.cast(image, self.model.inputs[0].dtype)
        with _functions_inlined():
            # Not left to Keras's call context, which a layer before can have set (Keras 3.15).
            (scores,) = tf.nest.flatten(self.model(images, training=False))
        scores = tf.cast(scores, tf.float32)
        if scores.shape.rank != 2:
            scores = tf.reshape(scores, [-1, scores.shape[-1] if scores.shape.rank > 1 else 1])
        if self.source_kind == base.BINARY_LOGIT:
            # The softmax of 0 and z is 1 − sigmoid(z) and sigmoid(z).
            scores = tf.concat([tf.zeros_like(scores), scores], axis=-1)
        elif self.source_kind == base.BINARY_SIGMOID:
            scores = tf.concat([1 - scores, scores], axis=-1)
        becomes_softmax = self.output_kind == base.SOFTMAX and self.source_kind in _LOGITS
        return {self.contract.output: tf.nn.softmax(scores) if becomes_softmax else scores}


_LOGITS = (base.LOGITS, base.BINARY_LOGIT)


def _exported_kind(kind, preprocessing):
    """Returns what a file gives that is made of a model of a kind."""
    if kind == base.SIGMOID:
        return kind
    return base.LOGITS if kind in _LOGITS and not preprocessing else base.SOFTMAX


@contextlib.contextmanager
def _functions_inlined():
    """Writes out what Keras would put into a function of its own while a graph is traced.

    Keras hands grouped convolutions to XLA, for the sake of their gradients on a CPU; no converter
    reads that, and TensorFlow computes them faster without (2.21).
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def split_preprocessing(model):
    """Returns a model's preprocessing and the network behind it.

    Args:
        model: What `with_preprocessing` made, or any other Keras model.

    Returns:
        The `ImagePreprocessing` layer, None where there is none; and the network: the model
        itself where there is none.
    """
    found = [layer for layer in model.layers if isinstance(layer, ImagePreprocessing)]
    last = model.layers[-1]
    if not found or not isinstance(last, keras.Model):
        return None, model
    return found[0], last


def _image_shape(model, image_size):
    *sizes, channels = model.inputs[0].shape[1:]
    sizes = [own or given for own, given in zip(sizes, image_size or (None, None), strict=True)]
    if None in sizes:
        raise InputError(f"{model.name} takes images of any size: name `image_size`")
    return (*sizes, channels)


def in_float32(model):
    """Returns the model itself if it computes in float32, else its float32 twin.

    A model in mixed precision would leave with bfloat16 operations that no phone has; its weights
    are float32 already.

    Args:
        model: A Keras model.

    Raises:
        InputError: If it holds quantized layers, or its configuration cannot be read back.
    """
    policies = {layer.dtype_policy.name for layer in model._flatten_layers()}
    if policies <= {"float32"}:
        return model
    if any("_from_" in name for name in policies):
        raise InputError(f"{model.name} is quantized already ({', '.join(sorted(policies))})")
    try:
        config = _float32_config(keras.saving.serialize_keras_object(model))
        twin = keras.saving.deserialize_keras_object(config)
    except Exception as error:
        raise InputError(
            f"{model.name} computes in {', '.join(sorted(policies))} and cannot be built again "
            f"in float32: {error}"
        ) from error
    for own, other in zip(twin.variables, model.variables, strict=True):
        own.assign(keras.ops.cast(other, own.dtype))
    return twin


def _float32_config(value):
    """Returns a Keras configuration with every dtype policy replaced by float32."""
    if isinstance(value, dict):
        if value.get("class_name") == "DTypePolicy":
            return {**value, "config": {**value["config"], "name": "float32"}}
        return {key: _float32_config(item) for key, item in value.items()}
    return [_float32_config(item) for item in value] if isinstance(value, list) else value
