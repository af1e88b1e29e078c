"""A folder of images with one sub-folder for each class."""

import hashlib
import math
import os
from typing import NamedTuple

import numpy as np

from keras_resnet.datasets.base import Dataset, Split, hold_out
from keras_resnet.datasets.images import (
    GREY_MODES,
    ImageFiles,
    check_channels,
    check_image_size,
    map_threads,
    no_bomb_warnings,
    open_upright,
    printable_path,
)
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user
from keras_resnet.utils.progress import bar

_MOST_LISTED = 10


class _Checked(NamedTuple):
    """A readable image file: its (height, width), its mode, the sha256 of its bytes."""

    size: tuple[int, int]
    is_grey: bool
    sha256: str


def load_folder(
    path, *, image_size=None, channels=None, validation_split=0.1, skip_bad=False, seed=0
):
    """Loads a folder of images: `path/class name/image file`.

    The sorted names of the sub-folders are the classes; hidden ones, and files beside them, are
    ignored. Every file of a class that is not hidden must be an image. All files are decoded once
    to check them; later they are decoded when a batch needs them.

    Args:
        path: The folder.
        image_size: (height, width) or one number, for images of varying sizes and for larger
            images. Images of one smaller size keep it, since the model resizes them. (None, None)
            keeps every image's own size; see `ImageFiles`.
        channels: 1 or 3; by default 1 if all images are grey, else 3.
        validation_split: The fraction of each class for validation; None for a folder that is not
            trained on, which may have classes without images; see `stratified_split`.
        skip_bad: Whether to leave out files that cannot be read, instead of raising an error.
        seed: Seed of the choice of validation images.

    Returns:
        A `Dataset` with the splits "train" and "validation", whose images are `ImageFiles`. Its
        fingerprint is the sha256 of the sorted relative paths and the sha256 of each file.

    Raises:
        InputError: The folder has another structure, or files cannot be read.
    """
    root = expand_user(path)
    if channels is not None:
        check_channels(channels)
    if image_size is not None:
        image_size = check_image_size(image_size)
    class_names = _class_names(root)
    is_trained_on = validation_split is not None
    files = [file for name in class_names for file in _class_files(root / name, not is_trained_on)]
    checked, bad = _check_files(files)
    if bad and not skip_bad:
        raise InputError(
            f"{printable_path(root)}: there are {_list_bad_files(root, bad)}; remove them, or skip "
            "them with --skip-bad (`skip_bad=True`)"
        )
    files = list(checked)
    labels = np.array([class_names.index(file.parent.name) for file in files], np.int64)
    _check_counts(root, class_names, labels, is_trained_on)
    image_size = _decoding_size(checked, image_size)
    if channels is None:
        channels = 1 if all(each.is_grey for each in checked.values()) else 3
    whole = Split(ImageFiles(files, image_size, channels), labels)
    skipped = f", skipped {_list_bad_files(root, bad)}" if bad else ""
    return Dataset(
        name=f"folder:{path}",
        class_names=tuple(class_names),
        splits=hold_out(whole, validation_split, seed),
        source=(
            f"image folder {printable_path(root)}: {len(files)} images, "
            f"{len(class_names)} classes{skipped}"
        ),
        fingerprint=_fingerprint(root, checked),
    )


def _entries(folder):
    """Returns the entries of `folder` that are not hidden, sorted by name."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{printable_path(folder)}: the folder cannot be read: {error.strerror}"
        ) from None
    return [entry for entry in entries if not entry.name.startswith(".")]


def _class_names(root):
    names = [entry.name for entry in _entries(root) if entry.is_dir()]
    if len(names) < 2:
        raise InputError(
            f"{printable_path(root)}: must hold one sub-folder for each class, at least 2, "
            f"found {len(names)}"
        )
    for name in names:
        if name != printable_path(name):
            raise InputError(f"{printable_path(root / name)}: a class name must be printable UTF-8")
    return names


def _class_files(folder, may_be_empty):
    entries = _entries(folder)
    nested = next((entry for entry in entries if entry.is_dir()), None)
    if nested:
        raise InputError(
            f"{printable_path(nested)}: a class folder must hold images only, found a folder; "
            f"if {printable_path(folder.name)} is not a class, give folder:{printable_path(folder)}"
        )
    if not entries and not may_be_empty:
        raise InputError(
            f"{printable_path(folder)}: the class folder is empty; add images or remove it"
        )
    return entries


def _check_file(file):
    """Returns the `_Checked` of a file, or the exception that decoding it raised."""
    try:
        # Reading a named pipe would never return.
        if not file.is_file():
            raise OSError("not a regular file, or a broken link")
        raw = file.read_bytes()
        image = open_upright(raw)
    except Exception as error:  # see `open_upright`
        return error
    size = (image.height, image.width)
    return _Checked(size, image.mode in GREY_MODES, hashlib.sha256(raw).hexdigest())


def _check_files(files):
    """Returns {file: _Checked} of the readable files and {file: exception} of the others."""
    checked, bad = {}, {}
    with no_bomb_warnings(), bar(len(files), "checking images") as shown:
        for file, result in zip(files, map_threads(_check_file, files), strict=True):
            (bad if isinstance(result, Exception) else checked)[file] = result
            shown.update(1)
    return checked, bad


def _list_bad_files(root, bad):
    listed = (
        f"{printable_path(file.relative_to(root))} ({_reason(bad[file])})"
        for file in list(bad)[:_MOST_LISTED]
    )
    more = f" and {len(bad) - _MOST_LISTED} more" if len(bad) > _MOST_LISTED else ""
    return f"{len(bad)} files that cannot be read as images: {', '.join(listed)}{more}"


def _reason(error):
    # Pillow's message names the buffer in memory and not the file.
    unknown = type(error).__name__ == "UnidentifiedImageError"
    return "not an image" if unknown else one_line(error)


def _check_counts(root, class_names, labels, is_trained_on):
    """Refuses a set without images, and a class that is too small to be split."""
    if not len(labels):
        raise InputError(f"{printable_path(root)}: its class folders hold no readable image")
    counts = np.bincount(labels, minlength=len(class_names))
    for name, count in zip(class_names, counts, strict=True):
        if count < 2 and is_trained_on:
            raise InputError(
                f"{printable_path(root / name)}: a class needs at least 2 readable images, one to "
                f"train and one to validate, found {count}"
            )


def _decoding_size(checked, image_size):
    """Returns the (height, width) to decode at: the images' size if they have one, not larger."""
    examples = {}
    for file, each in checked.items():
        examples.setdefault(each.size, file)
    (first, a), *others = examples.items()
    largest = [math.inf if size is None else size for size in image_size or (None, None)]
    if not others and np.all(np.less_equal(first, largest)):
        return first
    if image_size is None:
        second, b = others[0]
        raise InputError(
            f"images of {len(examples)} sizes ({printable_path(a)} is {first[1]}×{first[0]}, "
            f"{printable_path(b)} is {second[1]}×{second[0]}): choose one with --image-size "
            "(`image_size`)"
        )
    return image_size


def _fingerprint(root, checked):
    whole = hashlib.sha256()
    for file in sorted(checked):
        whole.update(os.fsencode(file.relative_to(root).as_posix()))
        whole.update(f"\0{checked[file].sha256}\n".encode())
    return whole.hexdigest()
