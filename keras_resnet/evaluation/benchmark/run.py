"""The measurement of a benchmark: all candidates in turns, each in a process of its own."""

import contextlib
import datetime
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from keras_resnet.evaluation.benchmark import results
from keras_resnet.evaluation.benchmark.contestants import find_all
from keras_resnet.evaluation.benchmark.processes import Worker, WorkerError
from keras_resnet.training.run_folder import cores, describe_surroundings
from keras_resnet.untrusted.manifest import digest, read_manifest
from keras_resnet.utils.errors import InputError, check_count
from keras_resnet.utils.files import write_json
from keras_resnet.utils.progress import bar

BATCHES = (1, 8, 32)
TURN_SECONDS = 0.25
LEAST_CALLS = {1: 10, 8: 3, 32: 3}
# Half of the pause between two turns.
SETTLE_SECONDS = 0.03
# The number of reference images that each candidate predicts.
MAX_CHECKED = 256


def benchmark(folder, *, rounds=5, threads=None, out=None, torch=True, trust=False, timeout=300):
    """Measures the files of an export, in turns in one run, and writes the results.

    The Keras model that was exported takes part if it still exists, and the network of Dive into
    Deep Learning (d2l) in PyTorch with the same weights, if PyTorch is installed and the model is
    such a network. Each candidate runs in a process of its own, which is idle while another one is
    measured. All predict the export's reference images, so that a fast but wrong file is seen.

    Args:
        folder: An export's folder, with its manifest.json.
        rounds: Number of turns of each candidate; a result is the median over the rounds.
        threads: The largest number of threads; by default the machine's number of cores.
        out: The folder for benchmark.json and benchmark.png, by default `folder`.
        torch: Whether PyTorch may take part.
        trust: Whether a SavedModel, which is code, may take part.
        timeout: Time limit of one turn, in seconds.

    Returns:
        The contents of benchmark.json, a dict: "model", "machine", "threads", "rounds",
        "idle_load" (the processor load between the turns), "baseline" (the row whose latency
        divided by another row's is the "speed_up" of that row), "rows", one dict for each
        candidate, and "left_out". The row of a candidate that failed has "failed", the reason.

    Raises:
        InputError: An argument is out of range, the folder is not an export, a file differs from
            the manifest, or no candidate runs.
    """
    check_count("rounds", rounds)
    threads = cores() if threads is None else threads
    check_count("threads", threads)
    folder = Path(folder)
    manifest = read_manifest(folder)
    out = Path(out or folder)
    if not out.is_dir():
        raise InputError(f"{out}: there is no such folder")
    thread_counts = sorted({1, threads})
    images, expected = _read_reference(folder, manifest)
    with tempfile.TemporaryDirectory() as scratch:
        # The workers map this file: only the pages that they read count as their memory.
        images_path = str(Path(scratch) / "images.npy")
        np.save(images_path, images)
        candidates, left_out = find_all(folder, manifest, scratch, torch, trust)
        measured, idle_load = _measure(
            candidates, images_path, expected, thread_counts, rounds, timeout
        )
    rows = [_row(each, measured[each.name]) for each in candidates]
    if all("failed" in row for row in rows):
        raise InputError(f"{folder}: nothing could be measured: {rows[0]['failed']}")
    surroundings = describe_surroundings()
    report = {
        "benchmark_version": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": manifest["model"],
        **{name: surroundings[name] for name in ("machine", "versions", "git_commit")},
        "threads": thread_counts,
        "rounds": rounds,
        "idle_load": idle_load,
        "images_checked": len(expected),
        **results.add_speed_ups(rows, str(threads)),
        "left_out": left_out,
    }
    write_json(out / "benchmark.json", report)
    results.plot_benchmark(report, out / "benchmark.png")
    return report


def _read_reference(folder, manifest):
    """Returns the export's reference images, and Keras's probabilities for them."""
    listed = manifest["reference"]
    path = folder / listed["file"]
    if digest(path) != (listed["bytes"], listed["sha256"]):
        raise InputError(f"{path}: not the file that the manifest lists: export the model again")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, expected = (arrays[n][:MAX_CHECKED] for n in ("images", "probabilities"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    fits = images.ndim == 4 and expected.ndim == 2 and len(images) == len(expected) > 0
    if images.dtype != "uint8" or not fits:
        raise InputError(f"{path}: must hold uint8 images and as many rows of probabilities")
    return images, expected


# ----------------------------------------------------------------------------------------------
# Turns
# ----------------------------------------------------------------------------------------------


def _measure(candidates, images_path, expected, thread_counts, rounds, timeout):
    """Returns the measurements by candidate's name, and the idle load.

    Most runtimes fix their number of threads when they start. So each number of threads has
    processes of its own, one number after the other, which halves the processes in memory.
    """
    found = {each.name: {"calls": {}} for each in candidates}
    idle = _IdleLoad()
    turns = sum(
        2 + rounds * (len(BATCHES) if threads == thread_counts[-1] else 1)
        for threads in thread_counts
    )

    def for_each(turn, *arguments):
        """Gives each candidate its turn; one that has failed gets no more."""
        for candidate in candidates:
            own = found[candidate.name]
            if "failed" not in own:
                try:
                    turn(candidate, own, *arguments)
                except WorkerError as error:
                    own["failed"] = str(error)
                    if "worker" in own:
                        own["worker"].end()
                idle.sample()
            shown.update(1)

    with bar(len(candidates) * turns, "benchmark", unit=" turns") as shown:
        for threads in thread_counts:
            with contextlib.ExitStack() as stack:
                for_each(_start, stack, images_path, threads, timeout)
                for _ in range(rounds):
                    for batch in BATCHES if threads == thread_counts[-1] else (1,):
                        for_each(_time, batch, threads)
                for_each(_compare, expected)
    return found, idle.fraction()


class _IdleLoad:
    """The processor load between the turns, while all candidates should be idle."""

    def __init__(self):
        self.busy = self.total = 0

    def sample(self):
        """Waits until spinning threads have come to rest, then measures the load."""
        time.sleep(SETTLE_SECONDS)
        before = _processor_times()
        time.sleep(SETTLE_SECONDS)
        after = _processor_times()
        if before and after:
            self.busy += after[0] - before[0]
            self.total += after[1] - before[1]

    def fraction(self):
        return self.busy / self.total if self.total else None


def _processor_times():
    """Returns the busy and the total time of all cores; None where there is no /proc/stat."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, idle, iowait, *others = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    busy = user + nice + system + sum(others)
    return busy, busy + idle + iowait


def _start(candidate, own, stack, images_path, threads, timeout):
    """Loads the network, and measures the memory of predicting one image at a time."""
    own["worker"] = stack.enter_context(Worker(candidate.runtime, threads, timeout))
    own["loaded"] = own["worker"].ask(
        "load", path=str(candidate.path), images=images_path, options=candidate.options
    )
    own["worker"].ask("measure", batch=1, seconds=0, least=1)
    own["memory"] = own["worker"].ask("peak_memory")["bytes"]


def _time(candidate, own, batch, threads):
    if candidate.batch in (None, batch):
        answer = own["worker"].ask(
            "measure", batch=batch, seconds=TURN_SECONDS, least=LEAST_CALLS[batch]
        )
        own["calls"].setdefault((threads, batch), []).append(answer["calls"])


def _compare(candidate, own, expected):
    """Computes the fraction of equal labels, and the largest difference of a probability."""
    answer = own["worker"].ask("answer", batch=candidate.batch or max(BATCHES))
    found = np.array(answer["probabilities"])
    if found.shape != expected.shape or not np.isfinite(found).all():
        raise WorkerError(f"answers of shape {found.shape}, or not finite")
    own["answers"] = {
        "agreement": float(np.mean(found.argmax(axis=1) == expected.argmax(axis=1))),
        "max_difference": float(np.abs(found - expected).max()),
    }


def _row(candidate, own):
    row = {
        name: getattr(candidate, name)
        for name in ("name", "format", "precision", "batch", "bytes", "accuracy")
    }
    if "failed" in own:
        return {**row, "failed": own["failed"]}
    most = max(threads for threads, _ in own["calls"])
    if candidate.runtime == "torch" and own["answers"]["agreement"] < 1:
        row["accuracy"] = None  # it does not compute the same as the Keras model
    return {
        **row,
        "runtime": own["loaded"]["runtime"],
        "load_ms": own["loaded"]["seconds"] * 1e3,
        "peak_memory_bytes": own["memory"],
        **own["answers"],
        "latency_ms": {
            str(threads): {
                "median": _median(turns, lambda calls: statistics.median(calls) * 1e3),
                "p95": _median(turns, lambda calls: float(np.percentile(calls, 95)) * 1e3),
            }
            for (threads, batch), turns in own["calls"].items()
            if batch == 1
        },
        "images_per_second": {
            str(batch): _median(turns, lambda calls, batch=batch: batch * len(calls) / sum(calls))
            for (threads, batch), turns in own["calls"].items()
            if threads == most
        },
    }


def _median(turns, statistic):
    return statistics.median(statistic(calls) for calls in turns)
