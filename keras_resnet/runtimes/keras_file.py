"""Keras models, of .keras files or at hand, run by Keras itself."""

import keras

from keras_resnet import archive
from keras_resnet.errors import InputError
from keras_resnet.runtimes.base import Runtime, Tensor, count


class KerasRuntime(Runtime):
    """A Keras model; see `Runtime`.

    Args:
        model: A model with one input and one output.
        card: What its file says about itself.
        path: The file, if it came from one.

    Attributes:
        model: The Keras model.
    """

    format = "keras"

    def __init__(self, model, card=None, path=None, threads=None):
        super().__init__(path, card, threads)
        self.model = model
        self.input, self.output = self._ends()
        self.gives_probabilities = ends_in_softmax(model)
        self.operators = count(type(layer).__name__ for layer in _leaves(model))

    @property
    def name(self):
        """What messages call the model."""
        return str(self.path or self.model.name)

    @property
    def takes_images(self):
        """True: Keras casts what it is given."""
        return True

    def _ends(self):
        """Returns input and output."""
        ends = [getattr(self.model, side, None) or [] for side in ("inputs", "outputs")]
        if [len(end) for end in ends] != [1, 1]:
            shapes = [tuple(tensor.shape) for end in ends for tensor in end]
            raise InputError(
                f"{self.name}: the model must take images (batch, height, width, 1 or 3) and give "
                f"logits (batch, classes); its inputs and outputs are {shapes}"
            )
        return tuple(
            Tensor(each.name, tuple(each.shape), keras.backend.standardize_dtype(each.dtype))
            for (each,) in ends
        )

    def _as_input(self, images):
        # Keras casts, and says what does not fit.
        return images

    def call(self, images):
        """Returns the output for one batch."""
        answers = keras.ops.convert_to_numpy(self.model.predict_on_batch(images))
        # NumPy has no bfloat16, and the one that others add is none of its floats.
        return answers if answers.dtype.kind == "f" else answers.astype("float32")


def open_keras(path, threads=None):
    """Loads a .keras file; never runs code from it."""
    card = archive.read_card(path)
    return KerasRuntime(archive.load_model(path), card, path, threads)


def _leaves(model):
    """Yields the layers that hold no others."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaves(layer)
        else:
            yield layer


# What changes no number of a row, or its dtype alone, as at the end of mixed precision.
_PASSING = ("Identity", "Cast", "Flatten", "Dropout")


def ends_in_softmax(model):
    """Tells whether what a Keras model gives is a softmax's.

    Args:
        model: A functional or sequential model with one output; models may be nested in it.
    """
    operation = model.outputs[0]._keras_history.operation
    while True:
        if isinstance(operation, keras.Model):
            return ends_in_softmax(operation)
        activation = getattr(operation, "activation", None)
        if type(operation).__name__ == "Softmax" or activation is keras.activations.softmax:
            return True
        is_linear = isinstance(operation, keras.layers.Activation) and (
            activation is keras.activations.linear
        )
        if not is_linear and type(operation).__name__ not in _PASSING:
            return False
        before = operation._inbound_nodes[-1].input_tensors
        if not before:
            return False
        operation = before[0]._keras_history.operation
