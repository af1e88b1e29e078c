"""Image-classification sets of TensorFlow Datasets (TFDS).

TensorFlow and TFDS are imported by the functions that need them: training on JAX or PyTorch with
IDX files or image folders does without.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from keras_resnet.datasets.base import Dataset, Split, fingerprint_arrays, hold_out
from keras_resnet.datasets.images import (
    ImageFiles,
    check_image_size,
    map_threads,
    no_bomb_warnings,
    square_size,
)
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user

# With TFDS's own 10 retries, a machine without network waits for 3 minutes.
_DOWNLOAD_RETRIES = 3
_READ_BATCH = 512


def load_tfds(
    name,
    *,
    data_dir=None,
    image_size=None,
    channels=None,
    validation_split=0.1,
    seed=0,
    resize="squash",
):
    """Loads an image-classification set of TFDS, and prepares it if necessary.

    A set of images of one shape becomes uint8 arrays of that shape for any `image_size`,
    since the model resizes them. A set of varying shapes keeps its encoded bytes in memory and
    decodes each batch at `image_size`.

    Args:
        name: TFDS's name: `NAME[/CONFIG][:VERSION]`.
        data_dir: TFDS's folder; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
        image_size: (height, width) or one number, in pixels; required for varying shapes. With
            "shorter_edge" their images become squares; see `images.square_size`.
        channels: 1 or 3 for varying shapes; else None or the channels of the images.
        validation_split: The fraction of the training split for validation, for sets without a
            labelled test or validation split.
        seed: Seed of the choice of validation images.
        resize: How images of varying shapes get the size, a row of `images.RESIZES`.

    Returns:
        A `Dataset` with the split "train", and "test" or "validation".

    Raises:
        InputError: There is no such set, it cannot be downloaded or read, or it has no labelled
            images.
    """
    builder = prepare(name, data_root(data_dir))
    check_features(builder)
    if "train" not in builder.info.splits:
        raise InputError(f"tfds:{name}: needs a split called train, has {_split_names(builder)}")
    shape = builder.info.features["image"].shape
    if None in shape[:2]:
        read = _encoded_reader(builder, name, image_size, channels)
    elif channels not in (None, shape[2]):
        raise InputError(
            f"tfds:{name}: `channels` must be {shape[2]}, as its images have, got {channels}"
        )
    else:
        read = read_arrays
    train = read(builder, "train")
    if train.labels.min(initial=0) < 0:
        raise InputError(f"tfds:{name}: the train split has images without a label (label -1)")
    held_out = _labelled_split(builder, read)
    whole = {"train": train, **held_out}
    if resize != "squash" and isinstance(train.images, ImageFiles):
        whole = _as_squares(builder, whole, resize)
    splits = whole if held_out else hold_out(whole["train"], validation_split, seed)
    return Dataset(
        name=f"tfds:{name}",
        class_names=tuple(builder.info.features["label"].names),
        splits=splits,
        source=f"TFDS {builder.info.full_name} in {builder.data_dir}",
        fingerprint=_fingerprint(*whole.values()),
    )


def data_root(data_dir):
    """Returns the folder of TFDS's sets, without importing TFDS."""
    default = Path("~") / "tensorflow_datasets"
    return expand_user(data_dir or os.environ.get("TFDS_DATA_DIR") or default)


def keras_runs_on_tensorflow():
    """Returns whether Keras's backend is TensorFlow, without importing Keras."""
    backend = os.environ.get("KERAS_BACKEND")
    if not backend:
        home = os.environ.get("KERAS_HOME") or Path("~/.keras").expanduser()
        with contextlib.suppress(OSError, ValueError, AttributeError):
            text = (Path(home) / "keras.json").read_text(encoding="utf-8")
            backend = json.loads(text).get("backend")
    return (backend or "tensorflow") == "tensorflow"


def prepare(name, root):
    """Returns the TFDS builder of a set, after downloading and preparing it if necessary.

    Raises:
        InputError: There is no such set, or it cannot be downloaded or prepared.
    """
    tfds = _import_tfds()
    try:
        builder = tfds.builder(name, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        # TFDS's own message lists all sets, one on each line.
        raise InputError(
            f"tfds:{name}: TensorFlow Datasets has no set of this name, and {root} holds none"
        ) from None
    except Exception as error:  # TFDS raises errors of many kinds
        raise InputError(f"tfds:{name}: cannot be opened: {one_line(error)}") from error
    if builder.is_prepared():
        return builder
    with _cleaned_up(root, builder.name), _few_retries():
        try:
            builder.download_and_prepare(
                # Google's copies of prepared sets need credentials, which may take long to get.
                # Downloads from the sets' own addresses are verified by checksums.
                download_config=tfds.download.DownloadConfig(try_download_gcs=False)
            )
        except Exception as error:
            raise InputError(
                f"tfds:{name} could not be downloaded and prepared in {root}: {_reason(error)}"
            ) from error
    return builder


def open_prepared(folder):
    """Returns the TFDS builder of a prepared folder.

    Raises:
        InputError: The folder's description cannot be read.
    """
    tfds = _import_tfds()
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:
        raise InputError(_damaged(folder, error)) from error


def check_features(builder):
    """Raises an `InputError` unless a set has 8-bit images and class labels."""
    tfds = _import_tfds()
    features = builder.info.features
    wanted = {"image": tfds.features.Image, "label": tfds.features.ClassLabel}
    named = features if isinstance(features, tfds.features.FeaturesDict) else {}
    if not all(key in named and isinstance(named[key], kind) for key, kind in wanted.items()):
        found = ", ".join(f"{key} ({type(value).__name__})" for key, value in sorted(named.items()))
        raise InputError(
            f"tfds:{builder.name}: needs the features image (Image) and label (ClassLabel), "
            f"has {found or type(features).__name__}"
        )
    image = features["image"]
    if np.dtype(image.np_dtype) != np.uint8 or len(image.shape) != 3:
        raise InputError(
            f"tfds:{builder.name}: images must be uint8 of shape (height, width, channels), "
            f"are {np.dtype(image.np_dtype)} of shape {tuple(image.shape)}"
        )


def read_arrays(builder, split):
    """Reads a split of images of one shape into memory.

    Returns:
        A `Split` whose images are a uint8 array, [count, height, width, channels].

    Raises:
        InputError: The files are damaged.
    """
    count = builder.info.splits[split].num_examples
    images = np.empty((count, *builder.info.features["image"].shape), np.uint8)
    labels = np.empty(count, np.int64)
    start = 0
    for batch in _batches(builder, split):
        stop = start + len(batch["label"])
        images[start:stop], labels[start:stop] = batch["image"], batch["label"]
        start = stop
    if start != count:
        raise InputError(f"{builder.data_dir}: the {split} split must hold {count}, found {start}")
    return Split(images, labels)


def _encoded_reader(builder, name, image_size, channels):
    """Returns a function with the interface of `read_arrays`, for images of varying shapes."""
    if image_size is None:
        raise InputError(
            f"tfds:{name}: its images have varying sizes: choose one with --image-size "
            "(`image_size`)"
        )
    image_size = check_image_size(image_size)
    channels = channels or (1 if builder.info.features["image"].shape[2] == 1 else 3)

    def read(builder, split):
        tfds = _import_tfds()
        images, labels = [], []
        for batch in _batches(builder, split, {"image": tfds.decode.SkipDecoding()}):
            images.extend(batch["image"])
            labels.extend(batch["label"])
        return Split(ImageFiles(images, image_size, channels), np.array(labels, np.int64))

    return read


def _as_squares(builder, splits, resize):
    """Returns splits of encoded images that are decoded as squares of one size."""
    sources = [source for split in splits.values() for source in split.images.sources]
    _, height, width, channels = splits["train"].images.shape
    try:
        with no_bomb_warnings():
            edges = list(map_threads(_shorter_edge, sources))
    except Exception as error:  # see `open_upright`
        raise InputError(_damaged(builder.data_dir, error)) from error
    size = square_size(edges, (height, width))
    return {
        name: Split(ImageFiles(split.images.sources, size, channels, resize), split.labels)
        for name, split in splits.items()
    }


def _shorter_edge(source):
    with Image.open(io.BytesIO(source)) as image:  # reads the file's head only
        return min(image.size)


def _batches(builder, split, decoders=None):
    """Yields batches {"image": …, "label": …} of NumPy arrays; other features are not decoded."""
    tfds = _import_tfds()
    try:
        stream = builder.as_dataset(
            split=split,
            batch_size=_READ_BATCH,
            decoders=tfds.decode.PartialDecoding({"image": True, "label": True}, decoders),
            # Each split is read once only.
            read_config=tfds.ReadConfig(try_autocache=False),
        )
        yield from stream.as_numpy_iterator()
    except Exception as error:  # TensorFlow's errors have no common base class
        raise InputError(_damaged(builder.data_dir, error)) from error


def _labelled_split(builder, read):
    """Returns {name: split} of the first evaluation split with labels, or {} if there is none."""
    for name in ("test", "validation"):
        # The test labels of competitions are secret: all are -1.
        if name in builder.info.splits and builder.info.splits[name].num_examples:
            split = read(builder, name)
            if split.labels.min() >= 0:
                return {name: split}
    return {}


def _fingerprint(*splits):
    """Returns a sha256 that does not depend on the order of the examples in a split."""
    if not isinstance(splits[0].images, ImageFiles):
        return fingerprint_arrays(*splits)
    whole = hashlib.sha256()
    for split in splits:
        rows = sorted(
            f"{label} {hashlib.sha256(source).hexdigest()}\n"
            for source, label in zip(split.images.sources, split.labels, strict=True)
        )
        whole.update(f"{len(rows)}\n{''.join(rows)}".encode())
    return whole.hexdigest()


def _reason(error):
    # The message of `requests` repeats address and host in three nested exceptions.
    request = getattr(error, "request", None)
    return f"{request.url} cannot be reached" if request is not None else one_line(error)


def _damaged(folder, error):
    return (
        f"{folder}: the prepared TFDS folder is damaged ({one_line(error)}); "
        "remove it and prepare it again"
    )


def _split_names(builder):
    return ", ".join(builder.info.splits) or "none"


@functools.cache
def _import_tfds():
    try:
        import tensorflow as tf
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            f"reading TFDS sets takes tensorflow and tensorflow-datasets: {one_line(error)}"
        ) from error
    # As all progress bars: on a terminal only.
    tfds.display_progress_bar(sys.stderr.isatty())
    if not keras_runs_on_tensorflow():
        # TensorFlow only reads here, but would reserve the memory of every GPU. It refuses if it
        # has been initialised already.
        with contextlib.suppress(RuntimeError):
            tf.config.set_visible_devices([], "GPU")
    return tfds


@contextlib.contextmanager
def _few_retries():
    """Makes a download without network fail in seconds, without warnings."""
    from tensorflow_datasets.core.download import downloader

    # TFDS has no setting for this. If the name disappears, only the wait gets longer.
    before = getattr(downloader, "MAX_RETRIES", _DOWNLOAD_RETRIES)
    downloader.MAX_RETRIES = _DOWNLOAD_RETRIES
    # Each retry logs a warning. The level is not restored: files are fetched by threads, which
    # continue for a moment after the first has failed.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    try:
        # TFDS announces downloads on stdout, which is for the command's result.
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        downloader.MAX_RETRIES = before


@contextlib.contextmanager
def _cleaned_up(root, name):
    """Removes the partial downloads and empty folders of a failed preparation."""

    def parts():
        downloads = root / "downloads"
        return {*downloads.glob("*.tmp.*"), *downloads.glob("*/*.tmp.*")}

    before = parts()
    try:
        yield
    except BaseException:
        for part in parts() - before:
            shutil.rmtree(part, ignore_errors=True)
        empty = (root / "downloads" / "extracted", root / "downloads" / name)
        for folder in (*empty, root / "downloads", root / name, root):
            # `rmdir` removes empty folders only.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise
