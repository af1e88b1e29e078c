"""How a set without its own evaluation split is shared between training and validation."""

import numpy as np

from keras_resnet.utils.errors import InputError


def stratified_share(labels, share, seed):
    """Splits examples into a training and a validation part, class by class.

    Each class gives the nearest whole number to its `share`, but at least one example to each
    part; a class with one example gives it to training. Each class is drawn by itself, so more
    images in one class do not move those of another.

    Args:
        labels: Whole numbers, [count].
        share: The part for validation, above 0 and below 1; None for a set that is not trained
            on: then each part is the whole.
        seed: A whole number; the same seed gives the same parts.

    Returns:
        Two sorted int64 arrays of indices: training, validation.

    Raises:
        InputError: `share` is out of range, or nothing is left to validate on.

    Example:
        >>> train, validation = stratified_share([0] * 8 + [1] * 2, share=0.25, seed=0)
        >>> len(train), len(validation), int((validation >= 8).sum())
        (7, 3, 1)
    """
    if share is None:
        return np.arange(len(labels)), np.arange(len(labels))
    if not 0 < share < 1:
        raise InputError(f"`validation_split` must be above 0 and below 1, got {share}")
    labels = np.asarray(labels)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        order = np.random.default_rng([seed, int(label)]).permutation(members)
        chosen[order[:count]] = True
    if not chosen.any():
        raise InputError("to share out a validation part, a class needs at least 2 images")
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
