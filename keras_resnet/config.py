"""Every setting of a run, stated once: its name, default, help, choices and command-line option.

The options of the command line, the keyword arguments of `train`, config.json, the check on
resume and the report's table are all made from the fields of `TrainConfig`. To add a setting, add
a field.

This module imports neither Keras nor TensorFlow: `keras-resnet --help` reads it.
"""

import argparse
import dataclasses
import importlib
import os
import sys

from keras_resnet.recipes import RECIPES
from keras_resnet.utils.errors import InputError, look_up

LARGEST = {int: 1_000_000, float: sys.float_info.max}
CLASS_WEIGHTS = ("none", "balanced")
DEFAULT_RECIPES = {"folder": "photos"}
"""The recipe where none is named, by the kind of the data set; "quick" for all others."""
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
WORKER_TIMEOUT = 300.0
"""How long a worker waits for the others by default, in seconds."""


def positive(kind):
    """Returns a parser of command-line text to a positive number.

    Args:
        kind: `int` or `float`.

    Example:
        >>> positive(int)("3")
        3
    """

    def parse(text):
        value = kind(text)
        # A larger integer fails with a traceback deep in a library.
        if not 0 < value <= LARGEST[kind]:
            raise argparse.ArgumentTypeError(
                f"must be positive and at most {LARGEST[kind]:g}, got {text}"
            )
        return value

    parse.__name__ = kind.__name__  # argparse prints it: "invalid int value"
    return parse


def _share(text):
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


_share.__name__ = "float"  # as in `positive`


def _setting(default, help, *, parse=str, metavar="NAME", choices=None, table=None):
    """Returns the dataclass field of a setting.

    Args:
        default: The value where none is given.
        help: One sentence, for the command line and the documentation.
        parse: Function that converts an option's text; `bool` makes a flag.
        metavar: The value's name in `--help`.
        choices: The allowed values, where they are few.
        table: The table with one row per allowed value, as "module.NAME".
    """
    option = {"help": help}
    if parse is bool:
        option |= {"action": "store_true", "default": None}
    elif choices:
        option |= {"choices": choices}
    else:
        option |= {"metavar": metavar} | ({} if parse is str else {"type": parse})
    return dataclasses.field(default=default, metadata={"option": option, "table": table})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """How the images are loaded."""

    dataset: str = _setting(
        "fashion_mnist",
        "fashion_mnist (default), folder:PATH (one sub-folder a class; or train, val and test with "
        "such; or a CSV of file,label) or tfds:NAME",
    )
    data_dir: str | None = _setting(
        None, "folder of the data set, if it is not in a usual place", metavar="DIR"
    )
    validation_split: float = _setting(
        0.1,
        "share of the images to hold out if a folder has no validation split, another data set no "
        "test split (default: 0.1; a data set other than the training set is evaluated as a whole)",
        parse=_share,
        metavar="SHARE",
    )
    skip_bad: bool = _setting(
        False, "leave out unreadable images of a folder instead of stopping", parse=bool
    )
    seed: int = _setting(
        0,
        "seed of the first weights, the order of the images and the held-out images (default: 0)",
        parse=int,
        metavar="N",
    )


@dataclasses.dataclass(frozen=True)
class TrainConfig(DataConfig):
    """The settings of a training run; the fields of `DataConfig` are among them.

    A setting that is None has the recipe's or the checkpoint's value. A recipe that is None becomes
    that of `DEFAULT_RECIPES`, and a model that is None the recipe's.
    """

    model: str | None = _setting(
        None,
        "resnet18 … resnet152, resnext50_32x4d, …: a row of models.SPECS (default: the recipe's, "
        "mostly resnet18)",
        table="models.SPECS",
    )
    recipe: str | None = _setting(
        None,
        "training recipe, listed below (default: photos for a folder, else quick)",
        table="recipes.RECIPES",
    )
    epochs: int | None = _setting(
        None,
        "number of epochs, instead of the recipe's; with --resume, the run's new total",
        parse=positive(int),
        metavar="N",
    )
    batch_size: int | None = _setting(
        None, "images per step, instead of the recipe's", parse=positive(int), metavar="N"
    )
    image_size: int | None = _setting(
        None,
        "height and width of the network's input, instead of the recipe's",
        parse=positive(int),
        metavar="PIXELS",
    )
    learning_rate: float | None = _setting(
        None, "learning rate, instead of the recipe's", parse=positive(float), metavar="RATE"
    )
    variant: str | None = _setting(
        None,
        "d2l, torchvision, v1, cifar, plain, v2, keras_v1 or keras_v2",
        table="models.VARIANTS",
    )
    stem: str | None = _setting(None, "imagenet, small or deep", table="models.STEMS")
    weights: str | None = _setting(
        None,
        "fine-tune: initial weights, in a checkpoint that `convert` reads or a .keras file of this "
        "package, or by a published network's name, such as timm/resnet18.a1_in1k; they also set "
        "variant and stem; a head with other classes is new",
        metavar="FILE",
    )
    freeze: list[str] | None = _setting(  # noqa: RUF009
        None,
        "modules that keep the values of --weights, such as stem,stage1 (see `summary`)",
        metavar="NAMES",
    )
    normalize: str = _setting(
        "none",
        "none, imagenet (published PyTorch weights), inception (keras.applications' V2), caffe "
        "(keras.applications' ResNet50/101/152), 1/255, or 0-255 (the network scales); default: "
        "that of the .keras file or of the published network in --weights, else none",
        table="preprocessing.NORMALIZATIONS",
    )
    class_weights: str = _setting(
        "none",
        "balanced gives each class the same weight in the loss, by its number of images; none "
        "(default) each image",
        choices=CLASS_WEIGHTS,
    )
    precision: str = _setting(
        "auto",
        "dtype of the computation; auto (default) uses bfloat16 if the machine supports it",
        choices=PRECISIONS,
    )
    sync_batchnorm: bool = _setting(
        False, "compute BatchNormalization's statistics over all replicas", parse=bool
    )
    scale_batch: bool = _setting(
        False,
        "multiply batch size and learning rate by the number of replicas, with a warm-up",
        parse=bool,
    )

    def __post_init__(self):
        if self.recipe is None:
            kind = str(self.dataset).partition(":")[0]
            self._set("recipe", DEFAULT_RECIPES.get(kind, "quick"))
        if self.model is None:
            self._set("model", look_up(RECIPES, self.recipe, "recipe").model)
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**31:
            raise InputError(f"`seed` must be a whole number in 0 … 2³¹ − 1, got {self.seed!r}")
        if self.weights is not None and not isinstance(self.weights, (str, os.PathLike)):
            kind = type(self.weights).__name__
            raise InputError(f"`weights` must be the path of a checkpoint, got {kind}")
        # In types of JSON: on resume these are compared with config.json.
        self._set("weights", self.weights and os.fspath(self.weights))
        self._set("data_dir", self.data_dir and os.fspath(self.data_dir))
        self._set("freeze", _as_names(self.freeze))
        if self.freeze and self.weights is None:
            raise InputError(
                "`freeze` needs `weights`, --freeze needs --weights: a layer that is neither "
                f"loaded nor trained would stay random; got {', '.join(self.freeze)}"
            )

    def _set(self, name, value):
        object.__setattr__(self, name, value)  # the class is frozen

    def check(self):
        """Raises an `InputError` for a value that its setting does not allow."""
        check_rows(self)
        for field in dataclasses.fields(self):
            if choices := field.metadata["option"].get("choices"):
                look_up(dict.fromkeys(choices), getattr(self, field.name), field.name)

    def resume(self, given):
        """Returns these settings with the settings given for a resumed run.

        Args:
            given: name -> value; None means not given. Only `epochs` may differ.

        Raises:
            InputError: If another value differs.
        """
        given = given_settings(given)
        asked = dataclasses.replace(self, **given)
        for name in given:
            before, after = getattr(self, name), getattr(asked, name)
            if before != after and name != "epochs":
                raise InputError(
                    f"a run is resumed with the settings it was started with: `{name}` was "
                    f"{before!r}, got {after!r}; leave it out, or start a new run"
                )
        return asked


def check_rows(record):
    """Raises an `InputError` for a value, or a value in a tuple, that is no row of its table.

    Args:
        record: An instance of a dataclass. The metadata of a field can name its "table" as
            "module.NAME"; as text, since the modules import Keras.
    """
    for field in dataclasses.fields(record):
        value, table = getattr(record, field.name), field.metadata.get("table")
        if table and value is not None:
            module, _, name = table.rpartition(".")
            rows = getattr(importlib.import_module(f"keras_resnet.{module}"), name)
            for each in value if isinstance(value, tuple) else (value,):
                look_up(rows, each, field.name)


def _as_names(names):
    """Returns `freeze` as a list without duplicates; None if it is empty."""
    if names is None:
        return None
    parts = names.split(",") if isinstance(names, str) else names
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise InputError(f"`freeze` must be a list of names of modules, got {names!r}")
    return list(dict.fromkeys(part.strip() for part in parts)) or None


def given_settings(values):
    """Returns the settings that were given: those that are not None.

    Args:
        values: name -> value.

    Raises:
        TypeError: If a name is no field of `TrainConfig`.
    """
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    for name in values:
        if name not in names:
            raise TypeError(f"no setting is named {name!r}; the settings are {', '.join(names)}")
    return {name: value for name, value in values.items() if value is not None}


def data_settings(config):
    """Returns the settings of a `TrainConfig` or `DataConfig` that say how images are loaded."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(DataConfig)}


def recorded_data_settings(record):
    """Returns the data settings in a record, such as a model's metadata; others are left out.

    Args:
        record: A dict from a file. Values of a type other than the default's are left out, too.
    """
    found = {}
    for field in dataclasses.fields(DataConfig):
        kind = str if field.default is None else type(field.default)
        if isinstance(record.get(field.name), kind):
            found[field.name] = record[field.name]
    return found


def options(config_class, *names, leave_out=()):
    """Returns command-line options: option -> keyword arguments of `add_argument`.

    Args:
        config_class: `DataConfig` or `TrainConfig`.
        *names: The fields; all by default.
        leave_out: Fields to leave out.
    """
    return {
        "--" + field.name.replace("_", "-"): field.metadata["option"]
        for field in dataclasses.fields(config_class)
        if (not names or field.name in names) and field.name not in leave_out
    }
