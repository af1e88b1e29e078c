"""A folder of images, one sub-folder a class."""

import collections
import hashlib
import math
import os

import numpy as np
from tqdm import tqdm

from keras_resnet.datasets.base import Dataset, Split
from keras_resnet.datasets.images import (
    GREY_MODES,
    ImageFiles,
    bombs_not_warned_of,
    check_channels,
    check_image_size,
    map_threads,
    open_upright,
    printable_path,
)
from keras_resnet.datasets.sharing import stratified_share
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user

_LISTED = 10

# What one look at a file tells: its (height, width), whether it is grey, the sha256 of its bytes.
_Look = collections.namedtuple("_Look", "size grey sha256")


def load_folder(
    path, *, image_size=None, channels=None, validation_split=0.1, skip_bad=False, seed=0
):
    """Loads a folder of images: `path/class name/image file`.

    The sub-folders' names, sorted, are the classes; hidden ones and files beside them are
    ignored. Inside a class every file that is not hidden counts, and must be an image. All files
    are decoded once to check them; afterwards they stay on disk until a batch needs them.

    Args:
        path: The folder.
        image_size: (height, width) or one number, for images of varying sizes and for larger
            ones. Images of one size that is no larger keep it, since the model's own graph
            resizes them. (None, None) keeps every image's own size; see `ImageFiles`.
        channels: 1 or 3; None for 1 if all images are grey, else 3.
        validation_split: The share of each class that validates; None for a folder that is not
            trained on, which may have classes without images; see `stratified_share`.
        skip_bad: Leaves out files that cannot be read, where they are otherwise an error.
        seed: Of the choice of validation images.

    Returns:
        A `Dataset` with the splits "train" and "validation", whose images are `ImageFiles`. Its
        fingerprint is the sha256 of the sorted relative paths and the sha256 of each file.

    Raises:
        InputError: The folder has another form, or files cannot be read.
    """
    root = expand_user(path)
    if channels is not None:
        check_channels(channels)
    if image_size is not None:
        image_size = check_image_size(image_size)
    class_names = _class_names(root)
    is_shared = validation_split is not None
    files = [file for name in class_names for file in _class_files(root / name, not is_shared)]
    looks, bad = _look_at_all(files)
    if bad and not skip_bad:
        raise InputError(
            f"{printable_path(root)}: there are {_list_bad_files(root, bad)}; remove them, or skip "
            "them with --skip-bad (`skip_bad=True`)"
        )
    files = list(looks)
    labels = np.array([class_names.index(file.parent.name) for file in files], np.int64)
    _check_counts(root, class_names, labels, is_shared)
    image_size = _reading_size(looks, image_size)
    if channels is None:
        channels = 1 if all(look.grey for look in looks.values()) else 3
    parts = stratified_share(labels, validation_split, seed)
    splits = {
        name: Split(ImageFiles([files[i] for i in part], image_size, channels), labels[part])
        for name, part in zip(("train", "validation"), parts, strict=True)
    }
    skipped = f", skipped {_list_bad_files(root, bad)}" if bad else ""
    return Dataset(
        name=f"folder:{path}",
        class_names=tuple(class_names),
        splits=splits,
        source=(
            f"image folder {printable_path(root)}: {len(files)} images, "
            f"{len(class_names)} classes{skipped}"
        ),
        fingerprint=_fingerprint(root, looks),
    )


def _entries(folder):
    """Returns what is in `folder` and not hidden, sorted by name."""
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
            f"if {printable_path(folder.name)} is no class, give folder:{printable_path(folder)}"
        )
    if not entries and not may_be_empty:
        raise InputError(
            f"{printable_path(folder)}: the class folder is empty; add images or remove it"
        )
    return entries


def _look_at(file):
    """Returns a `_Look` at a file, or the exception that reading it raised."""
    try:
        # Reading a named pipe would wait for ever.
        if not file.is_file():
            raise OSError("not a regular file, or a broken link")
        raw = file.read_bytes()
        image = open_upright(raw)
    except Exception as error:  # See `open_upright`.
        return error
    size = (image.height, image.width)
    return _Look(size, image.mode in GREY_MODES, hashlib.sha256(raw).hexdigest())


def _look_at_all(files):
    """Returns {file: look} of the readable files and {file: exception} of the others."""
    looks, bad = {}, {}
    with bombs_not_warned_of():
        # `disable=None` shows the bar on a terminal only.
        found = tqdm(
            map_threads(_look_at, files),
            "checking images",
            len(files),
            disable=None,
            unit="image",
            leave=False,
        )
        for file, look in zip(files, found, strict=True):
            (bad if isinstance(look, Exception) else looks)[file] = look
    return looks, bad


def _list_bad_files(root, bad):
    listed = (
        f"{printable_path(file.relative_to(root))} ({_reason(bad[file])})"
        for file in list(bad)[:_LISTED]
    )
    more = f" and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    return f"{len(bad)} files that cannot be read as images: {', '.join(listed)}{more}"


def _reason(error):
    # Pillow's sentence names the bytes in memory, not the file.
    unknown = type(error).__name__ == "UnidentifiedImageError"
    return "not an image" if unknown else one_line(error)


def _check_counts(root, class_names, labels, is_shared):
    """Refuses too few images: of the whole set, and of each class where classes are shared out."""
    if not len(labels):
        raise InputError(f"{printable_path(root)}: its class folders hold no readable image")
    counts = np.bincount(labels, minlength=len(class_names))
    for name, count in zip(class_names, counts, strict=True):
        if count < 2 and is_shared:
            raise InputError(
                f"{printable_path(root / name)}: a class needs at least 2 readable images, one to "
                f"train and one to validate, found {count}"
            )


def _reading_size(looks, image_size):
    """Returns the (height, width) to decode at: the images' own where it is one, and no larger."""
    examples = {}
    for file, look in looks.items():
        examples.setdefault(look.size, file)
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


def _fingerprint(root, looks):
    whole = hashlib.sha256()
    for file in sorted(looks):
        whole.update(os.fsencode(file.relative_to(root).as_posix()))
        whole.update(f"\0{looks[file].sha256}\n".encode())
    return whole.hexdigest()
