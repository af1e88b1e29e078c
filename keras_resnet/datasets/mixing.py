"""Training batches: images and labels, mixed with each other where a recipe says so.

The mixing works on the raw images in NumPy, before a batch goes to the backend, so that it is the
same on every backend and under every strategy.
"""

import numpy as np


def _cutmix(images, others, random):
    count, *sizes = images.shape[:3]
    # The rectangle covers a uniformly distributed share of the image, less what lies outside.
    edge = np.sqrt(random.random(count))
    within = []
    for size in sizes:
        centre, half = random.random(count) * size, edge * size / 2
        first, last = (np.rint(centre + sign * half)[:, None] for sign in (-1, 1))
        pixels = np.arange(size)
        within.append((pixels >= first) & (pixels < last))
    covered = within[0][:, :, None] & within[1][:, None, :]
    return np.where(covered[..., None], others, images), 1 - covered.mean((1, 2))


def _mixup(images, others, random):
    kept = random.beta(0.2, 0.2, len(images))
    share = kept[:, None, None, None].astype("float32")
    return np.rint(share * images + (1 - share) * others).astype("uint8"), kept


MIXINGS = {
    # Yun et al., CutMix, 2019, section 3.
    "cutmix": _cutmix,
    # Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018, section 3.
    "mixup": _mixup,
}
"""name -> a function of images, other images and a NumPy generator. It returns the mixed images and
the share of each that is its own."""


def mix(name, images, labels, classes, random):
    """Mixes each image of a batch with another one of it, and the labels in the same shares.

    Args:
        name: A row of `MIXINGS`: "cutmix" pastes a rectangle of the other image, "mixup" is the
            weighted mean of both.
        images: uint8, [count, height, width, channels].
        labels: Integers in `range(classes)`, [count].
        classes: The number of classes.
        random: A NumPy generator.

    Returns:
        (mixed images, uint8; float32 [count, classes], each class's share of each image).

    Example:
        >>> images = np.zeros((2, 8, 8, 1), "uint8")
        >>> images[1] = 200
        >>> mixed, shares = mix("cutmix", images, [0, 1], 2, np.random.default_rng(1))
        >>> bool(np.allclose(mixed.mean((1, 2, 3)) / 200, shares[:, 1]))
        True
    """
    partners = random.permutation(len(images))
    mixed, kept = MIXINGS[name](images, images[partners], random)
    own = np.eye(classes)[labels]
    others = own[partners]
    return mixed, (kept[:, None] * own + (1 - kept[:, None]) * others).astype("float32")


class BatchReader:
    """Reads the training batches of a split.

    Args:
        split: A `datasets.Split`.
        class_weights: The weight of each class's images in the loss, a list; None for none. The
            mean loss of a batch is the sum of weight · loss over the number of its images, as for
            `fit(class_weight=…)`; accuracy counts every image once.
        mixing: A row of `MIXINGS`; None for none.
        classes: The number of classes; with `mixing`.
        seed: The seed of the mixing.
    """

    def __init__(self, split, class_weights=None, mixing=None, classes=None, seed=0):
        self.split = split
        self.class_weights = None if class_weights is None else np.asarray(class_weights, "float32")
        self.mixing, self.classes, self.seed = mixing, classes, seed

    @property
    def signature(self):
        """The (shape of an element, dtype) of each array that `read` returns."""
        labels = ((), "int64") if self.mixing is None else ((self.classes,), "float32")
        weights = [] if self.class_weights is None else [((), "float32")]
        return [(self.split.images.shape[1:], "uint8"), labels, *weights]

    def read(self, chosen, *place):
        """Returns (images, labels), and weights with `class_weights`.

        Args:
            chosen: The indices of the images.
            *place: Whole numbers that tell the batch from all others of the run, such as epoch and
                step: a resumed run mixes its batches like an uninterrupted one.

        Returns:
            uint8 [count, height, width, channels]; int64 [count], or with `mixing` float32 [count,
            classes]; float32 [count].
        """
        images, labels = self.split.images[chosen], self.split.labels[chosen].astype("int64")
        weights = self.class_weights
        if self.mixing is None:
            return (images, labels) if weights is None else (images, labels, weights[labels])
        random = np.random.default_rng([self.seed, *place])
        images, shares = mix(self.mixing, images, labels, self.classes, random)
        return (images, shares) if weights is None else (images, shares, shares @ weights)
