"""From a recipe to a run folder, by `model.fit`."""

import contextlib
import dataclasses
import functools
import gc
import random
import re
import shlex
import traceback
from pathlib import Path

import keras
import numpy as np

from keras_resnet import archive
from keras_resnet.datasets import Dataset, load_dataset
from keras_resnet.datasets.base import cut_batches
from keras_resnet.datasets.images import ImageFiles, border_level, content_marks
from keras_resnet.distribution import rendezvous, strategies
from keras_resnet.evaluation.inference import Predictor
from keras_resnet.evaluation.metrics import evaluate
from keras_resnet.evaluation.report import write_history, write_report
from keras_resnet.models import build_resnet, count_parameters, last_map_size
from keras_resnet.preprocessing import find_normalization, with_preprocessing
from keras_resnet.training import callbacks, fine_tuning, run_folder
from keras_resnet.training.opening import (
    DATA_SETTINGS,
    DEFAULTS,
    Opening,
    begin_config,
    open_run,
    read_description,
)
from keras_resnet.training.precision import POLICIES
from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError, Interrupted, TrainingError, WorkerLost, look_up

OPTIMIZERS = {
    "adam": lambda rate: keras.optimizers.Adam(rate),
    "sgd": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=5e-4),
}


def _cosine(rate, steps, warmup):
    rising = round(warmup * steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - rising), warmup_target=rate, warmup_steps=rising
    )


def _warmup(rate, steps, warmup):
    rising = max(1, round(warmup * steps))
    return keras.optimizers.schedules.PolynomialDecay(0.0, rising, rate)  # power 1, then constant


SCHEDULES = {
    "constant": lambda rate, steps, warmup: rate,
    "warmup": _warmup,
    "cosine": _cosine,
}


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        run_dir: Its folder.
        model: The trained Keras model, in float32: raw uint8 images to logits.
        history: One dict an epoch, with the columns of `history.csv`.
        report: What `report.json` holds; None on a worker that is not the chief.
    """

    run_dir: Path
    model: keras.Model
    history: list
    report: dict | None


# ----------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------


CHIEF_SECONDS = 10.0
"""How long another worker that was asked to stop waits for the chief to do so first."""


class Batches(keras.utils.PyDataset):
    """A split as `model.fit` takes it: uint8 batches, on every backend.

    Args:
        split: A `datasets.Split`.
        batch_size: Images a batch; the last may be of another size.
        least: See `datasets.base.cut_batches`.
    """

    def __init__(self, split, batch_size, least=1):
        super().__init__()
        self.split = split
        self.cuts = cut_batches(len(split), batch_size, least)
        self.order = np.arange(len(split))
        self.failure = None

    def shuffle(self, seed, epoch):
        """Puts the images in the order of an epoch, counted from 0; see `Split.order`."""
        self.order = self.split.order(seed, epoch)

    def __len__(self):
        return len(self.cuts)

    def __getitem__(self, index):
        chosen = self.order[self.cuts[index]]
        try:
            return self.split.images[chosen], self.split.labels[chosen]
        except InputError as error:
            self.failure = error  # TensorFlow would hide which error it was
            raise


def _check_same_data(opening, dataset):
    before = opening.config.get("dataset", {}).get("fingerprint", dataset.fingerprint)
    if before != dataset.fingerprint:
        raise InputError(
            f"{opening.run_dir}: the data are not those the run was started with: fingerprint "
            f"{before[:16]}…, got {dataset.fingerprint[:16]}…"
        )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a run is about to do: everything that is settled before a network is built."""

    opening: Opening
    dataset: Dataset
    metadata: dict
    decision: strategies.Decision
    strategy: object  # a `tf.distribute.Strategy`; None where Keras does not run on TensorFlow
    verbose: bool

    def say(self, text):
        if self.verbose:
            print(text, flush=True)

    @property
    def settings(self):
        return self.opening.settings

    @property
    def recipe(self):
        return self.opening.recipe

    @property
    def run_dir(self):
        return self.opening.run_dir

    @property
    def train(self):
        return self.dataset.splits["train"]

    @property
    def evaluation(self):
        return self.dataset.splits[self.dataset.evaluation_split]

    @property
    def least(self):
        """How many images a training batch needs, so that BatchNormalization finds a variance.

        A channel of a map of one pixel has one value an image: two images must meet, on each
        replica, or on all of them together where statistics are synchronised.
        """
        replicas = self.decision.num_replicas
        if last_map_size(self.settings["model"], self.recipe.stem, self.recipe.image_size) > 1:
            return replicas
        return max(2, replicas) if self.settings["sync_batchnorm"] else 2 * replicas

    def scope(self):
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    @property
    def resume_command(self):
        command = f"keras-resnet train --resume --run-dir {shlex.quote(str(self.run_dir))}"
        return command + (", on every worker" if self.decision.cluster else "")


def _make_plan(opening, decision, strategy, in_memory, verbose):
    """Loads the data, unless they are in memory, and settles the rest."""
    settings, recipe = opening.settings, opening.recipe

    def load():
        return in_memory or load_dataset(
            settings["dataset"],
            image_size=recipe.image_size,
            **{name: settings[name] for name in DATA_SETTINGS},
        )

    several = decision.num_replicas > 1
    dataset = _load_everywhere(load, decision, strategy, recipe) if several else load()
    metadata = _make_metadata(settings, recipe, opening.init, dataset)
    return _Plan(opening, dataset, metadata, decision, strategy, verbose)


def _load_everywhere(load, decision, strategy, recipe):
    """Returns what `load` returns, if that is the same on all workers."""
    from keras_resnet.distribution.replicas import check_batches, check_same, find_failed

    failure = dataset = None
    try:
        dataset = load()
        replicas, measured = decision.num_replicas, dataset.splits[dataset.evaluation_split]
        check_batches(len(dataset.splits["train"]), recipe.batch_size, replicas)
        check_batches(len(measured), recipe.batch_size, replicas)
    except Exception as error:
        failure = error
    # All take part in this one, so that none is left waiting in the next.
    failed = find_failed(strategy, failure is not None)
    if failure:
        raise failure
    if failed:
        worker = failed[0] * decision.cluster.size // decision.num_replicas
        raise InputError(f"{decision.cluster.name(worker)} cannot load its data: see what it says")
    check_same(strategy, "data: their fingerprint", dataset.fingerprint)
    return dataset


def _make_metadata(settings, recipe, init, dataset):
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
        "data": {
            **{name: settings[name] for name in ("dataset", *DATA_SETTINGS)},
            "fingerprint": dataset.fingerprint,
        },
        "trained_on": _trained_on(dataset.splits["train"]),
    }


MOST_MARKED = 500_000
"""Of larger sets a model's metadata does not hold a mark for each training image."""


def _trained_on(split):
    """Returns the `content_marks` of the files that are trained on; "" where there are none."""
    if not isinstance(split.images, ImageFiles) or len(split) > MOST_MARKED:
        return ""
    return content_marks(split.images)


def _background(split, sample=1000):
    """Returns "dark" if the images are grey and known to be light on dark, else None.

    They are if nearly every image has a dark border; see `inference.predict_files`.
    """
    if split.images.shape[-1] != 1:
        return None
    images = split.images[np.linspace(0, len(split) - 1, min(sample, len(split))).astype(int)]
    levels = [border_level(image[None]) for image in images]
    return "dark" if np.mean(np.less(levels, 64)) >= 0.9 else None


def _describe(plan, num_parameters, command):
    """Returns what config.json holds: every setting, and what it was run on."""
    dataset, settings = plan.dataset, plan.settings
    return {
        **begin_config(settings, plan.opening.init),
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
        "recipe": _describe_recipe(plan),
        "seed": settings["seed"],
        "precision": plan.opening.precision,
        "precision_reason": plan.opening.precision_reason,
        "strategy": plan.decision.name,
        "strategy_reason": plan.decision.reason,
        "replicas": plan.decision.num_replicas,
        "command": command,
        **run_folder.describe_surroundings(),
    }


def _describe_recipe(plan):
    return {"name": plan.settings["recipe"], **dataclasses.asdict(plan.recipe)}


def _describe_continued(plan, config, command):
    """Returns the config.json of a run that is resumed to another number of epochs."""
    here = {
        "after_epoch": len(plan.opening.history),
        "epochs": plan.recipe.epochs,
        "command": command,
    }
    return {
        **config,
        "settings": plan.settings,
        "recipe": _describe_recipe(plan),
        "continued": [*config.get("continued", []), here],
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
    steps = recipe.epochs * len(cut_batches(len(plan.train), recipe.batch_size, plan.least))
    schedule = look_up(SCHEDULES, recipe.schedule, "schedule")
    rate = schedule(recipe.learning_rate, steps, recipe.warmup)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if plan.decision.num_replicas > 1:
        from keras_resnet.distribution.replicas import choose_loss

        replicas = plan.decision.num_replicas
        loss = choose_loss(len(plan.train), recipe.batch_size, replicas, plan.least)
    optimizer = look_up(OPTIMIZERS, recipe.optimizer, "optimizer")(rate)
    model.compile(optimizer, loss, metrics=["accuracy"])
    if plan.decision.name == "none":
        # Else the first step makes the metrics' variables, and TensorFlow traces that step twice.
        logits = keras.ops.zeros((1, model.output_shape[-1]))
        model.compute_metrics(None, keras.ops.zeros((1,), "int32"), logits)
        model.reset_metrics()
    model.optimizer.build(model.trainable_variables)


def _bytes_on_disk(model):
    """Returns how much room the files of a run with this compiled model take at most."""
    weights, optimizer = (
        sum(4 * int(np.prod(variable.shape)) for variable in variables)
        for variables in (model.weights, model.optimizer.variables)
    )
    # last and best, the new one while it is written, model.keras; and the report.
    return 3 * (weights + optimizer) + weights + 16 * 2**20


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


def _feeds(plan, first_epoch):
    """Returns how `model.fit` gets both splits: their objects, its arguments, and callbacks."""
    size, seed = plan.recipe.batch_size, plan.settings["seed"]
    if plan.decision.name == "none":
        batches, measured = Batches(plan.train, size, plan.least), Batches(plan.evaluation, size)
        # Not PyDataset's own on_epoch_end: Keras calls that once more as it builds the model.
        shuffle = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: batches.shuffle(seed, epoch)
        )
        arguments = {"x": batches, "validation_data": measured}
        return (batches, measured), arguments, [shuffle]
    from keras_resnet.distribution.replicas import AverageMovingStatistics, Shards

    order = functools.partial(plan.train.order, seed)
    shards = Shards(plan.train, size, plan.strategy, order, first_epoch, plan.least)
    measured = Shards(plan.evaluation, size, plan.strategy)
    arguments = {
        "x": shards.dataset,
        "steps_per_epoch": shards.steps,
        "validation_data": measured.dataset,
        "validation_steps": measured.steps,
    }
    return (shards, measured), arguments, [AverageMovingStatistics()]


def _watchers(plan, history, received):
    """Returns the callbacks of a run, in the order in which they must be called."""
    chief = plan.decision.is_chief
    return [
        callbacks.EpochTimer(len(plan.train)),
        callbacks.StopOnDivergence(),
        callbacks.StopOnRequest(received, patience=0 if chief else CHIEF_SECONDS),
        callbacks.Recorder(history, plan.run_dir, plan.metadata)
        if chief
        else callbacks.History(history),
    ]


def _fit(plan, model, history):
    """Runs `model.fit` from the epoch after `history`, which grows with each epoch."""
    size, epochs = plan.recipe.batch_size, plan.recipe.epochs
    feeds, arguments, first = _feeds(plan, len(history))
    progress = callbacks.Progress(len(plan.train), size, epochs)
    with callbacks.catching_stop_signals() as received:
        watchers = [*first, *_watchers(plan, history, received)]
        if plan.verbose:
            watchers.append(progress)  # last: an epoch that has its line has its checkpoint
        try:
            with _releasing_batches():
                model.fit(
                    **arguments,
                    initial_epoch=len(history),
                    epochs=epochs,
                    shuffle=False,  # the batches are shuffled already
                    verbose=0,
                    callbacks=watchers,
                )
            if received:
                raise Interrupted("after the last epoch")
        except Interrupted as stop:
            if not plan.decision.is_chief:
                raise Interrupted(f"interrupted {stop}: {plan.resume_command}") from None
            path = plan.run_dir / "checkpoints" / "interrupted.keras"
            archive.save_model(model, path, plan.metadata)
            raise Interrupted(
                f"interrupted {stop}; {len(history)} of {epochs} epochs are finished. The weights "
                f"as they are: {path}. Go on from the last finished epoch: {plan.resume_command}"
            ) from None
        except Exception as error:
            _explain(
                plan, error, feeds, received, f"{len(history)} of {epochs} epochs are finished"
            )
            raise
        finally:
            progress.close()


def _explain(plan, error, feeds, received, finished):
    """Raises a `TrainingError` for an error of `model.fit` whose cause is known."""
    failure = next((feed.failure for feed in feeds if feed.failure), None)
    if failure is not None:
        raise TrainingError(
            f"{failure}; {finished}. Once it can be read again: {plan.resume_command}"
        ) from failure
    lost = _lost_worker(plan.decision.cluster, error)
    if lost and received:
        raise Interrupted(
            f"interrupted, {lost} is gone; {finished}: {plan.resume_command}"
        ) from None
    if lost:
        raise WorkerLost(
            f"{lost} is gone, or cannot be reached; {finished}. Go on: {plan.resume_command}"
        ) from error


def _lost_worker(cluster, error):
    """Returns which other worker an error of TensorFlow speaks of; None if it is another error."""
    if cluster is None or cluster.size == 1:
        return None
    text = f"{type(error).__name__} {error}"
    if not re.search("UnavailableError|AbortedError|CancelledError|Collective ops is abort", text):
        return None
    # An error goes from worker to worker: what comes last is where it began.
    tasks = [int(task) for task in re.findall(r"/task:(\d+)", text)]
    others = [task for task in tasks if task != cluster.index and task < cluster.size]
    return cluster.name(others[-1]) if others else "another worker"


def _finish(plan, model, config, history):
    """Saves the trained weights as a float32 model, measures that, and writes the report."""
    final = _build_classifier(plan, "float32")
    final.set_weights(model.get_weights())
    if plan.settings["freeze"]:
        fine_tuning.freeze(final.get_layer(plan.settings["model"]), plan.settings["freeze"])
    if not plan.decision.is_chief:
        return Run(plan.run_dir, final, history, None)
    archive.save_model(final, plan.run_dir / "model.keras", plan.metadata)
    predictor = Predictor(final, plan.metadata)
    evaluation = evaluate(
        predictor,
        plan.evaluation,
        plan.dataset.class_names,
        batch_size=min(256, plan.recipe.batch_size),
    )
    report = write_report(plan.run_dir, config, history, evaluation, plan.evaluation)
    return Run(plan.run_dir, final, history, report)


def _start_from(plan, model):
    """Loads the weights that the run starts from, and freezes those that it keeps."""
    names, total = plan.settings["freeze"], count_parameters(model)
    numbers = {"num_parameters": total}
    if plan.opening.init and plan.opening.init.tensors:
        classes = len(plan.dataset.class_names)
        plan.say(f"init: {fine_tuning.load_init(model, plan.opening.init, plan.recipe, classes)}")
    if names:
        fine_tuning.freeze(model.get_layer(plan.settings["model"]), names)
        trained = numbers["num_trained_parameters"] = count_parameters(model)
        plan.say(f"frozen: {', '.join(names)}; {trained:,} of {total:,} parameters are trained")
    return numbers


def _prepare(plan):
    """Returns the compiled model, with the weights to start from, and its numbers of parameters."""
    _set_seed(plan.settings["seed"])
    last = plan.opening.last_checkpoint
    with plan.scope():
        model = _build_classifier(plan, plan.opening.precision)
        if plan.settings["sync_batchnorm"]:
            _synchronize(model)
    # The chief loads alone, and not in the scope: variables are made there by all or by none.
    numbers = _start_from(plan, model)
    with plan.scope():
        _compile(model, plan)
    if plan.decision.is_chief:
        run_folder.check_space(plan.run_dir, _bytes_on_disk(model))
        if last.exists():
            archive.load_weights(model, last)
    if plan.decision.num_replicas > 1:
        from keras_resnet.distribution.replicas import broadcast, separate_seeds

        broadcast(plan.strategy, [*model.variables, *model.optimizer.variables])
        separate_seeds(plan.strategy, model)
    return model, numbers


def _synchronize(model):
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            "--sync-batchnorm needs KERAS_BACKEND tensorflow, got " + keras.backend.backend()
        )
    from keras_resnet.distribution.replicas import synchronize_batchnorm

    synchronize_batchnorm(model)


def _begin(plan, command):
    """Returns the compiled model, and the completed config.json."""
    opening, config = plan.opening, plan.opening.config
    plan.say(f"data: {plan.dataset.source}")
    backend = keras.backend.backend()
    plan.say(f"precision: {opening.precision} ({opening.precision_reason}), backend: {backend}")
    with _saying_what_is_left(plan):
        model, num_parameters = _prepare(plan)
        if plan.decision.is_chief:
            if "dataset" not in config:
                config = _describe(plan, num_parameters, command)
            elif config["recipe"]["epochs"] != plan.recipe.epochs:
                config = _describe_continued(plan, config, command)
            files.write_json(plan.run_dir / run_folder.CONFIG, config)
    return model, config


def _run(plan, model, config):
    """Trains what is left to train, and writes the report."""
    history = list(plan.opening.history)
    if plan.decision.is_chief:
        (plan.run_dir / "checkpoints").mkdir(exist_ok=True)
        write_history(plan.run_dir / "history.csv", history)
    resumed = f", resumed after epoch {len(history)}" if history else ""
    plan.say(f"run folder: {plan.run_dir}{resumed}")
    if len(history) < plan.recipe.epochs:
        _fit(plan, model, history)
    run = _finish(plan, model, config, history)
    if plan.decision.num_replicas > 1:
        from keras_resnet.distribution.replicas import find_failed

        # Whoever starts lost workers again starts those that have not ended well.
        find_failed(plan.strategy, False)
    return run


def _out_of_memory(error):
    """Returns whether an error of any backend says that memory ran out."""
    signs = ("out of memory", "resource_exhausted", "resourceexhausted", "oom when allocating")
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


@contextlib.contextmanager
def _saying_what_is_left(plan):
    """Turns a full disk, a full memory and a lost worker into a `TrainingError`."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{plan.run_dir}: {error.strerror or error}; what was finished is whole: go on with "
            f"{plan.resume_command}"
        ) from error
    except (InputError, TrainingError):
        raise
    except Exception as error:
        _explain(plan, error, (), (), "the run had not begun, or was over")
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
    validation_split=None,
    skip_bad=None,
    run_dir=None,
    resume=False,
    strategy="auto",
    sync_batchnorm=None,
    scale_batch=None,
    worker_timeout=strategies.TIMEOUT,
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
        init: A checkpoint to start from, any file that `weights.convert` reads, or a `.keras`
            file of this package: fine-tuning. The network gets the checkpoint's variant and
            stem; a head of another number of classes is new, and the first convolution is fitted
            to the images' channels.
        freeze: Modules that keep the weights of `init`, such as ["stem", "stage1"]; see
            `summarize_shapes`. They are frozen in model.keras, too.
        normalize: A row of `preprocessing.NORMALIZATIONS`: "none" (images in 0 … 1), "imagenet",
            what PyTorch's published weights expect, "inception" or "caffe". The default is that
            of the preprocessing in a `.keras` file given as `init`, and "none" otherwise.
        precision: "auto" (the default), "float32", "bfloat16" or "float16"; see
            `choose_precision`.
        seed: Whole number; 0 by default. It sets the first weights and the order of the images.
        validation_split: Share of the images held out where a data set has no split to measure
            on; 0.1 by default.
        skip_bad: Whether unreadable images of a folder are left out instead of being an error.
        run_dir: The run folder; runs/MODEL-RECIPE-TIME by default.
        resume: Whether to go on with the run in `run_dir`, from its last finished epoch. Settings
            that are given as well must be those of the run, but for `epochs`: another total, of at
            least the epochs that are finished, continues a finished run or shortens one. The
            rate's schedule is then the one of a run of that total, from the step reached: a cosine
            that had ended at zero starts again from where the longer cosine is by then. "auto"
            resumes if there is a run, and starts one if not.
        strategy: "auto" (the default), "none", "mirrored" or "multiworker": a row of
            `distribution.STRATEGIES`. Under several workers each of them calls `train` with the
            same arguments, once in its process; the chief alone writes files.
        sync_batchnorm: Whether BatchNormalization takes its statistics over the batches of all
            replicas; if not, which is the default, the moving statistics are averaged over the
            replicas at each epoch's end.
        scale_batch: Whether batch size and learning rate are multiplied by the number of replicas,
            with a warm-up; see `recipes.scale_batch`. The batch is otherwise what the recipe says,
            whatever the number of replicas.
        worker_timeout: Seconds to wait for the other workers.
        verbose: Whether to print what was found and one line an epoch.
        command: The command line, for the report.

    Returns:
        A `Run`.

    Raises:
        InputError: If an argument, the data or the folder do not allow the run; nothing was
            trained then.
        TrainingError: If the loss became infinite or NaN, or a file could not be written; a
            `WorkerLost` if another worker ended or cannot be reached.
        Interrupted: On Ctrl-C or SIGTERM.

    Example:
        A small network on images of noise, for a second; `train()` alone is the real thing.

        >>> import tempfile
        >>> from keras_resnet import SPECS, Spec, Split
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
    given = fine_tuning.plain_settings(given)
    decision = strategies.decide(strategy)
    if decision.cluster:
        strategies.check_first()
    with contextlib.ExitStack() as lock:
        opening = _open(
            lambda: open_run(given, run_dir, resume, decision.num_replicas, lock),
            decision.cluster,
            given,
            worker_timeout,
        )
        try:
            plan = _make_plan(
                opening,
                decision,
                strategies.start(decision),
                in_memory,
                verbose and decision.is_chief,
            )
            plan.say(str(decision))
            _check_same_data(opening, plan.dataset)
            begun = _begin(plan, command)
        except Exception as error:
            if opening.made is not None:
                run_folder.unmake_run_dir(opening.run_dir, opening.made)
            lost = _lost_worker(decision.cluster, error)
            if lost:
                raise WorkerLost(f"{lost} is gone; the run had not begun") from error
            raise
        with _saying_what_is_left(plan):
            return _run(plan, *begun)


def _open(open_here, cluster, given, timeout):
    """Returns the `Opening` of a run: the chief opens it, and tells the other workers."""
    if cluster is None:
        return open_here()
    opened = []

    def describe():
        opened.append(open_here())
        return opened[0].describe()

    # Data may lie elsewhere on another machine; all else is the same, or they train in vain.
    command = {name: repr(value) for name, value in given.items() if name != "data_dir"}
    with rendezvous.meet(cluster, {**strategies.versions(), **command}, timeout) as meeting:
        described = meeting.share(describe)
    return opened[0] if opened else read_description(described, given["data_dir"])
