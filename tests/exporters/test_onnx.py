import collections
import json

import family
import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, numpy_helper

from keras_resnet import InputError
from keras_resnet.exporters import onnx as onnx_exporter
from keras_resnet.exporters.exporter import Job
from keras_resnet.exporters.formats import Artifact
from keras_resnet.exporters.graph import Serving
from keras_resnet.formats import EXPORTED

pytestmark = pytest.mark.thorough

PRECISIONS = EXPORTED["onnx"].precisions


@pytest.fixture(scope="module")
def converted(serving, fashion):
    """precision -> the model."""
    images = fashion.splits["train"].images[:100]
    return {name: onnx_exporter.convert(serving.module(), name, images) for name in PRECISIONS}


def operators(proto):
    return collections.Counter(node.op_type for node in proto.graph.node)


def check_structure(proto):
    """Checks the properties of every graph."""
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", onnx_exporter.OPSET)]
    assert not {"BatchNormalization", "Identity"} & set(operators(proto))
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    for node in proto.graph.node:
        if node.op_type == "Conv":
            assert makers.get(node.input[0]) != "Pad"
    for end in (*proto.graph.input, *proto.graph.output):
        assert end.type.tensor_type.shape.dim[0].dim_param == "batch"
    unnamed = [
        size.dim_param
        for value in proto.graph.value_info
        for size in value.type.tensor_type.shape.dim
        if size.dim_param.startswith("unk__")
    ]
    assert not unnamed


@pytest.mark.parametrize("precision", PRECISIONS)
def test_structure(converted, precision):
    check_structure(converted[precision])


def test_names_shapes_and_dtypes(converted):
    for proto in converted.values():
        session = onnxruntime.InferenceSession(proto.SerializeToString())
        (image,), (output,) = session.get_inputs(), session.get_outputs()
        assert (image.name, image.type, image.shape) == (
            "image",
            "tensor(uint8)",
            ["batch", 28, 28, 1],
        )
        assert (output.name, output.type, output.shape) == (
            "probabilities",
            "tensor(float)",
            ["batch", 10],
        )


def test_batch_normalization_is_in_the_convolutions(converted, small_model):
    convolutions = sum("Conv" in type(each).__name__ for each in small_model._flatten_layers())
    assert operators(converted["float32"])["Conv"] == convolutions
    # One to scale the images.
    assert operators(converted["float32"])["Mul"] <= 1


def test_float16_is_stored_in_half_precision_and_computed_in_float32(converted):
    kinds = {tensor.data_type for tensor in converted["float16"].graph.initializer if tensor.dims}
    assert TensorProto.FLOAT16 in kinds
    halves = {
        each.name
        for each in converted["float16"].graph.initializer
        if each.data_type == TensorProto.FLOAT16
    }
    takers = [node for node in converted["float16"].graph.node if halves & set(node.input)]
    assert {node.op_type for node in takers} == {"Cast"}


def test_int8_is_unsigned_by_signed_and_has_a_scale_for_each_filter(converted):
    proto = converted["int8"]
    constants = {each.name: numpy_helper.to_array(each) for each in proto.graph.initializer}
    makers = {name: node for node in proto.graph.node for name in node.output}
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:
        activation, weight = (makers[name] for name in node.input[:2])
        assert {activation.op_type, weight.op_type} == {"DequantizeLinear"}
        assert constants[activation.input[2]].dtype == "uint8"
        assert constants[weight.input[0]].dtype == "int8"
        filters = len(constants[weight.input[0]])
        assert constants[weight.input[1]].shape == (filters,)


def test_names_and_provenance_travel_inside(serving, tmp_path):
    path = tmp_path / "model.onnx"
    metadata = {"class_names": ["T-shirt/top", "衬衫"], "background": "dark"}
    job = Job(serving, metadata, {"source_sha256": "abc", "recipe": "quick"}, None)
    onnx_exporter.write(job, Artifact("onnx", "float32"), path)
    found = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(found["class_names"]) == metadata["class_names"]
    assert json.loads(found["keras_resnet"]) == metadata
    assert (found["source_sha256"], found["recipe"]) == ("abc", "quick")
    onnx.checker.check_model(str(path), full_check=True)


def largest_difference(model, images, precision="float32"):
    proto = onnx_exporter.convert(Serving(model).module(), precision, images)
    check_structure(proto)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    (outputs,) = session.run(None, {"image": images})
    expected = np.asarray(keras.ops.softmax(model(images, training=False)))
    return np.abs(outputs - expected).max()


@pytest.mark.parametrize("kind", family.SOME_SLOW)
def test_every_kind_of_network(kind):
    assert largest_difference(family.build(kind, channels=3), family.noise(3)) < 1e-5


@pytest.mark.parametrize("variant", family.VARIANTS)
def test_every_variant(variant):
    """In "keras_v2" zeros are padded before a pooling without a ReLU between."""
    assert largest_difference(family.build("resnet18", variant), family.noise()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("variant", family.VARIANTS)
@pytest.mark.parametrize("kind", family.KINDS)
def test_every_network_in_every_precision(kind, variant):
    model = family.build(kind, variant, channels=3)
    for precision, bound in {"float32": 1e-5, "float16": 5e-3, "int8": 0.1}.items():
        assert largest_difference(model, family.noise(3), precision) < bound


def test_zeros_before_a_pooling_are_no_padding_of_its_own():
    """Where every number is negative, padding with zeros and with -inf differ in every window."""
    inputs = keras.Input((28, 28, 1))
    x = keras.layers.ZeroPadding2D(1)(inputs / 255.0 - 2.0)
    x = keras.layers.MaxPooling2D(3, strides=2)(x)
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
    assert largest_difference(model, family.noise()) < 1e-5


class Digamma(keras.layers.Layer):
    def call(self, x):
        import tensorflow as tf

        return tf.math.digamma(x + 1.0)


def test_an_operator_that_onnx_lacks_is_an_error_that_names_it():
    model = keras.Sequential([keras.Input((28, 28, 1)), Digamma(), keras.layers.Flatten()])
    model.add(keras.layers.Dense(10))
    with pytest.raises(InputError, match=r"ONNX cannot hold this network: .*Digamma") as caught:
        onnx_exporter.convert(Serving(model).module(), "float32")
    assert "\n" not in str(caught.value)


def test_all_precisions_are_made_of_one_conversion(monkeypatch):
    module, count = Serving(family.build("resnet18")).module(), 0
    convert = onnx_exporter.tf2onnx.convert.from_function

    def counted(*arguments, **options):
        nonlocal count
        count += 1
        return convert(*arguments, **options)

    monkeypatch.setattr(onnx_exporter.tf2onnx.convert, "from_function", counted)
    protos = [onnx_exporter.convert(module, name, family.noise()) for name in PRECISIONS]
    assert count == 1 and len({proto.SerializeToString() for proto in protos}) == 3


def test_nothing_is_printed(serving, fashion, capfd):
    onnx_exporter.convert(serving.module(), "int8", fashion.splits["train"].images[:10])
    assert capfd.readouterr() == ("", "")
