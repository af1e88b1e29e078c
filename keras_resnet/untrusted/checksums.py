"""Checksum and metadata inside an exported .tflite or .onnx file.

Neither format has a checksum, and a runtime computes with a changed weight without an error.
Exported files therefore carry one, at a place that other readers ignore:

- .tflite: a ZIP archive behind the flatbuffer, as TFLite's own metadata tools append it, with
  `labels.txt` and `keras_resnet.json`: the metadata, and length and sha256 of the flatbuffer.
- .onnx: the metadata as entries of `metadata_props`, and as the very last entry the sha256 of all
  bytes before it. Serialized protocol buffers that are concatenated are read as one message.

A checksum detects damage, not a deliberate change: anyone can compute it again.
"""

import contextlib
import hashlib
import io
import json
import re
import zipfile

from keras_resnet.untrusted.zip_files import MAX_MEMBER_BYTES, read_member
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.tables import printable

METADATA = "keras_resnet.json"
LABELS = "labels.txt"

ONNX_METADATA_KEY = "keras_resnet"
ONNX_CHECKSUM_KEY = "keras_resnet.sha256"

_MAX_MEMBERS = 16
# The largest archive that is read: two members, stored, and a directory of a few entries.
_MAX_DIRECTORY_BYTES = 2**16
_MAX_ARCHIVE_BYTES = 2 * MAX_MEMBER_BYTES + _MAX_DIRECTORY_BYTES
_END_OF_DIRECTORY = b"PK\x05\x06"
_SIGNATURE = re.compile(rb"PK(\x01\x02|\x03\x04|\x05\x06)")
# A ZIP archive ends in its directory and a comment of at most 64 KB.
_SEARCHED = 2**16

# Exceptions that damaged ZIP members and JSON texts raise.
_DAMAGE = (zipfile.BadZipFile, ValueError, OSError, EOFError, RecursionError, RuntimeError)


def rename_old_keys(metadata):
    """Returns metadata of a file with the names of this version; it is changed in place.

    Args:
        metadata: A dict, from any format.
    """
    data = metadata.get("data")
    if isinstance(data, dict) and "validation_share" in data:
        data["validation_split"] = data.pop("validation_share")
    return metadata


def add_tflite_checksum(content, metadata):
    """Appends metadata and a checksum to a .tflite file.

    Args:
        content: The flatbuffer, bytes.
        metadata: A dict that JSON can hold; "class_names" are written to `labels.txt`, too.

    Returns:
        The file, bytes; the same for the same arguments.

    Example:
        >>> file = add_tflite_checksum(b"a flatbuffer", {"class_names": ["cat", "dog"]})
        >>> file.startswith(b"a flatbuffer"), read_tflite_metadata(file, "model.tflite")
        (True, {'class_names': ['cat', 'dog']})
    """
    trailer = {"metadata": metadata, "bytes": len(content), "sha256": _sha256(content)}
    members = {
        LABELS: "".join(f"{name}\n" for name in metadata.get("class_names") or []),
        METADATA: json.dumps(trailer, ensure_ascii=False),
    }
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a") as archive:
        for name, text in members.items():
            # A `ZipInfo` has a constant time of writing: equal exports are equal files.
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def read_tflite_metadata(content, name):
    """Returns the metadata of a .tflite file after its checksum has been compared.

    Args:
        content: The file, bytes.
        name: Its name, for messages.

    Returns:
        The metadata, a dict. A file that `export` did not write has "class_names" if a `labels.txt`
        is appended, otherwise an empty dict.

    Raises:
        InputError: If the appended archive is damaged, or the checksum does not match.
    """
    tail = content[-_MAX_ARCHIVE_BYTES:]
    try:
        start, members = _read_members(tail)
    except _DAMAGE as error:
        raise InputError(
            f"{name}: damaged: its appended ZIP: {printable(one_line(error)):.200}"
        ) from error
    if METADATA not in members:
        return {"class_names": members[LABELS].splitlines()} if members.get(LABELS) else {}
    trailer = _json_object(members[METADATA]) or {}
    # Exports of version 0.1.0 before its release have the key "card".
    metadata = trailer.get("metadata", trailer.get("card"))
    if not isinstance(metadata, dict):
        raise InputError(f"{name}: damaged: its {METADATA} must be a JSON object with metadata")
    length = len(content) - len(tail) + start
    _compare(name, "bytes", trailer.get("bytes"), length)
    _compare(name, "sha256", trailer.get("sha256"), _sha256(memoryview(content)[:length]))
    return metadata


def _read_members(tail):
    """Returns the offset of an appended ZIP archive and the texts of our members in it."""
    end = tail.rfind(_END_OF_DIRECTORY)
    if not zipfile.is_zipfile(io.BytesIO(tail)):
        if _SIGNATURE.search(tail, max(0, len(tail) - _SEARCHED)):
            raise zipfile.BadZipFile("it is cut or changed")
        return 0, {}
    # zipfile makes an object of each entry of the directory, however large it claims to be.
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    if size > _MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"its directory has {size} bytes")
    with zipfile.ZipFile(io.BytesIO(tail)) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names) or len(names) > _MAX_MEMBERS:
            raise zipfile.BadZipFile(f"it holds two members of one name, or over {_MAX_MEMBERS}")
        start = min((info.header_offset for info in archive.infolist()), default=0)
        # All members are read: a damaged name must not hide one.
        members = {name: read_member(archive, name) for name in names}
    if METADATA not in members and tail.find(METADATA.encode(), start) >= 0:
        raise zipfile.BadZipFile(f"it has lost its {METADATA}")
    return start, {name: members[name].decode() for name in {LABELS, METADATA} & set(names)}


def add_onnx_checksum(content, metadata, provenance=None):
    """Appends metadata and a checksum to an .onnx file.

    Args:
        content: The serialized ModelProto, bytes.
        metadata: A dict that JSON can hold; "class_names" become an entry of their own, too.
        provenance: Further entries for `metadata_props`, a dict of strings.

    Returns:
        The file, bytes. A key that `content` has already would be there twice.

    Example:
        >>> file = add_onnx_checksum(b"", {"class_names": ["cat", "dog"]}, {"author": "me"})
        >>> check_onnx_checksum(file, "model.onnx")
        True
    """
    entries = {
        "class_names": json.dumps(metadata.get("class_names") or [], ensure_ascii=False),
        ONNX_METADATA_KEY: json.dumps(metadata, ensure_ascii=False),
        **(provenance or {}),
    }
    content += _serialize_entries(entries)
    return content + _serialize_entries({ONNX_CHECKSUM_KEY: _sha256(content)})


def check_onnx_checksum(content, name):
    """Compares the checksum at the end of an .onnx file with the bytes before it.

    Args:
        content: The file, bytes.
        name: Its name, for messages.

    Returns:
        Whether the file has a checksum. Its metadata is in `metadata_props`: see
        `read_onnx_metadata`.

    Raises:
        InputError: If the checksum does not match.
    """
    sample = _serialize_entries({ONNX_CHECKSUM_KEY: "0" * 64})
    length = max(0, len(content) - len(sample))
    if content[length:-64] != sample[:-64]:
        return False
    stated = content[-64:].decode("ascii", "replace")
    _compare(name, "sha256", stated, _sha256(memoryview(content)[:length]))
    return True


def read_onnx_metadata(entries, has_checksum, name):
    """Returns the metadata of an .onnx file.

    Args:
        entries: Its `metadata_props`, a list of pairs of strings.
        has_checksum: The result of `check_onnx_checksum`.
        name: The file's name, for messages.

    Returns:
        The metadata, a dict; empty for a file that `export` did not write.

    Raises:
        InputError: If the metadata is damaged, or there is metadata without a checksum.
    """
    ours = [key for key, _ in entries if key.startswith(ONNX_METADATA_KEY)]
    if ours and (not has_checksum or len(ours) != len(set(ours)) or ONNX_METADATA_KEY not in ours):
        raise InputError(f"{name}: damaged: it has metadata of an export without its checksum")
    if not ours:
        return {}
    metadata = _json_object(dict(entries)[ONNX_METADATA_KEY])
    if metadata is None:
        raise InputError(f"{name}: damaged: its metadata must be a JSON object")
    return metadata


def _serialize_entries(entries):
    """Returns a serialized ModelProto that holds `metadata_props` and nothing else."""
    import onnx

    model = onnx.ModelProto()
    onnx.helper.set_model_props(model, entries)
    return model.SerializeToString()


def _json_object(text):
    """Returns the JSON object in a text; None if there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        return value if isinstance(value, dict) else None


def _compare(name, key, stated, found):
    if stated != found:
        raise InputError(
            f"{name}: damaged or changed: its metadata states {key} {stated!r:.80}, and the file "
            f"has {found}: export it again"
        )


def _sha256(content):
    return hashlib.sha256(content).hexdigest()
