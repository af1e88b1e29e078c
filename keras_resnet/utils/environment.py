"""The software and the machine of this process, for records and reports."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def describe_environment():
    """Returns Keras's backend, the versions, the git commit and the machine, a dict."""
    import keras

    return {
        "backend": keras.backend.backend(),
        "versions": versions(),
        "git_commit": _git_commit(),
        "machine": {
            "processor": _processor(),
            "cores": cores(),
            "system": platform.platform(),
        },
    }


def versions(*more):
    """Returns the versions of Python and of the packages that compute; None for a missing package.

    Args:
        *more: Names of further packages.
    """
    import keras

    found = {"python": platform.python_version()}
    for name in ("keras-resnet-edge", "keras", keras.backend.backend(), "numpy", *more):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _git_commit():
    """Returns the git commit of this package, with "+changes" if files were edited; else None."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    try:
        commit, changes = (
            subprocess.run(
                [*git, *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def cores():
    """Returns the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count()
