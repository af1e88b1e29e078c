"""`keras-resnet launch`: how workers are started, what they write, and how all of them end."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import default_signals

from keras_resnet.distribution import launch as launch_module
from keras_resnet.distribution.launch import launch_workers, share_cores, share_gpus
from keras_resnet.utils.errors import InputError

pytestmark = pytest.mark.thorough

# The beginning of the workers' programs in these tests.
PREAMBLE = """
import json, os, signal, sys, time
from pathlib import Path
index = json.loads(os.environ["TF_CONFIG"]).get("task", {}).get("index", 0)

def die(number):
    os.kill(os.getpid(), number)

def wait_for(path):
    while not Path(path).exists():
        time.sleep(0.01)
"""

# Short times, where the workers have nothing to report or save.
QUICK = {"GRACE_SECONDS": 0.2, "STOP_SECONDS": 0.5, "TERMINATE_SECONDS": 0.2}


def worker(lines):
    """Returns the words that start a worker running `lines`."""
    return [sys.executable, "-c", PREAMBLE + lines]


def survivors():
    """Returns the processes below this one, zombies too."""
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
def launch(monkeypatch, capfd):
    """Runs workers from here; returns status, standard output and standard error."""
    for name, seconds in QUICK.items():
        monkeypatch.setattr(launch_module, name, seconds)
    monkeypatch.delenv("TF_CONFIG", raising=False)

    def run(lines, count=2, again=None, environ=None, **options):
        for name, value in (environ or {}).items():
            monkeypatch.setenv(name, value)
        before = survivors()
        capfd.readouterr()
        if again:
            options["restart_command"] = worker(again)
        status = launch_workers(worker(lines), count, **options)
        assert not survivors() - before
        return status, *capfd.readouterr()

    return run


# Prints the environment of a worker in one line.
TELL = """
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
names = "TF_CONFIG", "CUDA_VISIBLE_DEVICES", "PYTHONUNBUFFERED"
print(json.dumps([index, cores, os.getsid(0) == os.getpid(), [os.environ.get(n) for n in names]]))
"""


def told(out, err):
    """Returns the output of `TELL` of each worker, by index."""
    lines = out.splitlines() + [line.split(": ", 1)[1] for line in err.splitlines()]
    return sorted(json.loads(line) for line in lines)


def test_each_worker_knows_its_place(launch, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    status, out, err = launch(TELL, 3)
    assert status == 0
    configs = []
    for index, (own, cores, leads, (config, _, unbuffered)) in enumerate(told(out, err)):
        assert (own, leads, unbuffered) == (index, True, "1")
        if cores is not None:
            assert set(cores) == share_cores(os.sched_getaffinity(0), 3)[index]
        configs.append(json.loads(config))
        assert configs[-1]["task"] == {"type": "worker", "index": index}
        assert configs[-1]["cluster"] == configs[0]["cluster"]
    addresses = configs[0]["cluster"]["worker"]
    assert len(addresses) == len(set(addresses)) == len(configs) == 3
    assert all(re.fullmatch(r"localhost:\d{4,5}", address) for address in addresses)


def test_a_single_worker_has_no_cluster(launch):
    status, out, err = launch(TELL, 1, environ={"TF_CONFIG": '{"task": 1}'})
    assert (status, err) == (0, "")
    [(index, cores, _, (config, _, _))] = told(out, err)
    assert (index, config) == (0, "{}")
    assert cores is None or set(cores) == os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("4,GPU-7,5", ["4", "GPU-7"]), ("3", ["-1"] * 2), ("", [""] * 2), ("-1", ["-1"] * 2)],
)
def test_gpus_are_shared(launch, visible, expected):
    _, out, err = launch(TELL, environ={"CUDA_VISIBLE_DEVICES": visible})
    assert [variables[1] for *_, variables in told(out, err)] == expected


@pytest.mark.parametrize("cores", [{3}, {0, 1}, {2, 3, 5, 7, 8}, set(range(64))])
@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_shares_are_even_and_whole(cores, count):
    shares = share_cores(cores, count)
    sizes = [len(share) for share in shares]
    assert len(shares) == count and min(sizes) >= 1 and max(sizes) - min(sizes) <= 1
    assert set().union(*shares) <= cores
    if count <= len(cores):
        # In order, and each core once.
        assert [core for share in shares for core in sorted(share)] == sorted(cores)
        names = [str(core) for core in sorted(cores)]
        gpus = [share.split(",") for share in share_gpus(names, count)]
        # As many for each, and none for two.
        assert len({len(share) for share in gpus}) == 1
        shared = [name for share in gpus for name in share]
        assert shared == (names[: len(names) // count * count] or ["-1"] * count)


def test_no_cores_known_no_cores_set():
    assert share_cores((), 2) == [set(), set()]


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "`-n` must be a whole number of at least 1, got 0"),
        (2, {"restarts": -1}, "`--restarts` must be a whole number of at least 0, got -1"),
        (2, {"environ": {"TF_CONFIG": '{\n"task": 1}'}}, 'one is set already: { "task": 1}'),
    ],
)
def test_what_cannot_be_started_is_said(launch, count, options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        launch("", count, **options)


def test_a_system_without_process_groups_is_refused(launch, monkeypatch):
    monkeypatch.delattr(os, "killpg")
    with pytest.raises(InputError, match="needs Linux or macOS"):
        launch("")


def test_a_program_that_is_not_there_leaves_nothing(launch, monkeypatch):
    # The first worker has been started when the second one cannot be.
    start = subprocess.Popen
    monkeypatch.setattr(
        launch_module.subprocess,
        "Popen",
        lambda command, **options: start(
            ["/no/such"] if "stdout" in options else command, **options
        ),
    )
    before = survivors()
    with pytest.raises(FileNotFoundError):
        launch_workers(worker("time.sleep(60)"), 2)
    assert not survivors() - before


def test_lines_carry_their_worker(launch):
    lines = """
print("to", end=" "); print("out")
# The last line of worker 1 has no end.
sys.stderr.write(f"first of {index}\\n\\nlast of {index}" + "\\n" * (not index))
"""
    status, out, err = launch(lines)
    assert (status, out) == (0, "to out\n")
    # Each stream in its order; which stream comes first is not said.
    expected = ["first of 0", "", "last of 0", "worker 1: to out"]
    expected += ["worker 1: first of 1", "worker 1: ", "worker 1: last of 1"]
    assert sorted(err.split("\n")[:-1]) == sorted(expected)
    assert err.index("first of 1") < err.index("last of 1")


def test_bytes_that_are_no_text_are_replaced(launch):
    status, out, err = launch(r"os.write(1, b'gr\xfc\xdf \xc3\xa4\n')")
    assert (status, out, err) == (0, "gr\ufffd\ufffd ä\n", "worker 1: gr\ufffd\ufffd ä\n")


def test_many_lines_block_nobody(launch):
    lines = """
for number in range(50_000 * index):
    print("out", number)
    print("err", number, file=sys.stderr)
"""
    status, out, err = launch(lines)
    assert (status, out) == (0, "")
    for stream in ("out", "err"):
        expected = [f"worker 1: {stream} {number}" for number in range(50_000)]
        assert [line for line in err.splitlines() if f" {stream} " in line] == expected
    assert err.count("\n") == 100_000


def test_a_reader_that_has_gone_stops_nobody(launch, monkeypatch):
    class Gone:
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    lines = "for number in range(20_000): print('a line that nobody will read', number)"
    assert launch_workers(worker(lines), 2) == 0


def test_what_a_worker_started_ends_with_it(launch, tmp_path):
    # It holds the pipe open, so the pipe does not end with the worker.
    lines = """
import subprocess
if index: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("left it")
"""
    began = time.monotonic()
    assert launch(lines) == (0, "left it\n", "worker 1: left it\n")
    assert time.monotonic() - began < launch_module._DRAIN_SECONDS


def test_the_others_may_take_their_time(launch, monkeypatch):
    monkeypatch.setattr(launch_module, "GRACE_SECONDS", 0)
    assert launch("if not index: time.sleep(0.7); print('report')") == (0, "report\n", "")


FOR_EVER = "time.sleep(60)"
STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


def failing(chief, other):
    """Returns lines for workers 0 and 1; 1 starts when 0 is ready, and writes before it fails."""
    return f"""
ready = Path(os.environ["READY"])
if index == 0:
    {chief.replace("time.sleep(60)", "ready.touch(); time.sleep(60)")}
else:
    wait_for(ready)
    sys.stdout.write("the last words")
    sys.stdout.flush()
    {other}
"""


@pytest.mark.parametrize("chief", [FOR_EVER, STUBBORN], ids=["ends", "ignores SIGTERM"])
@pytest.mark.parametrize(
    ("other", "status", "how"),
    [
        ("sys.exit(3)", 3, "ended with exit status 3"),
        ("sys.exit(2)", 2, "ended with exit status 2"),
        ("die(signal.SIGKILL)", 1, "was killed by SIGKILL"),
        ("die(signal.SIGSEGV)", 1, "was killed by SIGSEGV"),
    ],
)
def test_one_fails_and_all_end(launch, tmp_path, chief, other, status, how):
    began = time.monotonic()
    ready = {"READY": str(tmp_path / "ready")}
    assert launch(failing(chief, other), environ=ready) == (
        status,
        "",
        f"worker 1: the last words\nkeras-resnet: worker 1 {how}; the others were ended\n",
    )
    assert time.monotonic() - began >= launch_module.GRACE_SECONDS


# Asked to stop, a chief says 130; to be ended because another one failed is not that.
ASKED = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); time.sleep(60)"


@pytest.mark.parametrize(
    ("chief", "expected"),
    [
        (ASKED, 1),
        *(
            (f"ready.touch(); time.sleep(2); sys.exit({n})", m)
            for n, m in ((2, 2), (130, 130), (4, 1), (0, 1))
        ),
    ],
    ids=["ended", "bad input", "interrupted", "failed too", "done"],
)
def test_which_status_counts(launch, monkeypatch, tmp_path, chief, expected):
    if chief is not ASKED:
        monkeypatch.setattr(launch_module, "GRACE_SECONDS", 20)
    ready = {"READY": str(tmp_path / "ready")}
    status, _, err = launch(failing(chief, "sys.exit(1)"), environ=ready)
    assert status == expected
    # A chief that is done was not ended.
    others = "" if "sys.exit(0)" in chief else "; the others were ended"
    assert err.endswith(f"keras-resnet: worker 1 ended with exit status 1{others}\n")


def test_a_single_worker_that_fails_has_no_others(launch):
    status, _, err = launch("sys.exit(1)", 1)
    assert (status, err) == (1, "keras-resnet: worker 0 ended with exit status 1\n")


# Worker 1 notes each start, and fails until the third one; the chief waits for its success.
TRY = """
tries, done = Path(os.environ["TRIES"]), Path(os.environ["TRIES"] + ".done")
if index == 1:
    with tries.open("a") as file:
        print({word!r}, os.environ["TF_CONFIG"], file=file)
    if len(tries.read_text().splitlines()) < 3: die(signal.SIGKILL)
    done.touch()
wait_for(done)
"""


@pytest.mark.parametrize(("restarts", "expected"), [(5, 0), (2, 0), (1, 1)])
def test_restarts_until_it_works(launch, tmp_path, restarts, expected):
    tries = tmp_path / "tries"
    status, _, err = launch(
        TRY.format(word="new"),
        again=TRY.format(word="resume"),
        restarts=restarts,
        environ={"TRIES": str(tries)},
    )
    starts = [line.split(" ", 1) for line in tries.read_text().splitlines()]
    used = min(restarts, 2)
    assert [word for word, _ in starts] == ["new"] + ["resume"] * used
    assert len({config for _, config in starts}) == len(starts)  # new ports
    said = [f"restart {n} of {restarts}: worker 1 was killed by SIGKILL" for n in (1, 2)][:used]
    if expected:
        said.append("keras-resnet: worker 1 was killed by SIGKILL; the others were ended")
    assert (status, err.splitlines()) == (expected, said)


@pytest.mark.parametrize("status", [1, 2, 130])
def test_what_a_restart_cannot_mend_is_not_restarted(launch, status):
    result, _, err = launch(f"if index: time.sleep(60)\nsys.exit({status})", restarts=3)
    assert result == status
    how = f"worker 0 ended with exit status {status}"
    assert err == f"keras-resnet: {how}; the others were ended\n"


# A short form of the command line.
PARENT = """
import sys
from keras_resnet.distribution import launch
for name, seconds in {settings!r}.items():
    setattr(launch, name, seconds)
sys.exit(launch.launch_workers({command!r}, {count}, restarts=3))
"""

# The chief notes how many workers are there while it saves.
MEMBER = """
import psutil

def save(number, frame):
    time.sleep(0.3)
    workers = psutil.Process(os.getppid()).children()
    print("signal", number, "saved with", len(workers), flush=True)
    sys.exit(130)

if index == 0:
    {chief}
else:
    {other}
sys.stderr.write(f"pid {{os.getpid()}}\\n")
time.sleep(60)
"""


class Parent:
    """A process that runs three workers, and waits until each has printed its process's number."""

    def __init__(self, chief, other, settings):
        command = worker(MEMBER.format(chief=chief, other=other))
        settings = {**QUICK, "STOP_SECONDS": 20, **settings}
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c"),
                PARENT.format(settings=settings, command=command, count=3),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CONFIG": ""},
            preexec_fn=default_signals,
        )
        self.workers = []

    def wait_until_ready(self):
        # Sorted, the chief's line comes first.
        lines = sorted(self.process.stderr.readline() for _ in range(3))
        matches = [re.fullmatch(r"(|worker [12]: )pid (\d+)\n", line) for line in lines]
        assert len({match[1] for match in matches}) == 3, lines
        self.workers = [psutil.Process(int(match[2])) for match in matches]

    def end(self):
        """Returns status, standard output and standard error; asserts that no worker is left."""
        out, err = self.process.communicate(timeout=10)
        _, left = psutil.wait_procs(self.workers, timeout=3)
        assert not left
        return self.process.returncode, out, err

    def close(self):
        for each in (self.process, *self.workers):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.communicate()


@pytest.fixture
def start_parent():
    with contextlib.ExitStack() as stack:

        def start(chief, other="pass", **settings):
            parent = Parent(chief, other, settings)
            stack.callback(parent.close)
            parent.wait_until_ready()
            return parent

        yield start


@pytest.mark.parametrize("other", ["pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
@pytest.mark.parametrize(
    ("sent", "passed_on"),
    [("SIGINT", "SIGINT"), ("SIGTERM", "SIGTERM"), ("SIGHUP", "SIGTERM")],
)
def test_asked_to_stop_the_chief_saves_with_all_alive(start_parent, sent, passed_on, other):
    number = getattr(signal, passed_on).value
    parent = start_parent(f"signal.signal({number}, save)", other)
    parent.process.send_signal(getattr(signal, sent))
    assert parent.end() == (130, f"signal {number} saved with 3\n", "")


def test_sent_twice_sigterm_lets_the_chief_save(start_parent):
    # As `timeout` does.
    parent = start_parent("signal.signal(signal.SIGTERM, save)")
    for _ in range(2):
        parent.process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert parent.end() == (130, f"signal {signal.SIGTERM.value} saved with 3\n", "")


DEAF = "signal.signal(signal.SIGINT, signal.SIG_IGN)"


@pytest.mark.parametrize(
    ("signals", "settings", "why"),
    [
        (["SIGINT", "SIGINT"], {}, "a second Ctrl-C"),
        (["SIGTERM", "SIGINT"], {}, "a second Ctrl-C"),
        (["SIGINT"], {"STOP_SECONDS": 0.5}, "the chief had not ended after 0.5 s"),
    ],
)
def test_a_chief_that_does_not_stop_is_killed(start_parent, signals, settings, why):
    parent = start_parent(f"{DEAF}; {DEAF.replace('INT', 'TERM', 1)}", **settings)
    for number in signals:
        time.sleep(0.3)
        assert all(each.is_running() for each in parent.workers)
        parent.process.send_signal(getattr(signal, number))
    assert parent.end() == (130, "", f"keras-resnet: {why}; all workers were killed\n")


def test_ctrl_c_while_the_others_have_their_grace(start_parent):
    parent = start_parent("signal.signal(signal.SIGINT, save)", GRACE_SECONDS=20)
    parent.workers[1].kill()
    time.sleep(0.3)
    parent.process.send_signal(signal.SIGINT)
    # The dead one is missing, and there is no restart.
    assert parent.end() == (130, f"signal {signal.SIGINT.value} saved with 2\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of a death")
def test_killed_the_parent_leaves_no_workers(start_parent):
    parent = start_parent(f"{DEAF}; {DEAF.replace('INT', 'TERM', 1)}")
    parent.process.kill()
    assert parent.end()[0] == -signal.SIGKILL


def test_an_ignored_signal_stays_ignored(launch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        lines = "if index == 0: os.kill(os.getppid(), signal.SIGHUP); time.sleep(0.2); print('on')"
        assert launch(lines) == (0, "on\n", "")
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_are_put_back(launch):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert launch("pass")[0] == 0
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_chief_has_the_terminal():
    # A real one, whose other side is read here.
    ours, theirs = os.openpty()
    lines = "print(index, sys.stdout.isatty(), sys.stderr.isatty(), file=sys.stderr)"
    code = PARENT.format(settings=QUICK, command=worker(lines), count=2)
    with open(ours, "rb", buffering=0) as screen, open(theirs, "w") as terminal:
        environ = {**os.environ, "TF_CONFIG": ""}
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=terminal, stderr=terminal, env=environ
        )
        shown = ""
        while shown.count("\n") < 2:
            shown += screen.read(1000).decode()
    assert done.returncode == 0
    assert sorted(shown.splitlines()) == ["0 True True", "worker 1: 1 False False"]


def test_keras_and_tensorflow_stay_outside():
    code = "import sys, keras_resnet.distribution.launch; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"keras", "tensorflow", "numpy"} & set(done.stdout.split())
