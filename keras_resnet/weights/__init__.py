"""Weights of PyTorch and of keras.applications, published ones by name, and back again."""

from keras_resnet.weights.conversion import convert
from keras_resnet.weights.layouts import LAYOUTS, Checkpoint, detect_layout, inspect_tensors
from keras_resnet.weights.pretrained import from_pretrained
from keras_resnet.weights.published import published_networks
from keras_resnet.weights.sources import read_tensors
from keras_resnet.weights.transfer import (
    Transfer,
    adapt_channels,
    load_keras_applications_weights,
    load_tensors,
    load_torch_weights,
    save_torch_weights,
    torch_state_dict,
)

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "Transfer",
    "adapt_channels",
    "convert",
    "detect_layout",
    "from_pretrained",
    "inspect_tensors",
    "load_keras_applications_weights",
    "load_tensors",
    "load_torch_weights",
    "published_networks",
    "read_tensors",
    "save_torch_weights",
    "torch_state_dict",
]
