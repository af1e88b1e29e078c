"""SavedModel folders, run by TensorFlow."""

import json
from pathlib import Path

from keras_resnet.runtimes import base
from keras_resnet.runtimes.base import Runtime, Tensor, count, only_one, reason
from keras_resnet.untrusted import checksums
from keras_resnet.utils.errors import InputError

METADATA = Path("assets.extra") / checksums.METADATA
SIGNATURE = "serving_default"

_CALLS = {"PartitionedCall", "StatefulPartitionedCall"}
_ROLES = {
    **dict.fromkeys(("Cast", "Identity", "Reshape", "Squeeze"), base.PASSING),
    **dict.fromkeys(("BiasAdd", "Conv2D", "LogSoftmax", "MatMul"), base.LOGITS),
    **dict.fromkeys(("Add", "AddV2", "Mul", "RealDiv", "Sub"), base.ARITHMETIC),
    "Sigmoid": base.SIGMOID,
    "Softmax": base.SOFTMAX,
}
# They stand for arguments and results, and compute nothing.
_NO_OPERATORS = {"Placeholder", "NoOp", "Const", *_CALLS}


class SavedModelRuntime(Runtime):
    """A SavedModel's signature `serving_default`; see `Runtime`.

    Args:
        path: The folder.
        threads: Kept for the record: TensorFlow's threads are those of its process.
    """

    format = "saved_model"

    def __init__(self, path, threads=None):
        super().__init__(path, _read_card(Path(path)), threads)
        self._loaded, self._function = _open(path)
        _, arguments = self._function.structured_input_signature
        outputs = self._function.structured_outputs
        argument = only_one(path, "input", {name: name for name in sorted(arguments)})
        output = only_one(path, "output", {name: name for name in sorted(outputs)})
        self.input = _tensor(argument, arguments[argument])
        self.output = _tensor(output, outputs[output])
        graph = self._function.graph.as_graph_def()
        functions = {each.signature.name: each for each in graph.library.function}
        self.operators = count(_operators(graph.node, functions))
        producers = _producers(graph.node, functions)
        self.graph_kind = base.kind_by_graph(
            self._function.outputs[0].op.name, lambda name: producers.get(name, (None, []))
        )

    def call(self, images):
        """Returns the output for one batch."""
        import tensorflow as tf

        # NumPy has no bfloat16 of its own.
        answers = self._function(**{self.input.name: tf.constant(images)})[self.output.name]
        return (tf.cast(answers, tf.float32) if answers.dtype == tf.bfloat16 else answers).numpy()


def _open(path):
    """Returns what is loaded, which must be kept, and the signature's function."""
    import tensorflow as tf

    try:
        loaded = tf.saved_model.load(str(path))
        signatures = dict(loaded.signatures)
    except Exception as error:
        raise InputError(f"{path}: cannot be loaded: {reason(error)}") from error
    if SIGNATURE not in signatures:
        raise InputError(f"{path}: it must have the signature {SIGNATURE}, has {list(signatures)}")
    return loaded, signatures[SIGNATURE]


def _read_card(folder):
    path = folder / METADATA
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            content = file.read(checksums.MAX_MEMBER_BYTES + 1)
        if len(content) > checksums.MAX_MEMBER_BYTES:
            raise ValueError(f"larger than {checksums.MAX_MEMBER_BYTES} bytes")
        metadata = json.loads(content)
        if not isinstance(metadata, dict):
            raise ValueError("it must be a JSON object")
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"{path}: damaged: {reason(error)}") from error
    return metadata


def _tensor(name, spec):
    shape = spec.shape.as_list() if spec.shape.rank is not None else []
    return Tensor(name, tuple(shape), spec.dtype.name)


def _operators(nodes, functions, above=()):
    """Yields the name of each operator, of the functions that are called too."""
    for node in nodes:
        if node.op not in _NO_OPERATORS:
            yield node.op
        for called in _called(node):
            if called in functions and called not in above:
                yield from _operators(functions[called].node_def, functions, (*above, called))


def _called(node):
    """Returns the names of the functions in a node's attributes."""
    return [value.func.name for value in node.attr.values() if value.WhichOneof("value") == "func"]


def _producers(nodes, functions):
    """Returns name of a node -> what `base.kind_by_graph` looks up; calls are seen through."""
    found = {}
    for scope, inside in [("", nodes), *((name, f.node_def) for name, f in functions.items())]:
        for node in inside:
            called = functions.get(next(iter(_called(node)), None))
            if node.op in _CALLS and called is not None and called.ret:
                result = called.ret[called.signature.output_arg[0].name]
                role, inputs = base.PASSING, [_scoped(called.signature.name, result)]
            else:
                role, inputs = _ROLES.get(node.op), [_scoped(scope, name) for name in node.input]
            found[_scoped(scope, node.name)] = (role, inputs)
    return found


def _scoped(scope, name):
    """Returns a node's name with the function it is in, without the number of its output."""
    node = name.split(":")[0]
    return f"{scope}/{node}" if scope else node


def open_saved_model(path, threads=None):
    """Loads a SavedModel folder. It is code: see `open_runtime`."""
    return SavedModelRuntime(path, threads)
