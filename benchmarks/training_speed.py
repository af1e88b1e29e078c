"""Training speed of our networks beside others', in turns.

    python benchmarks/training_speed.py [--contenders ours torch …] [--model resnet18]
        [--precision bfloat16 float32] [--image-size 96] [--batch-size 128] [--rounds 5] [--steps 4]

Each contender trains on random images in a process of its own, with Adam and the crossentropy. The
machine's speed drifts, so they take turns (A B A B …): "first/it" is the speed of the first
contender over that of this one, the median of the ratios within the rounds. The other columns are
the time from the compiled model to the end of the first step, and the largest resident memory of
the process.

    ours            the compiled step of Keras on TensorFlow
    ours, fit       `model.fit` with our input pipeline and callbacks, over epochs of --steps steps
    keras layers    ours with Keras's own normalization, convolution and Adam
    applications    keras.applications' ResNet-50 (--model resnet50)
    torch           PyTorch eagerly, in the channels-last memory format
    torch, compiled the same by torch.compile (needs a C++ compiler)
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np


def make_data(args, channels=1):
    """Returns random uint8 images, channels last, and labels of ten classes."""
    random = np.random.default_rng(0)
    shape = (args.batch_size, args.image_size, args.image_size, channels)
    return random.integers(0, 256, shape, "uint8"), random.integers(0, 10, args.batch_size)


def keras_model(args, build):
    """Returns a compiled Keras model made by `build` in the precision asked for."""
    import keras

    from keras_resnet.training import optimizers
    from keras_resnet.training.precision import POLICIES

    keras.config.set_dtype_policy(POLICIES[args.precision])
    model = build()
    keras.config.set_dtype_policy("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizers.Adam(1e-3), loss)
    return model


def keras_steps(args, build, channels=1):
    """Returns a function that makes training steps of a Keras model."""
    model = keras_model(args, build)
    images, labels = make_data(args, channels)
    images = images.astype("float32") / 255

    def steps(count):
        for _ in range(count):
            model.train_on_batch(images, labels)

    return steps


def build_ours(args):
    """Returns our network, of the images' size."""
    from keras_resnet import build_resnet

    return build_resnet(args.model, (args.image_size, args.image_size, 1), variant=args.variant)


def ours(args):
    """The compiled step of our network."""
    return keras_steps(args, lambda: build_ours(args))


def ours_fit(args):
    """`fit` of raw images with our input pipeline, an epoch for each call."""
    from keras_resnet import with_preprocessing
    from keras_resnet.datasets import Split
    from keras_resnet.training.inputs import Batches, Shuffle

    size = (args.image_size, args.image_size, 1)
    model = keras_model(args, lambda: with_preprocessing(build_ours(args), size))
    images, labels = make_data(args)

    @functools.cache
    def batches_of(count):
        split = Split(np.tile(images, (count, 1, 1, 1)), np.tile(labels, count))
        return Batches(split, args.batch_size)

    def steps(count):
        batches = batches_of(count)
        model.fit(batches, verbose=0, shuffle=False, callbacks=[Shuffle(batches, 0)])

    return steps


def use_kerass_own_code():
    """Puts Keras's normalization, convolution and Adam in the place of ours."""
    import keras

    from keras_resnet import convolution, normalization
    from keras_resnet.training import optimizers

    normalization.BatchNormalization = keras.layers.BatchNormalization
    convolution.EDGE_PER_FILTER = 0
    optimizers.Adam = keras.optimizers.Adam


def keras_layers(args):
    """Our network with Keras's own code."""
    use_kerass_own_code()
    return ours(args)


def applications(args):
    """keras.applications' ResNet-50, for three channels."""
    import keras

    use_kerass_own_code()
    shape = (args.image_size, args.image_size, 3)
    options = {"weights": None, "classes": 10, "classifier_activation": None}
    return keras_steps(args, lambda: keras.applications.ResNet50(input_shape=shape, **options), 3)


def torch_model(args):
    """Returns PyTorch's network: that of d2l as ResNet-18, otherwise torchvision's."""
    import torch
    from references import import_torchvision
    from torch_reference import ResNet18

    if (args.model, args.variant) == ("resnet18", "d2l"):
        return ResNet18()
    model = import_torchvision().models.get_model(args.model, weights=None, num_classes=10)
    first = model.conv1
    model.conv1 = torch.nn.Conv2d(1, first.out_channels, 7, 2, 3, bias=False)
    return model


def torch_steps(args, compiled=False):
    """Returns a function that makes training steps in PyTorch."""
    import torch

    model = torch_model(args).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, labels = make_data(args)
    x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype("float32") / 255)
    x, y = x.to(memory_format=torch.channels_last), torch.from_numpy(labels)
    forward = torch.compile(model) if compiled else model
    half = args.precision == "bfloat16"

    def steps(count):
        for _ in range(count):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                logits = forward(x)
            torch.nn.functional.cross_entropy(logits.float(), y).backward()
            optimizer.step()

    return steps


CONTENDERS = {
    "ours": ours,
    "ours, fit": ours_fit,
    "keras layers": keras_layers,
    "applications": applications,
    "torch": torch_steps,
    "torch, compiled": lambda args: torch_steps(args, compiled=True),
}


def work(args):
    """Makes the steps that the parent process asks for; answers each time with a line of JSON."""
    steps = CONTENDERS[args.worker](args)
    print("ready", flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        steps(int(line))
        took = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": took, "peak": peak}), flush=True)


class Contender:
    """A process that trains when it is asked to."""

    def __init__(self, name, precision):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
        self.name = name
        self.process = subprocess.Popen(
            [*command, "--precision", precision],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Others that still import would slow its first step.
        self._read()

    def _read(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} failed with status {self.process.wait()}; its error is above")
        return line

    def run(self, steps):
        """Makes training steps; returns the seconds."""
        print(steps, file=self.process.stdin, flush=True)
        found = json.loads(self._read())
        self.peak = found["peak"]
        return found["seconds"]


def compare(args, precision):
    """Measures all contenders in one precision, and prints a table."""
    contenders = [Contender(name, precision) for name in args.contenders]
    first_steps = [contender.run(1) for contender in contenders]
    for contender in contenders:
        contender.run(2)
    rounds = [[each.run(args.steps) for each in contenders] for _ in range(args.rounds)]
    images = args.steps * args.batch_size
    for number, contender in enumerate(contenders):
        speed = statistics.median(images / taken[number] for taken in rounds)
        ratio = statistics.median(taken[number] / taken[0] for taken in rounds)
        print(
            f"{precision:9} {contender.name:16} {speed:6.0f} images/s  first/it {ratio:5.2f}  "
            f"first step {first_steps[number]:5.1f} s  {contender.peak / 2**30:4.1f} GiB",
            flush=True,
        )
        contender.process.stdin.close()
        contender.process.wait()


def add_options(parser):
    """Adds the options that say which training steps are made."""
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["ours", "torch"])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--variant", default="d2l", help="of our network, and of PyTorch's")
    precisions = ("bfloat16", "float32")
    parser.add_argument("--precision", nargs="+", choices=precisions, default=list(precisions))
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)


def main():
    """Compares the contenders, or is one of them."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="steps in a turn")
    args = parser.parse_args()
    if args.worker:
        (args.precision,) = args.precision
        work(args)
        return
    print(
        f"{args.model} ({args.variant}), {args.image_size} px, batch {args.batch_size}, "
        f"{platform.machine()}, {os.cpu_count()} cores, medians of {args.rounds} rounds"
    )
    for precision in args.precision:
        compare(args, precision)


if __name__ == "__main__":
    main()
