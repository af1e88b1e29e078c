"""The .keras file, with metadata of this package.

A .keras file is a ZIP archive. We add one member, `METADATA`, a JSON object with the class names,
the data set and, in a checkpoint, the state of the run. Keras ignores it, and a copy of the file
keeps it.
"""

import contextlib
import json
import os
import sys
import zipfile
from pathlib import Path

import keras

from keras_resnet import PACKAGE
from keras_resnet.untrusted import checksums, keras_files
from keras_resnet.untrusted.common import refusing
from keras_resnet.untrusted.manifest import MANIFEST
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user, replacing

TRAINED = {"fashion_mnist": Path(__file__).parent / "trained" / "fashion_mnist.keras"}
"""The models that are a part of this package. `benchmarks/trained_model.py` makes them."""

METADATA = checksums.METADATA
_ATTRIBUTE = "keras_resnet_metadata"


def find_model(path):
    """Returns the path of a model: `path` itself, the model in a run folder, or a row of `TRAINED`.

    Args:
        path: A model file, a SavedModel folder, a run folder, or a row of `TRAINED`. Files and
            folders take precedence over rows.

    Returns:
        A `Path`; it need not exist.

    Raises:
        InputError: If the run folder has no finished model.

    Example:
        >>> find_model("fashion_mnist").name, find_model("model.tflite").name
        ('fashion_mnist.keras', 'model.tflite')
    """
    given, path = os.fspath(path), expand_user(path)
    if given in TRAINED and not os.path.exists(path):
        return TRAINED[given]
    if not os.path.isdir(path) or (path / "saved_model.pb").is_file():
        return path
    model = path / "model.keras"
    if model.is_file():
        return model
    last = path / "checkpoints" / "last.keras"
    hint = "it is neither a run folder nor a SavedModel"
    if last.is_file():
        hint = f"the run has not finished; name {last}, or finish it with train --resume"
    elif (path / MANIFEST).is_file():
        hint = "it is an export; name one of its files, such as model-float32.tflite"
    if given in TRAINED:
        hint += "; it hides the installed model of that name"
    raise InputError(f"{path}: no model.keras there: {hint}")


@contextlib.contextmanager
def _tensorflow_only_as_backend():
    """Keeps Keras from importing TensorFlow where another backend runs.

    While Keras writes or reads a config it tests whether a value is TensorFlow's TensorShape, and
    imports TensorFlow for this test, if it is installed: seconds and a gigabyte for nothing.
    """
    lazy = None
    if keras.backend.backend() != "tensorflow" and "tensorflow" not in sys.modules:
        # Not public. A Keras without it imports TensorFlow, and works.
        with contextlib.suppress(ImportError):
            from keras.src.utils.module_utils import tensorflow as lazy
    if lazy is None:
        yield
        return
    lazy._available = False
    try:
        yield
    finally:
        lazy._available = None  # "not known yet", as it was


def save_model(model, path, metadata=None):
    """Saves `model` as a .keras file, whole or not at all, with `metadata` inside.

    Args:
        model: A Keras model; its optimizer's state is saved with it if it is compiled.
        path: The file to write; its name ends in .keras.
        metadata: A dict that JSON can hold; by default the model's own, see `attach_metadata`.
    """
    metadata = get_metadata(model) if metadata is None else metadata
    with replacing(path) as temporary:
        write_model(model, temporary, metadata)


def attach_metadata(model, metadata):
    """Gives a Keras model in memory the metadata that its file would hold.

    Args:
        model: A Keras model. `model.save` does not write its metadata, `save_model` does.
        metadata: A dict that JSON can hold.
    """
    # Around Keras's own `__setattr__`, which looks for layers in every value.
    object.__setattr__(model, _ATTRIBUTE, metadata)


def get_metadata(model):
    """Returns the metadata that `attach_metadata` gave a Keras model; an empty dict without."""
    return getattr(model, _ATTRIBUTE, {})


@_tensorflow_only_as_backend()
def write_model(model, path, metadata):
    """Saves `model` like `save_model`, but directly to `path`, not to a temporary file first."""
    model.save(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(METADATA, json.dumps(metadata))


def read_metadata(path):
    """Returns the metadata of a .keras file; an empty dict if it has none.

    Args:
        path: The file.

    Raises:
        InputError: If the file is no .keras file, or its metadata is damaged.
    """
    path = keras_files.check_path(path)
    metadata = keras_files.read_json(path, METADATA, default={})
    if not isinstance(metadata, dict):
        raise InputError(
            f"{path}: its metadata must be a JSON object, got {type(metadata).__name__}"
        )
    return checksums.rename_old_keys(metadata)


def is_ours(path):
    """Returns whether a .keras file describes a model with layers of this package; builds nothing.

    Args:
        path: The file.

    Raises:
        InputError: If the file is no .keras file, or its config cannot be read.
    """
    config = keras_files.read_json(keras_files.check_path(path), keras_files.CONFIG)
    return f'"registered_name": "{PACKAGE}>' in json.dumps(config)


@_tensorflow_only_as_backend()
def load_model(path):
    """Loads a .keras file for inference; never runs code from it.

    Args:
        path: The file.

    Returns:
        The Keras model, not compiled.

    Raises:
        InputError: If the file is no .keras file, is damaged, or holds an object that Keras's
            `safe_mode` refuses to load, such as a Lambda layer.
    """
    path = keras_files.check_path(path)
    keras_files.check_content(path)
    with refusing(path, "cannot be loaded", _explain):
        keras_files.check_model_size(path)
        return keras.models.load_model(path, compile=False, safe_mode=True)


@_tensorflow_only_as_backend()
def load_weights(model, path):
    """Loads weights, and the optimizer's state if `model` is compiled, from a .keras file.

    Args:
        model: A Keras model of the same structure as the one saved.
        path: The file.

    Raises:
        InputError: If the file is damaged or holds another structure.
    """
    path = keras_files.check_path(path)
    keras_files.check_content(path)
    with refusing(path, "cannot be loaded", _explain):
        model.load_weights(path)


def _explain(error):
    """Returns in one line why Keras did not load a model."""
    text = str(error)
    # Keras recommends to switch `safe_mode` off, which would run the code.
    if "safe_mode" in text or "enable_unsafe_deserialization" in text:
        return (
            "it holds code (a Lambda layer, …) or names a file beside it, which is not run or "
            "read: build the model of layers without such, and save it again"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # After "… Example error message for object <Dense …>:" the reason is the next line.
    return " ".join(lines[:2]) if lines and lines[0].endswith(":") else one_line(error)
