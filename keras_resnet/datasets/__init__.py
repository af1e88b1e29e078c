"""Data sets: one type, `Dataset`, and a table of the places it can come from."""

import collections

from keras_resnet.datasets.base import Dataset, Split
from keras_resnet.datasets.fashion_mnist import load_fashion_mnist
from keras_resnet.datasets.folder import load_folder
from keras_resnet.datasets.tfds import load_tfds
from keras_resnet.utils.errors import InputError

__all__ = ["Dataset", "Split", "load_dataset"]

# `form` is how a user writes it; what follows its colon is the loader's first argument. `options`
# are the arguments of `load_dataset` that mean something to the source.
Source = collections.namedtuple("Source", "form load options")
_SHARING = ("image_size", "channels", "validation_split", "seed")
SOURCES = {
    "fashion_mnist": Source(
        "fashion_mnist", load_fashion_mnist, ("data_dir", "channels", "prefer_tensorflow")
    ),
    "folder": Source("folder:PATH", load_folder, (*_SHARING, "skip_bad")),
    "tfds": Source("tfds:NAME", load_tfds, (*_SHARING, "data_dir")),
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
):
    """Loads a data set of labelled images.

    Images are uint8 and stay so: floats appear in the model's graph only.

    Args:
        name: "fashion_mnist", "folder:PATH" (one sub-folder a class) or "tfds:NAME" (any
            image-classification set of TensorFlow Datasets, `NAME[/CONFIG][:VERSION]`).
        data_dir: For "fashion_mnist" the folder with its files; for "tfds:" TFDS's folder.
        image_size: One number or (height, width): what images of varying sizes, of "folder:" and
            of some "tfds:" sets, are decoded at, and larger ones of "folder:". Images of one
            smaller size, and sets that are arrays, keep theirs: the model's graph resizes them.
            (None, None) keeps every image's own size; see `ImageFiles`.
        channels: 1 (grey) or 3 (colour); None for what the images have.
        validation_split: The share of the training images that validates, for sets that have
            no test or validation split of their own; None for a set that is not trained on, whose
            splits "train" and "validation" are then the whole set.
        skip_bad: For "folder:", leaves out files that cannot be read.
        seed: Of the choice of validation images.
        prefer_tensorflow: For "fashion_mnist": whether a TFDS folder, which takes TensorFlow to
            read, comes before IDX files; None for yes if Keras's backend is TensorFlow.

    Returns:
        A `Dataset` with the split "train", and "test" or "validation".

    Raises:
        InputError: The name has none of the three forms, or the source is missing or faulty.

    Example:
        >>> load_dataset("imagenet")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: a data set is named fashion_mnist, folder:PATH or \
tfds:NAME, got 'imagenet'
    """
    kind, colon, argument = name.partition(":")
    source = SOURCES.get(kind)
    # A form with a colon needs something after it, one without it allows nothing.
    if source is None or (":" in source.form) != bool(argument) or bool(colon) != bool(argument):
        *forms, last = (source.form for source in SOURCES.values())
        raise InputError(f"a data set is named {', '.join(forms)} or {last}, got {name!r}")
    given = {
        "data_dir": data_dir,
        "image_size": image_size,
        "channels": channels,
        "validation_split": validation_split,
        "skip_bad": skip_bad,
        "seed": seed,
        "prefer_tensorflow": prefer_tensorflow,
    }
    options = {option: given[option] for option in source.options}
    return source.load(*[argument] if argument else [], **options)
