"""The workers of one machine: started together, watched, and never left behind.

What `keras-resnet train --local-workers N --restarts K` does in the process that the user started.
That process imports neither Keras nor TensorFlow: it forks, and its memory is the workers' loss.

A TensorFlow process starts as many threads as there are cores, as if it were alone on the machine;
N of them would have N times too many and wait for each other more than they compute. So each
worker is bound to cores of its own before its program begins, for TensorFlow counts them when it is
imported. In the same way each worker sees GPUs of its own.

Ctrl-C, SIGTERM and SIGHUP reach this process alone, for the workers are in sessions of their own.
It passes them on to the chief, worker 0, which needs the others for its last step. When the chief
has ended, or after `STOP_SECONDS`, the others are ended; a second Ctrl-C kills all at once. SIGTERM
and SIGHUP do not count as a second one: `timeout`, systemd and closed terminals send them in pairs.
A signal that is ignored, as under `nohup`, stays so. On Linux the workers die with this process
even if it is killed.
"""

import contextlib
import ctypes
import itertools
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

# How long the others of a worker that failed may take to notice it and to say so.
GRACE_SECONDS = 20
# How long the chief may take to save when it was asked to stop.
STOP_SECONDS = 60
# From SIGTERM to SIGKILL.
TERMINATE_SECONDS = 5
# How long to read on from workers that have ended: what they started may hold their pipes open.
_DRAIN_SECONDS = 5
_POLL_SECONDS = 0.02

BAD_INPUT, INTERRUPTED, WORKER_LOST = 2, 130, 75
# These tell more, from the chief, than what a worker says that lost it.
_FINAL = (BAD_INPUT, INTERRUPTED)

# What comes to this process -> what it passes on to the chief, which knows no closed terminal.
_PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    getattr(signal, "SIGHUP", signal.SIGTERM): signal.SIGTERM,
}

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def run_local_workers(
    command, restart_command, count, *, restarts=0, stdout=None, stderr=None, environ=None
):
    """Runs `count` workers on this machine until all have ended.

    Worker 0, the chief, writes to `stdout` and `stderr` itself. Each line of another worker goes to
    `stderr`, behind the worker's name. When a worker fails, the others have `GRACE_SECONDS` to say
    so before they are ended.

    Call it from the main thread: only there Python takes signals, and on Linux a worker dies with
    the thread that started it.

    Args:
        command: The words that start a worker.
        restart_command: The words that start a worker after a failure: they say to resume.
        count: The number of workers. A single one gets a `TF_CONFIG` without a
            cluster.
        restarts: How many times to start again when a worker was lost: killed by a signal, or
            not reached by another, which then ends with 75.
        stdout: A stream for the chief's standard output; `sys.stdout` by default. The chief gets
            its file descriptor, so that it sees a terminal; without one, lines are copied.
        stderr: The same for standard error.
        environ: The workers' environment variables, a mapping; `os.environ` by default.

    Returns:
        The exit status. 0: all workers ended with 0. 130: this process was asked to stop.
        Otherwise that of the worker that failed first, since the others failed because of it,
        unless the chief says 2 (bad input) or 130 (interrupted), which tell more than the 1 of a
        worker that lost its chief. A worker that a signal killed counts as 1; what a worker
        answers to being ended by this process counts for nothing.

    Raises:
        InputError: If a number is out of range, a `TF_CONFIG` is set already or the system has no
            process groups, as Windows.

    Example:
        >>> run_local_workers([sys.executable, "-c", "print('trained')"], [], 1)
        trained
        0
    """
    environ = dict(os.environ if environ is None else environ)
    _check(count, restarts, environ)
    screen = _Screen(
        sys.stdout if stdout is None else stdout, sys.stderr if stderr is None else stderr
    )
    with _noted_signals() as received:
        for restart in range(1, restarts + 2):
            with _Crew(command, _environments(environ, count), screen, received) as crew:
                crew.run()
            if crew.succeeded:
                return 0
            if received:
                return INTERRUPTED
            if not crew.lost_one or restart > restarts:
                break
            screen.say(f"restart {restart} of {restarts}: {crew.failure}")
            command = restart_command
    screen.say(f"keras-resnet: {crew.failure}{'; the others were ended' * crew.took_others}")
    return crew.status


def share_cores(cores, count):
    """Returns each worker's cores: neighbours, which share caches, and no core twice if they last.

    Args:
        cores: The numbers of the cores there are.
        count: The number of workers.

    Returns:
        A list of `count` sets; with more workers than cores, of one core each, in turn.

    Example:
        >>> share_cores({0, 1, 2, 3, 4}, 2)
        [{0, 1}, {2, 3, 4}]
        >>> share_cores({4, 7}, 3)
        [{4}, {7}, {4}]
    """
    cores = sorted(cores)
    if count > len(cores):
        return [set(cores[index % len(cores) :][:1]) if cores else set() for index in range(count)]
    bounds = [index * len(cores) // count for index in range(count + 1)]
    return [set(cores[start:end]) for start, end in itertools.pairwise(bounds)]


def share_gpus(devices, count):
    """Returns each worker's `CUDA_VISIBLE_DEVICES`.

    Args:
        devices: The names of the GPUs there are, as that variable has them.
        count: The number of workers.

    Returns:
        A list of `count` strings, each with as many GPUs as the others, as TensorFlow needs it;
        "-1" hides all of them where there are fewer than workers. None instead of each where
        there are no GPUs at all.

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


def _check(count, restarts, environ):
    check_count("--local-workers", count)
    check_count("--restarts", restarts, least=0)
    if not hasattr(os, "killpg"):
        raise InputError(
            f"`--local-workers` needs Linux or macOS, got {sys.platform}; on Windows use WSL 2"
        )
    if count > 1 and environ.get("TF_CONFIG"):
        raise InputError(
            "--local-workers makes a TF_CONFIG for each worker; one is set already: "
            + " ".join(environ["TF_CONFIG"].split())
        )


def _environments(environ, count):
    """Returns the environment variables of each worker; the ports are new at each call."""
    addresses = [f"localhost:{port}" for port in _free_ports(count)]
    environments = []
    for index, visible in enumerate(share_gpus(_gpus(environ), count)):
        own = {**environ, "KERAS_RESNET_LOCAL_WORKER": str(index), "PYTHONUNBUFFERED": "1"}
        own["TF_CONFIG"] = "{}"  # no cluster, also where Slurm's variables name one
        if count > 1:
            task = {"type": "worker", "index": index}
            own["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        if visible is not None:
            own["CUDA_VISIBLE_DEVICES"] = visible
        environments.append(own)
    return environments


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        # All are open at the same time, so no number comes twice. Below 32768: above it systems
        # choose the ports of outgoing connections, such as those of a worker to its chief.
        ports = []
        while len(ports) < count:
            each = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                port = random.randrange(20000, 32768)
                each.bind(("", port))
                ports.append(port)
        return ports


def _gpus(environ):
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        try:
            return [str(number) for number in range(len(os.listdir("/proc/driver/nvidia/gpus")))]
        except OSError:
            return []
    devices = [name.strip() for name in visible.split(",")]
    # CUDA reads up to the first name that is none.
    ends = [place for place, name in enumerate(devices) if name in ("", "-1")]
    return devices[: ends[0]] if ends else devices


class _Screen:
    """The two streams, on which only whole lines are written."""

    def __init__(self, stdout, stderr):
        self.stdout = stdout
        self.stderr = stderr
        self._lock = threading.Lock()

    def write(self, stream, text):
        # Nobody may be reading any more. That is no reason to stop a run, nor to stop emptying its
        # pipes, for a worker whose pipe is full stands still.
        with self._lock, contextlib.suppress(OSError, ValueError, AttributeError):
            stream.write(text)
            stream.flush()

    def say(self, line):
        self.write(self.stderr, f"{line}\n")

    def copy(self, pipe, stream, prefix):
        """Writes each line of a pipe to a stream until the pipe ends."""
        with pipe:
            for line in pipe:
                text = line.decode("utf-8", "replace")
                self.write(
                    stream, f"{prefix}{text}" if text.endswith("\n") else f"{prefix}{text}\n"
                )


def _descriptor(stream):
    """Returns what `subprocess.Popen` is to give a process in place of a stream."""
    if stream is None:  # closed before Python began
        return subprocess.DEVNULL
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):
        return subprocess.PIPE
    with contextlib.suppress(OSError):
        stream.flush()  # what was said before stands before
    return descriptor


class _Worker:
    """One process, the leader of a session of its own, so that a Ctrl-C does not reach it."""

    def __init__(self, index, command, environ, cores, screen):
        self.index = index
        self.screen = screen
        self.streams = (screen.stderr,) * 2 if index else (screen.stdout, screen.stderr)
        pipes = [subprocess.PIPE] * 2 if index else [_descriptor(each) for each in self.streams]
        self.readers = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=pipes[0],
            stderr=pipes[1],
            env=environ,
            start_new_session=True,
            preexec_fn=_preparation(cores),
        )

    def read(self):
        """Starts the threads that empty the pipes."""
        prefix = f"worker {self.index}: " if self.index else ""
        pipes = (self.process.stdout, self.process.stderr)
        for pipe, stream in zip(pipes, self.streams, strict=True):
            if pipe is not None:
                arguments = (pipe, stream, prefix)
                self.readers.append(
                    threading.Thread(target=self.screen.copy, args=arguments, daemon=True)
                )
                self.readers[-1].start()

    def alive(self):
        """Returns whether the process runs; kills what it has left behind if not."""
        if self.process.returncode is None and self.process.poll() is not None:
            # Now, while no other group can have the number.
            self._signal_group(signal.SIGKILL)
        return self.process.returncode is None

    def signal(self, number):
        """Sends a signal to the process and all that it has started, if it runs."""
        if self.alive():
            self._signal_group(number)

    def _signal_group(self, number):
        # macOS answers "not permitted" for a group of which only the dead are left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def __str__(self):
        code = self.process.returncode
        if code >= 0:
            return f"worker {self.index} ended with exit status {code}"
        names = {each.value: each.name for each in signal.Signals}
        return f"worker {self.index} was killed by {names.get(-code, f'signal {-code}')}"


def _preparation(cores):
    """Returns what a new process does between fork and exec; it must need no lock.

    All workers are started before the threads that read from them: in a process that has threads,
    a fork can find a lock taken for ever.
    """
    parent = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    kill = ctypes.c_ulong(signal.SIGKILL)

    def prepare():
        if prctl:
            prctl(_PR_SET_PDEATHSIG, kill)
            if os.getppid() != parent:  # it died before
                os._exit(1)
        if cores:
            with contextlib.suppress(OSError):  # a core was taken away since
                os.sched_setaffinity(0, cores)

    return prepare


class _Crew:
    """Workers that begin together and end together; as a context, none outlives it."""

    def __init__(self, command, environments, screen, received):
        self.screen = screen
        self.received = received
        self.failed = []  # those that failed by themselves, the first one first
        self.took_others = False
        self._ending = False
        self._alive = []
        self.workers = []
        # macOS binds no process to cores.
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        try:
            for index, own in enumerate(share_cores(cores, len(environments))):
                worker = _Worker(index, command, environments[index], own, screen)
                self.workers.append(worker)
        except BaseException:
            self.__exit__()
            raise
        self._alive = list(self.workers)

    def __enter__(self):
        for worker in self.workers:
            worker.read()
        return self

    def __exit__(self, *error):
        for worker in self.workers:
            worker.signal(signal.SIGKILL)
            worker.process.wait()
        last = time.monotonic() + _DRAIN_SECONDS
        for worker in self.workers:
            for reader in worker.readers:
                reader.join(max(0, last - time.monotonic()))

    @property
    def succeeded(self):
        """Whether all workers ended with 0, by themselves."""
        return not self.failed and not self._ending

    @property
    def failure(self):
        """Which worker failed first, and how."""
        return str(self.failed[0])

    @property
    def status(self):
        """The exit status; see `run_local_workers`."""
        codes = {worker.index: worker.process.returncode for worker in self.failed}
        code = codes[0] if codes.get(0) in _FINAL else codes[self.failed[0].index]
        return code if code > 0 else 1

    @property
    def lost_one(self):
        """Whether a worker was killed or not reached; other failures would only come again."""
        lost = (w.process.returncode in (WORKER_LOST, *range(-64, 0)) for w in self.failed)
        return self.status not in _FINAL and any(lost)

    def run(self):
        """Waits until all have ended, and sees to it once one fails or a signal has come."""
        self._wait(lambda: self.failed or self.received)
        if self.failed:
            self._wait(lambda: self.received, GRACE_SECONDS)
        if self.received:
            self._stop_chief()
        self._end()

    def _wait(self, until, seconds=float("inf")):
        """Waits until all have ended, a condition holds or time is up."""
        last = time.monotonic() + seconds
        while self._look() and not until() and time.monotonic() < last:
            time.sleep(_POLL_SECONDS)

    def _look(self):
        """Notes who has ended; returns those that have not."""
        ended = [worker for worker in self._alive if not worker.alive()]
        self._alive = [worker for worker in self._alive if worker not in ended]
        if not self._ending:
            none_before = not self.failed
            self.failed += [worker for worker in ended if worker.process.returncode]
            if none_before and self.failed:
                self.took_others = len(self._alive) + len(self.failed) > 1
        return self._alive

    def _stop_chief(self):
        chief = self.workers[0]
        if chief.alive():
            # To it alone, as a terminal would not: what it has started is its own business.
            os.kill(chief.process.pid, _PASSED_ON[self.received[0]])
        self._wait(lambda: not chief.alive() or self._impatient(), STOP_SECONDS)
        if chief.alive():
            late = f"the chief had not ended after {STOP_SECONDS} s"
            why = "a second Ctrl-C" if self._impatient() else late
            self._signal(signal.SIGKILL)
            self.screen.say(f"keras-resnet: {why}; all workers were killed")

    def _impatient(self):
        return signal.SIGINT in self.received[1:]

    def _end(self):
        self._signal(signal.SIGTERM)
        self._wait(self._impatient, TERMINATE_SECONDS)
        self._signal(signal.SIGKILL)
        self._wait(lambda: False)

    def _signal(self, number):
        for worker in self._look():
            self._ending = True
            worker.signal(number)


@contextlib.contextmanager
def _noted_signals():
    """Yields a list, in which stop signals are noted in place of what they do."""
    received = []
    before = {number: signal.getsignal(number) for number in _PASSED_ON}
    # A shell starts background jobs with Ctrl-C ignored: it is not meant for them.
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            # None: not one of Python's.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
