"""Keras models, from .keras files or in memory, run by Keras."""

import collections
import functools
import itertools

import keras

from keras_resnet import archive
from keras_resnet.blocks import PaddedConv2D
from keras_resnet.preprocessing import Augmentation
from keras_resnet.runtimes import base
from keras_resnet.runtimes.base import Runtime, Tensor, count
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.tables import printable


class KerasRuntime(Runtime):
    """A Keras model; see `Runtime`.

    Args:
        model: A model with one input and one output.
        metadata: The metadata of its file; by default those attached to the model.
        path: The file, if it was loaded from one.
        threads: Kept for the record: the backend's threads are those of this process.

    Attributes:
        model: The Keras model.
    """

    format = "keras"

    def __init__(self, model, metadata=None, path=None, threads=None):
        super().__init__(
            path, archive.get_metadata(model) if metadata is None else metadata, threads
        )
        self.model = model
        self.input, self.output = self._ends()
        self.graph_kind = base.kind_by_graph(*_producers(model))
        self.operators = count(type(layer).__name__ for layer in _leaves(model))

    @property
    def name(self):
        """The model's name in messages."""
        return str(self.path or self.model.name)

    @functools.cached_property
    def takes_images(self):
        """Whether the model takes raw images: all models do, except our networks alone.

        A model of floats takes raw images, too: Keras casts them, and a layer scales them.
        """
        return not is_bare(self.model)

    @property
    def stated_kind(self):
        """None: the graph of a .keras file states the kind of output."""
        return None

    def _ends(self):
        """Returns input and output."""
        model = self.model
        ends = [list(getattr(model, side, None) or []) for side in ("inputs", "outputs")]
        if len(ends[1]) > 1:
            chosen, names = _output_names(model)
            raise InputError(
                f"{self.name}: the model must take images and give one output, got "
                f"{len(ends[1])} ({names}): choose one, such as "
                f"`keras.Model(model.inputs, model.output[{chosen!r}])`"
            )
        if [len(end) for end in ends] != [1, 1]:
            shapes = [tuple(tensor.shape) for end in ends for tensor in end]
            raise InputError(
                f"{self.name}: the model must take images (batch, height, width, 1 or 3) and give "
                f"logits (batch, classes), got inputs and outputs of {shapes}"
            )
        return tuple(
            Tensor(each.name, tuple(each.shape), keras.backend.standardize_dtype(each.dtype))
            for (each,) in ends
        )

    def call(self, images):
        """Returns the output for one batch."""
        (outputs,) = keras.tree.flatten(self.model.predict_on_batch(images))
        outputs = keras.ops.convert_to_numpy(outputs)
        # NumPy has no bfloat16; the type that other libraries add is not of the kind "f".
        return outputs if outputs.dtype.kind == "f" else outputs.astype("float32")


def open_keras(path, threads=None):
    """Loads a .keras file without running code from it."""
    metadata = archive.read_metadata(path)
    return KerasRuntime(archive.load_model(path), metadata, path, threads)


def _leaves(model):
    """Yields the layers, also those of nested models."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaves(layer)
        else:
            yield layer


def _output_names(model):
    """Returns the key of the first of several outputs, and a string with the names of all."""
    outputs = model.output
    named = outputs if isinstance(outputs, dict) else dict(enumerate(keras.tree.flatten(outputs)))
    names = [f"{key}: {getattr(each, 'name', each)}"[:60] for key, each in named.items()]
    return next(iter(named)), printable(", ".join(names[:8]))


# ----------------------------------------------------------------------------------------------
# Output
# ----------------------------------------------------------------------------------------------

# Layer, operation or activation, in lower case -> its role; see `kind_by_graph`.
_ROLES = {
    **dict.fromkeys(("softmax", "softmax_v2", "sparsemax"), base.SOFTMAX),
    **dict.fromkeys(("sigmoid", "hard_sigmoid", "hardsigmoid"), base.SIGMOID),
    **dict.fromkeys(("sparse_sigmoid", "sparsesigmoid"), base.SIGMOID),
    **dict.fromkeys(("log_softmax", "logsoftmax", "relu", "tanh"), base.LOGITS),
    **dict.fromkeys(("identity", "cast", "dropout", "gaussiannoise"), base.PASSING),
    **dict.fromkeys(("flatten", "reshape", "squeeze"), base.PASSING),
    **dict.fromkeys(("averagepooling2d", "globalaveragepooling2d"), base.PASSING),
    **dict.fromkeys(("add", "subtract", "multiply", "divide", "truedivide"), base.ARITHMETIC),
    "average": base.AVERAGE,
    "rescaling": base.ARITHMETIC,
}


def _producers(model):
    """Returns the arguments of `kind_by_graph` for a Keras model.

    A tensor is identified together with the calls of the nested models around it.
    """
    places = {}

    def place(tensor, calls):
        # A nested model has the same tensors in each of its calls, but another input.
        key = (id(tensor), *(id(call) for call in calls))
        places[key] = (tensor, calls)
        return key

    def look_up(key):
        tensor, calls = places[key]
        operation, node_index, tensor_index = tensor._keras_history
        if isinstance(operation, keras.Model):
            node = operation._inbound_nodes[node_index]
            inner = operation.outputs[tensor_index]
            return base.PASSING, [place(inner, (*calls, (operation, node)))]
        if isinstance(operation, keras.layers.InputLayer):
            return _outer(tensor, calls, place)
        before = operation._inbound_nodes[node_index].input_tensors
        return _role(operation, tensor, before), [place(each, calls) for each in before]

    return place(model.outputs[0], ()), look_up


def _outer(tensor, calls, place):
    """Returns, for a nested model's input, the tensor with which the model was called."""
    if not calls:
        return None, []
    *outside, (nested, node) = calls
    inside = [id(each) for each in nested.inputs]
    if id(tensor) not in inside:
        return None, []
    return base.PASSING, [place(node.input_tensors[inside.index(id(tensor))], tuple(outside))]


def _role(operation, tensor, before):
    """Returns the role of a layer or operation with the inputs `before` and the output `tensor`."""
    activation = getattr(operation, "activation", None)
    named = activation if callable(activation) else operation
    name = getattr(named, "__name__", type(named).__name__).lower()
    if name == "linear":
        is_bare_activation = isinstance(operation, keras.layers.Activation)
        return base.PASSING if is_bare_activation else base.LOGITS
    role = _ROLES.get(name)
    # A softmax over another axis, or a reshaped output, is not one of classes in the last axis.
    if role == base.SOFTMAX and getattr(named, "axis", -1) not in (-1, len(tensor.shape) - 1):
        return None
    columns = [each.shape[-1] if len(each.shape) > 1 else 1 for each in (tensor, *before[:1])]
    return None if role == base.PASSING and len(set(columns)) > 1 else role


# ----------------------------------------------------------------------------------------------
# Input
# ----------------------------------------------------------------------------------------------

# Layers that keep the scale of pixel values.
_SCALE_KEPT = (
    Augmentation,
    keras.layers.InputLayer,
    keras.layers.Identity,
    keras.layers.Dropout,
    keras.layers.CenterCrop,
    keras.layers.Resizing,
    keras.layers.RandomCrop,
    keras.layers.RandomFlip,
    keras.layers.RandomRotation,
    keras.layers.RandomTranslation,
    keras.layers.RandomZoom,
    keras.layers.ZeroPadding2D,
)


def is_bare(model):
    """Returns whether a model is a network of `build_resnet` without preprocessing.

    Then the convolution of the stem follows directly after an input of floats. Such a network takes
    normalised floats; a file that the user wrote with `model.save` does not record that.

    Args:
        model: A Keras model with one input; models may be nested in it.

    Example:
        >>> from keras_resnet.models import build_resnet18
        >>> from keras_resnet.preprocessing import with_preprocessing
        >>> network = build_resnet18((32, 32, 1))
        >>> is_bare(network), is_bare(with_preprocessing(network, (32, 32, 1)))
        (True, False)
    """
    if not keras.backend.is_float_dtype(model.inputs[0].dtype):
        return False
    return any(_is_stem(layer) for layer in _first_layers(model)[0])


def _is_stem(layer):
    return isinstance(layer, PaddedConv2D) and layer.name.startswith("stem_conv")


def _first_layers(model):
    """Returns the first layers that change pixel values, and whether some path has none.

    A nested model whose layers keep the scale, such as one of random flips, counts as no change.
    """
    model = getattr(model, "_functional", None) or model
    users = collections.defaultdict(list)
    nodes = getattr(model, "_nodes_by_depth", {}).values()
    for node in itertools.chain.from_iterable(nodes):
        for tensor in node.input_tensors:
            users[id(tensor)].append(node)
    outputs = {id(tensor) for tensor in model.outputs}
    first, waiting, reached = [], list(model.inputs), set()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in reached:
            continue
        reached.add(id(tensor))
        for node in users[id(tensor)]:
            passed = isinstance(node.operation, _SCALE_KEPT)
            if isinstance(node.operation, keras.Model):
                inside, passed = _first_layers(node.operation)
                first += inside
            elif not passed:
                first.append(node.operation)
            waiting += node.output_tensors if passed else []
    return first, bool(outputs & reached)
