"""One small network of every kind, with weights and statistics as training leaves them."""

import dataclasses

import numpy as np
import pytest

from keras_resnet import SPECS, build_resnet, with_preprocessing

KINDS = (
    "resnet18",
    "resnet50",
    "resnet18d",
    "resnet50d",
    "seresnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
)
# Slow: the other kinds have all of their layers.
REPEATED = ("resnet18", "resnet50", "wide_resnet50_2")
SOME_SLOW = [
    pytest.param(kind, marks=pytest.mark.slow if kind in REPEATED else ()) for kind in KINDS
]
VARIANTS = ("d2l", "torchvision", "v1", "cifar", "plain", "v2", "keras_v1", "keras_v2")
SMALL = {"blocks": (1, 2), "filters": (16, 32)}


def build(kind, variant="torchvision", channels=1, stem=None):
    """Returns a network of a kind, cut to two stages: raw images of 28 pixels to ten logits."""
    spec = dataclasses.replace(SPECS[kind], **SMALL)
    network = build_resnet(spec, (32, 32, channels), 10, variant=variant, stem=stem)
    random = np.random.default_rng(0)
    for weight in network.weights:
        if weight.path.endswith(("gamma", "moving_variance")):
            weight.assign(random.uniform(0.5, 1.5, weight.shape))
        elif weight.path.endswith(("beta", "moving_mean", "bias")):
            weight.assign(random.normal(0, 0.1, weight.shape))
    # Logits far enough apart for probabilities to show a difference.
    head = network.layers[-1]
    head.kernel.assign(4 * head.kernel)
    return with_preprocessing(network, (28, 28, channels))


def noise(channels=1, count=7):
    random = np.random.default_rng(count)
    return random.integers(0, 256, (count, 28, 28, channels), dtype="uint8")
