"""Opens a model of any format.

`open_runtime` finds the format by the file's name, checks the file before a parser reads it, and
returns a `Runtime`.
"""

import contextlib
import importlib
import stat
from pathlib import Path

from keras_resnet.formats import FORMATS, find_format
from keras_resnet.runtimes.base import Runtime, Tensor
from keras_resnet.runtimes.probe import Prober
from keras_resnet.untrusted import checksums, manifest
from keras_resnet.utils.errors import InputError

__all__ = ["Prober", "Runtime", "Tensor", "open_runtime"]

MAX_FILE_BYTES = 2 * 2**30
"""The size that a .tflite or .onnx file must stay below: both formats end there."""


def open_runtime(path, *, threads=None, trust=False, prober=None):
    """Opens a model.

    Before it is parsed, a file is compared with the manifest beside it and with its own checksum;
    a .tflite or .onnx file is then tried in another process (see `checksums` and `probe`).

    Args:
        path: A .keras, .tflite or .onnx file, or a SavedModel folder.
        threads: How many threads compute one batch; None for the runtime's choice. Keras and
            TensorFlow use those of this process.
        trust: Whether to load a SavedModel, which can run code, and to load .tflite and .onnx
            files without trying them in another process.
        prober: A `Prober`, for many files; by default one for this file alone.

    Returns:
        A `Runtime`.

    Raises:
        InputError: If there is no such model, it is damaged, or it breaks a rule.
    """
    path = Path(path)
    format = "saved_model" if path.is_dir() else find_format(path)
    row = FORMATS.get(format)
    if format == "saved_model":
        _check_folder(path, trust)
    is_read_here = row is None or row.parser is not None
    content = _read(path, format) if is_read_here else None
    manifest.check_listed(path, content)
    if content is None:
        return find_opener(format)(path, threads)
    if not trust:
        getattr(checksums, row.checksum)(content, path)  # a damaged file need not be tried
        with contextlib.nullcontext(prober) if prober else Prober() as used:
            used.probe(path, format, content)
    return find_opener(format)(content, path, threads)


def find_opener(format, isolated=False):
    """Imports the module that opens a format, with its libraries.

    Args:
        format: A row of `FORMATS`.
        isolated: Whether the model runs in a process without Keras; its path is trusted.

    Returns:
        Its opener, a function that returns a `Runtime`; see `Format`.
    """
    row = FORMATS[format]
    module = importlib.import_module(f"{__name__}.{row.module}")
    return getattr(module, row.isolated if isolated else row.opener)


def _check_folder(path, trust):
    if not (path / "saved_model.pb").is_file():
        raise InputError(f"{path}: no SavedModel: the folder has no saved_model.pb")
    if not trust:
        raise InputError(
            f"{path}: a SavedModel can run code when it is loaded: pass --trust (trust=True) if "
            "you know where it comes from"
        )


def _read(path, format):
    """Returns the bytes of a .tflite or .onnx file."""
    try:
        status = path.stat()
        if format is None:
            raise InputError(
                f"{path}: a model must be a .keras, .tflite or .onnx file or the folder of a "
                f"SavedModel, got the suffix {path.suffix!r}"
            )
        # Reading a named pipe would wait for ever.
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path}: must be a regular file")
        if not 0 < status.st_size < MAX_FILE_BYTES:
            raise InputError(
                f"{path}: a model file must have from 1 to {MAX_FILE_BYTES - 1} bytes, got "
                f"{status.st_size}"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{path}: no such model file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
