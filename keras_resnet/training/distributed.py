"""Training under several replicas: the steps of `Trainer` that differ.

All workers call the same methods in the same order, since each collective operation waits for
all of them. Only the chief, worker 0, reads and writes the run folder.
"""

import dataclasses
import functools
import re
from pathlib import Path

from keras_resnet import config
from keras_resnet.distribution import rendezvous, strategies
from keras_resnet.distribution.replicas import (
    AverageMovingStatistics,
    Shards,
    broadcast,
    check_batches,
    check_same,
    choose_loss,
    find_failed,
    separate_seeds,
    synchronize_batchnorm,
)
from keras_resnet.recipes import Recipe
from keras_resnet.training import callbacks, fine_tuning
from keras_resnet.training.trainer import Trainer
from keras_resnet.utils.errors import InputError, Interrupted, WorkerLost

CHIEF_SECONDS = 10.0
"""Seconds that another worker waits after a stop signal: the chief saves first."""


class DistributedTrainer(Trainer):
    """Trains one network on several replicas; the arguments are those of `Trainer`."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.is_chief = self.decision.is_chief
        self.verbose = self.verbose and self.is_chief
        self.stop_delay = 0.0 if self.is_chief else CHIEF_SECONDS

    def open_run(self, lock):
        """Opens the run on the chief, and sends its description to the other workers."""
        cluster = self.decision.cluster
        if cluster is None:
            super().open_run(lock)
        else:
            strategies.check_first()
            # Data can lie elsewhere on another machine; all other settings must be equal.
            command = {name: repr(v) for name, v in self.given.items() if name != "data_dir"}
            about = {**strategies.describe_worker(), **command}
            with rendezvous.meet(cluster, about, self.worker_timeout) as meeting:
                described = meeting.share(lambda: self._open_and_describe(lock))
            if not self.is_chief:
                self._follow(described)
        with self.errors_translated():
            self.strategy = strategies.start(self.decision)

    def _open_and_describe(self, lock):
        super().open_run(lock)
        return {
            "settings": dataclasses.asdict(self.settings),
            "recipe": dataclasses.asdict(self.recipe),
            "run_dir": str(self.run_dir),
            "precision": self.precision,
            "precision_reason": self.precision_reason,
            "history": self.history,
            "is_settled": self.is_settled,
            "weights": fine_tuning.record(self.source) if self.source else None,
        }

    def _follow(self, described):
        """Takes over the chief's description of the run."""
        data_dir = self.given.get("data_dir") or described["settings"]["data_dir"]
        self.settings = config.TrainConfig(**{**described["settings"], "data_dir": data_dir})
        self.recipe = Recipe(**described["recipe"])
        self.run_dir = Path(described["run_dir"])
        self.precision = described["precision"]
        self.precision_reason = described["precision_reason"]
        self.history = described["history"]
        self.is_settled, self.record = described["is_settled"], {}
        # Without tensors: `restore` gives this worker the chief's.
        self.source = fine_tuning.find_source(self.settings, described["weights"], needed=False)

    def load_data(self):
        """Loads the data on every worker; no worker waits for one that could not."""
        replicas, failure = self.decision.num_replicas, None
        try:
            super().load_data()
            check_batches(len(self.train_split), self.recipe.batch_size, replicas)
            check_batches(len(self.selection_split), self.recipe.batch_size, replicas)
        except Exception as error:
            failure = error
        failed = find_failed(self.strategy, failure is not None)
        if failure:
            raise failure
        if failed:
            cluster = self.decision.cluster
            name = cluster.name(failed[0] * cluster.size // replicas)
            raise InputError(f"{name} cannot load its data: see its own error")
        check_same(self.strategy, "data: their fingerprint", self.dataset.fingerprint)

    def scope(self):
        """Returns the strategy's scope."""
        return self.strategy.scope()

    def restore(self):
        """Restores the chief's model, and gives every replica its values."""
        if self.is_chief:
            super().restore()
        broadcast(self.strategy, [*self.model.variables, *self.model.optimizer.variables])
        separate_seeds(self.strategy, self.model)

    @property
    def least_batch(self):
        """See `Trainer`; each replica needs the images, or all together with synchronization."""
        replicas = self.decision.num_replicas
        if self.settings.sync_batchnorm:
            return max(super().least_batch, replicas)
        return super().least_batch * replicas

    def make_loss(self):
        """Returns the loss, which weighs shards of different sizes; see `choose_loss`."""
        images, size = len(self.train_split), self.recipe.batch_size
        replicas, least = self.decision.num_replicas, self.least_batch
        smoothing, mixing = self.recipe.label_smoothing, self.recipe.mixing
        return choose_loss(images, size, replicas, least, smoothing, mixing)

    def compile(self):
        """Compiles the model, synchronized if the settings say so."""
        if self.settings.sync_batchnorm:
            synchronize_batchnorm(self.model)
        super().compile()

    def build_metrics(self):
        """Leaves the metrics' variables to the first step, which creates them on each replica."""

    def make_inputs(self):
        """Makes the shards of this process; see `Trainer.make_inputs`."""
        size, order = self.recipe.batch_size, self.train_split.order
        training = Shards(
            self.train_split,
            size,
            self.strategy,
            functools.partial(order, self.settings.seed),
            len(self.history),
            self.least_batch,
            **self.reading,
        )
        evaluation = Shards(self.selection_split, size, self.strategy)
        self.batches = training, evaluation
        arguments = {
            "x": training.dataset,
            "steps_per_epoch": training.steps,
            "validation_data": evaluation.dataset,
            "validation_steps": evaluation.steps,
        }
        return arguments, [AverageMovingStatistics()]

    def best_weights(self):
        """See `Trainer`; a worker that is not the chief has the last epoch's only."""
        return super().best_weights() if self.is_chief else self.model.get_weights()

    def finish(self):
        """Writes the results on the chief; the workers end together."""
        run = super().finish()
        # The launcher restarts each worker that ended badly, so none ends before the chief.
        find_failed(self.strategy, False)
        return run

    # Only the chief writes ---------------------------------------------------------------------

    def write_config(self):
        """Writes config.json on the chief."""
        if self.is_chief:
            super().write_config()

    def prepare_folder(self):
        """Prepares the folder on the chief."""
        self.is_begun = True
        if self.is_chief:
            super().prepare_folder()

    def checkpoint_callback(self):
        """Returns the callback that saves epochs on the chief; another worker counts them."""
        if self.is_chief:
            return super().checkpoint_callback()
        return callbacks.History(self.history)

    def write_results(self, final):
        """Writes model and report on the chief."""
        return super().write_results(final) if self.is_chief else None

    def save_interrupted(self):
        """Saves the weights on the chief."""
        return super().save_interrupted() if self.is_chief else ""

    # Errors ------------------------------------------------------------------------------------

    @property
    def resume_command(self):
        """The command that goes on with the run."""
        return super().resume_command + (", on every worker" if self.decision.cluster else "")

    def translate(self, error):
        """Returns a `WorkerLost` where TensorFlow's error says that another worker is gone."""
        lost = _find_lost_worker(self.decision.cluster, error)
        if lost is None or any(each.failure for each in self.batches):
            return super().translate(error)
        if not self.is_begun:
            return WorkerLost(f"{lost} is gone; the run had not begun")
        if self.received:
            return Interrupted(
                f"interrupted, {lost} is gone; {self.finished}: {self.resume_command}"
            )
        return WorkerLost(
            f"{lost} is gone, or cannot be reached; {self.finished}. Resume: {self.resume_command}"
        )


def _find_lost_worker(cluster, error):
    """Returns the name of the worker that an error of TensorFlow is about; None for none."""
    if cluster is None or cluster.size == 1:
        return None
    text = f"{type(error).__name__} {error}"
    if not re.search("UnavailableError|AbortedError|CancelledError|Collective ops is abort", text):
        return None
    # Each worker that hands the error on adds its name: the last one is the origin.
    tasks = [int(task) for task in re.findall(r"/task:(\d+)", text)]
    others = [task for task in tasks if task != cluster.index and task < cluster.size]
    return cluster.name(others[-1]) if others else "another worker"
