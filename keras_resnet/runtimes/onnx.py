"""ONNX files, run by ONNX Runtime on the CPU."""

from pathlib import Path

import onnxruntime

from keras_resnet.runtimes import base
from keras_resnet.runtimes.base import Runtime, Tensor, count, only_one, reason
from keras_resnet.untrusted import checksums
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.tables import printable

_STANDARD = ("", "ai.onnx")
_ROLES = {
    **dict.fromkeys(("Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze"), base.PASSING),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), base.PASSING),
    **dict.fromkeys(("Conv", "Gemm", "LogSoftmax", "MatMul"), base.LOGITS),
    **dict.fromkeys(("Add", "Div", "Mul", "Sub"), base.ARITHMETIC),
    "Mean": base.AVERAGE,
    "Sigmoid": base.SIGMOID,
    "Softmax": base.SOFTMAX,
}
# ONNX Runtime's name of a type -> NumPy's.
_DTYPES = {
    "tensor(uint8)": "uint8",
    "tensor(int8)": "int8",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
}


def open_session(content, threads=None):
    """Returns ONNX Runtime's session for a model.

    Args:
        content: The file, bytes. A path would let the model name files beside it.
        threads: How many threads compute one batch; None for as many as there are cores.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised as exceptions
    options.intra_op_num_threads = threads or 0
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def open_bare(path, threads):
    """Returns a file's function from images to outputs, for a benchmark; see `tflite.open_bare`."""
    session = open_session(Path(path).read_bytes(), threads)
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


class OnnxRuntime(Runtime):
    """An .onnx file; see `Runtime`.

    Args:
        content: The file, bytes.
        path: Its path, for messages.
        threads: How many threads compute one batch.
    """

    format = "onnx"

    def __init__(self, content, path, threads=None):
        has_checksum = checksums.check_onnx_checksum(content, path)
        model = _parse(content, path)
        metadata = [(entry.key, entry.value) for entry in model.metadata_props]
        super().__init__(path, checksums.read_onnx_metadata(metadata, has_checksum, path), threads)
        self.operators = count(self._operators(model))
        producers = {
            output: (_ROLES.get(node.op_type), list(node.input))
            for node in model.graph.node
            for output in node.output
        }
        del model  # as large as the file
        try:
            self._session = open_session(content, threads)
        except Exception as error:
            raise InputError(f"{self.name}: cannot be loaded: {reason(error)}") from error
        self.input = self._tensor("input", self._session.get_inputs())
        self.output = self._tensor("output", self._session.get_outputs())
        self.graph_kind = base.kind_by_graph(
            self.output.name, lambda name: producers.get(name, (None, []))
        )

    def _operators(self, model):
        """Returns the operators' names; refuses custom ones, and tensors in other files."""
        names = []
        for message in _messages(model):
            kind = message.DESCRIPTOR.name
            if kind == "TensorProto" and (message.data_location or message.external_data):
                raise InputError(
                    f"{self.name}: tensors in other files are refused: save the model as one file"
                )
            if kind == "FunctionProto" or (kind == "NodeProto" and message.domain not in _STANDARD):
                named = f"{message.domain}.{getattr(message, 'op_type', message.name)}"
                raise InputError(
                    f"{self.name}: custom operators ({printable(named)[:80]}) are refused: the "
                    "model must have ONNX's own operators only"
                )
            if kind == "NodeProto":
                names.append(message.op_type)
        return names

    def _tensor(self, side, found):
        found = only_one(self.name, side, {each.name: each for each in found})
        # An open size is a name or None.
        shape = tuple(size if isinstance(size, int) else None for size in found.shape)
        if found.type not in _DTYPES:
            raise InputError(
                f"{self.name}: its {side} must hold uint8, int8 or floats, got {found.type}"
            )
        return Tensor(found.name, shape, _DTYPES[found.type])

    def call(self, images):
        """Returns the output for one batch."""
        return self._session.run([self.output.name], {self.input.name: images})[0]


def _parse(content, path):
    # A benchmark counts the memory that this module takes: it needs no parser.
    import onnx

    try:
        return onnx.load_model_from_string(content)
    except Exception as error:
        raise InputError(f"{path}: cannot be loaded: {reason(error)}") from error


def _messages(message):
    """Yields a protocol buffer message and all messages in it, at any depth."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(inner)
