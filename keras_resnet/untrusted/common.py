"""Rules for every foreign file: it is a regular file, and claims little more than it stores."""

import contextlib
import os

from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user
from keras_resnet.utils.tables import printable

MAX_EXPANSION = 4
"""How many times its stored bytes a file may claim.

Tensors that share memory, such as tied weights, are stored once and claimed twice. Only a file
made to fill the memory claims more.
"""


def check_regular_file(path, kind):
    """Checks that there is a file, which is neither empty nor without end.

    Args:
        path: The file; a leading ~ is replaced.
        kind: The kind of file, for messages: "checkpoint", "model".

    Returns:
        `path` as a `pathlib.Path`.

    Raises:
        InputError: If there is no such file, or it is empty, a folder, a pipe or a device.
    """
    path = expand_user(path)
    # Functions of os.path return False where pathlib's raise, such as for a name too long.
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; name the {kind} file in it")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such {kind} file")
    if not os.path.isfile(path):  # Opening a pipe would wait forever.
        raise InputError(f"{path}: a {kind} must be a regular file, not a pipe or a device")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path}: is empty; download or save it again")
    return path


def check_claim(path, claimant, claimed, stored, slack=0, expansion=MAX_EXPANSION):
    """Refuses a file that claims far more bytes than it stores.

    Args:
        path: The file, for the message.
        claimant: The part of the file that claims them, for the message.
        claimed: The number of bytes that reading this part would take.
        stored: The number of bytes of the file.
        slack: The number of bytes that are allowed however small the file is.
        expansion: How many times `stored` may be claimed.

    Raises:
        InputError: If `claimed` is over `slack` and `expansion` times `stored`.

    Example:
        >>> check_claim("model.pth", "its tensors", claimed=400, stored=100)
        >>> check_claim("model.pth", "its tensors", claimed=401, stored=100)
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: model.pth: refused: its tensors claim over 4 times \
the file's size (401 bytes of 100); save it again, not compressed
    """
    if claimed > slack + expansion * stored:
        raise InputError(
            f"{path}: refused: {claimant} claim over {expansion} times the file's size "
            f"({claimed} bytes of {stored}); save it again, not compressed"
        )


@contextlib.contextmanager
def refusing(path, reason, explain=one_line):
    """Turns every error of a parser into an `InputError` of one line.

    A damaged or hostile file can raise any exception of zipfile, zlib, json, h5py, PyTorch, ….

    Args:
        path: The file, for the message.
        reason: The consequence, for the message, such as "damaged".
        explain: A function that returns one line for an exception.

    Raises:
        InputError: For any exception in the block. An `InputError` that names the file passes
            unchanged; that of a layer, which knows no file, gets its name.

    Example:
        >>> with refusing("model.keras", "damaged"):
        ...     int("three")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: model.keras: damaged: invalid \
literal for int() with base 10: 'three'
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) and str(path) in str(error):
            raise
        raise InputError(f"{path}: {reason}: {printable(explain(error))[:300]}") from error
