"""One network trained on many replicas, with `tf.distribute`.

`strategies` chooses, `cluster` says who the workers are, `rendezvous` lets them meet, `launcher`
starts those of one machine, `replicas` deals out data and sums up, and `keras_patch` closes
Keras 3's gaps under several workers.
"""

import importlib

# name -> module. The launcher's process imports this package, and must not bring TensorFlow in.
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
