"""One model in every format: the same outputs, the same facts about it."""

import numpy as np
import pytest
import tensorflow as tf
import tiny_exports
from onnx import TensorProto, helper, numpy_helper

from keras_resnet.evaluation.inference import Predictor, load
from keras_resnet.runtimes import Prober, open_runtime
from keras_resnet.untrusted import checksums
from keras_resnet.utils.errors import InputError


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    return tiny_exports.written(tmp_path_factory)


@pytest.fixture(scope="module")
def prober():
    with Prober() as prober:
        yield prober


@pytest.fixture(scope="module")
def opened(exports, prober):
    """Every format's `Runtime`."""
    return {
        name: open_runtime(exports / file, threads=1, trust=name == "saved_model", prober=prober)
        for name, file in tiny_exports.FORMATS.items()
    }


EXPORTED = [name for name in tiny_exports.FORMATS if name != "keras"]


@pytest.mark.parametrize("count", [1, 2, 7, 300])
@pytest.mark.parametrize("name", EXPORTED)
def test_all_formats_answer_alike(opened, name, count):
    images = tiny_exports.images(count)
    expected = Predictor(opened["keras"])(images)
    if count > 1:
        assert expected.std(axis=0).max() > 0.02  # the outputs differ from image to image
    outputs = Predictor(opened[name])(images)
    assert outputs.shape == (count, 10) and outputs.dtype == "float32"
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    np.testing.assert_allclose(outputs.sum(axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("name", EXPORTED)
def test_formats_describe_themselves(opened, name):
    runtime = opened[name]
    assert runtime.format == name
    assert runtime.metadata == tiny_exports.METADATA
    assert (runtime.input.name, runtime.output.name) == ("image", "probabilities")
    assert runtime.input.shape == (None, 28, 28, 1) and runtime.input.dtype == "uint8"
    assert runtime.output.shape == (None, 10) and runtime.output.dtype == "float32"
    assert runtime.output_kind == "softmax"
    assert runtime.threads == 1


@pytest.mark.parametrize(
    ("name", "operator", "count"),
    [
        # Two blocks of two convolutions and two shortcuts at most, and the stem.
        ("keras", "ResidualBlock", 2),
        ("saved_model", "Conv2D", 6),
        ("tflite", "CONV_2D", 6),
        ("onnx", "Conv", 6),
    ],
)
def test_operators_are_counted(opened, name, operator, count):
    assert opened[name].operators[operator] == count


@pytest.mark.parametrize("name", EXPORTED)
def test_no_images_have_no_answers(opened, name):
    assert opened[name].run(tiny_exports.images(0)).shape == (0, 10)


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 9, 28, 1), "uint8"),
        np.zeros((28, 28, 1), "uint8"),
        np.zeros((2, 28, 28, 1), "float32"),
    ],
    ids=["size", "rank", "type"],
)
def test_images_that_do_not_fit_are_refused(opened, name, images):
    with pytest.raises(InputError, match="it takes uint8") as error:
        opened[name].run(images)
    assert str(opened[name].path) in str(error.value)


@pytest.mark.parametrize("name", ["tflite", "onnx"])
def test_files_of_others_answer_too(exports, opened, prober, name):
    images = tiny_exports.images(3)
    predictor = load(exports / f"foreign.{name}", prober=prober)
    np.testing.assert_array_equal(predictor(images), Predictor(opened[name])(images))
    assert predictor.class_names[0] == "class 0"


def test_a_fixed_batch_takes_any_number_of_images(tmp_path, opened, prober):
    module = tiny_exports.serving(tiny_exports.build(), batch=2)
    tiny_exports.save_tensorflow(module, tmp_path / "saved_model")
    path = tmp_path / "model.tflite"
    path.write_bytes(tiny_exports.to_tflite(tmp_path / "saved_model"))
    runtime = open_runtime(path, prober=prober)
    assert runtime.input.shape == (2, 28, 28, 1)
    images = tiny_exports.images(5)
    expected = Predictor(opened["keras"])(images)
    np.testing.assert_allclose(Predictor(runtime)(images), expected, atol=1e-5)


def linear(
    path,
    output="logits",
    last=(),
    kind=TensorProto.FLOAT,
    element=TensorProto.UINT8,
    image_shape=(4, 4, 1),
):
    """Writes an .onnx file of one dense layer over images of 16 numbers."""
    kernel = np.random.default_rng(0).normal(0, 0.01, (16, 3)).astype("float32")
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("MatMul", ["flat", "kernel"], ["y" if last else output]),
        *last,
    ]
    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("image", element, ["batch", *image_shape])],
        [helper.make_tensor_value_info(output, kind, ["batch", 3])],
        [numpy_helper.from_array(kernel, "kernel")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return kernel


SOFTMAX = helper.make_node("Softmax", ["y"], ["z"])
HALF = helper.make_node("Cast", ["z"], ["scores"], to=TensorProto.FLOAT16)


@pytest.mark.parametrize(
    ("output", "last", "element", "kind"),
    [
        ("logits", (), TensorProto.FLOAT, "logits"),
        ("scores", (SOFTMAX, HALF), TensorProto.FLOAT16, "softmax"),
    ],
    ids=["logits", "softmax in half precision"],
)
def test_logits_become_probabilities_and_probabilities_stay(
    tmp_path, prober, output, last, element, kind
):
    kernel = linear(tmp_path / "a.onnx", output, last, element)
    predictor = load(tmp_path / "a.onnx", prober=prober)
    assert predictor.output_kind == kind
    images = tiny_exports.images(4, (4, 4, 1))
    powers = np.exp(images.reshape(4, 16).astype("float64") @ kernel)
    expected = powers / powers.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predictor(images), expected, atol=1e-3 if last else 1e-5)


SIGMOID = helper.make_node("Sigmoid", ["y"], ["scores"])
REVERSED = [
    helper.make_node("Sigmoid", ["y"], ["p"]),
    helper.make_node("Constant", [], ["one"], value_float=1.0),
    helper.make_node("Sub", ["one", "p"], ["scores"]),
]


@pytest.mark.parametrize("last", [(SIGMOID,), REVERSED], ids=["graph", "numbers"])
def test_labels_of_a_sigmoid_keep_their_own_numbers(tmp_path, prober, last):
    kernel = linear(tmp_path / "a.onnx", "scores", last)
    predictor = load(tmp_path / "a.onnx", prober=prober)
    assert predictor.output_kind == "sigmoid" and predictor.several_labels
    images = tiny_exports.images(4, (4, 4, 1))
    expected = 1 / (1 + np.exp(-(images.reshape(4, 16).astype("float64") @ kernel)))
    expected = expected if last[0] is SIGMOID else 1 - expected
    np.testing.assert_allclose(predictor(images), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["binary_sigmoid", "other", 3, ["logits"]])
def test_metadata_must_fit_the_output(tmp_path, prober, kind):
    linear(tmp_path / "a.onnx")
    content = (tmp_path / "a.onnx").read_bytes()
    content = checksums.add_onnx_checksum(content, {"output_kind": kind})
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(InputError, match="damaged: its metadata state the output kind"):
        load(tmp_path / "a.onnx", prober=prober)


def test_several_outputs_are_named(tmp_path):
    module = tf.Module()
    spec = tf.TensorSpec([None, 4, 4, 1], tf.uint8, name="image")

    def serve(names):
        def function(image):
            flat = tf.reshape(tf.cast(image, tf.float32), [-1, 16])
            return {name: tf.nn.sigmoid(flat[:, :1] / 99 - 1) for name in names}

        return tf.function(function, input_signature=[spec])

    module.both, module.one = serve(["label", "box"]), serve(["label"])
    tf.saved_model.save(module, tmp_path / "both", signatures={"serving_default": module.both})
    with pytest.raises(InputError, match=r"must have one output, got 2 \(box, label\)"):
        open_runtime(tmp_path / "both", trust=True)
    tf.saved_model.save(module, tmp_path / "one", signatures={"serving_default": module.one})
    predictor = load(tmp_path / "one", trust=True)
    assert predictor.output_kind == "binary_sigmoid"
    images = tiny_exports.images(4, (4, 4, 1))
    p = 1 / (1 + np.exp(1 - images[:, 0, 0, 0] / 99))
    np.testing.assert_allclose(predictor(images), np.stack([1 - p, p], axis=1), atol=1e-6)


def test_images_are_no_floats(tmp_path, prober):
    linear(tmp_path / "a.onnx", element=TensorProto.FLOAT)
    runtime = open_runtime(tmp_path / "a.onnx", prober=prober)
    assert runtime.run(np.zeros((2, 4, 4, 1))).shape == (2, 3)
    with pytest.raises(InputError, match=r"it takes float32 .*, got uint8"):
        runtime.run(np.zeros((2, 4, 4, 1), "uint8"))


def test_models_of_floats_are_no_predictors(tmp_path, prober):
    linear(tmp_path / "a.onnx", element=TensorProto.FLOAT)
    assert open_runtime(tmp_path / "a.onnx", prober=prober).input.dtype == "float32"
    with pytest.raises(InputError, match=r"a\.onnx: it takes floats that are normalised already"):
        load(tmp_path / "a.onnx", prober=prober)


@pytest.mark.parametrize("normalize", [None, "imagenet"])
def test_channels_that_come_first_are_named(normalize, tmp_path, prober):
    """As in the files that PyTorch exports: naming a normalization would not help."""
    linear(tmp_path / "a.onnx", element=TensorProto.FLOAT, image_shape=(1, 4, 4))
    with pytest.raises(InputError, match=r"a\.onnx: .*; its channels come first: .* convert`"):
        load(tmp_path / "a.onnx", normalize=normalize, prober=prober)


def test_metadata_may_state_that_no_images_are_taken(exports, opened):
    with pytest.raises(InputError, match="it takes floats that are normalised already"):
        Predictor(opened["tflite"], {"takes_raw_images": False})


def test_threads_are_those_asked_for(exports, prober):
    for name in ("tflite", "onnx"):
        runtime = open_runtime(exports / tiny_exports.FORMATS[name], threads=2, prober=prober)
        assert runtime.threads == 2
        assert runtime.run(tiny_exports.images(1)).shape == (1, 10)
