"""Files that are never half-written: written beside the target, then renamed onto it."""

import contextlib
import json
import os
import secrets
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from keras_resnet.utils.errors import InputError

# What `replacing` puts between a file's name and its suffix.
_PARTIAL = ".*." + "[0-9a-f]" * 8 + ".partial*"


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path`; on success renames it onto `path`.

    A process that is killed leaves the old file or the new one. An exception inside the block
    removes the temporary file and leaves the target as it was.

    Args:
        path: The file to write. Its folder must exist.

    Yields:
        A `pathlib.Path` in the same folder with the same suffix, for the block to write.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with replacing(target) as temporary:
        ...     _ = temporary.write_text("whole")
        >>> target.read_text(), [p.name for p in target.parent.iterdir()]
        ('whole', ['note.txt'])
    """
    path = Path(path)
    # The suffix stays last: Keras and Matplotlib choose the format by it.
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial{path.suffix}")
    try:
        yield temporary
        # Without this a power cut can leave the new name on an empty file.
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_partials(folder):
    """Removes what killed writers left in `folder` (files that `replacing` had not renamed yet).

    Args:
        folder: The folder; it may be missing.
    """
    for partial in Path(folder).glob(_PARTIAL):
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder, message):
    """Holds a lock on a folder, which ends with the process however that ends.

    Where the system or the file system has no such locks, it does nothing.

    Args:
        folder: The folder.
        message: What it means that another process has the lock.

    Yields:
        A descriptor of the folder, or None where nothing could be locked.

    Raises:
        InputError: If another process holds it.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> with locked(folder, "someone is here"), locked(folder, "someone is here"):
        ...     pass
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: /...: someone is here
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
        except OSError:  # some network file systems lock no folders
            yield None
            return
        yield descriptor
    finally:
        os.close(descriptor)


def expand_user(path):
    """Returns `path` with a leading ~ replaced by a home folder, as a `pathlib.Path`.

    Raises:
        InputError: If there is no such user.
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
