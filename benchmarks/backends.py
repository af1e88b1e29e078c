"""ResNet-18 on Keras's backend and device: error of the logits, and time of a training step.

    KERAS_BACKEND=jax python benchmarks/backends.py [--image-size 96] [--batch-size 128]

The logits are compared with those of the network of Dive into Deep Learning (d2l) in PyTorch, in
float64 on the CPU, once with the backend's default precision and once in full float32: on a GPU,
JAX and PyTorch compute float32 convolutions in TensorFloat-32 by default.
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
    """Returns max|ours − theirs| / max|theirs| in the default precision, and in full float32."""
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

    default = difference()
    if keras.backend.backend() == "jax":
        import jax

        with jax.default_matmul_precision("highest"):
            return default, difference()
    if keras.backend.backend() == "torch":
        with torch.backends.cudnn.flags(allow_tf32=False):
            return default, difference()
    return default, default


def step_seconds(image_size, batch_size, precision, steps=20):
    """Returns the median seconds of a training step on arrays of images and labels."""
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
    """Measures and prints a line for each result."""
    parser = argparse.ArgumentParser(description="Speed and accuracy of logits on a Keras backend.")
    parser.add_argument("--image-size", type=int, default=96, help="pixels (default: 96)")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    arguments = parser.parse_args()
    print(f"keras {keras.__version__} on {keras.backend.backend()}")
    default, full = logits_differences(arguments.image_size)
    print(f"error of the logits: {default:.1e}, in full float32 {full:.1e}")
    for precision in POLICIES:
        seconds = step_seconds(arguments.image_size, arguments.batch_size, precision)
        print(
            f"training step, {precision}: {seconds * 1e3:.1f} ms, "
            f"{arguments.batch_size / seconds:,.0f} images/s"
        )


if __name__ == "__main__":
    main()
