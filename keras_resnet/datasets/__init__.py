"""Data sets: the type `Dataset`, and a table of the sources that it can be loaded from."""

import os
from typing import NamedTuple

from keras_resnet.datasets.base import Dataset, Split
from keras_resnet.datasets.fashion_mnist import load_fashion_mnist
from keras_resnet.datasets.folder import load_folder
from keras_resnet.datasets.tfds import load_tfds
from keras_resnet.utils.errors import InputError

__all__ = ["Dataset", "Split", "load_dataset"]


class Loader(NamedTuple):
    """A kind of data set: its loader, and the options of `load_dataset` that the loader takes."""

    load: callable
    options: tuple[str, ...]


_HELD_OUT = ("image_size", "channels", "validation_split", "seed")

# The prefix of a data set's name -> its loader. The loader gets the text after the colon.
LOADERS = {
    "fashion_mnist": Loader(load_fashion_mnist, ("data_dir", "channels", "prefer_tensorflow")),
    "folder:": Loader(load_folder, (*_HELD_OUT, "skip_bad", "resize")),
    "tfds:": Loader(load_tfds, (*_HELD_OUT, "data_dir", "resize")),
}


def load_dataset(
    name="fashion_mnist",
    *,
    data_dir=None,
    image_size=None,
    channels=None,
    validation_split=0.1,
    skip_bad=False,
    seed=0,
    prefer_tensorflow=None,
    resize="squash",
):
    """Loads a data set of labelled images.

    Images are uint8; they become floats inside the model only.

    Args:
        name: "fashion_mnist", "folder:PATH" (one sub-folder for each class, or train, val and test
            with such, or a CSV of file,label; see `load_folder`) or "tfds:NAME" (any
            image-classification set of TensorFlow Datasets, `NAME[/CONFIG][:VERSION]`).
        data_dir: The folder of the Fashion-MNIST files, or TFDS's folder.
        image_size: One number or (height, width), in pixels: the size at which images of varying
            sizes ("folder:" and some "tfds:" sets) and larger images of a "folder:" are decoded.
            Images of one smaller size, and sets of arrays, keep their size, since the model
            resizes them. (None, None) keeps every image's own size; see `ImageFiles`.
        channels: 1 (grey) or 3 (colour); by default the channels of the images.
        validation_split: The fraction of the training images that is held out for validation, for
            sets without a validation split (those of TFDS: without a test split, either); None
            for a set that is not trained on: if it has no other split, "train" and "validation"
            are both the whole set.
        skip_bad: For "folder:", whether to leave out files that cannot be read.
        seed: Seed of the choice of validation images.
        prefer_tensorflow: For "fashion_mnist": whether to prefer a TFDS folder, which needs
            TensorFlow, to IDX files; by default if Keras's backend is TensorFlow.
        resize: For files of images, how they get `image_size`: "squash", or "shorter_edge" with the
            middle cut out, so that proportions stay.

    Returns:
        A `Dataset` with the split "train", and "test" or "validation" or both.

    Raises:
        InputError: The name is none of the three forms, or the source is missing or faulty.

    Example:
        >>> load_dataset("imagenet")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: a data set is named fashion_mnist, folder:PATH or \
tfds:NAME, got 'imagenet'
    """
    kind, colon, argument = name.partition(":")
    loader = LOADERS.get(kind + colon)
    if loader is None or bool(colon) != bool(argument):
        hint = f"; for this folder: folder:{name}" if os.path.exists(name) else ""
        raise InputError(
            f"a data set is named fashion_mnist, folder:PATH or tfds:NAME, got {name!r}{hint}"
        )
    given = {
        "data_dir": data_dir,
        "image_size": image_size,
        "channels": channels,
        "validation_split": validation_split,
        "skip_bad": skip_bad,
        "seed": seed,
        "prefer_tensorflow": prefer_tensorflow,
        "resize": resize,
    }
    options = {option: given[option] for option in loader.options}
    return loader.load(*[argument] if argument else [], **options)
