"""From a recipe to a run folder, by `model.fit`."""

import dataclasses
import datetime
import json
import os
import platform
import random
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import keras
import numpy as np

from keras_resnet import archive, callbacks, files
from keras_resnet.datasets import Dataset, load_dataset
from keras_resnet.datasets.images import border_level
from keras_resnet.errors import InputError, Interrupted, TrainingError
from keras_resnet.evaluation import evaluate
from keras_resnet.inference import Predictor
from keras_resnet.models import SPECS, build_resnet, count_parameters, look_up
from keras_resnet.precision import POLICIES, choose_precision
from keras_resnet.preprocessing import with_preprocessing
from keras_resnet.recipes import RECIPES
from keras_resnet.report import write_history, write_report

# ----------------------------------------------------------------------------------------------
# The settings of a run
# ----------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=5e-4),
}


def _cosine(rate, steps, warmup):
    rising = round(warmup * steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - rising), warmup_target=rate, warmup_steps=rising
    )


SCHEDULES = {
    "constant": lambda rate, steps, warmup: rate,
    "cosine": _cosine,
}

DEFAULTS = {
    "model": "resnet18",
    "dataset": "fashion_mnist",
    "data_dir": None,
    "recipe": "quick",
    "epochs": None,
    "batch_size": None,
    "image_size": None,
    "learning_rate": None,
    "precision": "auto",
    "seed": 0,
    "validation_share": 0.1,
    "skip_bad": False,
}

# Settings that replace the recipe's.
_OVERRIDES = ("epochs", "batch_size", "image_size", "learning_rate")
# What the data loaders take.
_DATA_SETTINGS = ("data_dir", "validation_share", "skip_bad", "seed")


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        run_dir: Its folder.
        model: The trained Keras model, in float32: raw uint8 images to logits.
        history: One dict an epoch, with the columns of `history.csv`.
        report: What `report.json` holds.
    """

    run_dir: Path
    model: keras.Model
    history: list
    report: dict


def _resolve_settings(given, resume, config):
    """Returns the settings of a run: those given, else those of the run resumed, else defaults."""
    given = {name: value for name, value in given.items() if value is not None}
    before = config["settings"] if resume else DEFAULTS
    if resume:
        for name, value in given.items():
            if value != before[name]:
                raise InputError(
                    f"a run is resumed with the settings it was started with: `{name}` was "
                    f"{before[name]!r}, got {value!r}; leave it out, or start a new run"
                )
    return {**before, **given}


def _apply_overrides(settings):
    recipe = look_up(RECIPES, settings["recipe"], "recipe")
    changes = {name: settings[name] for name in _OVERRIDES if settings[name] is not None}
    return dataclasses.replace(recipe, **changes)


def _check_seed(seed):
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise InputError(f"`seed` must be a whole number in 0 … {2**31 - 1}, got {seed!r}")


# ----------------------------------------------------------------------------------------------
# The run folder
# ----------------------------------------------------------------------------------------------


def _default_run_dir(settings):
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{settings['model']}-{settings['recipe']}-{now}"


def _read_config(run_dir):
    path = run_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config["settings"], dict) or set(config["settings"]) != set(DEFAULTS):
            raise ValueError("its settings are not those of this version")
    except FileNotFoundError:
        raise InputError(f"{run_dir}: nothing to resume: there is no config.json") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise InputError(f"{path}: damaged: {archive.first_line(error)}") from error
    return config


def _make_run_dir(run_dir, resume):
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not resume and any(run_dir.iterdir()):
            raise InputError(
                f"{run_dir}: the folder is not empty; resume the run in it with --resume, or name "
                "another --run-dir"
            )
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        for folder in (run_dir, run_dir / "checkpoints"):
            files.remove_partials(folder)
            with files.replacing(folder / ".writable") as temporary:
                temporary.write_bytes(b"")
            (folder / ".writable").unlink()
    except OSError as error:
        raise InputError(f"{run_dir}: cannot be written to: {error.strerror or error}") from error


def _check_space(run_dir, model):
    """Refuses to start where the run's files would not fit."""
    model.optimizer.build(model.trainable_variables)
    weights, optimizer = (
        sum(v.dtype.startswith("float") and 4 * int(np.prod(v.shape)) for v in variables)
        for variables in (model.weights, model.optimizer.variables)
    )
    # last and best, the new one while it is written, model.keras; and the report.
    needed = 3 * (weights + optimizer) + weights + 16 * 2**20
    free = shutil.disk_usage(run_dir).free
    if free < needed:
        raise InputError(
            f"{run_dir}: the run needs {needed / 2**20:.0f} MiB of disk space, "
            f"and {free / 2**20:.0f} MiB are free"
        )


def _git_commit():
    """Returns the commit of the source this runs from, with "+changes" where it was edited."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit, changes = (
            subprocess.run(
                [*git, *arguments], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changes else "")


def _versions():
    packages = ("keras-resnet-edge", "keras", keras.backend.backend(), "numpy")
    versions = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _cores():
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        return os.cpu_count()


def _background(split, sample=1000):
    """Returns whether the images' borders are "dark", "light", or None where they are neither.

    A photograph that is light where the training images are dark has to be inverted first.
    """
    images = split.images[np.linspace(0, len(split) - 1, min(sample, len(split))).astype(int)]
    level = border_level(images)
    return "dark" if level < 64 else "light" if level >= 192 else None


def _describe(settings, recipe, dataset, network, precision, command):
    """Returns what config.json holds: every setting, and what it was run on."""
    precision, reason = precision
    return {
        "settings": settings,
        "model": settings["model"],
        "num_parameters": count_parameters(network),
        "dataset": {
            "name": dataset.name,
            "source": dataset.source,
            "fingerprint": dataset.fingerprint,
            "class_names": list(dataset.class_names),
            "image_shape": list(dataset.image_shape),
            "splits": {name: len(split) for name, split in dataset.splits.items()},
            "evaluation_split": dataset.evaluation_split,
        },
        "recipe": {"name": settings["recipe"], **dataclasses.asdict(recipe)},
        "seed": settings["seed"],
        "precision": precision,
        "precision_reason": reason,
        "backend": keras.backend.backend(),
        "versions": _versions(),
        "git_commit": _git_commit(),
        "machine": {"processor": _processor(), "cores": _cores(), "system": platform.platform()},
        "command": command,
    }


# ----------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    """A split as `model.fit` takes it: uint8 batches, on every backend.

    Args:
        split: A `datasets.Split`.
        batch_size: Images a batch; the last may be short.
    """

    def __init__(self, split, batch_size):
        super().__init__()
        self.split = split
        self.batch_size = batch_size
        self.order = np.arange(len(split))

    def shuffle(self, seed, epoch):
        """Puts the images in the order of an epoch, counted from 0; see `Split.order`."""
        self.order = self.split.order(seed, epoch)

    def __len__(self):
        return self.split.num_batches(self.batch_size)

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.split.images[chosen], self.split.labels[chosen]


def _build_classifier(settings, recipe, dataset, policy):
    """Builds the network with its preprocessing under a dtype policy, which it restores."""
    look_up(SPECS, settings["model"], "model")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        network = build_resnet(
            settings["model"],
            (recipe.image_size, recipe.image_size, dataset.image_shape[-1]),
            len(dataset.class_names),
            variant=recipe.variant,
            stem=recipe.stem,
        )
        return with_preprocessing(network, dataset.image_shape, recipe.augmentation)
    finally:
        keras.config.set_dtype_policy(before)


def _set_seed(seed):
    if keras.backend.backend() == "tensorflow":
        keras.utils.set_random_seed(seed)
        return
    # set_random_seed imports TensorFlow wherever it is installed. Other backends draw from
    # Keras's generators, which Python's own seeds.
    random.seed(seed)
    np.random.seed(seed)


def _compile(model, recipe, steps):
    schedule = look_up(SCHEDULES, recipe.schedule, "schedule")
    rate = schedule(recipe.learning_rate, steps, recipe.warmup)
    model.compile(
        look_up(OPTIMIZERS, recipe.optimizer, "optimizer")(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def _restore(model, run_dir):
    """Loads the last checkpoint, if there is one, and returns the history it holds."""
    path = run_dir / "checkpoints" / "last.keras"
    if not path.exists():
        return []
    history = archive.read_card(path).get("history", [])
    archive.load_weights(model, path)
    return history


def _fit(model, recipe, dataset, run_dir, card, history, seed, verbose):
    """Runs `model.fit` from the epoch after `history`, which grows with each epoch."""
    train, evaluation = dataset.splits["train"], dataset.splits[dataset.evaluation_split]
    done = len(history)
    batches = Batches(train, recipe.batch_size)
    # Not PyDataset's own on_epoch_end: Keras calls that once more while it builds the model.
    shuffler = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: batches.shuffle(seed, epoch)
    )
    progress = callbacks.Progress(len(train), recipe.batch_size, recipe.epochs)
    # Progress stands last: an epoch that has its line has its checkpoint.
    with callbacks.catching_stop_signals() as received:
        watchers = [
            shuffler,
            callbacks.EpochTimer(len(train)),
            callbacks.StopOnDivergence(),
            callbacks.StopOnRequest(received),
            callbacks.Recorder(run_dir, card, history),
            *([progress] if verbose else []),
        ]
        try:
            model.fit(
                batches,
                validation_data=Batches(evaluation, recipe.batch_size),
                initial_epoch=done,
                epochs=recipe.epochs,
                shuffle=False,  # the batches are shuffled already
                verbose=0,
                callbacks=watchers,
            )
        except Interrupted as stop:
            progress.close()
            archive.save_model(model, run_dir / "checkpoints" / "interrupted.keras", card)
            raise Interrupted(
                f"interrupted {stop}; {len(history)} of {recipe.epochs} epochs are finished. The "
                f"weights as they are: {run_dir / 'checkpoints' / 'interrupted.keras'}. Go on "
                f"from the last finished epoch: keras-resnet train --resume --run-dir {run_dir}"
            ) from None
        finally:
            progress.close()


def train(
    model=None,
    dataset=None,
    recipe=None,
    *,
    data_dir=None,
    epochs=None,
    batch_size=None,
    image_size=None,
    learning_rate=None,
    precision=None,
    seed=None,
    validation_share=None,
    skip_bad=None,
    run_dir=None,
    resume=False,
    verbose=True,
    command=None,
):
    """Trains a network with `model.fit` and leaves a run folder that says all about it.

    The run folder holds config.json, history.csv, tensorboard/, checkpoints/ (last.keras and
    best.keras, by accuracy on the evaluation split), model.keras, report.json, and report.md with
    its pictures. model.keras and the report are those of the last epoch: the evaluation split
    chooses nothing.

    Args:
        model: A row of `models.SPECS`; "resnet18" by default.
        dataset: "fashion_mnist" (the default), "folder:PATH", "tfds:NAME", or a `Dataset`.
        recipe: A row of `recipes.RECIPES`; "quick" by default.
        data_dir: Where the data set lies; see `load_dataset`.
        epochs: Passes over the training images, instead of the recipe's.
        batch_size: Images a step, instead of the recipe's.
        image_size: Height and width in pixels that the network sees, instead of the recipe's.
        learning_rate: Instead of the recipe's.
        precision: "auto" (the default), "float32", "bfloat16" or "float16"; see
            `choose_precision`.
        seed: Whole number; 0 by default. It sets the first weights and the order of the images.
        validation_share: Share of the images held out where a data set has no split to measure
            on; 0.1 by default.
        skip_bad: Whether unreadable images of a folder are left out instead of being an error.
        run_dir: The run folder; runs/MODEL-RECIPE-TIME by default.
        resume: Whether to go on with the run in `run_dir`, from its last finished epoch.
        verbose: Whether to print what was found and one line an epoch.
        command: The command line, for the report.

    Returns:
        A `Run`.

    Raises:
        InputError: If an argument, the data or the folder do not allow the run; nothing was
            trained then.
        TrainingError: If the loss became infinite or NaN, or a file could not be written.
        Interrupted: On Ctrl-C or SIGTERM.

    Example:
        >>> run = train(recipe="quick", epochs=1)  # doctest: +SKIP
        >>> run.report["accuracy"]  # doctest: +SKIP
    """
    given = {name: value for name, value in locals().items() if name in DEFAULTS}
    in_memory = dataset if isinstance(dataset, Dataset) else None
    if in_memory is not None:
        given["dataset"] = in_memory.name
    say = print if verbose else lambda *_: None

    if resume and run_dir is None:
        raise InputError("`resume` needs the `run_dir` of the run to go on with")
    config = _read_config(Path(run_dir)) if resume else None
    settings = _resolve_settings(given, resume, config)
    _check_seed(settings["seed"])
    settings_recipe = _apply_overrides(settings)
    look_up(SPECS, settings["model"], "model")
    chosen = choose_precision(settings["precision"])
    run_dir = Path(run_dir or _default_run_dir(settings))
    _make_run_dir(run_dir, resume)

    dataset = in_memory or load_dataset(
        settings["dataset"],
        image_size=settings_recipe.image_size,
        **{name: settings[name] for name in _DATA_SETTINGS},
    )
    say(f"data: {dataset.source}")
    say(f"precision: {chosen[0]} ({chosen[1]}), backend: {keras.backend.backend()}")
    return _run(settings, settings_recipe, dataset, chosen, run_dir, config, verbose, command, say)


def _run(settings, recipe, dataset, chosen, run_dir, config, verbose, command, say):
    if config and config["dataset"]["fingerprint"] != dataset.fingerprint:
        raise InputError(
            f"{run_dir}: the data are not those the run was started with: fingerprint "
            f"{config['dataset']['fingerprint'][:16]}…, got {dataset.fingerprint[:16]}…"
        )
    _set_seed(settings["seed"])
    model = _build_classifier(settings, recipe, dataset, POLICIES[chosen[0]])
    steps = recipe.epochs * dataset.splits["train"].num_batches(recipe.batch_size)
    _compile(model, recipe, steps)
    _check_space(run_dir, model)
    history = _restore(model, run_dir)
    if config is None:
        config = _describe(settings, recipe, dataset, model, chosen, command)
        files.write_json(run_dir / "config.json", config)
    write_history(run_dir / "history.csv", history)
    say(f"run folder: {run_dir}" + (f", resumed after epoch {len(history)}" if history else ""))

    card = {
        "model": settings["model"],
        "class_names": list(dataset.class_names),
        "background": _background(dataset.splits["train"]),
        "data": {name: settings[name] for name in ("dataset", *_DATA_SETTINGS)},
    }
    try:
        if len(history) < recipe.epochs:
            seed = settings["seed"]
            _fit(model, recipe, dataset, run_dir, card, history, seed, verbose)
        return _finish(model, settings, recipe, dataset, run_dir, config, history, card)
    except OSError as error:
        raise TrainingError(
            f"{run_dir}: {error.strerror or error}; the last checkpoint is whole: go on with "
            f"keras-resnet train --resume --run-dir {run_dir}"
        ) from error


def _finish(model, settings, recipe, dataset, run_dir, config, history, card):
    """Saves the trained weights as a float32 model, measures that, and writes the report."""
    final = _build_classifier(settings, recipe, dataset, "float32")
    final.set_weights(model.get_weights())
    archive.save_model(final, run_dir / "model.keras", card)
    split = dataset.splits[dataset.evaluation_split]
    evaluation = evaluate(Predictor(final, card), split, dataset.class_names)
    report = write_report(run_dir, config, history, evaluation, split)
    return Run(run_dir, final, history, report)
