"""Checks of ZIP archives: `.keras` files and those of `torch.save`."""

import contextlib
import zipfile

from keras_resnet.untrusted.common import MAX_EXPANSION, check_claim, refusing
from keras_resnet.utils.errors import InputError, one_line

MAX_MEMBER_BYTES = 16 * 2**20
"""The largest text, such as a model's config, that is read from a member."""

_FOLDER = 16  # the bit of a member's attributes that marks it as a folder


@contextlib.contextmanager
def opened(path, reason="damaged"):
    """Opens a ZIP archive, and handles errors in the block as `refusing` does.

    Args:
        path: The file.
        reason: The consequence of an error, for the message.

    Yields:
        A `zipfile.ZipFile`.

    Raises:
        InputError: If the archive is damaged, or holds two members of one name.
    """
    with refusing(path, reason), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        # Each reader would choose another of the two.
        if len(set(names)) != len(names):
            raise InputError(f"{path}: damaged: it holds two members of one name")
        yield archive


def check_members(path, archive, slack=0, expansion=MAX_EXPANSION):
    """Checks that the members of a ZIP archive unpack to a sensible size and are whole.

    Args:
        path: The file, a `pathlib.Path`.
        archive: The `zipfile.ZipFile`.
        slack: The number of bytes that they may unpack to however small the file is.
        expansion: How many times the file's size they may unpack to.

    Raises:
        InputError: If they claim too much (see `check_claim`), or a checksum does not fit.
    """
    members = archive.infolist()
    claimed = sum(member.file_size for member in members)
    check_claim(path, "its members", claimed, path.stat().st_size, slack, expansion)
    # PyTorch returns memory that it has not filled for a member that is marked as a folder.
    folders = [each.filename for each in members if each.external_attr & _FOLDER and each.file_size]
    damaged = folders[0] if folders else archive.testzip()
    if damaged is not None:
        raise InputError(
            f"{path}: damaged: {damaged!r} in it was changed; download or save it again"
        )


def read_member(archive, name):
    """Returns a member of an open ZIP archive, of at most `MAX_MEMBER_BYTES`.

    Args:
        archive: A `zipfile.ZipFile`.
        name: The member's name.

    Returns:
        The member, bytes.

    Raises:
        zipfile.BadZipFile: If its real size is larger, or it is damaged.
    """
    try:
        with archive.open(name) as file:
            content = file.read(MAX_MEMBER_BYTES + 1)
    # zlib.error is not an OSError or ValueError; a member may also claim to be encrypted.
    except Exception as error:
        raise zipfile.BadZipFile(f"{name}: {one_line(error)}") from error
    if len(content) > MAX_MEMBER_BYTES:
        raise zipfile.BadZipFile(f"{name} is larger than {MAX_MEMBER_BYTES} bytes")
    return content
