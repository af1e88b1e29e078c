"""The weights of keras.applications, from a model or from a file.

Files are read without building the network that they describe: a small file may describe one that
fills the memory, or one with code in it.
"""

import collections
import io
import json
import os

import h5py
import keras
from keras import ops

from keras_resnet.untrusted import keras_files
from keras_resnet.untrusted.common import check_claim, check_regular_file, refusing
from keras_resnet.untrusted.hdf5_files import check_hdf5, claimed_bytes
from keras_resnet.untrusted.zip_files import check_members, opened, read_member
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.files import expand_user
from keras_resnet.weights.checkpoint import READ_AS, dtype_error, to_tensors

_DAMAGED = "cannot be read as weights of keras.applications"

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
        `Tensors`: names such as "conv1_conv/kernel" -> arrays of float32 or float64, all of them
        finite.

    Raises:
        InputError: If the source is something else, cannot be read, or holds something other than
            finite floating-point tensors, each under a name of its own.

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
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            f"weights of keras.applications must be a model, or the path of a {_SUFFIXES} file, "
            f"got {type(source).__name__}"
        )
    path = expand_user(source)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise InputError(
            f"{path}: a file of keras.applications must end in {_SUFFIXES}, "
            f"got {path.suffix or 'no suffix'}"
        )
    check_regular_file(path, "checkpoint")
    with refusing(path, _DAMAGED):
        pairs = reader(path)
    return _checked(path, pairs)


def _read_keras(path):
    """Returns the names and arrays of a `.keras` file, which numbers its layers and variables.

    The names are in the config of the model, in the order of the numbers.
    """
    path = keras_files.check_path(path)
    with opened(path, _DAMAGED) as archive:
        check_members(path, archive)
        layers = json.loads(read_member(archive, keras_files.CONFIG))["config"]["layers"]
        weights = archive.read(keras_files.WEIGHTS)
    with h5py.File(io.BytesIO(weights), "r") as file:
        check_hdf5(path, file, path.stat().st_size)
        return _read(path, _of_model(path, _entry(path, file, "layers"), layers))


def _of_model(path, group, layers):
    """Yields the names and data sets of a model, given the group and the configs of its layers.

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
    # Other layers than those of keras.applications: their tensors are listed under their numbers.
    for key in sorted(left):
        if "vars" in (other := _entry(path, group, key)):
            variables = _entry(path, other, "vars")
            yield from ((f"{key}/{n}", _entry(path, variables, n, h5py.Dataset)) for n in variables)


def _of_layer(path, group, config, variables):
    """Yields the names and data sets of one layer."""
    name = config["name"]
    names = [each for each in variables if config.get(_SWITCHES.get(each), True)]
    # Newer versions of Keras write the layer's name: the order of the layers can be checked.
    if len(group) != len(names) or group.attrs.get("name", name) != name:
        raise InputError(
            f"{path}: its weights are not those of the model it describes: {name!r} must have "
            f"{', '.join(names)}, got {len(group)} variables of {group.attrs.get('name', name)!r}"
        )
    for number, variable in enumerate(names):
        yield f"{name}/{variable}", _entry(path, group, str(number), h5py.Dataset)


def _read_h5(path):
    """Returns the names and arrays of a `.h5` file in the format of Keras 2."""
    with h5py.File(path, "r") as file:
        check_hdf5(path, file, path.stat().st_size)
        # A whole model that was saved keeps its weights one level down.
        root = _entry(path, file, "model_weights") if "model_weights" in file else file
        if "layer_names" not in root.attrs:
            raise InputError(
                f"{path}: {_DAMAGED}: it names no layers; a file that `save_weights` of Keras 3 "
                "wrote must be loaded into its own model, and that given"
            )
        return _read(path, _of_h5(path, root))


def _of_h5(path, root):
    for layer in _texts(root.attrs["layer_names"]):
        group = _entry(path, root, layer)
        names = _texts(group.attrs["weight_names"])
        for name in names:
            *parents, variable = name.split(":")[0].split("/")
            # The names of weights may have a suffix, "conv1_conv_1/kernel:0", the layer's has none.
            # An entry with more weights than any layer has is a model within the model.
            owner = parents[-1] if parents and len(names) > _MAX_VARIABLES else layer
            yield f"{owner}/{variable}", _entry(path, group, name, h5py.Dataset)


def _texts(attribute):
    return [name.decode() if isinstance(name, bytes) else str(name) for name in attribute]


def _entry(path, group, name, kind=h5py.Group):
    """Returns the group, or the object of another `kind`, under `name` in a group."""
    entry = group[name]
    if not isinstance(entry, kind):
        raise InputError(
            f"{path}: {name!r} in it must be a {kind.__name__}, got a {type(entry).__name__}"
        )
    return entry


def _read(path, pairs):
    """Returns the names with the data sets' content; all are checked before any is read."""
    pairs = list(pairs)
    for name, dataset in pairs:
        if dataset.shape is None:
            raise InputError(f"{path}: {name!r} must be a tensor, got an empty data set")
        if dataset.dtype.name not in READ_AS:
            raise dtype_error(path, name, dataset.dtype.name)
    # Several names can refer to one data set, which `check_hdf5` counts once.
    claimed = sum(claimed_bytes(dataset) for _, dataset in pairs)
    check_claim(path, "its tensors", claimed, path.stat().st_size)
    return [(name, dataset[()]) for name, dataset in pairs]


def _checked(label, pairs):
    """Returns the pairs of names and arrays as `Tensors`, if each has a name of its own."""
    names = collections.Counter(name for name, _ in pairs)
    repeated = [name for name, count in names.items() if count > 1]
    if repeated:
        raise InputError(
            f"{label}: every tensor must have a name of its own, got {repeated[0]!r} twice; save "
            "the network of keras.applications alone"
        )
    return to_tensors(label, dict(pairs))


_READERS = {".keras": _read_keras, ".h5": _read_h5}
_SUFFIXES = " or ".join(_READERS)
