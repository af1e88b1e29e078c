import io
import zipfile

import family
import keras
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

from keras_resnet import InputError
from keras_resnet.exporters import tflite
from keras_resnet.exporters.exporter import Job
from keras_resnet.exporters.formats import Artifact
from keras_resnet.exporters.graph import Serving
from keras_resnet.formats import EXPORTED

pytestmark = pytest.mark.thorough

# tests/exporters/test_photograph_exports.py has "integer".
PRECISIONS = [name for name in EXPORTED["tflite"].precisions if name != "integer"]


@pytest.fixture(scope="module")
def calibration(fashion):
    return fashion.splits["train"].images[:100]


@pytest.fixture(scope="module")
def converted(serving, calibration):
    """precision -> the flatbuffer."""
    return {name: tflite.convert(serving.module(), name, calibration) for name in PRECISIONS}


def types(content):
    details = Interpreter(model_content=content).get_tensor_details()
    return [np.dtype(detail["dtype"]).name for detail in details]


def test_names_shapes_and_dtypes(converted):
    for content in converted.values():
        interpreter = Interpreter(model_content=content)
        assert interpreter.get_signature_list() == {
            "serving_default": {"inputs": ["image"], "outputs": ["probabilities"]}
        }
        (image,), (output,) = interpreter.get_input_details(), interpreter.get_output_details()
        assert image["shape_signature"].tolist() == [-1, 28, 28, 1]
        assert (image["dtype"], output["dtype"]) == (np.uint8, np.float32)


@pytest.mark.parametrize(
    "precision, stored", [("float16", "float16"), ("dynamic", "int8"), ("int8", "int8")]
)
def test_weights_are_stored_in_the_precision(converted, precision, stored):
    assert stored in types(converted[precision])
    assert stored not in types(converted["float32"])
    assert len(converted[precision]) < len(converted["float32"])


def test_int8_computes_in_integers(converted):
    """Floats remain where the images are scaled and where the output is given, nowhere else."""
    floats = {name: types(converted[name]).count("float32") for name in ("dynamic", "int8")}
    assert floats["int8"] <= 6 < floats["dynamic"]


def test_float16_is_made_of_the_float32_file(monkeypatch):
    module = Serving(family.build("resnet18")).module()
    content = tflite.convert(module, "float32")
    monkeypatch.setattr(tflite.tf.lite, "TFLiteConverter", None)
    assert tflite.convert(module, "float16") == tflite.halve(content)
    assert tflite.convert(module, "float32") == content


def test_a_fixed_batch_has_no_open_dimension(serving):
    content = tflite.convert(serving.module(batch=1), "float32")
    for detail in Interpreter(model_content=content).get_tensor_details():
        assert -1 not in detail["shape_signature"]


def test_class_names_travel_inside(serving, tmp_path):
    names = ["T-shirt/top", "衬衫"]
    path = tmp_path / "model.tflite"
    job = Job(serving, {"class_names": names}, {}, None)
    tflite.write(job, Artifact("tflite", "float32"), path)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        assert archive.read("labels.txt").decode().splitlines() == names
    assert Interpreter(model_path=str(path)).get_signature_list()


class ErfInverse(keras.layers.Layer):
    def call(self, x):
        return keras.ops.erfinv(x / 1000)


def test_an_operator_that_a_phone_lacks_is_an_error_that_names_it():
    model = keras.Sequential([keras.Input((28, 28, 1)), ErfInverse(), keras.layers.Flatten()])
    model.add(keras.layers.Dense(10))
    with pytest.raises(InputError, match=r"TFLite cannot hold this network: .*Erfinv") as caught:
        tflite.convert(Serving(model).module(), "float32")
    assert "\n" not in str(caught.value)


def test_nothing_is_printed(serving, calibration, capfd):
    tflite.convert(serving.module(), "int8", calibration[:10])
    assert capfd.readouterr() == ("", "")


def largest_difference(model, images, precision="float32"):
    content = tflite.convert(Serving(model).module(), precision, images)
    outputs = Interpreter(model_content=content).get_signature_runner()(image=images)
    expected = np.asarray(keras.ops.softmax(model(images, training=False)))
    return np.abs(outputs["probabilities"] - expected).max()


@pytest.mark.parametrize("kind", family.SOME_SLOW)
def test_every_kind_of_network(kind):
    assert largest_difference(family.build(kind, channels=3), family.noise(3)) < 1e-5


@pytest.mark.parametrize("variant", family.VARIANTS)
def test_every_variant(variant):
    assert largest_difference(family.build("resnet18", variant), family.noise()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", family.VARIANTS)
@pytest.mark.parametrize("kind", family.KINDS)
def test_every_network_in_every_precision(kind, variant):
    model = family.build(kind, variant, channels=3)
    bounds = {"float32": 1e-5, "float16": 2e-3, "dynamic": 0.1, "int8": 0.1}
    for precision in PRECISIONS:
        assert largest_difference(model, family.noise(3), precision) < bounds[precision]
