"""Writes TFLite (LiteRT) files, for phones and small boards."""

import copy
import re

import flatbuffers
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from tensorflow.lite.python.convert import mlir_quantize
from tensorflow.lite.python.util import modify_model_io_type

from keras_resnet.exporters import graph
from keras_resnet.exporters.formats import PRECISIONS, least_halved
from keras_resnet.untrusted.checksums import add_tflite_checksum
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.progress import suppress_stderr


def _dynamic(converter):
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    # One scale for each output of a dense layer needs TensorFlow Lite 2.17; many boards have 2.14.
    converter._experimental_disable_per_channel_quantization_for_dense_layers = True


def _int8(converter):
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    # `_quantize` does the rest: the converter would quantize the resampling of the images, too.
    converter._experimental_calibrate_only = True


_CONVOLUTION = schema.BuiltinOperator.CONV_2D
_PRODUCTS = {schema.BuiltinOperator.BATCH_MATMUL, schema.BuiltinOperator.FULLY_CONNECTED}

# The converter's metadata entry: the first version of TensorFlow Lite with all of the operators.
_OLDEST_RUNTIME = b"min_runtime_version"
_DEQUANTIZE_RUNTIME = "1.15.0"

# precision -> settings of the converter beyond "built-in operators only".
_SETTINGS = {
    "float32": lambda converter: None,
    "float16": lambda converter: None,
    "dynamic": _dynamic,
    "int8": _int8,
    "integer": _int8,
}


def write(job, artifact, path):
    """Writes a .tflite file of built-in operators, with class names and metadata inside.

    Args:
        job: The `Job`.
        artifact: The `Artifact`.
        path: The file to write.

    Returns:
        The oldest TensorFlow Lite that runs it; None if unknown.

    Raises:
        InputError: If the network needs an operator that phones lack.
    """
    dtype = "float32" if artifact.precision == "integer" else None
    module = job.serving.module(artifact.batch, dtype)
    content = convert(module, artifact.precision, job.calibration)
    path.write_bytes(add_tflite_checksum(content, job.metadata))
    return oldest_runtime(content)


def convert(module, precision, images=()):
    """Converts a module's function `serve` to the bytes of a .tflite file.

    Args:
        module: The `ServedModule`.
        precision: A row of `formats.PRECISIONS`.
        images: For "int8": images that find the range of each tensor.

    Raises:
        InputError: If the network needs an operator that phones lack.
    """
    if precision == "float16":
        return halve(convert(module, "float32"))
    if precision == "float32":
        return module.converted("float32.tflite", lambda: _convert(module, precision, images))
    return _convert(module, precision, images)


def _convert(module, precision, images):
    with suppress_stderr():
        converter = tf.lite.TFLiteConverter.from_saved_model(module.save())
        # The default includes TensorFlow's own operators, which a phone does not have.
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
        _SETTINGS[precision](converter)
        if PRECISIONS[precision].is_calibrated:
            dtype = module.serve.input_signature[0].dtype.name
            converter.representative_dataset = lambda: (
                {graph.IMAGE: image[None].astype(dtype)} for image in images
            )
        try:
            content = bytes(converter.convert())
            if precision == "integer":
                return _quantize_completely(content)
            return _quantize(content) if precision == "int8" else content
        except Exception as error:
            raise InputError(f"TFLite cannot hold this network: {_reason(error)}") from error


def _quantize(calibrated):
    """Quantizes a calibrated .tflite model to 8 bits, but for matrix products that resize images.

    Their whole numbers need all bits of float32; so do the operators between them and the network.
    """
    model = schema.Model.GetRootAs(calibrated, 0)
    table = [model.OperatorCodes(i).BuiltinCode() for i in range(model.OperatorCodesLength())]
    subgraph = model.Subgraphs(0)
    operators = [subgraph.Operators(index) for index in range(subgraph.OperatorsLength())]
    kinds = [table[operator.OpcodeIndex()] for operator in operators]
    kept = []
    if _CONVOLUTION in kinds and _PRODUCTS & {*kinds[: kinds.index(_CONVOLUTION)]}:
        outputs = [operator.OutputsAsNumpy() for operator in operators[: kinds.index(_CONVOLUTION)]]
        kept = [subgraph.Tensors(i).Name().decode() for indices in outputs for i in indices]
    return bytes(mlir_quantize(calibrated, denylisted_nodes=kept))


def _quantize_completely(calibrated):
    """Quantizes a calibrated .tflite model of floats in 0 … 255 with its input and output."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(calibrated, 0))
    image = model.subgraphs[0].tensors[model.subgraphs[0].inputs[0]]
    # With the range of all grey levels a whole number stands for itself.
    image.quantization.min, image.quantization.max = [0.0], [255.0]
    quantized = mlir_quantize(_pack(model, len(calibrated)))
    return bytes(modify_model_io_type(quantized, tf.uint8, tf.uint8))


def oldest_runtime(content):
    """Returns the oldest TensorFlow Lite that runs a file; None if the converter recorded none.

    Args:
        content: The file, bytes.
    """
    model = schema.Model.GetRootAs(content, 0)
    for index in range(model.MetadataLength()):
        entry = model.Metadata(index)
        if entry.Name() == _OLDEST_RUNTIME:
            version = model.Buffers(entry.Buffer()).DataAsNumpy().tobytes()
            return f"TensorFlow Lite {version.rstrip(bytes(1)).decode('ascii')}"
    return None


def halve(content):
    """Stores the large weights of a .tflite file in half precision.

    The converter's own float16 includes the small ones, which cause most of the error.

    Args:
        content: A float32 model, bytes.

    Returns:
        The model, bytes; it computes in float32, like that of the converter.
    """
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    for subgraph in model.subgraphs:
        used = {index for operator in subgraph.operators for index in operator.inputs}
        sizes = {i: _count_floats(model, subgraph.tensors[i]) for i in sorted(used) if i >= 0}
        least = max(1, least_halved(sizes.values()))
        large = [index for index, size in sizes.items() if size >= least]
        halved = [_halve_tensor(model, subgraph, index) for index in large]
        subgraph.operators = [*halved, *subgraph.operators]
    _require_dequantize(model)
    return _pack(model, len(content))


def _pack(model, size):
    """Returns a model as a flatbuffer of about a size in bytes."""
    builder = flatbuffers.Builder(size)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _count_floats(model, tensor):
    """Returns the number of elements of a float32 constant; 0 for another tensor."""
    data = model.buffers[tensor.buffer].data
    return 0 if tensor.type != schema.TensorType.FLOAT32 or data is None else len(data) // 4


def _halve_tensor(model, subgraph, index):
    """Moves a constant into a new float16 tensor; returns the operator that restores it."""
    tensor = subgraph.tensors[index]
    halved = copy.copy(tensor)
    halved.name, halved.type = tensor.name + b"_half", schema.TensorType.FLOAT16
    buffer = model.buffers[tensor.buffer]
    buffer.data = np.asarray(buffer.data).view("float32").astype("float16").view("uint8")
    # Buffer 0 is the empty one.
    tensor.buffer = 0
    subgraph.tensors.append(halved)
    operator = schema.OperatorT()
    operator.opcodeIndex = _dequantize(model)
    operator.inputs, operator.outputs = [len(subgraph.tensors) - 1], [index]
    return operator


def _require_dequantize(model):
    """Raises the recorded version of the runtime to the first with DEQUANTIZE of float16."""
    for entry in model.metadata or ():
        if entry.name == _OLDEST_RUNTIME:
            buffer = model.buffers[entry.buffer]
            version = bytes(buffer.data).rstrip(bytes(1)).decode("ascii")
            newest = max(version, _DEQUANTIZE_RUNTIME, key=lambda v: [*map(int, v.split("."))])
            buffer.data = np.frombuffer(newest.encode("ascii").ljust(16, bytes(1)), "uint8")


def _dequantize(model):
    """Returns the index of DEQUANTIZE in the model's table of operators, adding it if missing."""
    code = schema.BuiltinOperator.DEQUANTIZE
    for index, kind in enumerate(model.operatorCodes):
        if kind.builtinCode == code:
            return index
    kind = schema.OperatorCodeT()
    kind.builtinCode = kind.deprecatedBuiltinCode = code
    kind.version = 3  # the first that takes float16
    model.operatorCodes.append(kind)
    return len(model.operatorCodes) - 1


def _reason(error):
    """Returns the reason of a converter's error in one line: missing operators, if it names any."""
    names = sorted(set(re.findall(r"tf\.(\w+)\(tensor", str(error))))
    if names:
        return f"it has no operator for {', '.join(names)}; build it of other layers"
    return one_line(error)
