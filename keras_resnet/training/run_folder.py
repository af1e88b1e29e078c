"""The folder of a run: created, locked, checked, reopened."""

import contextlib
import datetime
import json
import re
from pathlib import Path

from keras_resnet import config
from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError, one_line

CONFIG = "config.json"
_PROBE = ".probe"


def default_run_dir(model, recipe):
    """Returns runs/MODEL-RECIPE-TIME, with the time of this call to the second."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{model}-{recipe}-{now}"


def has_run(run_dir):
    """Returns whether a folder holds a run, finished or not."""
    return (Path(run_dir) / CONFIG).exists()


def last_checkpoint(run_dir):
    """Returns the path of the last finished epoch's checkpoint."""
    return Path(run_dir) / "checkpoints" / "last.keras"


def create_run_dir(run_dir, lock):
    """Creates the folder of a new run, and locks it.

    Args:
        run_dir: The folder; its parents are created, too.
        lock: A `contextlib.ExitStack` that holds the folder's lock until it is closed.

    Returns:
        The folders that had to be created, the innermost first.

    Raises:
        InputError: If the folder holds something, another process is writing to it, or it cannot
            be written to.
    """
    with _write_errors(run_dir):
        created = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        _lock(run_dir, lock)
        check_empty(run_dir)
        _try_to_write(run_dir)
    return created


def reopen_run_dir(run_dir, lock):
    """Locks the folder of a run that is resumed, and removes a killed process's partial files.

    Args:
        run_dir: The folder.
        lock: See `create_run_dir`.

    Returns:
        The content of config.json, a dict, and its settings, a `TrainConfig`.

    Raises:
        InputError: If there is no run, its config.json is damaged or of another version, another
            process is writing to the folder, or it cannot be written to.
    """
    with _write_errors(run_dir):
        if run_dir.is_dir():
            _lock(run_dir, lock)
        found = _read_config(run_dir)
        for folder in (run_dir, run_dir / "checkpoints"):
            files.remove_partials(folder)
        _try_to_write(run_dir)
    return found


@contextlib.contextmanager
def _write_errors(run_dir):
    try:
        yield
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be written to: {error.strerror or error}") from error


def _lock(run_dir, lock):
    lock.enter_context(files.locked(run_dir, "another run is writing to it"))


def _try_to_write(run_dir):
    probe = run_dir / _PROBE
    files.write_text(probe, "")
    probe.unlink()


def check_empty(run_dir):
    """Raises an `InputError` if the folder of a new run holds something.

    Args:
        run_dir: The folder, a `pathlib.Path`; it may be missing.
    """
    # The files of a run that was killed before it began.
    left = re.compile(r"\.probe|\.(\.probe|config)\.[0-9a-f]{8}\.partial(\.json)?")
    if run_dir.is_dir() and not all(left.fullmatch(path.name) for path in run_dir.iterdir()):
        raise InputError(
            f"{run_dir}: the folder is not empty; resume the run in it with --resume, or name "
            "another --run-dir"
        )


def remove_run_dir(run_dir, created):
    """Removes the folders of a run that could not begin.

    Args:
        run_dir: The folder; it holds its config.json only.
        created: The result of `create_run_dir`.
    """
    with contextlib.suppress(OSError):
        (run_dir / CONFIG).unlink(missing_ok=True)
        for folder in created:
            folder.rmdir()


def _read_config(run_dir):
    path = run_dir / CONFIG
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        unknown = record["settings"].keys() - config.TrainConfig.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"this version lacks {', '.join(sorted(unknown))}; start a new run")
        settings = config.TrainConfig(**record["settings"])
        # The data set is recorded once it is loaded: a run can be killed before.
        if not isinstance(record.get("dataset", {}).get("fingerprint", ""), str):
            raise ValueError("its data set has no fingerprint")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{run_dir}: nothing to resume: there is no {CONFIG}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"{path}: damaged, or of another version: {one_line(error)}") from error
    return record, settings
