"""Checks of HDF5 files: `.h5` files, and the weights in a `.keras` file."""

import math

import h5py

from keras_resnet.untrusted.common import check_claim
from keras_resnet.utils.errors import InputError


def check_hdf5(path, file, stored, slack=0):
    """Checks an HDF5 file before any of its numbers are read.

    A link or a data set may lead into any other file of the machine, and a data set whose numbers
    were never written takes no room in the file, whatever its shape.

    Args:
        path: The file's path, for messages.
        file: The open `h5py.File`.
        stored: The number of bytes of the file.
        slack: The number of bytes that its tensors may take however small the file is.

    Raises:
        InputError: If it leads to another place, or its tensors claim too much; see `check_claim`.
    """
    # `visit` returns the first value that is not None; an exception would not reach the caller.
    link = file.id.links.visit(
        lambda name, info: name if info.type != h5py.h5l.TYPE_HARD else None, info=True
    )
    if link is not None:
        name = link.rpartition(b"/")[2].decode("utf-8", "replace")
        raise InputError(f"{path}: refused: {name!r} in it is a link, which is not followed")
    claimed = 0

    def check(name, item):
        nonlocal claimed
        if not isinstance(item, h5py.Dataset):
            return
        if item.external or item.is_virtual:
            raise InputError(f"{path}: refused: the numbers of {name!r} are in another file")
        claimed += claimed_bytes(item)
        check_claim(path, "its tensors", claimed, stored, slack)

    file.visititems(check)


def claimed_bytes(dataset):
    """Returns the bytes that the numbers of a data set take, by its shape and dtype."""
    # Not `nbytes`, which overflows.
    return math.prod(dataset.shape or ()) * dataset.dtype.itemsize
