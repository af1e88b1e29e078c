"""`keras-resnet benchmark`: speed and size of exported files, of Keras and of PyTorch, in one run.

The programs behind the numbers of the README are in `benchmarks/`, at the top of the repository.
"""

from keras_resnet.evaluation.benchmark.results import format_benchmark, plot_benchmark
from keras_resnet.evaluation.benchmark.run import benchmark

__all__ = ["benchmark", "format_benchmark", "plot_benchmark"]
