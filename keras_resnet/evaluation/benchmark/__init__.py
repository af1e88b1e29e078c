"""Benchmark of an export's files, of Keras, and of PyTorch with the same weights.

Nothing is imported here: the workers, whose memory is measured, import a module of this package.
"""
