"""Residual networks in Keras 3: build, train, export with verification.

Importing this package does not import Keras. The layers are registered with Keras as soon as both
packages have been imported, in either order; `keras.models.load_model` finds them then.
"""

import importlib
import sys

__version__ = "0.1.0"

PACKAGE = "keras_resnet"
"""The name under which Keras registers the layers: a part of each .keras file."""

# Public name -> module. A module is imported when one of its names is first used.
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
    "from_pretrained": "weights",
    "load_keras_applications_weights": "weights",
    "load_torch_weights": "weights",
    "published_networks": "weights",
    "save_torch_weights": "weights",
    "Dataset": "datasets",
    "Split": "datasets",
    "load_dataset": "datasets",
    "Evaluation": "evaluation.metrics",
    "evaluate": "evaluation.metrics",
    "grad_cam": "evaluation.grad_cam",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "Run": "training.trainer",
    "train": "training.trainer",
    "Predictor": "evaluation.inference",
    "load": "evaluation.inference",
    "export": "exporters.exporter",
    "export_web": "exporters.web",
    "verify": "exporters.verify_folder",
    "benchmark": "evaluation.benchmark.run",
    "InputError": "utils.errors",
    "TrainingError": "utils.errors",
    "ExportError": "utils.errors",
}
# Modules used under their own name, as in `keras_resnet.weights.load_torch_weights`.
_MODULES = ("distribution", "weights")
__all__ = ["__version__", *_EXPORTS]


def __getattr__(name):
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value  # the next access does not call `__getattr__`
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})


def _register_layers():
    """Registers the layers with Keras, by importing the modules that define them."""
    for module in ("blocks", "preprocessing"):
        importlib.import_module(f"{__name__}.{module}")


class _KerasFinder:
    """An entry of `sys.meta_path` that registers the layers right after Keras is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != "keras":
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        finds = (getattr(finder, "find_spec", None) for finder in others)
        spec = next(filter(None, (find(name, path, target) for find in finds if find)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if module.__name__ == name:  # a ZIP archive has one loader for all its modules
                    _register_layers()

            spec.loader.exec_module = exec_module
        return spec


if sys.modules.get("keras"):
    _register_layers()
elif not any(type(finder).__name__ == _KerasFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _KerasFinder())
