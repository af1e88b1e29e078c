"""The function that every exported file holds: raw images to probabilities."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_resnet.datasets.images import check_image_size
from keras_resnet.exporters.float32 import in_float32
from keras_resnet.preprocessing import ImagePreprocessing
from keras_resnet.runtimes.base import BINARY_LOGIT, BINARY_SIGMOID, LOGITS, SIGMOID, SOFTMAX
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.runtimes.resized import RESIZING, make_resizer
from keras_resnet.utils.errors import InputError

IMAGE = "image"

# Output kind of the Keras model -> that of the exported file with preprocessing, and without.
_EXPORTED_KINDS = {
    LOGITS: (SOFTMAX, LOGITS),
    SOFTMAX: (SOFTMAX, SOFTMAX),
    SIGMOID: (SIGMOID, SIGMOID),
    BINARY_LOGIT: (SOFTMAX, LOGITS),
    BINARY_SIGMOID: (SOFTMAX, SOFTMAX),
}

# One number for two classes becomes two; the softmax of 0 and z is 1 − sigmoid(z) and sigmoid(z).
_TWO_COLUMNS = {
    BINARY_LOGIT: lambda scores: [tf.zeros_like(scores), scores],
    BINARY_SIGMOID: lambda scores: [1 - scores, scores],
}


@dataclasses.dataclass(frozen=True)
class Contract:
    """Names, shapes and dtypes that an exported file must have.

    Attributes:
        image_shape: (height, width, channels); None is any size.
        dtype: The input's dtype: "uint8" with preprocessing inside, "float32" without.
        output: Name of the output: "probabilities" or "logits".
        classes: The number of classes.
        output_dtype: The output's dtype.
    """

    image_shape: tuple[int | None, int | None, int]
    dtype: str
    output: str
    classes: int
    output_dtype: str = "float32"


class Serving:
    """A Keras model as TensorFlow functions with one named input and one named output.

    Args:
        model: A Keras model with one image input and one output of class scores.
        preprocessing: Whether the file takes raw uint8 images and gives probabilities. Without,
            its input is that of the network behind the `ImagePreprocessing` layer (of the model
            itself if it has none), and its output is logits if the network's is. A network with
            one number for two classes gets two columns in either case.
        image_size: Height and width of the images if the model leaves them open. A model with an
            `ImagePreprocessing` layer needs none: its file takes images of any size, too.
        input_size: Height and width of images that the caller has resized and cropped already;
            the file normalises them. None if the file resizes them.

    Attributes:
        model: The exported model in float32: the whole model, or the network behind its
            preprocessing.
        twin: The whole model in float32; `model` itself if it computes in float32.
        runtime: The `KerasRuntime` of the twin.
        raw_shape: (height, width, channels) of the raw images.
        contract: The `Contract`.
        source_kind: The output kind of the Keras model, a row of `runtimes.base.OUTPUT_KINDS`.
        output_kind: The output kind of the exported file, a row of more than one column.
        preprocessing: How images are prepared, and which steps the file contains, for the
            manifest: a dict; None for a model without `ImagePreprocessing`.

    Raises:
        InputError: If the size is open in both, the model is quantized already, it cannot be cut
            behind the resizing, or `input_size` is given without `preprocessing`.
    """

    def __init__(self, model, preprocessing=True, image_size=None, input_size=None):
        self.twin = in_float32(model)
        self.runtime = KerasRuntime(self.twin)
        self.source_kind = self.runtime.output_kind
        self.output_kind = _EXPORTED_KINDS[self.source_kind][0 if preprocessing else 1]
        self._prepare, self.model = np.asarray, self.twin
        before = find_preprocessing(self.twin)
        network = self.twin.layers[-1]
        is_open = before is not None
        self.raw_shape = _image_shape(self.twin, image_size, is_open)
        if input_size is not None:
            if not preprocessing:
                raise InputError(
                    "either --input-size or --no-preprocessing can be given: files of one input "
                    "size normalise the images themselves"
                )
            input_size = check_image_size(input_size)
            self._prepare, self.model = _cut_behind_resizing(self.twin, before, input_size)
        elif not preprocessing and before and isinstance(network, keras.Model):
            self._prepare = lambda images: keras.ops.convert_to_numpy(before(images))
            self.model = network
        self.preprocessing = _describe(before, bool(input_size), preprocessing)
        self.contract = Contract(
            _image_shape(self.model, image_size, is_open),
            "uint8" if preprocessing else "float32",
            "logits" if self.output_kind == LOGITS else "probabilities",
            max(self.runtime.columns, 2),
        )
        self._modules = {}

    def prepare(self, images):
        """Returns raw uint8 images as the input of the exported file."""
        return self._prepare(images).astype(self.contract.dtype)

    def module(self, batch=None, dtype=None):
        """Returns the `ServedModule` of a batch size and a dtype; always the same one.

        Args:
            batch: A fixed batch size; None for any.
            dtype: The dtype of the input tensor; by default that of the contract. As "float32" a
                quantized input can be made of it.
        """
        dtype = dtype or self.contract.dtype
        if (batch, dtype) not in self._modules:
            spec = tf.TensorSpec([batch, *self.contract.image_shape], dtype, IMAGE)
            self._modules[batch, dtype] = ServedModule(self.model, self._serve, spec)
        return self._modules[batch, dtype]

    def _serve(self, image):
        model, wanted = self.model, self.model.inputs[0].dtype
        if image.dtype == "float32" and wanted != "float32":
            # The model itself would convert its input: hardware without floats has no such cast.
            inputs = keras.Input(image.shape[1:], dtype=image.dtype.name)
            model = keras.models.clone_model(model, inputs, clone_function=lambda layer: layer)
        with _functions_inlined():
            # A layer before can have set `training` in Keras's call context (Keras 3.15).
            (scores,) = tf.nest.flatten(
                model(tf.cast(image, model.inputs[0].dtype), training=False)
            )
        scores = tf.cast(scores, tf.float32)
        if scores.shape.rank != 2:
            scores = tf.reshape(scores, [-1, scores.shape[-1] if scores.shape.rank > 1 else 1])
        if self.source_kind in _TWO_COLUMNS:
            scores = tf.concat(_TWO_COLUMNS[self.source_kind](scores), axis=-1)
        if self.output_kind == SOFTMAX and self.source_kind in (LOGITS, BINARY_LOGIT):
            scores = tf.nn.softmax(scores)
        return {self.contract.output: scores}


def find_preprocessing(model):
    """Returns the `ImagePreprocessing` layer of a model; None if it has none."""
    layers = getattr(model, "layers", ())
    return next((layer for layer in layers if isinstance(layer, ImagePreprocessing)), None)


class ServedModule(tf.Module):
    """The variables of a model and one function of it, without Keras; the input of all writers.

    Args:
        model: The Keras model with the variables.
        function: Function of one image tensor that returns a dict with one tensor.
        spec: The `tf.TensorSpec` of the image tensor.

    Attributes:
        serve: The `tf.function`.
    """

    def __init__(self, model, function, spec):
        super().__init__()
        # tf.Module tracks them, and a SavedModel stores each once.
        self.variables_ = [variable.value for variable in model.variables]
        # The tables of look-ups are no variables.
        self.tables = [
            value
            for layer in model._flatten_layers()
            for value in vars(layer).values()
            if isinstance(value, tf.saved_model.experimental.TrackableResource)
        ]
        self.serve = tf.function(function, input_signature=[spec], autograph=False)
        self._scratch = tempfile.TemporaryDirectory()  # deleted with the module

    def save(self):
        """Returns a folder with the module as a SavedModel, which the first call writes."""
        folder = Path(self._scratch.name, "saved_model")
        if not folder.exists():
            tf.saved_model.save(self, str(folder), signatures={"serving_default": self.serve})
        return str(folder)

    def converted(self, name, convert):
        """Returns a conversion of the module that several precisions start from.

        Args:
            name: The name of the conversion.
            convert: Function that returns it as bytes; called once.
        """
        path = Path(self._scratch.name, name)
        if not path.exists():
            path.write_bytes(convert())
        return path.read_bytes()


@contextlib.contextmanager
def _functions_inlined():
    """Inlines functions that Keras would make while a graph is traced.

    On a CPU Keras compiles grouped convolutions with XLA for the sake of their gradients; no
    converter reads that, and TensorFlow computes them faster without (2.21).
    """
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _cut_behind_resizing(model, before, input_size):
    """Returns a function that resizes raw images, and the model of images resized by it."""
    name, size = model.name, input_size
    if not before or not isinstance(model.layers[-1], keras.Model):
        raise InputError(
            f"{name}: --input-size needs a model that `with_preprocessing` makes: leave it out"
        )
    config, network = before.get_config(), model.layers[-1]
    if size != (before.image_size, before.image_size):
        raise InputError(
            f"{name}: --input-size must be the size of the network's input, {before.image_size} "
            f"{before.image_size}, got {' '.join(map(str, size))}"
        )
    if not before.antialias:
        raise InputError(
            f"{name}: --input-size needs a model that resizes to whole grey levels "
            "(`antialias=True`): leave it out, and the files resize as the model does"
        )
    resizing = {key: config[key] for key in RESIZING}
    inputs = keras.Input((*size, before.channels), dtype="uint8", name=IMAGE)
    # Images of the network's own size are not resized again.
    unchanged = {"resize": "squash", "crop_pct": 1.0}
    normalized = ImagePreprocessing.from_config({**config, **unchanged})(inputs)
    return (
        make_resizer(before.image_size, before.channels, **resizing),
        keras.Model(inputs, network(normalized), name=name),
    )


def _describe(before, is_resized, preprocessing):
    """Returns `Serving.preprocessing`."""
    if before is None:
        return None
    config = before.get_config()
    normalization = ("mean", "std", "reverse_channels")
    return {
        "colours": "red, green, blue" if config["channels"] == 3 else "grey",
        "values": [0, 255],
        "image_size": [config["image_size"]] * 2,
        "resizing": {
            "done_by": "file" if preprocessing and not is_resized else "caller",
            **{name: config[name] for name in RESIZING},
        },
        "normalization": {
            "done_by": "file" if preprocessing else "caller",
            **{name: config[name] for name in normalization},
        },
    }


def _image_shape(model, image_size, is_open):
    *sizes, channels = model.inputs[0].shape[1:]
    sizes = [own or given for own, given in zip(sizes, image_size or (None, None), strict=True)]
    if None in sizes and not is_open:
        raise InputError(
            f"{model.name} takes images of any size and does not resize them: its files need one, "
            "set it with --image-size (`image_size`)"
        )
    return (*sizes, channels)
