"""The time of an optimizer's update of a network's weights, beside Keras's own.

    python benchmarks/optimizers.py [--model resnet18] [--rounds 15]

Medians in milliseconds, in turns; the gradients are random numbers.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import tensorflow as tf

from keras_resnet import build_resnet
from keras_resnet.training import optimizers

CONTENDERS = {
    "Adam": optimizers.Adam,
    "Keras's Adam": keras.optimizers.Adam,
    "AdamW": optimizers.AdamW,
    "Keras's AdamW": keras.optimizers.AdamW,
}


def make_step(optimizer, model):
    """Returns a function that updates the weights of a network of its own."""
    variables = build_resnet(model, (32, 32, 1)).trainable_variables
    gradients = [tf.random.normal(variable.shape) for variable in variables]
    optimizer.build(variables)

    @tf.function
    def step():
        optimizer.apply(gradients, variables)

    return step


def main():
    """Measures each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    steps = {name: make_step(row(1e-3), args.model) for name, row in CONTENDERS.items()}
    taken = {name: [] for name in steps}
    for number in range(args.rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if number >= 2:
                taken[name].append(time.perf_counter() - start)
    for name, seconds in taken.items():
        print(f"{name:14} {1e3 * statistics.median(seconds):6.1f} ms")


if __name__ == "__main__":
    main()
