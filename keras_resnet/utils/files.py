"""Writes files whole or not at all: beside the target, then renamed."""

import contextlib
import json
import os
import secrets
import shutil
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from keras_resnet.utils.errors import InputError

# The names of the temporary files of `replacing`.
_PARTIAL = ".*." + "[0-9a-f]" * 8 + ".partial*"


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`, and renames it to `path` at the end of the block.

    A killed process leaves either the old or the new file. An exception inside the block removes
    the temporary file and leaves the target unchanged.

    Args:
        path: The file to write. Its folder must exist.

    Yields:
        A `pathlib.Path` in the same folder with the same suffix, which the block writes.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('whole', ['note.txt'])
    """
    path = Path(path)
    # The suffix stays at the end: Keras and Matplotlib choose the format by it.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        yield temporary
        # Otherwise a power cut can leave an empty file under the new name.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partials(folder):
    """Removes the temporary files that killed processes left in `folder`; see `replacing`.

    Args:
        folder: The folder; it may be missing.
    """
    for partial in Path(folder).glob(_PARTIAL):
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder, message):
    """Holds a lock on a folder, which the system releases when the process ends.

    It does nothing if the system or the file system does not support locks.

    Args:
        folder: The folder.
        message: The error's text if another process holds the lock.

    Yields:
        A descriptor of the folder, or None if locks are not supported.

    Raises:
        InputError: Another process holds the lock.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with locked(folder, "it is in use"), locked(folder, "it is in use"):
        ...     pass
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: /...: it is in use
    """
    if fcntl is None:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: {message}") from None
        except OSError:  # some network file systems do not lock folders
            yield None
            return
        yield descriptor
    finally:
        os.close(descriptor)


def expand_user(path):
    """Returns `path` as a `pathlib.Path`, with a leading ~ replaced by a home folder.

    Raises:
        InputError: There is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no such home folder") from error


def write_text(path, text):
    """Writes `text` to `path` in UTF-8, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Writes `value` to `path` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_space(folder, needed):
    """Raises an `InputError` if less disk space is free than needed.

    Args:
        folder: A folder.
        needed: Bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder}: the files to write need {needed / 2**20:.0f} MiB of disk space, and "
            f"{free / 2**20:.0f} MiB are free"
        )
