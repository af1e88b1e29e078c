"""Seals: how an exported .tflite or .onnx file says what it is and that it is whole.

Neither format has a checksum, and a runtime answers with a changed weight as if nothing were
wrong. So the files that we write end in a seal, which other readers skip:

- .tflite: a ZIP archive behind the flatbuffer, as TFLite's own metadata tools append it, with
  `labels.txt` and `keras_resnet.json`, which holds the metadata, the flatbuffer's length and its
  sha256.
- .onnx: the metadata as entries of `metadata_props`, and as the very last entry the sha256 of all
  bytes before it. Protocol buffers that are written one after the other are read as one message.

Seals find damage, not deceit: whoever changes a file can seal it again.
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
ONNX_SEAL_KEY = "keras_resnet.sha256"

_OURS = {LABELS, METADATA}
_MAX_MEMBERS = 16
# What a seal can take up at most: two members, stored, and a directory of a few entries.
_MAX_DIRECTORY_BYTES = 2**16
_MAX_SEAL_BYTES = 2 * MAX_MEMBER_BYTES + _MAX_DIRECTORY_BYTES
_END_OF_DIRECTORY = b"PK\x05\x06"
_SIGNATURE = re.compile(rb"PK(\x01\x02|\x03\x04|\x05\x06)")
# A ZIP archive ends in its directory and a comment of at most 64 KB.
_SEARCHED = 2**16

# Field 14 of ModelProto, `metadata_props`; a key is field 1 and a value field 2 of an entry.
_METADATA, _KEY, _VALUE = b"\x72", b"\x0a", b"\x12"

# What damaged ZIP members and JSON texts raise.
_DAMAGE = (zipfile.BadZipFile, ValueError, OSError, EOFError, RecursionError, RuntimeError)


def seal_tflite(content, metadata):
    """Returns a .tflite file with a seal behind it.

    Args:
        content: The flatbuffer, bytes.
        metadata: What the file says about itself, a dict that JSON can hold; "class_names" go into
            `labels.txt`, too.

    Returns:
        The sealed file, bytes.

    Example:
        >>> sealed = seal_tflite(b"a flatbuffer", {"class_names": ["cat", "dog"]})
        >>> sealed.startswith(b"a flatbuffer"), read_tflite_seal(sealed, "model.tflite")
        (True, {'class_names': ['cat', 'dog']})
    """
    seal = {"card": metadata, "bytes": len(content), "sha256": _sha256(content)}
    members = {
        LABELS: "".join(f"{name}\n" for name in metadata.get("class_names") or []),
        METADATA: json.dumps(seal, ensure_ascii=False),
    }
    file = io.BytesIO(content)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members.items():
            # With the time of writing inside, no two exports would be alike.
            member = zipfile.ZipInfo(name)
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, text)
    return file.getvalue()


def read_tflite_seal(content, name):
    """Returns the metadata of a .tflite file, once its seal is found to fit.

    Args:
        content: The file, bytes.
        name: Its name, for messages.

    Returns:
        The metadata, a dict. That of a file without our seal has "class_names" if a `labels.txt` is
        appended, and is empty otherwise.

    Raises:
        InputError: If the seal is damaged, or does not fit what stands before it.
    """
    tail = content[-_MAX_SEAL_BYTES:]
    try:
        members = _read_members(tail)
    except _DAMAGE as error:
        raise InputError(
            f"{name}: damaged: its appended ZIP: {printable(one_line(error)):.200}"
        ) from error
    if METADATA not in members:
        return {"class_names": members[LABELS].splitlines()} if members.get(LABELS) else {}
    seal = _read_seal(members[METADATA], name)
    length = len(content) - len(tail) + members["start"]
    _check(name, "bytes", seal.get("bytes"), length)
    _check(name, "sha256", seal.get("sha256"), _sha256(memoryview(content)[:length]))
    return seal["card"]


def _read_members(tail):
    """Returns where an appended ZIP starts ("start") and the texts of our members in it."""
    end = tail.rfind(_END_OF_DIRECTORY)
    if not zipfile.is_zipfile(io.BytesIO(tail)):
        if _SIGNATURE.search(tail, max(0, len(tail) - _SEARCHED)):
            raise zipfile.BadZipFile("it is cut or changed")
        return {}
    # zipfile reads as many entries as this says, each an object.
    size = int.from_bytes(tail[end + 12 : end + 16], "little")
    if size > _MAX_DIRECTORY_BYTES:
        raise zipfile.BadZipFile(f"its directory has {size} bytes")
    with zipfile.ZipFile(io.BytesIO(tail)) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names) or len(names) > _MAX_MEMBERS:
            raise zipfile.BadZipFile(f"it holds two members of one name, or over {_MAX_MEMBERS}")
        start = min((info.header_offset for info in archive.infolist()), default=0)
        # All of them, so that none is overlooked whose name is damaged.
        members = {name: read_member(archive, name) for name in names}
    if METADATA not in members and tail.find(METADATA.encode(), start) >= 0:
        raise zipfile.BadZipFile(f"it has lost its {METADATA}")
    return {"start": start, **{name: members[name].decode() for name in _OURS & set(names)}}


def _read_seal(text, name):
    with contextlib.suppress(ValueError, RecursionError):
        seal = json.loads(text)
        if isinstance(seal, dict) and isinstance(seal.get("card"), dict):
            return seal
    raise InputError(f"{name}: damaged: its {METADATA} must be a JSON object with a card")


def seal_onnx(content, metadata, provenance=None):
    """Returns an .onnx file with its metadata and a seal behind it.

    Args:
        content: The serialized ModelProto, bytes.
        metadata: What the file says about itself, a dict that JSON can hold; "class_names" become
            an entry of their own, too.
        provenance: Further entries for `metadata_props`, a dict of strings.

    Returns:
        The sealed file, bytes. A key that `content` has already would be there twice.

    Example:
        >>> sealed = seal_onnx(b"", {"class_names": ["cat", "dog"]}, {"author": "me"})
        >>> read_onnx_seal(sealed, "model.onnx")
        True
    """
    entries = {
        "class_names": json.dumps(metadata.get("class_names") or [], ensure_ascii=False),
        ONNX_METADATA_KEY: json.dumps(metadata, ensure_ascii=False),
        **(provenance or {}),
    }
    body = content + b"".join(_entry(key, value) for key, value in entries.items())
    return body + _entry(ONNX_SEAL_KEY, _sha256(body))


def read_onnx_seal(content, name):
    """Tells whether an .onnx file ends in a seal, once that is found to fit.

    Args:
        content: The file, bytes.
        name: Its name, for messages.

    Returns:
        Whether there is one. The metadata are among the file's `metadata_props`: see
        `onnx_metadata`.

    Raises:
        InputError: If the seal does not fit what stands before it.
    """
    length = len(content) - len(_entry(ONNX_SEAL_KEY, "0" * 64))
    seal = content[max(0, length) :]
    if not seal.startswith(_entry(ONNX_SEAL_KEY, "0" * 64)[:-64]):
        return False
    said = seal[-64:].decode("ascii", "replace")
    _check(name, "sha256", said, _sha256(memoryview(content)[:length]))
    return True


def onnx_metadata(entries, sealed, name):
    """Returns the metadata of an .onnx file.

    Args:
        entries: Its `metadata_props`, as a list of pairs of strings.
        sealed: What `read_onnx_seal` said.
        name: The file's name, for messages.

    Returns:
        The metadata, a dict; empty for a file that is not ours.

    Raises:
        InputError: If the metadata is damaged, or the file is ours and its seal is gone.
    """
    ours = [key for key, _ in entries if key.startswith(ONNX_METADATA_KEY)]
    if ours and (not sealed or len(ours) != len(set(ours)) or ONNX_METADATA_KEY not in ours):
        raise InputError(f"{name}: damaged: its metadata have our metadata, and no seal that fits")
    if not ours:
        return {}
    with contextlib.suppress(ValueError, RecursionError):
        metadata = json.loads(dict(entries)[ONNX_METADATA_KEY])
        if isinstance(metadata, dict):
            return metadata
    raise InputError(f"{name}: damaged: its metadata must be a JSON object")


def _entry(key, value):
    """Returns a serialized ModelProto that holds one entry of metadata and nothing else."""
    entry = _field(_KEY, key.encode()) + _field(_VALUE, value.encode())
    return _field(_METADATA, entry)


def _field(tag, content):
    """Returns a length-delimited field of a protocol buffer."""
    length, size = b"", len(content)
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return tag + length + bytes([size]) + content


def _check(name, what, said, found):
    if said != found:
        raise InputError(
            f"{name}: damaged or changed: its seal says {what} {said!r:.80}, and the file has "
            f"{found}: export it again"
        )


def _sha256(content):
    return hashlib.sha256(content).hexdigest()
