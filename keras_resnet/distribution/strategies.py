"""The choice and the start of a `tf.distribute` strategy."""

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

from keras_resnet.config import WORKER_TIMEOUT
from keras_resnet.distribution import rendezvous
from keras_resnet.distribution.cluster import Cluster, find_cluster
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.progress import suppress_stderr

STRATEGIES = ("auto", "none", "mirrored", "multiworker")


@dataclasses.dataclass(frozen=True)
class Decision:
    """The strategy that a process will train under.

    Attributes:
        name: "none", "mirrored" or "multiworker".
        reason: The reason for the choice, in a few words.
        cluster: The `Cluster` of "multiworker", else None.
    """

    name: str
    reason: str
    cluster: Cluster | None = None

    @property
    def is_chief(self):
        """Whether this process writes files: the only process, or the chief of several."""
        return self.cluster is None or self.cluster.is_chief

    @property
    def num_replicas(self):
        """The number of replicas that there will be."""
        if self.name == "none":
            return 1
        if self.cluster:
            # Without GPUs a worker has one replica, even if it has several logical processors.
            return self.cluster.size * max(1, _count_gpus())
        return len(_devices())

    def __str__(self):
        replicas = "1 replica" if self.num_replicas == 1 else f"{self.num_replicas} replicas"
        return f"strategy: {self.name} ({self.reason}), {replicas}"


def _devices():
    """Returns the GPUs, else the (logical) processors, without initialising TensorFlow."""
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        return gpus
    processors = tf.config.list_physical_devices("CPU")
    return tf.config.get_logical_device_configuration(processors[0]) or processors


def _count_gpus():
    import tensorflow as tf

    return len(tf.config.list_physical_devices("GPU"))


def decide(name="auto"):
    """Decides which strategy to train under, without starting anything.

    Args:
        name: One of `STRATEGIES`. "auto" is "multiworker" where `TF_CONFIG` names several workers,
            "mirrored" where there are several GPUs, and "none" otherwise.

    Returns:
        A `Decision`.

    Raises:
        InputError: If there is no such strategy, `TF_CONFIG` is wrong, or Keras runs on a backend
            other than TensorFlow, which tf.distribute does not support.
    """
    if name not in STRATEGIES:
        raise InputError(f"`strategy` must be one of {', '.join(STRATEGIES)}, got {name!r}")
    backend = keras.backend.backend()
    cluster = find_cluster() if name in ("auto", "multiworker") else None
    if cluster:
        reason = f"TF_CONFIG, {cluster.name(cluster.index)}"
        decision = Decision("multiworker", reason, cluster)
    elif name == "multiworker":
        raise InputError(
            "the strategy multiworker needs TF_CONFIG, got none; on one machine "
            "`keras-resnet launch -n N -- train …` makes it"
        )
    elif name != "auto":
        decision = Decision(name, "as given")
    elif backend != "tensorflow":
        decision = Decision("none", f"tf.distribute is not for the {backend} backend")
    elif (gpus := _count_gpus()) > 1:
        decision = Decision("mirrored", f"{gpus} GPUs")
    else:
        decision = Decision("none", f"{gpus or 'no'} GPU, one process")
    if decision.name != "none" and backend != "tensorflow":
        raise InputError(
            f"the strategy {decision.name} ({decision.reason}) needs KERAS_BACKEND tensorflow, "
            f"got {backend}"
        )
    return decision


def start(decision):
    """Starts a strategy.

    "multiworker" starts TensorFlow's server, and blocks until all workers have done so.

    Args:
        decision: The result of `decide`.

    Returns:
        A `tf.distribute.Strategy`; None for "none" on a backend other than TensorFlow.

    Raises:
        InputError: If TensorFlow was used before, its server cannot start, or the workers have
            different numbers of GPUs.
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
            f"{decision}: every worker needs the same number of GPUs, got "
            f"{strategy.num_replicas_in_sync} replicas in TensorFlow"
        )
    return strategy


@functools.cache
def _start_mirrored():
    # Only one in a process: the collective operations of a second would use the same keys.
    import tensorflow as tf

    return tf.distribute.MirroredStrategy()


@functools.cache
def _start_multiworker(cluster):
    import tensorflow as tf
    from tensorflow.python.distribute import collective_all_reduce_strategy

    from keras_resnet.distribution import keras_patch

    # TensorFlow checks each peer three times, 10 s each, and again after this many seconds. With
    # its default, 30, a machine that has vanished is found after up to 65 s.
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
    """Hides ignored exceptions of thread pools, which Python may print when a worker is lost.

    TensorFlow 2.21 does not close the pool of a failed all-reduce. The pool's `__del__` writes to
    a pipe that may be closed by then, and Python prints the exception.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        if unraisable.object is not multiprocessing.pool.Pool.__del__:
            before(unraisable)

    sys.unraisablehook = hook


def check_first():
    """Raises an `InputError` if this process has started a multi-worker strategy already."""
    if _start_multiworker.cache_info().currsize:
        raise InputError(
            "a process can train under multiworker once, because TensorFlow's server keeps its "
            "port: start another process for another run"
        )


def describe_worker():
    """Returns the versions and the number of GPUs, which must be equal on all workers."""
    import tensorflow as tf

    from keras_resnet import __version__

    found = {"keras": keras.__version__, "tensorflow": tf.__version__, "GPUs": _count_gpus()}
    return {**found, "keras-resnet": __version__}


def choose_strategy(name="auto", *, timeout=WORKER_TIMEOUT, say=print):
    """Chooses and starts the `tf.distribute` strategy for your own script.

    Call it before you use TensorFlow in any other way. Under "multiworker" it waits until all
    workers have come, and patches Keras's `fit`, which fails there otherwise.

    Args:
        name: "auto" (the default), "none", "mirrored" or "multiworker"; see `decide`.
        timeout: How long to wait for the other workers, in seconds.
        say: A function that is called with one line about the choice; None for no line.

    Returns:
        A `tf.distribute.Strategy`: build and compile the model in its `scope()`. "none" is
        TensorFlow's default strategy.

    Raises:
        InputError: If there is no such strategy, `TF_CONFIG` is wrong, or a worker does not come
            or has other versions.
        WorkerLost: If a worker disconnects before all are connected.

    Example:
        >>> from keras_resnet import build_resnet18
        >>> strategy = choose_strategy("none")
        strategy: none (as given), 1 replica
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
        with rendezvous.meet(decision.cluster, describe_worker(), timeout) as meeting:
            meeting.share(str)  # no worker continues before all are connected
    strategy = start(decision)
    if say:
        say(str(decision))
    return strategy


def is_chief(strategy):
    """Returns whether this process is the chief, which writes files.

    Args:
        strategy: The result of `choose_strategy`.

    Example:
        >>> is_chief(choose_strategy("none", say=None))
        True
    """
    resolver = strategy.cluster_resolver
    return resolver is None or not resolver.task_type or resolver.task_id == 0


def local_output_path(path, strategy):
    """Returns the path that this process's callbacks may write to: `path` itself on the chief.

    `ModelCheckpoint`, `BackupAndRestore` and `TensorBoard` write on every worker, and workers that
    write to the same place destroy each other's files. The other workers get a temporary folder,
    which is removed when they end.

    Args:
        path: The path for the chief.
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
