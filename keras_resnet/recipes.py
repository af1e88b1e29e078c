"""The recipes for training a network, as data. To add a recipe, add a row."""

import dataclasses
import math

from keras_resnet.utils.errors import InputError, check_count
from keras_resnet.utils.geometry import find_crop_pct, resized_length


def _row_of(table, default):
    return dataclasses.field(default=default, metadata={"table": table})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        description: Its purpose, one line.
        epochs: Passes over the training images; None: as many as `images_seen` needs.
        batch_size: Images per step.
        image_size: Height and width of the network's input, in pixels. With "shorter_edge", smaller
            images make it smaller, unless the setting `image_size` was given.
        learning_rate: The learning rate; with a schedule, its peak.
        model: The default network, a row of `models.SPECS`.
        optimizer: A row of `training.optimizers.OPTIMIZERS`.
        schedule: A row of `training.optimizers.SCHEDULES`: "constant", "warmup" (constant after a
            linear warm-up), or "cosine" (after a linear warm-up).
        warmup: Share of all steps in which the rate rises from zero; not used by "constant".
        augmentation: Rows of `preprocessing.AUGMENTATIONS`.
        mixing: A row of `datasets.mixing.MIXINGS`, for training images; None for none.
        variant: A row of `models.VARIANTS`.
        stem: A row of `models.STEMS`; by default that of the network.
        small_stem_up_to: Image size up to which the default stem is "small".
        images_seen: Training images of a whole run, over all epochs; see `choose_epochs`.
        resize: A row of `datasets.images.RESIZES`, and the `resize` of `ImagePreprocessing`. With
            "shorter_edge" the trained model takes photographs of any size.
        crop_pct: Share of the shorter edge that evaluation keeps, in the middle.
        label_smoothing: See `losses.Crossentropy`.
        patience: Share of the epochs without a better one after which a run stops. The result is
            then the best epoch's network. None: all epochs are trained, and the last one counts.
        head_epochs: First epochs of fine-tuning, in which the new head alone is trained; none where
            the head is that of the checkpoint, or frozen.
        head_learning_rate: The learning rate of these epochs, whatever the setting `learning_rate`:
            a new head needs the same rate in every network.
        frozen_statistics_below: Training images below which fine-tuning keeps each
            BatchNormalization as the checkpoint has it, statistics, scale and offset.
    """

    description: str
    epochs: int | None
    batch_size: int
    image_size: int
    learning_rate: float
    model: str = _row_of("models.SPECS", "resnet18")
    optimizer: str = _row_of("training.optimizers.OPTIMIZERS", "adam")
    schedule: str = _row_of("training.optimizers.SCHEDULES", "constant")
    warmup: float = 0.2
    augmentation: tuple[str, ...] = _row_of("preprocessing.AUGMENTATIONS", ())
    mixing: str | None = _row_of("datasets.mixing.MIXINGS", None)
    variant: str = _row_of("models.VARIANTS", "d2l")
    stem: str | None = _row_of("models.STEMS", None)
    small_stem_up_to: int = 0
    images_seen: int | None = None
    resize: str = _row_of("datasets.images.RESIZES", "squash")
    crop_pct: float = 1.0
    label_smoothing: float = 0.0
    patience: float | None = None
    head_epochs: int = 0
    head_learning_rate: float | None = None
    frozen_statistics_below: int = 0

    def __post_init__(self):
        names = [self.augmentation] if isinstance(self.augmentation, str) else self.augmentation
        object.__setattr__(self, "augmentation", tuple(names))  # JSON has lists
        for name in (
            "batch_size",
            "image_size",
            "images_seen" if self.epochs is None else "epochs",
        ):
            check_count(name, getattr(self, name))
        rate = self.learning_rate
        if not isinstance(rate, (int, float)) or not 0 < rate < float("inf"):
            raise InputError(f"`learning_rate` must be positive and finite, got {rate!r}")


RECIPES = {
    "quick": Recipe(
        "92 % on Fashion-MNIST in about six minutes, on two CPU cores",
        epochs=6,
        batch_size=256,
        image_size=28,
        learning_rate=4e-3,
        schedule="cosine",
        label_smoothing=0.1,
    ),
    "fast": Recipe(
        "small grey images such as Fashion-MNIST: a narrow network of 1.2 M parameters",
        epochs=6,
        batch_size=256,
        image_size=28,
        learning_rate=8e-3,
        model="resnet12_narrow",
        optimizer="adamw",
        schedule="cosine",
        augmentation=("flip",),
        variant="torchvision",
        label_smoothing=0.1,
    ),
    "d2l": Recipe(
        "Dive into Deep Learning (d2l): images of 96 pixels, Adam at 0.001, five epochs",
        epochs=5,
        batch_size=256,
        image_size=96,
        learning_rate=1e-3,
    ),
    "photos": Recipe(
        "a folder of photographs, in minutes on two CPU cores; with --weights: fine-tuning",
        epochs=None,
        images_seen=24_000,
        batch_size=32,
        image_size=128,
        learning_rate=1e-3,
        schedule="cosine",
        augmentation=("crop", "colour", "flip"),
        variant="torchvision",
        small_stem_up_to=40,
        resize="shorter_edge",
        crop_pct=0.875,
        label_smoothing=0.1,
        patience=0.4,
    ),
    "best": Recipe(
        "the highest accuracy on small images, with a GPU: ResNet-18 v2, 200 epochs; not measured",
        epochs=200,
        batch_size=128,
        image_size=28,
        learning_rate=0.1,
        optimizer="sgd",
        schedule="cosine",
        warmup=0.025,
        augmentation=("flip", "shift"),
        mixing="cutmix",
        variant="v2",
        stem="small",
    ),
}


# Recipe -> its values that change when a run starts from the weights of another.
FINE_TUNING = {
    "photos": {
        "images_seen": 12_000,
        "image_size": 224,
        "learning_rate": 3e-4,
        "head_epochs": 3,
        "head_learning_rate": 3e-3,
        "frozen_statistics_below": 64,
    },
}

# The same for weights of a network with the stem "small", such as those of small grey images: at
# the rate for networks of ImageNet they change too little in a run of minutes.
FINE_TUNING_SMALL = {"photos": {"learning_rate": 1e-3}}

LEAST_SIZE = 128
"""Pixels of photographs for weights that were trained on smaller images, such as Fashion-MNIST."""

LEAST_EPOCHS, MOST_EPOCHS = 8, 60


def choose_epochs(images_seen, images):
    """Returns the number of epochs in which a run sees about `images_seen` images.

    Args:
        images_seen: The number of training images over all epochs.
        images: The number of training images.

    Returns:
        A number in `LEAST_EPOCHS` … `MOST_EPOCHS`.

    Example:
        >>> [choose_epochs(24_000, images) for images in (75, 700, 10_000)]
        [60, 35, 8]
    """
    return min(max(math.ceil(images_seen / images), LEAST_EPOCHS), MOST_EPOCHS)


def find_recipe(name, stem=None):
    """Returns a row of `RECIPES`.

    Args:
        name: The row's name.
        stem: The stem of the network whose weights the run starts from, for `FINE_TUNING`; None for
            a run from scratch.

    Example:
        >>> [find_recipe("photos", stem).learning_rate for stem in (None, "imagenet", "small")]
        [0.001, 0.0003, 0.001]
    """
    changes = {} if stem is None else FINE_TUNING.get(name, {})
    if stem == "small":
        changes = {**changes, **FINE_TUNING_SMALL.get(name, {})}
    return dataclasses.replace(RECIPES[name], **changes)


def settle(recipe, images, image_shape, *, stem, fixed_size=False):
    """Returns a recipe with the values that depend on the data.

    Args:
        recipe: A `Recipe`.
        images: The number of training images.
        image_shape: (height, width, channels) of the images as they were loaded.
        stem: The stem of the network, where the recipe has none.
        fixed_size: Whether the recipe's image size stays, however small the images are.

    Returns:
        A `Recipe` with `epochs` and `stem`.

    Example:
        >>> settled = settle(RECIPES["photos"], 700, (32, 32, 3), stem="imagenet")
        >>> settled.epochs, settled.image_size, settled.crop_pct, settled.stem
        (35, 32, 1.0, 'small')
    """
    size, crop_pct = recipe.image_size, recipe.crop_pct
    edge = min(image_shape[:2])
    if recipe.resize == "shorter_edge" and not fixed_size and edge < stored_size(recipe):
        size = min(size, edge)
        crop_pct = find_crop_pct(size, edge)
    epochs = recipe.epochs or choose_epochs(recipe.images_seen, images)
    is_small = size <= recipe.small_stem_up_to
    return dataclasses.replace(
        recipe,
        epochs=epochs,
        image_size=size,
        crop_pct=crop_pct,
        stem=recipe.stem or ("small" if is_small else stem),
        # A run of few epochs keeps some for the whole network.
        head_epochs=min(recipe.head_epochs, epochs // 2),
    )


def stored_size(recipe):
    """Returns the size at which images are loaded: their shorter edge with "shorter_edge".

    Example:
        >>> stored_size(RECIPES["photos"]), stored_size(RECIPES["quick"])
        (146, 28)
    """
    return resized_length(recipe.image_size, recipe.crop_pct)


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
    """Returns a recipe for more replicas: batch size and learning rates times their number.

    The rates rise to their new values over `WARMUP_EPOCHS`, or over a fifth of a shorter run. A
    recipe with a longer warm-up keeps it.

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
    rising = min(0.2, WARMUP_EPOCHS / (recipe.epochs or MOST_EPOCHS))
    own = {"schedule": "warmup", "warmup": rising}
    if recipe.schedule != "constant":
        own = {"warmup": max(rising, recipe.warmup)}
    head = recipe.head_learning_rate
    return dataclasses.replace(
        recipe,
        batch_size=recipe.batch_size * replicas,
        learning_rate=recipe.learning_rate * replicas,
        head_learning_rate=head and head * replicas,
        **own,
    )
