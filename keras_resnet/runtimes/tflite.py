"""TFLite files, run by LiteRT."""

import dataclasses

import numpy as np

from keras_resnet.runtimes import base
from keras_resnet.runtimes.base import Runtime, Tensor, count, only_one, reason
from keras_resnet.untrusted import checksums
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.progress import suppress_stderr
from keras_resnet.utils.tables import printable

_ROLES = {
    **dict.fromkeys(("CAST", "DEQUANTIZE", "QUANTIZE", "RESHAPE", "SQUEEZE"), base.PASSING),
    **dict.fromkeys(("CONV_2D", "FULLY_CONNECTED", "LOG_SOFTMAX"), base.LOGITS),
    **dict.fromkeys(("ADD", "DIV", "MUL", "SUB"), base.ARITHMETIC),
    "LOGISTIC": base.SIGMOID,
    "SOFTMAX": base.SOFTMAX,
}


class TFLiteRuntime(Runtime):
    """A .tflite file; see `Runtime`.

    Args:
        content: The file, bytes.
        path: Its path, for messages.
        threads: How many threads compute one answer.
    """

    format = "tflite"

    def __init__(self, content, path, threads=None):
        super().__init__(path, checksums.read_tflite_seal(content, path), threads)
        self._interpreter = self._open(content)
        self.operators = count(self._operators(content))
        ends = (self._interpreter.get_input_details(), self._interpreter.get_output_details())
        self._in, self._out = (
            only_one(path, what, {each["index"]: each for each in found})
            for what, found in zip(("input", "output"), ends, strict=True)
        )
        keys = self._signature()
        self.input = _tensor(self._in, keys["inputs"])
        self.output = _tensor(self._out, keys["outputs"])
        if _is_quantized(self._in):
            # Asked for the numbers that its integers stand for.
            ends = np.iinfo(self._in["dtype"])
            self.input_range = tuple(_dequantized(np.array([ends.min, ends.max]), self._in))
            self.input = dataclasses.replace(self.input, dtype="float32")
        self.graph_kind = self._kind()
        self._batch = None

    def _open(self, content):
        from ai_edge_litert.interpreter import Interpreter

        try:
            # None would be one thread for each core and operator.
            return Interpreter(model_content=content, num_threads=self.threads)
        except Exception as error:
            raise InputError(f"{self.name}: cannot be loaded: {reason(error)}") from error

    def _operators(self, content):
        """Returns the name of each operator, of all subgraphs; refuses those of others."""
        from ai_edge_litert import schema_py_generated as schema

        names = {
            code: name for name, code in vars(schema.BuiltinOperator).items() if name[0] != "_"
        }
        model = schema.Model.GetRootAs(content, 0)
        kinds = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
        custom = [kind.CustomCode() or b"" for kind in kinds if _code(kind) == _code_of(schema)]
        if custom:
            shown = ", ".join(printable(name.decode("utf-8", "replace"))[:40] for name in custom)
            raise InputError(
                f"{self.name}: custom operators ({shown}) are refused: a phone has none of them; "
                "convert with built-in operators only"
            )
        found = []
        for i in range(model.SubgraphsLength()):
            graph = model.Subgraphs(i)
            for j in range(graph.OperatorsLength()):
                code = _code(kinds[graph.Operators(j).OpcodeIndex()])
                found.append(names.get(code, f"operator {code}"))
        return found

    def _signature(self):
        """Returns the names that the only signature gives to input and output."""
        signatures = list(self._interpreter.get_signature_list().values())
        return signatures[0] if len(signatures) == 1 else {"inputs": [], "outputs": []}

    def _kind(self):
        producers = {}
        for operator in self._interpreter._get_ops_details():
            inputs = [int(i) for i in operator["inputs"]]
            for output in operator["outputs"]:
                producers[int(output)] = (_ROLES.get(operator["op_name"]), inputs)
        last = int(self._out["index"])
        return base.kind_by_graph(last, lambda index: producers.get(index, (None, [])))

    def call(self, images):
        """Returns the output for one batch."""
        interpreter = self._interpreter
        if self._batch != images.shape:
            # LiteRT says on standard error that it has a delegate.
            with suppress_stderr():
                if tuple(self._in["shape"]) != images.shape or self._batch:
                    interpreter.resize_tensor_input(self._in["index"], images.shape)
                interpreter.allocate_tensors()
            self._batch = images.shape
        if _is_quantized(self._in):
            images = _quantized(images, self._in)
        interpreter.set_tensor(self._in["index"], images)
        interpreter.invoke()
        return _dequantized(interpreter.get_tensor(self._out["index"]), self._out)


def _code(kind):
    # A file from before operator 127 has the first alone.
    return max(kind.DeprecatedBuiltinCode(), kind.BuiltinCode())


def _code_of(schema):
    return schema.BuiltinOperator.CUSTOM


def _tensor(details, names):
    # Its shape as it is now has 1 for what can be of any size.
    sizes = details["shape_signature"] if len(details["shape_signature"]) else details["shape"]
    shape = tuple(None if size < 0 else int(size) for size in sizes)
    name = names[0] if len(names) == 1 else details["name"]
    return Tensor(name, shape, np.dtype(details["dtype"]).name)


def _is_quantized(details):
    # An input of plain integers, such as raw images, has the scale 0.
    return np.dtype(details["dtype"]).kind in "iu" and details["quantization"][0] != 0


def _quantized(numbers, details):
    """Returns the integers that stand for numbers, the nearest ones."""
    scale, zero = details["quantization"]
    ends = np.iinfo(details["dtype"])
    rounded = np.round(numbers / scale) + zero
    return np.clip(rounded, ends.min, ends.max).astype(details["dtype"])


def _dequantized(answers, details):
    """Returns what a full-integer model's numbers stand for."""
    if answers.dtype.kind not in "iu":
        return answers
    scale, zero = details["quantization"]
    return ((answers.astype("float32") - zero) * (scale or 1)).astype("float32")
