"""Loading weights into our models and saving them: every tensor is used once, or none."""

import contextlib
import dataclasses
import os

import keras
import numpy as np
from keras import ops

from keras_resnet.blocks import BottleneckBlock, ResidualBlock
from keras_resnet.models import VARIANTS
from keras_resnet.utils.errors import InputError, check_count, look_up
from keras_resnet.utils.files import expand_user
from keras_resnet.weights.applications import read_keras_applications
from keras_resnet.weights.checkpoint import read_checkpoint, write_checkpoint
from keras_resnet.weights.layouts import LAYOUTS, find_network

_FIRST = ("stem_conv/kernel", "stem_conv1/kernel")

# How many names of a kind an error lists.
_LISTED = 5


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A report of the tensors that were loaded.

    Attributes:
        layout: The row of `LAYOUTS` that the names are of.
        num_tensors: The number of tensors that were loaded.
        skipped: The names of the head's tensors, if the head was to be left out.
        adapted: (channels of the checkpoint, channels of the model) where the first convolution
            was adapted; else None.
        taken: The key or, where there are several networks, the prefix that the weights were
            under, such as "state_dict_ema" or "ema_model."; None for a bare state dict.
        ignored: The names of the tensors that belong to other parts than the network.
    """

    layout: str
    num_tensors: int
    skipped: tuple[str, ...]
    adapted: tuple[int, int] | None
    taken: str | None = None
    ignored: tuple[str, ...] = ()


def adapt_channels(kernel, channels):
    """Adapts a convolution's kernel to images of another number of channels.

    Several channels become one by summing over them, one becomes several by dividing it equally.
    So a grey image gives the same output as the image with this channel repeated.

    Args:
        kernel: (height, width, channels, filters), a NumPy array.
        channels: The number of channels wanted.

    Returns:
        A NumPy array, (height, width, `channels`, filters), of the same dtype.

    Raises:
        InputError: If neither number of channels is 1, and they differ; or if `kernel` does not
            have four axes.

    Example:
        >>> kernel = np.ones((7, 7, 3, 64), "float32")
        >>> adapt_channels(kernel, 1).shape, float(adapt_channels(kernel, 1).max())
        ((7, 7, 1, 64), 3.0)
    """
    check_count("channels", channels)
    if np.ndim(kernel) != 4:
        raise InputError(
            "`kernel` must be (height, width, channels, filters), as Keras has it, got shape "
            f"{np.shape(kernel)}"
        )
    present = kernel.shape[2]
    if present == channels:
        return kernel
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    if present == 1:
        return np.repeat(kernel / channels, channels, axis=2).astype(kernel.dtype)
    raise InputError(
        "kernels can be adapted from any number of channels to 1, and from 1 to any number, "
        f"got {present} to {channels}"
    )


def load_torch_weights(model, source, *, layout=None, skip_head=False, adapt_input=False):
    """Loads a PyTorch checkpoint into a model of ours.

    The layout is recognised by the tensors' names: those of torchvision, timm, Hugging Face, Dive
    into Deep Learning (d2l), …; see `LAYOUTS`. Any prefix may stand before them, such as
    ``model.backbone.``. The tensors under it must match the model's weights one to one, or nothing
    is changed. Tensors of other parts are left out, and named in the result. Counters, such as
    PyTorch's ``num_batches_tracked``, are not loaded.

    Args:
        model: A network of `build_resnet`, of the depth, variant and stem of the checkpoint's, or
            one that `with_preprocessing` has put preprocessing before.
        source: The path of a safetensors file (PyTorch is not needed), or of a file of
            `torch.save` (it is; code in the file is never run), whatever its name ends in; or a
            state dict, of tensors or of NumPy arrays. A state dict inside the checkpoint of a
            training script is found; see `read_checkpoint`.
        layout: A row of `LAYOUTS`, instead of recognising it.
        skip_head: Whether the logits' weights stay as they are.
        adapt_input: Whether the first convolution may be adapted to another number of channels;
            see `adapt_channels`.

    Returns:
        A `Transfer`.

    Raises:
        InputError: If the source cannot be read or does not fit: one line lists the tensors that
            are missing, of no use, and of another shape.

    Example:
        >>> from keras_resnet import Spec, build_resnet
        >>> spec = Spec((1,), (4,))
        >>> model = build_resnet(spec, (32, 32, 3), variant="torchvision")
        >>> state = torch_state_dict(build_resnet(spec, (32, 32, 3), variant="torchvision"))
        >>> load_torch_weights(model, state)
        ... # doctest: +NORMALIZE_WHITESPACE
        Transfer(layout='torchvision', num_tensors=17, skipped=(), adapted=None, taken=None,
                 ignored=())
    """
    with naming(source):
        return load_tensors(
            model,
            read_checkpoint(source),
            layout=layout,
            skip_head=skip_head,
            adapt_input=adapt_input,
        )


def load_keras_applications_weights(model, source, *, skip_head=False, adapt_input=False):
    """Loads the weights of ResNet50/101/152, or of their V2, from keras.applications.

    Args:
        model: A network of `build_resnet` of the same depth, and of variant "keras_v1" or, for V2,
            "keras_v2".
        source: A model of keras.applications; a `.keras` file of it; or a `.h5` file of its
            weights, as keras.applications publishes them.
        skip_head: Whether the logits' weights stay as they are.
        adapt_input: Whether the first convolution may be adapted to another number of channels;
            see `adapt_channels`.

    Returns:
        A `Transfer`. Keras's models output probabilities unless they are built with
        ``classifier_activation=None``, ours output logits.

    Raises:
        InputError: If the source cannot be read or does not fit.
    """
    with naming(source):
        tensors = read_keras_applications(source)
        return load_tensors(model, tensors, skip_head=skip_head, adapt_input=adapt_input)


def load_tensors(model, tensors, *, layout=None, skip_head=False, adapt_input=False):
    """Loads the tensors that `read_tensors` returned.

    Args:
        model: See `load_torch_weights`, as for all that follow.
        tensors: Names -> NumPy arrays.
        layout: The name of a row of `LAYOUTS`, or an `OWN_LAYOUT`, instead of recognising it.
        skip_head: Whether the logits' weights stay as they are.
        adapt_input: Whether the first convolution may be adapted.

    Returns:
        A `Transfer`.

    Raises:
        InputError: If the tensors do not fit.
    """
    network = find_network(tensors, layout)
    row = network.row
    given, places = network.select(tensors), _places(model, network.layout, row)
    skipped = network.head if skip_head else frozenset()
    wanted, available = places.keys() - skipped, given.keys() - skipped
    adapted, arrays, mis_shaped = None, {}, []
    for name in sorted(wanted & available):
        path, shape = places[name].path, tuple(places[name].shape)
        array = row.to_ours(path, given[name])
        if adapt_input and path in _FIRST and array.ndim == 4 and array.shape[2] != shape[2]:
            adapted = (array.shape[2], shape[2])
            array = adapt_channels(array, shape[2])
        arrays[name] = array
        if array.shape != shape:
            theirs = row.from_ours(path, np.empty(shape, "bool")).shape
            mis_shaped.append(f"{name} is {given[name].shape}, must be {theirs}")
    faults = {
        "missing": sorted(wanted - available),
        "of no use": sorted(available - wanted),
        "of another shape": mis_shaped,
    }
    for name, reason in getattr(tensors, "unusable", {}).items():
        if any(name.endswith(network.prefix + missing) for missing in faults["missing"]):
            raise InputError(reason)
    _refuse(faults, network, _advise(model, row))
    for name, array in arrays.items():
        places[name].assign(array)
    omitted = tuple(sorted(network.names[name] for name in skipped & given.keys()))
    return Transfer(network.layout, len(arrays), omitted, adapted, network.taken, network.ignored)


def torch_state_dict(model, layout="torchvision"):
    """Returns a model's weights as a PyTorch state dict of NumPy arrays.

    Args:
        model: See `load_torch_weights`.
        layout: A row of `LAYOUTS`, one of PyTorch's.

    Raises:
        InputError: If there is no such layout, or the model is of another form than its networks:
            their library would refuse the weights, or take them and compute something else.
    """
    of_torch = {name: row for name, row in LAYOUTS.items() if row.channels_first}
    row = look_up(of_torch, layout, "layout")
    allowed, found = {row.variant, *row.also}, find_variants(model)
    if not allowed & set(found):
        fitting = [n for n, r in of_torch.items() if {r.variant, *r.also} & set(found)]
        raise InputError(
            f"layout {layout} is of networks of variant {' or '.join(sorted(allowed))}, got "
            f"{' or '.join(found) or 'none'}; layouts for that: {', '.join(fitting) or 'none'}"
        )
    state = {}
    for name, weight in _places(model, layout, row).items():
        array = row.from_ours(weight.path, ops.convert_to_numpy(weight))
        state[name] = np.ascontiguousarray(array)
    return state


def save_torch_weights(model, path, layout="torchvision"):
    """Writes a model's weights as a checkpoint that PyTorch's model of the same form loads.

    The file has every tensor of that model's ``state_dict()``, bit for bit as it was loaded or
    trained here; ``num_batches_tracked``, which PyTorch counts and does not use, is 0.

    Args:
        model: See `load_torch_weights`.
        path: A `.safetensors` file (PyTorch is not needed), or a `.pth` or `.pt` file (it is).
        layout: A row of `LAYOUTS`: "torchvision", "timm_d", "timm_v2", "huggingface", "d2l", ….

    Raises:
        InputError: If there is no such layout, or no such kind of file.

    Example:
        >>> import tempfile
        >>> from keras_resnet import Spec, build_resnet
        >>> model = build_resnet(Spec((1,), (4,)), (32, 32, 3), variant="torchvision")
        >>> path = f"{tempfile.mkdtemp()}/model.safetensors"
        >>> save_torch_weights(model, path)
        >>> load_torch_weights(model, path).num_tensors
        17
    """
    state = torch_state_dict(model, layout)
    means = [name for name in state if name.endswith("running_mean")]
    for name in means:
        state[name.replace("running_mean", "num_batches_tracked")] = np.array(0, "int64")
    write_checkpoint(state, path)


@contextlib.contextmanager
def naming(source):
    """Puts the path of a file before the message of an `InputError` about it."""
    try:
        yield
    except InputError as error:
        name = str(expand_user(source)) if isinstance(source, (str, os.PathLike)) else ""
        if str(error).startswith(name):
            raise
        raise InputError(f"{name}: {error}") from error


def find_variants(model):
    """Returns the rows of `VARIANTS` that a model's blocks may be of.

    "torchvision" and "v1" differ in the 1×1 convolutions of bottlenecks, not in basic blocks.

    Example:
        >>> from keras_resnet import build_resnet
        >>> find_variants(build_resnet("resnet18", variant="v1"))
        ['torchvision', 'v1']
    """
    kinds = (ResidualBlock, BottleneckBlock)
    blocks = [layer for layer in _layers(model) if isinstance(layer, kinds)]
    return [n for n, row in VARIANTS.items() if blocks and all(_is_of(b, row) for b in blocks)]


def _layers(model):
    for layer in model.layers:
        yield from _layers(layer) if isinstance(layer, keras.Model) else [layer]


def _is_of(block, variant):
    if (block.shortcut_pool == "pad") != (variant.shortcut_pool == "pad"):
        return False
    always = ("use_bias", "norm_epsilon", "pre_activation", "use_shortcut")
    asked = {name: getattr(variant, name) for name in always}
    if block.use_1x1conv:
        asked["shortcut_norm"] = variant.shortcut_norm
    if block.strides > 1 and block.expansion > 1:
        asked["stride_on_1x1"] = variant.stride_on_1x1
    return all(getattr(block, name) == value for name, value in asked.items())


def _advise(model, row):
    """Returns advice for a model that a checkpoint does not fit."""
    if row.variant not in (found := find_variants(model)) and not set(row.also) & set(found):
        return f'build the model with variant="{row.variant}"'
    return "build the model as the checkpoint's was: depth, variant, stem, channels, classes"


def _places(model, layout, row):
    """Returns a dict: the layout's name -> our weight, for every weight of the model."""
    places = {}
    for weight in model.weights:
        try:
            name = row.name(weight.path)
        except KeyError:
            raise InputError(
                f"networks of layout {layout} have no {weight.path}, got {model.name!r}, which "
                f"has; {_advise(model, row)}"
            ) from None
        if name in places:
            raise InputError(
                f"layout {layout} is not of networks such as {model.name!r}: both "
                f"{places[name].path} and {weight.path} would be its {name}"
            )
        places[name] = weight
    return places


def _refuse(faults, network, advice):
    """Raises one error that lists all tensors that do not fit, if there are any."""
    if not any(faults.values()):
        return
    if {n.split(" is ")[0] for names in faults.values() for n in names} <= network.head:
        advice = (
            "only the head does not fit, one dense layer with a bias here: leave it out with "
            "`skip_head=True`, --skip-head"
        )
    parts = []
    for kind, names in {**faults, "of other parts": network.ignored}.items():
        more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
        parts += [f"{len(names)} {kind} ({', '.join(names[:_LISTED])}{more})"] if names else []
    # A name may hold anything, a line break too.
    raise InputError(" ".join(f"tensors: {', '.join(parts)}; {advice}".split()))
