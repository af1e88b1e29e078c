"""Exported files side by side: real runtimes in real processes, and no assertion about time."""

import datetime
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import psutil
import pytest
import tiny_exports
from conftest import default_signals, run_main
from PIL import Image

from keras_resnet import SPECS, Spec, build_resnet, with_preprocessing
from keras_resnet.evaluation import inference
from keras_resnet.evaluation.benchmark import run
from keras_resnet.evaluation.benchmark.candidates import (
    TORCH_LAYOUTS,
    Candidate,
    describe_d2l_network,
    find_all,
    find_torch,
)
from keras_resnet.evaluation.benchmark.results import format_benchmark, plot_benchmark
from keras_resnet.evaluation.benchmark.run import benchmark
from keras_resnet.runtimes.remote import Remote, RemoteError
from keras_resnet.untrusted import checksums
from keras_resnet.untrusted.manifest import digest, read_manifest
from keras_resnet.utils.environment import cores
from keras_resnet.utils.errors import InputError

pytestmark = pytest.mark.thorough

FORMATS = {".tflite": "tflite", ".onnx": "onnx", "": "saved_model"}
SOURCE = "model.keras"


def write_manifest(folder, names, batches=None):
    """Makes an export of the files `names` in `folder`, whose source lies beside it."""
    source = folder.parent / SOURCE
    images = tiny_exports.images(40)
    probabilities = inference.load(source)(images)
    np.savez(folder / "reference.npz", images=images, probabilities=probabilities)
    size, sha256 = digest(folder / "reference.npz")
    artifacts = [describe_artifact(folder / name, (batches or {}).get(name)) for name in names]
    manifest = {
        "manifest_version": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "model": {"name": "tiny", "parameters": 1},
        "source": {"path": f"somewhere/{SOURCE}", "sha256": digest(source)[1]},
        "tool_versions": {},
        "machine": {},
        "class_names": tiny_exports.METADATA["class_names"],
        "data": {"dataset": "noise", "split": "test", "images": 40, "fingerprint": "0"},
        "keras": {"accuracy": 0.9, "latency_ms": {}},
        "reference": {"file": "reference.npz", "bytes": size, "sha256": sha256},
        "artifacts": artifacts,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def describe_artifact(path, batch):
    size, sha256 = digest(path)
    return {
        "file": path.name,
        "format": FORMATS[path.suffix],
        "precision": "float32",
        "batch": batch,
        "bytes": size,
        "sha256": sha256,
        "input": {"name": "image", "shape": [batch, 28, 28, 1], "dtype": "uint8"},
        "output": {"name": "probabilities", "shape": [batch, 10], "dtype": "float32"},
        **dict.fromkeys(("max_difference", "mean_difference", "accuracy_change"), 0.0),
        **{key: {} for key in ("tolerance", "latency_ms", "operators")},
        "images": 40,
        "agreement": 1.0,
        "accuracy": 0.9,
        "failures": [],
        "published_by_force": False,
    }


@pytest.fixture(scope="module", autouse=True)
def short_turns():
    """Makes turns short: the tests need measurements, but not precise ones."""
    with mock.patch.multiple(run, TURN_SECONDS=0.02, SETTLE_SECONDS=0.01):
        yield


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A folder with a model, and in "export" the files that were made from it."""
    run_dir = tmp_path_factory.mktemp("run")
    folder = run_dir / "export"
    folder.mkdir()
    model = tiny_exports.build()
    tiny_exports.write(folder, model, tiny_exports.METADATA)
    (folder / "model.keras").rename(run_dir / SOURCE)
    single = tiny_exports.to_onnx(tiny_exports.serving(model, batch=1))
    single = checksums.add_onnx_checksum(single, tiny_exports.METADATA)
    (folder / "model-batch1.onnx").write_bytes(single)
    names = ["saved_model", "model.tflite", "model.onnx", "model-batch1.onnx"]
    write_manifest(folder, names, {"model-batch1.onnx": 1})
    return run_dir


@pytest.fixture
def light(run_dir, tmp_path):
    """An export of one .tflite file, to be changed; the model it came from lies beside it."""
    folder = tmp_path / "export"
    folder.mkdir()
    shutil.copy(run_dir / SOURCE, tmp_path)
    shutil.copy(run_dir / "export" / "model.tflite", folder)
    write_manifest(folder, ["model.tflite"])
    return folder


def workers():
    """Returns the workers that this process or its children have running."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(run.WORKER in word for word in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def start(runtime, images):
    """Starts a worker as `run` does."""
    arguments = {"runtime": runtime, "threads": 1, "images": str(images)}
    return Remote(run.WORKER, arguments, timeout=60, environment=run.ENVIRONMENT)


@pytest.fixture(scope="module")
def report(run_dir):
    # A process for each candidate and each setting of threads: one setting is enough of all.
    found = benchmark(run_dir / "export", rounds=2, threads=1, trust=True)
    assert not workers()
    return found


def test_every_candidate_has_a_row(report):
    rows = {row["name"]: row for row in report["rows"]}
    files = {"saved_model", "model.tflite", "model.onnx", "model-batch1.onnx"}
    assert set(rows) == {*files, SOURCE, *TORCH_LAYOUTS}
    assert report["left_out"] == [] and report["baseline"] == "PyTorch eager"
    assert report["threads"] == [1] and report["images_checked"] == 40
    assert not any("failed" in row for row in rows.values())
    for name, row in rows.items():
        batches = {"1"} if name == "model-batch1.onnx" else {"1", "8", "32"}
        assert set(row["images_per_second"]) == batches
        assert set(row["latency_ms"]) == {"1"}
        assert row["accuracy"] == 0.9


def test_a_saved_model_takes_part_only_where_it_is_trusted(run_dir):
    manifest = read_manifest(run_dir / "export")
    found, left_out = find_all(run_dir / "export", manifest, run_dir, False, False)
    assert "saved_model" not in {each.name for each in found}
    assert [each["name"] for each in left_out] == ["saved_model"]
    assert "pass --trust" in left_out[0]["reason"]


def test_figures_are_positive_and_finite(report):
    for row in report["rows"]:
        latencies = [t[what] for t in row["latency_ms"].values() for what in ("median", "p95")]
        single = ("load_ms", "peak_memory_bytes", "bytes", "speed_up")
        figures = [*latencies, *row["images_per_second"].values(), *(row[name] for name in single)]
        assert all(math.isfinite(figure) and figure > 0 for figure in figures), row
    speed_ups = {row["name"]: row["speed_up"] for row in report["rows"]}
    assert speed_ups["PyTorch eager"] == 1


def test_all_answer_as_keras_does(report):
    for row in report["rows"]:
        assert row["agreement"] == 1
        assert row["max_difference"] < 1e-5, row["name"]


def test_memory_is_that_of_the_runtime_alone(report):
    memory = {row["name"]: row["peak_memory_bytes"] for row in report["rows"]}
    # This process has TensorFlow, Keras and PyTorch; a worker of LiteRT must have none of them.
    assert memory["model.tflite"] < 150e6 < 300e6 < memory["saved_model"]


def test_report_and_plot_are_written(report, run_dir):
    folder = run_dir / "export"
    assert json.loads((folder / "benchmark.json").read_text()) == report
    with Image.open(folder / "benchmark.png") as picture:
        picture.verify()
        assert picture.width > 600
    assert not list(folder.glob(".*partial*"))


def test_table_has_every_row_and_says_what_it_means(report):
    text = format_benchmark(report)
    table, notes = text.split("\n\n")
    heads, _, *lines = table.splitlines()
    assert heads.split("  ")[0] == "file" and heads.endswith("speed-up")
    assert [line.split("  ")[0] for line in lines] == [row["name"] for row in report["rows"]]
    single = next(line for line in lines if line.startswith("model-batch1.onnx"))
    assert single.split().count("–") == 2  # batches of 8 and 32
    assert "speed-up: the latency of PyTorch eager divided by the row's" in notes
    assert "interpreter and runtime are in it" in notes


def test_warns_of_a_busy_machine(report):
    for load, warned in ((0.5, True), (0.01, False), (None, False)):
        assert (
            "warning: the processor" in format_benchmark({**report, "idle_load": load})
        ) == warned


@pytest.mark.slow
def test_without_pytorch_keras_is_the_baseline(light, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    report = benchmark(light, rounds=1, threads=1, torch=False, out=out)
    assert [row["name"] for row in report["rows"]] == ["model.tflite", SOURCE]
    assert report["baseline"] == SOURCE
    assert {path.name for path in out.iterdir()} == {"benchmark.json", "benchmark.png"}
    assert not (light / "benchmark.json").exists()


@pytest.fixture
def no_workers(monkeypatch):
    """Any start of a worker is an error that is no InputError."""
    monkeypatch.setattr(sys, "executable", "/does/not/exist")


def change_artifact(folder):
    path = folder / "model.tflite"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_reference(folder):
    np.savez(folder / "reference.npz", images=0, probabilities=0)


def take_floats(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["artifacts"][0]["input"]["dtype"] = "float32"
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change_artifact, r"model\.tflite: .*sha256"),
        (lambda folder: (folder / "model.tflite").unlink(), r"model\.tflite"),
        (change_reference, r"reference\.npz: not the file that the manifest lists"),
        (lambda folder: (folder / "reference.npz").unlink(), r"reference\.npz"),
        (take_floats, r"model\.tflite: the input must be uint8 images, got float32"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json"),
    ],
)
def test_what_is_not_as_the_manifest_says_is_refused_before_anything_runs(
    light, no_workers, spoil, message
):
    spoil(light)
    with pytest.raises(InputError, match=message):
        benchmark(light)
    assert not (light / "benchmark.json").exists()


@pytest.mark.parametrize("arguments", [{"rounds": 0}, {"threads": 0}, {"out": "no/such/folder"}])
def test_bad_arguments_are_refused(light, no_workers, arguments):
    with pytest.raises(InputError):
        benchmark(light, **arguments)


def test_a_wrong_network_and_a_broken_one_are_shown_as_such(light):
    model = tiny_exports.build()
    logits = model.layers[-1].get_layer("logits")
    logits.kernel.assign(-logits.kernel)
    (light / "wrong.onnx").write_bytes(tiny_exports.to_onnx(tiny_exports.serving(model)))
    (light / "broken.onnx").write_text("no model")
    write_manifest(light, ["model.tflite", "wrong.onnx", "broken.onnx"])
    (light.parent / SOURCE).unlink()
    report = benchmark(light, rounds=1, threads=1)
    right, wrong, broken = report["rows"]
    assert right["agreement"] == 1 and wrong["agreement"] < 0.5 < wrong["max_difference"]
    assert "speed_up" not in right and report["baseline"] is None
    assert [row["name"] for row in report["left_out"]] == ["Keras", "PyTorch eager"]
    assert "latency_ms" not in broken
    text = format_benchmark(report)
    assert f"failed: broken.onnx: {broken['failed']}" in text
    assert "left out: Keras: " in text and "is missing, or was changed" in text
    assert not workers()


def test_the_command_line_measures_and_writes(light):
    (light.parent / SOURCE).unlink()
    done = run_main("benchmark", light, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    report = json.loads((light / "benchmark.json").read_text())
    assert format_benchmark(report) in done.stdout and "model.tflite" in done.stdout
    assert report["threads"] == sorted({1, cores()})
    (row,) = report["rows"]
    assert [*row["latency_ms"]] == list(map(str, report["threads"]))
    assert (light / "benchmark.png").is_file()


def test_nothing_that_runs_is_an_error(light):
    (light / "model.tflite").write_text("no model")
    write_manifest(light, ["model.tflite"])
    (light.parent / SOURCE).unlink()
    with pytest.raises(InputError, match="no candidate runs: "):
        benchmark(light, rounds=1, threads=1)


def test_an_export_without_candidates_is_an_error(light, run_dir):
    shutil.copytree(run_dir / "export" / "saved_model", light / "saved_model")
    write_manifest(light, ["saved_model"])
    (light.parent / SOURCE).unlink()
    with pytest.raises(InputError, match=r"no candidate runs: .* pass --trust"):
        benchmark(light)


def test_a_changed_source_takes_no_part(light):
    with open(light.parent / SOURCE, "ab") as file:
        file.write(b"\0")
    report = benchmark(light, rounds=1, threads=1)
    assert [row["name"] for row in report["rows"]] == ["model.tflite"]


# ----------------------------------------------------------------------------------------------
# The network of Dive into Deep Learning (d2l)
# ----------------------------------------------------------------------------------------------


def classifier(spec=None, shape=(28, 28, 1), image_shape=None, crop_pct=1.0, **options):
    network = build_resnet(spec or Spec((1, 1), (8, 16)), shape, 10, **options)
    return with_preprocessing(network, image_shape or shape, crop_pct=crop_pct)


@pytest.mark.parametrize("layout", range(len(TORCH_LAYOUTS)))
def test_torch_worker_resizes_and_normalises_as_keras_does(tmp_path, layout):
    network = tiny_exports.build(Spec((2, 1), (8, 16)), (48, 48, 3)).layers[-1]
    logits = network.get_layer("logits")
    logits.kernel.assign(0.02 * logits.kernel)  # or the softmax is 0 and 1 whatever comes
    normalization = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    model = with_preprocessing(network, (31, 37, 3), **normalization)
    tiny_exports.archive.save_model(model, tmp_path / SOURCE, {})
    images = tiny_exports.images(5, (31, 37, 3))
    np.save(tmp_path / "images.npy", images)
    source = Candidate(SOURCE, "keras", "float32", None, tmp_path / SOURCE, 1, None)
    row = find_torch(source, tmp_path)[layout]
    with start("torch", tmp_path / "images.npy") as worker:
        worker.call("load", path=str(row.path), options=row.options)
        found = worker.call("predict", batch=2)
    expected = inference.load(tmp_path / SOURCE)(images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the predictions tell images apart


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: classifier(stem="small"), "7×7 stem"),
        (lambda: classifier(Spec((1,), (16,), block="bottleneck")), "basic blocks"),
        (lambda: classifier(shape=(28, 28, 3), image_shape=(28, 28, 1)), "channels"),
        (lambda: classifier(crop_pct=0.9), "resized as"),
        (lambda: classifier().layers[-1], "preprocessing"),
    ],
)
def test_d2l_has_no_other_networks(make, reason):
    with pytest.raises(InputError, match=reason):
        describe_d2l_network(make())


def test_resnet18_is_that_of_d2l():
    found = describe_d2l_network(classifier(SPECS["resnet18"]))
    assert [len(blocks) for blocks in found["stages"]] == [2, 2, 2, 2]
    assert found["stages"][1] == [(128, 2, True), (128, 1, False)]


# ----------------------------------------------------------------------------------------------
# Workers
# ----------------------------------------------------------------------------------------------


def test_a_worker_that_fails_or_ends_says_why(run_dir, tmp_path):
    """Time limits and crashes: see test_remote.py."""
    np.save(tmp_path / "images.npy", tiny_exports.images(1))
    with start("onnx", tmp_path / "images.npy") as worker:
        with pytest.raises(RemoteError, match=r"FileNotFoundError: .*none\.onnx"):
            worker.call("load", path="none.onnx", options={})
        psutil.Process(worker.pid).kill()
        with pytest.raises(RemoteError, match=r"the process crashed \(SIGKILL\)"):
            worker.call("peak_memory")


# A benchmark in a process of its own, whose turns would take minutes.
LONG = """
import sys
from keras_resnet import benchmark
benchmark(sys.argv[1], rounds=1000, torch=False)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    "stop",
    [
        *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGTERM)),
        signal.SIGKILL,
    ],
)
def test_workers_end_with_their_parent(light, stop):
    (light.parent / SOURCE).unlink()
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    parent = subprocess.Popen(
        [sys.executable, "-c", LONG, light],
        stderr=subprocess.DEVNULL,
        env=environment,
        preexec_fn=default_signals,
    )
    try:
        until = time.monotonic() + 60
        while not (started := workers()):
            assert time.monotonic() < until and parent.poll() is None, "no worker was started"
            time.sleep(0.05)
        parent.send_signal(stop)
        parent.wait(30)
    finally:
        parent.kill()
        parent.wait()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not alive


def test_plot_of_many_rows(report, tmp_path):
    rows = [
        {**report["rows"][1], "name": f"${index}$.tflite", "format": kind, "accuracy": None}
        for index, kind in enumerate(["tflite", "onnx", "keras", "saved_model", "torch"] * 3)
    ]
    path = Path(tmp_path) / "many.png"
    plot_benchmark({**report, "rows": rows}, path)
    with Image.open(path) as picture:
        assert len(picture.convert("L").getcolors()) > 20  # not an empty page
