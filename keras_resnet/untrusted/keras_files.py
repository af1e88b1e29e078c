"""Checks of `.keras` files, before Keras builds the model that they describe."""

import contextlib
import io
import json
import math
import zipfile
from pathlib import Path

import h5py
import keras

from keras_resnet.untrusted.common import check_claim, check_regular_file
from keras_resnet.untrusted.hdf5_files import check_hdf5
from keras_resnet.untrusted.zip_files import check_members, opened, read_member
from keras_resnet.utils.errors import InputError

CONFIG = "config.json"
WEIGHTS = "model.weights.h5"

SLACK_BYTES = 64 * 2**20
"""The number of bytes that a model may take however small its file is."""
MAX_COMPRESSION = 100
"""How many times its size a file may unpack to: pruned weights are mostly zeros."""
MAX_ELEMENTS = 2**28
"""The largest number of elements that a layer may output for one image."""


def check_path(path):
    """Checks, before anything is parsed, that `path` is a `.keras` file.

    Args:
        path: The file.

    Returns:
        `path` as a `pathlib.Path`.

    Raises:
        InputError: If it is missing, has another suffix, or is no ZIP archive.
    """
    suffix = Path(path).suffix
    if suffix.lower() in (".h5", ".hdf5"):
        raise InputError(
            f"{path}: refused: HDF5 models can carry code that runs on loading; save the model as "
            ".keras"
        )
    path = check_regular_file(path, "model")
    if suffix != ".keras":
        raise InputError(f"{path}: a model file must end in .keras, got {suffix or 'no suffix'}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a .keras file (no ZIP archive), or a truncated one")
    return path


def read_json(path, name, default=None):
    """Returns the content of a JSON member of a `.keras` file.

    Args:
        path: The file, which `check_path` has accepted.
        name: The member's name.
        default: The result if there is no such member.

    Raises:
        InputError: If the archive or the member is damaged, or the member is too large.
    """
    with opened(path) as archive:
        if name not in archive.namelist():
            return default
        return json.loads(read_member(archive, name))


def check_content(path):
    """Checks all members of a `.keras` file, and the tensors among them.

    Args:
        path: The file, which `check_path` has accepted.

    Raises:
        InputError: If it is damaged, claims far more than it stores, or leads to other files.
    """
    with opened(path) as archive:
        check_members(path, archive, SLACK_BYTES, MAX_COMPRESSION)
        if WEIGHTS in archive.namelist():
            with h5py.File(io.BytesIO(archive.read(WEIGHTS)), "r") as weights:
                check_hdf5(path, weights, archive.getinfo(WEIGHTS).file_size, SLACK_BYTES)


def check_model_size(path):
    """Checks that the model that a `.keras` file describes is not far larger than the file.

    Keras creates all variables before it reads the weights: one changed number in the
    config can cause an allocation of a terabyte. So the model is built here without variables.

    Args:
        path: The file, which `check_path` has accepted.

    Raises:
        InputError: If the model is too large, or its config is damaged.
        Exception: Any error of Keras, if it cannot build the model.
    """
    config = read_json(path, CONFIG)
    if not isinstance(config, dict):
        raise InputError(f"{path}: damaged: its {CONFIG} must be a JSON object")
    # As Keras does for `compile=False`.
    variables, outputs = _build_without_variables({**config, "compile_config": None})
    claimed = sum(4 * math.prod(shape) for shape in variables)
    with opened(path) as archive:
        stored = sum(member.file_size for member in archive.infolist())
    check_claim(path, "the model's variables", claimed, stored, SLACK_BYTES)
    largest = max((math.prod(size or 1 for size in shape) for shape in outputs), default=0)
    if largest > MAX_ELEMENTS:
        raise InputError(
            f"{path}: refused: a layer would output {largest} elements for one image, at most "
            f"{MAX_ELEMENTS} are allowed; build the model for smaller images"
        )


def _build_without_variables(config):
    """Returns the shapes of a model's variables, and of its layers' outputs for one image."""
    with keras.StatelessScope(), contextlib.ExitStack() as deferred:
        # Not public. Without it Keras would give all variables their values at the scope's end.
        try:
            from keras.src.backend.common import global_state
        except ImportError:
            return [], []
        key = "uninitialized_variables"
        before = global_state.get_global_attribute(key)
        global_state.set_global_attribute(key, [])
        deferred.callback(global_state.set_global_attribute, key, before or [])
        model = keras.saving.deserialize_keras_object(config, safe_mode=True)
        variables = [tuple(each.shape) for each in global_state.get_global_attribute(key)]
        return variables, [tuple(each.shape) for each in _outputs(model)]


def _outputs(model):
    """Yields the symbolic outputs of a model's layers, and of the layers inside them."""
    for operation in getattr(model, "operations", ()):
        yield from _outputs(operation)
        # A layer that was never called has no output.
        with contextlib.suppress(AttributeError, ValueError):
            yield from (each for each in keras.tree.flatten(operation.output) if each is not None)
