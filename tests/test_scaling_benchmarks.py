"""benchmarks/scaling.py, run on a tiny network, and the predictions of scaling_model.py."""

import doctest
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import default_signals
from PIL import Image

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ("--filters", 16, 32, "--image-size", 16, "--batch-size", 8, "--steps", 3)

two_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="needs Linux and two cores",
)


def command(script, *arguments):
    return [sys.executable, str(BENCHMARKS / script), *map(str, arguments)]


def run(script, *arguments):
    return subprocess.run(
        command(script, *arguments), capture_output=True, text=True, timeout=240, check=False
    )


@pytest.fixture
def run_model(capsys):
    """Returns a function that runs scaling_model.py in this process."""

    def run(*arguments):
        status = 0
        try:
            model.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # raised by argparse
            status = stop.code
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


def load_model():
    spec = importlib.util.spec_from_file_location("scaling_model", BENCHMARKS / "scaling_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


model = load_model()
SLOW, FAST = model.Link(1e9, 1e-3), model.Link(1e11, 1e-6)
BYTES = 5e7


# ----------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------


def test_doctests():
    results = doctest.testmod(model)
    assert results.attempted > 5
    assert not results.failed


@pytest.mark.parametrize("algorithm", model.ALGORITHMS)
@pytest.mark.parametrize("node", [1, 4])
def test_one_worker_needs_no_communication(algorithm, node):
    assert model.ALGORITHMS[algorithm](1, BYTES, SLOW, node, FAST) == 0


@pytest.mark.parametrize("workers", [2, 8, 1000])
def test_ring_is_bandwidth_optimal(workers):
    """Each worker sends and receives 2 (p - 1)/p of the tensor, never twice of it."""
    seconds = model.ring_seconds(workers, BYTES, model.Link(1e9, 0), 1)
    assert seconds == pytest.approx(2 * (workers - 1) / workers * BYTES / 1e9)


def test_ring_of_nothing_costs_its_latencies():
    assert model.ring_seconds(1024, 0, SLOW, 1) == pytest.approx(2 * 1023 * SLOW.latency)


@pytest.mark.parametrize("workers", model.WORKERS)
def test_hierarchical_with_one_worker_a_node_is_a_ring(workers):
    assert model.hierarchical_seconds(workers, BYTES, SLOW, 1, FAST) == pytest.approx(
        model.ring_seconds(workers, BYTES, SLOW, 1, FAST)
    )


def test_hierarchical_inside_one_node_is_a_ring_of_the_inner_link():
    inside = model.hierarchical_seconds(8, BYTES, SLOW, 8, FAST)
    assert inside == pytest.approx(model.ring_seconds(8, BYTES, FAST, 1))


def test_hierarchical_pays_the_slow_latency_once_a_node():
    link, inner = model.Link(1e30, 1.0), model.Link(1e30, 0.0)
    assert model.hierarchical_seconds(1024, BYTES, link, 8, inner) == pytest.approx(2 * 127)
    assert model.ring_seconds(1024, BYTES, link, 8, inner) == pytest.approx(2 * 1023)


@pytest.mark.parametrize("communication", [0.001, 0.3, 7.0])
def test_smallest_batch_reaches_the_goal_and_one_less_does_not(communication):
    compute = model.Compute(fixed=0.02, image=0.01)

    def efficiency(batch):
        return compute.seconds(batch) / (compute.seconds(batch) + communication)

    batch = model.smallest_batch(compute, communication)
    assert efficiency(batch) >= model.GOAL - 1e-9
    assert batch == 1 or efficiency(batch - 1) < model.GOAL


def test_fit_of_more_than_two_points():
    compute = model.fit_compute([(8, 0.13), (16, 0.21), (32, 0.37)])
    assert compute == pytest.approx((0.05, 0.01))


def test_fit_has_no_negative_time():
    compute = model.fit_compute([(32, 0.9), (64, 2.0)])
    assert compute.fixed == 0
    assert 0.9 / 32 < compute.image < 2.0 / 64


def test_predictions_are_the_sum_of_computation_and_communication():
    compute = model.Compute(0.01, 0.001)
    rows = model.predict(compute, BYTES, {"slow": SLOW, "fast": FAST}, 64)
    assert len(rows) == 2 * len(model.ALGORITHMS) * len(model.WORKERS)
    for row in rows:
        link = {"slow": SLOW, "fast": FAST}[row["link"]]
        reduce = model.ALGORITHMS[row["algorithm"]](row["workers"], BYTES, link)
        assert row["ms"] == pytest.approx(1000 * (0.01 + 0.064 + reduce))
        assert row["efficiency"] == pytest.approx(0.074 / (0.074 + reduce))
        strong = 0.01 + 1.024 / row["workers"] + reduce
        assert row["images/s"] == pytest.approx(1024 / strong)


# ----------------------------------------------------------------------------------------------
# Its command line
# ----------------------------------------------------------------------------------------------

RESULTS = {
    "settings": {"batch_size": 64, "precision": "float32"},
    "gradient_bytes": 44_000_000,
    "step_seconds": {"one": 0.8, "apart": 0.9, "weak": 1.1, "apart_half": 0.5, "strong": 0.7},
    "all_reduce": {"seconds": 0.202, "bandwidth": 220e6, "latency": 0.001},
}


@pytest.fixture
def measured(tmp_path):
    """A function that writes a file like those of scaling.py, with changes; returns its path."""

    def measured(**changes):
        path = tmp_path / "scaling.json"
        path.write_text(json.dumps({**RESULTS, **changes}))
        return path

    return measured


def test_tables_and_plot(measured, tmp_path, run_model):
    done = run_model(measured(), "--plot", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("computation: 100.0 ms + 12.50 ms an image; gradients 44.0 MB")
    # Apart 900 ms, 2 · 1 ms of latencies, 44 MB at 220 MB/s.
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["weak", "64", "1102.0", "1100.0", "+0.2%"] in lines
    assert ["strong", "32", "702.0", "700.0", "+0.3%"] in lines
    rows = [line for line in lines if line[1:2] == ["Gbit/s"]]
    assert len(rows) == 3 * 2 * 8
    (row,) = (row for row in rows if row[:4] == ["10", "Gbit/s", "ring", "1024"])
    # 2 · (1023/1024 · 44 MB · 8 / 10 Gbit/s + 1023 · 50 µs) beyond the 0.9 s.
    assert float(row[4]) == pytest.approx(900 + 70.3 + 102.3, abs=0.2)
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**20)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "scaling.json"]


def test_numbers_instead_of_a_file(run_model):
    steps = ("--step", "32:0.8", "--step", "64:1.5", "--bytes", "44e6", "--bandwidth", 10)
    done = run_model(*steps)
    assert done.returncode == 0, done.stderr
    assert "check" not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    (row,) = (line for line in lines if line[:4] == ["10", "Gbit/s", "ring", "16"])
    # 2 · 15 · (50 µs + 44 MB / 16 · 8 / 10 Gbit/s).
    assert float(row[4]) == pytest.approx(1500 + 67.5, abs=0.1)


BAD = {
    "nothing given": ((), "give the file"),
    "no such file": (("missing.json",), "missing.json: must be a file that scaling.py wrote"),
    "both": (("{file}", "--bytes", "3"), "give the file"),
    "one batch size": (("--step", "8:1", "--step", "8:2", "--bytes", "3"), "two batch sizes"),
    "faster with more": (("--step", "8:2", "--step", "16:1", "--bytes", "3"), "must take longer"),
    "no pair": (("--step", "8", "--bytes", "3"), "BATCH:SECONDS"),
    "no number": (("{file}", "--bandwidth", "fast"), "invalid float value: 'fast'"),
    "no folder": (("{file}", "--plot", "missing/plot.png"), "missing"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_an_error(measured, arguments, message, run_model):
    done = run_model(*(word.format(file=measured()) for word in arguments))
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"step_seconds": {}},
        {"all_reduce": None},
        {"gradient_bytes": "many"},
        {"gradient_bytes": 0},
        {"all_reduce": {"bandwidth": -1, "latency": 1}},
    ],
    ids=str,
)
def test_bad_file_is_one_line(measured, changes, run_model):
    done = run_model(measured(**changes))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "scaling.json" in done.stderr


# ----------------------------------------------------------------------------------------------
# The measurement
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """The output and the results of one real run."""
    path = tmp_path_factory.mktemp("scaling") / "scaling.json"
    done = run("scaling.py", *TINY, "--rounds", 3, "--out", path)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


@pytest.mark.slow
@two_cores
def test_doctests_of_the_measurement():
    """In a process of its own: the script hides GPUs from the process that imports it."""
    words = [sys.executable, "-m", "doctest", str(BENCHMARKS / "scaling.py")]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@two_cores
def test_measures_every_turn(benchmark):
    printed, found = benchmark
    settings = {"image_size": 16, "batch_size": 8, "steps": 3, "filters": [16, 32]}
    assert settings.items() <= found["settings"].items()
    turns = {"one", "apart", "weak", "apart_half", "strong"}
    assert set(found["step_seconds"]) == set(found["images_per_second"]) == turns
    assert [set(each) for each in found["rounds"]] == [turns | {"all_reduce", "message"}] * 3
    assert all(0 < value < 60 for each in found["rounds"] for value in each.values())
    for turn in turns:
        assert any(line.startswith(turn) for line in printed.splitlines()), turn
    assert found["versions"]["tensorflow"]


@pytest.mark.slow
@two_cores
def test_the_model_reads_the_results(benchmark, tmp_path):
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps(benchmark[1]))
    batch, found = model.read_results(path)
    assert batch == 8
    assert "strong" in model.format_check(found, batch)


@pytest.mark.slow
@two_cores
def test_gradient_bytes_are_those_of_the_network(benchmark):
    from keras_resnet import Spec, build_resnet

    network = build_resnet(Spec((1, 1), (16, 32)), (16, 16, 1))
    found = benchmark[1]
    assert found["gradients"] == len(network.trainable_variables)
    sizes = [variable.value.numpy().nbytes for variable in network.trainable_variables]
    assert found["gradient_bytes"] == sum(sizes)


@pytest.mark.slow
@two_cores
def test_results_follow_from_the_rounds(benchmark):
    found = benchmark[1]
    rounds, images = found["rounds"], found["images_per_second"]

    def ratio(above, below):
        return statistics.median(each[above] / each[below] for each in rounds)

    for turn, batch in {"one": 8, "apart": 16, "weak": 16, "apart_half": 8, "strong": 8}.items():
        seconds = statistics.median(each[turn] for each in rounds)
        assert images[turn] == pytest.approx(batch / seconds)
    assert found["weak_efficiency"] == pytest.approx(ratio("one", "weak"))
    assert found["strong_speedup"] == pytest.approx(ratio("one", "strong"))
    assert found["all_reduce"]["share_weak"] == pytest.approx(ratio("all_reduce", "weak"))
    assert found["all_reduce"]["share_strong"] == pytest.approx(ratio("all_reduce", "strong"))


@pytest.mark.slow
@two_cores
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_leaves_no_process_behind(number, status):
    with subprocess.Popen(
        command("scaling.py", *TINY), stderr=subprocess.DEVNULL, preexec_fn=default_signals
    ) as process:
        children = wait_for_children(process.pid, 4)
        process.send_signal(number)
        assert process.wait(timeout=30) == status
    assert psutil.wait_procs(children, timeout=10)[1] == []


def wait_for_children(pid, count):
    for _ in itertools.repeat(None, 600):
        children = psutil.Process(pid).children()
        if len([child for child in children if "spawn_main" in " ".join(child.cmdline())]) == count:
            return children
        time.sleep(0.1)
    raise AssertionError(f"{count} workers did not come")


@pytest.mark.slow
@two_cores
def test_scaling_refuses_at_the_start():
    done = run("scaling.py", "--batch-size", 7)
    assert done.returncode == 2
    assert done.stderr.endswith("`--batch-size` must be even, to be halved, got 7\n")
    assert "Traceback" not in done.stderr
