"""IDX files, the format of MNIST and its successors: gzip-compressed or unpacked.

Every fault of a file (a damaged download, a swapped name, another release of the data) is an
`InputError` that names the file.
"""

import gzip
import hashlib
import math
import zlib
from pathlib import Path

import numpy as np

from keras_resnet.utils.errors import InputError

# The first two bytes of an IDX file are zero, the third is the type of the values (8: unsigned
# byte), the fourth is the number of axes. The length of each axis follows, big-endian.
UNSIGNED_BYTE = 8


def find_idx(folder, name):
    """Returns the path of `name` or else of `name.gz` in `folder`; None if there is neither."""
    candidates = (Path(folder) / name, Path(folder) / f"{name}.gz")
    return next((path for path in candidates if path.is_file()), None)


def read_idx(path, shape, *, values=256, sha256=None, advice=""):
    """Reads an IDX file of unsigned bytes of a known shape.

    At most one byte more than expected is decompressed, so that a small file cannot fill the
    memory.

    Args:
        path: The file; a file whose name ends in `.gz` is decompressed.
        shape: The expected shape, for example (60000, 28, 28) or (60000,).
        values: Number of allowed values: each must be in `range(values)`.
        sha256: The checksum (hex) of the unpacked file, or None for any.
        advice: The remedy for a wrong checksum, at the end of the message.

    Returns:
        A read-only uint8 array of `shape`.

    Raises:
        InputError: The file cannot be read, is damaged, or has other contents.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "labels-idx1-ubyte"
        >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3]) + bytes([7, 0, 9]))
        >>> read_idx(path, (3,), values=10)
        array([7, 0, 9], dtype=uint8)
    """
    path = Path(path)
    header_size = 4 + 4 * len(shape)
    raw = _read_bytes(path, header_size + math.prod(shape) + 1)
    _check_header(path, raw, shape)
    promised, held = math.prod(shape), len(raw) - header_size
    if held != promised:
        many = f"more than {promised}" if held > promised else str(held)
        raise InputError(f"{path}: the header promises {promised} bytes of data, found {many}")
    array = np.frombuffer(raw, np.uint8, offset=header_size).reshape(shape)
    # A byte is always below 256.
    if values < 256 and array.max(initial=0) >= values:
        place = int(np.argmax(array.ravel() >= values))
        raise InputError(
            f"{path}: values must be in 0–{values - 1}, got {array.ravel()[place]} at item {place}"
        )
    found = hashlib.sha256(raw).hexdigest()
    if sha256 and found != sha256:
        raise InputError(
            f"{path}: the unpacked file's sha256 is wrong: expected {sha256}, got {found}{advice}"
        )
    return array


def _read_bytes(path, limit):
    """Returns the first `limit` bytes of the unpacked file."""
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as file:
            return file.read(limit)
    except EOFError:
        raise InputError(f"{path}: the gzip file is cut short; download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: the gzip file is damaged ({error}); download it again") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_header(path, raw, shape):
    """Raises an `InputError` unless `raw` begins with the header of an array of `shape`."""
    header_size = 4 + 4 * len(shape)
    magic = bytes([0, 0, UNSIGNED_BYTE, len(shape)])
    if raw[:4] != magic:
        raise InputError(
            f"{path}: not an IDX file of {len(shape)}-dimensional bytes: the magic number must be "
            f"{magic.hex()}, got {raw[:4].hex() or 'an empty file'}"
        )
    if len(raw) < header_size:
        raise InputError(f"{path}: the header takes {header_size} bytes, found {len(raw)}")
    found = tuple(int(length) for length in np.frombuffer(raw, ">u4", len(shape), offset=4))
    if found[0] != shape[0]:
        raise InputError(f"{path}: must hold {shape[0]} items, the header says {found[0]}")
    if found != tuple(shape):
        sizes = ("×".join(map(str, lengths[1:])) for lengths in (shape, found))
        raise InputError("{}: each item must be {}, the header says {}".format(path, *sizes))
