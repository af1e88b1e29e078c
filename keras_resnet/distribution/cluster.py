"""Who the workers of a run are, as `TF_CONFIG` or a Slurm step says it."""

import dataclasses
import ipaddress
import itertools
import json
import os
import re
import reprlib

from keras_resnet.utils.errors import InputError, one_line

_FORM = '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}'

# Jobs that TensorFlow knows for other strategies, and why there are none here.
_OTHER_JOBS = {
    "ps": 'parameter servers belong to another strategy; remove "ps" and make them workers',
    "evaluator": 'the chief evaluates itself; remove "evaluator"',
}

_HOST = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_ADDRESS = re.compile(r"(?:\[([^\[\]]+)\]|([^\[\]:]+)):([0-9]{1,5})")
_INDEX = re.compile(r"\s*[0-9]{1,9}\s*")

# One name of Slurm's node lists, "rack[0-1]node[07,09-12]", and one entry of its tasks per node.
_NUMBERS = r"[0-9]{1,9}(?:-[0-9]{1,9})?"
_NODE = re.compile(rf"(?:[A-Za-z0-9._-]|\[{_NUMBERS}(?:,{_NUMBERS})*\])+")
_NODES = re.compile(f"{_NODE.pattern}(?:,{_NODE.pattern})*")
_TASKS = re.compile(r"([0-9]{1,9})(?:\(x([0-9]{1,9})\))?")
# More than Slurm can have, and more tasks on a node than there are ports; a slip asks for such.
_MOST_NODES = 2**16
_MOST_TASKS_ON_NODE = 2**15

# Below the ports that Linux hands out itself (from 32768 on), above those of common services.
_FIRST_PORT, _PORTS = 12000, 20000
# 20,000 over the golden ratio: any 300 jobs in a row have ports at least 16 apart.
_JOB_STRIDE, _STEP_STRIDE = 12361, 997

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = _shortened.maxlong = 80


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The workers of a run.

    Attributes:
        workers: Their addresses, "host:port" each, the chief's first.
        index: This process's place in `workers`.
        source: What says so, "TF_CONFIG" or "Slurm".

    Example:
        >>> cluster = Cluster(("a:2222", "b:2222"), 1, "TF_CONFIG")
        >>> cluster.size, cluster.is_chief, cluster.address, cluster.name(0)
        (2, False, 'b:2222', 'worker 0 (a:2222)')
    """

    workers: tuple
    index: int
    source: str

    @property
    def size(self):
        """The number of workers."""
        return len(self.workers)

    @property
    def is_chief(self):
        """Whether this process is worker 0, which alone writes into the run folder."""
        return self.index == 0

    @property
    def address(self):
        """This process's own "host:port"."""
        return self.workers[self.index]

    @property
    def tf_config(self):
        """What `TF_CONFIG` holds for this worker, a dict; the chief is worker 0 in it."""
        return {
            "cluster": {"worker": list(self.workers)},
            "task": {"type": "worker", "index": self.index},
        }

    def name(self, index):
        """Returns what messages call a worker: "worker 1 (host:port)"."""
        return f"worker {index} ({self.workers[index]})"


def find_cluster(environ=None):
    """Returns the `Cluster` that the environment describes, or None for a single machine.

    `TF_CONFIG` is asked first. If it is set, it decides, without a cluster in it too: so a task of
    a Slurm step is kept to itself by `TF_CONFIG={}`.

    Args:
        environ: The environment variables, a mapping; None takes `os.environ`.

    Raises:
        InputError: If the variables are malformed.

    Example:
        >>> find_cluster({}) is None
        True
    """
    environ = os.environ if environ is None else environ
    text = environ.get("TF_CONFIG", "")
    return parse_tf_config(text) if text.strip() else slurm_cluster(environ)


def parse_tf_config(text):
    """Returns the `Cluster` that the value of `TF_CONFIG` describes.

    Args:
        text: The value. A job "chief" of one address may stand beside the job "worker"; it is
            worker 0 then, and the others move up by one. The index may be a string of digits, as
            TensorFlow allows.

    Returns:
        A `Cluster`; None if the text is empty or has no cluster, by which TensorFlow means a
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
    config = _parse_json(text)
    if config.get("cluster") in (None, {}):
        return None
    jobs = _read_jobs(config["cluster"])
    job, index = _read_task(config, jobs)
    workers = jobs["chief"] + jobs["worker"]
    _check_distinct(workers)
    return Cluster(workers, index + len(jobs["chief"]) * (job == "worker"), "TF_CONFIG")


def slurm_cluster(environ):
    """Returns the `Cluster` of the Slurm step that this process is a task of.

    The workers are the step's tasks in the order of `SLURM_PROCID`, which follows the step's node
    list under Slurm's default distribution. TensorFlow's `SlurmClusterResolver` sorts the nodes as
    strings instead, and so puts node10 before node9; apart from that the two agree.

    Args:
        environ: The environment variables, a mapping.

    Returns:
        A `Cluster`; None outside of a step (the shell of an `sbatch` script has a `SLURM_PROCID`
        and no `SLURM_STEP_ID`) and in a step of a single task.

    Raises:
        InputError: If a variable is missing or malformed, or the tasks are not in block order.

    Example:
        >>> cluster = slurm_cluster({
        ...     "SLURM_JOB_ID": "0", "SLURM_STEP_ID": "0", "SLURM_PROCID": "2",
        ...     "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NODELIST": "node[09-10]",
        ...     "SLURM_STEP_TASKS_PER_NODE": "2,1",
        ... })
        >>> cluster.workers, cluster.index
        (('node09:12000', 'node09:12001', 'node10:12000'), 2)
    """
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    total = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    if total not in environ or _slurm_number(environ, total) <= 1:
        return None
    hosts = _slurm_nodes(environ)
    tasks = _slurm_tasks(environ, len(hosts))
    if sum(tasks) != _slurm_number(environ, total):
        raise _slurm_fault(environ, total, f"{sum(tasks)}, the sum of SLURM_STEP_TASKS_PER_NODE")
    index = _slurm_number(environ, "SLURM_PROCID")
    if index >= sum(tasks):
        raise _slurm_fault(environ, "SLURM_PROCID", f"in 0 … {sum(tasks) - 1}")
    _check_block_order(environ, tasks, index)
    first = _slurm_port(environ)
    workers = tuple(
        f"{host}:{first + local}"
        for host, count in zip(hosts, tasks, strict=True)
        for local in range(count)
    )
    return Cluster(workers, index, "Slurm")


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


def _fault(rule, value, advice):
    return InputError(f"TF_CONFIG: {rule}, got {_shortened.repr(value)}; {advice}")


def _parse_json(text):
    try:
        config = json.loads(text)
    except RecursionError:
        raise _fault("it must be JSON", text, "it is nested too deeply") from None
    except ValueError as error:
        raise _fault("it must be JSON", text, f"{one_line(error)}; write {_FORM}") from error
    if not isinstance(config, dict):
        raise _fault("it must be an object", config, f"write {_FORM}")
    return config


def _read_jobs(cluster):
    """Returns the addresses of the jobs "chief" and "worker", a tuple each."""
    if not isinstance(cluster, dict):
        raise _fault('"cluster" must be an object', cluster, f"write {_FORM}")
    for job, addresses in cluster.items():
        if job not in ("chief", "worker"):
            # Launchers may name a job that has no task.
            if job in _OTHER_JOBS and addresses == []:
                continue
            advice = _OTHER_JOBS.get(job, "name it so, or remove it")
            raise _fault('the jobs must be "chief" and "worker"', job, advice)
        _check_addresses(job, addresses)
    jobs = {job: tuple(cluster.get(job, ())) for job in ("chief", "worker")}
    if len(jobs["chief"]) > 1:
        raise _fault("there must be one chief", jobs["chief"], "make the others workers")
    if not any(jobs.values()):
        raise _fault("there must be a worker", cluster, f"write {_FORM}")
    return jobs


def _check_addresses(job, addresses):
    if not isinstance(addresses, list):
        rule = f'the job "{job}" must be a list of addresses'
        raise _fault(rule, addresses, 'write ["host:port", …]')
    for place, address in enumerate(addresses):
        try:
            split_address(address)
        except (TypeError, ValueError):
            rule = f'address {place} of the job "{job}" must be "host:port", port in 1 … 65535'
            advice = "correct it (IPv6 goes into brackets)"
            raise _fault(rule, address, advice) from None


def _check_distinct(workers):
    seen = {}
    for place, address in enumerate(workers):
        host, port = split_address(address)
        first = seen.setdefault((host.lower(), port), place)
        if first != place:
            raise InputError(
                "TF_CONFIG: every worker needs an address of its own, got the same for workers "
                f"{first} and {place}, {address}; give one of them another port"
            )


def _read_task(config, jobs):
    """Returns the job of this process, and its index there."""
    task = config.get("task")
    if not isinstance(task, dict):
        raise _fault('"task" must be an object with "type" and "index"', task, f"write {_FORM}")
    job = task.get("type")
    if not isinstance(job, str) or job not in jobs:
        advice = _OTHER_JOBS.get(job) if isinstance(job, str) else None
        advice = advice or "say which of them this process is"
        raise _fault('the task\'s "type" must be "chief" or "worker"', job, advice)
    index = _whole(task.get("index"))
    if index is None:
        advice = 'give each process its place in the list, as "index"'
        raise _fault('the task\'s "index" must be a whole number', task.get("index"), advice)
    count = len(jobs[job])
    if not count:
        raise _fault(f'the task is a {job}, and "cluster" has none', config["cluster"], "add it")
    if not 0 <= index < count:
        there = f"there is 1 {job}" if count == 1 else f"there are {count} {job}s"
        rule = f"the index must be in 0 … {count - 1}, since {there}"
        raise _fault(rule, index, "give each process its own place in the list")
    return job, index


def _whole(value):
    """Returns what TensorFlow would take for an index, a whole number or a string of one."""
    if isinstance(value, str) and _INDEX.fullmatch(value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _slurm_fault(environ, name, rule):
    value = environ.get(name)
    got = "it is not set" if value is None else f"got {_shortened.repr(value)}"
    return InputError(
        f"{name} must be {rule}, {got}; start the program with srun, or set TF_CONFIG"
    )


def _slurm_number(environ, name):
    value = environ.get(name, "")
    if not re.fullmatch("[0-9]{1,10}", value):
        raise _slurm_fault(environ, name, "a whole number")
    return int(value)


def _slurm_nodes(environ):
    """Returns the hosts of the step, in Slurm's order."""
    name = "SLURM_STEP_NODELIST"
    value = environ.get(name, "")
    fault = _slurm_fault(environ, name, 'a list of nodes such as "node[1-3,07],other"')
    if not _NODES.fullmatch(value):
        raise fault
    hosts = []
    for node in _NODE.findall(value):
        # Names and bracketed numbers take turns.
        literals_and_ranges = re.split(r"\[([^\]]*)\]", node)
        choices = [[part] for part in literals_and_ranges]
        choices[1::2] = [_expand_numbers(part, fault) for part in literals_and_ranges[1::2]]
        hosts += map("".join, itertools.islice(itertools.product(*choices), _MOST_NODES + 1))
        if len(hosts) > _MOST_NODES:
            raise fault
    if len(set(hosts)) < len(hosts):
        raise _slurm_fault(environ, name, "a list that names no node twice")
    return hosts


def _expand_numbers(ranges, fault):
    """Returns the numbers of "1-3,07" as strings, with the leading zeros of the first."""
    numbers = []
    for part in ranges.split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        if not 0 < len(span) <= _MOST_NODES:
            raise fault
        numbers += [str(number).zfill(len(first)) for number in span]
    return numbers


def _slurm_tasks(environ, nodes):
    """Returns how many tasks each node of the step has."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    tasks = []
    for part in environ.get(name, "").split(","):
        match = _TASKS.fullmatch(part)
        if not match or int(match[2] or 1) > _MOST_NODES or int(match[1]) > _MOST_TASKS_ON_NODE:
            raise _slurm_fault(environ, name, 'a list of numbers such as "2(x3),1"')
        tasks += [int(match[1])] * int(match[2] or 1)
    if len(tasks) != nodes:
        raise _slurm_fault(environ, name, f"one number for each of the {nodes} nodes")
    return tasks


def _check_block_order(environ, tasks, index):
    """Refuses steps whose tasks go round the nodes: the addresses would be those of others."""
    if "SLURM_NODEID" not in environ or "SLURM_LOCALID" not in environ:
        return
    node, local = (_slurm_number(environ, name) for name in ("SLURM_NODEID", "SLURM_LOCALID"))
    if sum(tasks[:node]) + local != index:
        raise InputError(
            f"SLURM_PROCID must count the tasks node by node, got {index} for task {local} of "
            f"node {node}; start the step with srun --distribution=block"
        )


def _slurm_port(environ):
    """Returns the port of a node's first task, another one for each job and step."""
    job = _slurm_number(environ, "SLURM_JOB_ID")
    step = _slurm_number(environ, "SLURM_STEP_ID")
    return _FIRST_PORT + (job * _JOB_STRIDE + step * _STEP_STRIDE) % _PORTS
