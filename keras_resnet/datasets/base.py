"""`Split` and `Dataset`, the types of all data sets, and the choice of validation images."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_resnet.utils import arrays
from keras_resnet.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: images and their labels.

    Attributes:
        images: uint8, [count, height, width, channels]. A NumPy array, or an object with `shape`,
            `len()` and `images[indices]`, which returns such an array for an array of indices:
            `ImageFiles` decodes files when a batch needs them.
        labels: int64, [count], each in `range(number of classes)`. Labels of the shape
            [count, 1], and lists, are converted.

    Raises:
        InputError: The images or the labels have another type or shape; see `utils.arrays`.
    """

    images: Any
    labels: np.ndarray

    def __post_init__(self):
        if isinstance(self.images, (np.ndarray, list, tuple)) or hasattr(self.images, "numpy"):
            object.__setattr__(self, "images", arrays.as_images(self.images, "a split"))
        else:
            # Images on disk are not decoded here: only their declared type and shape are checked.
            arrays.check_image_type(getattr(self.images, "dtype", "uint8"), "a split")
            arrays.check_image_shape(self.images.shape, "a split")
        object.__setattr__(self, "labels", arrays.as_labels(self.labels))
        if len(self.images) != len(self.labels):
            raise InputError(
                "a split needs one label for each image, "
                f"got {len(self.images)} images and {len(self.labels)} labels"
            )

    def __len__(self):
        return len(self.labels)

    def order(self, seed, epoch):
        """Returns the shuffled order of an epoch, which depends on `seed` and `epoch` only.

        A resumed run therefore sees the images in the order of an uninterrupted run.
        """
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def batches(self, batch_size):
        """Yields (images, labels) of at most `batch_size`, in the split's own order."""
        for start in range(0, len(self), batch_size):
            indices = np.arange(start, min(start + batch_size, len(self)))
            yield self.images[indices], self.labels[indices]

    def select(self, indices):
        """Returns the `Split` of some images; image files stay undecoded."""
        select = getattr(self.images, "select", self.images.__getitem__)
        return Split(select(indices), self.labels[indices])


def cut_batches(count, batch_size, least=1):
    """Cuts the images of an epoch into batches.

    Args:
        count: Number of images.
        batch_size: Images in a batch; the last batch may have fewer.
        least: The smallest last batch. A smaller one is merged with the batch before it, if there
            is one.

    Returns:
        A list of slices, in order.

    Example:
        >>> [cut.stop - cut.start for cut in cut_batches(9, 4)]
        [4, 4, 1]
        >>> [cut.stop - cut.start for cut in cut_batches(9, 4, least=2)]
        [4, 5]
    """
    starts = list(range(0, count, batch_size))
    if len(starts) > 1 and count - starts[-1] < min(least, batch_size):
        del starts[-1]
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Labelled images in named splits.

    Attributes:
        name: The name that the user gave: "fashion_mnist", "folder:PATH", "tfds:NAME".
        class_names: One name for each label.
        splits: "train", and "test" or "validation" or both.
        source: The place where it was found, in one line.
        fingerprint: sha256 (hex) of the contents; see `fingerprint_arrays`.
        remarks: Sentences about the data that the user should know.
        is_labelled: Whether the labels are known.

    Raises:
        InputError: A label of a split has no class name.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    source: str
    fingerprint: str
    remarks: tuple[str, ...] = ()
    is_labelled: bool = True

    def __post_init__(self):
        for split in self.splits.values():
            arrays.as_labels(split.labels, len(self.class_names))

    @property
    def image_shape(self):
        """(height, width, channels) of every image."""
        return tuple(self.splits["train"].images.shape[1:])

    @property
    def evaluation_split(self):
        """The name of the split to evaluate on: "test" if there is one, else "validation"."""
        return "test" if "test" in self.splits else "validation"

    @property
    def selection_split(self):
        """The name of the split that training looks at after each epoch, to stop or to choose.

        It is "validation" if there is one: a test split is for one look, after training.
        """
        return "validation" if "validation" in self.splits else self.evaluation_split

    def class_counts(self):
        """Returns the number of training images of each class, int64."""
        return np.bincount(self.splits["train"].labels, minlength=len(self.class_names))


MOST_COUNTED = 12
"""A line names the counts of so many classes; of more it has the smallest, median and largest."""

STRONG_IMBALANCE = 5
"""The largest class over the smallest from which on imbalance is pointed out."""


def describe_counts(dataset):
    """Returns one line about the number of training images of each class.

    Args:
        dataset: A `Dataset`.

    Example:
        >>> split = Split(np.zeros((3, 2, 2, 1), "uint8"), [0, 1, 1])
        >>> describe_counts(Dataset("x", ("cat", "dog"), {"train": split}, "here", "0"))
        'training images per class: cat 1, dog 2'
    """
    counts = dataset.class_counts()
    if len(set(counts)) == 1:
        text = f"{counts[0]:,} in each of {len(counts)}"
    elif len(counts) <= MOST_COUNTED:
        pairs = zip(dataset.class_names, counts, strict=True)
        text = ", ".join(f"{name} {count:,}" for name, count in pairs)
    else:
        least, most = (dataset.class_names[place(counts)] for place in (np.argmin, np.argmax))
        text = (
            f"{counts.min():,} ({least}) to {counts.max():,} ({most}), median "
            f"{np.median(counts):,.0f}, {len(counts)} classes"
        )
    return f"training images per class: {text}"


def find_imbalance(counts):
    """Returns how many times as many images the largest class has as the smallest; None if few.

    Args:
        counts: The number of images of each class; empty classes are left out.

    Example:
        >>> find_imbalance(np.array([10, 0, 100])), find_imbalance(np.array([10, 20]))
        (10.0, None)
    """
    present = counts[counts > 0]
    ratio = float(present.max() / present.min())
    return ratio if ratio >= STRONG_IMBALANCE else None


def balanced_weights(counts):
    """Returns the weight of each class that makes all classes weigh the same.

    Args:
        counts: The number of images of each class; the weight of a class without images is 0.

    Returns:
        A list of floats; their mean over all images is 1.

    Example:
        >>> balanced_weights(np.array([10, 30]))
        [2.0, 0.6666666666666666]
    """
    present = np.count_nonzero(counts)
    return [float(sum(counts) / (present * count)) if count else 0.0 for count in counts]


def fingerprint_arrays(*splits):
    """Returns the sha256 (hex) of the splits' images and labels, independent of their order.

    A prepared TFDS folder has shuffled examples, and the IDX files have not: with the same data
    both have the same fingerprint.

    Args:
        *splits: `Split`s of NumPy arrays.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> images = np.arange(8, dtype="uint8").reshape(2, 2, 2, 1)
        >>> a = Split(images, np.array([0, 1]))
        >>> b = Split(images[::-1], np.array([1, 0]))
        >>> fingerprint_arrays(a) == fingerprint_arrays(b)
        True
    """
    whole = hashlib.sha256()
    for split in splits:
        labels = np.asarray(split.labels, dtype="<u4").reshape(-1, 1).view("uint8")
        rows = np.hstack([labels, np.asarray(split.images).reshape(len(split), -1)])
        whole.update(repr((len(split), *split.images.shape[1:])).encode())
        # As raw bytes a row is one item, and items can be sorted.
        whole.update(np.sort(np.ascontiguousarray(rows).view(f"V{rows.shape[1]}").ravel()))
    return whole.hexdigest()


def hold_out(split, validation_split, seed):
    """Returns {"train": …, "validation": …} of one split; see `stratified_split`."""
    parts = stratified_split(split.labels, validation_split, seed)
    return dict(zip(("train", "validation"), map(split.select, parts), strict=True))


def stratified_split(labels, validation_split, seed):
    """Splits examples into a training and a validation part, class by class.

    Each class gives the nearest whole number to its fraction, but at least one example to each
    part; a class with one example gives it to training. Each class is drawn separately, so that
    more images of one class do not change the choice in another class.

    Args:
        labels: Whole numbers, [count].
        validation_split: The fraction for validation, above 0 and below 1; None for a set that is
            not trained on: both parts are then the whole.
        seed: A whole number; the same seed gives the same parts.

    Returns:
        Two sorted int64 arrays of indices: training, validation.

    Raises:
        InputError: `validation_split` is out of range, or no class has two images.

    Example:
        >>> train, validation = stratified_split([0] * 8 + [1] * 2, 0.25, seed=0)
        >>> len(train), len(validation), int((validation >= 8).sum())
        (7, 3, 1)
    """
    if validation_split is None:
        return np.arange(len(labels)), np.arange(len(labels))
    if not 0 < validation_split < 1:
        raise InputError(f"`validation_split` must be above 0 and below 1, got {validation_split}")
    labels = np.asarray(labels)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(validation_split * len(members)), 1), len(members) - 1)
        order = np.random.default_rng([seed, int(label)]).permutation(members)
        chosen[order[:count]] = True
    if not chosen.any():
        raise InputError("a validation part needs a class with at least 2 images, got none")
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
