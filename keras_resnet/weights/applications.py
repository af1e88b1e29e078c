"""The weights of keras.applications, from a model or from a file."""

import h5py
import keras
import numpy as np
from keras import ops

from keras_resnet import archive
from keras_resnet.errors import InputError, look_up, one_line
from keras_resnet.files import expand_user


def read_keras_applications(source):
    """Reads the weights of a model of keras.applications under its names.

    Args:
        source: The model; a `.keras` file of it; or a `.h5` file of its weights, as
            keras.applications publishes them.

    Returns:
        A dict: names such as "conv1_conv/kernel" -> NumPy arrays.

    Raises:
        InputError: If the file cannot be read.

    Example:
        >>> inputs = keras.Input((8, 8, 3))
        >>> layer = keras.layers.Conv2D(4, 3, use_bias=False, name="conv1_conv")
        >>> tensors = read_keras_applications(keras.Model(inputs, layer(inputs)))
        >>> {name: array.shape for name, array in tensors.items()}
        {'conv1_conv/kernel': (3, 3, 3, 4)}
    """
    if isinstance(source, keras.Model):
        return {weight.path: ops.convert_to_numpy(weight) for weight in source.weights}
    path = expand_user(source)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return look_up(_READERS, path.suffix.lower(), "suffix of a keras.applications file")(path)


def _read_keras(path):
    return read_keras_applications(archive.load_model(path))


def _read_h5(path):
    try:
        with h5py.File(path) as file:
            # A whole model that was saved keeps its weights one level down.
            root = file.get("model_weights", file)
            tensors = {}
            for layer in _texts(root.attrs["layer_names"]):
                group = root[layer]
                for name in _texts(group.attrs["weight_names"]):
                    # Names within may bear a suffix, "conv1_conv_1/kernel:0": the layer's is sure.
                    variable = name.split("/")[-1].split(":")[0]
                    tensors[f"{layer}/{variable}"] = np.asarray(group[name])
            return tensors
    # h5py fails in many ways on a damaged file.
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read as weights of keras.applications: {one_line(error)}; a file "
            "that `save_weights` of Keras 3 wrote must be loaded into its own model, and that given"
        ) from error


def _texts(attribute):
    return [name.decode() if isinstance(name, bytes) else str(name) for name in attribute]


_READERS = {".keras": _read_keras, ".h5": _read_h5}
