"""Files that take photographs of any size: the same grey levels in each format."""

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from pillow_resize import pillow_resize

from keras_resnet import Spec, build_resnet, with_preprocessing
from keras_resnet.exporters import onnx, tflite
from keras_resnet.exporters.graph import ServedModule, Serving

SIZE = 24
# Height and width; Pillow 13 resizes the rows of the second and the last first.
SHAPES = ((40, 61), (90, 30), (1, 1), (SIZE, SIZE), (33, 200), (200, 33))

pytestmark = pytest.mark.thorough


def photographs(generator, shapes=SHAPES):
    """Returns images with edges and noise, each with its batch axis."""
    images = [generator.integers(0, 256, (1, *shape, 3)) for shape in shapes]
    return [np.where(image > 200, 255, image // 2).astype("uint8") for image in images]


def run_tflite(interpreter, image):
    """Returns the output for images whose shape may differ from those of the call before."""
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(source["index"], image.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(source["index"], image)
    interpreter.invoke()
    return interpreter.get_tensor(target["index"])


def open_onnx(proto):
    content = proto.SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


def expected_levels(image, resampler):
    height, width = image.shape[1:3]
    length, short = SIZE * 5 // 4, min(height, width)
    new = [length * edge // short for edge in (height, width)]
    resized = pillow_resize(image[0], *new, "bilinear", resampler)
    top, left = (round((edge - SIZE) / 2) for edge in new)
    return resized[None, top : top + SIZE, left : left + SIZE]


@pytest.mark.parametrize("resampler", ["pillow", pytest.param("pillow12", marks=pytest.mark.slow)])
def test_every_format_has_pillow_s_grey_levels(resampler):
    network = keras.Sequential([keras.Input((SIZE, SIZE, 3)), keras.layers.Rescaling(255.0)])
    preprocessing = {"resize": "shorter_edge", "crop_pct": 0.8, "antialias": True}
    model = with_preprocessing(network, (None, None, 3), **preprocessing, resampler=resampler)
    spec = tf.TensorSpec([None, None, None, 3], "uint8", "image")
    module = ServedModule(model, lambda image: {"levels": model(image, training=False)}, spec)
    saved = tf.saved_model.load(module.save())
    content = tflite.convert(module, "float32")
    interpreter = Interpreter(model_content=content)
    session = open_onnx(onnx.convert(module, "float32"))
    # LiteRT 2.3 writes beside its memory where its branches get images of other shapes.
    assert "IF" not in [each["op_name"] for each in interpreter._get_ops_details()]
    run = {
        "keras": model.predict_on_batch,
        "saved_model": lambda image: saved.serve(tf.constant(image))["levels"].numpy(),
        "tflite": lambda image: run_tflite(interpreter, image),
        "onnx": lambda image: session.run(None, {"image": image})[0],
    }
    images = photographs(np.random.default_rng(0))
    for image in images + images[::-1]:
        batch = np.concatenate([image, image[:, ::-1, ::-1]])
        expected = np.concatenate([expected_levels(each[None], resampler) for each in batch])
        for name, function in run.items():
            np.testing.assert_allclose(function(batch), expected, atol=1e-3, err_msg=name)


@pytest.fixture(scope="module")
def classifier():
    """A network with the preprocessing of photographs of any size before it."""
    keras.utils.set_random_seed(0)
    network = build_resnet(Spec((1, 1), (8, 16)), (SIZE, SIZE, 3), stem="small")
    preprocessing = {"resize": "shorter_edge", "crop_pct": 0.875, "antialias": True}
    return Serving(with_preprocessing(network, (None, None, 3), **preprocessing), True, (99, 99))


@pytest.mark.parametrize("shape", [(None, None), pytest.param((40, 70), marks=pytest.mark.slow)])
def test_int8_leaves_the_resampling_in_float32(classifier, shape):
    spec = tf.TensorSpec([1, *shape, 3], "uint8", "image")
    module = ServedModule(classifier.model, classifier._serve, spec)
    images = photographs(np.random.default_rng(1), [SHAPES, [(40, 70)] * 6][shape != (None, None)])
    calibration = [image[0] for image in images]
    expected = [classifier._serve(image)["probabilities"].numpy() for image in images]

    content = tflite.convert(module, "int8", calibration)
    interpreter = Interpreter(model_content=content)
    names = {each["index"]: np.dtype(each["dtype"]) for each in interpreter.get_tensor_details()}
    operators = interpreter._get_ops_details()
    kinds = [operator["op_name"] for operator in operators]
    first = kinds.index("CONV_2D")
    before = [
        names[i].name for o in operators[:first] for i in o["outputs"] if o["op_name"] != "QUANTIZE"
    ]
    assert {"BATCH_MATMUL", "FULLY_CONNECTED"} & set(kinds[:first])
    assert "int8" not in before
    assert names[operators[first]["inputs"][0]] == "int8"

    proto = onnx.convert(module, "int8", calibration)
    makers = {name: node.op_type for node in proto.graph.node for name in node.output}
    for node in proto.graph.node:
        if node.op_type in ("MatMul", "Floor") and "preprocessing" in node.name:
            assert "DequantizeLinear" not in [makers.get(name) for name in node.input]
    quantized = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert all(makers[node.input[0]] == "DequantizeLinear" for node in quantized)

    session = open_onnx(proto)
    for image, row in zip(images, expected, strict=True):
        for found in (run_tflite(interpreter, image), session.run(None, {"image": image})[0]):
            np.testing.assert_allclose(found, row, atol=0.05)
