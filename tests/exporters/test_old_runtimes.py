"""Our files in other tools: tflite-runtime 2.14, which many boards still have, and OpenVINO."""

import os
import subprocess
import sys

import family
import numpy as np
import pytest
import tensorflow as tf
import tiny_exports

from keras_resnet.exporters import onnx, saved_model, tflite
from keras_resnet.exporters.exporter import Job
from keras_resnet.exporters.formats import Artifact, choose_artifacts
from keras_resnet.exporters.graph import Serving
from keras_resnet.untrusted import checksums

pytestmark = pytest.mark.slow

# The last wheels of tflite-runtime are of 2023, for these.
OLD_PYTHONS = ((3, 9), (3, 10), (3, 11))
ALL = choose_artifacts()
TFLITE = [artifact for artifact in ALL if artifact.format == "tflite"]
# Dark images and light ones, so that the answers are not alike.
IMAGES = (family.noise(3, count=40) * np.linspace(0, 1, 40)[:, None, None, None]).astype("uint8")

RUN_TFLITE = """
import sys, numpy
from tflite_runtime.interpreter import Interpreter
for path in sys.argv[2:]:
    interpreter = Interpreter(path)
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.allocate_tensors()
    answers = []
    for image in numpy.load(sys.argv[1]):
        interpreter.set_tensor(taken["index"], image[None])
        interpreter.invoke()
        answers.append(interpreter.get_tensor(given["index"])[0])
    numpy.save(path + ".npy", answers)
"""
# On a processor with AMX it computes float32 files in bfloat16 unless it is told not to.
RUN_OPENVINO = """
import sys, numpy, openvino
for path in sys.argv[2:]:
    model = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    answers = [model(image[None])[0][0] for image in numpy.load(sys.argv[1])]
    numpy.save(path + ".npy", answers)
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of every file of a network whose head is large enough to be quantized."""
    folder = tmp_path_factory.mktemp("written")
    model = family.build("resnet18", channels=3)
    serving = Serving(model)
    job = Job(serving, {"class_names": [f"name {i}" for i in range(10)]}, {}, IMAGES)
    for artifact in ALL:
        writer = {"tflite": tflite, "onnx": onnx, "saved_model": saved_model}[artifact.format]
        writer.write(job, artifact, folder / artifact.file)
    np.save(folder / "images.npy", IMAGES)
    expected = tf.nn.softmax(model(IMAGES, training=False)).numpy()
    assert np.ptp(expected, axis=0).max() > 0.1
    return folder, expected


def python_with(folder, *packages):
    """Returns the interpreter of a new virtual environment with packages."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *packages]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        # Skipped where there is no index; where a change is checked nothing may go untested.
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop(f"cannot install {', '.join(packages)}: {done.stderr.strip()[-200:]}")
    return python


def answers(python, script, folder, artifacts):
    """Yields each artifact and the answers of a script's runtime to `IMAGES`."""
    paths = [folder / artifact.file for artifact in artifacts]
    command = [python, "-I", "-c", script, folder / "images.npy", *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for artifact, path in zip(artifacts, paths, strict=True):
        yield artifact, np.load(f"{path}.npy")


def check(artifact, found, expected):
    bound = {"float32": 1e-5, "float16": 2e-3}.get(artifact.precision, 0.2)
    assert np.abs(found - expected).max() < bound, artifact.file
    assert np.mean(found.argmax(1) == expected.argmax(1)) >= 0.9, artifact.file


@pytest.mark.skipif(
    sys.version_info[:2] not in OLD_PYTHONS, reason="tflite-runtime has no wheel for this Python"
)
def test_tflite_runtime_2_14_runs_every_tflite_file(written, tmp_path):
    folder, expected = written
    python = python_with(tmp_path / "venv", "tflite-runtime==2.14.0", "numpy<2")
    for artifact, found in answers(python, RUN_TFLITE, folder, TFLITE):
        check(artifact, found, expected)


def test_openvino_runs_every_file(written, tmp_path):
    folder, expected = written
    python = python_with(tmp_path / "venv", "openvino")
    files = [artifact for artifact in ALL if artifact.format != "saved_model"]
    for artifact, found in answers(python, RUN_OPENVINO, folder, files):
        check(artifact, found, expected)


@pytest.mark.parametrize("artifact", TFLITE, ids=lambda artifact: artifact.file)
def test_no_operator_is_newer_than_2_14(written, artifact):
    """As the converter records it; on any Python."""
    oldest = tflite.oldest_runtime((written[0] / artifact.file).read_bytes())
    name, version = oldest.rsplit(" ", 1)
    assert name == "TensorFlow Lite"
    assert [1, 5] <= [*map(int, version.split("."))] <= [2, 14]


def test_half_precision_needs_its_dequantize():
    """The converter's record is that of the float32 file it was made of."""
    module, oldest = Serving(tiny_exports.build()).module(), {}
    for precision in ("float32", "float16"):
        oldest[precision] = tflite.oldest_runtime(tflite.convert(module, precision))
    assert oldest == {"float32": "TensorFlow Lite 1.6.0", "float16": "TensorFlow Lite 1.15.0"}


def test_a_file_without_the_record_has_no_oldest_runtime(written):
    from ai_edge_litert import schema_py_generated as schema
    from flatbuffers import Builder

    content = (written[0] / Artifact("tflite", "float32").file).read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    model.metadata = []
    builder = Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    content = checksums.add_tflite_checksum(bytes(builder.Output()), {})
    assert tflite.oldest_runtime(content) is None
