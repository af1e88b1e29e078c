"""The family beside torchvision, timm, Hugging Face and keras.applications; random weights.

`parity.py` says how each number is measured; `python benchmarks/parity.py` prints the same ones as
a table. `pytest -rP` shows what was measured here. Slow networks run with `make test-all`.
"""

import json
import os

import keras
import numpy as np
import parity
import pytest
from conftest import check
from parity import IMAGES, NETWORKS, build_pair, random_images
from references import SOURCES, randomize_keras
from test_backends import run_python

from keras_resnet.models import SPECS, VARIANTS, Spec, build_resnet

pytestmark = [pytest.mark.thorough, pytest.mark.usefixtures("one_torch_thread")]

BOUNDS = {
    # what: in float32, in float64
    "logits": {"float32": 1e-5, "float64": 1e-10},
    "gradients": {"float32": 1e-4, "float64": 1e-10},
    "batch norm": {"float32": 1e-4, "float64": 1e-10},
    "losses": {"float32": 1e-3, "float64": 1e-8},
}

# (size, batch): the slow networks take `IMAGES`, and two networks all sizes in all batches. At 32
# pixels the last stage sees a single one. `benchmarks/parity.py` takes 224 pixels of all networks.
SOME_IMAGES = IMAGES[:2]
ALL_IMAGES = (*IMAGES, (64, 1), (97, 3), (224, 3))
THOROUGH = {"torchvision resnet18": (*ALL_IMAGES, (32, 2)), "torchvision resnet50": ALL_IMAGES}

# A network of each kind: block, stem, shortcut, order of a pre-activated block, library. In float64
# a wrong network cannot hide behind rounding; float32 is what networks are used in.
FAST = {
    *("torchvision resnet18", "timm resnet18d", "timm seresnet50"),
    *("timm resnetv2_50d", "keras.applications ResNet50V2", "paper resnet20", "paper plain20"),
}
FAST_FLOAT32 = {"torchvision resnet18"}

# torchvision's own numbers, from its table of published weights.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
}


def row(name):
    """Returns the row of `NETWORKS` called `name`."""
    (found,) = (network for network in NETWORKS if str(network) == name)
    return found


def marked(networks, fast, *arguments):
    """Returns test parameters, with those networks marked as slow that are not in `fast`."""
    return [
        pytest.param(
            (network, *arguments),
            id="-".join([str(network).replace(" ", "-"), *arguments]),
            marks=() if str(network) in fast else pytest.mark.slow,
        )
        for network in networks
    ]


# Every network, in both precisions: built once, then asked by each of the tests.


@pytest.fixture(
    scope="module",
    params=marked(NETWORKS, FAST_FLOAT32, "float32") + marked(NETWORKS, FAST, "float64"),
)
def pair(request):
    network, dtype = request.param
    return build_pair(network, dtype)


def test_stages_and_logits(pair):
    name = str(pair.network)
    for size, count in THOROUGH.get(name, SOME_IMAGES if name in FAST else IMAGES):
        differences = parity.activation_differences(pair, random_images(size, count))
        assert list(differences)[-1] == "logits"
        assert len(differences) == (4 if pair.network.source == "paper" else 5)
        for what, difference in differences.items():
            bound = BOUNDS["logits"][pair.dtype]
            check(f"{what}, {pair.dtype}, {size} px, batch {count}", difference, bound)


def test_gradients_of_every_weight(pair):
    """In training mode, ReLUs on the same sides of their kinks, see `parity.Sides`.

    An input whose own side is another must lie within rounding of the kink; in float64 there is
    none.
    """
    found = parity.gradient_difference(pair)
    bound = BOUNDS["gradients"][pair.dtype]
    check(f"gradients, {pair.dtype}, worst in {found.path}", found.value, bound)
    check(f"{found.changed} ReLUs on the other side, at", found.kink, bound)


def test_batch_norm_statistics_after_a_step(pair):
    difference = parity.batch_norm_difference(pair)
    check(f"statistics, {pair.dtype}", difference, BOUNDS["batch norm"][pair.dtype])


def test_number_of_parameters(pair):
    counted = pair.ours.num_parameters
    assert counted == pair.theirs.num_parameters
    if pair.network.source == "torchvision":
        assert counted == PARAMETERS.get(pair.network.name, counted)


def test_every_reference_has_a_row():
    rows = {(network.source, network.name) for network in NETWORKS}
    assert rows >= {(source, name) for source, names in SOURCES.items() for name in names}
    # No other library has the narrow networks.
    narrow = {"resnet10_narrow", "resnet12_narrow"}
    assert {network.spec for network in NETWORKS} == set(SPECS) - narrow
    assert {network.variant for network in NETWORKS} == set(VARIANTS) - {"d2l"}
    assert len({str(network) for network in NETWORKS}) == len(NETWORKS)
    assert {str(network) for network in NETWORKS} >= FAST


# Training


TRAINED = [row(f"torchvision resnet{depth}") for depth in (18, 34, 50, 101, 152)]


@pytest.mark.parametrize(
    "case",
    marked(TRAINED, (), "float32") + marked(TRAINED, (), "float64"),
)
def test_losses_of_20_sgd_steps(case):
    """SGD with momentum 0.9; see `parity.trajectory_difference`."""
    pair = build_pair(*case)
    found = parity.trajectory_difference(pair)
    assert len(found.losses) == 20
    assert min(found.losses) < 0.9 * found.losses[0]  # they do learn
    bound = BOUNDS["losses"][pair.dtype]
    check(f"20 losses, {pair.dtype}", found.value, bound)
    check("ReLUs on the other side, at", found.kink, bound)


# That a wrong network is told from the right one


def logits_difference(pair, size=64):
    return parity.activation_differences(pair, random_images(size, 3))["logits"]


@pytest.fixture(scope="module")
def resnet18():
    return build_pair(row("torchvision resnet18"))


def test_stride_on_the_other_convolution_is_seen():
    network = row("huggingface resnet50 downsample_in_bottleneck")
    assert logits_difference(build_pair(network, "float64", variant="torchvision")) > 1e-3
    assert logits_difference(build_pair(network, "float64")) < BOUNDS["logits"]["float64"]


@pytest.mark.parametrize("size", [64, 97])
def test_keras_own_padding_is_seen(resnet18, size):
    """Keras's "same" pads at stride 2 only below and right, where the size is even."""
    convolution = resnet18.ours.model.get_layer("stage4_block1").conv1
    convolution.padding = "same"
    try:
        wrong = logits_difference(resnet18, size)
    finally:
        convolution.padding = "valid"
    assert (wrong > 1e-3) == (size == 64)  # 4 pixels reach the fourth stage, or 7
    assert logits_difference(resnet18, size) < 1e-5


def test_swapped_tensors_are_seen(resnet18):
    block = resnet18.ours.model.get_layer("stage2_block2")
    with parity.restored(resnet18):
        first, second = (weight.numpy() for weight in (block.bn1.gamma, block.bn1.moving_variance))
        block.bn1.gamma.assign(second)
        block.bn1.moving_variance.assign(first)
        assert logits_difference(resnet18) > 1e-3
    assert logits_difference(resnet18) < 1e-5


def test_another_epsilon_is_seen_in_float64():
    """keras.applications' 1.001e-5 beside 1e-5."""
    pair = build_pair(row("torchvision resnet18"), "float64")
    pair.ours.model.get_layer("stem_bn").epsilon = 1.001e-5
    assert logits_difference(pair) > BOUNDS["logits"]["float64"]


def test_a_wrong_gradient_and_wrong_statistics_are_seen(resnet18):
    norm = resnet18.ours.model.get_layer("stem_bn")
    norm.momentum = 0.99
    try:
        assert parity.batch_norm_difference(resnet18) > 1e-3
    finally:
        norm.momentum = 0.9
    assert parity.batch_norm_difference(resnet18) < BOUNDS["batch norm"]["float32"]
    epsilon, norm.epsilon = norm.epsilon, 1e-2
    try:
        assert parity.gradient_difference(resnet18).value > 1e-3
    finally:
        norm.epsilon = epsilon


def test_a_relu_on_the_wrong_side_is_seen(resnet18):
    """Sides that are taken over hide no wrong ReLU: they are measured."""
    norm = resnet18.ours.model.get_layer("stage1_block1").bn1
    with parity.restored(resnet18):
        norm.beta.assign(norm.beta.numpy() + 0.1)
        assert parity.gradient_difference(resnet18).kink > 1e-3


@pytest.mark.slow
def test_another_rate_is_seen(resnet18, monkeypatch):
    sgd = resnet18.ours.sgd
    monkeypatch.setattr(resnet18.ours, "sgd", lambda rate, **options: sgd(1.1 * rate, **options))
    assert parity.trajectory_difference(resnet18, steps=5).value > 1e-3


def test_relative_difference():
    ones = np.ones((2, 3))
    assert parity.relative_difference(ones * 3, ones * 2) == 0.5
    assert parity.relative_difference(ones, ones * 0) == np.inf
    assert parity.relative_difference(ones * 0, ones * 0) == 0
    assert not parity.relative_difference(ones * np.nan, ones) < 1
    with pytest.raises(ValueError, match="shapes"):
        parity.relative_difference(ones, ones.T)


# Backends

BOTTLENECK = {"block": "bottleneck"}
FORMS = {
    "basic": {},
    "bottleneck": BOTTLENECK,
    "groups and se": {**BOTTLENECK, "groups": 4, "width_per_group": 32, "se_reduction": 4},
    "d": {**BOTTLENECK, "shortcut_pool": "average", "stem": "deep"},
}
SMALL = {f"{variant}-{form}": (variant, form) for variant in VARIANTS for form in FORMS}
LOAD = """
import json, sys
import keras, keras_resnet
import numpy as np

folder, names = sys.argv[1], json.loads(sys.argv[2])
images = np.load(f"{folder}/images.npy")
logits = {
    name: keras.ops.convert_to_numpy(keras.models.load_model(f"{folder}/{name}.keras")(images))
    for name in names
}
np.savez(f"{folder}/{keras.config.backend()}.npz", **logits)
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def small_models(tmp_path_factory):
    """A folder with a small network of each form, images, and TensorFlow's logits for them."""
    folder = tmp_path_factory.mktemp("small")
    images = random_images(33, 2)
    np.save(folder / "images.npy", images)
    logits = {}
    for name, (variant, form) in SMALL.items():
        keras.utils.set_random_seed(0)
        model = build_resnet(Spec((1, 2), (8, 16), **FORMS[form]), (33, 33, 3), variant=variant)
        randomize_keras(model, seed=0)
        model.save(folder / f"{name}.keras")
        logits[name] = np.asarray(model(images))
    np.savez(folder / "tensorflow.npz", **logits)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_one_file_gives_the_same_logits_on_every_backend(small_models, backend):
    if not os.environ.get("CI"):  # where a change is checked all backends are there
        pytest.importorskip(backend, reason=f"Keras's backend {backend} is not installed")
    run_python(LOAD, small_models, json.dumps(list(SMALL)), backend=backend)
    expected, found = (np.load(small_models / f"{b}.npz") for b in ("tensorflow", backend))
    assert set(found) == set(SMALL)
    for name in SMALL:
        assert np.abs(expected[name]).max() > 1e-2
        difference = parity.relative_difference(found[name], expected[name])
        check(f"{name}, {backend}", difference, BOUNDS["logits"]["float32"])
