"""The manifest of an export: which files there are, what they gave, and their checksums.

`manifest.json` lies beside the files that it lists. Who reads one trusts none of it before it is
checked; who loads a file that it lists compares size and sha256 before anything is parsed.
"""

import hashlib
import json
import math
import os
from pathlib import Path

from keras_resnet.utils.errors import InputError, one_line

MANIFEST = "manifest.json"
VERSION = 1
MAX_BYTES = 16 * 2**20

_CHUNK = 2**20
_HEX = frozenset("0123456789abcdef")
_MOST = 2**63


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
    # A name that is no UTF-8 still has bytes.
    return total, hashlib.sha256(
        "".join(sorted(lines)).encode("utf-8", "surrogateescape")
    ).hexdigest()


def read_manifest(folder):
    """Returns the manifest of an export, checked against the rules of its version.

    Args:
        folder: The export's folder.

    Returns:
        The manifest, a dict. Keys that this version does not know are left as they are.

    Raises:
        InputError: If there is none, or it breaks a rule.
    """
    path = Path(folder) / MANIFEST
    manifest = _parse(path)
    _check(path, "", manifest, _SCHEMA)
    names = [artifact["file"] for artifact in manifest["artifacts"]]
    if len(set(names)) != len(names):
        raise InputError(f"{path}: damaged: it lists two artifacts under one name")
    return manifest


def check_listed(path, content=None):
    """Compares a file or folder with the manifest beside it, if there is one that lists it.

    Args:
        path: The file or folder.
        content: The file's bytes, where they have been read.

    Raises:
        InputError: If the manifest breaks a rule, or what it says of `path` does not fit.
    """
    # Without the links resolved: the manifest lies beside the name.
    path = Path(path)
    absolute = Path(os.path.abspath(path))
    listing = absolute.with_name(MANIFEST) if absolute.name else None
    # Others have files of that name: browsers, for one.
    if listing is None or not os.path.lexists(listing) or "manifest_version" not in _parse(listing):
        return
    manifest = read_manifest(listing.parent)
    for artifact in manifest["artifacts"]:
        if artifact["file"] == absolute.name:
            _check_artifact(path, artifact, content)


def _check_artifact(path, artifact, content):
    if content is not None:
        size, sha256 = len(content), hashlib.sha256(content).hexdigest()
    elif path.is_file() and path.stat().st_size != artifact["bytes"]:
        size, sha256 = path.stat().st_size, None
    else:
        size, sha256 = digest(path)
    for what, found in (("bytes", size), ("sha256", sha256)):
        if artifact[what] != found:
            raise InputError(
                f"{path}: not the file that its {MANIFEST} lists: {what} {artifact[what]} there, "
                f"{found} here: export it again"
            )


# ----------------------------------------------------------------------------------------------
# Reading
# ----------------------------------------------------------------------------------------------


def _parse(path):
    """Returns the JSON object in `path`."""
    try:
        # No link or pipe: a reader would wait on one for ever.
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
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has one key twice")
    return found


def _constant(name):
    raise ValueError(f"{name} is no JSON number")


def _float(text):
    value = float(text)
    return value if math.isfinite(value) else _constant(text)


# ----------------------------------------------------------------------------------------------
# The rules. A dict is an object with at least these keys, a list of one an array of such, and
# `_Map` an object of any keys; a function says whether it accepts a value, a tuple of them whether
# one does.
# ----------------------------------------------------------------------------------------------


def _text(value):
    """Text that UTF-8 can hold."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _count(value):
    """A whole number from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MOST


def _number(value):
    """A finite number."""
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and -_MOST < value < _MOST
        and math.isfinite(value)
    )


def _share(value):
    """A number between 0 and 1."""
    return _number(value) and 0 <= value <= 1


def _sha256(value):
    """64 hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= _HEX


def _file(value):
    """The name of a file in the manifest's own folder."""
    return (
        _text(value)
        and value.isprintable()
        and value not in ("", ".", "..")
        and not set(value) & set("/\\:\0")
        and len(value) <= 255
    )


def _flag(value):
    """True or false."""
    return isinstance(value, bool)


def _version(value):
    """The number 1."""
    return value == VERSION and not isinstance(value, bool)


def _none(value):
    """Null."""
    return value is None


def _object_of_any(value):
    """An object."""
    return isinstance(value, dict)


class _Map:
    """An object of any keys, whose values follow one rule."""

    def __init__(self, rule):
        self.rule = rule


_TENSOR = {"name": _text, "shape": [(_count, _none)], "dtype": _text}
_ARTIFACT = {
    "file": _file,
    "format": _text,
    "precision": _text,
    "batch": (_count, _none),
    "bytes": _count,
    "sha256": _sha256,
    "input": _TENSOR,
    "output": _TENSOR,
    "images": _count,
    "max_difference": _number,
    "mean_difference": _number,
    "agreement": _share,
    "accuracy": _share,
    "accuracy_change": _number,
    "gate": _object_of_any,
    "failures": [_text],
    "published_by_force": _flag,
    "latency_ms": _Map({"median": _number, "p95": _number}),
    "operators": _Map(_count),
}
_SCHEMA = {
    "manifest_version": _version,
    "created": _text,
    "model": {"name": _text, "parameters": _count},
    "source": {"path": _text, "sha256": _sha256},
    "tool_versions": _Map((_text, _none)),
    "machine": _object_of_any,
    "class_names": [_text],
    "data": {"dataset": _text, "split": _text, "images": _count, "fingerprint": _text},
    "keras": {"accuracy": _share, "latency_ms": _Map({"median": _number, "p95": _number})},
    "reference": {"file": _file, "bytes": _count, "sha256": _sha256},
    "artifacts": [_ARTIFACT],
}


def _check(path, where, value, rule):
    """Raises an `InputError` unless `value` follows `rule`."""
    if isinstance(rule, dict):
        _check_type(path, where, value, dict, "an object")
        for key, inner in rule.items():
            inside = f"{where}.{key}" if where else key
            if key not in value:
                raise InputError(f"{path}: damaged: `{inside}` is missing")
            _check(path, inside, value[key], inner)
    elif isinstance(rule, list):
        _check_type(path, where, value, list, "an array")
        for index, each in enumerate(value):
            _check(path, f"{where}[{index}]", each, rule[0])
    elif isinstance(rule, _Map):
        _check_type(path, where, value, dict, "an object")
        for key, each in value.items():
            _check(path, f"{where}[{key!a:.40}]", each, rule.rule)
    else:
        rules = rule if isinstance(rule, tuple) else (rule,)
        if not any(accepts(value) for accepts in rules):
            names = " or ".join(accepts.__doc__.rstrip(".") for accepts in rules)
            raise InputError(
                f"{path}: damaged: `{where}` must be {names.lower()}, got {value!a:.60}"
            )


def _check_type(path, where, value, kind, name):
    if not isinstance(value, kind):
        where = where or "the manifest"
        raise InputError(f"{path}: damaged: `{where}` must be {name}, got {value!a:.60}")
