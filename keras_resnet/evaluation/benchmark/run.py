"""The measurement: all contestants in turns, each in a process of its own."""

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
# How many of the reference images each contestant is asked about.
MAX_CHECKED = 256


def benchmark(folder, *, rounds=5, threads=None, out=None, torch=True, trust=False, timeout=300):
    """Measures the files of an export, in turns in one run, and writes what came out.

    Beside them runs the Keras model they were made from, if it is still there, and the d2l
    network in PyTorch with the same weights, if PyTorch is installed and has such a network. Each
    contestant lives in a process of its own, which is idle while another is measured; all must
    answer the export's reference images, so that none can win by being wrong.

    Args:
        folder: An export's folder, with its manifest.json.
        rounds: How often each contestant has its turn; a figure is the median over the rounds.
        threads: How many threads "all threads" are; by default those of the machine.
        out: The folder for benchmark.json and benchmark.png, by default `folder`.
        torch: Whether PyTorch may take part.
        trust: Whether a SavedModel may, which is code.
        timeout: Seconds that one turn may take.

    Returns:
        The report, a dict as benchmark.json holds it: "model", "machine", "threads", "rounds",
        "idle_load" (how busy the processor was between the turns),
        "baseline" (whose latency divided by a row's is its "speed_up"), "rows", one dict a
        contestant, and "left_out". A row whose contestant failed has "failed", the reason.

    Raises:
        InputError: If an argument is out of range, the folder is no export, one of its files is
            not as the manifest says, or none of them runs.
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
        reference = _read_reference(folder, manifest, scratch)
        contestants, left_out = find_all(folder, manifest, scratch, torch, trust)
        measured, idle_load = _measure(contestants, reference, settings, rounds, timeout)
    rows = [_row(each, measured[each.name]) for each in contestants]
    if all("failed" in row for row in rows):
        raise InputError(f"{folder}: nothing could be measured: {rows[0]['failed']}")
    report = {
        **_describe(manifest),
        "threads": settings,
        "rounds": rounds,
        "idle_load": idle_load,
        "images_checked": len(reference.probabilities),
        **results.add_speed_ups(rows, str(threads)),
        "left_out": left_out,
    }
    write_json(out / "benchmark.json", report)
    results.plot_benchmark(report, out / "benchmark.png")
    return report


def _describe(manifest):
    surroundings = describe_surroundings()
    return {
        "benchmark_version": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": manifest["model"],
        **{name: surroundings[name] for name in ("machine", "versions", "git_commit")},
    }


class _Reference:
    """The images that all are asked about, and Keras's answers.

    The images lie in a file of their own, which workers map into memory: what they read of it is
    all that counts as theirs.
    """

    def __init__(self, images, probabilities, scratch):
        self.path = str(Path(scratch) / "images.npy")
        self.probabilities = probabilities
        np.save(self.path, images)

    def compare(self, answer):
        """Returns the share of equal labels, and the largest difference of a probability."""
        if answer.shape != self.probabilities.shape or not np.isfinite(answer).all():
            raise WorkerError(f"answers of shape {answer.shape}, or not finite")
        same = answer.argmax(axis=1) == self.probabilities.argmax(axis=1)
        return {
            "agreement": float(same.mean()),
            "max_difference": float(np.abs(answer - self.probabilities).max()),
        }


def _read_reference(folder, manifest, scratch):
    listed = manifest["reference"]
    path = folder / listed["file"]
    if digest(path) != (listed["bytes"], listed["sha256"]):
        raise InputError(f"{path}: not the file that the manifest lists: export the model again")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, probabilities = (arrays[n][:MAX_CHECKED] for n in ("images", "probabilities"))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path}: damaged: {error}") from error
    fits = images.ndim == 4 and probabilities.ndim == 2 and len(images) == len(probabilities) > 0
    if images.dtype != "uint8" or not fits:
        raise InputError(f"{path}: must hold uint8 images and as many rows of probabilities")
    return _Reference(images, probabilities, scratch)


# ----------------------------------------------------------------------------------------------
# Turns
# ----------------------------------------------------------------------------------------------


def _measure(contestants, reference, settings, rounds, timeout):
    """Returns what was found, by contestants' names, and how busy all was between the turns.
    The settings of threads are measured one after the other, since most runtimes fix theirs when
    they start: half as many processes are in memory at a time.
    """
    found = {each.name: {"calls": {}} for each in contestants}
    steps = len(contestants) * sum(
        2 + rounds * (len(BATCHES) if threads == settings[-1] else 1) for threads in settings
    )
    with bar(steps, "benchmark", unit=" turns") as shown:
        turns = _Turns(found, shown)
        for threads in settings:
            whole = threads == settings[-1]
            with contextlib.ExitStack() as stack:
                alive = [each for each in contestants if "failed" not in found[each.name]]
                for each in alive:
                    turns.take(each, _start, stack, reference, threads, timeout)
                for _ in range(rounds):
                    for batch in BATCHES if whole else (1,):
                        for each in alive:
                            turns.take(each, _time, batch, threads)
                for each in alive:
                    turns.take(each, _compare, reference)
    return found, turns.pauses.share()


class _Turns:
    """Gives one contestant after the other its turn; one that failed gets no more."""

    def __init__(self, found, shown):
        self.found, self.shown, self.pauses = found, shown, _Pauses()

    def take(self, contestant, turn, *arguments):
        own = self.found[contestant.name]
        if "failed" not in own:
            try:
                turn(contestant, own, *arguments)
            except WorkerError as error:
                own["failed"] = str(error)
                if "worker" in own:
                    own["worker"].end()
        self.pauses.take()
        self.shown.update(1)


class _Pauses:
    """Lets threads that spin come to rest between two turns, and looks whether all is quiet."""

    def __init__(self):
        self.busy = self.whole = 0

    def take(self):
        time.sleep(SETTLE_SECONDS)
        before = _processor_times()
        time.sleep(SETTLE_SECONDS)
        after = _processor_times()
        if before and after:
            self.busy += after[0] - before[0]
            self.whole += after[1] - before[1]

    def share(self):
        return self.busy / self.whole if self.whole else None


def _processor_times():
    """Returns how long all cores have worked, and worked or not; None where Linux is missing."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, idle, *others = map(int, file.readline().split()[1:9])
    except (OSError, ValueError):
        return None
    waiting, *others = others  # for disks: not working
    busy = user + nice + system + sum(others)
    return busy, busy + idle + waiting


def _start(contestant, own, stack, reference, threads, timeout):
    """Loads the network, and takes the memory that one image at a time needs."""
    own["worker"] = stack.enter_context(Worker(contestant.runtime, threads, timeout))
    own["loaded"] = own["worker"].ask(
        "load", path=str(contestant.path), images=reference.path, options=contestant.options
    )
    own["worker"].ask("measure", batch=1, seconds=0, least=1)
    own["memory"] = own["worker"].ask("peak_memory")["bytes"]


def _time(contestant, own, batch, threads):
    if contestant.batch in (None, batch):
        answer = own["worker"].ask(
            "measure", batch=batch, seconds=TURN_SECONDS, least=LEAST_CALLS[batch]
        )
        own["calls"].setdefault((threads, batch), []).append(answer["calls"])


def _compare(contestant, own, reference):
    answer = own["worker"].ask("answer", batch=contestant.batch or max(BATCHES))
    own["answers"] = reference.compare(np.array(answer["probabilities"]))


def _row(contestant, own):
    row = {
        name: getattr(contestant, name)
        for name in ("name", "format", "precision", "batch", "bytes", "accuracy")
    }
    if "failed" in own:
        return {**row, "failed": own["failed"]}
    most = max(threads for threads, _ in own["calls"])
    if contestant.runtime == "torch" and own["answers"]["agreement"] < 1:
        row["accuracy"] = None  # not the same network, then
    return {
        **row,
        "runtime": own["loaded"]["runtime"],
        "load_ms": own["loaded"]["seconds"] * 1e3,
        "peak_memory_bytes": own["memory"],
        **own["answers"],
        "latency_ms": {
            str(threads): {
                "median": _median(calls, lambda turn: statistics.median(turn) * 1e3),
                "p95": _median(calls, lambda turn: float(np.percentile(turn, 95)) * 1e3),
            }
            for (threads, batch), calls in own["calls"].items()
            if batch == 1
        },
        "images_per_second": {
            str(batch): _median(calls, lambda turn, batch=batch: batch * len(turn) / sum(turn))
            for (threads, batch), calls in own["calls"].items()
            if threads == most
        },
    }


def _median(turns, figure):
    return statistics.median(figure(turn) for turn in turns)
