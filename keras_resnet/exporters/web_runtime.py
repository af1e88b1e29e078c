"""The runtimes of a browser, LiteRT.js and ONNX Runtime Web, out of their npm packages."""

import csv
import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from keras_resnet.exporters.formats import WEB
from keras_resnet.untrusted.manifest import digest
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user

_PAGE = Path(__file__).parent / "page"

# Name in the folder -> distribution and path in it. The npm packages hold no licence texts; the
# Python packages of the same projects do.
LICENSES = {
    "LICENSE-LiteRT.txt": ("ai-edge-litert", "LICENSE"),
    "LICENSE-ONNX-Runtime.txt": ("onnxruntime", "LICENSE"),
    "NOTICES-ONNX-Runtime.txt": ("onnxruntime", "ThirdPartyNotices.txt"),
}


def find_runtime(folder=None, report=None):
    """Returns a folder with the files of the npm packages, each compared with its checksum.

    Args:
        folder: A folder with the packages, or with `node_modules`; None for a cache, into which npm
            installs them once.
        report: Called with a line before npm starts.

    Returns:
        The `Path` of a folder with the structure of `node_modules`.

    Raises:
        InputError: If a file is missing or another one, or npm is missing or fails.

    Example:
        >>> find_runtime("missing")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: missing: no such folder (--runtime)
    """
    if folder is None:
        return _cached_runtime(report or (lambda line: None))
    given = expand_user(folder)
    if not given.is_dir():
        raise InputError(f"{folder}: no such folder (--runtime)")
    inner = given / "node_modules"
    packages = inner if inner.is_dir() else given
    _check_runtime(
        packages, f"name a folder with the npm packages {_packages()} as --runtime, or leave it out"
    )
    return packages


def _packages():
    """Returns the npm packages with their versions, in words."""
    wanted = json.loads((_PAGE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    return " and ".join(f"{name}@{version}" for name, version in wanted.items())


def _runtime_files():
    """Returns the rows of `page/runtime.csv`: dicts of "file", its path, and "sha256"."""
    with open(_PAGE / "runtime.csv", encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def _check_runtime(packages, advice):
    for row in _runtime_files():
        path = packages / row["file"]
        if not path.is_file():
            raise InputError(f"{path}: no such file of a runtime: {advice}")
        found = digest(path)[1]
        if found != row["sha256"]:
            raise InputError(
                f"{path}: of another version, or damaged: its sha256 must be {row['sha256']}, got "
                f"{found}: {advice}"
            )


def _cached_runtime(report):
    """Returns the folder in the cache, into which npm has installed the packages."""
    lock = (_PAGE / "package-lock.json").read_bytes()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(home, "keras_resnet", WEB, hashlib.sha256(lock).hexdigest()[:16])
    advice = f"remove {cache}, and npm installs it again"
    if not cache.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            raise InputError(
                "the runtimes of a browser come from npm, and there is no npm here: install it "
                f"(Debian: apt-get install npm), or name a folder with {_packages()} as --runtime"
            )
        report(f"npm installs {_packages()} into {cache}")
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
            packages = _install(npm, Path(scratch))
            _check_runtime(packages, "it is not what this version of keras_resnet was tested with")
            for row in _runtime_files():
                target = Path(scratch, "kept", row["file"])
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(packages / row["file"], target)
            # Another process may have been faster.
            if not cache.is_dir():
                os.rename(Path(scratch, "kept"), cache)
    _check_runtime(cache, advice)
    return cache


def _install(npm, scratch):
    """Installs the packages of the lock file; returns their `node_modules`."""
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(_PAGE / name, scratch / name)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        reason = one_line(done.stderr)
        raise InputError(
            f"npm could not install {_packages()}: {reason}: see `npm ping`, or name a folder with "
            "them as --runtime"
        )
    return scratch / "node_modules"


def copy_runtime(packages, target):
    """Copies the files of the runtimes, and their licences beside them.

    Args:
        packages: The result of `find_runtime`.
        target: The folder to write, a `Path`.
    """
    for row in _runtime_files():
        path = target / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packages / row["file"], path)
    for name, (distribution, wanted) in LICENSES.items():
        owned = importlib.metadata.files(distribution) or []
        path = next(path.locate() for path in owned if path.name == wanted)
        shutil.copyfile(path, target / name)
