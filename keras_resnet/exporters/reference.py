"""`reference.npz`: real images, and what was answered to them when a folder was exported."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from keras_resnet.exporters import verification
from keras_resnet.utils.errors import InputError, one_line

MAX_BYTES = 256 * 2**20


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What was answered at an export.

    Attributes:
        images: Some test images as the artifacts take them, [count, height, width, channels].
        probabilities: The Keras model's, float32, [count, classes].
        top1: Its most probable class of every test image, int64, [all images].
        answers: file -> the artifact's own probabilities, float32, [count, classes].
    """

    images: np.ndarray
    probabilities: np.ndarray
    top1: np.ndarray
    answers: dict


def write_reference(path, recorded):
    """Writes a `Recorded` to an .npz file."""
    arrays = {name: getattr(recorded, name) for name in ("images", "probabilities", "top1")}
    answers = {f"answers/{file}": array for file, array in recorded.answers.items()}
    np.savez(path, **arrays, **answers)


def read_reference(folder, manifest):
    """Returns what an export recorded, once its shapes are found to fit the manifest.

    Args:
        folder: The export folder.
        manifest: What `read_manifest` returned.

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
    # A damaged archive can fail in any of zipfile's and NumPy's ways.
    except Exception as error:
        raise InputError(f"{path}: damaged: {one_line(error)}") from error
    return found


def _check(found, manifest):
    shape = (len(found.images), len(manifest["class_names"]))
    floats = [found.probabilities, *found.answers.values()]
    if found.images.ndim != 4 or shape[0] < max(verification.BATCHES):
        raise ValueError(f"its images have the shape {found.images.shape}")
    if any(one.shape != shape or not np.isfinite(one).all() for one in floats):
        raise ValueError(f"its answers must be finite and of shape {shape}")
    if found.top1.shape != (manifest["data"]["images"],):
        raise ValueError("it must hold one class for each image of the data set")
