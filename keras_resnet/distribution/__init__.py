"""Training of one network on many replicas, with `tf.distribute`.

`strategies` chooses the strategy, `cluster` reads `TF_CONFIG`, `rendezvous` connects the workers
before TensorFlow's server starts, `launch` starts the workers of one machine, `replicas` has the
shards, the loss and the collective operations, and `keras_patch` makes Keras 3's `fit` work under
several workers.
"""

import importlib

# name -> module. `launch` imports this package, and must not import TensorFlow.
_EXPORTS = {
    "STRATEGIES": "strategies",
    "choose_strategy": "strategies",
    "is_chief": "strategies",
    "local_output_path": "strategies",
    "check_compiled": "keras_patch",
    "AverageMovingStatistics": "replicas",
    "Shards": "replicas",
    "choose_loss": "replicas",
    "synchronize_batchnorm": "replicas",
}
__all__ = list(_EXPORTS)


def __getattr__(name):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
