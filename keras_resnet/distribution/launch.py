"""Starts the workers of one machine, as `keras-resnet launch -n 2 -- train …` does.

The launching process imports neither Keras nor TensorFlow. Each worker gets a `TF_CONFIG`, GPUs of
its own, and cores of its own: TensorFlow starts a thread for each core that it sees, so unbound
workers would start too many threads and wait for each other.

Workers run in sessions of their own, so that Ctrl-C, SIGTERM and SIGHUP reach the launching process
alone. It forwards them to the chief (worker 0), which needs the other workers for its last step.
When the chief has ended, or after `STOP_SECONDS`, the other workers are terminated. A second
Ctrl-C kills all workers at once; a second SIGTERM or SIGHUP does not, because `timeout`, systemd
and closed terminals send them in pairs. An ignored signal, as under `nohup`, stays ignored. On
Linux the workers are killed if the launching process is killed.
"""

import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

from keras_resnet.utils.errors import InputError, check_count

PROGRAM = [sys.executable, "-m", "keras_resnet.cli"]
"""The words that start the command line, before a command's name."""

GRACE_SECONDS = 20
"""How long the other workers may run after one failed, to detect and report it."""

STOP_SECONDS = 60
"""How long the chief may take to save after a signal."""

TERMINATE_SECONDS = 5
"""The time from SIGTERM to SIGKILL."""

# A process that left a worker's session can hold the worker's pipe open.
_DRAIN_SECONDS = 5
_POLL_SECONDS = 0.02

BAD_INPUT, INTERRUPTED, WORKER_LOST = 2, 130, 75

# signal received -> signal sent to the chief, which does not handle SIGHUP.
_FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    getattr(signal, "SIGHUP", signal.SIGTERM): signal.SIGTERM,
}

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def launch_workers(command, count, *, restarts=0, restart_command=None, environment=None):
    """Runs `count` workers on this machine until all have ended.

    The chief inherits standard output and standard error. The lines of the other workers go to
    standard error with the worker's name in front. When a worker fails, the others have
    `GRACE_SECONDS` to report it before they are terminated.

    Call it from the main thread: Python delivers signals only there, and on Linux a worker is
    killed when the thread that started it ends.

    Args:
        command: The words that start a worker.
        count: The number of workers. A single worker gets a `TF_CONFIG` without a cluster.
        restarts: How many times to start all workers again when one was lost: killed by a signal,
            or reported as lost (exit status 75) by another worker.
        restart_command: The words that start a worker again; `command` by default.
        environment: Environment variables to add to those of this process, a dict.

    Returns:
        The exit status: 0 if all workers ended with 0, and 130 if this process received a stop
        signal. Otherwise it is the status of the worker that failed first, or 1 if a signal killed
        that worker. A chief's status of 2 (bad input) or 130 (interrupted) has precedence: the
        other worker may have failed only because it lost the chief.

    Raises:
        InputError: If a number is out of range, `TF_CONFIG` is set already, or the system has no
            process groups (Windows).
        OSError: If the command cannot be started.

    Example:
        >>> launch_workers([sys.executable, "-c", "pass"], 1)
        0
    """
    _check(count, restarts)
    with _collected_signals() as received:
        for restart in range(1, restarts + 2):
            with _WorkerGroup(command, count, environment or {}, received) as group:
                group.run()
            if group.succeeded:
                return 0
            if received:
                return INTERRUPTED
            if not group.lost_worker or restart > restarts:
                break
            _print_error(f"restart {restart} of {restarts}: {group.failure}")
            command = restart_command or command
    others = "; the others were ended" if group.others_ended else ""
    _print_error(f"keras-resnet: {group.failure}{others}")
    return group.status


def share_cores(cores, count):
    """Distributes cores over workers.

    Args:
        cores: The numbers of the available cores.
        count: The number of workers.

    Returns:
        A list of `count` sets. The cores of a worker have adjacent numbers, since these share
        caches. With fewer cores than workers, each worker has one core, and workers share cores.

    Example:
        >>> share_cores({0, 1, 2, 3, 4}, 2)
        [{0, 1}, {2, 3, 4}]
        >>> share_cores({4, 7}, 3)
        [{4}, {4}, {7}]
    """
    cores, total = sorted(cores), len(cores)
    shares = [cores[i * total // count : (i + 1) * total // count] for i in range(count)]
    return [set(share or cores[i * total // count :][:1]) for i, share in enumerate(shares)]


def share_gpus(devices, count):
    """Distributes GPUs over workers.

    Args:
        devices: The names of the available GPUs, as in `CUDA_VISIBLE_DEVICES`.
        count: The number of workers.

    Returns:
        A list of `count` values of `CUDA_VISIBLE_DEVICES`. Every worker has the same number of
        GPUs, which TensorFlow requires. With fewer GPUs than workers, every value is "-1", which
        hides all GPUs. Without GPUs, every value is None.

    Example:
        >>> share_gpus(["0", "1", "2"], 2)
        ['0', '1']
        >>> share_gpus(["0"], 2)
        ['-1', '-1']
        >>> share_gpus([], 2)
        [None, None]
    """
    if not devices:
        return [None] * count
    each = len(devices) // count
    return [",".join(devices[i * each : (i + 1) * each]) or "-1" for i in range(count)]


def _check(count, restarts):
    check_count("-n", count)
    check_count("--restarts", restarts, least=0)
    if not hasattr(os, "killpg"):
        raise InputError(f"`launch` needs Linux or macOS, got {sys.platform}; on Windows use WSL 2")
    if count > 1 and os.environ.get("TF_CONFIG"):
        raise InputError(
            "`launch` makes a TF_CONFIG for each worker, but one is set already: "
            f"{' '.join(os.environ['TF_CONFIG'].split())}; unset it, or start the workers without "
            "`launch`"
        )


def _worker_environments(count, more):
    """Returns the environment variables of each worker, with new ports at each call."""
    addresses = [f"localhost:{port}" for port in _free_ports(count)]
    environments = []
    for index, visible in enumerate(share_gpus(_available_gpus(), count)):
        # An empty TF_CONFIG for a single worker: it then ignores Slurm's variables, too.
        config = {}
        if count > 1:
            task = {"type": "worker", "index": index}
            config = {"cluster": {"worker": addresses}, "task": task}
        environ = {**os.environ, **more, "TF_CONFIG": json.dumps(config), "PYTHONUNBUFFERED": "1"}
        if visible is not None:
            environ["CUDA_VISIBLE_DEVICES"] = visible
        environments.append(environ)
    return environments


def _free_ports(count):
    ports = []
    with contextlib.ExitStack() as stack:
        while len(ports) < count:
            # Linux assigns ports from 32768 on to outgoing connections.
            port = random.randrange(20000, 32768)
            server = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                server.bind(("", port))
                ports.append(port)
    return ports


def _available_gpus():
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        try:
            return [str(number) for number in range(len(os.listdir("/proc/driver/nvidia/gpus")))]
        except OSError:
            return []
    devices = []
    for name in map(str.strip, visible.split(",")):
        if name in ("", "-1"):  # CUDA ignores the names after an invalid one
            break
        devices.append(name)
    return devices


def _print_error(text):
    # A closed stderr must not stop a run, or the thread that reads a worker's pipe.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _copy_lines(pipe, index):
    with pipe:
        for line in pipe:
            text = line.decode("utf-8", "replace").removesuffix("\n")
            _print_error(f"worker {index}: {text}")


def _make_preexec(cores):
    """Returns the function that a worker's process calls between fork and exec."""
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    kill = ctypes.c_ulong(signal.SIGKILL)

    def prepare():
        if prctl:
            prctl(_PR_SET_PDEATHSIG, kill)
            if os.getppid() != parent:  # the parent ended before the call
                os._exit(1)
        if cores:
            with contextlib.suppress(OSError):  # a core has become unavailable
                os.sched_setaffinity(0, cores)

    return prepare


class _WorkerGroup:
    """The workers of one attempt, which start together and end together.

    As a context manager it leaves no worker behind.
    """

    def __init__(self, command, count, environment, received):
        self.received = received
        self.workers = []  # `subprocess.Popen` objects, by index
        self.running = []  # indices
        self.failed = []  # indices of workers that failed on their own, the first one first
        self._ending = False  # True: later exit statuses are not failures
        self._readers = []
        # macOS cannot bind a process to cores.
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        environments = _worker_environments(count, environment)
        try:
            for index, share in enumerate(share_cores(cores, count)):
                pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} if index else {}
                worker = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    env=environments[index],
                    start_new_session=True,
                    preexec_fn=_make_preexec(share),
                    **pipe,
                )
                self.workers.append(worker)
                self.running.append(index)
        except BaseException:
            self.__exit__()
            raise
        # After the last fork: a fork in a process with threads can copy a held lock.
        for index, worker in enumerate(self.workers[1:], 1):
            arguments = (worker.stdout, index)
            reader = threading.Thread(target=_copy_lines, args=arguments, daemon=True)
            reader.start()
            self._readers.append(reader)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._signal(signal.SIGKILL)
        self._wait(lambda: False)
        deadline = time.monotonic() + _DRAIN_SECONDS
        for reader in self._readers:
            reader.join(max(0, deadline - time.monotonic()))

    @property
    def succeeded(self):
        """Whether all workers ended with 0 on their own."""
        return not self.failed and not self._ending

    @property
    def failure(self):
        """A description of the first failure."""
        index = self.failed[0]
        code = self.workers[index].returncode
        if code >= 0:
            return f"worker {index} ended with exit status {code}"
        names = {each.value: each.name for each in signal.Signals}
        return f"worker {index} was killed by {names.get(-code, f'signal {-code}')}"

    @property
    def others_ended(self):
        """Whether a second worker has an exit status other than 0."""
        return sum(worker.returncode != 0 for worker in self.workers) > 1

    @property
    def status(self):
        """The exit status; see `launch_workers`."""
        chief, first = (self.workers[index].returncode for index in (0, self.failed[0]))
        if 0 in self.failed and chief in (BAD_INPUT, INTERRUPTED):
            return chief
        return first if first > 0 else 1

    @property
    def lost_worker(self):
        """Whether a worker was killed or unreachable; a restart would repeat other failures."""
        codes = [self.workers[index].returncode for index in self.failed]
        lost = any(code < 0 or code == WORKER_LOST for code in codes)
        return lost and self.status not in (BAD_INPUT, INTERRUPTED)

    def run(self):
        """Waits until all workers have ended, or ends them after a failure or a signal."""
        self._wait(lambda: self.failed or self.received)
        if self.failed:
            self._wait(lambda: self.received, GRACE_SECONDS)
        if self.received:
            self._stop_chief()
        self._signal(signal.SIGTERM)
        self._wait(self._is_second_ctrl_c, TERMINATE_SECONDS)

    def _stop_chief(self):
        """Forwards the signal to the chief alone, and waits until it has saved."""
        if 0 in self._poll():
            self.workers[0].send_signal(_FORWARDED[self.received[0]])
        self._wait(lambda: 0 not in self.running or self._is_second_ctrl_c(), STOP_SECONDS)
        if 0 in self.running:
            late = f"the chief had not ended after {STOP_SECONDS} s"
            self._signal(signal.SIGKILL)
            reason = "a second Ctrl-C" if self._is_second_ctrl_c() else late
            _print_error(f"keras-resnet: {reason}; all workers were killed")

    def _is_second_ctrl_c(self):
        return signal.SIGINT in self.received[1:]

    def _wait(self, until, seconds=float("inf")):
        """Waits until all workers have ended, a condition holds, or time is up."""
        deadline = time.monotonic() + seconds
        while self._poll() and not until() and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _poll(self):
        """Returns the indices of the running workers, after an update of the group's state."""
        for index in list(self.running):
            worker = self.workers[index]
            if worker.poll() is None:
                continue
            self.running.remove(index)
            _signal_group(worker, signal.SIGKILL)  # the processes that it left behind
            if worker.returncode and not self._ending:
                self.failed.append(index)
        return self.running

    def _signal(self, number):
        for index in self._poll():
            self._ending = True
            _signal_group(self.workers[index], number)


def _signal_group(worker, number):
    # macOS answers "not permitted" if only zombies are left in a group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, number)


@contextlib.contextmanager
def _collected_signals():
    """Yields a list to which stop signals are appended instead of having their usual effect."""
    received = []
    before = {number: signal.getsignal(number) for number in _FORWARDED}
    # A shell starts background jobs with SIGINT ignored: Ctrl-C is not meant for them.
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            # None: the handler was not installed by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
