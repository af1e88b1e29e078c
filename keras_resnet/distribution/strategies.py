"""Which `tf.distribute` strategy a process trains under."""

import dataclasses
import functools
import json
import multiprocessing.pool
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path

import keras

from keras_resnet.distribution import rendezvous
from keras_resnet.distribution.cluster import Cluster, find_cluster
from keras_resnet.utils.errors import InputError, look_up, one_line
from keras_resnet.utils.progress import suppress_stderr

TIMEOUT = 300.0
"""Seconds that a worker waits for the others to come."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What a process will train under.

    Attributes:
        name: "none", "mirrored" or "multiworker".
        reason: Why, in a few words.
        cluster: The `Cluster` of "multiworker", else None.
    """

    name: str
    reason: str
    cluster: Cluster | None = None

    @property
    def is_chief(self):
        """Whether this process writes files; one that is alone does."""
        return self.cluster is None or self.cluster.is_chief

    @property
    def num_replicas(self):
        """How many replicas there will be."""
        if self.name == "none":
            return 1
        if self.cluster:
            # Of processors a worker takes one, also where there are several logical ones.
            return self.cluster.size * max(1, _count_gpus())
        return len(_devices())

    def __str__(self):
        replicas = "1 replica" if self.num_replicas == 1 else f"{self.num_replicas} replicas"
        return f"strategy: {self.name} ({self.reason}), {replicas}"


def _devices():
    """Returns this process's GPUs, else its (logical) processors; TensorFlow stays as it is."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return gpus
    processors = tf.config.list_physical_devices("CPU")
    return tf.config.get_logical_device_configuration(processors[0]) or processors


def _count_gpus():
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))


def _alone(name, cluster):
    return Decision(name, "asked for")


def _multiworker(name, cluster):
    if cluster is None:
        raise InputError(
            "the strategy multiworker needs TF_CONFIG, or a Slurm step of several tasks (srun), "
            "got neither; on one machine --local-workers N makes it"
        )
    return Decision("multiworker", f"{cluster.source}, {cluster.name(cluster.index)}", cluster)


def _auto(name, cluster):
    if cluster is not None:
        return _multiworker(name, cluster)
    if keras.backend.backend() != "tensorflow":
        return Decision("none", f"tf.distribute is not for the {keras.backend.backend()} backend")
    gpus = _count_gpus()
    if gpus > 1:
        return Decision("mirrored", f"{gpus} GPUs")
    return Decision("none", f"{gpus or 'no'} GPU, one process")


# name -> function of the name and the cluster found, that returns a `Decision`.
STRATEGIES = {"auto": _auto, "none": _alone, "mirrored": _alone, "multiworker": _multiworker}


def decide(name="auto"):
    """Decides which strategy to train under, without starting anything.

    Args:
        name: A row of `STRATEGIES`. "auto" is "multiworker" where TF_CONFIG or Slurm's variables
            name several workers, "mirrored" where there is more than one GPU, else "none".

    Returns:
        A `Decision`.

    Raises:
        InputError: If there is no such row, TF_CONFIG is wrong, or Keras runs on a backend that
            tf.distribute is not for.
    """
    choose = look_up(STRATEGIES, name, "strategy")
    decision = choose(name, find_cluster() if name in ("auto", "multiworker") else None)
    if decision.name != "none" and keras.backend.backend() != "tensorflow":
        raise InputError(
            f"the strategy {decision.name} ({decision.reason}) needs KERAS_BACKEND tensorflow, "
            f"got {keras.backend.backend()}"
        )
    return decision


def start(decision):
    """Returns the strategy that was decided on.

    Of "multiworker" it starts TensorFlow's server, and needs all workers to do so.

    Args:
        decision: What `decide` returned.

    Returns:
        A `tf.distribute.Strategy`; None for "none" on another backend than TensorFlow.

    Raises:
        InputError: If TensorFlow was used before, or its server cannot start.
    """
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    makers = {
        "none": tf.distribute.get_strategy,
        "mirrored": _start_mirrored,
        "multiworker": lambda: _start_multiworker(decision.cluster),
    }
    strategy = makers[decision.name]()
    if strategy.num_replicas_in_sync != decision.num_replicas:
        raise InputError(
            f"{decision}: TensorFlow has {strategy.num_replicas_in_sync} replicas; every worker "
            "needs as many GPUs as the others"
        )
    return strategy


@functools.cache
def _start_mirrored():
    # One for all runs of a process: a second one takes the first one's keys for its messages.
    import tensorflow as tf

    return tf.distribute.MirroredStrategy()


@functools.cache
def _start_multiworker(cluster):
    import tensorflow as tf
    from tensorflow.python.distribute import collective_all_reduce_strategy

    from keras_resnet.distribution import keras_patch

    # TensorFlow asks each peer three times, 10 s each, and again after this many seconds: with its
    # own 30 a machine that has vanished is found after up to 65 s.
    collective_all_reduce_strategy.CollectiveAllReduceExtended._check_health_interval = 10
    os.environ["TF_CONFIG"] = json.dumps(cluster.tf_config)
    try:
        with suppress_stderr():
            strategy = tf.distribute.MultiWorkerMirroredStrategy()
    except (RuntimeError, tf.errors.OpError) as error:
        advice = ""
        if "program startup" in str(error):
            advice = "; choose the strategy before anything else is done with TensorFlow"
        raise InputError(
            f"{cluster.name(cluster.index)} cannot start: {one_line(error)}{advice}"
        ) from error
    keras_patch.apply()
    _hide_unclosed_pools()
    return strategy


def _hide_unclosed_pools():
    """Keeps Python from printing tracebacks of thread pools when a worker is lost.

    TensorFlow 2.21 leaves the pool of a failed all-reduce unclosed. Python's own clean-up of it
    writes to a pipe that can be closed by then, and prints that as an exception it ignores.
    """
    shown = sys.unraisablehook

    def hook(unraisable):
        if unraisable.object is not multiprocessing.pool.Pool.__del__:
            shown(unraisable)

    sys.unraisablehook = hook


def check_first():
    """Raises an `InputError` if this process has started a multi-worker strategy already."""
    if _start_multiworker.cache_info().currsize:
        raise InputError(
            "a process can meet the other workers once, for TensorFlow's server keeps its port: "
            "start another process for another run"
        )


def versions():
    """Returns what must be equal on all workers, apart from their command."""
    import tensorflow as tf

    from keras_resnet import __version__

    found = {"keras": keras.__version__, "tensorflow": tf.__version__, "GPUs": _count_gpus()}
    return {**found, "keras-resnet": __version__}


def choose_strategy(name="auto", *, timeout=TIMEOUT, say=print):
    """Chooses and starts the `tf.distribute` strategy for a script of one's own.

    Call it before anything else is done with TensorFlow. Under "multiworker" it waits until all
    workers have come, and puts Keras's `fit` right, which fails there as it is.

    Args:
        name: "auto" (the default), "none", "mirrored" or "multiworker"; see `decide`.
        timeout: Seconds to wait for the other workers.
        say: Is called with one line that says what was chosen, and why; None for no line.

    Returns:
        A `tf.distribute.Strategy`: build and compile the model in its `scope()`. "none" is
        TensorFlow's default strategy.

    Raises:
        InputError: If TF_CONFIG is wrong, a worker does not come, its versions are others, or
            there is no such strategy.
        WorkerLost: If a worker goes away again before all have come.

    Example:
        >>> from keras_resnet import build_resnet18
        >>> strategy = choose_strategy("none")
        strategy: none (asked for), 1 replica
        >>> with strategy.scope():
        ...     model = build_resnet18((28, 28, 1))
    """
    decision = decide(name)
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            f"tf.distribute needs KERAS_BACKEND tensorflow, got {keras.backend.backend()}"
        )
    if decision.cluster:
        check_first()
        with rendezvous.meet(decision.cluster, versions(), timeout) as meeting:
            meeting.share(str)  # nothing; but no one leaves before all know that all are there
    strategy = start(decision)
    if say:
        say(str(decision))
    return strategy


def is_chief(strategy):
    """Returns whether this process is the one that writes files.

    Args:
        strategy: What `choose_strategy` returned.

    Example:
        >>> is_chief(choose_strategy("none", say=None))
        True
    """
    resolver = strategy.cluster_resolver
    return resolver is None or not resolver.task_type or resolver.task_id == 0


def local_output_path(path, strategy):
    """Returns where this process may write what callbacks write: `path` itself on the chief.

    `ModelCheckpoint`, `BackupAndRestore` and `TensorBoard` write on every worker, and workers that
    write to one place destroy each other's files. The others get a temporary folder, which is
    removed when they end.

    Args:
        path: What the chief writes to.
        strategy: What `choose_strategy` returned.

    Returns:
        A `pathlib.Path`.

    Example:
        >>> str(local_output_path("runs/checkpoints", choose_strategy("none", say=None)))
        'runs/checkpoints'
    """
    path = Path(path)
    if is_chief(strategy):
        return path
    scratch = Path(tempfile.mkdtemp(prefix="keras-resnet-worker-"))
    weakref.finalize(strategy, shutil.rmtree, scratch, ignore_errors=True)
    return scratch / path.name
