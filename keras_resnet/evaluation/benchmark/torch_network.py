"""The residual network of Dive into Deep Learning (d2l) in PyTorch, with preprocessing.

Only a benchmark's worker imports this module, if PyTorch is installed.
"""

import numpy as np
import torch
from torch import nn


class Residual(nn.Module):
    """Two 3×3 convolutions, and a shortcut: the input, or a 1×1 convolution of it."""

    def __init__(self, in_channels, channels, strides, use_1x1conv):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, stride=strides)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(in_channels, channels, 1, stride=strides) if use_1x1conv else None

    def forward(self, x):
        """Returns the ReLU of the sum of both paths."""
        branch = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(branch + (x if self.conv3 is None else self.conv3(x)))


def build(channels, stages, num_classes):
    """Builds the network with the module names of the layout "d2l_named".

    Args:
        channels: Channels of the images.
        stages: A list of stages, each a list of blocks (filters, strides, use_1x1conv).
        num_classes: Number of logits.

    Returns:
        An `nn.Sequential`: (batch, channels, height, width) to (batch, num_classes).
    """
    width = stages[0][0][0]
    net = nn.Sequential(
        nn.Conv2d(channels, width, 7, stride=2, padding=3),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
    )
    for number, blocks in enumerate(stages, start=1):
        stage = nn.Sequential()
        for filters, strides, use_1x1conv in blocks:
            stage.append(Residual(width, filters, strides, use_1x1conv))
            width = filters
        net.add_module(f"resnet_block{number}", stage)
    net.add_module("global_avg_pool", nn.AdaptiveAvgPool2d(1))
    net.add_module("fc", nn.Sequential(nn.Flatten(), nn.Linear(width, num_classes)))
    return net


def open_bare(path, threads, **network):
    """Sets PyTorch's number of threads, then calls `load` with the other arguments."""
    torch.set_num_threads(threads)
    return load(path, **network)


def load(path, channels, stages, num_classes, image_size, mean, std, channels_last):
    """Loads a state dict into the network; no tensor may be missing or left over.

    Args:
        path: An .npz file of the state dict.
        channels: See `build`.
        stages: See `build`.
        num_classes: See `build`.
        image_size: Height and width of the network's input, in pixels; images are resized to it.
        mean: Mean to subtract from pixels in 0 … 1; a number, or one for each channel.
        std: Standard deviation to divide by; a number, or one for each channel.
        channels_last: Whether weights and images use PyTorch's channels-last memory format, which
            is faster on CPUs than its default.

    Returns:
        A function from uint8 images, (batch, height, width, channels), to probabilities, both
        NumPy arrays.
    """
    net = build(channels, stages, num_classes)
    with np.load(path, allow_pickle=False) as state:
        net.load_state_dict({n: torch.from_numpy(state[n]) for n in state.files}, strict=True)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net.eval().to(memory_format=layout)
    size = (image_size, image_size)
    mean, std = (
        torch.tensor(value, dtype=torch.float32).reshape(-1, 1, 1) for value in (mean, std)
    )

    @torch.inference_mode()
    def run(images):
        x = torch.from_numpy(images).permute(0, 3, 1, 2).float()
        if x.shape[2:] != size:
            x = nn.functional.interpolate(x, size, mode="bilinear", align_corners=False)
        x = ((x / 255 - mean) / std).contiguous(memory_format=layout)
        return net(x).softmax(dim=1).numpy()

    return run
