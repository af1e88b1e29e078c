"""The weights of keras.applications, from a model or from a file.

Files are read without building the network that they describe: a small file may describe one that
fills the memory, or one with code in it.
"""

import collections
import io
import json
import math
import os
import zipfile

import h5py
import keras
from keras import ops

from keras_resnet import archive
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user
from keras_resnet.weights.checkpoint import (
    _MAX_EXPANSION,
    _READ_AS,
    Tensors,
    _arrays,
    _dtype_error,
    _is_counter,
)

# The class of a layer -> the group that `.keras` files keep it in (its second is "conv2d_1"), and
# its variables in the order of their numbers there.
_LAYERS = {
    "Conv2D": ("conv2d", ("kernel", "bias")),
    "BatchNormalization": (
        "batch_normalization",
        ("gamma", "beta", "moving_mean", "moving_variance"),
    ),
    "Dense": ("dense", ("kernel", "bias")),
}
_MAX_VARIABLES = max(len(variables) for _, variables in _LAYERS.values())
# Models within the model, whose layers lie one level down.
_MODELS = {"Functional": "functional", "Sequential": "sequential"}
# A variable -> the layer's argument without which there is none.
_SWITCHES = {"bias": "use_bias", "gamma": "scale", "beta": "center"}


def read_keras_applications(source):
    """Reads the weights of a model of keras.applications under its names.

    Args:
        source: The model; a `.keras` file of it; or a `.h5` file of its weights, as
            keras.applications publishes them. Code in a file is never run.

    Returns:
        A dict: names such as "conv1_conv/kernel" -> arrays of float32 or float64, all of them
        finite.

    Raises:
        InputError: If the source is something else, cannot be read, or holds something other than
            finite floating-point tensors, each under its own name.

    Example:
        >>> inputs = keras.Input((8, 8, 3))
        >>> layer = keras.layers.Conv2D(4, 3, use_bias=False, name="conv1_conv")
        >>> tensors = read_keras_applications(keras.Model(inputs, layer(inputs)))
        >>> {name: array.shape for name, array in tensors.items()}
        {'conv1_conv/kernel': (3, 3, 3, 4)}
    """
    if isinstance(source, keras.Model):
        pairs = [(weight.path, ops.convert_to_numpy(weight)) for weight in source.weights]
        return _checked("the model given", pairs)
    path = _check_path(source)
    try:
        pairs = _READERS[path.suffix.lower()](path, _MAX_EXPANSION * path.stat().st_size)
    except InputError:
        raise
    # zipfile, json and h5py fail in many ways on a damaged file.
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read as weights of keras.applications: {one_line(error)}"
        ) from error
    return _checked(path, pairs)


def _check_path(source):
    """Returns `source` as a path that is a file, of a suffix we read."""
    kinds = " or ".join(_READERS)
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"weights of keras.applications must be a model, or the path of a {kinds} file, "
            f"got {type(source).__name__}"
        )
    path = expand_user(source)
    # os.path's question answers False where pathlib's raises, such as for a name too long.
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    if path.suffix.lower() not in _READERS:
        raise InputError(
            f"{path}: a file of keras.applications must end in {kinds}, "
            f"got {path.suffix or 'no suffix'}"
        )
    return path


def _read_keras(path, limit):
    """Returns the names and arrays of a `.keras` file, which numbers its layers and variables.

    The names are in the description of the model, in the order of the numbers.
    """
    path = archive.check_model_path(path)
    with zipfile.ZipFile(path) as members:
        members_read = [members.getinfo(name) for name in ("config.json", "model.weights.h5")]
        if sum(member.file_size for member in members_read) > limit:
            raise _size_error(path)
        config, weights = map(members.read, members_read)
    layers = json.loads(config)["config"]["layers"]
    with h5py.File(io.BytesIO(weights)) as file:
        return _read(path, _of_model(path, _entry(path, file, "layers"), layers), limit)


def _of_model(path, group, layers):
    """Yields the names and data sets of a model, given the group and the description of its layers.

    Keras numbers the layers of a class in the model's order.
    """
    counts, left = collections.Counter(), set(group)
    for layer in layers:
        kind, config = layer["class_name"], layer["config"]
        if kind not in _LAYERS and kind not in _MODELS:
            continue
        key = _MODELS[kind] if kind in _MODELS else _LAYERS[kind][0]
        counts[key] += 1
        key = key if counts[key] == 1 else f"{key}_{counts[key] - 1}"
        left.discard(key)
        if kind in _MODELS:
            yield from _of_model(path, _entry(path, group, f"{key}/layers"), config["layers"])
            continue
        yield from _of_layer(path, _entry(path, group, f"{key}/vars"), config, _LAYERS[kind][1])
    # No layers of keras.applications' networks; whoever wants the tensors shall see them.
    for key in sorted(left):
        if "vars" in set(other := _entry(path, group, key)):
            variables = _entry(path, other, "vars")
            yield from ((f"{key}/{n}", _entry(path, variables, n, h5py.Dataset)) for n in variables)


def _of_layer(path, group, config, variables):
    """Yields the names and data sets of one layer."""
    name = config["name"]
    names = [each for each in variables if config.get(_SWITCHES.get(each), True)]
    # Newer versions of Keras write the layer's name, by which the numbers can be checked.
    if len(group) != len(names) or group.attrs.get("name", name) != name:
        raise InputError(
            f"{path}: its weights are not those of the model it describes: {name!r} must have "
            f"{', '.join(names)}, got {len(group)} variables of {group.attrs.get('name', name)!r}"
        )
    for number, variable in enumerate(names):
        yield f"{name}/{variable}", _entry(path, group, str(number), h5py.Dataset)


def _read_h5(path, limit):
    """Returns the names and arrays of a `.h5` file in the form that Keras 2 gave it."""
    with h5py.File(path) as file:
        # A whole model that was saved keeps its weights one level down.
        root = _entry(path, file, "model_weights") if "model_weights" in set(file) else file
        if "layer_names" not in root.attrs:
            raise InputError(
                f"{path}: cannot be read as weights of keras.applications: it names no layers; "
                "a file that `save_weights` of Keras 3 wrote must be loaded into its own model, "
                "and that given"
            )
        return _read(path, _of_h5(path, root), limit)


def _of_h5(path, root):
    for layer in _texts(root.attrs["layer_names"]):
        group = _entry(path, root, layer)
        names = _texts(group.attrs["weight_names"])
        for name in names:
            *parents, variable = name.split(":")[0].split("/")
            # Names within may bear a suffix, "conv1_conv_1/kernel:0": the layer's is sure. With
            # more weights than any layer has it is a model within the model.
            owner = parents[-1] if parents and len(names) > _MAX_VARIABLES else layer
            yield f"{owner}/{variable}", _entry(path, group, name, h5py.Dataset)


def _texts(attribute):
    return [name.decode() if isinstance(name, bytes) else str(name) for name in attribute]


def _entry(path, group, name, kind=h5py.Group):
    """Returns the group, or what `kind` says, under `name`; it may lead through further groups."""
    for part in name.split("/"):
        # A link may lead into any file of the machine. Even `part in group` would follow it.
        if group.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
            raise InputError(f"{path}: refused: {name!r} in it is a link, which is not followed")
        group = group[part]
    if not isinstance(group, kind):
        raise InputError(
            f"{path}: {name!r} in it must be a {kind.__name__}, got a {type(group).__name__}"
        )
    return group


def _read(path, pairs, limit):
    """Returns the names with the data sets' content, all of which is checked before any is read."""
    pairs, size = list(pairs), 0
    for name, dataset in pairs:
        if dataset.external or dataset.is_virtual:
            raise InputError(f"{path}: refused: the numbers of {name!r} are in another file")
        if dataset.shape is None:
            raise InputError(f"{path}: {name!r} must be a tensor, got an empty data set")
        if dataset.dtype.name not in _READ_AS:
            raise _dtype_error(path, name, dataset.dtype.name)
        # Not `nbytes`, which overflows. What was never written takes no room in the file.
        size += math.prod(dataset.shape) * dataset.dtype.itemsize
        if size > limit:
            raise _size_error(path)
    return [(name, dataset[()]) for name, dataset in pairs]


def _checked(label, pairs):
    """Returns a dict of names to arrays that are of use, each under a name of its own."""
    names = [name for name, _ in pairs if not _is_counter(name)]
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise InputError(
            f"{label}: every tensor must have a name of its own, got {repeated[0]!r} twice; save "
            "the network of keras.applications alone"
        )
    if not names:
        raise InputError(f"{label}: holds no weights of keras.applications")
    found = _arrays(label, dict(pairs), math.inf)
    # The names as they are: from PyTorch's, prefixes that all of them have would be taken off.
    names = [name for name in names if name not in found.unusable]
    return Tensors(zip(names, found.values(), strict=True), unusable=found.unusable)


def _size_error(path):
    return InputError(
        f"{path}: refused: its tensors claim over {_MAX_EXPANSION} times the file's size; "
        "save the model with Keras, not compressed"
    )


_READERS = {".keras": _read_keras, ".h5": _read_h5}
