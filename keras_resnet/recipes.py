"""The recipes, as data: how a network is trained. Adding one is adding a row."""

import dataclasses

from keras_resnet.errors import InputError, check_count


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        description: What it is for, one line.
        epochs: Passes over the training images.
        batch_size: Images a step.
        image_size: Height and width that images are resized to, in pixels.
        learning_rate: The rate; with a schedule, its peak.
        optimizer: A row of `training.OPTIMIZERS`.
        schedule: A row of `training.SCHEDULES`: "constant", or "cosine" with linear warm-up.
        warmup: Share of all steps in which the rate rises from zero; "cosine" alone uses it.
        augmentation: Rows of `preprocessing.AUGMENTATIONS`.
        variant: A row of `models.VARIANTS`.
        stem: A row of `models.STEMS`; None is the network's own.
    """

    description: str
    epochs: int
    batch_size: int
    image_size: int
    learning_rate: float
    optimizer: str = "adam"
    schedule: str = "constant"
    warmup: float = 0.2
    augmentation: tuple[str, ...] = ()
    variant: str = "d2l"
    stem: str | None = None

    def __post_init__(self):
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
    "seed": Recipe(
        "the textbook's: images of 96 pixels, Adam at 0.001, five epochs",
        epochs=5,
        batch_size=256,
        image_size=96,
        learning_rate=1e-3,
    ),
}
