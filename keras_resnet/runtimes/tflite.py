"""TFLite files, run by LiteRT."""

import dataclasses

import numpy as np
from ai_edge_litert import interpreter as litert

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


class Interpreter:
    """LiteRT's interpreter of a model with one input and one output, for batches of any size.

    Args:
        source: The file, bytes; or its path, a string, which LiteRT maps into memory.
        threads: How many threads compute one batch; None for LiteRT's choice.

    Attributes:
        litert: LiteRT's own `Interpreter`.
        inputs: Its `get_input_details()`.
        outputs: Its `get_output_details()`.
    """

    def __init__(self, source, threads=None):
        given = {"model_content" if isinstance(source, bytes) else "model_path": source}
        self.litert = litert.Interpreter(**given, num_threads=threads)
        self.inputs = self.litert.get_input_details()
        self.outputs = self.litert.get_output_details()
        self._shape = None

    def allocate(self, shape=None):
        """Prepares for batches of a shape, by default the one in the file."""
        own = tuple(self.inputs[0]["shape"])
        shape = shape or own
        if shape == self._shape:
            return
        # LiteRT writes to standard error that it has created a delegate.
        with suppress_stderr():
            if shape != (self._shape or own):
                self.litert.resize_tensor_input(self.inputs[0]["index"], shape)
            self.litert.allocate_tensors()
        self._shape = shape

    def run(self, images):
        """Returns the output for one batch of the input's type."""
        self.allocate(images.shape)
        self.litert.set_tensor(self.inputs[0]["index"], images)
        self.litert.invoke()
        return self.litert.get_tensor(self.outputs[0]["index"])


def open_bare(path, threads):
    """Returns a file's function from images to outputs, for a benchmark; nothing is checked.

    Args:
        path: The file.
        threads: How many threads compute one batch.
    """
    interpreter = Interpreter(path, threads)
    interpreter.allocate()
    return interpreter.run


class TFLiteRuntime(Runtime):
    """A .tflite file; see `Runtime`.

    Args:
        content: The file, bytes.
        path: Its path, for messages.
        threads: How many threads compute one batch.
    """

    format = "tflite"

    def __init__(self, content, path, threads=None):
        super().__init__(path, checksums.read_tflite_metadata(content, path), threads)
        try:
            self._interpreter = Interpreter(content, threads)
        except Exception as error:
            raise InputError(f"{self.name}: cannot be loaded: {reason(error)}") from error
        self.operators = count(self._operators(content))
        ends = (self._interpreter.inputs, self._interpreter.outputs)
        self._in, self._out = (
            only_one(path, side, {each["index"]: each for each in found})
            for side, found in zip(("input", "output"), ends, strict=True)
        )
        signatures = list(self._interpreter.litert.get_signature_list().values())
        names = signatures[0] if len(signatures) == 1 else {"inputs": [], "outputs": []}
        self.input = _tensor(self._in, names["inputs"])
        self.output = _tensor(self._out, names["outputs"])
        if _is_quantized(self._in):
            # `call` takes the numbers that the integers stand for.
            ends = np.iinfo(self._in["dtype"])
            self.input_range = tuple(_dequantize(np.array([ends.min, ends.max]), self._in))
            self.input = dataclasses.replace(self.input, dtype="float32")
        self.graph_kind = self._kind()

    def _operators(self, content):
        """Returns the name of each operator in all subgraphs; refuses custom operators."""
        # A benchmark counts the memory that this module takes: it needs no parser.
        from ai_edge_litert import schema_py_generated as schema

        builtin = schema.BuiltinOperator
        names = {code: name for name, code in vars(builtin).items() if name[0] != "_"}
        model = schema.Model.GetRootAs(content, 0)
        kinds = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
        # Files written before there were 127 operators have the deprecated code alone.
        codes = [max(kind.DeprecatedBuiltinCode(), kind.BuiltinCode()) for kind in kinds]
        custom = [
            printable((kind.CustomCode() or b"").decode("utf-8", "replace"))[:40]
            for kind, code in zip(kinds, codes, strict=True)
            if code == builtin.CUSTOM
        ]
        if custom:
            raise InputError(
                f"{self.name}: custom operators ({', '.join(custom)}) are refused: a phone has "
                "none of them; convert with built-in operators only"
            )
        found = []
        for i in range(model.SubgraphsLength()):
            graph = model.Subgraphs(i)
            for j in range(graph.OperatorsLength()):
                code = codes[graph.Operators(j).OpcodeIndex()]
                found.append(names.get(code, f"operator {code}"))
        return found

    def _kind(self):
        producers = {}
        for operator in self._interpreter.litert._get_ops_details():
            inputs = [int(i) for i in operator["inputs"]]
            for output in operator["outputs"]:
                producers[int(output)] = (_ROLES.get(operator["op_name"]), inputs)
        last = int(self._out["index"])
        return base.kind_by_graph(last, lambda index: producers.get(index, (None, [])))

    def call(self, images):
        """Returns the output for one batch."""
        if _is_quantized(self._in):
            images = _quantize(images, self._in)
        return _dequantize(self._interpreter.run(images), self._out)


def _tensor(details, names):
    # "shape" has 1 where "shape_signature" says that any size is allowed.
    sizes = details["shape_signature"] if len(details["shape_signature"]) else details["shape"]
    shape = tuple(None if size < 0 else int(size) for size in sizes)
    name = names[0] if len(names) == 1 else details["name"]
    return Tensor(name, shape, np.dtype(details["dtype"]).name)


def _is_quantized(details):
    # An input of plain integers, such as raw images, has the scale 0. With the scale 1 and the zero
    # point 0 the integers stand for themselves, too.
    is_plain = tuple(details["quantization"]) in ((0, 0), (1, 0))
    return np.dtype(details["dtype"]).kind in "iu" and not is_plain


def _quantize(numbers, details):
    """Returns the nearest integers that stand for numbers."""
    scale, zero = details["quantization"]
    ends = np.iinfo(details["dtype"])
    rounded = np.round(numbers / scale) + zero
    return np.clip(rounded, ends.min, ends.max).astype(details["dtype"])


def _dequantize(outputs, details):
    """Returns the numbers that a full-integer model's outputs stand for."""
    if outputs.dtype.kind not in "iu":
        return outputs
    scale, zero = details["quantization"]
    return ((outputs.astype("float32") - zero) * (scale or 1)).astype("float32")
