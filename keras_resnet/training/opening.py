"""What a run is to be, settled by one process before anything is loaded or built.

Under several workers that is the chief; the others are told.
"""

import dataclasses
import json
from pathlib import Path

from keras_resnet import archive
from keras_resnet.models import SPECS, STEMS, VARIANTS
from keras_resnet.preprocessing import NORMALIZATIONS
from keras_resnet.recipes import RECIPES, Recipe, scale_batch
from keras_resnet.training import fine_tuning, run_folder
from keras_resnet.training.precision import choose_precision
from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError, look_up
from keras_resnet.weights.sources import Source

DEFAULTS = {
    "model": "resnet18",
    "dataset": "fashion_mnist",
    "data_dir": None,
    "recipe": "quick",
    "epochs": None,
    "batch_size": None,
    "image_size": None,
    "learning_rate": None,
    "variant": None,
    "stem": None,
    "init": None,
    "freeze": None,
    "normalize": "none",
    "precision": "auto",
    "seed": 0,
    "validation_split": 0.1,
    "skip_bad": False,
    "sync_batchnorm": False,
    "scale_batch": False,
}

# Settings that replace the recipe's.
_OVERRIDES = ("epochs", "batch_size", "image_size", "learning_rate", "variant", "stem")
# What the data loaders take.
DATA_SETTINGS = ("data_dir", "validation_split", "skip_bad", "seed")
# Settings that name a row of a table.
_TABLES = {"model": SPECS, "variant": VARIANTS, "stem": STEMS, "normalize": NORMALIZATIONS}


def _resolve_settings(given, config):
    """Returns the settings of a run: those given, else those of the run resumed, else defaults."""
    given = {name: value for name, value in given.items() if value is not None}
    before = config["settings"] if config else DEFAULTS
    for name, value in given.items():
        if config and value != before[name] and name != "epochs":  # see `_check_epochs`
            raise InputError(
                f"a run is resumed with the settings it was started with: `{name}` was "
                f"{before[name]!r}, got {value!r}; leave it out, or start a new run"
            )
    settings = {**before, **given}
    if not isinstance(settings["seed"], int) or not 0 <= settings["seed"] < 2**31:
        raise InputError(f"`seed` must be a whole number in 0 … 2³¹ − 1, got {settings['seed']!r}")
    choose_precision(settings["precision"])
    for name, table in _TABLES.items():
        if settings[name] is not None:
            look_up(table, settings[name], name)
    return settings


@dataclasses.dataclass(frozen=True)
class Opening:
    """What a run is to be.

    Attributes:
        settings: What the command was given, over `DEFAULTS`.
        recipe: The `Recipe`, with what the settings change in it.
        run_dir: The run folder.
        precision: "float32", "bfloat16" or "float16".
        precision_reason: Why, in a few words.
        history: The rows of the epochs that are finished.
        config: What config.json holds; empty but on the chief, as are the last two.
        init: The checkpoint to start from, or None.
        made: The folders that were made for a new run, the innermost first; None for another.
    """

    settings: dict
    recipe: Recipe
    run_dir: Path
    precision: str
    precision_reason: str
    history: list
    config: dict = dataclasses.field(default_factory=dict)
    init: Source | None = None
    made: list | None = None

    @property
    def last_checkpoint(self):
        """Where the last finished epoch is."""
        return _last_checkpoint(self.run_dir)

    def describe(self):
        """Returns what the other workers are told: a JSON object."""
        told = {name: getattr(self, name) for name in _TOLD}
        return {**told, "recipe": dataclasses.asdict(self.recipe), "run_dir": str(self.run_dir)}


_TOLD = ("settings", "precision", "precision_reason", "history")


def read_description(described, data_dir=None):
    """Returns the `Opening` that the chief described.

    Args:
        described: What `Opening.describe` returned, through JSON.
        data_dir: Where the data lie on this machine; None is where they lie on the chief's.
    """
    recipe = {k: tuple(v) if isinstance(v, list) else v for k, v in described["recipe"].items()}
    settings = described["settings"]
    return Opening(
        **{
            **described,
            "settings": {**settings, "data_dir": data_dir or settings["data_dir"]},
            "recipe": Recipe(**recipe),
            "run_dir": Path(described["run_dir"]),
        }
    )


def open_run(given, run_dir, resume, num_replicas, lock):
    """Settles the settings of a run, and makes its folder.

    Args:
        given: What `training.train` was given of `DEFAULTS`; None where it was not.
        run_dir: The run folder, or None.
        resume: True, False, or "auto": go on with the run in the folder if there is one.
        num_replicas: How many replicas will train.
        lock: A `contextlib.ExitStack`, to hold the folder's lock.

    Returns:
        An `Opening`.

    Raises:
        InputError: If the settings or the folder do not allow the run.
    """
    if resume and run_dir is None:
        raise InputError("`resume` needs the `run_dir` of the run to go on with")
    if resume not in (True, False, "auto"):
        raise InputError(f"`resume` must be True, False or 'auto', got {resume!r}")
    if resume == "auto":
        resume = (Path(run_dir) / run_folder.CONFIG).exists()
    if resume and Path(run_dir).is_dir():
        run_folder.lock_run_dir(Path(run_dir), lock)
    config = run_folder.read_config(run_dir, DEFAULTS) if resume else None
    settings = _resolve_settings(given, config)
    precision = choose_precision(settings["precision"])
    init = _open_init(settings, config, run_dir)
    if not config:
        settings = fine_tuning.adopt_normalization(settings, given, init)
    recipe = _make_recipe(settings, init, num_replicas)
    if config:
        _check_same_replicas(run_dir, config, num_replicas)
        as_before = {**settings, "epochs": config["settings"]["epochs"]}
        _check_same_recipe(run_dir, config, _make_recipe(as_before, init, num_replicas))
    run_dir = Path(run_dir or run_folder.default_run_dir(settings["model"], settings["recipe"]))
    made = run_folder.make_run_dir(run_dir, resume, lock)
    config = config or begin_config(settings, init)
    files.write_json(run_dir / run_folder.CONFIG, config)
    history = _read_history(run_dir)
    _check_epochs(run_dir, recipe, history)
    return Opening(
        settings, recipe, run_dir, *precision, history, config, init, None if resume else made
    )


def _make_recipe(settings, init, num_replicas):
    """Returns the recipe with what the settings change in it."""
    recipe = look_up(RECIPES, settings["recipe"], "recipe")
    changes = {name: settings[name] for name in _OVERRIDES if settings[name] is not None}
    recipe = fine_tuning.adopt_form(dataclasses.replace(recipe, **changes), init, settings)
    if settings["scale_batch"]:
        recipe = scale_batch(recipe, num_replicas)
    stem = recipe.stem or SPECS[settings["model"]].stem
    return dataclasses.replace(recipe, stem=stem)


def _check_same_replicas(run_dir, config, num_replicas):
    before = config.get("replicas", num_replicas)
    if config["settings"]["scale_batch"] and before != num_replicas:
        raise InputError(
            f"{run_dir}: the run was started with --scale-batch on {before} replicas, and its "
            f"batches are theirs: start as many, got {num_replicas}"
        )


def _check_same_recipe(run_dir, config, recipe):
    known = config.get("recipe")
    # Through JSON, as config.json has gone: tuples become lists.
    now = json.loads(json.dumps(dataclasses.asdict(recipe)))
    changed = [name for name in now if known and known.get(name) != now[name]]
    if set(changed) - {"description"}:
        raise InputError(
            f"{run_dir}: the recipe has changed since the run was started "
            f"({', '.join(changed)}): start a new run"
        )


def _check_epochs(run_dir, recipe, history):
    if recipe.epochs < len(history):
        raise InputError(
            f"{run_dir}: a run is resumed to at least as many `epochs` as it has finished, "
            f"{len(history)}, got {recipe.epochs}"
        )


def _open_init(settings, config, run_dir):
    """Returns the checkpoint to start from, if any; its weights only where they are needed."""
    recorded = (config or {}).get("init")
    needed = config is None or not _last_checkpoint(run_dir).exists()
    return fine_tuning.open_init(settings, recorded, needed)


def _last_checkpoint(run_dir):
    return Path(run_dir) / "checkpoints" / "last.keras"


def _read_history(run_dir):
    path = _last_checkpoint(run_dir)
    return archive.read_metadata(path).get("history", []) if path.exists() else []


def begin_config(settings, init):
    """Returns what config.json holds before the data are loaded."""
    return {"settings": settings, **({"init": fine_tuning.record(init)} if init else {})}
