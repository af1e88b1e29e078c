"""Photographs without labels: for the verification and calibration of an export."""

import hashlib
import os

import numpy as np
from PIL import Image

from keras_resnet.datasets.base import Dataset, Split
from keras_resnet.datasets.images import (
    ImageFiles,
    explain_unreadable,
    map_threads,
    no_bomb_warnings,
    open_upright,
    printable_path,
)
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.files import expand_user


def load_photos(paths, class_names, *, image_size=(None, None), channels=3):
    """Loads photographs without labels.

    Args:
        paths: A path, or a list of paths: image files, and folders. A folder is searched with its
            sub-folders for files that are not hidden and have a suffix of an image format.
        class_names: The class names of the model.
        image_size: See `ImageFiles`; by default each image keeps its size.
        channels: 1 or 3.

    Returns:
        A `Dataset` whose splits "train" and "validation" are the photographs, in the order of
        their paths; `is_labelled` is false, and all labels are 0.

    Raises:
        InputError: If there are no photographs, or one cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> folder = pathlib.Path(tempfile.mkdtemp())
        >>> Image.new("RGB", (6, 4), "red").save(folder / "red.png")
        >>> data = load_photos(folder, ["cat", "dog"])
        >>> len(data.splits["validation"]), data.is_labelled, data.image_shape
        (1, False, (None, None, 3))
    """
    paths = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    files = sorted({file for path in paths for file in find_images(expand_user(path))})
    if not files:
        raise InputError(f"{_shown(paths)}: holds no photographs")
    with no_bomb_warnings():
        checksums = list(map_threads(_check, files))
    split = Split(ImageFiles(files, image_size, channels), np.zeros(len(files), "int64"))
    whole = hashlib.sha256("".join(sorted(checksums)).encode())
    return Dataset(
        f"photos:{_shown(paths)}",
        tuple(class_names),
        {"train": split, "validation": split},
        f"{len(files)} photographs in {_shown(paths)}",
        whole.hexdigest(),
        is_labelled=False,
    )


def _shown(paths):
    return " ".join(printable_path(path) for path in paths[:3]) + (" …" if len(paths) > 3 else "")


def find_images(path):
    """Returns the image files that a path stands for: itself, or those in a folder, a sorted list.

    Args:
        path: A `Path`. Hidden files of a folder are left out, and those without the suffix of an
            image format.
    """
    # Path.is_dir raises an error for a name that is too long.
    if not os.path.isdir(path):
        return [path]
    suffixes = Image.registered_extensions()
    return sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
        and os.path.isfile(file)
    )


def _check(file):
    """Returns the sha256 (hex) of a readable image file."""
    try:
        content = file.read_bytes()
        open_upright(content)
    except FileNotFoundError:
        raise InputError(f"{printable_path(file)}: no such image file") from None
    except Exception as error:  # see `open_upright`
        reason = explain_unreadable(error)
        raise InputError(f"{printable_path(file)}: cannot be read: {reason}") from error
    return hashlib.sha256(content).hexdigest()
