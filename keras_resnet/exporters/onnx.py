"""Writes ONNX files, for ONNX Runtime and the tools of most accelerators."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import tf2onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)

from keras_resnet import __version__
from keras_resnet.exporters import graph
from keras_resnet.exporters.formats import least_halved
from keras_resnet.untrusted.checksums import add_onnx_checksum
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.progress import suppress_stderr

OPSET = 17

# Released in 2022; the first that reads opset 17.
_OLDEST_RUNTIME = "ONNX Runtime 1.12"

# The names of an image tensor's sizes that are open.
_AXES = ("batch", "height", "width")
_SMALLEST = np.array(np.finfo("float32").tiny)


def write(job, artifact, path):
    """Writes an .onnx file of standard operators, with class names and provenance inside.

    Args:
        job: The `Job`.
        artifact: The `Artifact`.
        path: The file to write.

    Returns:
        The oldest ONNX Runtime that reads it; the same for all files, by their opset.

    Raises:
        InputError: If the network needs an operator that ONNX does not have.
    """
    proto = convert(job.serving.module(artifact.batch), artifact.precision, job.calibration)
    path.write_bytes(add_onnx_checksum(proto.SerializeToString(), job.metadata, job.provenance))
    return _OLDEST_RUNTIME


def convert(module, precision, images=()):
    """Converts a module's function `serve` to an ONNX model.

    Args:
        module: The `ServedModule`.
        precision: "float32", "float16" or "int8".
        images: For "int8": images that find the range of each tensor.

    Returns:
        An `onnx.ModelProto`.

    Raises:
        InputError: If the network needs an operator that ONNX does not have.
    """
    with suppress_stderr():
        try:
            folded = module.converted("folded.onnx", lambda: _convert_folded(module))
            proto = _PRECISIONS[precision](onnx.load_model_from_string(folded), images)
        except Exception as error:
            raise InputError(f"ONNX cannot hold this network: {one_line(error)}") from error
    return _tidy(proto)


def _convert_folded(module):
    """Returns the float32 model that all precisions start from, serialized.

    BatchNormalization and padding are folded into the convolutions by ONNX Runtime; its basic level
    writes standard operators only, the levels above it do not.
    """
    signature = module.serve.input_signature
    proto, _ = tf2onnx.convert.from_function(module.serve, input_signature=signature, opset=OPSET)
    _keep_padding_before_pooling(proto)
    _keep_sizes_of_resizes(proto)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "folded.onnx"
        options.optimized_model_filepath = str(path)
        content = proto.SerializeToString()
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        return path.read_bytes()


def _keep_padding_before_pooling(proto):
    """Keeps ONNX Runtime from folding a `Pad` of zeros into `MaxPool`, which pads with -inf.

    The two are the same behind a ReLU only. ONNX Runtime does not fold a `Pad` of the smallest
    positive number, which changes no maximum.
    """
    makers = {name: node for node in proto.graph.node for name in node.output}
    constants = {constant.name: constant for constant in proto.graph.initializer}
    for pool in [node for node in proto.graph.node if node.op_type == "MaxPool"]:
        pad = makers.get(pool.input[0])
        if pad is None or pad.op_type != "Pad" or not _pads_with_zeros(pad, constants):
            continue
        before = makers.get(pad.input[0])
        if before is None or before.op_type != "Relu":
            value = onnx.numpy_helper.from_array(_SMALLEST, f"{pad.name}_value")
            proto.graph.initializer.append(value)
            pad.input[:] = [*pad.input[:2], value.name]


def _pads_with_zeros(pad, constants):
    value = constants.get(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else None
    return value is None or not onnx.numpy_helper.to_array(value).any()


def _keep_sizes_of_resizes(proto):
    """Rounds scales up where needed: 23 pixels times float32(28 / 23) are 27.99, and become 27."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    known = onnx.shape_inference.infer_shapes(proto).graph
    shapes = {
        value.name: value.type.tensor_type.shape for value in (*known.value_info, *known.input)
    }
    for node in [node for node in proto.graph.node if node.op_type == "Resize"]:
        tensor = constants.get(node.input[2]) if len(node.input) == 3 else None
        if tensor is None or node.input[0] not in shapes:
            continue
        sizes = np.array([each.dim_value or 1 for each in shapes[node.input[0]].dim], "float32")
        scales = onnx.numpy_helper.to_array(tensor)
        short = np.floor(scales * sizes) < np.rint(scales * sizes)
        scales = np.where(short, np.nextafter(scales, np.float32(np.inf)), scales)
        tensor.CopyFrom(onnx.numpy_helper.from_array(scales, tensor.name))


def _float16(proto, images):
    """Stores the large weights in half precision; the model computes in float32 as before.

    Few processors add in half precision, and the error would be beyond the tolerance.
    """
    arrays = [(each, onnx.numpy_helper.to_array(each)) for each in proto.graph.initializer]
    floats = [(tensor, weights) for tensor, weights in arrays if weights.dtype == np.float32]
    least = least_halved([weights.size for _, weights in floats])
    casts = []
    for tensor, weights in floats:
        if weights.size < least:
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(weights.astype("float16"), f"{name}_half"))
        cast = onnx.helper.make_node(
            "Cast", [tensor.name], [name], f"{name}_cast", to=onnx.TensorProto.FLOAT
        )
        casts.append(cast)
    nodes = [*casts, *proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    return proto


def _int8(proto, images):
    """Quantizes to 8 bits: activations unsigned, weights signed with a scale for each filter.

    Signed activations would be three times slower on x86 (VNNI multiplies unsigned by signed).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_static(
            proto,
            str(path),
            _Calibration(images),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            nodes_to_exclude=[
                *_preparation(proto),
                *(node.name for node in proto.graph.node if node.op_type == "Softmax"),
            ],
        )
        return onnx.load(path)


# precision -> function of the folded model and the calibration images that returns a model.
_PRECISIONS = {"float32": lambda proto, images: proto, "float16": _float16, "int8": _int8}


class _Calibration(CalibrationDataReader):
    """Gives images to the quantizer one by one."""

    def __init__(self, images):
        self._images = iter(images)

    def get_next(self):
        image = next(self._images, None)
        return None if image is None else {graph.IMAGE: image[None]}


def _preparation(proto):
    """Returns the names of the nodes that prepare images: those before the first with weights."""
    operators = [node.op_type for node in proto.graph.node]
    # Matrix products before a convolution resize images.
    weighted = {"Conv"} if "Conv" in operators else {"Gemm", "MatMul"}
    first = next((i for i, name in enumerate(operators) if name in weighted), len(operators))
    return [node.name for node in proto.graph.node[:first]]


def _tidy(proto):
    """Returns the model with names, open sizes named as in `_AXES`, and no unused domains."""
    for end in [*proto.graph.input, *proto.graph.output]:
        for size, name in zip(end.type.tensor_type.shape.dim, _AXES, strict=False):
            if not size.HasField("dim_value"):
                size.dim_param = name
    del proto.graph.value_info[:]  # shape inference below computes it again
    used = {node.domain for node in proto.graph.node}
    kept = [opset for opset in proto.opset_import if opset.domain in used]
    del proto.opset_import[:]
    proto.opset_import.extend(kept)
    proto.producer_name = "keras-resnet-edge"
    proto.producer_version = __version__
    proto.graph.name = "keras_resnet"
    proto.doc_string = proto.graph.doc_string = ""
    proto = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    # A `Resize` loses the batch: later tensors would have dimensions called "unk__0".
    known = [value for value in proto.graph.value_info if not _has_unknown_size(value)]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(known)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def _has_unknown_size(value):
    sizes = value.type.tensor_type.shape.dim
    return any(size.dim_param.startswith("unk__") for size in sizes)
