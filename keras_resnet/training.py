"""From a recipe to a run folder, by `model.fit`."""

import contextlib
import dataclasses
import gc
import json
import random
import shlex
import traceback
from pathlib import Path

import keras
import numpy as np

from keras_resnet import archive, callbacks, files, fine_tuning, run_folder
from keras_resnet.datasets import Dataset, load_dataset
from keras_resnet.datasets.images import border_level
from keras_resnet.errors import InputError, Interrupted, TrainingError, look_up
from keras_resnet.inference import Predictor, measure
from keras_resnet.models import SPECS, STEMS, VARIANTS, build_resnet, count_parameters
from keras_resnet.precision import POLICIES, choose_precision
from keras_resnet.preprocessing import NORMALIZATIONS, find_normalization, with_preprocessing
from keras_resnet.recipes import RECIPES, Recipe
from keras_resnet.report import write_history, write_report
from keras_resnet.weights.conversion import Source

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
    "variant": None,
    "stem": None,
    "init": None,
    "freeze": None,
    "normalize": "none",
    "precision": "auto",
    "seed": 0,
    "validation_share": 0.1,
    "skip_bad": False,
}

# Settings that replace the recipe's.
_OVERRIDES = ("epochs", "batch_size", "image_size", "learning_rate", "variant", "stem")
# What the data loaders take.
_DATA_SETTINGS = ("data_dir", "validation_share", "skip_bad", "seed")
# Settings that name a row of a table.
_TABLES = {"model": SPECS, "variant": VARIANTS, "stem": STEMS, "normalize": NORMALIZATIONS}


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


def _resolve_settings(given, config):
    """Returns the settings of a run: those given, else those of the run resumed, else defaults."""
    given = fine_tuning.plain_settings(given)
    given = {name: value for name, value in given.items() if value is not None}
    before = config["settings"] if config else DEFAULTS
    for name, value in given.items():
        if config and value != before[name]:
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


def _apply_overrides(settings, init):
    recipe = look_up(RECIPES, settings["recipe"], "recipe")
    changes = {name: settings[name] for name in _OVERRIDES if settings[name] is not None}
    recipe = fine_tuning.adopt_form(dataclasses.replace(recipe, **changes), init, settings)
    stem = recipe.stem or SPECS[settings["model"]].stem
    return dataclasses.replace(recipe, stem=stem)


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
        self.failure = None

    def shuffle(self, seed, epoch):
        """Puts the images in the order of an epoch, counted from 0; see `Split.order`."""
        self.order = self.split.order(seed, epoch)

    def __len__(self):
        return self.split.num_batches(self.batch_size)

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        try:
            return self.split.images[chosen], self.split.labels[chosen]
        except InputError as error:
            self.failure = error  # TensorFlow would hide which error it was
            raise


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


def _open_init(settings, config, run_dir):
    """Returns the checkpoint to start from, if any; its weights only where they are needed."""
    recorded = (config or {}).get("init")
    needed = config is None or not _last_checkpoint(run_dir).exists()
    return fine_tuning.open_init(settings, recorded, needed)


def _last_checkpoint(run_dir):
    return Path(run_dir) / "checkpoints" / "last.keras"


def _check_same_data(run_dir, config, dataset):
    before = config.get("dataset", {}).get("fingerprint", dataset.fingerprint)
    if before != dataset.fingerprint:
        raise InputError(
            f"{run_dir}: the data are not those the run was started with: fingerprint "
            f"{before[:16]}…, got {dataset.fingerprint[:16]}…"
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a run is about to do: everything that is settled before a network is built."""

    settings: dict
    recipe: Recipe
    init: Source | None
    dataset: Dataset
    card: dict
    precision: str
    precision_reason: str
    run_dir: Path
    verbose: bool

    def say(self, text):
        if self.verbose:
            print(text, flush=True)

    @property
    def train(self):
        return self.dataset.splits["train"]

    @property
    def evaluation(self):
        return self.dataset.splits[self.dataset.evaluation_split]

    @property
    def resume_command(self):
        return f"keras-resnet train --resume --run-dir {shlex.quote(str(self.run_dir))}"


def _make_plan(settings, recipe, init, in_memory, run_dir, verbose):
    """Loads the data, unless they are in memory, and settles the rest."""
    dataset = in_memory or load_dataset(
        settings["dataset"],
        image_size=recipe.image_size,
        **{name: settings[name] for name in _DATA_SETTINGS},
    )
    card = _make_card(settings, recipe, init, dataset)
    precision = choose_precision(settings["precision"])
    return _Plan(settings, recipe, init, dataset, card, *precision, run_dir, verbose)


def _make_card(settings, recipe, init, dataset):
    """Returns what every model file of the run says about itself."""
    origin = {"file": Path(init.path).name, "sha256": init.sha256} if init else None
    return {
        "model": settings["model"],
        "variant": recipe.variant,
        "stem": recipe.stem,
        "normalize": settings["normalize"],
        "origin": origin,
        "class_names": list(dataset.class_names),
        "background": _background(dataset.splits["train"]),
        "data": {name: settings[name] for name in ("dataset", *_DATA_SETTINGS)},
    }


def _background(split, sample=1000):
    """Returns whether the images' borders are "dark", "light", or None where they are neither.

    A photograph that is light where the training images are dark has to be inverted first.
    """
    images = split.images[np.linspace(0, len(split) - 1, min(sample, len(split))).astype(int)]
    level = border_level(images)
    return "dark" if level < 64 else "light" if level >= 192 else None


def _begin_config(settings, init):
    """Returns what config.json holds before the data are loaded."""
    return {"settings": settings, **({"init": fine_tuning.record(init)} if init else {})}


def _describe(plan, num_parameters, command):
    """Returns what config.json holds: every setting, and what it was run on."""
    dataset, settings = plan.dataset, plan.settings
    return {
        **_begin_config(settings, plan.init),
        "model": settings["model"],
        **num_parameters,
        "dataset": {
            "name": dataset.name,
            "source": dataset.source,
            "fingerprint": dataset.fingerprint,
            "class_names": list(dataset.class_names),
            "image_shape": list(dataset.image_shape),
            "splits": {name: len(split) for name, split in dataset.splits.items()},
            "evaluation_split": dataset.evaluation_split,
        },
        "recipe": {"name": settings["recipe"], **dataclasses.asdict(plan.recipe)},
        "seed": settings["seed"],
        "precision": plan.precision,
        "precision_reason": plan.precision_reason,
        "command": command,
        **run_folder.describe_surroundings(),
    }


def _build_classifier(plan, precision):
    """Builds the network with its preprocessing in a precision; the policy in force stays."""
    recipe, image_shape = plan.recipe, plan.dataset.image_shape
    normalization = find_normalization(plan.settings["normalize"], image_shape[-1])
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(POLICIES[precision])
    try:
        network = build_resnet(
            plan.settings["model"],
            (recipe.image_size, recipe.image_size, image_shape[-1]),
            len(plan.dataset.class_names),
            variant=recipe.variant,
            stem=recipe.stem,
        )
        return with_preprocessing(network, image_shape, recipe.augmentation, **normalization)
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


def _compile(model, plan):
    recipe = plan.recipe
    steps = recipe.epochs * plan.train.num_batches(recipe.batch_size)
    schedule = look_up(SCHEDULES, recipe.schedule, "schedule")
    rate = schedule(recipe.learning_rate, steps, recipe.warmup)
    model.compile(
        look_up(OPTIMIZERS, recipe.optimizer, "optimizer")(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.optimizer.build(model.trainable_variables)


def _bytes_on_disk(model):
    """Returns how much room the files of a run with this compiled model take at most."""
    weights, optimizer = (
        sum(4 * int(np.prod(variable.shape)) for variable in variables)
        for variables in (model.weights, model.optimizer.variables)
    )
    # last and best, the new one while it is written, model.keras; and the report.
    return 3 * (weights + optimizer) + weights + 16 * 2**20


def _restore(model, run_dir):
    """Loads the last checkpoint, if there is one, and returns the history it holds."""
    path = _last_checkpoint(run_dir)
    if not path.exists():
        return []
    history = archive.read_card(path).get("history", [])
    archive.load_weights(model, path)
    return history


@contextlib.contextmanager
def _releasing_batches():
    """Frees the iterators of a `model.fit` that ends in an error, before the error goes on.

    The error's traceback keeps them. One that lives until the interpreter ends has a TensorFlow
    thread that asks Python for a batch and gets no answer: the process hangs, its error printed.
    """
    try:
        yield
    except BaseException as error:
        innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
        # By the frames' callers: Keras takes its own frames out of the traceback.
        for frame, _ in traceback.walk_stack(innermost):
            try:
                frame.clear()
            except RuntimeError:  # This one is still running, and so are its callers.
                break
        gc.collect()
        raise


def _watchers(plan, batches, history, received):
    """Returns the callbacks of a run, in the order in which they must be called."""
    return [
        # Not PyDataset's own on_epoch_end: Keras calls that once more as it builds the model.
        keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: batches.shuffle(plan.settings["seed"], epoch)
        ),
        callbacks.EpochTimer(len(plan.train)),
        callbacks.StopOnDivergence(),
        callbacks.StopOnRequest(received),
        callbacks.Recorder(plan.run_dir, plan.card, history),
    ]


def _fit(plan, model, history):
    """Runs `model.fit` from the epoch after `history`, which grows with each epoch."""
    size, epochs = plan.recipe.batch_size, plan.recipe.epochs
    batches, measured = Batches(plan.train, size), Batches(plan.evaluation, size)
    progress = callbacks.Progress(len(plan.train), size, epochs)
    with callbacks.catching_stop_signals() as received:
        watchers = _watchers(plan, batches, history, received)
        if plan.verbose:
            watchers.append(progress)  # last: an epoch that has its line has its checkpoint
        try:
            with _releasing_batches():
                model.fit(
                    batches,
                    validation_data=measured,
                    initial_epoch=len(history),
                    epochs=epochs,
                    shuffle=False,  # the batches are shuffled already
                    verbose=0,
                    callbacks=watchers,
                )
            if received:
                raise Interrupted("after the last epoch")
        except Interrupted as stop:
            path = plan.run_dir / "checkpoints" / "interrupted.keras"
            archive.save_model(model, path, plan.card)
            raise Interrupted(
                f"interrupted {stop}; {len(history)} of {epochs} epochs are finished. The weights "
                f"as they are: {path}. Go on from the last finished epoch: {plan.resume_command}"
            ) from None
        except Exception:
            failure = batches.failure or measured.failure
            if failure is None:
                raise
            raise TrainingError(
                f"{failure}; {len(history)} of {epochs} epochs are finished. Once it can be read "
                f"again: {plan.resume_command}"
            ) from failure
        finally:
            progress.close()


def _finish(plan, model, config, history):
    """Saves the trained weights as a float32 model, measures that, and writes the report."""
    final = _build_classifier(plan, "float32")
    final.set_weights(model.get_weights())
    archive.save_model(final, plan.run_dir / "model.keras", plan.card)
    predictor = Predictor(final, plan.card)
    evaluation = measure(
        predictor, plan.evaluation, plan.dataset.class_names, min(256, plan.recipe.batch_size)
    )
    report = write_report(plan.run_dir, config, history, evaluation, plan.evaluation)
    return Run(plan.run_dir, final, history, report)


def _start_from(plan, model):
    """Loads the weights that the run starts from, and freezes those that it keeps."""
    names, total = plan.settings["freeze"], count_parameters(model)
    numbers = {"num_parameters": total}
    if plan.init and plan.init.tensors:
        classes = len(plan.dataset.class_names)
        plan.say(f"init: {fine_tuning.load_init(model, plan.init, plan.recipe, classes)}")
    if names:
        fine_tuning.freeze(model.get_layer(plan.settings["model"]), names)
        trained = numbers["num_trained_parameters"] = count_parameters(model)
        plan.say(f"frozen: {', '.join(names)}; {trained:,} of {total:,} parameters are trained")
    return numbers


def _prepare(plan):
    """Returns the compiled model, its numbers of parameters, and its last checkpoint's history."""
    _set_seed(plan.settings["seed"])
    model = _build_classifier(plan, plan.precision)
    num_parameters = _start_from(plan, model)
    _compile(model, plan)
    run_folder.check_space(plan.run_dir, _bytes_on_disk(model))
    return model, num_parameters, _restore(model, plan.run_dir)


def _begin(plan, config, command):
    """Returns what `_prepare` does, less the numbers, and the completed config.json."""
    plan.say(f"data: {plan.dataset.source}")
    backend = keras.backend.backend()
    plan.say(f"precision: {plan.precision} ({plan.precision_reason}), backend: {backend}")
    with _saying_what_is_left(plan):
        model, num_parameters, history = _prepare(plan)
        if "dataset" not in config:
            config = _describe(plan, num_parameters, command)
            files.write_json(plan.run_dir / run_folder.CONFIG, config)
    return model, history, config


def _run(plan, model, history, config):
    """Trains what is left to train, and writes the report."""
    (plan.run_dir / "checkpoints").mkdir(exist_ok=True)
    write_history(plan.run_dir / "history.csv", history)
    resumed = f", resumed after epoch {len(history)}" if history else ""
    plan.say(f"run folder: {plan.run_dir}{resumed}")
    if len(history) < plan.recipe.epochs:
        _fit(plan, model, history)
    return _finish(plan, model, config, history)


def _out_of_memory(error):
    """Returns whether an error of any backend says that memory ran out."""
    signs = ("out of memory", "resource_exhausted", "resourceexhausted", "oom when allocating")
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


@contextlib.contextmanager
def _saying_what_is_left(plan):
    """Turns a full disk and a full memory into a `TrainingError` that says how to go on."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{plan.run_dir}: {error.strerror or error}; what was finished is whole: go on with "
            f"{plan.resume_command}"
        ) from error
    except Exception as error:
        if not _out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory at --batch-size {plan.recipe.batch_size} and --image-size "
            f"{plan.recipe.image_size}: start a run with smaller ones"
        ) from error


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
    variant=None,
    stem=None,
    init=None,
    freeze=None,
    normalize=None,
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
        variant: A row of `models.VARIANTS`, instead of the recipe's or the checkpoint's.
        stem: A row of `models.STEMS`, instead of the recipe's or the checkpoint's.
        init: A checkpoint to start from, any file that `weights.convert` reads: fine-tuning. The
            network gets the checkpoint's variant and stem; a head of another number of classes
            is new, and the first convolution is fitted to the images' channels.
        freeze: Modules that keep the weights of `init`, such as ["stem", "stage1"]; see
            `summarize_shapes`.
        normalize: A row of `preprocessing.NORMALIZATIONS`: "none" (the default: images in 0 … 1),
            "imagenet", what PyTorch's published weights expect, "inception" or "caffe".
        precision: "auto" (the default), "float32", "bfloat16" or "float16"; see
            `choose_precision`.
        seed: Whole number; 0 by default. It sets the first weights and the order of the images.
        validation_share: Share of the images held out where a data set has no split to measure
            on; 0.1 by default.
        skip_bad: Whether unreadable images of a folder are left out instead of being an error.
        run_dir: The run folder; runs/MODEL-RECIPE-TIME by default.
        resume: Whether to go on with the run in `run_dir`, from its last finished epoch. Settings
            that are given as well must be those of the run.
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
        A small network on images of noise, for a second; `train()` alone is the real thing.

        >>> import tempfile
        >>> from keras_resnet import Spec, Split
        >>> images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype="uint8")
        >>> noise = Split(images, np.arange(32) % 2)
        >>> data = Dataset("noise", ("a", "b"), {"train": noise, "test": noise}, "made here", "0")
        >>> SPECS["small"] = Spec((1,), (4,))
        >>> run = train("small", data, epochs=1, run_dir=tempfile.mkdtemp(), verbose=False)
        >>> del SPECS["small"]
        >>> len(run.history), run.report["num_images"], (run.run_dir / "report.md").is_file()
        (1, 32, True)
    """
    given = {name: value for name, value in locals().items() if name in DEFAULTS}
    in_memory = dataset if isinstance(dataset, Dataset) else None
    if in_memory is not None:
        given["dataset"] = in_memory.name
    if resume and run_dir is None:
        raise InputError("`resume` needs the `run_dir` of the run to go on with")
    config = run_folder.read_config(run_dir, DEFAULTS) if resume else None
    settings = _resolve_settings(given, config)
    init = _open_init(settings, config, run_dir)
    recipe = _apply_overrides(settings, init)
    if config:
        _check_same_recipe(run_dir, config, recipe)
    run_dir = Path(run_dir or run_folder.default_run_dir(settings["model"], settings["recipe"]))
    made = run_folder.make_run_dir(run_dir, resume)
    try:
        config = config or _begin_config(settings, init)
        files.write_json(run_dir / run_folder.CONFIG, config)
        plan = _make_plan(settings, recipe, init, in_memory, run_dir, verbose)
        _check_same_data(run_dir, config, plan.dataset)
        begun = _begin(plan, config, command)
    except Exception:
        if not resume:
            run_folder.unmake_run_dir(run_dir, made)
        raise
    with _saying_what_is_left(plan):
        return _run(plan, *begun)
