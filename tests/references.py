"""Other people's residual networks, beside which ours are checked.

They come from torchvision, timm, Hugging Face's transformers and keras.applications, and always
with random weights: nothing here downloads. `SOURCES` lists what is compared by default.
"""

import importlib
import re

import keras
import numpy as np
import torch
from torch import nn
from torch_reference import CifarResNet

# What torchvision's import describes to PyTorch, so that they must exist. A wheel built for CUDA
# cannot load its own on a PyTorch without CUDA. No network here calls them.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
# Keeps what defined them alive: PyTorch forgets the operators with it.
STUBS = []

DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
LAYERS = {
    "basic": {"layer_type": "basic", "hidden_sizes": (64, 128, 256, 512)},
    "bottleneck": {"layer_type": "bottleneck", "hidden_sizes": (256, 512, 1024, 2048)},
}
CONFIGS = {
    f"resnet{depth}": {"depths": blocks, **LAYERS["basic" if depth < 50 else "bottleneck"]}
    for depth, blocks in DEPTHS.items()
}

SOURCES = {
    "torchvision": (
        *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
        *("resnext50_32x4d", "resnext101_32x8d", "wide_resnet50_2", "wide_resnet101_2"),
    ),
    "timm": (
        *("resnet18", "resnet50", "resnet18d", "resnet50d", "seresnet50"),
        *("resnetv2_18", "resnetv2_34", "resnetv2_50", "resnetv2_50d"),
    ),
    "huggingface": tuple(CONFIGS),
    "keras.applications": (
        *("ResNet50", "ResNet101", "ResNet152"),
        *("ResNet50V2", "ResNet101V2", "ResNet152V2"),
    ),
    # Written in PyTorch for the tests, from the paper: no library has these networks.
    "paper": ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "plain20"),
}

# Where `randomize` draws from, by Keras's names. Any bias too: some libraries start it at 0.
RANGES = {
    "gamma": (0.5, 1.5),
    "beta": (-0.5, 0.5),
    "moving_mean": (-0.5, 0.5),
    "moving_variance": (0.5, 1.5),
    "bias": (-0.5, 0.5),
}
# The last gamma of a residual branch: with the others' range each block almost doubles the sum
# that it adds to, and the logits of ResNet-152 are near 1e12.
LAST_GAMMA = (0.1, 0.3)
BATCH_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}
# A gamma of a block's residual branch, in each library's words; group 1 is the block.
BRANCH_GAMMA = re.compile(
    r"(layer\d\.\d+"  # torchvision, and timm's resnet and seresnet
    r"|stages\.\d\.blocks\.\d+"  # timm's resnetv2
    r"|stages\.\d\.layers\.\d+"  # Hugging Face
    r"|conv\d_block\d+"  # keras.applications
    r"|stage\d+_block\d+)"  # ours
    r"[._](?!downsample|shortcut|0_).*\bgamma$"
)


def import_torchvision():
    """Returns torchvision, with stand-ins for its operators only where it cannot load them."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if STUBS or "operator torchvision::" not in str(error):
            raise
    STUBS.append(torch.library.Library("torchvision", "FRAGMENT"))
    for schema in OPERATORS:
        STUBS[0].define(schema)
    return importlib.import_module("torchvision")


def import_timm():
    """Returns timm."""
    import_torchvision()  # which timm imports
    return importlib.import_module("timm")


def import_transformers():
    """Returns Hugging Face's transformers."""
    import_torchvision()  # which its ResNet imports
    return importlib.import_module("transformers")


def torchvision_model(name, num_classes=1000):
    """Returns torchvision's network `name`."""
    models = import_torchvision().models
    return models.get_model(name, weights=None, num_classes=num_classes)


def timm_model(name, num_classes=1000, in_chans=3):
    """Returns timm's network `name`."""
    create = import_timm().create_model
    return create(name, pretrained=False, num_classes=num_classes, in_chans=in_chans)


def huggingface_model(name, num_classes=1000, channels=3, downsample_in_bottleneck=False):
    """Returns Hugging Face's network `name`; its output holds the logits as `logits`.

    Args:
        name: A row of `CONFIGS`.
        num_classes: Number of classes.
        channels: Number of the images' channels.
        downsample_in_bottleneck: Whether the first convolution of a bottleneck has the stride, as
            in the paper, and not the second.
    """
    transformers = import_transformers()
    config = transformers.ResNetConfig(
        **CONFIGS[name],
        num_labels=num_classes,
        num_channels=channels,
        downsample_in_bottleneck=downsample_in_bottleneck,
    )
    return transformers.ResNetForImageClassification(config)


def keras_applications_model(name, num_classes=1000, input_shape=(None, None, 3)):
    """Returns keras.applications' network `name`, up to its logits."""
    # With its classifier it takes no open size, which none of its layers needs.
    fixed_shape = tuple(size or 224 for size in input_shape)
    model = getattr(keras.applications, name)(
        weights=None, classes=num_classes, input_shape=fixed_shape, classifier_activation=None
    )
    if fixed_shape == tuple(input_shape):
        return model
    return keras.models.clone_model(model, input_tensors=keras.Input(input_shape))


def paper_model(name, num_classes=1000):
    """Returns a network of He et al. 2016a, section 4.2: "resnet20" …, or "plain20" …."""
    kind, depth = re.fullmatch(r"(resnet|plain)(\d+)", name).groups()
    return CifarResNet(int(depth), num_classes, use_shortcut=kind == "resnet")


FACTORIES = {
    "torchvision": torchvision_model,
    "timm": timm_model,
    "huggingface": huggingface_model,
    "keras.applications": keras_applications_model,
    "paper": paper_model,
}


def torch_logits(net, images):
    """Returns the logits, an array, of a network of the first three sources in inference.

    Args:
        net: The network.
        images: Channels-first images, a tensor.
    """
    with torch.no_grad():
        outputs = net.eval()(images)
    return getattr(outputs, "logits", outputs).numpy()


def randomize(net, seed):
    """Draws what a PyTorch network's BatchNorms hold, and every bias, anew; returns the network.

    None is left at 0 or 1. The kernels stay as the library drew them, from PyTorch's global
    generator.
    """
    tensors = torch_tensors(net)
    for path, values in draw(tensors, seed).items():
        tensors[path].copy_(torch.from_numpy(values))
    return net


def randomize_keras(model, seed):
    """Does to a Keras model what `randomize` does to PyTorch's."""
    variables = {variable.path.replace("/", "."): variable for variable in model.variables}
    for path, values in draw(variables, seed).items():
        variables[path].assign(values)
    return model


def torch_tensors(net):
    """Returns every tensor of `net`, detached, by its path, a BatchNorm's by Keras's names."""
    tensors = {}
    for name, module in net.named_modules():
        words = BATCH_NORM if isinstance(module, nn.BatchNorm2d) else {}
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        tensors.update({f"{name}.{words.get(word, word)}": held.detach() for word, held in own})
    return tensors


def draw(variables, seed):
    """Returns new values, arrays by path, of those `variables` that are named in `RANGES`."""
    rng = np.random.default_rng(seed)
    ends = {path: path.rpartition(".")[2] for path in variables}
    gammas = {match[1]: path for path in ends if (match := BRANCH_GAMMA.search(path))}
    last = set(gammas.values())  # of each block, the latest stands in the dict
    return {
        path: rng.uniform(
            *(LAST_GAMMA if path in last else RANGES[end]), size=tuple(variables[path].shape)
        ).astype("float32")
        for path, end in ends.items()
        if end in RANGES
    }
