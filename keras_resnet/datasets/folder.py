"""A folder of images: one sub-folder for each class, split folders, or a CSV of file and label."""

import csv
import hashlib
import io
import math
import os
import re
from collections import Counter
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError

from keras_resnet.datasets.base import Dataset, Split, hold_out
from keras_resnet.datasets.images import (
    GREY_MODES,
    ImageFiles,
    check_channels,
    check_image_size,
    explain_unreadable,
    map_threads,
    no_bomb_warnings,
    open_upright,
    printable_path,
    square_size,
)
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user
from keras_resnet.utils.progress import bar

_MOST_LISTED = 10

# Names of a split's folder, or of its CSV without the suffix, in small letters and without an
# ending such as "_set" -> the split.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}

# The columns of a CSV with a header, in small letters; others are ignored.
FILE_COLUMNS = ("file", "filename", "file_name", "filepath", "image", "image_path", "path")
LABEL_COLUMNS = ("label", "class", "category", "target")

# macOS adds this folder to ZIP archives.
_IGNORED = ("__MACOSX",)

# Files that people and systems leave beside images. Other files may be images that Pillow does not
# read, such as IMG_1.HEIC: they are errors.
BESIDE_IMAGES = (
    *(".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".yaml", ".yml", ".html", ".log"),
    *(".db", ".ini"),
)


class _Checked(NamedTuple):
    """A readable image file: its (height, width), its mode, the sha256 of its bytes."""

    size: tuple[int, int]
    is_grey: bool
    sha256: str


class _Listing(NamedTuple):
    """The images of a folder before they are read.

    Attributes:
        class_names: The classes.
        splits: Split -> {file: class name}; "train" is always there.
        names: File -> its name in the fingerprint, as bytes.
        remarks: Sentences about folders and files that are not used.
        is_named: Whether each file was named, in a CSV, and not found in a class folder.
    """

    class_names: list
    splits: dict
    names: dict
    remarks: list
    is_named: bool = False


def load_folder(
    path,
    *,
    image_size=None,
    channels=None,
    validation_split=0.1,
    skip_bad=False,
    seed=0,
    resize="squash",
):
    """Loads a folder of images in one of three layouts.

    - `path/class name/image file`;
    - `path/train/class name/image file`, beside it `val` (or `valid`, `validation`) and `test`, in
      capital or small letters. The classes are those of `train`; another split may lack some;
    - a CSV of file and label, `path` itself or the only one in a folder without class folders; or
      train.csv, val.csv and test.csv. Files are relative to the CSV. A header names the columns,
      one of `FILE_COLUMNS` and one of `LABEL_COLUMNS`; without one the first two are taken.

    The sorted names of the sub-folders, or of the labels, are the classes. Hidden files and folders
    are ignored, links are followed. Files of a class folder with a suffix in `BESIDE_IMAGES`, such
    as notes.txt, are left out with a remark unless they are images; all others must be images. All
    files are decoded once to check them; later they are decoded when a batch needs them.

    Args:
        path: The folder, or a CSV.
        image_size: (height, width) or one number, for images of varying sizes and for larger
            images. Images of one smaller size keep it, since the model resizes them. (None, None)
            keeps every image's own size; see `ImageFiles`. With "shorter_edge" the images become
            squares of this size, or of their median shorter edge if that is smaller.
        channels: 1 or 3; by default 1 if all images are grey, else 3.
        validation_split: The fraction of each class for validation, taken from the training images
            if there is no validation split; None for a folder that is not trained on, which may
            have classes without images; see `stratified_split`.
        skip_bad: Whether to leave out files that cannot be read, instead of raising an error.
        seed: Seed of the choice of validation images.
        resize: How images get the size, a row of `images.RESIZES`.

    Returns:
        A `Dataset` with the splits "train" and "validation", and "test" if the folder has one. The
        images are `ImageFiles`. The fingerprint is the sha256 of the sorted relative paths (of a
        CSV, with split and label) and the sha256 of each file.

    Raises:
        InputError: The folder has another structure, or files cannot be read.
    """
    root = expand_user(path)
    if channels is not None:
        check_channels(channels)
    if image_size is not None:
        image_size = check_image_size(image_size)
    is_trained_on = validation_split is not None
    listing = _list_files(root, is_trained_on)
    checked, bad = _check_files([file for files in listing.splits.values() for file in files])
    if not listing.is_named and (others := [f for f in bad if _is_other_file(f, bad[f])]):
        for file in others:
            del bad[file]
        listing.remarks.append(
            f"files beside the images are not used: {len(others)}, such as "
            f"{printable_path(os.path.relpath(others[0], root))}"
        )
    if bad and not skip_bad:
        raise InputError(
            f"{printable_path(root)}: {_list_bad_files(root, bad)}; to leave such files out, use "
            "--skip-bad (`skip_bad=True`)"
        )
    _check_counts(root, listing, checked, is_trained_on)
    if resize == "shorter_edge":
        image_size = square_size([min(each.size) for each in checked.values()], image_size)
    else:
        image_size = _decoding_size(checked, image_size)
    if channels is None:
        channels = 1 if all(each.is_grey for each in checked.values()) else 3
    numbers = {name: number for number, name in enumerate(listing.class_names)}
    splits = {}
    for split, labels in listing.splits.items():
        files = [file for file in labels if file in checked]
        classes = np.array([numbers[labels[file]] for file in files], np.int64)
        splits[split] = Split(ImageFiles(files, image_size, channels, resize), classes)
    found = ", ".join(f"{name} {len(split)}" for name, split in splits.items())
    if "validation" not in splits and (is_trained_on or len(splits) == 1):
        splits = {**hold_out(splits["train"], validation_split, seed), **_others(splits)}
    parts = f" ({found})" if len(listing.splits) > 1 else ""
    skipped = f", skipped {_list_bad_files(root, bad)}" if bad else ""
    return Dataset(
        name=f"folder:{path}",
        class_names=tuple(listing.class_names),
        splits=splits,
        source=(
            f"image folder {printable_path(root)}: {len(checked)} images{parts}, "
            f"{len(listing.class_names)} classes{skipped}"
        ),
        fingerprint=_fingerprint(listing, checked),
        remarks=(*listing.remarks, *(_copies(listing, splits, checked) if is_trained_on else ())),
    )


def _others(splits):
    """Returns the splits other than "train"."""
    return {name: split for name, split in splits.items() if name != "train"}


# ----------------------------------------------------------------------------------------------
# The layouts
# ----------------------------------------------------------------------------------------------


def _list_files(root, is_trained_on):
    """Returns the `_Listing` of a folder or a CSV."""
    # Path.is_file raises an error for a name that is too long.
    if root.suffix.lower() == ".csv" and os.path.isfile(root):
        return _list_csvs(root.parent, {"train": root}, [])
    entries = _entries(root)
    folders = [entry for entry in entries if entry.is_dir()]
    splits = _find_splits(folders)
    with_classes = {split: path for split, path in splits.items() if _sub_folders(path)}
    if "train" in with_classes:
        return _list_split_folders(root, folders, splits, with_classes, is_trained_on)
    if len(folders) < 2 or len(splits) == len(folders):
        csvs = [entry for entry in entries if entry.suffix.lower() == ".csv" and entry.is_file()]
        named = _find_splits(csvs, stem=True)
        if "train" in named:
            return _list_csvs(root, named, [])
        if len(csvs) == 1:
            return _list_csvs(root, {"train": csvs[0]}, [])
        if csvs:
            raise InputError(
                f"{printable_path(root)}: holds {len(csvs)} CSV files; name the one of file and "
                f"label, such as folder:{printable_path(csvs[0])}"
            )
    if folders and len(splits) == len(folders):
        raise InputError(
            f"{printable_path(root)}: holds {' and '.join(entry.name for entry in folders)}, and "
            "train must be there with one sub-folder for each class; or list the images in a CSV "
            "of file,label"
        )
    return _list_class_folders(root, folders, is_trained_on)


def _entries(folder):
    """Returns the entries of `folder` that are not hidden, sorted by name."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(
            f"{printable_path(folder)}: the folder cannot be read: {error.strerror}"
        ) from None
    return [e for e in entries if not e.name.startswith(".") and e.name not in _IGNORED]


def _sub_folders(folder):
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _find_splits(entries, stem=False):
    """Returns {split: entry} of the entries that are named as a split.

    Raises:
        InputError: Two are named as one split.
    """
    found = {}
    for entry in entries:
        name = (entry.stem if stem else entry.name).lower()
        split = SPLIT_NAMES.get(re.sub(r"[ _-]?(set|data|images|labels)$", "", name))
        if split in found:
            raise InputError(
                f"{printable_path(entry.parent)}: one of its entries may hold the {split} images, "
                f"found {found[split].name} and {entry.name}"
            )
        if split:
            found[split] = entry
    return found


def _list_class_folders(root, folders, is_trained_on):
    names = _class_names(root, folders)
    files = {file: name for name in names for file in _class_files(root / name, not is_trained_on)}
    return _Listing(names, {"train": files}, _relative_names(root, files), [])


def _list_split_folders(root, folders, splits, with_classes, is_trained_on):
    train = splits["train"]
    names = _class_names(train, _sub_folders(train))
    files, remarks = {}, []
    for split, folder in with_classes.items():
        found = [entry.name for entry in _sub_folders(folder)]
        unknown = [name for name in found if name not in names]
        if unknown:
            raise InputError(
                f"{printable_path(folder)}: the class folders must be among those of "
                f"{train.name}, found also {', '.join(map(printable_path, unknown))}"
            )
        may_be_empty = split != "train" or not is_trained_on
        files[split] = {
            file: name for name in found for file in _class_files(folder / name, may_be_empty)
        }
        if not files[split]:
            raise InputError(f"{printable_path(folder)}: its class folders hold no image")
        present = set(files[split].values())
        missing = [name for name in names if name not in present]
        if missing and split != "train":
            remarks.append(f"{folder.name} has no images of {', '.join(missing)}")
    for split, folder in splits.items():
        if split not in with_classes:
            remarks.append(f"{folder.name} is not used: it has no class folders, so no labels")
    others = [entry.name for entry in folders if entry not in splits.values()]
    if others:
        remarks.append(f"beside {train.name}, not used: {', '.join(map(printable_path, others))}")
    # Training first, as everywhere.
    files = {split: files[split] for split in ("train", "validation", "test") if split in files}
    whole = [file for split in files.values() for file in split]
    return _Listing(names, files, _relative_names(root, whole), remarks)


def _relative_names(root, files):
    return {file: os.fsencode(file.relative_to(root).as_posix()) for file in files}


def _class_names(root, folders):
    names = [entry.name for entry in folders]
    if len(names) < 2:
        raise InputError(
            f"{printable_path(root)}: must hold one sub-folder for each class, at least 2, "
            f"found {len(names)}; or a CSV of file,label"
        )
    for name in names:
        _check_class_name(root / name, name)
    return names


def _check_class_name(where, name):
    if not name or name != printable_path(name):
        raise InputError(f"{printable_path(where)}: a class name must be printable UTF-8")


def _class_files(folder, may_be_empty):
    entries = _entries(folder)
    nested = next((entry for entry in entries if entry.is_dir()), None)
    if nested:
        raise InputError(
            f"{printable_path(nested)}: a class folder must hold images only, found a folder; if "
            f"{printable_path(folder.name)} is a part of the set and not a class, name the parts "
            "train, val and test"
        )
    if not entries and not may_be_empty:
        raise InputError(
            f"{printable_path(folder)}: the class folder is empty; add images or remove it"
        )
    return entries


# ----------------------------------------------------------------------------------------------
# CSV
# ----------------------------------------------------------------------------------------------


def _list_csvs(root, paths, remarks):
    """Returns the `_Listing` of CSV files, {split: path}."""
    splits, names, lines = {}, {}, {}
    for split in ("train", "validation", "test"):
        if split not in paths:
            continue
        path = paths[split]
        splits[split] = {}
        for number, name, label in _read_csv(path):
            where = f"{printable_path(path)}, line {number}"
            _check_class_name(where, label)
            file = root / name
            # By the path without "..", so that one file has one name.
            known = lines.setdefault(os.path.normpath(file), where)
            if known != where:
                raise InputError(f"{where}: {printable_path(name)} is listed already: {known}")
            splits[split][file] = label
            names[file] = f"{split}\0{label}\0{name}".encode("utf-8", "surrogateescape")
    class_names = sorted(set(splits["train"].values()))
    if len(class_names) < 2:
        raise InputError(
            f"{printable_path(paths['train'])}: must list images of at least 2 labels, found "
            f"{len(class_names)}"
        )
    for split, files in splits.items():
        unknown = sorted(set(files.values()) - set(class_names))
        if unknown:
            raise InputError(
                f"{printable_path(paths[split])}: the labels must be among those of "
                f"{paths['train'].name}, found also {', '.join(unknown[:_MOST_LISTED])}"
            )
    return _Listing(class_names, splits, names, remarks, is_named=True)


def _read_csv(path):
    """Yields (line number, file, label) of a CSV with commas, semicolons or tabs."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{printable_path(path)}: cannot be read as a CSV in UTF-8: {one_line(error)}"
        ) from None
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text), delimiter=max(",;\t", key=first.count))
    columns = None
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if columns is None:
                columns, is_header = _columns(path, cells)
                if is_header:
                    continue
            if len(cells) <= max(columns):
                raise InputError(
                    f"{printable_path(path)}, line {reader.line_num}: must have a file and a "
                    f"label, got {printable_path(','.join(row))}"
                )
            yield reader.line_num, *(cells[column] for column in columns)
    except csv.Error as error:
        raise InputError(f"{printable_path(path)}, line {reader.line_num}: {error}") from None


def _columns(path, cells):
    """Returns the columns of file and label, and whether `cells` are the header."""
    small = [cell.lower() for cell in cells]
    files, labels = (
        [small.index(name) for name in names if name in small]
        for names in (FILE_COLUMNS, LABEL_COLUMNS)
    )
    if files and labels:
        return (files[0], labels[0]), True
    if len(cells) == 2:
        return (0, 1), False
    raise InputError(
        f"{printable_path(path)}: a CSV of {len(cells)} columns needs a header with file and "
        f"label, got {printable_path(','.join(cells))[:100]}"
    )


# ----------------------------------------------------------------------------------------------
# Checks
# ----------------------------------------------------------------------------------------------


def _check_file(file):
    """Returns the `_Checked` of a file, or the exception that decoding it raised."""
    try:
        # Reading a named pipe would never return.
        if not file.is_file():
            is_there = os.path.lexists(file)
            raise OSError("not a regular file, or a broken link" if is_there else "no such file")
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
    base = root.parent if root.is_file() else root
    listed = (
        f"{printable_path(os.path.relpath(file, base))} ({explain_unreadable(bad[file])})"
        for file in list(bad)[:_MOST_LISTED]
    )
    more = f" and {len(bad) - _MOST_LISTED} more" if len(bad) > _MOST_LISTED else ""
    files = "1 file that cannot be read as an image"
    if len(bad) > 1:
        files = f"{len(bad)} files that cannot be read as images"
    return f"{files}: {', '.join(listed)}{more}"


def _is_other_file(file, error):
    """Returns whether a file that cannot be read is no image and need not be one."""
    return file.suffix.lower() in BESIDE_IMAGES and isinstance(error, UnidentifiedImageError)


def _check_counts(root, listing, checked, is_trained_on):
    """Refuses a set without images, and a class that is too small to be trained or split."""
    if not checked:
        raise InputError(f"{printable_path(root)}: its class folders hold no readable image")
    for split, labels in listing.splits.items():
        found = Counter(name for file, name in labels.items() if file in checked)
        if not found:
            raise InputError(f"{printable_path(root)}: {split} holds no readable image")
        if split != "train" or not is_trained_on:
            continue
        least = 1 if "validation" in listing.splits else 2
        why = ", one to train and one to validate" if least == 2 else ""
        for name in listing.class_names:
            if found[name] < least:
                raise InputError(
                    f"{printable_path(root)}, class {name}: needs at least {least} readable "
                    f"images{why}, found {found[name]}"
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


def _copies(listing, splits, checked):
    """Yields sentences about files of the same content in two splits, or of two classes."""
    classes, shown = {}, {}
    for labels in listing.splits.values():
        for file in filter(checked.get, labels):
            classes.setdefault(checked[file].sha256, set()).add(labels[file])
            shown[checked[file].sha256] = file
    mixed = [sha256 for sha256, names in classes.items() if len(names) > 1]
    if mixed:
        names = " and ".join(sorted(classes[mixed[0]]))
        example = printable_path(shown[mixed[0]].name)
        yield f"{len(mixed)} images are in several classes, such as {example} in {names}"
    known = {checked[file].sha256 for file in splits["train"].images.sources}
    for name, split in _others(splits).items():
        copies = sum(checked[file].sha256 in known for file in split.images.sources)
        if copies:
            yield (
                f"{copies} of the {len(split)} {name} images are copies of training images: the "
                "accuracy is too high for new images"
            )


def _fingerprint(listing, checked):
    whole = hashlib.sha256()
    for file in sorted(checked):
        whole.update(listing.names[file])
        whole.update(f"\0{checked[file].sha256}\n".encode())
    return whole.hexdigest()
