"""The networks of Dive into Deep Learning (d2l) in PyTorch, and their weights in our models.

Module names are ours where d2l gives none (it numbers a Sequential), so that the map
between the two networks is a table of six words.
"""

import numpy as np
import torch
from torch import nn

# Keras's word -> PyTorch's, for each part of a path like "stage2_block1/shortcut_conv/kernel".
NAMES = {
    "shortcut_conv": "conv3",
    "kernel": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


class Residual(nn.Module):
    """Two 3×3 convolutions around which the input, or a 1×1 convolution of it, is added."""

    def __init__(self, in_channels, channels, use_1x1conv=False, strides=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, stride=strides)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(in_channels, channels, 1, stride=strides) if use_1x1conv else None
        self.relu2 = nn.ReLU()

    def forward(self, x):
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(branch + (x if self.conv3 is None else self.conv3(x)))


class ResNet18(nn.Sequential):
    """The ResNet-18 of d2l: images, (batch, channels, height, width), to logits."""

    def __init__(self, channels=1, num_classes=10):
        super().__init__()
        self.add_module("stem_conv", nn.Conv2d(channels, 64, 7, stride=2, padding=3))
        self.add_module("stem_bn", nn.BatchNorm2d(64))
        self.add_module("stem_relu", nn.ReLU())
        self.add_module("stem_pool", nn.MaxPool2d(3, stride=2, padding=1))
        width = 64
        for stage, filters in enumerate((64, 128, 256, 512), start=1):
            halve = stage > 1
            first = Residual(width, filters, halve, 2 if halve else 1)
            self.add_module(f"stage{stage}_block1", first)
            self.add_module(f"stage{stage}_block2", Residual(filters, filters))
            width = filters
        self.add_module("global_avg_pool", nn.AdaptiveAvgPool2d(1))
        self.add_module("flatten", nn.Flatten())
        self.add_module("logits", nn.Linear(width, num_classes))


class CifarBlock(nn.Module):
    """Two 3×3 convolutions, with a shortcut that has no parameters, or with none."""

    def __init__(self, in_channels, channels, strides, use_shortcut):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, strides, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.strides, self.added = strides, channels - in_channels
        self.use_shortcut = use_shortcut

    def forward(self, x):
        branch = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if not self.use_shortcut:
            return self.relu2(branch)
        shortcut = x[:, :, :: self.strides, :: self.strides]
        before = self.added // 2
        zeros = (0, 0, 0, 0, before, self.added - before)
        return self.relu2(branch + nn.functional.pad(shortcut, zeros))


class CifarResNet(nn.Module):
    """The networks of He et al. 2016a, section 4.2, under the names of pytorch_resnet_cifar10."""

    def __init__(self, depth, num_classes=10, channels=3, use_shortcut=True):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        width, stages = 16, []
        for stage, filters in enumerate((16, 32, 64)):
            blocks = []
            for block in range((depth - 2) // 6):
                strides = 2 if stage and not block else 1
                blocks.append(CifarBlock(width, filters, strides, use_shortcut))
                width = filters
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class DenseResidual(nn.Module):
    """The d2l block of two Linear layers, each drawn like any other."""

    def __init__(self, features):
        super().__init__()
        self.fc1 = nn.Linear(features, features)
        self.fc2 = nn.Linear(features, features)

    def forward(self, x):
        return torch.relu(self.fc2(torch.relu(self.fc1(x))) + x)


def dense_resnet(features=12, hidden=24, outputs=8, num_blocks=10):
    """Returns the dense network of d2l."""
    blocks = [DenseResidual(hidden) for _ in range(num_blocks)]
    return nn.Sequential(nn.Linear(features, hidden), *blocks, nn.Linear(hidden, outputs))


def randomize_batch_norm(net):
    """Gives every BatchNorm factors and statistics as after training: none is left at 0 or 1."""
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)


def torch_name(path):
    """Returns PyTorch's name of the Keras weight `path`."""
    return ".".join(NAMES.get(part, part) for part in path.split("/"))


def to_keras(tensor):
    """Returns a PyTorch weight, or its gradient, as an array with Keras's order of axes."""
    array = tensor.detach().cpu().numpy()
    if array.ndim == 4:  # (out, in, height, width) -> (height, width, in, out)
        return array.transpose(2, 3, 1, 0)
    return array.T  # of a Linear, (out, in) -> (in, out)


def to_nchw(images):
    """Returns channels-last images, a NumPy array, as PyTorch takes them."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def copy_weights(net, model):
    """Copies every weight and statistic of the PyTorch `net` into the Keras `model`.

    Raises `KeyError` for a weight that PyTorch lacks, and `AssertionError` for one left over.
    """
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    for variable in model.weights:
        variable.assign(to_keras(state.pop(torch_name(variable.path))))
    assert not state, f"no place in Keras for {sorted(state)}"
