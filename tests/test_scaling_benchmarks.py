"""The benchmark of several processes, run for real on a tiny network, and the model of many."""

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
        try:
            status = model.main([str(argument) for argument in arguments])
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
    assert results.attempted > 10
    assert not results.failed


def test_imports_no_tensorflow():
    code = "import sys, scaling_model; sys.exit(bool({'tensorflow', 'keras'} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, timeout=60).returncode == 0


@pytest.mark.parametrize("algorithm", model.ALGORITHMS)
@pytest.mark.parametrize("node", [1, 4])
def test_one_worker_needs_no_communication(algorithm, node):
    assert model.ALGORITHMS[algorithm](1, BYTES, model.Cluster(SLOW, node, FAST)) == 0


@pytest.mark.parametrize("workers", [2, 8, 1000])
def test_ring_is_bandwidth_optimal(workers):
    """Each worker sends and receives 2 (p - 1)/p of the tensor, never twice of it."""
    link = model.Link(1e9, 0)
    seconds = model.ring_seconds(workers, BYTES, model.Cluster(link, 1, link))
    assert seconds == pytest.approx(2 * (workers - 1) / workers * BYTES / 1e9)


def test_ring_of_nothing_costs_its_latencies():
    cluster = model.Cluster(SLOW, 1, FAST)
    assert model.ring_seconds(1024, 0, cluster) == pytest.approx(2 * 1023 * SLOW.latency)


@pytest.mark.parametrize("workers", model.WORKERS)
def test_hierarchical_with_one_worker_a_node_is_a_ring(workers):
    cluster = model.Cluster(SLOW, 1, FAST)
    assert model.hierarchical_seconds(workers, BYTES, cluster) == pytest.approx(
        model.ring_seconds(workers, BYTES, cluster)
    )


def test_hierarchical_inside_one_node_is_a_ring_of_the_inner_link():
    inside = model.hierarchical_seconds(8, BYTES, model.Cluster(SLOW, 8, FAST))
    assert inside == pytest.approx(model.ring_seconds(8, BYTES, model.Cluster(FAST, 1, SLOW)))


def test_hierarchical_pays_the_slow_latency_once_a_node():
    cluster = model.Cluster(model.Link(1e30, 1.0), 8, model.Link(1e30, 0.0))
    assert model.hierarchical_seconds(1024, BYTES, cluster) == pytest.approx(2 * 127)
    assert model.ring_seconds(1024, BYTES, cluster) == pytest.approx(2 * 1023)


def test_nodes_must_be_full():
    with pytest.raises(model.BadInput, match="nodes of 8 workers must be full, got 12"):
        model.hierarchical_seconds(12, BYTES, model.Cluster(SLOW, 8, FAST))


def test_no_more_is_hidden_than_the_backward_pass_lasts():
    assert model.step_seconds(3.0, 2.0, 1.0) == 3.0
    assert model.step_seconds(3.0, 5.0, 1.0) == pytest.approx(6.0)


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("communication", [0.001, 0.3, 7.0])
def test_smallest_batch_reaches_the_goal_and_one_less_does_not(communication, overlap):
    compute = model.Compute(fixed=0.02, image=0.01)

    def efficiency(batch):
        computing = compute.seconds(batch)
        return computing / model.step_seconds(computing, communication, overlap)

    batch = model.smallest_batch(compute, communication, overlap)
    assert efficiency(batch) >= model.GOAL - 1e-9
    assert batch == 1 or efficiency(batch - 1) < model.GOAL


def test_fit_of_more_than_two_points():
    compute = model.fit_compute([(8, 0.13), (16, 0.21), (32, 0.37)])
    assert compute == pytest.approx((0.05, 0.01))


def test_fit_has_no_negative_time():
    compute = model.fit_compute([(32, 0.9), (64, 2.0)])
    assert compute.fixed == 0
    assert 0.9 / 32 < compute.image < 2.0 / 64


def test_strong_limit_is_where_images_per_second_peak():
    """The best number of all powers of two, found here by trying every one."""
    network = model.Model(model.Compute(0.01, 0.001), BYTES)
    cluster = model.Cluster(SLOW, 1, FAST)

    def speed(workers):
        return network.images_per_second("ring", workers, 4096, cluster)

    best = max((2**power for power in range(11)), key=speed)
    assert 1 < best < 1024
    assert model.strong_limit(speed, 1024) == best


# ----------------------------------------------------------------------------------------------
# Its command line
# ----------------------------------------------------------------------------------------------

RESULT = {
    "precision": "float32",
    "gradient_bytes": 44_000_000,
    "step_seconds": {"one": 0.8, "apart": 0.9, "weak": 1.1, "apart_half": 0.5, "strong": 0.7},
    "all_reduce": {"seconds": 0.202, "bandwidth": 220e6, "latency": 0.001},
}


@pytest.fixture
def measured(tmp_path):
    """A function that writes what scaling.py would, some of it changed; returns the file."""

    def measured(**changes):
        path = tmp_path / "scaling.json"
        results = [{**RESULT, **changes}]
        path.write_text(json.dumps({"settings": {"batch_size": 64}, "results": results}))
        return path

    return measured


def test_tables_and_plot(measured, tmp_path, run_model):
    done = run_model(measured(), "--plot", tmp_path / "plot.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("computing: 100.0 ms + 12.50 ms an image; gradients 44.0 MB")
    # Apart 900 ms, 2 · 1 ms of latencies, 44 MB at 220 MB/s.
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["weak", "64", "1102.0", "1100.0", "+0.2%"] in lines
    assert ["strong", "32", "702.0", "700.0", "+0.3%"] in lines
    rows = [line for line in lines if line[:1] == ["1024"]]
    assert len(rows) == 3
    # 2 · (1023/1024 · 44 MB · 8 / 10 Gbit/s + 1023 · 50 µs) beyond the 0.9 s.
    assert float(rows[0][1]) == pytest.approx(900 + 70.3 + 102.3, abs=0.2)
    # The last power of two with an efficiency of 0.9: 0.904, and 0.881 for the next.
    assert ["10", "Gbit/s", "ring", "256"] in [line[:4] for line in lines]
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(2**20)) > 50
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "scaling.json"]


def test_numbers_in_place_of_a_file(run_model):
    steps = ("--step", "32:0.8", "--step", "64:1.5", "--bytes", "44e6")
    done = run_model(*steps, "--workers", 16, "--bandwidth", 10, "--overlap", 0.5)
    assert done.returncode == 0, done.stderr
    assert "check" not in done.stdout
    (row,) = (line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["16"])
    # Half of 2 · 15 · (50 µs + 44 MB / 16 · 8 / 10 Gbit/s).
    assert float(row[1]) == pytest.approx(1500 + 67.5 / 2, abs=0.1)


BAD = {
    "nothing given": ((), "give the file"),
    "no such file": (("missing.json",), "missing.json: No such file"),
    "both": (("{file}", "--bytes", "3"), "give the file"),
    "one batch size": (("--step", "8:1", "--step", "8:2", "--bytes", "3"), "two batch sizes"),
    "faster with more": (("--step", "8:2", "--step", "16:1", "--bytes", "3"), "must take longer"),
    "no pair": (("--step", "8", "--bytes", "3"), "BATCH:SECONDS"),
    "no number": (("{file}", "--latency", "fast"), "must be a number, got fast"),
    "overlap": (("{file}", "--overlap", "1.5"), "must be in 0 … 1, got 1.5"),
    "half a worker": (("{file}", "--workers", "1.5"), "whole number"),
    "nodes not full": (("{file}", "--workers", "12"), "must be full, got 12"),
    "precision": (("{file}", "--precision", "int8"), "no 'int8'"),
    "no folder": (("{file}", "--plot", "missing/plot.png"), "the folder of --plot"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(measured, arguments, message, run_model):
    done = run_model(*(word.format(file=measured()) for word in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


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
# The benchmark itself
# ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """What one real run printed and wrote."""
    path = tmp_path_factory.mktemp("scaling") / "scaling.json"
    done = run("scaling.py", *TINY, "--rounds", 3, "--all-reduces", 3, "--out", path)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text())


@pytest.mark.slow
@two_cores
def test_doctests_of_the_benchmark():
    """In a process of its own: the script hides GPUs from the one that imports it."""
    words = [sys.executable, "-m", "doctest", str(BENCHMARKS / "scaling.py")]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@two_cores
def test_measures_every_form(benchmark):
    printed, found = benchmark
    settings = {"image_size": 16, "batch_size": 8, "steps": 3, "filters": [16, 32]}
    assert settings.items() <= found["settings"].items()
    (result,) = found["results"]
    forms = {"one", "apart", "weak", "apart_half", "strong"}
    assert set(result["step_seconds"]) == set(result["images_per_second"]) == forms
    assert [set(each) for each in result["rounds"]] == [forms | {"all_reduce", "message"}] * 3
    assert all(0 < value < 60 for each in result["rounds"] for value in each.values())
    for form in forms:
        assert any(line.startswith(form) for line in printed.splitlines()), form
    assert found["versions"]["tensorflow"]


@pytest.mark.slow
@two_cores
def test_gradient_bytes_are_those_of_the_network(benchmark):
    from keras_resnet import Spec, build_resnet

    network = build_resnet(Spec((1, 1), (16, 32)), (16, 16, 1))
    (result,) = benchmark[1]["results"]
    assert result["gradients"] == len(network.trainable_variables)
    sizes = [variable.value.numpy().nbytes for variable in network.trainable_variables]
    assert result["gradient_bytes"] == sum(sizes)


@pytest.mark.slow
@two_cores
def test_figures_follow_from_the_rounds(benchmark):
    (result,) = benchmark[1]["results"]
    rounds, images = result["rounds"], result["images_per_second"]

    def ratio(above, below):
        return statistics.median(each[above] / each[below] for each in rounds)

    for form, batch in {"one": 8, "apart": 16, "weak": 16, "apart_half": 8, "strong": 8}.items():
        seconds = statistics.median(each[form] for each in rounds)
        assert images[form] == pytest.approx(batch / seconds)
    assert result["weak"]["efficiency"] == pytest.approx(ratio("one", "weak"))
    assert result["weak"]["efficiency_over_apart"] == pytest.approx(ratio("apart", "weak"))
    assert result["strong"]["speedup"] == pytest.approx(ratio("one", "strong"))
    assert result["strong"]["efficiency"] == pytest.approx(ratio("one", "strong") / 2)
    assert result["all_reduce"]["share"] == pytest.approx(ratio("all_reduce", "weak"))
    # What the efficiency means: two processes' images/s over twice those of one, in one round.
    efficiencies = [each["one"] / each["weak"] for each in rounds]
    assert min(efficiencies) <= result["weak"]["efficiency"] <= max(efficiencies)


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
