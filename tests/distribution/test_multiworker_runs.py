"""`keras-resnet train` on several workers: real processes, killed, stopped and misconfigured."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
from conftest import command, default_signals, run_command, run_main, write_tiny

from keras_resnet.archive import load_model, read_metadata
from keras_resnet.evaluation.report import read_history

pytestmark = pytest.mark.thorough

ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}


def arguments(folder, run_dir, *more, epochs=3):
    return [
        *("train", "--model", "tiny", "--dataset", f"folder:{folder}", "--run-dir", str(run_dir)),
        *("--image-size", 28, "--batch-size", 32, "--epochs", epochs, "--precision", "float32"),
        *("--recipe", "quick"),
        *more,
    ]


def launched(words, *more, count=2):
    """Returns the words that launch workers of a command on this machine."""
    return ["launch", "-n", count, *more, "--", *words]


@pytest.fixture
def started(tmp_path):
    """Returns a function that starts the command line; its processes are killed at the end."""
    processes = []

    def start(*words, **environment):
        errors = open(tmp_path / f"stderr{len(processes)}.txt", "w+")  # noqa: SIM115
        process = subprocess.Popen(
            command(*words),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, **ENVIRONMENT, **environment},
            preexec_fn=default_signals,
        )
        processes.append((process, errors))
        return process

    yield start
    for process, errors in processes:
        process.kill()
        process.wait()
        process.stdout.close()
        errors.close()


def wait_for(process, prefix):
    for line in process.stdout:
        if line.startswith(prefix):
            return
    raise AssertionError(f"no line {prefix!r}")


def workers_of(process):
    """Returns the workers of a launcher, in their order."""
    found = {}
    for child in psutil.Process(process.pid).children():
        found[json.loads(child.environ()["TF_CONFIG"])["task"]["index"]] = child
    return [found[index] for index in sorted(found)]


def read_errors(tmp_path, number=0):
    return (tmp_path / f"stderr{number}.txt").read_text()


def check_finished(run_dir, trained_run):
    """Holds a run of two workers to the unbroken one of a single process."""
    # The files of a run of one process and no others: the chief alone writes.
    ours, theirs = (
        {re.sub("tfevents.*", "", p.relative_to(run).as_posix()) for p in run.rglob("*")}
        for run in (run_dir, trained_run)
    )
    assert ours == theirs - {"stdout.txt"}
    config = json.loads((run_dir / "config.json").read_text())
    assert (config["strategy"], config["replicas"]) == ("multiworker", 2)
    assert config["command"].startswith("keras-resnet launch -n 2 ")
    assert " -- train --model tiny" in config["command"]
    # The artifact knows nothing of workers.
    assert load_model(run_dir / "model.keras").count_params() > 0
    history, unbroken = (read_history(path / "history.csv") for path in (run_dir, trained_run))
    assert [row["epoch"] for row in history] == [1, 2, 3]
    for ours, theirs in zip(history, unbroken, strict=True):
        assert ours["learning_rate"] == pytest.approx(theirs["learning_rate"], abs=1e-9)
        # BatchNormalization takes its statistics over half the images.
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.2)
    accuracy, expected = (
        json.loads((path / "report.json").read_text())["accuracy"]
        for path in (run_dir, trained_run)
    )
    # 100 images: an image is a point.
    assert accuracy == pytest.approx(expected, abs=0.1)


@pytest.mark.slow
def test_two_workers_train_the_network_of_one_process(fashion_folder, tmp_path, trained_run):
    run_dir = tmp_path / "run"
    done = run_command(*launched(arguments(fashion_folder, run_dir)))
    assert done.returncode == 0, done.stderr
    assert "strategy: multiworker (TF_CONFIG, worker 0 (localhost:" in done.stdout
    epochs = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3  # the chief's alone
    assert "worker 1: epoch" not in done.stderr
    check_finished(run_dir, trained_run)


@pytest.mark.slow
@pytest.mark.parametrize(("classes", "head_epochs"), [(4, 0), (12, 1)])
def test_two_workers_agree_about_the_epochs_of_a_new_head(
    fashion_folder, tmp_path, classes, head_epochs
):
    source, run_dir = tmp_path / "tiny.safetensors", tmp_path / "run"
    write_tiny(source, classes)
    more = ("--recipe", "photos", "--weights", source)
    done = run_command(*launched(arguments(fashion_folder, run_dir, *more, epochs=2)))
    assert done.returncode == 0, done.stderr
    config = json.loads((run_dir / "config.json").read_text())
    assert config["recipe"]["head_epochs"] == head_epochs
    assert len(read_history(run_dir / "history.csv")) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "number"), [(0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_worker_ends_the_run_and_the_same_command_resumes(
    victim, number, fashion_folder, tmp_path, trained_run, started
):
    run_dir = tmp_path / "run"
    words = launched(arguments(fashion_folder, run_dir, "--resume", "auto"))
    process = started(*words)
    wait_for(process, "epoch 1/3")
    time.sleep(0.2)  # into the second epoch
    workers = workers_of(process)
    # One that is stopped is a machine that has vanished: its connections stay open.
    workers[victim].send_signal(number)
    began = time.monotonic()
    # 1: the worker that was killed; 75: the one that lost it.
    assert process.wait(timeout=100) in (1, 75)
    seconds = time.monotonic() - began
    print(f"{number.name} of worker {victim}: ended after {seconds:.1f} s")
    assert seconds < 60
    assert not any(worker.is_running() for worker in workers)
    stderr = read_errors(tmp_path)
    assert re.search(rf"worker {victim} \(localhost:\d+\) is gone, or cannot be reached", stderr)
    assert re.search(r"[12] of 3 epochs are finished", stderr)
    assert "Traceback" not in stderr

    again = run_command(*words)
    assert again.returncode == 0, again.stderr
    assert re.search("resumed after epoch [12]", again.stdout)
    check_finished(run_dir, trained_run)


def test_restarts_do_that_by_themselves(fashion_folder, tmp_path, trained_run, started):
    run_dir = tmp_path / "run"
    process = started(*launched(arguments(fashion_folder, run_dir), "--restarts", 1))
    wait_for(process, "epoch 1/3")
    workers_of(process)[1].kill()
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 0, read_errors(tmp_path)
    assert "resumed after epoch" in rest
    stderr = read_errors(tmp_path)
    assert "restart 1 of 1: worker 1 was killed by SIGKILL" in stderr
    assert "worker 1: epoch" not in stderr  # the chief alone tells how far it is
    assert re.search(r"worker 1 \(localhost:\d+\) is gone, or cannot be reached", stderr)
    assert re.search(r"[12] of 3 epochs are finished", stderr) and "Traceback" not in stderr
    check_finished(run_dir, trained_run)


@pytest.mark.slow
def test_ctrl_c_saves_and_leaves_no_worker(fashion_folder, tmp_path, started):
    run_dir = tmp_path / "run"
    process = started(*launched(arguments(fashion_folder, run_dir, epochs=1000)))
    wait_for(process, "epoch 1/1000")
    workers = workers_of(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert not any(worker.is_running() for worker in workers)
    stderr = read_errors(tmp_path)
    assert "interrupted" in stderr and f"--resume --run-dir {run_dir}" in stderr
    assert "Traceback" not in stderr
    load_model(run_dir / "checkpoints" / "interrupted.keras")
    assert len(read_history(run_dir / "history.csv")) >= 1


@pytest.mark.slow
def test_a_second_run_into_a_folder_is_refused(fashion_folder, tmp_path, started):
    run_dir = tmp_path / "run"
    process = started(*arguments(fashion_folder, run_dir, epochs=1000))
    wait_for(process, "epoch 1/1000")
    second = run_main("train", "--resume", "--run-dir", run_dir)
    assert second.returncode == 2
    assert f"{run_dir}: another run is writing to it" in second.stderr
    assert process.poll() is None  # the first goes on
    process.terminate()
    assert process.wait(timeout=60) == 130
    metadata = read_metadata(run_dir / "checkpoints" / "last.keras")
    assert all(np.isfinite(row["loss"]) for row in metadata["history"])


# ----------------------------------------------------------------------------------------------
# A wrong TF_CONFIG
# ----------------------------------------------------------------------------------------------


def free_address():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def tf_config(workers, **task):
    return json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", **task}})


FAULTS = {
    "bad JSON": (lambda: '{"cluster": ', "TF_CONFIG"),
    "no index": (lambda: tf_config([free_address(), free_address()]), "index"),
    "index too large": (lambda: tf_config([free_address(), free_address()], index=2), "index"),
    "nobody comes": (lambda: tf_config([free_address(), free_address()], index=0), "worker 1 (loc"),
    "no chief": (lambda: tf_config([free_address(), free_address()], index=1), "worker 0 (loc"),
}


def check_refused(done, run_dir, reason):
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("keras-resnet: ") and reason in line
    assert not run_dir.exists()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_tf_config_is_one_line(fault, fashion_folder, tmp_path, monkeypatch):
    make, reason = FAULTS[fault]
    run_dir = tmp_path / "run"
    monkeypatch.setenv("TF_CONFIG", make())
    words = arguments(fashion_folder, run_dir, "--worker-timeout", 2)
    check_refused(run_main(*words), run_dir, reason)


def test_a_port_in_use_is_named(fashion_folder, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        address = f"localhost:{taken.getsockname()[1]}"
        monkeypatch.setenv("TF_CONFIG", tf_config([address, free_address()], index=0))
        done = run_main(*arguments(fashion_folder, run_dir))
    check_refused(done, run_dir, address)


@pytest.mark.slow
def test_workers_of_different_commands_are_told_apart(fashion_folder, tmp_path, started):
    addresses = [free_address(), free_address()]
    for index, epochs in enumerate((3, 4)):
        words = arguments(fashion_folder, tmp_path / "run", "--worker-timeout", 60, epochs=epochs)
        started(*words, TF_CONFIG=tf_config(addresses, index=index))
    deadline = time.monotonic() + 60
    for index in (0, 1):
        while "epochs" not in read_errors(tmp_path, index):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert re.search(r"epochs.*4.*3", read_errors(tmp_path, index))
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_fault_that_only_the_chief_finds_ends_all(fashion_folder, tmp_path):
    words = arguments(fashion_folder, tmp_path / "run", "--variant", "v9")
    done = run_command(*launched(words))
    assert done.returncode == 2
    assert "keras-resnet: `variant` must be one of" in done.stderr
    assert re.search(r"worker 1: keras-resnet: the chief .* could not begin", done.stderr)
    assert not (tmp_path / "run").exists()


def test_restarts_never_go_on_with_a_folder_that_is_not_theirs(fashion_folder, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "notes.txt").write_text("mine")
    done = run_main(*launched(arguments(fashion_folder, run_dir), "--restarts", 1))
    assert done.returncode == 2
    assert f"keras-resnet: {run_dir}: the folder is not empty" in done.stderr
    assert "worker 1" not in done.stderr  # none was started
    assert [path.name for path in run_dir.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_loss_that_is_no_number_is_not_started_again(fashion_folder, tmp_path):
    words = arguments(fashion_folder, tmp_path / "run", "--learning-rate", 1e38)
    done = run_command(*launched(words, "--restarts", 2))
    assert done.returncode == 1 and "the loss became" in done.stderr
    assert "restart" not in done.stderr


@pytest.mark.slow
def test_data_that_one_worker_cannot_load_end_all(fashion_folder, tmp_path, started):
    addresses = [free_address(), free_address()]
    for index, place in enumerate((fashion_folder, tmp_path / "nowhere")):
        words = arguments(place, tmp_path / "run", "--data-dir", str(place))
        words[words.index("--dataset") + 1] = "fashion_mnist"
        if index == 0:
            words[words.index("--data-dir") + 1] = "/usr/share/datasets/fashion-mnist"
        started(*words, TF_CONFIG=tf_config(addresses, index=index))
    deadline = time.monotonic() + 60
    for index, reason in enumerate(("worker 1 (localhost:", "nowhere")):
        while reason not in read_errors(tmp_path, index):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert "Traceback" not in read_errors(tmp_path, index)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("launch", "-n", 2, "--restart", 1, "--", "train"), "unrecognized arguments: --restart"),
        (("launch", "-n", 2, "--", "train", "--epoch", 1), "unrecognized arguments: --epoch"),
        (("launch", "-n", 2, "keras-resnet", "train", "--x"), "unrecognized arguments: --x"),
        (("launch", "-n", 2, "--", "train", "--restarts", 1), "unrecognized arguments: --restarts"),
        (("train", "--restarts", 1), "unrecognized arguments: --restarts"),
        (("launch", "--", "train"), "arguments are required: -n"),
        (("launch", "-n", 2, "--"), "`launch` needs a command, got none"),
        (("launch", "-n", 2, "--", "no-such-program"), "no-such-program: No such file"),
    ],
)
def test_wrong_options_are_named_before_a_worker_starts(words, reason):
    done = run_main(*words)
    assert done.returncode == 2 and reason in done.stderr


@pytest.mark.parametrize(("count", "strategy"), [(1, "multiworker"), (2, "mirrored"), (2, "none")])
def test_a_strategy_that_the_number_of_workers_contradicts(
    count, strategy, fashion_folder, tmp_path
):
    words = arguments(fashion_folder, tmp_path / "run", "--strategy", strategy)
    done = run_main(*launched(words, count=count))
    check_refused(done, tmp_path / "run", f"`launch -n {count}` trains under ")
    assert f"got --strategy {strategy}: leave it out" in done.stderr


def test_resume_needs_the_folder_under_a_launcher_too():
    done = run_command("launch", "-n", 1, "--", "train", "--resume")
    assert done.returncode == 2 and "`resume` needs the `run_dir`" in done.stderr


SCRIPT = """
import json, os, sys
index = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
print("worker", index, sys.argv[1:])
sys.exit(3 * index)
"""


@pytest.mark.parametrize("dashes", [["--"], []])
def test_any_program_can_be_launched(dashes, tmp_path):
    script = tmp_path / "my_train.py"
    script.write_text(SCRIPT)
    words = (sys.executable, script, "--epochs", "3", "--", "a b")
    done = run_command("launch", "-n", 2, *dashes, *words)
    assert done.returncode == 3
    assert done.stdout == "worker 0 ['--epochs', '3', '--', 'a b']\n"
    assert "worker 1: worker 1 ['--epochs', '3', '--', 'a b']\n" in done.stderr
    assert done.stderr.endswith("keras-resnet: worker 1 ended with exit status 3\n")
