"""The workers of a run meet before TensorFlow's server starts.

TensorFlow blocks forever if a worker does not come, and trains a wrong network if two workers were
started differently. So all workers first connect to the chief, on the address that TensorFlow's
server will take afterwards, and exchange JSON messages over `multiprocessing.connection`:

    worker -> chief   {"index": …, "workers": …, "about": …}
    chief -> worker   {"met": true}
    chief -> worker   {"value": …}, which the worker answers with {}
    chief -> worker   {"go": true}, once all workers have the value

Instead of any of its messages the chief may send {"error": message, "lost": true or false}, which
the worker raises. The authentication key is public: it rejects port scanners and other programs,
not attackers. Like TensorFlow's own server, the rendezvous needs a trusted network.
"""

import contextlib
import errno
import json
import os
import queue
import reprlib
import socket
import struct
import threading
import time
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge, wait

from keras_resnet.config import WORKER_TIMEOUT
from keras_resnet.distribution.cluster import split_address
from keras_resnet.utils.errors import InputError, WorkerLost, one_line

AUTHKEY = b"keras_resnet rendezvous 2"
MAX_BYTES = 2**20
"""The size of the largest message."""

# Seconds.
_HANDSHAKE = 5.0  # for a connection to be made and authenticated
_TICK = 0.1  # between two checks for workers that have been authenticated
_LATE = 1.0  # how long a chief that has failed still sends the error to workers that come late
_MARGIN = 5.0  # how much longer than the chief the other workers wait
_FIRST_PAUSE, _LAST_PAUSE = 0.02, 1.0  # between two calls of the chief

_MAX_NAMES = 5
_GONE = "went away before training began"
_LOOK = "see its own output"

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80


def meet(cluster, about, timeout=WORKER_TIMEOUT):
    """Waits until all workers have come with the same description, and returns the `Meeting`.

    Every worker listens on its own port until the meeting is closed, so a port in use is found at
    once.

    Args:
        cluster: The `Cluster`. A single worker has nothing to wait for.
        about: The values that must be equal on all workers, a dict for JSON.
        timeout: How long to wait, in seconds; the same on all workers.

    Returns:
        A `Meeting`, a context manager that closes itself.

    Raises:
        WorkerLost: If a worker goes away.
        InputError: If the own port is in use, a worker does not come or was started differently.
            All workers that have come raise the same error.

    Example:
        >>> from keras_resnet.distribution.cluster import Cluster
        >>> with meet(Cluster(("localhost:2222",), 0), {"epochs": 3}) as meeting:
        ...     meeting.share(lambda: {"seed": 1})
        {'seed': 1}
    """
    if not timeout > 0:
        raise InputError(f"the workers' timeout must be over 0 s, got {timeout!r}")
    meeting = (_ChiefMeeting if cluster.is_chief else _WorkerMeeting)(cluster, timeout)
    try:
        if cluster.size > 1:
            meeting.meet(json.loads(json.dumps(about)))
    except BaseException:
        meeting.close()
        raise
    return meeting


class Meeting:
    """All workers of a run, connected to the chief; `meet` makes it."""

    def __init__(self, cluster, timeout):
        self.cluster, self.timeout = cluster, timeout
        self.deadline = time.monotonic() + timeout
        self.listener = _listen(cluster) if cluster.size > 1 else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def share(self, make):
        """Returns the chief's result of `make()` on every worker.

        The other workers wait for as long as `make` takes, and fail if the chief ends.

        Args:
            make: A function without arguments, called on the chief only. Its result must fit into
                1 MiB of JSON; every worker gets it as JSON returns it.

        Raises:
            InputError: On the other workers, if `make` raised an error on the chief, which raises
                that error itself. On all, if a worker does not call `share` within the timeout of
                `meet`.
            WorkerLost: On all, if a worker has gone away.
        """
        raise NotImplementedError

    def close(self):
        """Closes all sockets, so that TensorFlow's server can take the port."""
        if self.listener is not None:
            self.listener.close()


class _ChiefMeeting(Meeting):
    """The chief's side. A connection is authenticated in a thread, where it cannot block others."""

    def __init__(self, cluster, timeout):
        super().__init__(cluster, timeout)
        self.workers = {}  # index -> connection
        self.rejected = []  # connections of workers with another list of workers
        self.pending = {}  # connection -> the thread that authenticates it
        self.arrivals = queue.SimpleQueue()  # (connection, the worker's message or None)
        self.error = None

    def meet(self, about):
        others = range(1, self.cluster.size)
        while not self.workers.keys() >= set(others) and time.monotonic() < self.deadline:
            for source in wait([self.listener, *self.workers.values()], _TICK):
                if source is self.listener:
                    self._accept()
                else:  # a worker sends nothing before all are connected
                    self._lose(source)
            while not self.arrivals.empty():
                self._admit(*self.arrivals.get(), about)
        missing = [index for index in others if index not in self.workers]
        if missing:
            self._fail(
                f"{_names(self.cluster, missing)} did not come within {self.timeout:g} s: start "
                f"{'it' if len(missing) == 1 else 'them'}, or correct TF_CONFIG"
            )
        self._send({"met": True})

    def share(self, make):
        try:
            text = json.dumps(make())
            if len(text) > MAX_BYTES - 100:
                raise InputError(f"the shared value must fit into 1 MiB, got {len(text)} bytes")
        except BaseException as error:
            self._fail(f"the chief ({self.cluster.address}) could not begin: {one_line(error)}")
            with contextlib.suppress(InputError, WorkerLost):
                self._send(None)
            raise
        value = json.loads(text)
        self._send({"value": value})
        self._await_answers()
        self._send({"go": True})
        return value

    def close(self):
        super().close()
        for connection, thread in self.pending.items():
            _shut_down(connection)
            thread.join()
        for connection in (*self.workers.values(), *self.rejected, *self.pending):
            connection.close()
        self.workers, self.rejected, self.pending = {}, [], {}

    def _accept(self):
        try:
            accepted, address = self.listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE) and not self.pending:
                raise InputError(
                    f"the chief cannot open a connection to each of {self.cluster.size - 1} "
                    f"workers: {_reason(error)}; allow more open files (ulimit -n)"
                ) from error
            time.sleep(_TICK)  # until a pending connection is closed
            return
        connection = _make_connection(accepted, _HANDSHAKE)
        connection.origin = address[0].removeprefix("::ffff:")
        thread = threading.Thread(target=self._authenticate, args=(connection,), daemon=True)
        self.pending[connection] = thread
        thread.start()

    def _authenticate(self, connection):
        try:
            deliver_challenge(connection, AUTHKEY)
            answer_challenge(connection, AUTHKEY)
            message = json.loads(connection.recv_bytes(MAX_BYTES))
        except Exception:  # connections of other programs are closed
            message = None
        self.arrivals.put((connection, message))

    def _admit(self, connection, message, about):
        """Takes a worker in, or rejects a connection."""
        del self.pending[connection]
        message = message if isinstance(message, dict) else {}
        kinds = [type(message.get(key)) for key in ("index", "workers", "about")]
        if kinds != [int, list, dict]:
            connection.close()
            return
        index, workers = message["index"], list(self.cluster.workers)
        if message["workers"] != workers:
            self.rejected.append(connection)
            self._fail(
                f"worker {index} at {connection.origin} was given the workers "
                f"{_shortened.repr(message['workers'])}, the chief {_shortened.repr(workers)}: all "
                "need the same list in the same order"
            )
        elif index in self.workers:
            error = InputError(
                f"{self.cluster.name(index)} is there already, from {self.workers[index].origin}, "
                f"and another process at {connection.origin} has the same index: give each its own"
            )
            _send(connection, error)
            connection.close()
        elif not 1 <= index < self.cluster.size:
            connection.close()
        else:
            self.workers[index] = connection
            difference = _difference(message["about"], about)
            if difference:
                self._fail(
                    f"{self.cluster.name(index)} was started with {difference}: start all with the "
                    "same command and versions"
                )

    def _await_answers(self):
        waiting = set(self.workers.values())
        deadline = time.monotonic() + self.timeout
        while waiting and not self.error:
            ready = wait(list(self.workers.values()), max(0, deadline - time.monotonic()))
            for connection in ready:
                try:
                    connection.recv_bytes(MAX_BYTES)
                    waiting.discard(connection)
                except (EOFError, OSError):
                    self._lose(connection)
            if not ready:
                silent = [i for i, connection in self.workers.items() if connection in waiting]
                self._fail(
                    f"{_names(self.cluster, silent)} gave no answer for {self.timeout:g} s: {_LOOK}"
                )

    def _lose(self, connection):
        index = next(i for i, each in self.workers.items() if each is connection)
        self.workers.pop(index).close()
        self._fail(f"{self.cluster.name(index)} {_GONE}: {_LOOK}", WorkerLost)

    def _fail(self, text, kind=InputError):
        """Records the first error, and waits `_LATE` seconds at most for workers to send it to."""
        if self.error is None:
            self.error = kind(text)
            self.deadline = min(self.deadline, time.monotonic() + _LATE)

    def _send(self, message):
        """Sends a message to all workers. If there is an error, it sends that, and raises it."""
        for connection in (*self.workers.values(), *self.rejected):
            _send(connection, self.error or message)
        if self.error:
            raise self.error


class _WorkerMeeting(Meeting):
    """The side of another worker: it calls the chief until it answers, then follows it."""

    def __init__(self, cluster, timeout):
        super().__init__(cluster, timeout)
        self.chief = None

    def meet(self, about):
        workers = list(self.cluster.workers)
        message = {"index": self.cluster.index, "workers": workers, "about": about}
        pause = _FIRST_PAUSE
        while self.chief is None:
            try:
                self.chief = self._call()
            # Python before 3.12 raises an AssertionError if another program answers.
            except (OSError, EOFError, AuthenticationError, AssertionError) as error:
                left = self.deadline - time.monotonic()
                # A call that the deadline cuts short would find no reason.
                time.sleep(max(0, left if left < 2 * pause else pause))
                if left < 2 * pause:
                    raise InputError(
                        f"{self.cluster.name(0)}, the chief, did not answer within "
                        f"{self.timeout:g} s: {_reason(error)}; start it, or correct TF_CONFIG"
                    ) from error
                pause = min(2 * pause, _LAST_PAUSE)
        _send(self.chief, message)
        # From now on the chief waits for `timeout` seconds at most.
        self._receive("met", self.timeout + _MARGIN)

    def share(self, make):
        value = self._receive("value")
        _send(self.chief, {})
        self._receive("go")
        return value

    def close(self):
        super().close()
        if self.chief is not None:
            self.chief.close()

    def _call(self):
        seconds = max(0.1, min(self.deadline - time.monotonic(), _HANDSHAKE))
        called = socket.create_connection(split_address(self.cluster.workers[0]), seconds)
        # Linux can connect a socket to itself, if the chief's port is in the ephemeral range.
        if called.getsockname() == called.getpeername():
            called.close()
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        connection = _make_connection(called, seconds)
        try:
            answer_challenge(connection, AUTHKEY)
            deliver_challenge(connection, AUTHKEY)
        except BaseException:
            connection.close()
            raise
        return connection

    def _receive(self, key, seconds=None):
        """Returns the value of the chief's next message, or raises the error in it."""
        try:
            if not self.chief.poll(seconds):
                raise TimeoutError(errno.ETIMEDOUT, "it has stopped sending")
            message = json.loads(self.chief.recv_bytes(MAX_BYTES))
        except (OSError, EOFError) as error:
            raise WorkerLost(
                f"{self.cluster.name(0)}, the chief, {_GONE}: {_reason(error)}; {_LOOK}"
            ) from error
        if "error" in message:
            raise (WorkerLost if message["lost"] else InputError)(message["error"])
        return message[key]


def _listen(cluster):
    """Returns a socket that listens on the worker's own port, on all interfaces."""
    port = split_address(cluster.address)[1]
    families = [socket.AF_INET6] * socket.has_dualstack_ipv6() + [socket.AF_INET]
    for family in families:
        dual = family == socket.AF_INET6
        try:
            server = socket.create_server(
                ("", port), family=family, backlog=cluster.size + 256, dualstack_ipv6=dual
            )
            server.setblocking(False)  # a connection can be gone before it is accepted
            return server
        except OSError as error:
            if dual and error.errno in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):  # no IPv6
                continue
            raise InputError(
                f"TF_CONFIG: this worker's address {cluster.address} cannot be listened on: "
                f"{_reason(error)}; end the process that has the port, or correct TF_CONFIG"
            ) from error
    return None


def _make_connection(connected, seconds):
    """Returns a socket as a `Connection` on which a message may stall for `seconds` at most."""
    connected.settimeout(None)
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
    # The system reports within a minute that the other machine has vanished.
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}.items():
        if hasattr(socket, name):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(connected.detach())


def _shut_down(connection):
    """Ends a thread's read from the connection, which `close` would not."""
    connected = socket.socket(fileno=connection.fileno())
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
    connected.detach()


def _send(connection, message):
    """Sends a message or an error. A lost receiver is detected when it should answer."""
    if isinstance(message, Exception):
        message = {"error": str(message), "lost": isinstance(message, WorkerLost)}
    with contextlib.suppress(OSError):
        connection.send_bytes(json.dumps(message).encode())


def _difference(theirs, ours):
    """Returns "epochs 4, the chief with 3" for the first key that differs, or None."""
    for key in sorted(theirs.keys() | ours.keys()):
        values = [[about[key]] if key in about else [] for about in (theirs, ours)]
        # As text: 1 and true differ, and NaN is equal to itself.
        if json.dumps(values[0], sort_keys=True) != json.dumps(values[1], sort_keys=True):
            worker, chief = (_shortened.repr(*value) if value else "none" for value in values)
            name = key if key.isidentifier() else _shortened.repr(key)
            return f"{name} {worker}, the chief with {chief}"
    return None


def _names(cluster, indices):
    names = [cluster.name(index) for index in indices[:_MAX_NAMES]]
    more = len(indices) - len(names)
    return ", ".join(names) + f" and {more} more" * bool(more)


def _reason(error):
    """Returns the reason of a failed connection, for the middle of a sentence."""
    if isinstance(error, socket.gaierror):
        return f"its name cannot be resolved ({error.strerror})"
    if isinstance(error, EOFError):
        return "the connection was closed"
    if isinstance(error, BlockingIOError):
        return "it accepts the connection and sends nothing"
    if isinstance(error, TimeoutError) or getattr(error, "strerror", None):
        # `create_server` appends the address, which the message has already.
        text = (error.strerror or str(error)).partition(" (while ")[0]
        return text[:1].lower() + text[1:]
    return "the program that answers there is not the chief of a run"
