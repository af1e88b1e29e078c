"""One small network in every format, converted here without the package's own exporter."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json

import numpy as np

from keras_resnet import Spec, archive, build_resnet, with_preprocessing
from keras_resnet.untrusted import checksums

FORMATS = {
    "keras": "model.keras",
    "saved_model": "saved_model",
    "tflite": "model.tflite",
    "onnx": "model.onnx",
}
SHAPE, CLASSES = (28, 28, 1), 10
METADATA = {"class_names": [f"name {i}" for i in range(CLASSES)], "background": "dark"}


def build(spec=None, shape=SHAPE, classes=CLASSES):
    """Returns a model of raw images whose predictions differ from image to image."""
    network = build_resnet(spec or Spec((1, 1), (8, 16)), shape, classes)
    random = np.random.default_rng(0)
    for weight in network.weights:
        low, high = (-0.25, 0.25) if weight.path.endswith("kernel") else (0.5, 1.5)
        weight.assign(random.uniform(low, high, weight.shape))
    return with_preprocessing(network, shape)


def images(count, shape=SHAPE):
    """Returns noise, uint8: dark images and light ones."""
    random = np.random.default_rng(count)
    noise = random.integers(0, 256, (count, *shape)) * random.uniform(0, 1, (count, 1, 1, 1))
    return noise.astype("uint8")


def serving(model, batch=None):
    """Returns a tf.Module whose `serve` maps "image" to "probabilities"."""
    import tensorflow as tf

    module = tf.Module()
    module.kept = [variable.value for variable in model.variables]
    signature = tf.TensorSpec([batch, *model.input_shape[1:]], tf.uint8, name="image")

    @tf.function(input_signature=[signature], autograph=False)
    def serve(image):
        return {"probabilities": tf.nn.softmax(model(image, training=False))}

    module.serve = serve
    return module


def save_tensorflow(module, folder):
    """Writes a SavedModel."""
    import tensorflow as tf

    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.serve})


def to_tflite(saved_model, flex=False):
    """Returns a SavedModel as a flatbuffer without a checksum."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved_model))
    kinds = [tf.lite.OpsSet.TFLITE_BUILTINS, *([tf.lite.OpsSet.SELECT_TF_OPS] if flex else [])]
    converter.target_spec.supported_ops = kinds
    return converter.convert()


def to_onnx(module):
    """Returns a module's function as a serialized ModelProto without a checksum."""
    import tf2onnx

    signature = module.serve.input_signature
    model, _ = tf2onnx.convert.from_function(module.serve, input_signature=signature, opset=17)
    return model.SerializeToString()


def write(folder, model, metadata):
    """Writes `model` in every format."""
    archive.save_model(model, folder / FORMATS["keras"], metadata)
    module = serving(model)
    saved = folder / FORMATS["saved_model"]
    save_tensorflow(module, saved)
    (saved / "assets.extra").mkdir()
    (saved / "assets.extra" / "keras_resnet.json").write_text(json.dumps(metadata))
    tflite, onnx = to_tflite(saved), to_onnx(module)
    (folder / FORMATS["tflite"]).write_bytes(checksums.add_tflite_checksum(tflite, metadata))
    (folder / FORMATS["onnx"]).write_bytes(checksums.add_onnx_checksum(onnx, metadata))
    # As others would have written them.
    (folder / "foreign.tflite").write_bytes(tflite)
    (folder / "foreign.onnx").write_bytes(onnx)


_written = []


def written(tmp_path_factory):
    """Returns the folder of the network in every format; writes it once a session."""
    if not _written:
        folder = tmp_path_factory.mktemp("exports")
        write(folder, build(), METADATA)
        _written.append(folder)
    return _written[0]
