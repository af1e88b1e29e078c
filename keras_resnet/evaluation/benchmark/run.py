"""The measurement: all candidates alternately, each in its own process."""

import contextlib
import dataclasses
import datetime
import functools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from keras_resnet.evaluation.benchmark import results
from keras_resnet.evaluation.benchmark.candidates import Candidate, find_all
from keras_resnet.runtimes.remote import Remote, RemoteError
from keras_resnet.untrusted.manifest import find_change, read_manifest
from keras_resnet.utils.environment import cores, describe_environment
from keras_resnet.utils.errors import InputError, check_count, one_line
from keras_resnet.utils.files import write_json
from keras_resnet.utils.progress import bar

WORKER = "keras_resnet.evaluation.benchmark.worker:Worker"
# All candidates are measured on the processor; TensorFlow would otherwise use a GPU.
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "KERAS_BACKEND": "tensorflow",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
BATCHES = (1, 8, 32)
TURN_SECONDS = 0.25
LEAST_CALLS = {1: 10, 8: 3, 32: 3}
# Half of the pause after each turn.
SETTLE_SECONDS = 0.03
# How many of the reference images the predictions are compared on.
MAX_CHECKED = 256


def benchmark(folder, *, rounds=5, threads=None, out=None, torch=True, trust=False, timeout=300):
    """Measures the files of an export in turns, and writes benchmark.json and benchmark.png.

    The Keras model that they were made from is measured too, if it still exists, and the network
    of Dive into Deep Learning (d2l) in PyTorch with the same weights, if PyTorch is installed and
    the book has such a network. Each candidate has its own process, which is idle while
    another runs. The predictions of all for the export's reference images are compared, so that
    wrong predictions are detected.

    Args:
        folder: An export's folder, with its manifest.json.
        rounds: How many turns each candidate has; a figure is the median over the rounds.
        threads: How many threads "all threads" are; by default those of the machine.
        out: The folder for benchmark.json and benchmark.png, by default `folder`.
        torch: Whether to include PyTorch.
        trust: Whether to include SavedModels, which can run code.
        timeout: Seconds that one turn may take.

    Returns:
        The report, a dict as in benchmark.json: "model", "machine", "threads", "rounds",
        "idle_load" (how busy the processor was between the turns), "baseline" (the row whose
        latency divided by a row's is its "speed_up"), "rows", one dict for each candidate, and
        "left_out". A row whose candidate failed has "failed", the reason.

    Raises:
        InputError: If an argument is out of range, the folder is no export, one of its files is
            not as the manifest says, or no candidate runs.
    """
    check_count("rounds", rounds)
    threads = cores() if threads is None else threads
    check_count("threads", threads)
    folder = Path(folder)
    manifest = read_manifest(folder)
    out = Path(out or folder)
    if not out.is_dir():
        raise InputError(f"{out}: there is no such folder")
    settings = sorted({1, threads})
    with tempfile.TemporaryDirectory() as scratch:
        reference, probabilities = _read_reference(folder, manifest)
        # Workers map this file into memory, so that only the images they read count as theirs.
        images = str(Path(scratch) / "images.npy")
        np.save(images, reference)
        candidates, left_out = find_all(folder, manifest, scratch, torch, trust)
        if not candidates:
            raise InputError(f"{folder}: no candidate runs: {left_out[0]['reason']}")
        entries = [_Entry(candidate) for candidate in candidates]
        idle_load = _run_turns(entries, images, probabilities, settings, rounds, timeout)
    rows = [entry.row() for entry in entries]
    if all("failed" in row for row in rows):
        raise InputError(f"{folder}: no candidate runs: {rows[0]['failed']}")
    described = describe_environment()
    report = {
        "benchmark_version": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": manifest["model"],
        **{name: described[name] for name in ("machine", "versions", "git_commit")},
        "threads": settings,
        "rounds": rounds,
        "idle_load": idle_load,
        "images_checked": len(probabilities),
        **results.add_speed_ups(rows, str(threads)),
        "left_out": left_out,
    }
    write_json(out / "benchmark.json", report)
    results.plot_benchmark(report, out / "benchmark.png")
    return report


def _read_reference(folder, manifest):
    """Returns the export's first reference images, and Keras's probabilities for them."""
    listed = manifest["reference"]
    path = folder / listed["file"]
    if change := find_change(path, listed):
        raise InputError(
            f"{path}: not the file that the manifest lists: {change}: export the model again"
        )
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, probabilities = (arrays[n][:MAX_CHECKED] for n in ("images", "probabilities"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    fits = images.ndim == 4 and probabilities.ndim == 2 and len(images) == len(probabilities) > 0
    if images.dtype != "uint8" or not fits:
        raise InputError(f"{path}: must hold uint8 images and as many rows of probabilities")
    return images, probabilities


# ----------------------------------------------------------------------------------------------
# Turns
# ----------------------------------------------------------------------------------------------


def _run_turns(entries, images, probabilities, settings, rounds, timeout):
    """Measures all candidates in turns; returns the processor's load between the turns.

    Most runtimes fix their number of threads when they start. The settings of threads come one
    after the other, so that half as many processes are in memory at a time.
    """
    batches = {threads: BATCHES if threads == settings[-1] else (1,) for threads in settings}
    steps = len(entries) * sum(2 + rounds * len(sizes) for sizes in batches.values())
    loads = []
    with bar(steps, "benchmark", unit=" turns") as shown:
        take_turns = functools.partial(_take_turns, entries, shown, loads)
        for threads in settings:
            with contextlib.ExitStack() as stack:
                take_turns(_Entry.start, stack, threads, images, timeout)
                for _ in range(rounds):
                    for batch in batches[threads]:
                        take_turns(_Entry.time_calls, batch, threads)
                take_turns(_Entry.compare, probabilities)
    busy, whole = np.sum(loads, axis=0)
    return float(busy / whole) if whole else None


def _take_turns(entries, shown, loads, action, *arguments):
    """Performs an action for each candidate in turn; one that fails gets no more turns."""
    for entry in entries:
        if entry.failed is None:
            try:
                action(entry, *arguments)
            except (InputError, RemoteError) as error:
                entry.failed = one_line(error)
                entry.remote.close()
        time.sleep(SETTLE_SECONDS)  # threads that spin come to rest
        before = _processor_times()
        time.sleep(SETTLE_SECONDS)
        loads.append(np.subtract(_processor_times(), before))
        shown.update(1)


def _processor_times():
    """Returns how long all cores have worked, and worked or not; zeros on systems without it."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, idle, *others = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return 0, 0
    waiting, *others = others  # for disks: not working
    busy = user + nice + system + sum(others)
    return busy, busy + idle + waiting


@dataclasses.dataclass
class _Entry:
    """A candidate, its process, and its measurements.

    Attributes:
        candidate: The `Candidate`.
        remote: The `Remote` of its `worker.Worker`.
        failed: Why it gets no more turns; None while it does.
        calls: (threads, batch) -> for each turn, the seconds of each call.
        figures: Further cells of its row.
    """

    candidate: Candidate
    remote: Remote | None = None
    failed: str | None = None
    calls: dict = dataclasses.field(default_factory=dict)
    figures: dict = dataclasses.field(default_factory=dict)

    def start(self, stack, threads, images, timeout):
        """Loads the network, and reads the memory that one image at a time needs."""
        arguments = {"runtime": self.candidate.format, "threads": threads, "images": images}
        self.remote = stack.enter_context(
            Remote(WORKER, arguments, timeout=timeout, environment=ENVIRONMENT)
        )
        path, options = str(self.candidate.path), self.candidate.options
        self.figures["runtime"] = self.remote.call("load", path=path, options=options)
        self.figures["load_ms"] = self.remote.seconds * 1e3
        self.remote.call("time_calls", batch=1, seconds=0, least=1)
        self.figures["peak_memory_bytes"] = self.remote.call("peak_memory")

    def time_calls(self, batch, threads):
        """Takes the times of calls of `batch` images."""
        if self.candidate.batch in (None, batch):
            calls = self.remote.call(
                "time_calls", batch=batch, seconds=TURN_SECONDS, least=LEAST_CALLS[batch]
            )
            self.calls.setdefault((threads, batch), []).append(calls)

    def compare(self, probabilities):
        """Measures the share of the labels that equal Keras's, and the largest difference."""
        predictions = self.remote.call("predict", batch=self.candidate.batch or max(BATCHES))
        if predictions.shape != probabilities.shape or not np.isfinite(predictions).all():
            raise RemoteError(
                f"the predictions must be finite, of shape {probabilities.shape}, got "
                f"{predictions.shape}"
            )
        predictions = predictions.astype("float64")
        same = predictions.argmax(axis=1) == probabilities.argmax(axis=1)
        self.figures["agreement"] = float(same.mean())
        self.figures["max_difference"] = float(np.abs(predictions - probabilities).max())

    def row(self):
        """Returns the candidate's row of the report."""
        row = dataclasses.asdict(self.candidate)
        del row["path"], row["options"]
        if self.failed is not None:
            return {**row, "failed": self.failed}
        if self.candidate.format == "torch" and self.figures["agreement"] < 1:
            row["accuracy"] = None  # it is not the same network
        most = max(threads for threads, _ in self.calls)
        return {
            **row,
            **self.figures,
            "latency_ms": {
                str(threads): {
                    "median": _median(turns, lambda calls: statistics.median(calls) * 1e3),
                    "p95": _median(turns, lambda calls: float(np.percentile(calls, 95)) * 1e3),
                }
                for (threads, batch), turns in self.calls.items()
                if batch == 1
            },
            "images_per_second": {
                str(batch): _median(turns, lambda calls, n=batch: n * len(calls) / sum(calls))
                for (threads, batch), turns in self.calls.items()
                if threads == most
            },
        }


def _median(turns, figure):
    return statistics.median(figure(calls) for calls in turns)
