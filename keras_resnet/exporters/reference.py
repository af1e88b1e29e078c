"""The predictions of the Keras model for the test images, and `reference.npz`, which keeps some."""

import dataclasses
import hashlib
import math
import zipfile
from pathlib import Path

import keras
import numpy as np

from keras_resnet.datasets import Split
from keras_resnet.evaluation.inference import to_probabilities
from keras_resnet.exporters.float32 import check_twin
from keras_resnet.exporters.formats import BATCH_SIZES
from keras_resnet.runtimes.base import LOGITS, as_rows, kind_by_numbers
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.progress import bar

MAX_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Reference:
    """The predictions of a Keras model for real test images.

    Attributes:
        labels: int64, [count]; None for images without labels.
        probabilities: The model's, float32, [count, classes]; those of its float32 twin, if it
            computes in another precision.
        own: The model's in its own precision, float32, [count, classes]; None without a twin.
        twin: The result of `check_twin`; None without a twin.
    """

    labels: np.ndarray | None
    probabilities: np.ndarray
    own: np.ndarray | None = None
    twin: dict | None = None

    @property
    def accuracy(self):
        """The accuracy of the Keras model in its own precision, from 0 to 1; None if unknown."""
        if self.labels is None:
            return None
        own = self.probabilities if self.own is None else self.own
        return float(np.mean(own.argmax(axis=1) == self.labels))


def compute_reference(model, serving, split, is_labelled=True):
    """Runs a Keras model on a split, layer by layer as Keras calls it, and its float32 twin.

    Args:
        model: The Keras model.
        serving: Its `Serving`.
        split: The `Split` of raw images.
        is_labelled: Whether its labels are known.

    Returns:
        A `Reference`.

    Raises:
        InputError: If there are too few images, the twin's outputs differ, or the outputs are not
            of the kind that `serving` took them for.
    """
    if len(split) < max(BATCH_SIZES):
        raise InputError(
            f"verification needs at least {max(BATCH_SIZES)} images, got {len(split)}: give more "
            "with --photos, or with --dataset a labelled folder that was not trained on"
        )
    kind = serving.source_kind
    outputs, own, twin = _predict(model, split), None, None
    if serving.twin is not model:
        own, outputs = outputs, _predict(serving.twin, split)
        dtypes = {layer.compute_dtype for layer in model._flatten_layers()}
        twin = check_twin(model.name, dtypes, own, outputs)
        own = to_probabilities(own, kind, model.name)
    # The graph may not state the kind; a few sample images can then look like another one.
    found = kind_by_numbers(outputs)
    if serving.runtime.graph_kind is None and not kind.endswith(found) and found != LOGITS:
        raise InputError(
            f"{model.name}: it gives {kind} for some images and numbers like {found} for others: "
            "end it in a Dense layer without activation, a Softmax layer, or a sigmoid"
        )
    probabilities = to_probabilities(outputs, kind, model.name)
    return Reference(split.labels if is_labelled else None, probabilities, own, twin)


def predict(serving, images):
    """Returns the Keras model's probabilities for images, float32, [count, classes].

    Args:
        serving: The `Serving` of the model.
        images: uint8, [count, height, width, channels].
    """
    outputs = _predict(serving.twin, Split(images, np.zeros(len(images), "int64")))
    return to_probabilities(outputs, serving.source_kind, serving.twin.name)


def _predict(model, split):
    """Returns the outputs of a Keras model for a split, float32, [count, columns]."""
    parts = []
    # Images of their own sizes cannot form a batch.
    batch_size = 1 if None in split.images.shape[1:] else 256
    with bar(len(split), "the Keras model") as shown:
        for images, _ in split.batches(batch_size):
            (outputs,) = keras.tree.flatten(model(images, training=False))
            outputs = keras.ops.convert_to_numpy(keras.ops.cast(outputs, "float32"))
            parts.append(as_rows(outputs))
            shown.update(len(images))
    return np.concatenate(parts)


def describe_chance(reference, takes_floats):
    """Returns a line about a model that is hardly better than chance; None for a better one.

    Args:
        reference: The `Reference`.
        takes_floats: Whether the model takes floats, which may need normalisation.
    """
    if reference.labels is None:
        return (
            f"the accuracy cannot be measured on {len(reference.probabilities)} photographs "
            "without labels: the files are verified by the agreement with the Keras model"
        )
    share = np.bincount(reference.labels).max() / len(reference.labels)
    deviation = math.sqrt(share * (1 - share) / len(reference.labels))
    if reference.accuracy > min(share + 2 * deviation, 0.999):
        return None
    line = (
        f"the Keras model has an accuracy of {reference.accuracy:.1%}, and the constant prediction "
        f"of the most frequent class has {share:.1%}: it is untrained, was trained on other classes"
    )
    if takes_floats:
        return f"{line}, or takes images that are normalised before it: then name --normalize"
    return f"{line}, or on images of another kind"


def digest_order(split):
    """Returns a sha256 (hex) that differs for other images or another order.

    Args:
        split: A `Split`; all its labels are hashed, and some of its images.
    """
    some = np.linspace(0, len(split) - 1, min(64, len(split))).astype(int)
    whole = hashlib.sha256(np.asarray(split.labels, "<i8").tobytes())
    for index in some:
        whole.update(np.ascontiguousarray(split.images[index]))
    return whole.hexdigest()


# ----------------------------------------------------------------------------------------------
# reference.npz
# ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Some images and their predictions at an export.

    Attributes:
        images: Some test images as the artifacts take them, [count, height, width, channels].
        probabilities: The Keras model's, float32, [count, classes].
        top1: Its most probable class for every test image, int64, [all images].
        predictions: file -> the artifact's own probabilities, float32, [count, classes].
    """

    images: np.ndarray
    probabilities: np.ndarray
    top1: np.ndarray
    predictions: dict


def write_reference(path, recorded):
    """Writes a `Recorded` to an .npz file."""
    arrays = {name: getattr(recorded, name) for name in ("images", "probabilities", "top1")}
    predictions = {f"answers/{file}": array for file, array in recorded.predictions.items()}
    np.savez(path, **arrays, **predictions)


def read_reference(folder, manifest):
    """Reads `reference.npz` and checks that its shapes fit the manifest.

    Args:
        folder: The export folder.
        manifest: The result of `read_manifest`.

    Returns:
        A `Recorded`.

    Raises:
        InputError: If the file is missing, damaged, or does not fit.
    """
    path = Path(folder) / manifest["reference"]["file"]
    names = [row["file"] for row in manifest["artifacts"]]
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > MAX_BYTES:
                raise ValueError(f"it holds more than {MAX_BYTES} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            found = Recorded(
                *(arrays[name] for name in ("images", "probabilities", "top1")),
                {name: arrays[f"answers/{name}"] for name in names},
            )
        _check(found, manifest)
    # A damaged archive can raise any exception of zipfile and NumPy.
    except Exception as error:
        raise InputError(f"{path}: damaged: {one_line(error)}") from error
    return found


def _check(found, manifest):
    shape = (len(found.images), len(manifest["class_names"]))
    floats = [found.probabilities, *found.predictions.values()]
    if found.images.ndim != 4 or shape[0] < max(BATCH_SIZES):
        raise ValueError(f"its images have the shape {found.images.shape}")
    if any(one.shape != shape or not np.isfinite(one).all() for one in floats):
        raise ValueError(f"its predictions must be finite and of shape {shape}")
    if found.top1.shape != (manifest["data"]["images"],):
        raise ValueError("it must hold one class for each image of the data set")
