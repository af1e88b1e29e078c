"""The .keras file, with metadata of ours inside.

A .keras file is a ZIP archive. We add one member, `METADATA`, a JSON object with the class names,
the data set and, in a checkpoint, the state of the run. Keras ignores it, and a copy of the file
keeps it.
"""

import contextlib
import io
import json
import math
import sys
import zipfile
from pathlib import Path

import h5py
import keras

from keras_resnet import PACKAGE
from keras_resnet.untrusted import checksums
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import replacing
from keras_resnet.utils.tables import printable

METADATA = checksums.METADATA
WEIGHTS = "model.weights.h5"
_OTHER_WEIGHTS = "model.weights.npz"
_CONFIG = "config.json"

SLACK_BYTES = 64 * 2**20
"""What anything may take, however little is stored for it."""
MAX_ELEMENTS = 2**28
"""Numbers that a layer may give for one image."""

_CHUNK = 2**20
# Keras stores members as they are; text shrinks to a tenth.
_MAX_RATIO = 100

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


def save_model(model, path, metadata):
    """Saves `model` as a .keras file, whole or not at all, with `metadata` inside.

    Args:
        model: A Keras model; its optimizer's state is saved with it if it is compiled.
        path: The file to write; its name ends in .keras.
        metadata: A dict that JSON can hold.
    """
    with replacing(path) as temporary:
        write_model(model, temporary, metadata)


@_tensorflow_only_as_backend()
def write_model(model, path, metadata):
    """Writes what `save_model` saves, under its final name from the first byte on."""
    model.save(path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(METADATA, json.dumps(metadata))


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


def read_metadata(path):
    """Returns the metadata of a .keras file; an empty dict if it has none.

    Args:
        path: The file.

    Raises:
        InputError: If the file is no .keras file, or its metadata is damaged.
    """
    path = check_model_path(path)
    with _opened(path) as archive:
        if METADATA not in archive.namelist():
            return {}
        metadata = json.loads(checksums.read_member(archive, METADATA))
    if not isinstance(metadata, dict):
        raise InputError(
            f"{path}: its metadata must be a JSON object, got {type(metadata).__name__}"
        )
    return metadata


def is_ours(path):
    """Returns whether a .keras file describes a model with layers of this package; builds nothing.

    Args:
        path: The file.

    Raises:
        InputError: If the file is no .keras file, or its config cannot be read.
    """
    path = check_model_path(path)
    with _opened(path) as archive:
        text = json.dumps(json.loads(checksums.read_member(archive, _CONFIG)))
    return f'"registered_name": "{PACKAGE}>' in text


@contextlib.contextmanager
def _opened(path):
    """Yields the open ZIP archive; what fails in the block becomes an `InputError`."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # Which of two members is read is each reader's own choice.
            if len(set(names)) != len(names):
                raise zipfile.BadZipFile("it holds two members of one name")
            yield archive
    except InputError:
        raise
    # zipfile, zlib, json and h5py each have their own kinds.
    except Exception as error:
        raise InputError(f"{path}: damaged: {_reason(error)}") from error


def _check_whole(path):
    """Checks a .keras file before Keras parses it: checksums, and what it would take to read.

    Raises:
        InputError: If a checksum is wrong, or a member or tensor is far larger than what is
            stored.
    """
    with _opened(path) as archive:
        for info in archive.infolist():
            if info.file_size > max(SLACK_BYTES, _MAX_RATIO * info.compress_size):
                raise zipfile.BadZipFile(f"{info.filename} would unpack to {info.file_size} bytes")
            with archive.open(info) as file:
                while file.read(_CHUNK):
                    pass  # at its end zipfile compares the checksum
        if WEIGHTS in archive.namelist():
            stored = archive.getinfo(WEIGHTS).file_size
            _check_tensors(io.BytesIO(archive.read(WEIGHTS)), stored)


def _check_tensors(file, stored):
    """Refuses HDF5 tensors that say that they are larger than all that is stored."""
    sizes = []

    def add(_, item):
        if isinstance(item, h5py.Dataset):
            sizes.append(math.prod(item.shape or ()) * item.dtype.itemsize)

    with h5py.File(file, "r") as weights:
        weights.visititems(add)
    if sum(sizes) > _allowed(stored):
        raise ValueError(f"its tensors say that they have {sum(sizes)} bytes, of {stored} stored")


def _allowed(stored):
    """Returns how many bytes a model may take whose weights take `stored` in the file."""
    # Weights are stored as they are; seeds, and what layers share, may count twice.
    return SLACK_BYTES + 4 * stored


class _TooLarge(Exception):
    """A model that would take far more than its file has for it."""


def _read_config(path):
    """Returns a .keras file's config, and how many bytes its weights take there."""
    with _opened(path) as archive:
        names = [name for name in (WEIGHTS, _OTHER_WEIGHTS) if name in archive.namelist()]
        stored = sum(archive.getinfo(name).file_size for name in names)
        config = json.loads(checksums.read_member(archive, _CONFIG))
        # As Keras does: what it was compiled with is not needed.
        return {**config, "compile_config": None}, stored


def _check_sizes(variables, tensors, stored):
    """Refuses a model that would be far larger than the weights that its file has for it.

    Keras makes a model before it reads the weights: a changed number in the config is enough to
    ask for a terabyte. So the model is first made without its variables.
    """
    needed = sum(4 * math.prod(shape) for shape in variables)
    if needed > _allowed(stored):
        raise _TooLarge(f"the model would take {needed} bytes, and the file has {stored} for it")
    largest = max((math.prod(size or 1 for size in shape) for shape in tensors), default=0)
    if largest > MAX_ELEMENTS:
        raise _TooLarge(f"a layer would give {largest} numbers for one image")


def _made_without_variables(config):
    """Returns the shapes of a model's variables, and of what its layers give for one image."""
    with keras.StatelessScope(), contextlib.ExitStack() as deferred:
        # Not public: without it Keras would give all variables their values at the scope's end.
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
    """Yields what each layer of a model gives, as symbolic tensors, and the layers inside."""
    for operation in getattr(model, "operations", ()):
        yield from _outputs(operation)
        # Asking a layer that was never called is an error.
        with contextlib.suppress(AttributeError, ValueError):
            yield from (each for each in keras.tree.flatten(operation.output) if each is not None)


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
    _check_whole(path)
    config, stored = _read_config(path)
    try:
        variables, tensors = _made_without_variables(config)
        _check_sizes(variables, tensors, stored)
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except _TooLarge as error:
        raise InputError(f"{path}: damaged or hostile: {error}") from error
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
    text = f"{lines[0]} {lines[1]}" if len(lines) > 1 and lines[0].endswith(":") else None
    return printable(text or one_line(error))[:300]


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
    _check_whole(path)
    try:
        model.load_weights(path)
    except Exception as error:
        raise InputError(f"{path}: cannot be loaded: {_reason(error)}") from error
