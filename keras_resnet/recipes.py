"""The recipes for training a network, as data. To add a recipe, add a row."""

import dataclasses

from keras_resnet.utils.errors import InputError, check_count


def _row_of(table, default):
    return dataclasses.field(default=default, metadata={"table": table})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        description: Its purpose, one line.
        epochs: Passes over the training images.
        batch_size: Images per step.
        image_size: Height and width that images are resized to, in pixels.
        learning_rate: The learning rate; with a schedule, its peak.
        optimizer: A row of `training.trainer.OPTIMIZERS`.
        schedule: A row of `training.trainer.SCHEDULES`: "constant", "warmup" (constant after a
            linear warm-up), or "cosine" (after a linear warm-up).
        warmup: Share of all steps in which the rate rises from zero; not used by "constant".
        augmentation: Rows of `preprocessing.AUGMENTATIONS`.
        variant: A row of `models.VARIANTS`.
        stem: A row of `models.STEMS`; by default that of the network.
    """

    description: str
    epochs: int
    batch_size: int
    image_size: int
    learning_rate: float
    optimizer: str = _row_of("training.trainer.OPTIMIZERS", "adam")
    schedule: str = _row_of("training.trainer.SCHEDULES", "constant")
    warmup: float = 0.2
    augmentation: tuple[str, ...] = _row_of("preprocessing.AUGMENTATIONS", ())
    variant: str = _row_of("models.VARIANTS", "d2l")
    stem: str | None = _row_of("models.STEMS", None)

    def __post_init__(self):
        names = [self.augmentation] if isinstance(self.augmentation, str) else self.augmentation
        object.__setattr__(self, "augmentation", tuple(names))  # JSON has lists
        for name in ("epochs", "batch_size", "image_size"):
            check_count(name, getattr(self, name))
        rate = self.learning_rate
        if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
            raise InputError(f"`learning_rate` must be positive and finite, got {rate!r}")


RECIPES = {
    "quick": Recipe(
        "over 90 % on Fashion-MNIST in minutes, on two CPU cores",
        epochs=2,
        batch_size=128,
        image_size=28,
        learning_rate=2e-3,
        schedule="cosine",
    ),
    "d2l": Recipe(
        "Dive into Deep Learning (d2l): images of 96 pixels, Adam at 0.001, five epochs",
        epochs=5,
        batch_size=256,
        image_size=96,
        learning_rate=1e-3,
    ),
}


def override(recipe, settings):
    """Returns a recipe with the values of a run's settings.

    Args:
        recipe: A `Recipe`.
        settings: A `config.TrainConfig`. Its fields that a recipe has, too, override the recipe's
            where they are not None.
    """
    names = [field.name for field in dataclasses.fields(recipe)]
    found = {name: getattr(settings, name, None) for name in names}
    return dataclasses.replace(recipe, **{k: v for k, v in found.items() if v is not None})


WARMUP_EPOCHS = 5
"""Epochs of warm-up for a scaled batch: Goyal et al. 2017, section 2.2."""


def scale_batch(recipe, replicas):
    """Returns a recipe for more replicas: batch size and learning rate times their number.

    The rate rises to its new value over `WARMUP_EPOCHS`, or over a fifth of a shorter run. A recipe
    with a longer warm-up keeps it.

    Args:
        recipe: A `Recipe`, for one replica.
        replicas: The number of replicas.

    Returns:
        A `Recipe`.

    Source:
        Goyal et al., Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour, 2017, section 2.

    Example:
        >>> scaled = scale_batch(RECIPES["d2l"], 4)
        >>> scaled.batch_size, scaled.learning_rate, scaled.schedule, scaled.warmup
        (1024, 0.004, 'warmup', 0.2)
    """
    if replicas == 1:
        return recipe
    rising = min(0.2, WARMUP_EPOCHS / recipe.epochs)
    own = {"schedule": "warmup", "warmup": rising}
    if recipe.schedule != "constant":
        own = {"warmup": max(rising, recipe.warmup)}
    return dataclasses.replace(
        recipe,
        batch_size=recipe.batch_size * replicas,
        learning_rate=recipe.learning_rate * replicas,
        **own,
    )
