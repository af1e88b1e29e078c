"""SavedModel folders, run by TensorFlow."""

import dataclasses
import json
from pathlib import Path

import tensorflow as tf

from keras_resnet.runtimes import base
from keras_resnet.runtimes.base import Runtime, Tensor, count, only_one, reason
from keras_resnet.runtimes.remote import Remote, RemoteError
from keras_resnet.untrusted import checksums
from keras_resnet.untrusted.zip_files import MAX_MEMBER_BYTES
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
# Nodes for arguments and results, which compute nothing.
_NO_OPERATORS = {"Placeholder", "NoOp", "Const", *_CALLS}


class SavedModelRuntime(Runtime):
    """A SavedModel's signature `serving_default`; see `Runtime`.

    Loading a SavedModel can run code: see `open_runtime`.

    Args:
        path: The folder.
        threads: Kept for the record: TensorFlow's threads are those of its process.
    """

    format = "saved_model"

    def __init__(self, path, threads=None):
        super().__init__(path, _read_metadata(Path(path)), threads)
        self._loaded, self._function = load_signature(path)
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
        # NumPy has no bfloat16 of its own.
        outputs = self._function(**{self.input.name: tf.constant(images)})[self.output.name]
        return (tf.cast(outputs, tf.float32) if outputs.dtype == tf.bfloat16 else outputs).numpy()


class IsolatedSavedModel(Runtime):
    """A trusted SavedModel in a process that can import neither Keras nor this package.

    Args:
        path: The folder.
        threads: How many threads TensorFlow computes in; None for its own choice.

    Raises:
        InputError: If it cannot be loaded there.
    """

    format = "saved_model"

    def __init__(self, path, threads=None):
        self.path = path
        self._remote = Remote(
            f"{__name__}:_Isolated",
            {"path": str(path), "threads": threads},
            environment={"TF_CPP_MIN_LOG_LEVEL": "3"},
            blocked=("keras", "tf_keras", "keras_resnet"),
        )
        try:
            facts = self._ask("describe")
        except BaseException:
            self.close()
            raise
        super().__init__(path, facts["metadata"], threads)
        self.input, self.output = (
            Tensor(**{**facts[end], "shape": tuple(facts[end]["shape"])})
            for end in ("input", "output")
        )
        self.operators, self.graph_kind = facts["operators"], facts["graph_kind"]

    def _ask(self, method, *images):
        try:
            return self._remote.call(method, *images)
        except RemoteError as error:
            raise InputError(
                f"{self.path}: a process without Keras cannot run it: {error}"
            ) from error

    def call(self, images):
        """Returns the output for one batch."""
        return self._ask("call", images)

    def time(self, images):
        """Returns how many seconds a batch takes in the process."""
        self.run(images)
        return self._remote.seconds

    def close(self):
        """Ends the process."""
        self._remote.close()


class _Isolated(SavedModelRuntime):
    """The object in the process of an `IsolatedSavedModel`."""

    def __init__(self, path, threads):
        set_tensorflow_threads(threads)
        super().__init__(path, threads)

    def describe(self):
        """Returns everything that is known about the model, as JSON values."""
        return {
            **{name: getattr(self, name) for name in ("metadata", "operators", "graph_kind")},
            **{end: dataclasses.asdict(getattr(self, end)) for end in ("input", "output")},
        }


def set_tensorflow_threads(threads):
    """Sets how many threads TensorFlow computes in, before its first operation; None: its choice.

    Args:
        threads: A number, or None.
    """
    if threads:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)


def load_signature(path):
    """Loads a SavedModel.

    Args:
        path: The folder.

    Returns:
        The loaded object, and the function of the signature `SIGNATURE`, which works only while
        the object exists.

    Raises:
        InputError: If it cannot be loaded, or has no such signature.
    """
    try:
        loaded = tf.saved_model.load(str(path))
        signatures = dict(loaded.signatures)
    except Exception as error:
        raise InputError(f"{path}: cannot be loaded: {reason(error)}") from error
    if SIGNATURE not in signatures:
        raise InputError(f"{path}: it must have the signature {SIGNATURE}, got {list(signatures)}")
    return loaded, signatures[SIGNATURE]


def open_bare(path, threads):
    """Returns a SavedModel's function, for a benchmark; see `tflite.open_bare`."""
    set_tensorflow_threads(threads)
    loaded, serve = load_signature(path)
    (name,) = serve.structured_input_signature[1]

    def run(images, loaded=loaded):  # which must exist as long as the function
        (output,) = serve(**{name: tf.constant(images)}).values()
        return output.numpy()

    return run


def _read_metadata(folder):
    path = folder / METADATA
    if not path.is_file():
        return {}
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_MEMBER_BYTES + 1)
        if len(content) > MAX_MEMBER_BYTES:
            raise ValueError(f"larger than {MAX_MEMBER_BYTES} bytes")
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
    """Yields the name of each operator, also those in the functions that are called."""
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
    """Returns node name -> (role, inputs) for `base.kind_by_graph`; a call passes its result on."""
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
    """Returns a node's name after the name of its function, without the number of its output."""
    node = name.split(":")[0]
    return f"{scope}/{node}" if scope else node
