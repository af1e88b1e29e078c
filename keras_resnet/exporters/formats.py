"""The precisions of exports, the tolerances that artifacts must keep, and the artifacts.

Command line, checks and tests read these tables; nothing heavy is imported here.
"""

import collections.abc
import dataclasses

from keras_resnet.formats import EXPORTED
from keras_resnet.untrusted.manifest import MANIFEST
from keras_resnet.utils.errors import InputError, look_up


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far the predictions of an artifact may be from those of its Keras model, on test images.

    Attributes:
        max_difference: Largest difference of any probability; None for no limit.
        agreement: Smallest share of the images with the same most probable class.
        accuracy_drop: Largest drop of the accuracy, as a share (0.003 is 0.3 points); None for
            no limit.
    """

    max_difference: float | None
    agreement: float
    accuracy_drop: float | None


@dataclasses.dataclass(frozen=True)
class Precision:
    """The number types that an artifact stores and computes in.

    Attributes:
        description: In a few words.
        tolerance: The `Tolerance` of its artifacts.
        is_calibrated: Whether training images are run through the network to find the range of
            each tensor.
        on_request: Whether an export writes it only where it is named.
        output: The dtype of the artifact's output.
    """

    description: str
    tolerance: Tolerance
    is_calibrated: bool = False
    on_request: bool = False
    output: str = "float32"


PRECISIONS = {
    "float32": Precision("weights and sums as trained", Tolerance(1e-5, 1.0, None)),
    "float16": Precision("weights in half precision", Tolerance(2e-3, 0.999, None)),
    "dynamic": Precision(
        "weights in 8 bits, ranges found per image", Tolerance(None, 0.985, 0.003)
    ),
    "int8": Precision(
        "weights and activations in 8 bits, ranges from training images",
        Tolerance(None, 0.985, 0.003),
        is_calibrated=True,
    ),
    "integer": Precision(
        "as int8, with whole numbers at the output, too, for hardware without floats; written "
        "only on request",
        Tolerance(None, 0.985, 0.003),
        is_calibrated=True,
        on_request=True,
        output="uint8",
    ),
}


def least_halved(sizes):
    """Returns the smallest size of a tensor that float16 stores in half precision.

    Biases, the stem and the head are less than 1 % of a file, and cause most of the error.

    Args:
        sizes: The number of elements of each tensor of the network.

    Example:
        >>> least_halved([11_000_000, 512]), least_halved([2_000, 16])
        (16384, 20)
    """
    return min(2**14, sum(sizes) // 100)


BATCH_SIZES = (1, 2, 7)
"""The batch sizes that verification runs every artifact with."""

WEB = "web"
"""What `export --to` calls the page of `exporters.web`, which is no file format."""

REFERENCE = "reference.npz"
LABELS = "labels.txt"
BENCHMARK = ("benchmark.json", "benchmark.png")
OWN_FILES = (MANIFEST, REFERENCE, LABELS, *BENCHMARK)
"""Files of an export folder beside the artifacts."""


@dataclasses.dataclass(frozen=True)
class Artifact:
    """One file to write (a folder, for a SavedModel).

    Attributes:
        format: A row of `formats.EXPORTED`.
        precision: A row of `PRECISIONS`.
        batch: Its batch size; None for any.
    """

    format: str
    precision: str
    batch: int | None = None

    @property
    def file(self):
        """The name of the file in the export folder."""
        batch = f"-batch{self.batch}" if self.batch else ""
        return EXPORTED[self.format].file.format(precision=self.precision, batch=batch)


def choose_artifacts(formats=None, precisions=None):
    """Returns the `Artifact`s of some formats and precisions, in the order of the tables.

    Args:
        formats: Rows of `formats.EXPORTED`; None for all.
        precisions: Rows of `PRECISIONS`; None for all of each format that need no request.

    Raises:
        InputError: If a name is not in its table, or no artifact would have it.

    Example:
        >>> [artifact.file for artifact in choose_artifacts(["onnx"], ["float32", "int8"])]
        ['model-float32.onnx', 'model-int8.onnx']
        >>> choose_artifacts(["saved_model"], ["int8"])
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: saved_model comes in float32, not in int8
    """
    named = _rows(EXPORTED, formats, "to")
    wanted = _rows(PRECISIONS, precisions, "precision")
    if precisions is None:
        wanted = [name for name in wanted if not PRECISIONS[name].on_request]
    chosen = [
        Artifact(name, precision, batch)
        for name in named
        for precision in EXPORTED[name].precisions
        if precision in wanted
        for batch in EXPORTED[name].batches
    ]
    # Each name of a list must have an artifact: (format, precisions that it lacks).
    unmet = []
    if formats is not None:
        found = {artifact.format for artifact in chosen}
        unmet += [(name, wanted) for name in named if name not in found]
    if precisions is not None:
        found = {artifact.precision for artifact in chosen}
        unmet += [(named[0], [precision]) for precision in wanted if precision not in found]
    for name, lacking in unmet:
        own = ", ".join(EXPORTED[name].precisions)
        raise InputError(f"{name} comes in {own}, not in {' or '.join(lacking)}")
    return chosen


def _rows(table, names, argument):
    """Returns the names of rows without duplicates, in the order of the table."""
    if names is None:
        return list(table)
    if isinstance(names, str) or not isinstance(names, collections.abc.Iterable) or not names:
        raise InputError(f"`{argument}` must be a list of {', '.join(table)}, got {names!r}")
    for name in names:
        look_up(table, name, argument)
    return [name for name in table if name in names]
