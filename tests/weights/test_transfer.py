"""Loading and saving weights: every tensor once, or one line lists all that do not fit."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import torch
from keras import ops
from references import randomize, timm_model, torchvision_model

import keras_resnet
from keras_resnet.models import Spec, build_resnet
from keras_resnet.preprocessing import with_preprocessing
from keras_resnet.utils.errors import InputError
from keras_resnet.weights import (
    LAYOUTS,
    adapt_channels,
    load_torch_weights,
    save_torch_weights,
    torch_state_dict,
)

SMALL = Spec((1, 1), (4, 8), "bottleneck", se_reduction=2)


def build(spec=SMALL, channels=3, classes=5, **kwargs):
    """A small network of the form that published weights have, unless told otherwise."""
    kwargs = {"variant": "torchvision", **kwargs}
    return build_resnet(spec, (None, None, channels), classes, **kwargs)


def random_state(seed=0, **kwargs):
    """A state dict of the small network with random numbers in every place."""
    rng = np.random.default_rng(seed)
    state = torch_state_dict(build(**kwargs))
    return {name: rng.uniform(0.1, 1, a.shape).astype("float32") for name, a in state.items()}


def weights_of(model):
    return {weight.path: ops.convert_to_numpy(weight) for weight in model.weights}


# In and out


@pytest.mark.thorough
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_network_of_torchvision_goes_in_and_comes_out_bit_for_bit(tmp_path, suffix):
    net = randomize(torchvision_model("resnet18", num_classes=7), 0)
    model = build("resnet18", classes=7)
    transfer = load_torch_weights(model, net.state_dict())
    assert (transfer.layout, transfer.num_tensors) == ("torchvision", 102)

    save_torch_weights(model, tmp_path / f"out{suffix}")
    again = torchvision_model("resnet18", num_classes=7)
    if suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(tmp_path / f"out{suffix}")
    else:
        state = torch.load(tmp_path / f"out{suffix}", weights_only=True)
    assert set(state) == set(net.state_dict())
    again.load_state_dict(state, strict=True)
    for name, tensor in net.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("layout", [n for n, row in LAYOUTS.items() if row.channels_first])
def test_every_layout_of_pytorch_is_written_and_read(tmp_path, layout):
    variant = LAYOUTS[layout].variant
    stem = "deep" if layout == "timm_d" else "imagenet"
    spec = Spec((1, 2), (4, 8), "basic" if variant == "d2l" else "bottleneck")
    source, target = (build(spec, variant=variant, stem=stem) for _ in range(2))
    rng = np.random.default_rng(0)
    source.set_weights([rng.normal(size=w.shape) for w in source.weights])
    save_torch_weights(source, tmp_path / "w.safetensors", layout=layout)
    assert load_torch_weights(target, tmp_path / "w.safetensors").layout == layout
    for path, value in weights_of(source).items():
        np.testing.assert_array_equal(weights_of(target)[path], value)


@pytest.mark.thorough
def test_a_trained_network_of_ours_gives_its_logits_in_pytorch(tmp_path):
    keras.utils.set_random_seed(0)
    model = build("resnet18")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).normal(size=(8, 33, 32, 3)).astype("float32")
    model.fit(x, np.arange(8) % 5, epochs=2, verbose=0)
    save_torch_weights(model, tmp_path / "trained.pth")
    net = torchvision_model("resnet18", num_classes=5).eval()
    net.load_state_dict(torch.load(tmp_path / "trained.pth", weights_only=True), strict=True)
    with torch.no_grad():
        theirs = net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    ours = ops.convert_to_numpy(model(x))
    assert np.abs(ours - theirs).max() / np.abs(theirs).max() < 1e-5


@pytest.mark.slow
def test_safetensors_go_both_ways_without_pytorch(tmp_path):
    code = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, NoTorch())
import keras_resnet
from keras_resnet import Spec
model = keras_resnet.build_resnet(Spec((1,), (4,)), (32, 32, 3), variant="torchvision")
keras_resnet.weights.save_torch_weights(model, sys.argv[1])
print(keras_resnet.load_torch_weights(model, sys.argv[1]).num_tensors)
try:
    keras_resnet.save_torch_weights(model, sys.argv[1].replace(".safetensors", ".pth"))
except keras_resnet.InputError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "w.safetensors")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    count, error = done.stdout.splitlines()
    assert count == "17"
    assert "pip install torch" in error


def test_a_classifier_with_preprocessing_takes_weights_too():
    network = build(channels=3)
    classifier = with_preprocessing(
        build_resnet(SMALL, (32, 32, 3), 5, variant="torchvision"), (28, 28, 1), ["flip"]
    )
    state = random_state()
    assert load_torch_weights(classifier, state) == load_torch_weights(network, state)
    assert weights_of(classifier).keys() == weights_of(network).keys()
    for path, value in weights_of(network).items():
        np.testing.assert_array_equal(weights_of(classifier)[path], value)


def test_names_are_at_the_top_of_the_package():
    assert keras_resnet.weights.load_torch_weights is load_torch_weights
    assert keras_resnet.load_torch_weights is load_torch_weights


# Checkpoints that do not fit


def without(*names):
    return lambda state: [state.pop(name) for name in names]


def reshaped(name, shape):
    return lambda state: state.update({name: np.zeros(shape, "float32")})


FAULTS = {
    "missing": (without("bn1.weight"), ["1 missing (bn1.weight)", "depth, variant, stem"]),
    "surplus": (reshaped("extra.weight", (3,)), ["1 of no use (extra.weight)"]),
    "another shape": (
        reshaped("layer1.0.conv1.weight", (4, 4, 3, 3)),
        ["1 of another shape (layer1.0.conv1.weight is (4, 4, 3, 3), must be (4, 4, 1, 1))"],
    ),
    "vector for a kernel": (reshaped("fc.weight", (5,)), ["fc.weight is (5,), must be (5, 32)"]),
    "another head": (
        lambda state: (reshaped("fc.weight", (9, 32))(state), reshaped("fc.bias", (9,))(state)),
        ["fc.weight is (9, 32), must be (5, 32)", "only the head", "--skip-head"],
    ),
    "no head": (without("fc.weight", "fc.bias"), ["2 missing (fc.bias, fc.weight)", "skip_head"]),
    "a line break in a name": (reshaped("a\nb", (1,)), ["1 of no use (a b)"]),
    "all at once": (
        lambda state: (without("bn1.weight", "bn1.bias")(state), reshaped("x", (1,))(state)),
        ["2 missing (bn1.bias, bn1.weight)", "1 of no use (x)"],
    ),
    "square kernel the other way round": (
        reshaped("layer2.0.conv1.weight", (16, 8, 1, 1)),
        ["layer2.0.conv1.weight is (16, 8, 1, 1), must be (8, 16, 1, 1)"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line_and_changes_nothing(fault):
    spoil, expected = FAULTS[fault]
    model, state = build(), random_state()
    before = weights_of(model)
    spoil(state)
    with pytest.raises(InputError) as error:
        load_torch_weights(model, state)
    assert "\n" not in str(error.value)
    for part in expected:
        assert part in str(error.value)
    for path, value in weights_of(model).items():
        np.testing.assert_array_equal(value, before[path])


def test_long_lists_are_cut_and_counted():
    state = random_state()
    few = {name: state[name] for name in ("conv1.weight", "fc.weight", "fc.bias")}
    with pytest.raises(InputError, match=rf"{len(state) - 3} missing \(.*and \d+ more\)"):
        load_torch_weights(build(), few)


def test_an_error_names_the_file(tmp_path):
    path = tmp_path / "other.safetensors"
    save_torch_weights(build(SMALL), path)
    with pytest.raises(InputError, match=rf"^{path}: tensors: \d+ missing"):
        load_torch_weights(build(Spec((2, 1), (4, 8), "bottleneck", se_reduction=2)), path)


BASIC = Spec((1, 1), (4, 8))


@pytest.mark.parametrize(
    ("checkpoint", "layout", "model", "advice"),
    [
        ({}, "torchvision", {"variant": "d2l"}, 'with variant="torchvision"'),
        ({}, "torchvision", {"variant": "v2"}, 'with variant="torchvision"'),
        ({"variant": "d2l", "spec": BASIC}, "d2l", {"spec": BASIC}, 'with variant="d2l"'),
        ({"stem": "imagenet"}, "torchvision", {"stem": "small"}, "as the checkpoint's was"),
        ({"stem": "imagenet"}, "torchvision", {"stem": "deep"}, "no stem_conv1/kernel"),
        ({"channels": 3}, "torchvision", {"channels": 1}, "as the checkpoint's was"),
    ],
)
def test_another_form_is_refused(checkpoint, layout, model, advice):
    state = torch_state_dict(build(**checkpoint), layout)
    with pytest.raises(InputError, match=advice):
        load_torch_weights(build(**model), state)


@pytest.mark.parametrize(
    ("variant", "layout", "message"),
    [
        # These two would load with every key matched, and compute something else.
        ("v1", "torchvision", "of variant torchvision, got v1; layouts for that: huggingface"),
        ("v1", "timm_d", "got v1"),
        ("d2l", "torchvision", "got d2l; layouts for that: d2l, d2l_named"),
        ("keras_v1", "torchvision", "got keras_v1; layouts for that: none"),
        ("keras_v2", "timm_v2", "of variant v2, got keras_v2"),
        ("torchvision", "timm_v2", "of variant v2, got torchvision"),
        ("plain", "pytorch_resnet_cifar10", "of variant cifar, got plain"),
    ],
)
def test_nothing_is_written_that_would_be_another_network(tmp_path, variant, layout, message):
    model = build(Spec((1, 1), (4, 8), "bottleneck"), variant=variant)
    with pytest.raises(InputError, match=message):
        save_torch_weights(model, tmp_path / "w.safetensors", layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "layout", "part"),
    [
        ({"stem": "deep"}, "torchvision", "stem_conv1/kernel"),
        ({"stem": "deep"}, "huggingface", "stem_conv1/kernel"),
        ({}, "huggingface", "se/fc1/kernel"),
    ],
)
def test_parts_that_a_layout_has_no_names_for_are_refused(model, layout, part):
    with pytest.raises(InputError, match=f"layout {layout} have no .*{part}"):
        torch_state_dict(build(**model), layout)


def test_the_papers_bottlenecks_go_to_hugging_face_and_back():
    model = build(Spec((1, 1), (4, 8), "bottleneck"), variant="v1")
    assert load_torch_weights(model, torch_state_dict(model, "huggingface")).num_tensors == 47


def test_a_model_that_a_layout_has_no_names_for_is_refused():
    bottlenecks = build(Spec((1,), (4,), "bottleneck"), variant="d2l")
    with pytest.raises(InputError, match=r"layout d2l is not .*would be its 1\.0\.conv3\.weight"):
        torch_state_dict(bottlenecks, "d2l")
    inputs = keras.Input((4, 3))
    other = keras.Model(inputs, keras.layers.GRU(2)(inputs))
    with pytest.raises(InputError, match="got none; layouts for that: none"):
        torch_state_dict(other)
    with pytest.raises(InputError, match=r"have no gru/gru_cell/kernel"):
        load_torch_weights(other, random_state())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module.", "module." * 2000])
def test_prefixes_are_understood_however_many(prefix):
    state = {prefix + name: array for name, array in random_state().items()}
    assert load_torch_weights(build(), state).num_tensors == len(state)


# Checkpoints as training scripts write them

CIFAR = Spec((1, 1), (8, 16))


def network_of(state):
    """The small basic network that `scripted` checkpoints are of, and their weights in it."""
    model = build(CIFAR, classes=3, stem="small")
    return model, load_torch_weights(model, state), torch_state_dict(model)


@pytest.fixture(scope="module")
def state():
    """A state dict of that network, of PyTorch's tensors."""
    state = random_state(spec=CIFAR, classes=3, stem="small")
    return {name: torch.from_numpy(array) for name, array in state.items()}


def put(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def rename_head(state, name):
    return {key.replace("fc.", f"{name}."): tensor for key, tensor in state.items()}


def doubled(state):
    return {name: 2 * tensor for name, tensor in state.items()}


def split_head(state):
    body = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
    return body, {"weight": state["fc.weight"], "bias": state["fc.bias"]}


def dense(name, inputs, outputs):
    return {f"{name}.weight": torch.ones(outputs, inputs), f"{name}.bias": torch.ones(outputs)}


COUNT = torch.tensor(3)
OTHERS = {"criterion.weight": torch.ones(3), "metric.total": COUNT}
# checkpoint -> a function that makes it of two state dicts, of which the second is averaged; the
# key or prefix that is reported; the tensors that are left out.
SCRIPTS = {
    "ImageNet example": (
        lambda s, e: {
            "epoch": 90,
            "state_dict": put("module.", s),
            "best_acc1": torch.tensor(71.2),
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": []},
        },
        "state_dict",
        (),
    ),
    "weights and numbers in one": (
        lambda s, e: {**s, "epoch": 3, "acc": np.float64(9), "best": torch.tensor(9.0)},
        None,
        ("acc", "best"),
    ),
    "timm": (lambda s, e: {"state_dict": s, "state_dict_ema": e}, "state_dict_ema", ()),
    "timm without averages": (
        lambda s, e: {"state_dict": s, "state_dict_ema": None},
        "state_dict",
        (),
    ),
    "torchvision": (
        lambda s, e: {"model": s, "model_ema": {"n_averaged": COUNT, **put("module.", e)}},
        "model_ema",
        (),
    ),
    "AveragedModel": (lambda s, e: {"n_averaged": COUNT, **put("module.", s)}, None, ()),
    "Lightning": (
        lambda s, e: {
            "state_dict": {**put("model.", s), **OTHERS},
            "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3)}},
            "loops": {"fit_loop": {"state_dict": {}}},
        },
        "state_dict",
        ("criterion.weight",),
    ),
    "thop": (
        lambda s, e: {**s, "total_ops": torch.ones(1), "layer1.0.total_params": torch.ones(1)},
        None,
        (),
    ),
    "a key of one's own": (lambda s, e: {"encoder": s, "loss": torch.tensor(0.3)}, "encoder", ()),
    "two keys": (
        lambda s, e: dict(zip(("backbone", "head"), split_head(s), strict=True)),
        None,
        (),
    ),
    "a head beside the backbone": (
        lambda s, e: {
            **put("backbone.", split_head(s)[0]),
            **put("classifier.1.", split_head(s)[1]),
            "loss_fn.weight": torch.ones(5, 16),
        },
        None,
        ("loss_fn.weight",),
    ),
    **{
        f"prefix {prefix}": ((lambda s, e, p=prefix: put(p, s)), None, ())
        for prefix in ("net.", "backbone.model.", "_orig_mod.module.x.", "timm_model.", "a.0.")
    },
    **{
        f"head {name}": ((lambda s, e, n=name: rename_head(s, n)), None, ())
        for name in ("fc.1", "classifier", "linear", "head.fc")
    },
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_training_script_wrote_is_loaded(state, script):
    make, taken, ignored = SCRIPTS[script]
    averaged = doubled(state)
    _, transfer, found = network_of(make(state, averaged))
    assert (transfer.layout, transfer.num_tensors) == ("torchvision", len(state))
    assert (transfer.taken, transfer.ignored) == (taken, ignored)
    expected = averaged if taken and "ema" in taken else state
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor)


def test_averaged_weights_behind_a_prefix_are_taken_and_the_others_named(state):
    content = {**put("model.", state), **put("ema_model.module.", doubled(state))}
    _, transfer, found = network_of({"state_dict": content})
    assert transfer.taken == "ema_model.module."
    assert transfer.ignored == tuple(sorted(put("model.", state)))
    np.testing.assert_array_equal(found["fc.bias"], 2 * state["fc.bias"])


@pytest.mark.parametrize("wrap", [lambda s, p: {p[:-1]: s}, lambda s, p: put(p, s)])
def test_of_two_networks_both_are_named_and_none_is_taken(state, wrap):
    content = {**wrap(state, "teacher."), **wrap(state, "student.")}
    with pytest.raises(InputError, match=r"holds 2 networks.*'student.' and 'teacher.'"):
        network_of(content)


# The head's tensors in place of those of `fc`.
HEADS = {
    "two layers": {**dense("fc.0", 16, 7), **dense("fc.3", 7, 3)},
    "no bias": {"fc.1.weight": torch.ones(3, 16)},
    "with normalisation": {**dense("fc.0", 16, 3), "fc.1.running_mean": torch.ones(3)},
    "two layers outside": {**dense("classifier.0", 16, 7), **dense("classifier.2", 7, 3)},
    "a second layer outside": {**dense("model.fc", 16, 7), **dense("classifier", 7, 3)},
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_of_another_form_is_refused_or_left_out(state, head):
    prefix = "model." if "outside" in head else ""
    content = {**put(prefix, split_head(state)[0]), **HEADS[head]}
    with pytest.raises(InputError, match="only the head does not fit, one dense layer with a bias"):
        network_of(content)
    model = build(CIFAR, classes=5, stem="small")
    transfer = load_torch_weights(model, content, skip_head=True)
    assert transfer.skipped == tuple(sorted(HEADS[head]))
    assert transfer.num_tensors == len(state) - 2


@pytest.mark.parametrize(
    "extra",
    [
        {"sa.conv1.weight": torch.ones(1, 2, 7, 7)},
        {"ca.fc.0.weight": torch.ones(4, 8, 1, 1), "ca.fc.0.bias": torch.ones(4)},
        {"layer1.0.attention.weight": torch.ones(4, 8)},
    ],
)
def test_a_part_of_the_body_is_no_head(state, extra):
    model = build(CIFAR, classes=3, stem="small")
    with pytest.raises(InputError, match=f"{len(extra)} of no use"):
        load_torch_weights(model, {**state, **extra}, skip_head=True)


def test_weights_that_are_no_floats_are_named(state):
    content = {**put("net.", state), "net.bn1.weight": torch.ones(8, dtype=torch.int64)}
    with pytest.raises(InputError, match=r"'net.bn1.weight' must be one of .*got int64"):
        network_of(content)


# Heads and channels


@pytest.mark.parametrize("classes", [9, 5])
def test_a_head_may_be_left_as_it_is(classes):
    model, state = build(classes=5), random_state(classes=classes)
    head = [np.array(w) for w in model.get_layer("logits").weights]
    transfer = load_torch_weights(model, state, skip_head=True)
    assert transfer.skipped == ("fc.bias", "fc.weight")
    assert transfer.num_tensors == len(state) - 2
    for before, after in zip(head, model.get_layer("logits").weights, strict=True):
        np.testing.assert_array_equal(after, before)


def test_a_network_without_a_head_takes_one_with_it():
    backbone = build(include_top=False)
    state = random_state()
    with pytest.raises(InputError, match=r"2 of no use \(fc.bias, fc.weight\).*skip_head"):
        load_torch_weights(backbone, state)
    assert load_torch_weights(backbone, state, skip_head=True).num_tensors == len(state) - 2


@pytest.mark.parametrize(("present", "wanted"), [(3, 1), (1, 3), (4, 1), (1, 5), (3, 3)])
def test_adapted_channels_keep_what_equal_channels_gave(present, wanted):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(7, 7, present, 8)).astype("float32")
    grey = rng.normal(size=(2, 16, 16, 1)).astype("float32")
    adapted = adapt_channels(kernel, wanted)
    assert (adapted.shape, adapted.dtype) == ((7, 7, wanted, 8), kernel.dtype)
    before, after = (
        ops.conv(np.repeat(grey, k.shape[2], axis=-1), k, padding="same") for k in (kernel, adapted)
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "channels", "message"),
    [
        ((7, 7, 3, 8), 4, "got 3 to 4"),
        ((7, 7, 3, 8), 0, "`channels` must be a whole number of at least 1, got 0"),
        ((7, 7, 3, 8), 1.0, "`channels` must be a whole number"),
        ((7, 3), 1, r"`kernel` must be .*got shape \(7, 3\)"),
    ],
)
def test_channels_that_have_no_rule_are_an_error(shape, channels, message):
    with pytest.raises(InputError, match=message):
        adapt_channels(np.zeros(shape), channels)


@pytest.mark.parametrize(("checkpoint", "ours"), [(3, 1), (1, 3)])
def test_a_checkpoint_is_adapted_only_where_that_is_asked_for(checkpoint, ours):
    state = random_state(channels=checkpoint)
    with pytest.raises(InputError, match=r"conv1.weight is \(4, \d, 7, 7\), must be"):
        load_torch_weights(build(channels=ours), state)
    model = build(channels=ours)
    transfer = load_torch_weights(model, state, adapt_input=True)
    assert transfer.adapted == (checkpoint, ours)
    reference = build(channels=checkpoint)
    load_torch_weights(reference, state)
    grey = np.random.default_rng(0).normal(size=(2, 32, 32, 1)).astype("float32")
    logits = [m(np.repeat(grey, m.input_shape[-1], axis=-1)) for m in (model, reference)]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-5)


def test_deep_stems_are_adapted_too():
    net = timm_model("resnet18d", num_classes=5)
    model = build("resnet18d", channels=1)
    transfer = load_torch_weights(model, net.state_dict(), adapt_input=True)
    assert (transfer.layout, transfer.adapted) == ("timm_d", (3, 1))


# Files that are not written


def test_a_file_is_written_in_layouts_of_pytorch_alone(tmp_path):
    with pytest.raises(InputError, match=r"`layout` must be one of torchvision.*got 'keras_v1'"):
        save_torch_weights(build(), tmp_path / "w.safetensors", layout="keras_v1")
    with pytest.raises(InputError, match=r"must end in \.safetensors"):
        save_torch_weights(build(), tmp_path / "w.npz")
    assert not list(tmp_path.iterdir())
