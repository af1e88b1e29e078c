"""The name maps: each equals the names of a real implementation."""

import keras
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import (
    huggingface_model,
    keras_applications_model,
    randomize,
    timm_model,
    torchvision_model,
)
from torch_reference import CifarResNet, ResNet18

from keras_resnet.models import Spec, build_resnet
from keras_resnet.utils.errors import InputError
from keras_resnet.weights import load_torch_weights
from keras_resnet.weights.layouts import (
    LAYOUTS,
    Layout,
    detect_layout,
    find_network,
    inspect_tensors,
)


def chapter():
    """The network as d2l builds it: a Sequential of five stages and a head."""
    parts = list(ResNet18().children())
    stages = [torch.nn.Sequential(*parts[:4])]
    stages += [torch.nn.Sequential(*parts[4 + 2 * i : 6 + 2 * i]) for i in range(4)]
    return torch.nn.Sequential(*stages, *parts[-3:])


def named_chapter():
    """The other form of d2l: the stem's layers, then stages with names."""
    net = torch.nn.Sequential(*list(chapter()[0].children()))
    for number in range(1, 5):
        net.add_module(f"resnet_block{number}", chapter()[number])
    net.add_module("global_avg_pool", torch.nn.AdaptiveAvgPool2d(1))
    net.add_module("fc", torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(512, 10)))
    return net


class CifarBlock(torch.nn.Module):
    """The basic block of pytorch-cifar."""

    def __init__(self, channels, filters, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(channels, filters, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(filters)
        self.conv2 = torch.nn.Conv2d(filters, filters, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(filters)
        self.shortcut = torch.nn.Sequential()
        if stride != 1 or channels != filters:
            self.shortcut = torch.nn.Sequential(
                torch.nn.Conv2d(channels, filters, 1, stride, bias=False),
                torch.nn.BatchNorm2d(filters),
            )

    def forward(self, x):
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


class Cifar(torch.nn.Module):
    """ResNet-18 as pytorch-cifar has it, of any widths."""

    def __init__(self, filters=(64, 128, 256, 512), blocks=2, classes=1000):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, filters[0], 3, 1, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(filters[0])
        channels, self.stages = filters[0], len(filters)
        for stage, width in enumerate(filters, start=1):
            first = CifarBlock(channels, width, 1 if stage == 1 else 2)
            more = [CifarBlock(width, width, 1) for _ in range(blocks - 1)]
            setattr(self, f"layer{stage}", torch.nn.Sequential(first, *more))
            channels = width
        self.linear = torch.nn.Linear(channels, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return self.linear(x.mean((2, 3)))


def children():
    """The network of torchvision as a Sequential, as feature extractors use it."""
    *body, head = torchvision_model("resnet18").children()
    return torch.nn.Sequential(*body, torch.nn.Flatten(), head)


# layout, the real network, our row of SPECS, the stem that its tensors show.
REAL = [
    ("d2l", chapter, "resnet18", "imagenet"),
    ("d2l_named", named_chapter, "resnet18", "imagenet"),
    ("torchvision", lambda: torchvision_model("resnet34"), "resnet34", "imagenet"),
    ("torchvision", lambda: torchvision_model("resnext50_32x4d"), "resnext50_32x4d", "imagenet"),
    ("torchvision", lambda: timm_model("seresnet50"), "seresnet50", "imagenet"),
    ("pytorch_cifar", Cifar, "resnet18", "small"),
    ("pytorch_resnet_cifar10", lambda: CifarResNet(20, 1000), "resnet20", "small"),
    ("torchvision_sequential", children, "resnet18", "imagenet"),
    ("timm_d", lambda: timm_model("resnet50d"), "resnet50d", "deep"),
    ("timm_v2", lambda: timm_model("resnetv2_18"), "resnet18", "imagenet"),
    ("timm_v2", lambda: timm_model("resnetv2_50d"), "resnet50d", "deep"),
    ("huggingface", lambda: huggingface_model("resnet50"), "resnet50", "imagenet"),
    ("huggingface_backbone", lambda: huggingface_model("resnet50").resnet, "resnet50", "imagenet"),
    ("keras_v1", lambda: keras_applications_model("ResNet50"), "resnet50", "imagenet"),
    ("keras_v2", lambda: keras_applications_model("ResNet50V2"), "resnet50", "imagenet"),
]


def their_tensors(net):
    """Returns name -> shape of every tensor that has a place in Keras."""
    if isinstance(net, keras.Model):
        return {weight.path: tuple(weight.shape) for weight in net.weights}
    state = {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}
    return {name: s for name, s in state.items() if not name.endswith("num_batches_tracked")}


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("layout", "make", "spec", "stem"), REAL, ids=[f"{row[0]}-{row[2]}" for row in REAL]
)
def test_names_and_shapes_are_those_of_the_real_network(layout, make, spec, stem):
    theirs = their_tensors(make())
    assert detect_layout(theirs) == layout
    found = inspect_tensors({name: np.empty(shape, "bool") for name, shape in theirs.items()})
    channels, classes = (1, 10) if layout.startswith("d2l") else (3, 1000)
    assert (found.layout, found.variant, found.stem) == (layout, LAYOUTS[layout].variant, stem)
    head = not layout.endswith("backbone")
    assert (found.channels, found.num_classes) == (channels, classes if head else None)
    assert found.num_tensors == len(theirs)

    form = {"variant": found.variant, "stem": stem, "include_top": head}
    model = build_resnet(spec, (None, None, channels), classes, **form)
    row = LAYOUTS[layout]
    ours = {
        row.name(weight.path): row.from_ours(weight.path, np.empty(weight.shape, "bool")).shape
        for weight in model.weights
    }
    assert ours == theirs


def test_every_layout_is_held_against_a_real_network():
    assert {row[0] for row in REAL} == set(LAYOUTS)


@pytest.mark.parametrize(("layout", "make"), [row[:2] for row in REAL if row[2] == "resnet18"])
def test_a_network_is_found_behind_any_prefix(layout, make):
    shapes = their_tensors(make())
    for prefix in ("", "a.b.", "module.0.", "resnet."):
        tensors = {prefix + name: np.empty(shape, "bool") for name, shape in shapes.items()}
        tensors |= {"loss/table": np.empty((3, 4)), "loss.weight": np.empty(7)} if prefix else {}
        network = find_network(tensors)
        assert (network.layout, network.prefix) == (layout, prefix)
        assert network.names == {name: prefix + name for name in shapes}
        assert network.ignored == (("loss.weight", "loss/table") if prefix else ())


def test_pytorch_cifar_gives_the_same_logits():
    net = randomize(Cifar((8, 16), 2, 3), 0).eval()
    model = build_resnet(Spec((2, 2), (8, 16)), (16, 16, 3), 3, variant="torchvision", stem="small")
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    transfer = load_torch_weights(model, {"net": state, "acc": 95.2, "epoch": 3})
    assert (transfer.layout, transfer.taken) == ("pytorch_cifar", "net")
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32")
    with torch.no_grad():
        theirs = net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    np.testing.assert_allclose(model(x), theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@settings(max_examples=60, deadline=None)
@given(
    layout=st.sampled_from(list(LAYOUTS)),
    path=st.sampled_from(
        [
            "stem_conv/kernel",
            "stage2_block1/conv2/kernel",
            "stage1_block1/bn1/beta",
            "stage1_block3/se/fc1/kernel",
            "logits/kernel",
            "logits/bias",
        ]
    ),
    data=st.data(),
)
def test_the_order_of_axes_comes_back_bit_for_bit(layout, path, data):
    ndim = {"kernel": 4 if "conv" in path else 2}.get(path.split("/")[-1], 1)
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=ndim, max_size=ndim)))
    ours = np.random.default_rng(0).normal(size=shape)
    row: Layout = LAYOUTS[layout]
    np.testing.assert_array_equal(row.to_ours(path, row.from_ours(path, ours)), ours)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"encoder.weight": (3, 3), "b": (1,)}, "2 tensors .encoder.weight, b, .*known: torchv"),
        ({"conv1.weight": (64, 3, 5, 5)}, "conv1.weight is missing or is not 3×3 or 7×7"),
        ({"conv1.weight": (64, 3, 7)}, "conv1.weight is missing or is not"),
        ({"conv1.weight": (64,)}, "conv1.weight is missing or is not"),
        ({"post_bn/gamma": (64,)}, "conv1_conv/kernel is missing"),
        ({"conv1.0.weight": (64, 3, 9, 9)}, "conv1.0.weight is missing or is not"),
        ({"stem_conv/kernel": (7, 7, 3, 64)}, "a model of ours already.*save_torch_weights"),
    ],
)
def test_what_is_no_residual_network_is_said_so(tensors, message):
    with pytest.raises(InputError, match=message):
        inspect_tensors({name: np.empty(shape) for name, shape in tensors.items()})


def test_a_layout_may_be_named():
    tensors = {"stem.conv.weight": np.empty((64, 3, 7, 7))}
    assert inspect_tensors(tensors, "timm_v2").num_classes is None
    with pytest.raises(InputError, match="`layout` must be one of torchvision, timm_d"):
        inspect_tensors(tensors, "caffe")
