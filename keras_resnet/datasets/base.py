"""The one type every data set has, whatever its source."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from keras_resnet.utils import arrays
from keras_resnet.utils.errors import InputError


@dataclasses.dataclass(frozen=True)
class Split:
    """One split: images that can be indexed, and their labels.

    Attributes:
        images: uint8, [count, height, width, channels]. A NumPy array, or anything with `shape`,
            `len()` and `images[indices]` that gives such an array for an array of indices, so
            that files can stay on disk until a batch needs them.
        labels: int64, [count], each in `range(number of classes)`. Labels of the shape
            [count, 1], and lists, are converted.

    Raises:
        InputError: If images or labels are not so; see `arrays`.
    """

    images: Any
    labels: np.ndarray

    def __post_init__(self):
        if isinstance(self.images, (np.ndarray, list, tuple)) or hasattr(self.images, "numpy"):
            object.__setattr__(self, "images", arrays.as_images(self.images, "a split"))
        else:
            # Images that stay on disk are not read here: only what they say of themselves.
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
        """Returns the shuffled order of one epoch, a function of `seed` and `epoch` alone.

        So a run that is interrupted and resumed sees the images that an unbroken run sees.
        """
        return np.random.default_rng([seed, epoch]).permutation(len(self))

    def batches(self, batch_size):
        """Yields (images, labels) of at most `batch_size`, in the split's own order."""
        for start in range(0, len(self), batch_size):
            indices = np.arange(start, min(start + batch_size, len(self)))
            yield self.images[indices], self.labels[indices]


def cut_batches(count, batch_size, least=1):
    """Cuts the images of an epoch into batches.

    Args:
        count: Images an epoch.
        batch_size: Images a batch; the last may have fewer.
        least: Images that a short last batch needs. With fewer it joins the batch before it, if
            there is one.

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
        name: What the user called it: "fashion_mnist", "folder:PATH", "tfds:NAME".
        class_names: One name for each label.
        splits: "train" and the split that measures: "test" or "validation".
        source: One line that says where it was found.
        fingerprint: sha256 (hex) of what it holds; see `fingerprint_arrays`.

    Raises:
        InputError: If a label of a split has no class name.
    """

    name: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Split]
    source: str
    fingerprint: str

    def __post_init__(self):
        for split in self.splits.values():
            arrays.as_labels(split.labels, len(self.class_names))

    @property
    def image_shape(self):
        """(height, width, channels) of every image."""
        return tuple(self.splits["train"].images.shape[1:])

    @property
    def evaluation_split(self):
        """The name of the split that measures: "test" where there is one, else "validation"."""
        return "test" if "test" in self.splits else "validation"


def fingerprint_arrays(*splits):
    """Returns the sha256 (hex) of the splits' images and labels, whatever their order.

    A prepared TFDS folder keeps its examples shuffled and the IDX files do not; both hold the
    same data, so both have the same fingerprint.

    Args:
        *splits: `Split`s that hold NumPy arrays.

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
        # As raw bytes a row is one item, and items sort.
        whole.update(np.sort(np.ascontiguousarray(rows).view(f"V{rows.shape[1]}").ravel()))
    return whole.hexdigest()
