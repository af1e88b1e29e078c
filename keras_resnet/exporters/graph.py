"""The one function that every exported file holds: raw images to probabilities."""

import contextlib
import dataclasses
import json
import tempfile
import types
from pathlib import Path

import keras
import tensorflow as tf

from keras_resnet.preprocessing import ImagePreprocessing
from keras_resnet.runtimes import base
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.utils.errors import InputError, one_line

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
        twin: The whole model in float32; the model that was given, if it computes in float32.
        raw_shape: (height, width, channels) of the raw images.
        contract: The `Contract`.
        source_kind: What the Keras model gives, a row of `runtimes.base.OUTPUT_KINDS`.
        output_kind: What the exported file gives, another row: one of more than one number.

    Raises:
        InputError: If the size is open in both, or the model is quantized already.
    """

    def __init__(self, model, preprocessing=True, image_size=None):
        self.twin = model = in_float32(model)
        source = KerasRuntime(model)
        self.raw_shape = _image_shape(model, image_size)
        self._modules = {}
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
        """Returns the `ServedModule` of a batch size; the same one when asked again.

        Args:
            batch: A fixed batch size; None for any.
        """
        if batch not in self._modules:
            spec = tf.TensorSpec([batch, *self.contract.image_shape], self.contract.dtype, IMAGE)
            self._modules[batch] = ServedModule(self.model, self._serve, spec)
        return self._modules[batch]

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


class ServedModule(tf.Module):
    """A model's variables and one function of it, and nothing of Keras: what the writers take.

    Args:
        model: The Keras model that has the variables.
        function: One image tensor to a dict with one tensor.
        spec: The `tf.TensorSpec` of the image tensor.

    Attributes:
        serve: The `tf.function`.
    """

    def __init__(self, model, function, spec):
        super().__init__()
        # Tracked, so that a SavedModel holds each once.
        self.variables_ = [variable.value for variable in model.variables]
        # The tables of look-ups are no variables.
        self.tables = [
            value
            for layer in model._flatten_layers()
            for value in vars(layer).values()
            if isinstance(value, tf.saved_model.experimental.TrackableResource)
        ]
        self.serve = tf.function(function, input_signature=[spec], autograph=False)
        self._scratch = tempfile.TemporaryDirectory()  # is there as long as the module
        self._saved = None

    def save(self):
        """Returns a folder with the module as a SavedModel, written at the first call."""
        if self._saved is None:
            path = str(Path(self._scratch.name, "saved_model"))
            tf.saved_model.save(self, path, signatures={"serving_default": self.serve})
            self._saved = path
        return self._saved


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

    A model in mixed precision would leave with bfloat16 operations that no phone has. The twin is
    the model as Keras saves and loads it, so that every layer restores its own state: the
    statistics of a `Normalization`, the vocabulary of a look-up. `verification.check_twin` compares
    the two before the twin is used.

    Args:
        model: A Keras model; how it was compiled plays no part.

    Raises:
        InputError: If it holds quantized layers, or Keras cannot save it and load it again.
    """
    layers = list(model._flatten_layers())
    policies = {layer.dtype_policy.name for layer in layers}
    if any("_from_" in name for name in policies):
        raise InputError(f"{model.name} is quantized already ({', '.join(sorted(policies))})")
    # A look-up's policy is an integer's or a string's, and stays.
    if not any(name in _OTHER_FLOATS for name in policies):
        return model
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            _uncompiled(layers),
            _objects_named(layers) as named,
        ):
            saved = Path(folder, "model")
            model.save(saved, zipped=False)
            config = saved / "config.json"
            text = json.dumps(_float32_config(json.loads(config.read_text(encoding="utf-8"))))
            config.write_text(text, encoding="utf-8")
            return keras.models.load_model(
                saved, custom_objects=named, compile=False, safe_mode=True
            )
    except Exception as error:
        raise InputError(
            f"{model.name} computes in {', '.join(sorted(policies))} and Keras cannot save it and "
            f"load it in float32: {one_line(error)}; give its own layers `get_config`, or build it "
            "in float32"
        ) from error


_OTHER_FLOATS = ("mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float64")


def _float32_config(value):
    """Returns a Keras configuration in which every float is a float32, and nothing is compiled."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key != "compile_config"}
        return {key: _float32_config(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [_float32_config(item) for item in value]
    return "float32" if isinstance(value, str) and value in _OTHER_FLOATS else value


@contextlib.contextmanager
def _uncompiled(layers):
    """Keeps Keras from saving what a model was compiled with: it need not be serializable."""
    compiled = [layer for layer in layers if getattr(layer, "compiled", False)]
    for model in compiled:
        model.compiled = False
    try:
        yield
    finally:
        for model in compiled:
            model.compiled = True


@contextlib.contextmanager
def _objects_named(layers):
    """Yields the user's classes and functions by the names that a saved config has for them.

    They need not be registered with Keras. Each function has a name of its own meanwhile: Keras
    saves a lambda, which has none, as code, and loads no code.
    """
    parts = [*layers, *(part for layer in layers for part in vars(layer).values())]
    classes = {type(part) for part in parts if hasattr(part, "get_config")}
    functions = {part: part.__name__ for part in parts if isinstance(part, types.FunctionType)}
    users = [each for each in (*classes, *functions) if not each.__module__.startswith("keras.")]
    named = {}
    for number, each in enumerate(users):
        if each in functions:
            each.__name__ = f"function_{number}"
        named[each.__name__] = each
    try:
        yield named
    finally:
        for function, name in functions.items():
            function.__name__ = name
