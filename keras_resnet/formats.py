"""The file formats of models, as data. To add one, add a row and its modules.

A row's module in `keras_resnet.runtimes` opens its files, and `open_bare` in it serves the
benchmark. The module of `keras_resnet.exporters` with the row's name writes them: `write(job,
artifact, path)`. Nothing heavy is imported here.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format of models.

    Attributes:
        module: The module in `keras_resnet.runtimes`.
        opener: The class or function in it that returns a `Runtime`: of (path, threads), or of
            (content, path, threads) for a format with a `parser`.
        library: Distribution and name of the library that runs it.
        suffixes: The suffixes of its files; none for a folder.
        parser: The module that parses untrusted bytes, for a format whose files are read whole and
            first tried in another process; see `runtimes.probe`.
        checksum: The function of `untrusted.checksums` that compares the checksum in such a file.
        runs_code: Whether loading a file can run code in it, so that it must be trusted.
        isolated: The class in the module that runs it in a process without Keras; None if its own
            opener is used for verification.
        converters: Distributions that an export uses in addition to the library.
        file: Pattern of an artifact's name.
        precisions: Rows of `exporters.formats.PRECISIONS`; none for a format that is only read.
        batches: Batch sizes; None is any.
    """

    module: str
    opener: str
    library: tuple[str, str]
    suffixes: tuple[str, ...] = ()
    parser: str | None = None
    checksum: str | None = None
    runs_code: bool = False
    isolated: str | None = None
    converters: tuple[str, ...] = ()
    file: str = ""
    precisions: tuple[str, ...] = ()
    batches: tuple[int | None, ...] = (None,)


FORMATS = {
    "keras": Format(
        "keras_file",
        "open_keras",
        ("keras", "Keras"),
        # The opener says why HDF5 is refused.
        suffixes=(".keras", ".h5", ".hdf5"),
    ),
    "saved_model": Format(
        "saved_model",
        "SavedModelRuntime",
        ("tensorflow", "TensorFlow"),
        runs_code=True,
        isolated="IsolatedSavedModel",
        file="saved_model",
        precisions=("float32",),
    ),
    "tflite": Format(
        "tflite",
        "TFLiteRuntime",
        ("ai-edge-litert", "LiteRT"),
        suffixes=(".tflite",),
        parser="ai_edge_litert.schema_py_generated",
        checksum="read_tflite_metadata",
        file="model-{precision}{batch}.tflite",
        precisions=("float32", "float16", "dynamic", "int8", "integer"),
        # Runtimes that need static shapes: LiteRT.js, accelerators.
        batches=(None, 1),
    ),
    "onnx": Format(
        "onnx",
        "OnnxRuntime",
        ("onnxruntime", "ONNX Runtime"),
        suffixes=(".onnx",),
        parser="onnx",
        checksum="check_onnx_checksum",
        converters=("tf2onnx", "onnx"),
        file="model-{precision}.onnx",
        precisions=("float32", "float16", "int8"),
    ),
}

EXPORTED = {name: row for name, row in FORMATS.items() if row.precisions}
"""The formats that an export writes."""


def find_format(path):
    """Returns the row of `FORMATS` that a path's suffix names; None for another suffix.

    Args:
        path: A `Path`; it need not exist.

    Example:
        >>> from pathlib import Path
        >>> find_format(Path("model-int8.TFLITE")), find_format(Path("model.pth"))
        ('tflite', None)
    """
    suffix = path.suffix.lower()
    return next((name for name, row in FORMATS.items() if suffix in row.suffixes), None)
