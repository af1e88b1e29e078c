"""The workers of a run, as `TF_CONFIG` describes them."""

import dataclasses
import ipaddress
import json
import os
import re
import reprlib

from keras_resnet.utils.errors import InputError, one_line

_FORM = '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}'

# TensorFlow's jobs for other strategies, and the remedy.
_OTHER_JOBS = {
    "ps": 'parameter servers belong to another strategy; remove "ps" and make them workers',
    "evaluator": 'the chief evaluates itself; remove "evaluator"',
}

_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})")
_INDEX = re.compile(r"\s*[0-9]{1,9}\s*")

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 80


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run.

    Attributes:
        workers: Their addresses, "host:port" each, the chief's first.
        index: This process's place in `workers`.

    Example:
        >>> cluster = Cluster(("a:2222", "b:2222"), 1)
        >>> cluster.size, cluster.is_chief, cluster.address, cluster.name(0)
        (2, False, 'b:2222', 'worker 0 (a:2222)')
    """

    workers: tuple
    index: int

    @property
    def size(self):
        """The number of workers."""
        return len(self.workers)

    @property
    def is_chief(self):
        """Whether this process is worker 0, the only one that writes into the run folder."""
        return self.index == 0

    @property
    def address(self):
        """This process's own "host:port"."""
        return self.workers[self.index]

    @property
    def tf_config(self):
        """The value of `TF_CONFIG` for this worker, a dict in which the chief is worker 0."""
        return {
            "cluster": {"worker": list(self.workers)},
            "task": {"type": "worker", "index": self.index},
        }

    def name(self, index):
        """Returns a worker's name for messages: "worker 1 (host:port)"."""
        return f"worker {index} ({self.workers[index]})"


def find_cluster(environ=None):
    """Returns the `Cluster` that `TF_CONFIG` describes, or None if it describes none.

    Args:
        environ: The environment variables, a mapping; None takes `os.environ`.

    Raises:
        InputError: If `TF_CONFIG` breaks a rule, or if it is not set in a Slurm step of several
            tasks: each task would train on its own.

    Example:
        >>> find_cluster({}) is None
        True
    """
    environ = os.environ if environ is None else environ
    text = environ.get("TF_CONFIG", "")
    if text.strip():
        return parse_tf_config(text)
    # The shell of an sbatch script has SLURM_PROCID and SLURM_NTASKS, but no step.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    if "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ and tasks != "1":
        raise InputError(
            f"each of {tasks} tasks of a Slurm step needs a TF_CONFIG, got none: start them with "
            "launchers/slurm.sbatch, or set TF_CONFIG={} for independent processes"
        )
    return None


def parse_tf_config(text):
    """Returns the `Cluster` that the value of `TF_CONFIG` describes.

    Args:
        text: The value. Besides the job "worker" there may be a job "chief" of one address; then
            the chief is worker 0, and the others move up by one. The index may be a string of
            digits, as in TensorFlow.

    Returns:
        A `Cluster`; None if the text is empty or has no cluster, which TensorFlow takes for a
        single machine.

    Raises:
        InputError: If the text breaks a rule; the message starts with "TF_CONFIG".

    Example:
        >>> cluster = parse_tf_config(
        ...     '{"cluster": {"chief": ["a:1"], "worker": ["b:1"]},'
        ...     ' "task": {"type": "worker", "index": 0}}'
        ... )
        >>> cluster.workers, cluster.index
        (('a:1', 'b:1'), 1)
    """
    if not text.strip():
        return None
    try:
        config = json.loads(text)
    except RecursionError:
        raise _error("it must be JSON", text, "it is nested too deeply") from None
    except ValueError as error:
        raise _error("it must be JSON", text, f"{one_line(error)}; write {_FORM}") from error
    _require(isinstance(config, dict), "it must be an object", config)
    if config.get("cluster") in (None, {}):
        return None
    jobs = _read_jobs(config["cluster"])

    task = config.get("task")
    _require(isinstance(task, dict), '"task" must be an object with "type" and "index"', task)
    job, index = task.get("type"), _whole_number(task.get("index"))
    remedy = "write the job of this process"
    if isinstance(job, str):
        remedy = _OTHER_JOBS.get(job, remedy)
    known = isinstance(job, str) and job in jobs
    _require(known, 'the task\'s "type" must be "chief" or "worker"', job, remedy)
    _require(
        index is not None,
        'the task\'s "index" must be a whole number',
        task.get("index"),
        "write the place of this process in the list of its job",
    )
    count = len(jobs[job])
    _require(count, f'the task is a {job}, but "cluster" has none', config["cluster"], "add it")
    there = f"there is 1 {job}" if count == 1 else f"there are {count} {job}s"
    _require(
        0 <= index < count,
        f"the index must be in 0 … {count - 1}, since {there}",
        index,
        "give each process its own place in the list",
    )
    workers = (*jobs["chief"], *jobs["worker"])
    return Cluster(workers, index + (len(jobs["chief"]) if job == "worker" else 0))


def split_address(address):
    """Returns host and port of an address, without the brackets of IPv6.

    Raises:
        ValueError: If it is not "host:port" with a port in 1 … 65535.

    Example:
        >>> split_address("node1:2222"), split_address("[::1]:2222")
        (('node1', 2222), ('::1', 2222))
    """
    match = _ADDRESS.fullmatch(address)
    if not match or not 1 <= int(match[3]) <= 65535:
        raise ValueError(address)
    if match[1]:
        ipaddress.IPv6Address(match[1])
    elif not _HOST.fullmatch(match[2]) or len(match[2]) > 253:
        raise ValueError(address)
    return match[1] or match[2], int(match[3])


def _read_jobs(cluster):
    """Returns the addresses of the jobs "chief" and "worker", two lists in a dict."""
    _require(isinstance(cluster, dict), '"cluster" must be an object', cluster)
    places = {}  # (host, port) -> the worker's place
    for job in ("chief", *(job for job in cluster if job != "chief")):
        addresses = cluster.get(job, [])
        if job in _OTHER_JOBS and addresses == []:  # some launchers name jobs without tasks
            continue
        remedy = _OTHER_JOBS.get(job, "rename or remove it")
        _require(job in ("chief", "worker"), 'the jobs must be "chief" and "worker"', job, remedy)
        _require(
            isinstance(addresses, list), f'the job "{job}" must be a list of addresses', addresses
        )
        for place, address in enumerate(addresses):
            try:
                host, port = split_address(address)
            except (TypeError, ValueError):
                rule = f'address {place} of the job "{job}" must be "host:port", port in 1 … 65535'
                raise _error(rule, address, "correct it (IPv6 needs brackets)") from None
            worker = len(places)
            first = places.setdefault((host.lower(), port), worker)
            _require(
                first == worker,
                f"workers {first} and {worker} must have different addresses",
                address,
                "give one of them another port",
            )
    jobs = {job: cluster.get(job, []) for job in ("chief", "worker")}
    _require(len(jobs["chief"]) <= 1, "there must be one chief", jobs["chief"], "make it a worker")
    _require(places, "there must be a worker", cluster)
    return jobs


def _whole_number(value):
    """Returns an index as TensorFlow reads it: a whole number, or a string of one."""
    if isinstance(value, str) and _INDEX.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _require(condition, rule, value, remedy=f"write {_FORM}"):
    if not condition:
        raise _error(rule, value, remedy)


def _error(rule, value, remedy):
    return InputError(f"TF_CONFIG: {rule}, got {_shortened.repr(value)}; {remedy}")
