"""The .keras file, with a card inside that says what the model knows.

A .keras file is a ZIP archive. We add one member, `CARD`, a JSON object with the class names, the
data set and, in a checkpoint, the state of the run. Keras ignores it, and a model that is copied
elsewhere keeps it.
"""

import contextlib
import json
import sys
import zipfile
from pathlib import Path

import keras

from keras_resnet import preprocessing  # noqa: F401  (registers our layers with Keras)
from keras_resnet.errors import InputError, one_line
from keras_resnet.files import replacing

CARD = "keras_resnet.json"
MAX_CARD_BYTES = 16 * 2**20

_REFUSED = {
    ".h5": "HDF5 models can carry code that runs on loading; save the model as .keras",
    ".hdf5": "HDF5 models can carry code that runs on loading; save the model as .keras",
}


@contextlib.contextmanager
def _tensorflow_only_as_backend():
    """Keeps Keras from importing TensorFlow where another backend runs.

    While Keras writes or reads a config it asks whether a value is TensorFlow's TensorShape, and
    imports TensorFlow, if it is installed, to find out: seconds and a gigabyte for nothing.
    """
    lazy = None
    if keras.backend.backend() != "tensorflow" and "tensorflow" not in sys.modules:
        # Not public: a Keras without it imports TensorFlow, and works.
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


def save_model(model, path, card):
    """Saves `model` as a .keras file, whole or not at all, with `card` inside.

    Args:
        model: A Keras model; its optimizer's state is saved with it if it is compiled.
        path: The file to write; its name ends in .keras.
        card: A dict that JSON can hold.
    """
    with replacing(path) as temporary:
        write_model(model, temporary, card)


@_tensorflow_only_as_backend()
def write_model(model, path, card):
    """Writes what `save_model` saves, under its final name from the first byte on."""
    model.save(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(CARD, json.dumps(card))


def check_model_path(path):
    """Checks, before anything is parsed, that `path` is a .keras file.

    Args:
        path: The file.

    Returns:
        `path` as a `pathlib.Path`.

    Raises:
        InputError: If it is missing, has a suffix that is not .keras, or is no ZIP archive.
    """
    path = Path(path)
    if path.suffix.lower() in _REFUSED:
        raise InputError(f"{path}: refused: {_REFUSED[path.suffix.lower()]}")
    if not path.is_file():
        raise InputError(f"{path}: no such model file")
    if path.suffix != ".keras":
        raise InputError(f"{path}: a model file must end in .keras")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: not a .keras file (no ZIP archive), or a truncated one")
    return path


def read_card(path):
    """Returns the card of a .keras file; an empty dict if it has none.

    Args:
        path: The file.

    Raises:
        InputError: If the file is no .keras file, or its card is damaged.
    """
    path = check_model_path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if CARD not in archive.namelist():
                return {}
            if archive.getinfo(CARD).file_size > MAX_CARD_BYTES:
                raise InputError(f"{path}: its card is larger than {MAX_CARD_BYTES} bytes")
            card = json.loads(archive.read(CARD))
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: damaged: {one_line(error)}") from error
    if not isinstance(card, dict):
        raise InputError(f"{path}: its card must be a JSON object, got {type(card).__name__}")
    return card


@_tensorflow_only_as_backend()
def load_model(path):
    """Loads a .keras file for inference; never runs code from it.

    Args:
        path: The file.

    Returns:
        The Keras model, not compiled.

    Raises:
        InputError: If the file is no .keras file, is damaged, or holds what Keras's `safe_mode`
            refuses to load, such as a Lambda layer.
    """
    path = check_model_path(path)
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    # A damaged or hostile file can fail in any of Keras's, h5py's or zipfile's ways.
    except Exception as error:
        raise InputError(f"{path}: cannot be loaded: {_reason(error)}") from error


def _reason(error):
    """Returns in one line why Keras did not load a model."""
    text = str(error)
    # Keras recommends to switch `safe_mode` off, which would run the code.
    if "safe_mode" in text or "enable_unsafe_deserialization" in text:
        return (
            "it holds code (a Lambda layer, …) or names a file beside it, which is not run or "
            "read: build the model of layers without such, and save it again"
        )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # "… Example error message for object <Dense …>:", and what it is stands below.
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return one_line(error)


@_tensorflow_only_as_backend()
def load_weights(model, path):
    """Loads weights, and the optimizer's state if `model` is compiled, from a .keras file.

    Args:
        model: A Keras model of the same structure as the one saved.
        path: The file.

    Raises:
        InputError: If the file is damaged or holds another structure.
    """
    path = check_model_path(path)
    try:
        model.load_weights(path)
    except Exception as error:
        raise InputError(f"{path}: cannot be loaded: {one_line(error)}") from error
