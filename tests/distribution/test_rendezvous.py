"""Workers that meet over real sockets of this machine, and everything that can prevent it."""

import contextlib
import itertools
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Client
from pathlib import Path

import pytest
from conftest import default_signals
from hypothesis import given, settings
from hypothesis import strategies as st

import keras_resnet
from keras_resnet.distribution import rendezvous
from keras_resnet.distribution.cluster import Cluster
from keras_resnet.distribution.rendezvous import AUTHKEY, MAX_BYTES, meet
from keras_resnet.utils.errors import InputError, WorkerLost

pytestmark = pytest.mark.thorough

ABOUT = {"keras": "3.15.1", "epochs": 3}


@pytest.fixture
def clusters():
    """Makes the `Cluster`s of workers on ports that were free a moment ago."""
    return make_clusters


def make_clusters(size, host="localhost"):
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(socket.socket(family)) for _ in range(size)]
        for server in servers:
            server.bind(("", 0))
        workers = tuple(f"{host}:{server.getsockname()[1]}" for server in servers)
    return [Cluster(workers, index) for index in range(size)]


def port(cluster):
    return int(cluster.address.rpartition(":")[2])


def attend(cluster, about=ABOUT, timeout=5.0, make=lambda: "nothing", late=0.0):
    """Returns the result of a worker's meeting: the shared value, or the error."""
    time.sleep(late)
    try:
        with meet(cluster, about, timeout) as meeting:
            return meeting.share(make)
    except Exception as error:
        return error


def all_attend(clusters, **options):
    """Has workers meet, a thread each; options are the same for all, or a list."""
    each = [
        {key: value[i] if isinstance(value, list) else value for key, value in options.items()}
        for i in range(len(clusters))
    ]
    with ThreadPoolExecutor(len(clusters)) as pool:
        futures = [
            pool.submit(attend, cluster, **own) for cluster, own in zip(clusters, each, strict=True)
        ]
        return [future.result(timeout=30) for future in futures]


def check_fault(result, text):
    # A lost worker is worth a restart; a wrong configuration is not.
    assert type(result) is (WorkerLost if "went away" in text else InputError), result
    assert text in str(result) and "\n" not in str(result), result


@contextlib.contextmanager
def attending(cluster, **options):
    """Has one worker meet in a thread while the block runs; yields its future."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(attend, cluster, **options)


SCRIPT = """
import json, os, signal, sys, time
sys.path.insert(0, sys.argv[3])
from keras_resnet.distribution.cluster import parse_tf_config
from keras_resnet.distribution.rendezvous import meet
options = json.loads(sys.argv[2])
{before}
print("started", flush=True)
with meet(parse_tf_config(sys.argv[1]), **options) as meeting:
    print("met", flush=True)
    {within}
{after}
"""
ROOT = Path(keras_resnet.__file__).parents[1]


@contextlib.contextmanager
def process(cluster, within="", *, before="", after="", **options):
    """Runs a worker in a process of its own; `within` is the body of its meeting."""
    script = SCRIPT.format(before=before, within=within, after=after)
    options = {"about": ABOUT, "timeout": 20, **options}
    arguments = [json.dumps(cluster.tf_config), json.dumps(options), ROOT]
    started = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=default_signals,
    )
    try:
        assert started.stdout.readline() == "started\n"
        yield started
    finally:
        started.kill()
        started.communicate()


def connect(cluster, patience=5.0):
    """Connects to a worker's port as soon as somebody listens there."""
    end = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection(("localhost", port(cluster)), 5)
        except ConnectionRefusedError:
            assert time.monotonic() < end
            time.sleep(0.01)


def call(cluster, index, about=ABOUT):
    """Comes to the chief as a worker does; returns the connection."""
    connection = Client(("localhost", port(cluster)), authkey=AUTHKEY)
    message = {"index": index, "workers": list(cluster.workers), "about": about}
    connection.send_bytes(json.dumps(message).encode())
    return connection


def hear(connection):
    """Returns the chief's next message."""
    return json.loads(connection.recv_bytes())


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_all_get_what_the_chief_made(clusters, host):
    value = {"seed": 1, "name": "größer", "list": [1.5, None]}
    assert all_attend(clusters(3, host), make=lambda: value) == [value] * 3


def test_only_the_chief_makes_and_all_wait_for_it(clusters):
    def refuse():
        raise AssertionError("called on a worker")

    def slow():
        time.sleep(0.8)
        return 1

    # Longer than the timeout, which is for the meeting alone.
    assert all_attend(clusters(3), make=[slow, refuse, refuse], timeout=0.6) == [1, 1, 1]


def test_what_is_shared_can_be_large_and_can_be_many(clusters):
    def several(cluster):
        with meet(cluster, ABOUT, 5) as meeting:
            return [len(meeting.share(lambda i=i: "x" * 10**i)) for i in range(6)]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(several, clusters(3))) == [[10**i for i in range(6)]] * 3


@pytest.mark.parametrize("first", [0, 1])
def test_who_comes_late_is_waited_for(clusters, first):
    late = [0.0 if index == first else 0.3 for index in range(2)]
    assert all_attend(clusters(2), late=late) == ["nothing"] * 2


def test_a_cluster_of_one_needs_no_socket(clusters):
    (cluster,) = clusters(1)
    with socket.create_server(("", port(cluster))):
        assert attend(cluster, make=lambda: (1, 2)) == [1, 2]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (InputError("no such folder\nsecond"), "no such folder"),
        (KeyError("x"), "'x'"),
        (SystemExit(), "SystemExit"),
    ],
)
def test_a_chief_that_cannot_begin_says_why(clusters, error, reason):
    def fail():
        raise error

    three = clusters(3)
    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(attend, cluster) for cluster in three[1:]]
        with pytest.raises(type(error)), meet(three[0], ABOUT, 5) as meeting:
            meeting.share(fail)
        text = f"the chief ({three[0].address}) could not begin: {reason}"
        assert [str(other.result()) for other in others] == [text] * 2


@pytest.mark.parametrize("value", [{1, 2}, "x" * 2**20])
def test_what_cannot_be_shared_ends_all(clusters, value):
    chief, other = all_attend(clusters(2), make=lambda: value)
    assert isinstance(chief, (TypeError, ValueError))
    check_fault(other, "could not begin: ")


@pytest.mark.parametrize(
    ("about", "text"),
    [
        ({**ABOUT, "epochs": 4}, "was started with epochs 4, the chief with 3: start all with"),
        ({**ABOUT, "epochs": True}, "epochs True, the chief with 3"),
        ({"keras": "3.15.1"}, "epochs none, the chief with 3"),
        ({**ABOUT, "a\nb": 1}, r"'a\nb' 1, the chief with none"),
        ({**ABOUT, "keras": "3.15.0"}, "keras '3.15.0', the chief with '3.15.1'"),
    ],
)
def test_who_was_started_differently_is_named_to_all(clusters, about, text):
    three = clusters(3)
    for result in all_attend(three, about=[ABOUT, about, ABOUT], late=[0.0, 0.0, 0.1]):
        check_fault(result, three[0].name(1))
        check_fault(result, text)


def test_equal_means_equal_as_json(clusters):
    abouts = [{"a": (1, 2), "b": float("nan")}, {"b": float("nan"), "a": [1, 2]}]
    assert all_attend(clusters(2), about=abouts) == ["nothing"] * 2


def test_another_list_of_workers_is_told_on_both_sides(clusters):
    chief, other = clusters(2)
    longer = Cluster((chief.address, other.address, "elsewhere:1"), 1)
    for result in all_attend([chief, longer]):
        check_fault(result, "all need the same list in the same order")
        check_fault(result, "elsewhere:1")


@pytest.mark.parametrize("index", [0, 1])
def test_a_port_in_use_is_found_at_once(clusters, index):
    cluster = clusters(2)[index]
    with socket.create_server(("", port(cluster))):
        start = time.monotonic()
        result = attend(cluster)
    assert time.monotonic() - start < 1
    check_fault(result, f"TF_CONFIG: this worker's address {cluster.address} cannot be listened")
    check_fault(result, ": address already in use; ")


def test_the_own_port_is_kept_while_waiting(clusters):
    cluster = clusters(2)[1]
    with attending(cluster, timeout=0.6) as first:
        connect(cluster).close()
        check_fault(attend(cluster), "address already in use")
        check_fault(first.result(), "did not answer")


def test_the_second_with_an_index_does_not_disturb_the_first(clusters):
    three = clusters(3)
    with attending(three[0]) as chief:
        connect(three[0]).close()
        with call(three[0], 1) as first:
            time.sleep(0.5)
            check_fault(attend(three[1]), f"{three[0].name(1)} is there already, from 127.0.0.1")
            with attending(three[2]) as last:
                assert hear(first) == {"met": True}
                assert "value" in hear(first)
                first.send_bytes(b"{}")
                assert "go" in hear(first)
                assert last.result() == chief.result() == "nothing"


def test_a_chief_that_never_comes(clusters):
    cluster = clusters(2)[1]
    start = time.monotonic()
    result = attend(cluster, timeout=0.5)
    assert 0.5 <= time.monotonic() - start < 1.5
    check_fault(result, f"{cluster.name(0)}, the chief, did not answer within 0.5 s: connection")


def test_a_chief_whose_name_is_unknown(clusters):
    own = clusters(1)[0].address
    cluster = Cluster(("nobody.invalid:2222", own), 1)
    check_fault(attend(cluster, timeout=0.3), "its name cannot be resolved")


NOT_THE_CHIEF = "the program that answers there is not the chief of a run"


def frame(content):
    """Returns a message as `multiprocessing.connection` sends it."""
    return struct.pack("!i", len(content)) + content


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", NOT_THE_CHIEF),
        (b"[]\n", NOT_THE_CHIEF),
        (b"x" * (2**20 + 2), NOT_THE_CHIEF),
        (frame(b"220 mail.example.com"), NOT_THE_CHIEF),
        (frame(b"#CHALLENGE#" + b"x" * 20) + frame(b"#FAILURE#"), NOT_THE_CHIEF),
        (b"", "the connection was closed"),
        (None, "it accepts the connection and sends nothing"),
    ],
    ids=["http", "short", "long", "mail", "other key", "closed", "silent"],
)
def test_something_else_on_the_chiefs_port(clusters, answer, text):
    chief, other = clusters(2)
    with (
        socket.create_server(("", port(chief))) as server,
        attending(other, timeout=0.25) as result,
    ):
        # A silent one is called once, the others again and again.
        server.settimeout(0.05)
        while not result.done():
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection:
                    if answer is None:
                        result.exception()
                    else:
                        connection.sendall(answer)
                        connection.shutdown(socket.SHUT_WR)
                        connection.recv(2**16)
        check_fault(result.result(), text)


def test_who_does_not_come_is_named_to_those_who_did(clusters):
    three = clusters(3)
    for result in all_attend(three[:2], timeout=0.6):
        name = three[0].name(2)
        check_fault(result, f"{name} did not come within 0.6 s: start it, or correct TF_CONFIG")


def test_of_many_missing_five_are_named(clusters):
    workers = (clusters(1)[0].address, *(f"node{i}:1" for i in range(1, 19)))
    result = attend(Cluster(workers, 0), timeout=0.1)
    check_fault(result, "worker 1 (node1:1), worker 2 (node2:1), ")
    check_fault(result, "worker 5 (node5:1) and 13 more did not come within 0.1 s")


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_must_be_positive(clusters, timeout):
    check_fault(attend(clusters(2)[0], timeout=timeout), "must be over 0 s, got")


def test_a_worker_killed_before_all_have_met(clusters):
    three = clusters(3)
    with process(three[1]) as killed, attending(three[0], timeout=20) as chief:
        # Its own port is open, and a moment later the chief has heard of it.
        connect(three[1]).close()
        time.sleep(0.3)
        killed.send_signal(signal.SIGKILL)
        start = time.monotonic()
        assert three[0].name(1) + " went away" in str(chief.result())
        # The chief waits a second more for workers that come late.
        assert time.monotonic() - start < 2


def test_a_worker_killed_while_the_chief_makes(clusters):
    three = clusters(3)
    with process(three[1], "time.sleep(60)") as killed, attending(three[2]) as other:

        def make():
            assert killed.stdout.readline() == "met\n"
            killed.send_signal(signal.SIGKILL)

        for result in (attend(three[0], make=make), other.result()):
            check_fault(result, three[0].name(1) + " went away before training began")


def test_a_worker_that_falls_silent_ends_the_wait(clusters):
    two = clusters(2)
    with attending(two[0], timeout=2, make=lambda: "x" * 10**6) as chief:
        connect(two[0]).close()
        with call(two[0], 1):
            check_fault(chief.result(), two[0].name(1) + " gave no answer for 2 s")


@pytest.mark.parametrize("size", [2, 3], ids=["in share", "in meet"])
def test_a_chief_killed(clusters, size):
    some = clusters(size)
    with process(some[0], "time.sleep(60)") as chief, attending(some[1], timeout=20) as result:
        if size == 2:
            assert chief.stdout.readline() == "met\n"
        time.sleep(0.3)
        chief.send_signal(signal.SIGKILL)
        start = time.monotonic()
        check_fault(result.result(), f"{some[0].name(0)}, the chief, went away before")
        assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("index", "code"),
    [(0, ""), (1, ""), (1, "meeting.share(None)")],
    ids=["chief waits", "worker waits", "worker waits in share"],
)
def test_ctrl_c_ends_the_wait(clusters, index, code):
    two = clusters(2)
    with process(two[index], code) as waiting, contextlib.ExitStack() as stack:
        if code:
            stack.enter_context(meet(two[0], ABOUT, 5))
            assert waiting.stdout.readline() == "met\n"
        time.sleep(0.3)
        waiting.send_signal(signal.SIGINT)
        _, errors = waiting.communicate(timeout=3)
        assert "KeyboardInterrupt" in errors


def test_an_exception_in_the_block_closes_everything(clusters):
    two = clusters(2)
    before = os.listdir("/proc/self/fd")
    with attending(two[1]) as other:
        with pytest.raises(ZeroDivisionError), meet(two[0], ABOUT, 5):
            raise ZeroDivisionError
        check_fault(other.result(), "the chief, went away")
    assert os.listdir("/proc/self/fd") == before


def test_a_failed_meeting_closes_everything(clusters):
    before = os.listdir("/proc/self/fd")
    all_attend(clusters(2), about=[ABOUT, {}])
    attend(clusters(2)[0], timeout=0.05)
    attend(clusters(2)[1], timeout=0.05)
    assert os.listdir("/proc/self/fd") == before


def test_closing_twice_is_closing(clusters):
    two = clusters(2)
    with attending(two[1]), meet(two[0], ABOUT, 5) as meeting:
        meeting.share(lambda: 1)
        meeting.close()


def test_the_ports_are_free_at_once_after_the_meeting(clusters):
    for _ in range(20):
        three = clusters(3)
        assert all_attend(three) == ["nothing"] * 3
        for cluster in three:
            socket.create_server(("", port(cluster))).close()


def test_tensorflows_server_takes_the_chiefs_port_after_the_meeting(clusters):
    after = """
import tensorflow as tf
spec = json.loads(sys.argv[1])
server = tf.distribute.Server(spec["cluster"], "worker", spec["task"]["index"], "grpc")
print(server.target, flush=True)
os._exit(0)
"""
    two = clusters(2)
    with process(two[0], "meeting.share(lambda: 1)", after=after) as chief:
        assert attend(two[1]) == 1
        output, errors = chief.communicate(timeout=60)
        assert f"grpc://{two[0].address}" in output, errors


STRAY = {
    "scanner": b"",
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "grpc": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "wrong digest": frame(b"x" * 16),
    "empty": frame(b""),
    "long": struct.pack("!i", 2**30) + b"x" * 2**20,
    "very long": struct.pack("!iQ", -1, 2**60),
    "negative": struct.pack("!i", -7),
    "half": frame(b"x" * 16)[:9],
}

# Messages of programs that have the key and are no workers.
NO_WORKER = {
    "empty": b"{}",
    "number": b"7",
    "no utf-8": b"\xff",
    "nested": b"[" * 10**5,
    "types": b'{"index": "1", "workers": [], "about": {}}',
    "long": b"x" * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("silent", [False, True], ids=["gone", "staying"])
def test_stray_connections_are_ignored(clusters, silent):
    two = clusters(2)
    with attending(two[0]) as chief, contextlib.ExitStack() as stack:
        for content in STRAY.values():
            stray = stack.enter_context(connect(two[0]))
            with contextlib.suppress(ConnectionError):
                stray.sendall(content)
            if not silent:
                # The connection ends with a reset, not in good order.
                stray.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stray.close()
        assert attend(two[1]) == chief.result() == "nothing"


def is_closed(connection):
    """Returns whether the chief closes a connection without a message."""
    try:
        connection.recv_bytes()
    except (EOFError, ConnectionError):
        return True
    return False


def test_messages_of_no_worker_are_ignored(clusters):
    two = clusters(2)
    with attending(two[0]) as chief:
        connect(two[0]).close()
        for content in NO_WORKER.values():
            with Client(("localhost", port(two[0])), authkey=AUTHKEY) as connection:
                with contextlib.suppress(ConnectionError):
                    connection.send_bytes(content)
                assert is_closed(connection)
        assert attend(two[1]) == chief.result() == "nothing"


@pytest.mark.parametrize("index", [-1, 0, 2, 10**30])
def test_an_index_that_no_worker_has_is_ignored(clusters, index):
    two = clusters(2)
    with attending(two[0]) as chief:
        connect(two[0]).close()
        with call(two[0], index) as connection:
            assert is_closed(connection)
        assert attend(two[1]) == chief.result() == "nothing"


def test_many_silent_connections_do_not_keep_the_workers_out(clusters):
    two = clusters(2)
    with attending(two[0]) as chief, contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(connect(two[0]))
        assert attend(two[1]) == chief.result() == "nothing"


def test_a_silent_connection_is_closed(clusters, monkeypatch):
    monkeypatch.setattr(rendezvous, "_HANDSHAKE", 0.3)
    two = clusters(2)
    with attending(two[0]) as chief:
        with connect(two[0]) as stray:
            while stray.recv(100):
                pass
        assert not chief.done()
        assert attend(two[1]) == chief.result() == "nothing"


@settings(max_examples=60, deadline=None)
@given(
    chunks=st.lists(
        st.lists(
            st.one_of(
                st.binary(max_size=40),
                st.binary(max_size=40).map(frame),
                st.sampled_from([b"#CHALLENGE#", b"#WELCOME#", *STRAY.values()]),
            ),
            max_size=6,
        ).map(b"".join),
        max_size=4,
    )
)
def test_no_bytes_can_stop_the_meeting(chunks):
    two = make_clusters(2)
    with attending(two[0]) as chief, connect(two[0]) as stray:
        with contextlib.suppress(ConnectionError):
            for chunk in chunks:
                stray.sendall(chunk)
        assert attend(two[1]) == chief.result() == "nothing"


@pytest.fixture
def many_files():
    """Raises the limit of open files to the needs of a chief and 1,000 workers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("the system allows fewer than 4,096 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_thousand_workers_meet(clusters, many_files):
    own = clusters(1)[0].address
    chief = Cluster((own, *(f"node{i}:1" for i in range(1, 1000))), 0)
    value = "x" * 10**4
    with (
        attending(chief, make=lambda: value, timeout=60) as result,
        contextlib.ExitStack() as stack,
    ):
        connect(chief).close()
        indices = range(1, chief.size)
        workers = [stack.enter_context(call(chief, index)) for index in indices]
        for key in ("met", "value", "go"):
            for worker in workers:
                assert key in hear(worker)
                if key == "value":
                    worker.send_bytes(b"{}")
        assert result.result() == value


def test_too_few_open_files_are_named(clusters):
    own = clusters(1)[0].address
    chief = Cluster((own, *(f"node{i}:1" for i in range(1, 100))), 0)
    code = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))"
    with process(chief, before=code) as waiting, contextlib.ExitStack() as stack:
        # Workers call again for as long as they are not heard.
        connect(chief).close()
        with contextlib.suppress(ConnectionError, EOFError):
            for index in itertools.cycle(range(1, chief.size)):
                stack.enter_context(call(chief, index))
        _, errors = waiting.communicate(timeout=10)
        assert "to each of 99 workers: too many open files; allow more open files" in errors
