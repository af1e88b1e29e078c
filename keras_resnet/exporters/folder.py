"""The export folder: it appears whole, and a killed export leaves the earlier one or none."""

import contextlib
import os
import shutil
from pathlib import Path

from keras_resnet.untrusted.manifest import MANIFEST, read_manifest
from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.files import expand_user
from keras_resnet.utils.tables import printable

_WORK = ".{name}.partial"
_ASIDE = ".{name}.before"


def check_target(folder, check_earlier=None):
    """Checks that an export may be written to a folder.

    Args:
        folder: The folder: missing, empty, or an earlier export; or a link to such a folder.
        check_earlier: Function of the folder and of its name for messages that raises an
            `InputError` unless it is an earlier export; by default it looks for a manifest.

    Returns:
        An absolute `pathlib.Path` without links.

    Raises:
        InputError: If it holds anything else, or its parent cannot be written to.
    """
    given = expand_user(folder)
    try:
        folder = Path(os.path.realpath(given))
        if folder.is_symlink():
            raise InputError(f"{given}: a link to itself: choose another --out")
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{given}: there is a file of that name: choose another --out")
        if os.path.ismount(folder):
            raise InputError(
                f"{given}: a disk's own folder cannot be replaced as a whole: choose one in it"
            )
        if folder.is_dir() and any(folder.iterdir()):
            (check_earlier or _check_earlier)(folder, given)
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{printable(str(given))}: cannot be written: {reason}") from error
    if not os.access(folder.parent, os.W_OK):
        raise InputError(f"{given}: cannot be written: no permission")
    return folder


def _check_earlier(folder, given):
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{given}: an export is written to a new folder, an empty one or that of an "
            "earlier export: choose another --out"
        )
    try:
        read_manifest(folder)
    except InputError as error:
        raise InputError(f"{error}: choose another --out, or remove {given}") from error


@contextlib.contextmanager
def workspace(folder):
    """Yields an empty folder beside `folder`, removed at the end unless `publish` renamed it.

    Leftovers of killed exports are removed, or brought back.

    Args:
        folder: The result of `check_target`.

    Raises:
        InputError: If another export is writing to `folder`.
    """
    work = folder.with_name(_WORK.format(name=folder.name))
    with _locked(work, folder):
        _tidy(folder)
        for path in list(work.iterdir()):
            _remove(path)
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _locked(work, folder):
    """Makes the workspace and holds a lock on it, which ends with the process."""
    work.mkdir(exist_ok=True)
    with files.locked(work, f"{folder}: another export is writing to it") as lock:
        # Another export may just have finished and renamed this workspace to the folder.
        if lock and not (work.exists() and os.path.samestat(os.fstat(lock), work.stat())):
            raise InputError(f"{folder}: another export was writing to it: try again")
        yield


def carry_over(folder, work, names):
    """Brings files of an earlier export into a workspace, as hard links if the disk has them.

    Args:
        folder: The earlier export.
        work: The workspace.
        names: Files and folders in it.
    """
    for name in names:
        source, target = folder / name, work / name
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, copy_function=_link, symlinks=True)
        else:
            _link(source, target)


def _link(source, target, **_):
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target, follow_symlinks=False)


def publish(work, folder):
    """Puts a workspace in a folder's place.

    A killed process leaves the old folder or the new one; between two renames, it leaves the old
    one under another name, and the next export brings it back.

    Args:
        work: The workspace.
        folder: The folder.
    """
    _sync(work)
    aside = _aside(folder)
    _remove(aside)
    if folder.exists():
        os.rename(folder, aside)
    os.rename(work, folder)
    _remove(aside)


def _aside(folder):
    return folder.with_name(_ASIDE.format(name=folder.name))


def _sync(folder):
    """Flushes all files to the disk: a power cut could leave new names on empty files."""
    for path in folder.rglob("*"):
        # A foreign file that was carried over may be unreadable.
        if path.is_file() and not path.is_symlink() and os.access(path, os.R_OK):
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _tidy(folder):
    """Brings back or removes the old folder of a process that was killed in `publish`."""
    aside = _aside(folder)
    if folder.exists():
        _remove(aside)
    elif aside.is_dir():
        os.rename(aside, folder)


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
