"""Checks of the networks that ours are compared with: the right ones, with telling weights."""

import keras
import numpy as np
import pytest
import references
import torch
from references import FACTORIES, SOURCES
from torch import nn

pytestmark = pytest.mark.thorough

# torchvision's own numbers, from its table of published weights.
TORCHVISION_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}
TIMM_PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "resnet18d": 11_708_744,
    "resnet50d": 25_576_264,
    "seresnet50": 28_088_024,
    "resnetv2_18": 11_687_720,
    "resnetv2_34": 21_795_880,
    "resnetv2_50": 25_549_352,
    "resnetv2_50d": 25_568_584,
}
PARAMETERS = {
    "torchvision": TORCHVISION_PARAMETERS,
    "timm": TIMM_PARAMETERS,
    "huggingface": {name: TORCHVISION_PARAMETERS[name] for name in references.CONFIGS},
}
TORCH_NETWORKS = [(source, name) for source in PARAMETERS for name in SOURCES[source]]
# keras.applications' documented numbers, statistics included.
KERAS_PARAMETERS = {"ResNet50": 25_636_712, "ResNet50V2": 25_613_800}


def check_logits(logits, classes):
    """Fails unless every image has finite logits of a sensible scale, and none another's."""
    assert logits.shape == (2, classes)
    assert np.isfinite(logits).all()
    assert 0.1 < logits.std() < 1e3
    assert np.abs(logits[0] - logits[1]).max() > 1e-3


def check_drawn(variables):
    """Fails unless each of `variables` that `RANGES` names holds random numbers, no 0 and no 1."""
    drawn = {path for path in variables if path.rpartition(".")[2] in references.RANGES}
    assert drawn
    for path in drawn:
        values = keras.ops.convert_to_numpy(variables[path])
        assert len(np.unique(values)) > 1, path
        assert not np.isin(values, (0, 1)).any(), path


@pytest.mark.parametrize(("source", "name"), TORCH_NETWORKS)
def test_parameter_counts_and_layers(source, name):
    """Our map of weights knows no other layers: no GroupNorm, no standardised convolution."""
    with torch.device("meta"):
        net = FACTORIES[source](name)
    assert sum(weight.numel() for weight in net.parameters()) == PARAMETERS[source][name]
    for module in net.modules():
        if next(module.parameters(recurse=False), None) is not None:
            assert isinstance(module, nn.BatchNorm2d | nn.Linear) or type(module) is nn.Conv2d


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("torchvision", "resnet152"),
        ("torchvision", "resnext50_32x4d"),
        ("timm", "resnet18d"),  # whose last gammas start at 0
        ("timm", "seresnet50"),
        ("timm", "resnetv2_50"),
        ("huggingface", "resnet18"),
        ("huggingface", "resnet152"),
    ],
)
def test_randomize(source, name):
    torch.manual_seed(0)
    net = references.randomize(FACTORIES[source](name, num_classes=10), seed=1)
    check_drawn(references.torch_tensors(net))
    check_logits(references.torch_logits(net, torch.randn(2, 3, 64, 64)), classes=10)


@pytest.mark.parametrize("name", KERAS_PARAMETERS)
def test_keras_applications(name):
    keras.utils.set_random_seed(0)
    model = references.randomize_keras(references.keras_applications_model(name), seed=1)
    check_drawn({variable.path.replace("/", "."): variable for variable in model.variables})
    assert model.count_params() == KERAS_PARAMETERS[name]
    assert model.input_shape == (None, None, None, 3)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    check_logits(model(images).numpy(), classes=1000)


def test_randomize_is_seeded():
    first, again, other = (
        references.draw(references.torch_tensors(references.timm_model("resnet18d")), seed)
        for seed in (1, 1, 2)
    )
    for path, values in first.items():
        np.testing.assert_array_equal(values, again[path])
        assert not np.array_equal(values, other[path])


@pytest.mark.parametrize(
    ("source", "name", "blocks"),
    [
        ("torchvision", "resnet18", 8),
        ("torchvision", "resnet152", 50),
        ("timm", "seresnet50", 16),
        ("timm", "resnetv2_50d", 16),
        ("huggingface", "resnet34", 16),
    ],
)
def test_one_small_gamma_in_each_block(source, name, blocks):
    with torch.device("meta"):
        tensors = references.torch_tensors(FACTORIES[source](name))
    drawn = references.draw(tensors, seed=1)
    small = [p for p in drawn if p.endswith("gamma") and drawn[p].max() < 0.5]
    assert len(small) == blocks
    assert not [path for path in small if "downsample" in path or "shortcut" in path]


def test_stand_ins_are_defined_once_and_only_where_needed():
    vision = references.import_torchvision()
    assert len(references.STUBS) == (not vision.extension._has_ops())
    for load in (references.import_torchvision, references.import_timm):
        load()
        assert references.import_torchvision() is vision
    assert len(references.STUBS) <= 1
    assert torch.ops.torchvision.nms  # stands there, ours or its own


def test_another_error_at_import_is_shown(monkeypatch):
    def fail(name):
        raise RuntimeError("another")

    monkeypatch.setattr(references, "STUBS", [])
    monkeypatch.setattr(references.importlib, "import_module", fail)
    with pytest.raises(RuntimeError, match="another"):
        references.import_torchvision()
    assert not references.STUBS


def test_stride_of_the_paper():
    net = references.huggingface_model("resnet50", downsample_in_bottleneck=True)
    block = net.resnet.encoder.stages[1].layers[0].layer
    assert [part.convolution.stride for part in block] == [(2, 2), (1, 1), (1, 1)]


def test_other_channels():
    images = torch.randn(2, 1, 64, 64)
    for net in (
        references.timm_model("resnetv2_18", 10, in_chans=1),
        references.huggingface_model("resnet18", 10, channels=1),
    ):
        assert references.torch_logits(net, images).shape == (2, 10)
