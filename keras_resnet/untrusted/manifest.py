"""The manifest of an export folder: its files, their checksums and their verification.

`manifest.json` lies beside the files that it lists. It is checked against a schema before it is
used, and a listed file is compared by size and sha256 before it is parsed.
"""

import hashlib
import json
import math
import os
from pathlib import Path

from keras_resnet.untrusted import schema
from keras_resnet.utils.errors import InputError, one_line

MANIFEST = "manifest.json"
VERSION = 1
MAX_BYTES = 16 * 2**20

SPLIT_OPTIONS = {
    # Null: all images of the data set are evaluated.
    "validation_split": schema.Optional((schema.SHARE, schema.NULL)),
    "seed": schema.Optional(schema.COUNT),
    "skip_bad": schema.Optional(schema.FLAG),
}
"""Options of `load_dataset` that are needed to split a data set in the same way again."""

_CHUNK = 2**20

# Keys that earlier versions wrote -> the keys of today.
_OLD_KEYS = {"gate": "tolerance", "validation_share": "validation_split"}

_LATENCY = schema.Map({"median": schema.NUMBER, "p95": schema.NUMBER})
_TENSOR = {"name": schema.TEXT, "shape": [(schema.COUNT, schema.NULL)], "dtype": schema.TEXT}
_ARTIFACT = {
    "file": schema.FILE,
    "format": schema.TEXT,
    "precision": schema.TEXT,
    "batch": (schema.COUNT, schema.NULL),
    "bytes": schema.COUNT,
    "sha256": schema.SHA256,
    "input": _TENSOR,
    "output": _TENSOR,
    "images": schema.COUNT,
    "max_difference": schema.NUMBER,
    "mean_difference": schema.NUMBER,
    "agreement": schema.SHARE,
    # Null: the images have no labels.
    "accuracy": (schema.SHARE, schema.NULL),
    "accuracy_change": (schema.NUMBER, schema.NULL),
    "tolerance": schema.OBJECT,
    "failures": [schema.TEXT],
    "published_by_force": schema.FLAG,
    "latency_ms": _LATENCY,
    "operators": schema.Map(schema.COUNT),
}
_SCHEMA = {
    "manifest_version": schema.Rule(
        "the number 1", lambda value: value == VERSION and value is not True
    ),
    "created": schema.TEXT,
    "model": {"name": schema.TEXT, "parameters": schema.COUNT},
    "source": {"path": schema.TEXT, "sha256": schema.SHA256},
    "tool_versions": schema.Map((schema.TEXT, schema.NULL)),
    "machine": schema.OBJECT,
    "class_names": [schema.TEXT],
    "data": {
        "dataset": schema.TEXT,
        "split": schema.TEXT,
        "images": schema.COUNT,
        "fingerprint": schema.TEXT,
        "options": schema.Optional(SPLIT_OPTIONS),
    },
    "keras": {"accuracy": (schema.SHARE, schema.NULL), "latency_ms": _LATENCY},
    "reference": {"file": schema.FILE, "bytes": schema.COUNT, "sha256": schema.SHA256},
    "artifacts": [_ARTIFACT],
}


def digest(path):
    """Returns the size and the checksum of a file, or of a folder with all that is in it.

    Args:
        path: The file or folder. A folder's checksum is the sha256 of one line a file, sorted:
            relative path with forward slashes, sha256 and size in bytes.

    Returns:
        (bytes, sha256 in hexadecimal); a folder's bytes are the sum over its files.

    Raises:
        InputError: If it is missing, or holds anything but files and folders (a link).

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "empty"
        >>> _ = path.write_bytes(b"")
        >>> digest(path)[0], digest(path)[1][:16]
        (0, 'e3b0c44298fc1c14')
    """
    path = Path(path)
    try:
        return _digest_folder(path) if path.is_dir() else _digest_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _digest_file(path):
    whole, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while part := file.read(_CHUNK):
            whole.update(part)
            size += len(part)
    return size, whole.hexdigest()


def _digest_folder(folder):
    lines, total = [], 0
    for path in folder.rglob("*"):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise InputError(f"{path}: a link or device inside a model's folder is refused")
        if path.is_file():
            size, sha256 = _digest_file(path)
            total += size
            lines.append(f"{path.relative_to(folder).as_posix()} {sha256} {size}\n")
    # "surrogateescape" encodes names that are not UTF-8.
    return total, hashlib.sha256(
        "".join(sorted(lines)).encode("utf-8", "surrogateescape")
    ).hexdigest()


def read_manifest(folder):
    """Reads the manifest of an export folder and checks it against the schema.

    Args:
        folder: The export folder.

    Returns:
        The manifest, a dict. Keys that earlier versions named otherwise have the names of today;
        unknown keys are kept.

    Raises:
        InputError: If there is no manifest, or it breaks a rule.
    """
    path = Path(folder) / MANIFEST
    manifest = _parse(path)
    schema.check(manifest, _SCHEMA, path)
    names = [artifact["file"] for artifact in manifest["artifacts"]]
    if len(set(names)) != len(names):
        raise InputError(f"{path}: damaged: it lists two artifacts under one name")
    return manifest


def check_listed(path, content=None):
    """Compares a file or folder with the manifest beside it, if there is one that lists it.

    Args:
        path: The file or folder.
        content: The file's bytes, if they have been read already.

    Raises:
        InputError: If the manifest breaks a rule, or lists `path` with another size or sha256.
    """
    # Links are not resolved: the manifest lies beside the link.
    path = Path(path)
    absolute = Path(os.path.abspath(path))
    listing = absolute.with_name(MANIFEST) if absolute.name else None
    # Other programs have files of that name, such as web app manifests.
    if listing is None or not os.path.lexists(listing) or "manifest_version" not in _parse(listing):
        return
    manifest = read_manifest(listing.parent)
    for artifact in manifest["artifacts"]:
        if artifact["file"] == absolute.name and (change := find_change(path, artifact, content)):
            raise InputError(
                f"{path}: not the file that its {MANIFEST} lists: {change}: export it again"
            )


def find_change(path, row, content=None):
    """Compares the size and sha256 of a file or folder with its row of a manifest.

    Args:
        path: The file or folder.
        row: A dict with "bytes" and "sha256".
        content: The file's bytes, if they have been read already.

    Returns:
        The first difference in words; None if there is none.

    Raises:
        InputError: If the file cannot be read.
    """
    if content is None:
        size, sha256 = digest(path)
    else:
        size, sha256 = len(content), hashlib.sha256(content).hexdigest()
    for key, found in (("bytes", size), ("sha256", sha256)):
        if row[key] != found:
            return f"{key} must be {row[key]}, got {found}"
    return None


def _parse(path):
    """Returns the JSON object in `path`."""
    try:
        # A pipe would block for ever, and a link is followed to a regular file only.
        if not path.is_file():
            raise InputError(f"{path}: there is no such manifest")
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"{path}: a manifest may have {MAX_BYTES} bytes, this one has more")
        manifest = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: damaged: nested too deeply") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged: {one_line(error)!a:.200}") from error
    if not isinstance(manifest, dict):
        raise InputError(f"{path}: must hold a JSON object, got {type(manifest).__name__}")
    return manifest


def _object(pairs):
    found = {_OLD_KEYS.get(key, key): value for key, value in pairs}
    if len(found) != len(pairs):
        raise ValueError("an object has one key twice")
    return found


def _constant(name):
    raise ValueError(f"{name} is no JSON number")


def _float(text):
    value = float(text)
    return value if math.isfinite(value) else _constant(text)
