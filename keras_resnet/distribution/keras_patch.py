"""A patch that makes Keras 3's `fit` work under `MultiWorkerMirroredStrategy`.

It fixes Keras's issue 20585, open since 3.0, in three functions of the TensorFlow trainer, in a
form that could be sent upstream. `choose_strategy` calls `apply` when it starts a multi-worker
strategy. Under any other strategy the functions call Keras's own. The import of this module changes
nothing.
"""

import contextlib
import functools
import warnings

import keras
import tensorflow as tf
from keras import tree

TESTED_VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14", "3.15")
"""The minor releases of Keras with which the tests of multi-worker training pass."""


def apply():
    """Patches Keras's TensorFlow trainer, once in a process.

    With a release of Keras that is not in `TESTED_VERSIONS`, it warns and changes nothing.
    """
    from keras.src.backend.tensorflow import trainer

    if not keras.__version__.startswith(tuple(f"{minor}." for minor in TESTED_VERSIONS)):
        warnings.warn(
            f"multi-worker training was tested with Keras {TESTED_VERSIONS[0]} to "
            f"{TESTED_VERSIONS[-1]}, this is {keras.__version__}: its own `fit` is used",
            stacklevel=2,
        )
        return
    if getattr(trainer.reduce_per_replica, "multi_worker", False):
        return
    cls = trainer.TensorFlowTrainer
    trainer.reduce_per_replica = _fix_reduce_per_replica(trainer.reduce_per_replica)
    cls._maybe_symbolic_build = _fix_symbolic_build(cls._maybe_symbolic_build)
    cls._make_function = _fix_make_function(cls._make_function)


def is_multi_worker(strategy):
    """Returns whether a strategy has several processes."""
    return (
        isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
        and strategy.extended._in_multi_worker_mode()
    )


def _fix_reduce_per_replica(keras_own):
    @functools.wraps(keras_own)
    def reduce_per_replica(values, strategy, reduction):
        method = {"auto": "MEAN", "mean": "MEAN", "sum": "SUM"}.get(reduction)
        if method is None or not is_multi_worker(strategy):
            return keras_own(values, strategy, reduction)
        # Keras passes axis=0, the examples of a batch; the result of a metric has no such axis.
        return tree.map_structure(lambda v: strategy.reduce(method, v, axis=None), values)

    reduce_per_replica.multi_worker = True
    return reduce_per_replica


def _fix_symbolic_build(keras_own):
    @functools.wraps(keras_own)
    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        strategy = self._distribute_strategy
        if iterator is None or not is_multi_worker(strategy):
            return keras_own(self, iterator=iterator, data_batch=data_batch)
        check_compiled(self)
        *_, batches = next(iter(iterator))
        # Keras averages the batch over all workers, which fails eagerly. Only shapes and dtypes are
        # needed, so the batch of this worker's first replica is enough.
        data_batch = tree.map_structure(
            lambda v: strategy.experimental_local_results(v)[0], next(batches)
        )
        return keras_own(self, data_batch=data_batch)

    return _maybe_symbolic_build


def _fix_make_function(keras_own):
    @functools.wraps(keras_own)
    def _make_function(self, step_function):
        keras_function = keras_own(self, step_function)
        steps = self.steps_per_execution
        if steps == 1 or not is_multi_worker(self._distribute_strategy):
            return keras_function

        # Keras's loop in the graph cannot hold collective operations. A loop in Python also calls
        # the callbacks once for all of its steps, but is no faster than single steps.
        def function(iterator):
            self.steps_per_execution = 1  # Keras reads it when it traces
            try:
                logs = keras_function(iterator)
                with contextlib.suppress(StopIteration, tf.errors.OutOfRangeError):
                    for _ in range(steps - 1):
                        logs = keras_function(iterator)
            finally:
                self.steps_per_execution = steps
            return logs

        return function

    return _make_function


def check_compiled(model):
    """Raises an error if a model was compiled with options that its strategy does not support.

    Under a multi-worker strategy of `choose_strategy`, `fit` and `evaluate` call it.

    Args:
        model: A compiled Keras model.

    Raises:
        ValueError: If there are several replicas and the model was compiled with
            `jit_compile=True`, since XLA compiles for one device; or if there are several replicas
            in one process and `steps_per_execution` is above 1.
    """
    strategy = model.distribute_strategy
    if strategy.num_replicas_in_sync == 1:
        return
    name, replicas = type(strategy).__name__, strategy.num_replicas_in_sync
    if model.jit_compile is True:
        raise ValueError(
            f"`jit_compile` must be False or 'auto' under {name} of {replicas} replicas: XLA "
            "compiles for one device at a time, got True"
        )
    if model.steps_per_execution > 1 and not is_multi_worker(strategy):
        raise ValueError(
            f"`steps_per_execution` must be 1 under {name}: Keras {keras.__version__} cannot run "
            f"the replicas of several steps in one graph, got {model.steps_per_execution}"
        )
