"""Keras models, of .keras files or at hand, run by Keras itself."""

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
        metadata: What its file says about itself.
        path: The file, if it came from one.

    Attributes:
        model: The Keras model.
    """

    format = "keras"

    def __init__(self, model, metadata=None, path=None, threads=None):
        super().__init__(path, metadata, threads)
        self.model = model
        self.input, self.output = self._ends()
        self.graph_kind = base.kind_by_graph(*_producers(model))
        self.operators = count(type(layer).__name__ for layer in _leaves(model))

    @property
    def name(self):
        """What messages call the model."""
        return str(self.path or self.model.name)

    @functools.cached_property
    def takes_images(self):
        """Whether the model takes images as they are: all but a bare network of ours does.

        A model of floats takes them, too: Keras casts, and scaling is a layer of the model.
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
                f"{self.name}: the model must take images and give one output, it has "
                f"{len(ends[1])} ({names}): choose one, such as "
                f"`keras.Model(model.inputs, model.output[{chosen!r}])`"
            )
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

    def call(self, images):
        """Returns the output for one batch."""
        (answers,) = keras.tree.flatten(self.model.predict_on_batch(images))
        answers = keras.ops.convert_to_numpy(answers)
        # NumPy has no bfloat16, and the one that others add is none of its floats.
        return answers if answers.dtype.kind == "f" else answers.astype("float32")


def open_keras(path, threads=None):
    """Loads a .keras file; never runs code from it."""
    metadata = archive.read_metadata(path)
    return KerasRuntime(archive.load_model(path), metadata, path, threads)


def _leaves(model):
    """Yields the layers that hold no others."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaves(layer)
        else:
            yield layer


def _output_names(model):
    """Returns the key of the first of several outputs, and the names of all in one string."""
    outputs = model.output
    named = outputs if isinstance(outputs, dict) else dict(enumerate(keras.tree.flatten(outputs)))
    names = [f"{key}: {getattr(each, 'name', each)}"[:60] for key, each in named.items()]
    return next(iter(named)), printable(", ".join(names[:8]))


# ----------------------------------------------------------------------------------------------
# What a model gives
# ----------------------------------------------------------------------------------------------

# Names of layers, operations and activations, in lower case -> their role; see `kind_by_graph`.
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
    """Returns a Keras model's output and the function by which `kind_by_graph` looks up others.

    A place in the model is a tensor and the calls of nested models that it lies in.
    """
    places = {}

    def place(tensor, calls):
        # One tensor is the same in every call of its model, and its input is not.
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
    """Returns the tensor that a nested model was called with, for its input."""
    if not calls:
        return None, []
    *outside, (nested, node) = calls
    inside = [id(each) for each in nested.inputs]
    if id(tensor) not in inside:
        return None, []
    return base.PASSING, [place(node.input_tensors[inside.index(id(tensor))], tuple(outside))]


def _role(operation, tensor, before):
    """Returns the role of a layer or operation that takes `before` and gives `tensor`."""
    activation = getattr(operation, "activation", None)
    named = activation if callable(activation) else operation
    name = getattr(named, "__name__", type(named).__name__).lower()
    if name == "linear":
        is_bare_activation = isinstance(operation, keras.layers.Activation)
        return base.PASSING if is_bare_activation else base.LOGITS
    role = _ROLES.get(name)
    # Over another axis, or in another shape, the last axis is not that of the classes.
    if role == base.SOFTMAX and getattr(named, "axis", -1) not in (-1, len(tensor.shape) - 1):
        return None
    columns = [each.shape[-1] if len(each.shape) > 1 else 1 for each in (tensor, *before[:1])]
    return None if role == base.PASSING and len(set(columns)) > 1 else role


# ----------------------------------------------------------------------------------------------
# What a model takes
# ----------------------------------------------------------------------------------------------

# Layers that keep the scale of an image's numbers.
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
    """Tells whether a model is a network of `build_resnet` without preprocessing before it.

    The stem's convolution stands directly on an input of floats then. Such a network takes floats
    that are normalised already, and says so nowhere else if the user saved it with `model.save`.

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
    """Returns the layers that change an image's numbers first, and whether none does on some way.

    A nested model whose layers keep the scale, such as one of random flips, is passed.
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
