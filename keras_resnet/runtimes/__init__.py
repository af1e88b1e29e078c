"""One way to open a model, whatever its format.

`open_runtime` finds the format by the file's name, guards what must hold before a parser sees
the file, and returns a `Runtime`.
"""

import contextlib
import importlib
import stat
from pathlib import Path

from keras_resnet.runtimes.base import Runtime, Tensor
from keras_resnet.runtimes.probe import Prober
from keras_resnet.untrusted import checksums, manifest
from keras_resnet.utils.errors import InputError

__all__ = ["FORMATS", "Prober", "Runtime", "Tensor", "open_runtime"]

FORMATS = {".keras": "a .keras file", ".tflite": "a .tflite file", ".onnx": "an .onnx file"}
"""What can be opened, by suffix; a SavedModel is a folder."""

MAX_FILE_BYTES = 2 * 2**30
"""What a .tflite or .onnx file can have: both formats end there."""

# Each module brings libraries with it. Keras's answers for HDF5: it says why not.
_OPEN_KERAS = ("keras_file", "open_keras")
_KERAS = dict.fromkeys((".keras", ".h5", ".hdf5"), _OPEN_KERAS)
_NATIVE = {".tflite": ("tflite", "TFLiteRuntime"), ".onnx": ("onnx", "OnnxRuntime")}


def open_runtime(path, *, threads=None, trust=False, prober=None):
    """Opens a model.

    Before it is parsed, a file is compared with the manifest beside it and with its own seal;
    a .tflite or .onnx file is then tried in another process (see `seals` and `probe`).

    Args:
        path: A .keras, .tflite or .onnx file, or a SavedModel folder.
        threads: How many threads compute one answer; None leaves it to the runtime. Keras and
            TensorFlow use those of this process.
        trust: Whether to load what runs code, a SavedModel, and to load .tflite and .onnx files
            without trying them in another process.
        prober: A `Prober`, for many files; by default one for this file alone.

    Returns:
        A `Runtime`.

    Raises:
        InputError: If there is no such model, it is damaged, or it breaks a rule.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, threads, trust)
    suffix = path.suffix.lower()
    if suffix in _KERAS:
        manifest.check_listed(path)
        return _imported(*_KERAS[suffix])(path, threads)
    content = _read(path)
    manifest.check_listed(path, content)
    module, name = _NATIVE[suffix]
    if not trust:
        # In this order: a file that is damaged need not be tried.
        {".tflite": checksums.read_tflite_metadata, ".onnx": checksums.check_onnx_checksum}[suffix](
            content, path
        )
        with contextlib.nullcontext(prober) if prober else Prober() as used:
            used.probe(path, suffix[1:], content)
    return _imported(module, name)(content, path, threads)


def _imported(module, name):
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)


def _open_folder(path, threads, trust):
    if not (path / "saved_model.pb").is_file():
        raise InputError(f"{path}: no SavedModel: the folder has no saved_model.pb")
    if not trust:
        raise InputError(
            f"{path}: a SavedModel is code that runs on loading: pass --trust (trust=True) if you "
            "know where it comes from"
        )
    manifest.check_listed(path)
    return _imported("saved_model", "open_saved_model")(path, threads)


def _read(path):
    """Returns the bytes of a .tflite or .onnx file."""
    try:
        status = path.stat()
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise InputError(f"{path}: no such model file") from None
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() not in _NATIVE:
        raise InputError(
            f"{path}: a model is {', '.join(FORMATS.values())} or the folder of a SavedModel"
        )
    # A pipe would be waited on for ever.
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"{path}: no regular file")
    if not 0 < status.st_size < MAX_FILE_BYTES:
        raise InputError(
            f"{path}: a model file has from 1 to {MAX_FILE_BYTES - 1} bytes, this one has "
            f"{status.st_size}"
        )
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
