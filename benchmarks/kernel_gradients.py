"""The gradient of a convolution's kernel: matrix products beside TensorFlow's operator.

    python benchmarks/kernel_gradients.py [--dtype bfloat16] [--rounds 7]

For the convolutions of ResNet-18 at 28 and 96 pixels and of ResNet-50 at 224: the medians of both
ways in milliseconds, in turns, and their ratio. "used" is the choice of `convolution.py`.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf

from keras_resnet import convolution

# (batch, size of the map, channels, filters, kernel size, strides)
CASES = (
    (256, 7, 64, 64, 3, 1),
    (256, 7, 64, 128, 3, 2),
    (256, 4, 128, 128, 3, 1),
    (256, 4, 128, 256, 3, 2),
    (256, 2, 256, 256, 3, 1),
    (256, 2, 256, 512, 3, 2),
    (256, 2, 256, 512, 1, 2),
    (256, 1, 512, 512, 1, 1),
    (128, 24, 64, 64, 3, 1),
    (128, 24, 64, 128, 3, 2),
    (128, 12, 128, 128, 3, 1),
    (128, 12, 128, 256, 3, 2),
    (128, 6, 256, 256, 3, 1),
    (128, 6, 256, 512, 3, 2),
    (128, 3, 512, 512, 3, 1),
    (32, 56, 256, 512, 1, 2),
    (32, 28, 128, 128, 3, 1),
    (32, 28, 128, 512, 1, 1),
    (32, 28, 256, 256, 3, 2),
    (32, 28, 512, 1024, 1, 2),
    (32, 14, 256, 256, 3, 1),
    (32, 14, 256, 1024, 1, 1),
    (32, 14, 1024, 256, 1, 1),
    (32, 14, 512, 512, 3, 2),
    (32, 14, 1024, 2048, 1, 2),
    (32, 7, 512, 512, 3, 1),
    (32, 7, 512, 2048, 1, 1),
    (32, 7, 2048, 512, 1, 1),
)


def measure(case, dtype, rounds):
    """Prints the line of a case."""
    batch, size, channels, filters, kernel_size, strides = case
    new = -(-size // strides)
    border = kernel_size // 2
    shape = (batch, size + 2 * border, size + 2 * border, channels)
    inputs, upstream = (
        tf.cast(tf.random.normal(shape), dtype) for shape in (shape, (batch, new, new, filters))
    )
    kernel_shape = (kernel_size, kernel_size, channels, filters)
    kernel = tf.zeros(kernel_shape, dtype)

    @tf.function
    def products():
        return convolution.kernel_gradient(
            inputs, upstream, kernel_shape, (strides, strides), "valid"
        )

    @tf.function
    def operator():
        return tf.raw_ops.Conv2DBackpropFilter(
            input=inputs,
            filter_sizes=kernel_shape,
            out_backprop=upstream,
            strides=(1, strides, strides, 1),
            padding="VALID",
        )

    taken = {operator: [], products: []}
    for way in taken:
        way()
    for _ in range(rounds):
        for way, seconds in taken.items():
            start = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - start)
    slow, fast = (1e3 * statistics.median(seconds) for seconds in taken.values())
    ratio = statistics.median(a / b for a, b in zip(*taken.values(), strict=True))
    is_used = convolution.uses_products(inputs, kernel, (strides, strides), "valid")
    print(
        f"{batch:4} × {size:2}² × {channels:4} → {filters:4}, {kernel_size}×{kernel_size}/{strides}"
        f"  operator {slow:5.1f} ms  products {fast:5.1f} ms  ratio {ratio:4.1f}"
        f"{'  used' if is_used else ''}",
        flush=True,
    )


def main():
    """Measures each case."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for case in CASES:
        measure(case, args.dtype, args.rounds)


if __name__ == "__main__":
    main()
