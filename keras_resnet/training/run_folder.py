"""The folder of a run: made, checked, and the record of what the run was made with."""

import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError, one_line

CONFIG = "config.json"
_PROBE = ".probe"


def default_run_dir(model, recipe):
    """Returns runs/MODEL-RECIPE-TIME, with the time of this call to the second."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{model}-{recipe}-{now}"


def make_run_dir(run_dir, resume, lock):
    """Makes the folder and checks that it can be written to.

    Args:
        run_dir: The folder; its parents are made, too.
        resume: Whether it holds a run already, which `lock_run_dir` has locked.
        lock: A `contextlib.ExitStack` that holds the folder's lock until it is closed.

    Returns:
        The folders that had to be made, the innermost first.

    Raises:
        InputError: If it holds something though `resume` is false, another process is writing to
            it, or it cannot be written to.
    """
    try:
        made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resume:
            lock_run_dir(run_dir, lock)
            check_empty(run_dir)
        else:
            for folder in (run_dir, run_dir / "checkpoints"):
                files.remove_partials(folder)
        probe = run_dir / _PROBE
        files.write_text(probe, "")
        probe.unlink()
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be written to: {error.strerror or error}") from error
    return made


def lock_run_dir(run_dir, lock):
    """Locks a run folder, so that no other process writes to it.

    Args:
        run_dir: The folder.
        lock: A `contextlib.ExitStack` that holds the lock until it is closed.

    Raises:
        InputError: If another process has it.
    """
    lock.enter_context(files.locked(run_dir, "another run is writing to it"))


def check_empty(run_dir):
    """Raises an `InputError` if the folder of a new run holds something.

    Args:
        run_dir: The folder, a `pathlib.Path`; it may be missing.
    """
    # What a run leaves that is killed before it has begun.
    left = re.compile(r"\.probe|\.(\.probe|config)\.[0-9a-f]{8}\.partial(\.json)?")
    if run_dir.is_dir() and not all(left.fullmatch(path.name) for path in run_dir.iterdir()):
        raise InputError(
            f"{run_dir}: the folder is not empty; resume the run in it with --resume, or name "
            "another --run-dir"
        )


def unmake_run_dir(run_dir, made):
    """Takes back what `make_run_dir` made for a run that could not begin.

    Args:
        run_dir: The folder; it holds nothing but its config.json.
        made: What `make_run_dir` returned.
    """
    with contextlib.suppress(OSError):
        (run_dir / CONFIG).unlink(missing_ok=True)
        for folder in made:
            folder.rmdir()


def check_space(run_dir, needed):
    """Refuses to start where the run's files would not fit.

    Args:
        run_dir: The folder.
        needed: Bytes.

    Raises:
        InputError: If fewer are free.
    """
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise InputError(
            f"{run_dir}: what is to be written needs {needed / 2**20:.0f} MiB of disk space, "
            f"and {free / 2**20:.0f} MiB are free"
        )


def read_config(run_dir, settings):
    """Returns what config.json of a run holds.

    Args:
        run_dir: The run folder.
        settings: The names that its settings may have, with the values of those that it lacks.

    Raises:
        InputError: If there is none, or it is damaged or of another version.
    """
    path = Path(run_dir) / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["settings"] = {**settings, **config["settings"]}
        if set(config["settings"]) != set(settings):
            raise ValueError("its settings are not those of this version")
        # The rest is written once the data are loaded: a run can be killed before.
        if not isinstance(config.get("dataset", {}).get("fingerprint", ""), str):
            raise ValueError("its data set has no fingerprint")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{run_dir}: nothing to resume: there is no {CONFIG}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path}: damaged: {one_line(error)}") from error
    return config


def describe_surroundings():
    """Returns what a run was made with: backend, versions, git commit and machine."""
    import keras  # not above: what starts workers on this machine does without

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
    """Returns the versions of Python and of the packages that compute, None for one not there.

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
    """Returns the commit of the source this runs from, with "+changes" where it was edited."""
    git = ["git", "-C", str(Path(__file__).parent)]
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
    """Returns how many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count()
