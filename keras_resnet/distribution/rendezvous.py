"""The workers of a run meet before TensorFlow's server starts.

TensorFlow blocks for ever if a worker never comes, and trains nonsense if two workers were started
differently. So the workers meet first, over plain TCP, on the chief's own address: TensorFlow's
server takes the port when the meeting is closed. It is a star around the chief, of JSON lines:

    worker -> chief   keras_resnet meeting 1 {"index": …, "workers": …, "about": …}
    chief -> worker   {"heard": seconds that the chief will wait for the others}
    chief -> worker   {"met": true}, which the worker answers with {}
    chief -> worker   {"value": …}, which the worker answers with {}
    chief -> worker   {"go": true}, once all have the value

In place of any of its lines the chief may send {"fault": message}, with which the worker ends. The
meeting keeps out strangers and accidents, not attackers: like TensorFlow's own server, it belongs
into a network that one trusts.
"""

import contextlib
import errno
import json
import os
import reprlib
import selectors
import socket
import time

from keras_resnet.distribution.cluster import split_address
from keras_resnet.utils.errors import InputError, WorkerLost, one_line

_MAGIC = b"keras_resnet meeting 1 "
_MAX_LINE = 2**20
# Connections that have not said who they are: beyond this the oldest is closed.
_MOST_STRANGERS = 64
_MOST_NAMED = 5

# Seconds. Python sees Ctrl-C only between two waits on some systems.
_TICK = 0.5
# How long a chief that must give up still tells those who come just then.
_FAREWELL = 1.0
# How much longer than the chief the others wait for its word.
_MARGIN = 5.0
_CONNECT = 5.0
_FIRST_PAUSE, _LAST_PAUSE = 0.02, 1.0

_NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)
_LOOK = "see its own output"
_GONE = "went away before training began"
_SAME = "start all with the same command and versions"

_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 80


def meet(cluster, about, timeout=300.0):
    """Waits until all workers have come and say the same, and returns the `Meeting`.

    The own port is checked at once, and kept until the meeting is closed.

    Args:
        cluster: The `Cluster`. With a single worker there is nothing to wait for.
        about: What must be equal on all workers, a dict that JSON can hold.
        timeout: How long to wait, in seconds; the same on all workers.

    Returns:
        A `Meeting`, a context manager that closes itself.

    Raises:
        WorkerLost: If a worker goes away.
        InputError: If the own port is taken, a worker does not come, or was started
            differently. All workers that are there raise the same.

    Example:
        >>> from keras_resnet.distribution.cluster import Cluster
        >>> with meet(Cluster(("localhost:2222",), 0, "TF_CONFIG"), {"epochs": 3}) as meeting:
        ...     meeting.share(lambda: {"seed": 1})
        {'seed': 1}
    """
    if not timeout > 0:
        raise InputError(f"the workers' timeout must be over 0 s, got {timeout!r}")
    if cluster.size == 1:
        return Meeting(None)
    side = (_Chief if cluster.is_chief else _Guest)(cluster, timeout)
    meeting = Meeting(side)
    try:
        side.meet(json.loads(json.dumps(about)))
    except BaseException:
        meeting.close()
        raise
    return meeting


class Meeting:
    """All workers of a run, connected with the chief; `meet` makes it."""

    def __init__(self, side):
        self._side = side

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def share(self, make):
        """Returns what `make()` returned on the chief, on every worker.

        The others wait for as long as `make` takes, and end if the chief ends.

        Args:
            make: A function without arguments, called on the chief only. It returns what JSON can
                hold in 1 MiB; what comes back has been through JSON everywhere.

        Raises:
            InputError: On the others, if `make` raised anything on the chief, where it goes on.
                On all, if a worker does not come to its own `share` within the timeout of `meet`.
            WorkerLost: On all, if a worker has gone away.
        """
        if self._side is None:
            return json.loads(json.dumps(make()))
        return self._side.share(make)

    def close(self):
        """Closes all sockets; TensorFlow's server can take the port now."""
        if self._side is not None:
            self._side.close()


class _Foreign(ConnectionError):
    """What came over a connection is none of ours."""

    def __init__(self):
        super().__init__(errno.EPROTO, "what answers there is not the chief of a run")


class _Wire:
    """One connection: whole lines out of what was received, and what is still to be sent."""

    def __init__(self, connection, origin=""):
        self.socket, self.origin = connection, origin
        self.inbox, self.outbox = bytearray(), bytearray()
        self.index = None  # which worker it is, once it has said so
        self.owes = False  # whether it has still to answer
        with contextlib.suppress(OSError):
            _watch_over(connection)

    def receive(self):
        """Returns the lines that have come; raises `OSError` if the other side is gone."""
        chunk = self.socket.recv(2**16)
        if not chunk:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        self.inbox += chunk
        # Looked for in the chunk alone, so that a long line costs no more than its length.
        if b"\n" not in chunk and len(self.inbox) <= _MAX_LINE:
            return []
        *lines, self.inbox = self.inbox.split(b"\n")
        if max(map(len, [*lines, self.inbox])) > _MAX_LINE:
            raise ConnectionAbortedError(errno.ECONNABORTED, "a line of over 1 MiB came")
        return lines

    def flush(self):
        """Sends what the system takes without waiting."""
        with contextlib.suppress(BlockingIOError):
            while self.outbox:
                del self.outbox[: self.socket.send(self.outbox)]


class _Chief:
    """Worker 0: listens, and serves all others in one thread."""

    def __init__(self, cluster, timeout):
        self.cluster, self.timeout = cluster, timeout
        self.guests = {}  # index -> _Wire
        self.strangers = {}  # _Wire -> None, in the order of their coming
        self.seen = set()  # who has come, whether still there or not
        self.about = self.fault = None
        self.parting = False  # whether who goes away has all that there was to have
        self.deadline = time.monotonic() + timeout
        self.listener = _listen(cluster)
        self.listener.setblocking(False)
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.listener, selectors.EVENT_READ)

    def meet(self, about):
        self.about = about
        while len(self.seen) < self.cluster.size - 1:
            left = self.deadline - time.monotonic()
            if left <= 0:
                self._fail(_missing(self.cluster, self.seen, self.timeout))
                break
            self._turn(left)
        self._tell({"met": True}, answered=True)

    def share(self, make):
        try:
            value = json.dumps(make())
            if len(value) > _MAX_LINE - 100:
                raise InputError(f"what the chief shares must fit into 1 MiB, got {len(value)} B")
        except BaseException as error:
            chief = self.cluster.workers[0]
            self._fail(f"the chief ({chief}) could not begin: {one_line(error)}")
            raise
        value = json.loads(value)
        self._tell({"value": value}, answered=True)
        self.parting = True
        self._tell({"go": True})
        return value

    def close(self):
        for wire in (*self.guests.values(), *self.strangers):
            wire.socket.close()
        self.guests, self.strangers = {}, {}
        self.selector.close()
        self.listener.close()

    def _tell(self, message, answered=False):
        """Sends a message to all, and waits until all have taken, or answered, it."""
        line = _encode(message)
        deadline = time.monotonic() + self.timeout
        for wire in self.guests.values():
            wire.outbox += line
            wire.owes = answered
            self._push(wire)
        while waiting := [i for i, wire in self.guests.items() if wire.outbox or wire.owes]:
            left = deadline - time.monotonic()
            if left <= 0:
                silent = _names(self.cluster, waiting)
                self._fail(f"{silent} gave no answer for {self.timeout:g} s: {_LOOK}")
            self._turn(left)
        if self.fault:
            raise _error(self.fault)

    def _turn(self, seconds):
        """Waits a while for something to come, and deals with it."""
        for key, _ in self.selector.select(max(0, min(seconds, _TICK))):
            wire = key.data
            if wire is None:
                self._accept()
            elif wire in self.strangers or self.guests.get(wire.index) is wire:
                # The others were closed in this very turn.
                self._serve(wire)

    def _serve(self, wire):
        try:
            lines = wire.receive()
            wire.flush()
            self._watch(wire)
        except BlockingIOError:
            self._push(wire)
            return
        except OSError:
            self._drop(wire)
            if wire.index is not None and not self.parting:
                name = self.cluster.name(wire.index)
                self._fail(f"{name} {_GONE}: {_LOOK}")
            return
        if wire.index is not None:
            wire.owes = wire.owes and not lines
        elif lines:
            self._greet(wire, lines[0])
        elif not _MAGIC.startswith(wire.inbox[: len(_MAGIC)]):
            self._drop(wire)

    def _greet(self, wire, line):
        """Takes in a worker that has said who it is, or dismisses who is wrong here."""
        hello = _parse_hello(line)
        index = hello and hello["index"]
        if hello is None:
            self._drop(wire)
        elif hello["workers"] != list(self.cluster.workers):
            self._fail(self._other_workers(wire, hello))
            self._dismiss(wire, self.fault)
        elif not 1 <= index < self.cluster.size:
            self._drop(wire)
        elif index in self.guests:
            self._dismiss(wire, self._second(wire, index))
        else:
            self._take_in(wire, index, hello["about"])

    def _take_in(self, wire, index, about):
        self.seen.add(index)
        difference = _difference(about, self.about)
        if difference:
            self._fail(f"{self.cluster.name(index)} was started with {difference}: {_SAME}")
        if self.fault:
            self._dismiss(wire, self.fault)
            return
        del self.strangers[wire]
        self.guests[index] = wire
        wire.index = index
        wire.outbox += _encode({"heard": max(0, self.deadline - time.monotonic())})
        self._push(wire)

    def _other_workers(self, wire, hello):
        return (
            f"worker {hello['index']} at {wire.origin} was given the workers "
            f"{_shown(hello['workers'])}, the chief {_shown(list(self.cluster.workers))}: all "
            "need the same list in the same order"
        )

    def _second(self, wire, index):
        return (
            f"{self.cluster.name(index)} is there already, from {self.guests[index].origin}, and "
            f"another process at {wire.origin} has the same index: give each its own"
        )

    def _fail(self, fault):
        """Tells all that are there why the run cannot begin; who comes a little later, too."""
        if self.fault:
            return
        self.fault = fault
        self.deadline = min(self.deadline, time.monotonic() + _FAREWELL)
        for wire in list(self.guests.values()):
            self._dismiss(wire, fault)

    def _dismiss(self, wire, fault):
        wire.outbox += _encode({"fault": fault})
        with contextlib.suppress(OSError):
            wire.flush()
        self._drop(wire)

    def _drop(self, wire):
        self.selector.unregister(wire.socket)
        wire.socket.close()
        self.strangers.pop(wire, None)
        if self.guests.get(wire.index) is wire:
            del self.guests[wire.index]

    def _push(self, wire):
        # Whoever is gone is found when it is next read from.
        with contextlib.suppress(OSError):
            wire.flush()
        self._watch(wire)

    def _watch(self, wire):
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wire.outbox else 0)
        self.selector.modify(wire.socket, events, wire)

    def _accept(self):
        try:
            connection, origin = self.listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                self._make_room(error)
            return
        connection.setblocking(False)
        wire = _Wire(connection, origin[0].removeprefix("::ffff:"))
        self.strangers[wire] = None
        self.selector.register(connection, selectors.EVENT_READ, wire)
        if len(self.strangers) > _MOST_STRANGERS:
            self._drop(next(iter(self.strangers)))

    def _make_room(self, error):
        if not self.strangers:
            raise InputError(
                f"the chief cannot open a connection to each of {self.cluster.size - 1} workers: "
                f"{_reason(error)}; allow more open files (ulimit -n)"
            ) from error
        self._drop(next(iter(self.strangers)))


class _Guest:
    """Any other worker: calls the chief until it answers, then does as it says."""

    def __init__(self, cluster, timeout):
        self.cluster, self.timeout = cluster, timeout
        self.wire, self.lines = None, []
        self.deadline = time.monotonic() + timeout
        # Nobody else gets the port while this worker waits; nobody is answered on it.
        self.listener = _listen(cluster)

    def meet(self, about):
        workers = list(self.cluster.workers)
        hello = {"index": self.cluster.index, "workers": workers, "about": about}
        wait = self._join(_MAGIC + _encode(hello))
        self._expect("met", time.monotonic() + wait + _MARGIN)
        self._answer()

    def share(self, make):
        value = self._expect("value")
        self._answer()
        self._expect("go")
        return value

    def close(self):
        self._hang_up()
        self.listener.close()

    def _join(self, hello):
        """Returns how long the chief will wait for the others, in seconds, once it has heard."""
        pause = _FIRST_PAUSE
        while True:
            try:
                return self._call(hello)
            except OSError as error:
                reason = _reason(error)
            self._hang_up()
            left = self.deadline - time.monotonic()
            # A call that the deadline cuts short would say nothing of what is wrong.
            time.sleep(max(0, left if left < 2 * pause else pause))
            if left < 2 * pause:
                raise InputError(
                    f"{self.cluster.name(0)}, the chief, did not answer within "
                    f"{self.timeout:g} s: {reason}; start it, or {_correct(self.cluster)}"
                )
            pause = min(2 * pause, _LAST_PAUSE)

    def _call(self, hello):
        left = self.deadline - time.monotonic()
        address = split_address(self.cluster.workers[0])
        connection = socket.create_connection(address, max(0.1, min(left, _CONNECT)))
        self.wire, self.lines = _Wire(connection), []
        # Linux can connect a socket with itself, if it gave it the very port that it calls.
        if connection.getsockname() == connection.getpeername():
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        connection.sendall(hello)
        wait = self._await("heard", self.deadline)
        if not isinstance(wait, (int, float)):
            raise _Foreign
        return wait

    def _await(self, key, deadline=None):
        """Returns what the chief's next message holds; raises what a fault in its place says."""
        while not self.lines:
            left = _TICK if deadline is None else deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(errno.ETIMEDOUT, "it takes the connection and says nothing")
            self.wire.socket.settimeout(min(left, _TICK))
            try:
                self.lines += self.wire.receive()
            except TimeoutError as error:
                # With a number it is the system that has given the connection up.
                if error.errno is not None:
                    raise
        message = _decode(self.lines.pop(0))
        if "fault" in message:
            raise _error(one_line(message["fault"]))
        if key not in message:
            raise _Foreign
        return message[key]

    def _expect(self, key, deadline=None):
        try:
            return self._await(key, deadline)
        except OSError as error:
            raise _error(
                f"{self.cluster.name(0)}, the chief, {_GONE}: {_reason(error)}; {_LOOK}"
            ) from error

    def _answer(self):
        # A chief that is gone may have said why: that is found when it is next listened to.
        with contextlib.suppress(OSError):
            self.wire.socket.settimeout(_CONNECT)
            self.wire.socket.sendall(_encode({}))

    def _hang_up(self):
        if self.wire is not None:
            self.wire.socket.close()
        self.wire = None


def _error(fault):
    """Returns the error of a fault: a worker that is lost may be started again, the rest not."""
    return (WorkerLost if _GONE in fault else InputError)(fault)


def _listen(cluster):
    """Returns a socket that listens on the worker's own port, on all interfaces."""
    port = split_address(cluster.address)[1]
    families = [socket.AF_INET6] * socket.has_dualstack_ipv6() + [socket.AF_INET]
    for family in families:
        dual = family == socket.AF_INET6
        try:
            return socket.create_server(
                ("", port), family=family, backlog=cluster.size + 256, dualstack_ipv6=dual
            )
        except OSError as error:
            if dual and error.errno in _NO_IPV6:
                continue
            raise InputError(
                f"{cluster.source}: this worker's address {cluster.address} cannot be listened "
                f"on: {_reason(error)}; end the process that has the port, or "
                f"{_correct(cluster)}"
            ) from error
    return None


def _watch_over(connection):
    """Has the system find out within a minute if the other machine is gone without a word."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _encode(message):
    return json.dumps(message).encode() + b"\n"


def _decode(line):
    """Returns a line as a dict; raises `_Foreign` if it is none."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        raise _Foreign from None
    if not isinstance(message, dict):
        raise _Foreign
    return message


def _parse_hello(line):
    """Returns what a worker says of itself, or None if it is no worker."""
    if not line.startswith(_MAGIC):
        return None
    try:
        hello = _decode(line[len(_MAGIC) :])
    except _Foreign:
        return None
    kinds = {"index": int, "workers": list, "about": dict}
    return hello if all(type(hello.get(key)) is kind for key, kind in kinds.items()) else None


def _difference(theirs, ours):
    """Returns "epochs 4, the chief with 3" for the first key that differs, or None."""
    for key in sorted(theirs.keys() | ours.keys()):
        values = [[about[key]] if key in about else [] for about in (theirs, ours)]
        # As text: 1 and true differ, and NaN is equal to itself.
        if json.dumps(values[0], sort_keys=True) != json.dumps(values[1], sort_keys=True):
            worker, chief = (_shown(value[0]) if value else "none" for value in values)
            return f"{key if key.isidentifier() else _shown(key)} {worker}, the chief with {chief}"
    return None


def _missing(cluster, seen, timeout):
    missing = [index for index in range(1, cluster.size) if index not in seen]
    advice = f"start {'it' if len(missing) == 1 else 'them'}, or {_correct(cluster)}"
    return f"{_names(cluster, missing)} did not come within {timeout:g} s: {advice}"


def _names(cluster, indices):
    names = [cluster.name(index) for index in indices[:_MOST_NAMED]]
    more = len(indices) - len(names)
    return ", ".join(names) + f" and {more} more" * bool(more)


def _correct(cluster):
    return "start the step anew" if cluster.source == "Slurm" else f"correct {cluster.source}"


def _shown(value):
    return _shortened.repr(value)


def _reason(error):
    """Returns what an `OSError` says, in the middle of a sentence."""
    if isinstance(error, socket.gaierror):
        return f"its name cannot be resolved ({error.strerror})"
    # `create_server` puts the address behind it, which stands in our message already.
    text = (error.strerror or one_line(error)).partition(" (while ")[0]
    return text[:1].lower() + text[1:]
