"""Exported files side by side with Keras and with the textbook's PyTorch, measured in one run."""

from keras_resnet.evaluation.benchmark.results import format_benchmark, plot_benchmark
from keras_resnet.evaluation.benchmark.run import benchmark

__all__ = ["benchmark", "format_benchmark", "plot_benchmark"]
