"""ResNet-18 on the backend and device that Keras has: its logits, and the time of a training step.

    KERAS_BACKEND=jax python benchmarks/backends.py [--image-size 96] [--batch-size 128]

The logits are compared with those of the d2l network in PyTorch, in float64 on the
processor, once as the backend computes by default and once in full float32: on a GPU, JAX and
PyTorch round the factors of a float32 convolution to TensorFloat-32 unless they are told not to.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import keras
import numpy as np
import torch
from torch_reference import ResNet18, copy_weights, randomize_batch_norm, to_nchw

from keras_resnet import build_resnet18
from keras_resnet.training.precision import POLICIES


def logits_differences(image_size):
    """Returns max|ours − theirs| / max|theirs| by default, and in full float32."""
    torch.manual_seed(0)
    theirs = ResNet18().eval()
    randomize_batch_norm(theirs)
    ours = build_resnet18((image_size, image_size, 1))
    copy_weights(theirs, ours)
    images = np.random.default_rng(0).uniform(size=(4, image_size, image_size, 1))
    with torch.no_grad():
        expected = theirs.double()(to_nchw(images)).numpy()

    def difference():
        found = keras.ops.convert_to_numpy(ours(images.astype("float32"), training=False))
        return np.abs(found - expected).max() / np.abs(expected).max()

    by_default = difference()
    if keras.backend.backend() == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            return by_default, difference()
    if keras.backend.backend() == "torch":
        with torch.backends.cudnn.flags(allow_tf32=False):
            return by_default, difference()
    return by_default, by_default


def step_seconds(image_size, batch_size, precision, steps=20):
    """Returns the median time of a training step, images and labels given as arrays."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (batch_size, image_size, image_size, 1)).astype("float32")
    labels = random.integers(0, 10, batch_size)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(POLICIES[precision])
    try:
        model = build_resnet18((image_size, image_size, 1))
    finally:
        keras.config.set_dtype_policy(before)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    times = []
    for _ in range(3 + steps):
        start = time.perf_counter()
        model.train_on_batch(images, labels)
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


def main():
    """Prints a line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=96, help="pixels (default: 96)")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    arguments = parser.parse_args()
    print(f"keras {keras.__version__} on {keras.backend.backend()}")
    by_default, full = logits_differences(arguments.image_size)
    print(f"logits from PyTorch's in float64: {by_default:.1e}, in full float32 {full:.1e}")
    for precision in POLICIES:
        seconds = step_seconds(arguments.image_size, arguments.batch_size, precision)
        print(
            f"training step, {precision}: {seconds * 1e3:.1f} ms, "
            f"{arguments.batch_size / seconds:,.0f} images/s"
        )


if __name__ == "__main__":
    main()
