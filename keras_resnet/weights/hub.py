"""Published networks by name: the files of a repository of the Hugging Face Hub, on this machine.

A repository holds the weights, `model.safetensors`, and JSON files about the network and its
preprocessing. Nothing else is read from it: no code, and no pickle. `huggingface_hub` downloads
the files into its cache, which other libraries share; a local folder with the same files serves,
too. The client compares the size of a download, not its content. The checksum is compared here, if
the cache has it: the sha256 of weights, Git's sha1 of small files; not on a system without links.

    timm/resnet18.a1_in1k
    timm/resnet18.a1_in1k@491b427                    a revision: a branch, a tag or a commit
    timm/resnet18.a1_in1k#sha256=0123…               the weights must have this checksum
"""

import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
from pathlib import Path

from keras_resnet.formats import FORMATS
from keras_resnet.untrusted.common import check_regular_file, refusing
from keras_resnet.untrusted.manifest import digest
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user
from keras_resnet.utils.tables import printable
from keras_resnet.weights.published import did_you_mean

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
CARD = "README.md"
WEIGHTS = "model.safetensors"

MAX_BYTES = 4 * 2**20
"""The size that a file other than the weights may have. The names of 21,841 classes take 2 MiB."""

_SCHEMES = ("hf-hub:", "hf://")
_NAME = re.compile(
    rf"(?P<scheme>{'|'.join(_SCHEMES)})?(?P<repository>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\S+))?"
)
_PIN = re.compile(r"(?P<rest>.*)#sha256=(?P<sha256>[0-9a-fA-F]{64})")
# A text with such an ending is the path of a file, which is missing.
_SUFFIXES = (
    *(suffix for row in FORMATS.values() for suffix in row.suffixes),
    *(".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar", ".zip"),
)


@dataclasses.dataclass(frozen=True)
class Name:
    """A name of a repository, as `parse_name` reads it.

    Attributes:
        repository: "OWNER/NAME".
        revision: A branch, a tag or a commit; "main" by default.
    """

    repository: str
    revision: str = "main"


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository whose small files are on this machine.

    Attributes:
        name: Its name, or the path of its folder, as the user gave it; for messages.
        paths: The names of the files that it has -> their paths. Those of the hub lack the
            weights, which `fetch_weights` downloads.
        hub_name: The `Name`, whose revision is the commit; None for a local folder.
        sha256: The checksum (hex) that the weights must have; None for any.
    """

    name: str
    paths: dict
    hub_name: Name | None = None
    sha256: str | None = None

    def read(self, file):
        """Returns the content of a small file as text, or None if the repository lacks it.

        Raises:
            InputError: If the file is too large, or no text.
        """
        path = self.paths.get(file)
        if path is None:
            return None
        _check_size(self.name, file, os.path.getsize(check_regular_file(path, file)))
        with refusing(f"{self.name}: {file}", "damaged"):
            return Path(path).read_bytes().decode("utf-8")

    def read_json(self, file):
        """Returns the object in a JSON file, a dict; None if the repository lacks the file.

        Raises:
            InputError: If it is damaged, or no object.
        """
        text = self.read(file)
        if text is None:
            return None
        with refusing(f"{self.name}: {file}", "damaged"):
            value = json.loads(text)
        if not isinstance(value, dict):
            raise InputError(f"{self.name}: {file}: must hold an object, got {value!r:.60}")
        return value

    def folder(self, ending):
        """Returns the path of a folder for results: beside a local folder, else in the current one.

        Args:
            ending: The end of its name, such as "-export".
        """
        base = Path(self.hub_name.repository).name if self.hub_name else Path(self.name)
        return Path(f"{base}{ending}")

    def fetch_weights(self):
        """Returns the path of the weights, with the checksum that the hub and the user state.

        Raises:
            InputError: If they cannot be downloaded, or have another checksum.
        """
        path = self.paths.get(WEIGHTS)
        if path is None and self.hub_name:
            path = _download(self.hub_name, WEIGHTS, self.name)
        if path is None:
            raise InputError(f"{self.name}: {_NO_WEIGHTS}")
        check_pin(self.name, path, self.sha256)
        return path


def _check_size(name, file, size):
    if size > MAX_BYTES:
        raise InputError(
            f"{name}: {file} must have at most {MAX_BYTES} bytes, got {size}: it is not the file "
            "of a network"
        )


_NO_WEIGHTS = (
    f"it has no {WEIGHTS}, the only weights that are read from a repository (other files can "
    "hold code); a branch may have them: NAME@refs/pr/1"
)


def parse_name(text):
    """Returns the `Name` of a repository that a text can be; None for a file's or folder's path.

    Args:
        text: "OWNER/NAME" or "OWNER/NAME@REVISION"; "hf-hub:" before it states that it is a name.

    Example:
        >>> parse_name("timm/resnet18.a1_in1k@v1")
        Name(repository='timm/resnet18.a1_in1k', revision='v1')
        >>> parse_name("models/resnet18.safetensors"), parse_name("./resnet18"), parse_name("a/b/c")
        (None, None, None)
    """
    match = _NAME.fullmatch(text)
    if not match or (text.lower().endswith(_SUFFIXES) and not match["scheme"]):
        return None
    return Name(match["repository"], match["revision"] or "main")


def find_repository(given, *, revision=None, sha256=None):
    """Finds the repository that an argument names, and downloads its small files.

    Local files and folders take precedence over names.

    Args:
        given: A repository's name (see the module) or folder, or the path of anything else. A
            `Repository` is returned as it is.
        revision: A branch, a tag or a commit of a repository of the hub, instead of one in the
            name.
        sha256: The checksum (hex) that the weights must have, instead of one in the name.

    Returns:
        A `Repository`; None if `given` can only be the path of something else.

    Raises:
        InputError: If there is no such repository, it cannot be downloaded, or a missing path
            resembles a published name.
    """
    if not isinstance(given, (str, os.PathLike)):
        return given if isinstance(given, Repository) else None
    text, pin = split_pin(os.fspath(given))
    sha256 = check_sha256(sha256 or pin)
    path = expand_user(text)
    if os.path.exists(path):
        # Its weights by their own path are those of the repository, with its preprocessing.
        if path.name == WEIGHTS and os.path.isfile(path):
            path = path.parent
        if not is_repository(path):
            return None
        if revision is not None:
            raise InputError(f"{path}: a local folder has no revisions, got {revision!r}")
        files = (CONFIG, PREPROCESSOR, CARD, WEIGHTS)
        paths = {file: path / file for file in files if os.path.isfile(path / file)}
        return Repository(str(path), paths, sha256=sha256)
    name = parse_name(text)
    if name is None:
        is_file = text.lower().endswith(_SUFFIXES) or "/" in text
        if meant := "" if is_file else did_you_mean(text):
            raise InputError(f"{text}: no such file or folder{meant}")
        return None
    folder = name.repository.partition("/")[0]
    if os.path.isdir(folder) and not text.startswith(_SCHEMES):
        raise InputError(
            f"{text}: the folder {folder} has no such file or folder; if it is the name of a "
            f"repository, write hf-hub:{text}"
        )
    if revision is not None:
        name = dataclasses.replace(name, revision=revision)
    config = _download(name, CONFIG, text)
    # All files are of the commit that the first one is of, also while somebody pushes another.
    name = dataclasses.replace(name, revision=Path(config).parent.name)
    paths = {CONFIG: config}
    for file in (PREPROCESSOR, CARD):
        if found := _download(name, file, text, needed=False):
            paths[file] = found
    return Repository(text, paths, name, sha256)


def is_repository(path):
    """Returns whether a path is a local folder of a repository: one with a network's config.json.

    A run folder has a config.json, too; that of a repository names an architecture.
    """
    config = Path(path) / CONFIG
    if not os.path.isfile(config):
        return False
    try:
        with open(config, encoding="utf-8") as file:
            value = json.loads(file.read(MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and bool(
        {"architecture", "architectures", "model_type"} & {*value}
    )


def split_pin(text):
    """Returns the text before "#sha256=…", and the checksum in lower case; None without one.

    Example:
        >>> split_pin("a/b#sha256=" + 64 * "A")[1] == 64 * "a", split_pin("a/b")
        (True, ('a/b', None))
    """
    match = _PIN.fullmatch(text)
    return (match["rest"], match["sha256"].lower()) if match else (text, None)


def check_pin(name, path, sha256):
    """Raises an `InputError` if a file has another checksum than the user has pinned.

    Args:
        name: The file's name, for the message.
        path: The file.
        sha256: The checksum; None for any.
    """
    if sha256 is not None and (found := digest(path)[1]) != sha256:
        raise InputError(f"{name}: its weights must have sha256 {sha256}, got {found}; not used")


def check_sha256(sha256):
    """Returns a checksum (hex) that a user gave in lower case; None for None.

    Raises:
        InputError: If it is none.
    """
    if sha256 is None:
        return None
    if not isinstance(sha256, str) or not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise InputError(f"`sha256` must be 64 hexadecimal digits, got {sha256!r:.80}")
    return sha256.lower()


# ----------------------------------------------------------------------------------------------
# The client
# ----------------------------------------------------------------------------------------------


def _settings():
    """Returns the client's arguments by the environment variables of now.

    The client reads them once, when it is imported, which another library may have done before.
    """
    environment = os.environ
    folder = environment.get("HF_HUB_CACHE")
    if folder is None and environment.get("HF_HOME"):
        folder = os.path.join(environment["HF_HOME"], "hub")
    return {
        "endpoint": environment.get("HF_ENDPOINT", "").rstrip("/") or None,
        "cache_dir": folder and os.path.expanduser(os.path.expandvars(folder)),
        "local_files_only": _is_offline(),
    }


def _is_offline():
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def _bar_class(description):
    """Returns a class for the client's progress bar, which it shows on a terminal only.

    The client's own bar shows a part of an address, and stays.
    """
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **{**kwargs, "desc": description, "leave": False})

    return Bar


def _download(name, file, label, needed=True):
    """Returns the path of a file in the client's cache; downloads it first if it is not there.

    Args:
        name: The `Name`.
        file: The file's name in the repository.
        label: The repository's name as the user gave it, for messages.
        needed: Whether a repository without the file is refused; otherwise the result is None.

    Raises:
        InputError: If it cannot be downloaded, is too large, or its content is not the one that the
            hub states.
    """
    from huggingface_hub import errors, hf_hub_download, try_to_load_from_cache

    settings = _settings()
    cached = try_to_load_from_cache(
        name.repository, file, cache_dir=settings["cache_dir"], revision=name.revision
    )
    if not (needed or cached is None or isinstance(cached, str)):
        return None  # the cache knows that this commit has no such file
    get = functools.partial(
        hf_hub_download,
        name.repository,
        file,
        revision=name.revision,
        library_name="keras-resnet-edge",
        tqdm_class=_bar_class(f"{name.repository} {file}"),
        **settings,
    )
    try:
        if cached is None and not settings["local_files_only"]:
            path, size = None, _ask_once(name, file, settings["endpoint"])
        else:  # a branch can have another file by now
            planned = get(dry_run=True)
            path, size = planned.local_path, planned.file_size
        if file == CARD and size > MAX_BYTES:
            return None  # the network can be used without
        if file != WEIGHTS:
            _check_size(label, file, size)
        if path is None or not os.path.exists(path):
            path = get()
        _check_content(path, label, file)
    except InputError:
        raise
    except errors.EntryNotFoundError as error:
        # The client knows two kinds: the hub lacks the file, or the cache does.
        is_cached = isinstance(error, errors.LocalEntryNotFoundError)
        if not needed and (not is_cached or settings["local_files_only"]):
            return None
        raise InputError(f"{label}: {_explain(error, name, file, settings)}") from error
    except Exception as error:  # of the client, of its HTTP library, of the disk
        raise InputError(f"{label}: {_explain(error, name, file, settings)}") from error
    return path


def _ask_once(name, file, endpoint):
    """Returns the size of a file of the hub, in bytes; 0 if the repository lacks it.

    Raises the client's error if the hub cannot be reached or refuses. `hf_hub_download` asks for
    half a minute, also where the name is a mistyped path.
    """
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(name.repository, file, revision=name.revision, endpoint=endpoint)
    try:
        return get_hf_file_metadata(url, endpoint=endpoint).size or 0
    except errors.EntryNotFoundError:
        return 0  # `hf_hub_download` notes it in the cache
    except errors.HfHubHTTPError:
        raise
    except Exception as error:  # of the HTTP library
        raise errors.LocalEntryNotFoundError(file) from error


def _check_content(path, label, file):
    """Compares a downloaded file with its ETag, the name under which the client caches it.

    That is the sha256 of a large file, and Git's sha1 of the others. A file that differs is
    removed from the cache.
    """
    try:
        blob = Path(path).parent / os.readlink(path)
    except OSError:  # a system without links: the file lies there under its own name
        return
    stated = blob.name
    if re.fullmatch("[0-9a-f]{64}", stated):
        kind, found = "sha256", digest(path)[1]
    elif re.fullmatch("[0-9a-f]{40}", stated):
        content = Path(path).read_bytes()
        kind, found = "sha1", hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    else:
        return
    if found != stated:
        for each in (Path(path), blob):
            each.unlink(missing_ok=True)
        raise InputError(
            f"{label}: {file} must have {kind} {stated}, as the hub states, got {found}: the "
            "download was damaged, and was removed; try again"
        )


def _explain(error, name, file, settings):
    """Returns one line: the cause of an error of the client, and the remedy."""
    from huggingface_hub import constants, errors

    hub = settings["endpoint"] or constants.ENDPOINT
    where = f"{hub}/{name.repository}"
    cause = error.__cause__ or error
    unreachable = f"cannot be reached: {_reason(cause)}"
    if isinstance(cause, errors.FileMetadataError):  # a portal of a network, a wrong HF_ENDPOINT
        unreachable = "does not answer as a hub does: check the network and HF_ENDPOINT"
    status = getattr(getattr(error, "response", None), "status_code", None)
    rows = (
        (
            errors.GatedRepoError,
            f"its owner gives it only to accounts that accepted the terms: accept them at {where}, "
            "and set HF_TOKEN to a token of the account",
        ),
        (
            errors.RepositoryNotFoundError,
            f"neither a file or folder here nor a repository of {hub}; a private one needs "
            f"HF_TOKEN; `keras-resnet models` lists names{did_you_mean(name.repository)}",
        ),
        (errors.RevisionNotFoundError, f"the repository has no revision {name.revision}"),
        (
            errors.LocalEntryNotFoundError,
            "neither a file or folder here nor complete in the cache, and HF_HUB_OFFLINE forbids "
            f"to download it: run this once without HF_HUB_OFFLINE{did_you_mean(name.repository)}"
            if settings["local_files_only"]
            else f"neither a file or folder here nor in the cache, and {hub} {unreachable}; "
            "connect once, or name a folder with the repository's files"
            f"{did_you_mean(name.repository)}",
        ),
        (
            errors.EntryNotFoundError,
            _NO_WEIGHTS if file == WEIGHTS else f"the repository has no {file}: not of a network",
        ),
        (errors.HFValidationError, f"not the name of a repository: {_reason(error)}"),
        (
            errors.HfHubHTTPError,
            f"{hub} answered {status}"
            + (": check HF_TOKEN" if status in (401, 403) else f": {_reason(error)}"),
        ),
    )
    for kind, line in rows:
        if isinstance(error, kind):
            return line
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        cache = settings["cache_dir"] or constants.HF_HUB_CACHE
        return (
            f"{file} cannot be written to the cache {cache}: {os.strerror(error.errno)}; make "
            "room there, or set HF_HOME to a folder on another disk"
        )
    return f"{file} cannot be downloaded from {hub}: {_reason(error)}"


def _reason(error):
    return printable(one_line(error))[:300]
