"""Residual networks in Keras 3, from the block of Dive into Deep Learning (d2l) to a phone."""

import importlib
import sys
from pathlib import Path

__version__ = "0.1.0"

# name -> module. A module is imported when one of its names is first used.
_EXPORTS = {
    "BottleneckBlock": "blocks",
    "DenseResidualBlock": "blocks",
    "PreActBottleneckBlock": "blocks",
    "PreActResidualBlock": "blocks",
    "ResidualBlock": "blocks",
    "SPECS": "models",
    "Spec": "models",
    "build_dense_resnet": "models",
    "build_resnet": "models",
    "build_resnet18": "models",
    "build_resnet34": "models",
    "build_resnet50": "models",
    "build_resnet101": "models",
    "build_resnet152": "models",
    "count_parameters": "models",
    "residual_stage": "models",
    "summarize_shapes": "models",
    "Augmentation": "preprocessing",
    "ImagePreprocessing": "preprocessing",
    "with_preprocessing": "preprocessing",
    "adapt_channels": "weights",
    "load_keras_applications_weights": "weights",
    "load_torch_weights": "weights",
    "save_torch_weights": "weights",
    "Dataset": "datasets",
    "Split": "datasets",
    "load_dataset": "datasets",
    "Evaluation": "evaluation.metrics",
    "evaluate": "evaluation.metrics",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "Run": "training.trainer",
    "train": "training.trainer",
    "Predictor": "evaluation.inference",
    "load": "evaluation.inference",
    "export": "exporters.exporter",
    "verify": "exporters.verify_folder",
    "benchmark": "evaluation.benchmark",
    "InputError": "utils.errors",
    "TrainingError": "utils.errors",
    "ExportError": "utils.errors",
}
# Modules that are used under their own name, as in `keras_resnet.weights.load_torch_weights`.
_MODULES = ("distribution", "weights")
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})


# `keras.models.load_model` finds our layers once they are registered, so they are imported here.
# The console script does without: Keras takes seconds, and `keras-resnet --help` needs none of it.
if Path(sys.argv[0] if sys.argv else "").name not in ("keras-resnet", "keras-resnet.exe"):
    from keras_resnet import preprocessing  # noqa: F401  (imports blocks, too)
