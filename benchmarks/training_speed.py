"""Training speed beside the network of Dive into Deep Learning (d2l) in PyTorch, in turns.

    python benchmarks/training_speed.py [--image-size 96] [--batch-size 128] [--rounds 5]

The machine's speed drifts, so the two take turns (A B A B …), and the ratio is the median of the
ratios within the rounds. Both train ResNet-18 on random images with Adam: ours with Keras's
compiled step on TensorFlow, PyTorch eagerly in the channels-last memory format.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import keras
import numpy as np
import torch
from torch_reference import ResNet18

from keras_resnet.models import build_resnet18
from keras_resnet.training.precision import POLICIES

TORCH_TYPES = {"float32": None, "bfloat16": torch.bfloat16}


def keras_step(images, labels, precision):
    """Returns a function that makes one training step of our network."""
    keras.config.set_dtype_policy(POLICIES[precision])
    model = build_resnet18(images.shape[1:])
    keras.config.set_dtype_policy("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    return lambda: model.train_on_batch(images, labels)


def torch_step(images, labels, precision):
    """Returns a function that makes one training step of the d2l network in PyTorch."""
    model = ResNet18().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2)).to(memory_format=torch.channels_last)
    y = torch.from_numpy(labels)
    dtype = TORCH_TYPES[precision]

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            logits = model(x)
        torch.nn.functional.cross_entropy(logits.float(), y).backward()
        optimizer.step()

    return step


def seconds(step, steps):
    """Returns how long `steps` calls of `step` take."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return time.perf_counter() - start


def main():
    """Measures and prints one row for each precision."""
    parser = argparse.ArgumentParser(description="Training speed beside PyTorch, in turns.")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    args = parser.parse_args()
    random = np.random.default_rng(0)
    shape = (args.batch_size, args.image_size, args.image_size, 1)
    images = random.random(shape, dtype="float32")
    labels = random.integers(0, 10, args.batch_size)
    print(f"ResNet-18, {args.image_size} px, batch {args.batch_size}, {os.cpu_count()} cores")
    for precision in TORCH_TYPES:
        ours, theirs = (make(images, labels, precision) for make in (keras_step, torch_step))
        for step in (ours, theirs):
            seconds(step, 2)  # compiles, allocates
        pairs = [
            (seconds(ours, args.steps), seconds(theirs, args.steps)) for _ in range(args.rounds)
        ]
        done = args.steps * args.batch_size
        speeds = [statistics.median(done / pair[side] for pair in pairs) for side in (0, 1)]
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        print(
            f"{precision:9} keras_resnet {speeds[0]:4.0f} images/s  PyTorch {speeds[1]:4.0f} "
            f"images/s  ratio {ratio:.2f}"
        )


if __name__ == "__main__":
    main()
