"""The function that every exported file holds: raw images to probabilities."""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import keras
import tensorflow as tf

from keras_resnet.exporters.float32 import in_float32
from keras_resnet.preprocessing import ImagePreprocessing
from keras_resnet.runtimes.base import BINARY_LOGIT, BINARY_SIGMOID, LOGITS, SIGMOID, SOFTMAX
from keras_resnet.runtimes.keras_file import KerasRuntime
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
        image_shape: (height, width, channels).
        dtype: The input's dtype: "uint8" with preprocessing inside, "float32" without.
        output: Name of the output: "probabilities" or "logits".
        classes: The number of classes.
    """

    image_shape: tuple[int, int, int]
    dtype: str
    output: str
    classes: int


class Serving:
    """A Keras model as TensorFlow functions with one named input and one named output.

    Args:
        model: A Keras model with one image input and one output of class scores.
        preprocessing: Whether the file takes raw uint8 images and gives probabilities. Without,
            its input is that of the network behind the `ImagePreprocessing` layer (of the model
            itself if it has none), and its output is logits if the network's is. A network with
            one number for two classes gets two columns in either case.
        image_size: Height and width of the images if the model leaves them open.

    Attributes:
        model: The exported model in float32: the whole model, or the network behind its
            preprocessing.
        twin: The whole model in float32; `model` itself if it computes in float32.
        runtime: The `KerasRuntime` of the twin.
        raw_shape: (height, width, channels) of the raw images.
        contract: The `Contract`.
        source_kind: The output kind of the Keras model, a row of `runtimes.base.OUTPUT_KINDS`.
        output_kind: The output kind of the exported file, a row of more than one column.

    Raises:
        InputError: If the size is open in both, or the model is quantized already.
    """

    def __init__(self, model, preprocessing=True, image_size=None):
        self.twin = in_float32(model)
        self.runtime = KerasRuntime(self.twin)
        self.source_kind = self.runtime.output_kind
        self.output_kind = _EXPORTED_KINDS[self.source_kind][0 if preprocessing else 1]
        self.raw_shape = _image_shape(self.twin, image_size)
        self._before, self.model = None, self.twin
        layers = self.twin.layers
        before = [layer for layer in layers if isinstance(layer, ImagePreprocessing)]
        if not preprocessing and before and isinstance(layers[-1], keras.Model):
            self._before, self.model = before[0], layers[-1]
        self.contract = Contract(
            _image_shape(self.model, image_size),
            "uint8" if preprocessing else "float32",
            "logits" if self.output_kind == LOGITS else "probabilities",
            max(self.runtime.columns, 2),
        )
        self._modules = {}

    def prepare(self, images):
        """Returns raw uint8 images as the input of the exported file."""
        if self._before is None:
            return images.astype(self.contract.dtype)
        return keras.ops.convert_to_numpy(self._before(images, training=False))

    def module(self, batch=None):
        """Returns the `ServedModule` of a batch size; always the same one.

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
            # A layer before can have set `training` in Keras's call context (Keras 3.15).
            (scores,) = tf.nest.flatten(self.model(images, training=False))
        scores = tf.cast(scores, tf.float32)
        if scores.shape.rank != 2:
            scores = tf.reshape(scores, [-1, scores.shape[-1] if scores.shape.rank > 1 else 1])
        if self.source_kind in _TWO_COLUMNS:
            scores = tf.concat(_TWO_COLUMNS[self.source_kind](scores), axis=-1)
        if self.output_kind == SOFTMAX and self.source_kind in (LOGITS, BINARY_LOGIT):
            scores = tf.nn.softmax(scores)
        return {self.contract.output: scores}


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


def _image_shape(model, image_size):
    *sizes, channels = model.inputs[0].shape[1:]
    sizes = [own or given for own, given in zip(sizes, image_size or (None, None), strict=True)]
    if None in sizes:
        raise InputError(f"{model.name} takes images of any size: name `image_size`")
    return (*sizes, channels)
