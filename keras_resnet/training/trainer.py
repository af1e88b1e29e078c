"""Training: from the settings to a run folder, by `model.fit`.

`Trainer.run` calls the steps in order, in one process. `distributed.DistributedTrainer` overrides
the steps that differ under several replicas.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import random
import shlex
import traceback
from pathlib import Path

import keras
import numpy as np

from keras_resnet import archive, config
from keras_resnet.datasets import Dataset, Split, load_dataset
from keras_resnet.datasets.base import (
    balanced_weights,
    cut_batches,
    describe_counts,
    find_imbalance,
)
from keras_resnet.datasets.images import ImageFiles
from keras_resnet.distribution import strategies
from keras_resnet.evaluation.grad_cam import grad_cam
from keras_resnet.evaluation.inference import Predictor
from keras_resnet.evaluation.metrics import evaluate
from keras_resnet.evaluation.report import find_best, write_history, write_report
from keras_resnet.losses import Accuracy, make_loss
from keras_resnet.models import SPECS, build_resnet, count_parameters, last_map_size
from keras_resnet.preprocessing import find_normalization, with_preprocessing
from keras_resnet.recipes import find_recipe, override, scale_batch, settle, stored_size
from keras_resnet.training import callbacks, fine_tuning, records, run_folder
from keras_resnet.training.inputs import Batches, Shuffle
from keras_resnet.training.optimizers import OPTIMIZERS, SCHEDULES
from keras_resnet.training.precision import POLICIES, choose_precision
from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError, Interrupted, TrainingError

LEAST_PATIENCE = 5
"""Epochs without a better one that a run goes on at least."""

LEAST_HEAT_MAP = 4
"""The height of the last feature map below which a heat map shows nothing."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """Successive epochs of a run that are trained in one way; each has its own optimizer.

    Attributes:
        start: Its first epoch, counted from 0.
        stop: The epoch after its last one.
        learning_rate: The learning rate; with a schedule, its peak.
        head_only: Whether the head alone is trained.
    """

    start: int
    stop: int
    learning_rate: float
    head_only: bool = False


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        run_dir: Its folder.
        model: The trained Keras model, in float32: raw uint8 images to logits.
        history: One dict per epoch, with the columns of `history.csv`.
        report: The content of `report.json`; None on a worker that is not the chief.
    """

    run_dir: Path
    model: keras.Model
    history: list
    report: dict | None


def train(
    model=None,
    dataset=None,
    recipe=None,
    *,
    run_dir=None,
    resume=False,
    strategy="auto",
    worker_timeout=config.WORKER_TIMEOUT,
    verbose=True,
    command=None,
    **settings,
):
    """Trains a network by a recipe and writes a run folder.

    The folder holds config.json, history.csv, the checkpoints, model.keras (float32, from raw
    images to logits), report.json, report.md, plots and TensorBoard events. A run that is
    interrupted or killed is resumed from its last finished epoch.

    Args:
        model: A row of `SPECS`; by default that of the recipe, "resnet18" in most.
        dataset: A data set's name, see `load_dataset`, or a `Dataset`; Fashion-MNIST by default.
        recipe: A row of `RECIPES`; by default "photos" for "folder:", otherwise "quick".
        run_dir: The run folder; runs/MODEL-RECIPE-TIME by default.
        resume: Whether to resume the run in `run_dir` from its last finished epoch. Given settings
            must equal those of the run; only `epochs` may differ. A new total, not below the number
            of finished epochs, extends a finished run or shortens an unfinished one. The learning
            rate follows the schedule of the new total from the current step on. "auto" resumes an
            existing run, and otherwise starts a new one.
        strategy: "auto" (the default), "none", "mirrored" or "multiworker": a row of
            `distribution.STRATEGIES`. Under several workers, each of them calls `train` with the
            same arguments, once in its process; the chief alone writes files.
        worker_timeout: Seconds to wait for the other workers.
        verbose: Whether to print the data source, the precision and one line per epoch.
        command: The command line, for the report.
        **settings: Further fields of `config.TrainConfig`, such as epochs and learning_rate;
            `keras-resnet train --help` describes them all.

    Returns:
        A `Run`.

    Raises:
        InputError: If an argument, the data or the folder do not allow the run. No epoch was
            trained, and a folder that was created for the run is removed.
        TrainingError: If the loss became infinite or NaN, memory ran out, or a file could not be
            written; a `WorkerLost` if another worker ended or cannot be reached.
        Interrupted: On Ctrl-C or SIGTERM.

    Example:
        A small network on images of noise takes a second; `train()` alone trains ResNet-18.

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
    in_memory = dataset if isinstance(dataset, Dataset) else None
    name = in_memory.name if in_memory else dataset
    given = config.given_settings({**settings, "model": model, "dataset": name, "recipe": recipe})
    decision = strategies.decide(strategy)
    trainer = Trainer
    if decision.name != "none":
        from keras_resnet.training.distributed import DistributedTrainer as trainer
    return trainer(
        given,
        decision,
        dataset=in_memory,
        run_dir=run_dir,
        resume=resume,
        worker_timeout=worker_timeout,
        verbose=verbose,
        command=command,
    ).run()


class Trainer:
    """Trains one network in this process.

    Args:
        given: The settings that were given, a dict; see `config.given_settings`.
        decision: The `strategies.Decision`.
        dataset: A `Dataset` in memory; None to load it.
        run_dir: See `train`.
        resume: See `train`.
        worker_timeout: See `train`.
        verbose: See `train`.
        command: See `train`.

    Attributes:
        settings: The `TrainConfig` of the run.
        recipe: The `Recipe`, with the settings that override it and, once the data are loaded, the
            values that depend on them.
        record: The content of config.json.
        source: The checkpoint to start from, a `weights.sources.Source`, or None.
        history: One dict per finished epoch.
        metadata: The metadata of each model file.
        batches: The inputs of `model.fit`: training and evaluation batches.
    """

    stop_delay = 0.0
    """Seconds between a stop signal and the stop."""

    def __init__(
        self, given, decision, *, dataset, run_dir, resume, worker_timeout, verbose, command
    ):
        self.given, self.dataset = given, dataset
        self.run_dir, self.resume = Path(run_dir) if run_dir else None, resume
        self.decision, self.worker_timeout = decision, worker_timeout
        self.verbose, self.command = verbose, command
        self.created = None  # the folders made for a new run, the innermost first
        self.history, self.batches, self.received = [], (), []
        self.is_begun = False  # whether the run folder holds a run that can be resumed
        self.is_settled = False  # whether the recipe has the values that depend on the data

    # The steps in order -----------------------------------------------------------------------

    def run(self):
        """Trains the network, and writes the run folder; returns a `Run`."""
        with contextlib.ExitStack() as lock:
            with self.folder_removed_on_failure():
                self.open_run(lock)
                with self.errors_translated():
                    self.load_data()
                    self.build_model()
                    self.write_config()
            with self.errors_translated():
                self.fit()
                return self.finish()

    def open_run(self, lock):
        """Settles the settings and the recipe; creates the run folder, or opens the run in it."""
        if self.resume not in (True, False, "auto"):
            raise InputError(f"`resume` must be True, False or 'auto', got {self.resume!r}")
        if self.resume and self.run_dir is None:
            raise InputError("`resume` needs the `run_dir` of the run to resume")
        resume = run_folder.has_run(self.run_dir) if self.resume == "auto" else self.resume
        if resume:
            self.record, before = run_folder.reopen_run_dir(self.run_dir, lock)
            self.settings = before.resume(self.given)
        else:
            self.settings = config.TrainConfig(**self.given)
        self.settings.check()
        if self.settings.sync_batchnorm and keras.backend.backend() != "tensorflow":
            raise InputError(
                f"--sync-batchnorm needs KERAS_BACKEND tensorflow, got {keras.backend.backend()}"
            )
        self.precision, self.precision_reason = choose_precision(self.settings.precision)
        trained = resume and run_folder.last_checkpoint(self.run_dir).exists()
        recorded = self.record.get("weights") if resume else None
        self.source = fine_tuning.find_source(self.settings, recorded, needed=not trained)
        if not resume:
            self.settings = fine_tuning.adopt_normalization(self.settings, self.given, self.source)
        self.recipe = self.make_recipe(self.settings)
        if resume:
            self.check_same_recipe(before)
            self.recipe = self.settle_as_recorded(self.recipe)
            self.is_settled = "dataset" in self.record
            self.history = records.finished_epochs(self.run_dir)
            self.check_epochs()
            return
        default = run_folder.default_run_dir(self.settings.model, self.settings.recipe)
        self.run_dir = Path(self.run_dir or default)
        self.created = run_folder.create_run_dir(self.run_dir, lock)
        self.record = records.begin(self.settings, self.source)
        files.write_json(self.run_dir / run_folder.CONFIG, self.record)

    def load_data(self):
        """Loads the data set, unless it is in memory."""
        self.say(str(self.decision))
        if self.dataset is None:
            options = config.data_settings(self.settings)
            name = options.pop("dataset")
            size, resize = stored_size(self.recipe), self.recipe.resize
            self.dataset = load_dataset(name, image_size=size, resize=resize, **options)
        self.check_data()
        found = self.dataset.fingerprint
        before = self.record.get("dataset", {}).get("fingerprint", found)
        if before != found:
            raise InputError(
                f"{self.run_dir}: the data are not those the run was started with: fingerprint "
                f"{before[:16]}…, got {found[:16]}…"
            )
        self.train_split = self.dataset.splits["train"]
        self.selection_split = self.dataset.splits[self.dataset.selection_split]
        self.evaluation_split = self.dataset.splits[self.dataset.evaluation_split]
        if not self.is_settled:
            self.recipe = self.settle(self.recipe, len(self.train_split), self.dataset.image_shape)
            if not self.has_new_head:
                self.recipe = dataclasses.replace(self.recipe, head_epochs=0)
            self.is_settled = True
        self.metadata = records.model_metadata(self)
        self.describe_data()
        for split in (self.train_split, self.selection_split):
            if isinstance(split.images, ImageFiles):
                split.images.keep()

    def build_model(self):
        """Builds and compiles the model, with the weights that the run starts or resumes from."""
        backend = keras.backend.backend()
        self.say(f"precision: {self.precision} ({self.precision_reason}), backend: {backend}")
        _set_seed(self.settings.seed)
        with self.scope():
            self.model = self.build_classifier(self.precision)
        self.num_parameters = self.load_initial_weights()
        # The optimizer's state in the checkpoint is that of the phase of the last finished epoch.
        self.begin_phase(next(p for p in self.phases if len(self.history) <= p.stop))
        self.restore()

    def fit(self):
        """Runs `model.fit` from the epoch after the last finished one, once for each phase."""
        self.prepare_folder()
        resumed = f", resumed after epoch {len(self.history)}" if self.history else ""
        self.say(f"run folder: {self.run_dir}{resumed}")
        progress = callbacks.Progress(
            len(self.train_split), self.recipe.batch_size, self.recipe.epochs
        )
        with (
            callbacks.catching_stop_signals() as self.received,
            contextlib.closing(progress),
            _releasing_batches(),
        ):
            for phase in self.phases:
                if len(self.history) < phase.stop and not self.is_stopped_early:
                    if phase != self.phase:
                        self.begin_phase(phase)
                    self.fit_phase(progress)
        if self.received:
            raise Interrupted("after the last epoch")
        if self.is_stopped_early:
            best = find_best(self.history) + 1
            self.say(f"stopped after epoch {len(self.history)}: none is better than epoch {best}")

    def fit_phase(self, progress):
        """Runs `model.fit` to the end of the phase, or to an early stop."""
        arguments, before = self.make_inputs()
        timer = callbacks.EpochTimer(len(self.train_split), self.batches[0])
        self.model.fit(
            **arguments,
            initial_epoch=len(self.history),
            epochs=self.phase.stop,
            shuffle=False,  # the inputs are shuffled already
            verbose=0,
            callbacks=[
                *before,
                timer,
                callbacks.StopOnDivergence(),
                callbacks.StopOnRequest(self.received, self.stop_delay),
                self.checkpoint_callback(),
                callbacks.StopEarly(lambda: self.is_stopped_early),
                *([progress] if self.verbose else []),  # prints after the checkpoint is saved
            ],
        )

    def finish(self):
        """Saves the network as a float32 model, evaluates it and writes the report."""
        final = self.build_classifier("float32", is_final=True)
        final.set_weights(self.best_weights())
        if self.settings.freeze:
            fine_tuning.freeze(final.get_layer(self.settings.model), self.settings.freeze)
        return Run(self.run_dir, final, self.history, self.write_results(final))

    # Parts of the steps --------------------------------------------------------------------------

    def say(self, text):
        """Prints a line, if the run is verbose."""
        if self.verbose:
            print(text, flush=True)

    def make_recipe(self, settings):
        """Returns the recipe with the settings' values, the source's form, and scaling."""
        stem = self.source and self.source.checkpoint.stem
        recipe = override(find_recipe(settings.recipe, stem), settings)
        recipe = fine_tuning.adopt_form(recipe, self.source, settings)
        if settings.scale_batch:
            recipe = scale_batch(recipe, self.decision.num_replicas)
        config.check_rows(recipe)
        return recipe

    def settle(self, recipe, images, image_shape):
        """Returns the recipe with the values that depend on the data; see `recipes.settle`."""
        stem = SPECS[self.settings.model].stem
        fixed_size = self.settings.image_size is not None
        return settle(recipe, images, image_shape, stem=stem, fixed_size=fixed_size)

    def settle_as_recorded(self, recipe):
        """Returns the recipe of a resumed run, settled for the data that config.json describes.

        A run that was killed before its data were loaded is settled when they are.
        """
        if "dataset" not in self.record:
            return recipe
        data = self.record["dataset"]
        recipe = self.settle(recipe, data["splits"]["train"], data["image_shape"])
        # Another total number of epochs must not move the phases.
        head = self.record.get("recipe", {}).get("head_epochs", recipe.head_epochs)
        return dataclasses.replace(recipe, head_epochs=head)

    @property
    def has_new_head(self):
        """Whether the run starts from weights, but trains a head that is not of them."""
        frozen = self.settings.freeze or ()
        if self.source is None or "logits" in frozen:
            return False
        return not fine_tuning.keeps_head(self.source, self.dataset.class_names, frozen)

    def check_data(self):
        """Raises an `InputError` for a data set that cannot be trained on."""
        if not self.dataset.is_labelled:
            raise InputError(
                f"{self.dataset.name}: training needs labels, got images without: load them with "
                "`load_dataset`"
            )
        if None in self.dataset.image_shape:
            raise InputError(
                f"{self.dataset.name}: training needs images of one size, got `image_size` "
                "(None, None): load them with a size"
            )

    def describe_data(self):
        """Prints the source of the data, the counts of the classes, and remarks about them."""
        counts = self.dataset.class_counts()
        self.say(f"data: {self.dataset.source}")
        self.say(describe_counts(self.dataset))
        ratio = find_imbalance(counts)
        if ratio and self.settings.class_weights == "none":
            self.say(
                f"note: the largest class has {ratio:.0f} times the images of the smallest: with "
                "--class-weights balanced each class has the same weight"
            )
        for remark in self.dataset.remarks:
            self.say(f"note: {remark}")

    def check_same_recipe(self, before):
        """Raises an `InputError` if a resumed run would be trained by another recipe.

        Args:
            before: The settings that the run was started with.
        """
        replicas = self.decision.num_replicas
        then = self.record.get("replicas", replicas)
        if before.scale_batch and then != replicas:
            raise InputError(
                f"{self.run_dir}: the run was started with --scale-batch on {then} replicas, which "
                f"determine its batch size: use as many, got {replicas}"
            )
        # Compared as JSON, since config.json has lists in place of tuples.
        recipe = self.settle_as_recorded(self.make_recipe(before))
        now = json.loads(json.dumps(dataclasses.asdict(recipe)))
        known = self.record.get("recipe", now)
        changed = [name for name in now if known.get(name) != now[name]]
        # The model is a setting, which has been compared; earlier runs have it there alone.
        if set(changed) - {"description", "model"}:
            raise InputError(
                f"{self.run_dir}: the recipe has changed since the run was started "
                f"({', '.join(changed)}): start a new run"
            )

    def check_epochs(self):
        """Raises an `InputError` if a resumed run has finished more epochs than its new total."""
        if self.history and self.recipe.epochs < len(self.history):
            raise InputError(
                f"{self.run_dir}: `epochs` must be at least the number of finished epochs, "
                f"{len(self.history)}, got {self.recipe.epochs}"
            )

    def scope(self):
        """Returns the context in which variables are created."""
        return contextlib.nullcontext()

    @property
    def phases(self):
        """The `Phase`s of the run: with a head to train first, two."""
        recipe = self.recipe
        head = min(recipe.head_epochs, recipe.epochs)
        rest = Phase(head, recipe.epochs, recipe.learning_rate)
        if not head:
            return [rest]
        return [Phase(0, head, recipe.head_learning_rate, head_only=True), rest]

    @property
    def is_stopped_early(self):
        """Whether the last epochs of the run brought nothing better, as many as `patience` says."""
        if self.recipe.patience is None or not self.history:
            return False
        since = len(self.history) - max(find_best(self.history) + 1, self.phases[-1].start)
        return since >= max(LEAST_PATIENCE, round(self.recipe.patience * self.recipe.epochs))

    def begin_phase(self, phase):
        """Makes the layers trainable that a phase trains, and compiles the model."""
        self.phase = phase
        few = len(self.train_split) < self.recipe.frozen_statistics_below
        if self.settings.weights:
            fine_tuning.set_trainable(
                self.model.get_layer(self.settings.model),
                frozen=self.settings.freeze or (),
                head_only=phase.head_only,
                normalization=not few,
            )
        if len(self.phases) > 1:
            kept = ", BatchNormalization as in the checkpoint" if few else ""
            part = "the head alone" if phase.head_only else f"all layers{kept}"
            self.say(
                f"epochs {phase.start + 1} to {phase.stop}: {part}; "
                f"{count_parameters(self.model):,} parameters are trained"
            )
        with self.scope():
            self.compile()

    @property
    def resizing(self):
        """The arguments of `with_preprocessing` that keep the proportions of photographs."""
        if not self.takes_any_size:
            return {}
        return {"resize": self.recipe.resize, "crop_pct": self.recipe.crop_pct, "antialias": True}

    def best_weights(self):
        """Returns the weights of the last epoch; of the best one, where the recipe looks for it."""
        if self.recipe.patience is None:
            return self.model.get_weights()
        best = self.build_classifier(self.precision)
        archive.load_weights(best, self.run_dir / "checkpoints" / "best.keras")
        return best.get_weights()

    def build_classifier(self, precision, is_final=False):
        """Returns the network with its preprocessing; Keras's dtype policy stays as it is.

        Args:
            precision: A row of `POLICIES`.
            is_final: Whether it is the result of the run: without augmentation, and for photographs
                of any size where the recipe keeps their proportions.
        """
        recipe, image_shape = self.recipe, self.dataset.image_shape
        normalization = find_normalization(self.settings.normalize, image_shape[-1])
        augmentation = recipe.augmentation
        if is_final and self.takes_any_size:
            image_shape, augmentation = (None, None, image_shape[-1]), ()
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(POLICIES[precision])
        try:
            network = build_resnet(
                self.settings.model,
                (recipe.image_size, recipe.image_size, image_shape[-1]),
                len(self.dataset.class_names),
                variant=recipe.variant,
                stem=recipe.stem,
            )
            return with_preprocessing(
                network, image_shape, augmentation, **normalization, **self.resizing
            )
        finally:
            keras.config.set_dtype_policy(policy)

    @property
    def takes_any_size(self):
        """Whether the trained model takes photographs of any size."""
        return self.recipe.resize == "shorter_edge"

    def load_initial_weights(self):
        """Loads the checkpoint to start from and freezes modules; returns parameter counts."""
        names, total = self.settings.freeze, count_parameters(self.model)
        numbers = {"num_parameters": total}
        if self.source and self.source.tensors:
            classes = self.dataset.class_names
            done = fine_tuning.load_source(
                self.model, self.source, self.recipe, classes, names or ()
            )
            self.say(f"weights: {done}")
        if names:
            fine_tuning.freeze(self.model.get_layer(self.settings.model), names)
            trained = numbers["num_trained_parameters"] = count_parameters(self.model)
            self.say(f"frozen: {', '.join(names)}; {trained:,} of {total:,} parameters are trained")
        return numbers

    @property
    def least_batch(self):
        """The smallest training batch in which BatchNormalization can compute a variance.

        A channel of a 1×1 feature map has one value per image, so two images are needed.
        """
        return 1 if last_map_size(*self.network_form) > 1 else 2

    @property
    def network_form(self):
        """The arguments of `last_map_size`."""
        return self.settings.model, self.recipe.stem, self.recipe.image_size

    @property
    def reading(self):
        """The arguments of `datasets.mixing.BatchReader` for the training batches."""
        is_balanced = self.settings.class_weights == "balanced"
        return {
            "class_weights": balanced_weights(self.dataset.class_counts()) if is_balanced else None,
            "mixing": self.recipe.mixing,
            "classes": len(self.dataset.class_names),
            "seed": self.settings.seed,
        }

    def make_loss(self):
        """Returns the loss of logits and labels."""
        return make_loss(self.recipe.label_smoothing, self.recipe.mixing)

    def compile(self):
        """Compiles the model and creates the variables of optimizer and metrics."""
        recipe, phase = self.recipe, self.phase
        cuts = cut_batches(len(self.train_split), recipe.batch_size, self.least_batch)
        steps = (phase.stop - phase.start) * len(cuts)
        rate = SCHEDULES[recipe.schedule](phase.learning_rate, steps, recipe.warmup)
        optimizer = OPTIMIZERS[recipe.optimizer](rate)
        accuracy = Accuracy() if recipe.mixing else "accuracy"
        self.model.compile(optimizer, self.make_loss(), metrics=[accuracy])
        self.build_metrics()
        optimizer.build(self.model.trainable_variables)

    def build_metrics(self):
        """Creates the metrics' variables; creation in the first step causes a second trace."""
        logits = keras.ops.zeros((1, self.model.output_shape[-1]))
        self.model.compute_metrics(None, keras.ops.zeros((1,), "int32"), logits)
        self.model.reset_metrics()

    def restore(self):
        """Checks the disk space, then loads the last checkpoint of a resumed run."""
        files.check_space(self.run_dir, _bytes_on_disk(self.model))
        if self.history:
            archive.load_weights(self.model, run_folder.last_checkpoint(self.run_dir))

    def make_inputs(self):
        """Makes the batches; returns the arguments of `model.fit` for them, and callbacks."""
        size = self.recipe.batch_size
        training = Batches(self.train_split, size, self.least_batch, **self.reading)
        evaluation = Batches(self.selection_split, size)
        self.batches = training, evaluation
        arguments = {"x": training, "validation_data": evaluation}
        return arguments, [Shuffle(training, self.settings.seed)]

    # Files -------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def folder_removed_on_failure(self):
        """Removes the folders that were created for a run if it cannot begin."""
        try:
            yield
        except Exception:
            if self.created is not None:
                run_folder.remove_run_dir(self.run_dir, self.created)
            raise

    def write_config(self):
        """Completes config.json."""
        if "dataset" not in self.record:
            self.record = records.describe(self, self.num_parameters)
        elif self.record["recipe"]["epochs"] != self.recipe.epochs:
            self.record = records.describe_continued(self)
        files.write_json(self.run_dir / run_folder.CONFIG, self.record)

    def prepare_folder(self):
        """Creates the folder of the checkpoints, and writes the history so far."""
        self.is_begun = True
        (self.run_dir / "checkpoints").mkdir(exist_ok=True)
        write_history(self.run_dir / "history.csv", self.history)

    def checkpoint_callback(self):
        """Returns the callback that adds each epoch to the history and saves it."""
        return callbacks.CheckpointCallback(self.history, self.run_dir, self.metadata)

    def write_results(self, final):
        """Writes model.keras, evaluates it, and writes the report; returns the report."""
        archive.save_model(final, self.run_dir / "model.keras", self.metadata)
        predictor = Predictor(final, self.metadata)
        split, size = self.evaluation_split, min(256, self.recipe.batch_size)
        measured = split
        if self.takes_any_size and isinstance(split.images, ImageFiles):
            # The files themselves, as `keras-resnet evaluate` and the exports see them.
            sources, channels = split.images.sources, split.images.shape[-1]
            measured = Split(ImageFiles(sources, (None, None), channels), split.labels)
        evaluation = evaluate(predictor, measured, self.dataset.class_names, batch_size=size)
        has_map = last_map_size(*self.network_form) >= LEAST_HEAT_MAP
        heat_maps = functools.partial(grad_cam, final) if has_map else None
        return write_report(self.run_dir, self.record, self.history, evaluation, split, heat_maps)

    def save_interrupted(self):
        """Saves the current weights; returns a sentence with the path."""
        path = self.run_dir / "checkpoints" / "interrupted.keras"
        archive.save_model(self.model, path, self.metadata)
        return f" The current weights are in {path}."

    # Errors ------------------------------------------------------------------------------------

    @property
    def resume_command(self):
        """The command that resumes the run."""
        return f"keras-resnet train --resume --run-dir {shlex.quote(str(self.run_dir))}"

    @property
    def finished(self):
        """The state of the run, for errors."""
        return f"{len(self.history)} of {self.recipe.epochs} epochs are finished"

    @contextlib.contextmanager
    def errors_translated(self):
        """Raises errors with a known cause as a `TrainingError` with the command to resume."""
        try:
            try:
                yield
            except Interrupted as stop:
                saved = self.save_interrupted()
                raise Interrupted(
                    f"interrupted {stop}; {self.finished}.{saved} Resume from the last finished "
                    f"epoch: {self.resume_command}"
                ) from None
        except Exception as error:
            translated = self.translate(error)
            if translated is None:
                raise
            raise translated from error

    def translate(self, error):
        """Returns the `TrainingError` for an error with a known cause; None for another."""
        failure = next((each.failure for each in self.batches if each.failure), None)
        if failure is not None:
            return TrainingError(
                f"{failure}; {self.finished}. When the image is readable: {self.resume_command}"
            )
        if isinstance(error, (InputError, TrainingError)):
            return None
        if isinstance(error, OSError) and self.is_begun:
            return TrainingError(
                f"{self.run_dir}: {error.strerror or error}; finished epochs are kept: resume with "
                f"{self.resume_command}"
            )
        if _is_out_of_memory(error):
            return TrainingError(
                f"out of memory at --batch-size {self.recipe.batch_size} and --image-size "
                f"{self.recipe.image_size}: start a run with smaller ones"
            )
        return None


def _set_seed(seed):
    if keras.backend.backend() == "tensorflow":
        keras.utils.set_random_seed(seed)
        return
    # set_random_seed imports TensorFlow wherever it is installed. Other backends draw from
    # Keras's generators, which Python's own seeds.
    random.seed(seed)
    np.random.seed(seed)


def _bytes_on_disk(model):
    """Returns the largest total size of a run's files for this model, in bytes."""
    weights = sum(4 * int(np.prod(variable.shape)) for variable in model.weights)
    # last.keras, best.keras and a new one while it is written, each with the two slots of Adam
    # where all layers are trained; model.keras; the report.
    return 3 * (1 + 2) * weights + weights + 16 * 2**20


def _is_out_of_memory(error):
    """Returns whether an error of any backend says that memory ran out."""
    signs = ("out of memory", "resource_exhausted", "resourceexhausted", "oom when allocating")
    text = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)


@contextlib.contextmanager
def _releasing_batches():
    """Frees the iterators of a failed `model.fit` before the error is raised again.

    The error's traceback refers to them. If an iterator still exists when the interpreter exits,
    its TensorFlow thread waits for a batch from Python forever, and the process hangs.
    """
    try:
        yield
    except BaseException as error:
        innermost = list(traceback.walk_tb(error.__traceback__))[-1][0]
        # By the stack, not by the traceback: Keras removes its own frames from that.
        for frame, _ in traceback.walk_stack(innermost):
            try:
                frame.clear()
            except RuntimeError:  # this frame is still running, and so are its callers
                break
        gc.collect()
        raise
