"""Benchmark of exported files, beside Keras and the d2l network in PyTorch."""

from keras_resnet.evaluation.benchmark.results import format_benchmark, plot_benchmark
from keras_resnet.evaluation.benchmark.run import benchmark

__all__ = ["benchmark", "format_benchmark", "plot_benchmark"]
