"""The residual layers: their shapes, their numbers, their errors, and that they can be saved."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

import keras_resnet
from keras_resnet.blocks import (
    BottleneckBlock,
    DenseResidualBlock,
    EdgePadding2D,
    PaddedConv2D,
    PaddedShortcut,
    PreActBottleneckBlock,
    PreActResidualBlock,
    ResidualBlock,
    SqueezeExcitation,
)
from keras_resnet.utils.errors import InputError

FOUR_BLOCKS = (ResidualBlock, BottleneckBlock, PreActResidualBlock, PreActBottleneckBlock)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def moving_statistics(layer):
    return [ops.convert_to_numpy(w) for w in layer.non_trainable_variables if "moving" in w.path]


@pytest.fixture
def policy():
    """Sets the dtype policy for one test."""
    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")


# Shapes


@pytest.mark.parametrize(
    ("block", "shape", "expected"),
    [
        # d2l prints these two, channels first: (4, 3, 6, 6) and (4, 6, 3, 3).
        (ResidualBlock(3), (4, 6, 6, 3), (4, 6, 6, 3)),
        (ResidualBlock(6, strides=2, use_1x1conv=True), (4, 6, 6, 3), (4, 3, 3, 6)),
        (ResidualBlock(6, use_1x1conv=True), (4, 6, 6, 3), (4, 6, 6, 6)),
        (DenseResidualBlock(24), (4, 24), (4, 24)),
        (BottleneckBlock(4), (4, 6, 6, 16), (4, 6, 6, 16)),
        (BottleneckBlock(4, 2, True), (4, 7, 6, 3), (4, 4, 3, 16)),
        (BottleneckBlock(4, 2, True, stride_on_1x1=True), (4, 7, 6, 3), (4, 4, 3, 16)),
        (BottleneckBlock(8, groups=2, width_per_group=32), (4, 6, 6, 32), (4, 6, 6, 32)),
        (PreActResidualBlock(6, 2, True), (4, 7, 6, 3), (4, 4, 3, 6)),
        (PreActBottleneckBlock(4, 2, shortcut_pool="subsample"), (4, 7, 6, 16), (4, 4, 3, 16)),
        (ResidualBlock(7, 2, shortcut_pool="pad"), (4, 7, 6, 4), (4, 4, 3, 7)),
        (BottleneckBlock(4, shortcut_pool="pad"), (4, 7, 6, 3), (4, 7, 6, 16)),
        (ResidualBlock(2, 2, use_shortcut=False), (4, 7, 6, 4), (4, 4, 3, 2)),
        (PaddedShortcut(5, 3), (4, 7, 6, 5), (4, 3, 2, 5)),
        (SqueezeExcitation(), (4, 7, 6, 16), (4, 7, 6, 16)),
        (EdgePadding2D(), (4, 7, 6, 16), (4, 9, 8, 16)),
    ],
)
def test_output_shape(block, shape, expected):
    assert tuple(block(normal(*shape)).shape) == expected
    assert block.compute_output_shape(shape) == expected


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 17),
    width=st.integers(1, 17),
    channels=st.integers(1, 4),
    filters=st.integers(1, 4),
    strides=st.integers(1, 3),
    kind=st.sampled_from(FOUR_BLOCKS),
    options=st.fixed_dictionaries(
        {},
        optional={
            "shortcut_pool": st.sampled_from(["average", "subsample"]),
            "se_reduction": st.just(2),
            "stride_on_1x1": st.booleans(),
            "stochastic_depth": st.just(0.5),
            "use_bias": st.sampled_from([True, False, "unnormalized"]),
        },
    ),
)
def test_computed_shape_is_the_real_one(height, width, channels, filters, strides, kind, options):
    shape = (2, height, width, channels)
    block = kind(filters, strides, use_1x1conv=True, **options)
    computed = block.compute_output_shape(shape)
    assert computed == tuple(block(np.ones(shape, "float32")).shape)
    outputs = filters * kind.expansion
    assert computed == (2, -(-height // strides), -(-width // strides), outputs)
    assert block.compute_output_shape((None, None, None, channels)) == (None, None, None, outputs)


def test_one_model_takes_any_batch_height_and_width():
    inputs = keras.Input((None, None, 3))
    x = ResidualBlock(4, strides=2, use_1x1conv=True)(inputs)
    model = keras.Model(inputs, ResidualBlock(4)(x))
    assert model.output_shape == (None, None, None, 4)
    for batch, height, width in ((1, 8, 8), (3, 7, 10), (2, 1, 1)):
        expected = (batch, (height + 1) // 2, (width + 1) // 2, 4)
        assert model(normal(batch, height, width, 3)).shape == expected
        assert model.predict(normal(batch, height, width, 3), verbose=0).shape == expected


@pytest.mark.parametrize("strides", [1, 2])
def test_blocks_are_channels_last_whatever_the_configuration(strides):
    keras.config.set_image_data_format("channels_first")
    try:
        block = ResidualBlock(5, strides, use_1x1conv=True)
        assert block(normal(2, 6, 4, 3)).shape == (2, 6 // strides, 4 // strides, 5)
    finally:
        keras.config.set_image_data_format("channels_last")


# Numbers


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("zero", ["the last gamma, as it starts", "every convolution's weights"])
def test_block_with_a_zero_branch_is_the_identity_on_what_a_relu_gives(zero, training):
    """Answers exercise 4 of d2l: a block contains the identity if x comes out of a ReLU.

    With its branch at zero the block computes relu(0 + x). That is x, exactly, where x >= 0, as
    any output of a ReLU is, and so the input of every block in the network: it follows the stem's
    ReLU or another block's. A negative number it cannot pass on.
    """
    x = np.abs(normal(4, 6, 6, 3))
    block = ResidualBlock(3, zero_init_residual=zero.startswith("the last gamma"))
    block.build(x.shape)
    if zero.startswith("every convolution"):
        assert np.abs(block(x) - x).max() > 0.1  # a block that starts as usual is no identity
        for conv in (block.conv1, block.conv2):
            conv.set_weights([np.zeros_like(w) for w in conv.get_weights()])
    np.testing.assert_array_equal(block(x, training=training), x)
    np.testing.assert_array_equal(block(-x, training=training), np.zeros_like(x))


def test_new_dense_block_is_the_identity_on_what_a_relu_gives():
    x = np.abs(normal(4, 24))
    np.testing.assert_array_equal(DenseResidualBlock(24)(x), x)


def test_training_argument():
    block, x = ResidualBlock(3), 3 * normal(8, 6, 6, 3) + 1
    block.build(x.shape)
    fresh = moving_statistics(block)
    assert len(fresh) == 4
    inferred = np.array(block(x, training=False))
    np.testing.assert_array_equal(block(x), inferred)  # a bare call is inference
    np.testing.assert_equal(moving_statistics(block), fresh)

    trained = np.array(block(x, training=True))
    assert np.abs(trained - inferred).max() > 0.1
    for before, after in zip(fresh, moving_statistics(block), strict=True):
        assert np.abs(after - before).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "compute", "variable"),
    [("mixed_bfloat16", "bfloat16", "float32"), ("float64", "float64", "float64")],
)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda **kwargs: ResidualBlock(6, 2, use_1x1conv=True, **kwargs), (4, 6, 6, 3)),
        (lambda **kwargs: DenseResidualBlock(24, **kwargs), (4, 24)),
        (
            lambda **kwargs: PreActBottleneckBlock(
                6, 2, True, shortcut_pool="average", se_reduction=4, stochastic_depth=0.1, **kwargs
            ),
            (4, 6, 6, 3),
        ),
    ],
    ids=["ResidualBlock", "DenseResidualBlock", "PreActBottleneckBlock"],
)
@pytest.mark.parametrize("how", ["global policy", "dtype argument"])
def test_dtype_policy(policy, make, shape, name, compute, variable, how):
    if how == "global policy":
        policy(name)
        block = make()
    else:
        block = make(dtype=name)
    output = block(normal(*shape))
    assert keras.backend.standardize_dtype(output.dtype) == compute
    assert {w.dtype for w in block.weights} == {variable}


def test_no_two_kernels_start_with_the_same_numbers():
    block = ResidualBlock(4, use_1x1conv=True)
    block.build((1, 6, 6, 4))
    twin = ResidualBlock(4)
    twin.build((1, 6, 6, 4))
    convs = [block.conv1, block.conv2, block.shortcut_conv, twin.conv1, twin.conv2]
    starts = [ops.convert_to_numpy(conv.kernel).ravel()[:16] for conv in convs]
    for i, first in enumerate(starts):
        for second in starts[:i]:
            assert np.abs(first - second).max() > 1e-3


def test_kernels_start_with_the_variance_of_pytorch():
    """PyTorch's default is uniform in ±1/sqrt(fan_in), the variance of which is 1/(3 fan_in)."""
    block = ResidualBlock(64, use_1x1conv=True)
    block.build((1, 6, 6, 64))
    for conv, fan_in in ((block.conv1, 576), (block.conv2, 576), (block.shortcut_conv, 64)):
        kernel = ops.convert_to_numpy(conv.kernel)
        assert np.abs(kernel).max() <= fan_in**-0.5 * (1 + 1e-6)
        # 4,096 uniform numbers or more: the standard error of their variance is 1.4 % or less.
        assert kernel.var() == pytest.approx(1 / (3 * fan_in), rel=0.07)
        assert kernel.mean() == pytest.approx(0, abs=0.06 * fan_in**-0.5)


def test_batch_norm_has_the_constants_of_pytorch():
    block = ResidualBlock(3)
    assert {(bn.epsilon, bn.momentum) for bn in (block.bn1, block.bn2)} == {(1e-5, 0.9)}


# The four blocks and their options, against their definitions


def random_weights(block, shape):
    """Builds the block with weights and statistics as after training."""
    block.build(shape)
    rng = np.random.default_rng(0)
    block.set_weights([rng.uniform(0.2, 1.0, w.shape) - 0.4 * (w.ndim > 1) for w in block.weights])
    return block


def parts(block, *names):
    """Returns a function that applies the block's parts of these names, one after the other."""

    def apply(x):
        for name in names:
            x = getattr(block, name)(x)
        return x

    return apply


def test_a_bottleneck_is_three_convolutions_each_normalised():
    block = random_weights(BottleneckBlock(3, 2, True, shortcut_norm=True), (2, 7, 7, 5))
    x = normal(2, 7, 7, 5)
    names = ("conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3", "bn3")
    expected = ops.relu(parts(block, *names)(x) + parts(block, "shortcut_conv", "shortcut_bn")(x))
    np.testing.assert_allclose(block(x), expected, rtol=1e-6)
    assert [conv.kernel_size[0] for conv in (block.conv1, block.conv2, block.conv3)] == [1, 3, 1]
    assert [conv.filters for conv in (block.conv1, block.conv2, block.conv3)] == [3, 3, 12]


@pytest.mark.parametrize(("project", "channels"), [(True, 5), (False, 12)])
def test_a_pre_activated_block_normalises_first_and_adds_last(project, channels):
    block = random_weights(PreActBottleneckBlock(3, 1, project), (2, 7, 7, channels))
    x = normal(2, 7, 7, channels)
    entered = parts(block, "bn1", "relu1")(x)
    branch = parts(block, "conv1", "bn2", "relu2", "conv2", "bn3", "relu3", "conv3")(entered)
    # The projection takes the branch's input, the identity the block's.
    expected = branch + (block.shortcut_conv(entered) if project else x)
    np.testing.assert_allclose(block(x), expected, rtol=1e-5, atol=1e-5)
    block.conv3.bias.assign(block.conv3.bias - 100)
    assert np.max(block(x)) < 0  # no ReLU behind the sum


@pytest.mark.parametrize("kind", [PreActResidualBlock, PreActBottleneckBlock])
def test_a_pre_activated_block_with_a_zero_branch_is_the_identity_on_anything(kind):
    x = normal(4, 6, 6, 8)
    block = kind(8 // kind.expansion, zero_init_residual=True)
    np.testing.assert_array_equal(block(x), x)
    np.testing.assert_array_equal(block(x, training=True), x)


@pytest.mark.parametrize("on_1x1", [False, True])
def test_the_stride_of_a_bottleneck_stands_where_it_is_asked_for(on_1x1):
    block = BottleneckBlock(3, 2, True, stride_on_1x1=on_1x1)
    strides = [conv.strides[0] for conv in (block.conv1, block.conv2, block.conv3)]
    assert strides == ([2, 1, 1] if on_1x1 else [1, 2, 1])


@pytest.mark.parametrize(
    ("kind", "use_bias", "biased"),
    [
        (BottleneckBlock, True, ["conv1", "conv2", "conv3", "shortcut_conv"]),
        (BottleneckBlock, False, []),
        (BottleneckBlock, "unnormalized", ["shortcut_conv"]),
        (PreActBottleneckBlock, "unnormalized", ["conv3", "shortcut_conv"]),
        (PreActResidualBlock, "unnormalized", ["conv2", "shortcut_conv"]),
    ],
)
def test_biases_stand_where_they_are_asked_for(kind, use_bias, biased):
    block = kind(4, 1, True, use_bias=use_bias)
    block.build((1, 6, 6, 3))
    assert {w.path.split("/")[-2] for w in block.weights if w.path.endswith("bias")} == set(biased)


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize(
    ("pool", "reduce"),
    [
        ("average", torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)),
        ("subsample", lambda x: x[:, :, ::2, ::2]),
    ],
)
def test_a_pooled_shortcut_is_what_others_compute(pool, reduce, size):
    block = ResidualBlock(3, 2, shortcut_pool=pool)
    x = normal(2, size, size, 3)
    theirs = reduce(torch.from_numpy(x.transpose(0, 3, 1, 2))).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(block.shortcut_reduce(x), theirs, rtol=1e-6)
    assert block(x).shape == theirs.shape
    # The convolution behind it has no stride of its own left.
    assert ResidualBlock(3, 2, True, shortcut_pool=pool).shortcut_conv.strides == (1, 1)


@pytest.mark.parametrize(("channels", "before"), [(3, 0), (4, 0), (5, 1), (8, 2)])
def test_a_shortcut_without_parameters_adds_channels_of_zeros(channels, before):
    x = normal(2, 5, 6, 3)
    shortcut = PaddedShortcut(channels, 2)(x).numpy()
    assert shortcut.shape == (2, 3, 3, channels)
    np.testing.assert_array_equal(shortcut[..., before : before + 3], x[:, ::2, ::2])
    assert np.count_nonzero(shortcut) == 2 * 3 * 3 * 3
    block = ResidualBlock(channels, 2, shortcut_pool="pad", zero_init_residual=True)
    np.testing.assert_array_equal(block(x), np.maximum(shortcut, 0))


def test_a_shortcut_without_parameters_drops_no_channel():
    with pytest.raises(InputError, match="at most `filters` 2, got 3"):
        ResidualBlock(2, shortcut_pool="pad")(normal(2, 5, 6, 3))


def test_a_block_without_a_shortcut_is_its_branch():
    plain, x = ResidualBlock(3, use_shortcut=False), normal(2, 5, 6, 3)
    found = plain(x)
    branch = x
    for layer in plain.branch:
        branch = layer(branch)
    assert plain.shortcut == []
    np.testing.assert_array_equal(found, np.maximum(branch, 0))


def test_grouped_convolution_is_that_of_pytorch():
    conv = random_weights(PaddedConv2D(8, 3, 2, groups=4), (2, 7, 7, 12))
    x = normal(2, 7, 7, 12)
    kernel, bias = (torch.from_numpy(np.array(w)) for w in conv.weights)
    theirs = torch.nn.functional.conv2d(
        torch.from_numpy(x.transpose(0, 3, 1, 2)),
        kernel.permute(3, 2, 0, 1),
        bias,
        stride=2,
        padding=1,
        groups=4,
    )
    np.testing.assert_allclose(conv(x), theirs.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [6, 7])
def test_edge_padding_under_max_pooling_is_pytorchs_pooling_of_negative_pixels(size):
    x = normal(2, size, size, 3) - 5
    assert x.max() < 0
    theirs = torch.nn.MaxPool2d(3, 2, padding=1)(torch.from_numpy(x.transpose(0, 3, 1, 2)))
    ours = keras.layers.MaxPooling2D(3, 2)(EdgePadding2D()(x))
    np.testing.assert_array_equal(ours, theirs.permute(0, 2, 3, 1))


def test_squeeze_and_excitation_weighs_each_channel_by_the_image():
    layer = random_weights(SqueezeExcitation(2), (2, 5, 4, 32))
    x = normal(2, 5, 4, 32)
    w1, b1, w2, b2 = (np.array(w) for w in layer.weights)
    assert (w1.shape, w2.shape) == ((32, 16), (16, 32))
    hidden = np.maximum(x.mean(axis=(1, 2)) @ w1 + b1, 0)
    weights = 1 / (1 + np.exp(-(hidden @ w2 + b2)))
    np.testing.assert_allclose(layer(x), x * weights[:, None, None], rtol=1e-5, atol=1e-6)
    assert np.ptp(weights) > 0.1


def test_squeeze_and_excitation_keeps_eight_units():
    layer = SqueezeExcitation(16)
    layer.build((None, 5, 5, 64))
    assert layer.fc1.units == 8


def test_squeeze_and_excitation_is_part_of_the_branch():
    block = random_weights(ResidualBlock(8, se_reduction=2), (2, 6, 6, 8))
    x = normal(2, 6, 6, 8)
    branch = parts(block, "conv1", "bn1", "relu1", "conv2", "bn2", "se")(x)
    np.testing.assert_allclose(block(x), ops.relu(branch + x), rtol=1e-5, atol=1e-5)


def test_stochastic_depth_drops_whole_branches_in_training_alone():
    keras.utils.set_random_seed(0)
    rate = 0.3
    block = random_weights(PreActResidualBlock(4, stochastic_depth=rate), (2, 6, 6, 4))
    twin = PreActResidualBlock(4)
    twin.build((2, 6, 6, 4))
    twin.set_weights(block.get_weights())
    x = normal(400, 6, 6, 4)
    np.testing.assert_array_equal(block(x), twin(x))

    for layer in (block, twin):  # the same branch in training: nothing but the drop is random
        layer.bn1.trainable = layer.bn2.trainable = False
    branch = np.array(twin(x, training=True)) - x
    dropped = np.abs(np.array(block(x, training=True)) - x).max(axis=(1, 2, 3)) == 0
    kept = np.array(block(x, training=True)) - x
    share = dropped.mean()
    assert share == pytest.approx(rate, abs=4 * np.sqrt(rate * (1 - rate) / 400))
    alive = np.abs(kept).max(axis=(1, 2, 3)) > 0
    assert 0 < alive.sum() < 400
    np.testing.assert_allclose(kept[alive], branch[alive] / (1 - rate), rtol=1e-3, atol=1e-3)


# Saving

EVERY_ARGUMENT = [
    ResidualBlock(
        6,
        strides=2,
        use_1x1conv=True,
        use_bias=False,
        shortcut_norm=True,
        zero_init_residual=True,
        kernel_initializer="he_normal",
        name="all",
        dtype="mixed_bfloat16",
        trainable=False,
    ),
    ResidualBlock(3),
    PreActBottleneckBlock(
        4,
        groups=2,
        width_per_group=96,
        shortcut_pool="average",
        stride_on_1x1=True,
        se_reduction=4,
        stochastic_depth=0.25,
        norm_epsilon=1e-3,
        name="bottleneck",
    ),
    SqueezeExcitation(4, name="se", dtype="float64"),
    EdgePadding2D(name="edge"),
    PaddedShortcut(4, 2, name="shortcut"),
    ResidualBlock(4, 2, shortcut_pool="pad", name="pad"),
    ResidualBlock(4, 2, use_shortcut=False, name="plain"),
    DenseResidualBlock(3, use_bias=False, name="dense", dtype="float64", trainable=False),
    PaddedConv2D(4, 5, strides=3, use_bias=False, activation="relu", name="conv"),
]


@pytest.mark.parametrize("layer", EVERY_ARGUMENT, ids=lambda layer: layer.name)
def test_config_makes_the_same_layer(layer):
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(restored) is type(layer)
    assert restored.get_config() == config


def test_config_holds_every_argument():
    config = EVERY_ARGUMENT[0].get_config()
    initializer = config.pop("kernel_initializer")
    assert initializer["class_name"] == "HeNormal"
    assert config.pop("dtype")["config"] == {"name": "mixed_bfloat16"}
    assert config == {
        "name": "all",
        "trainable": False,
        "filters": 6,
        "strides": 2,
        "use_1x1conv": True,
        "use_bias": False,
        "shortcut_norm": True,
        "shortcut_pool": None,
        "use_shortcut": True,
        "zero_init_residual": True,
        "stride_on_1x1": False,
        "groups": 1,
        "width_per_group": 64,
        "se_reduction": None,
        "stochastic_depth": 0.0,
        "norm_epsilon": 1e-5,
    }


LOAD = """
import sys, keras, numpy as np
import keras_resnet
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[2], model(np.load(sys.argv[2])))
"""


@pytest.mark.slow
def test_saved_model_gives_the_same_numbers_in_a_new_process(tmp_path):
    inputs = keras.Input((6, 6, 3))
    x = ResidualBlock(6, 2, True, shortcut_norm=True, use_bias=False)(inputs)
    x = BottleneckBlock(4, 1, True, groups=2, width_per_group=64, se_reduction=2)(x)
    x = PreActBottleneckBlock(4, stochastic_depth=0.5)(x)
    x = PreActResidualBlock(6, 1, True, shortcut_pool="average")(x)
    x = keras.layers.Flatten()(ResidualBlock(6, zero_init_residual=True)(x))
    model = keras.Model(inputs, DenseResidualBlock(54)(x))
    model.compile("sgd", "mse")
    model.fit(normal(8, 6, 6, 3), normal(8, 54), verbose=0)  # no weight stays as it starts
    model.save(tmp_path / "model.keras")

    x = normal(4, 6, 6, 3, seed=1)
    expected = np.array(model(x))
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(x), expected)
    for layer, again in zip(model.layers, loaded.layers, strict=True):
        assert again.get_config() == layer.get_config()

    # The new process imports keras_resnet and touches nothing in it.
    np.save(tmp_path / "x.npy", x)
    subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "model.keras", tmp_path / "x.npy"], check=True
    )
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected, rtol=1e-6, atol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("arguments", "shape", "shapes"),
    [
        ({"filters": 6}, (4, 6, 6, 3), ["(4, 6, 6, 6)", "(4, 6, 6, 3)"]),
        ({"filters": 3, "strides": 2}, (4, 6, 6, 3), ["(4, 3, 3, 3)", "(4, 6, 6, 3)"]),
        # These would broadcast silently, the branch over the channels, then over the pixels.
        ({"filters": 1}, (4, 6, 6, 3), ["(4, 6, 6, 1)", "(4, 6, 6, 3)"]),
        ({"filters": 3, "strides": 2}, (4, 2, 2, 3), ["(4, 1, 1, 3)", "(4, 2, 2, 3)"]),
        # With unknown sizes both shapes read the same; the stride tells that they cannot be.
        ({"filters": 3, "strides": 2}, (None, None, None, 3), ["(None, None, None, 3)"]),
        ({"filters": 3, "strides": 2}, (None, None, 6, 3), ["(None, None, 3, 3)"]),
        ({"filters": 6}, (None, None, None, 3), ["(None, None, None, 6)", "(None, None, None, 3)"]),
    ],
)
def test_paths_that_do_not_fit_are_an_error_with_both_shapes(arguments, shape, shapes):
    with pytest.raises(InputError) as error:
        ResidualBlock(**arguments).build(shape)
    for part in (*shapes, "use_1x1conv"):
        assert part in str(error.value)
    assert ResidualBlock(**arguments, use_1x1conv=True).compute_output_shape(shape)


def test_paths_that_do_not_fit_are_an_error_in_a_call_and_in_a_functional_model():
    for x in (normal(4, 6, 6, 3), keras.Input((None, None, 3))):
        with pytest.raises(ValueError, match="use_1x1conv"):
            ResidualBlock(6)(x)


@pytest.mark.parametrize("width", [1, 12, 25])
def test_dense_block_refuses_another_width(width):
    with pytest.raises(ValueError, match=rf"24\).*{width}\).*units"):
        DenseResidualBlock(24)(normal(4, width))


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 6), (4, 6, 6, 6, 3)])
def test_wrong_rank_is_an_error_with_the_shape(shape):
    with pytest.raises(InputError) as error:
        ResidualBlock(shape[-1])(normal(*shape))
    assert str(shape) in str(error.value)


def test_unknown_channels_are_an_error():
    with pytest.raises(InputError, match="must be known"):
        ResidualBlock(3).build((None, 6, 6, None))


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None, True, (2, 2)])
@pytest.mark.parametrize("argument", ["filters", "strides"])
def test_bad_counts_are_an_error_with_rule_and_value(argument, value):
    with pytest.raises(InputError) as error:
        ResidualBlock(**{"filters": 3, argument: value})
    assert f"`{argument}` must be a whole number of at least 1, got {value!r}" == str(error.value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_units_are_an_error(value):
    with pytest.raises(InputError, match="`units` must be a whole number"):
        DenseResidualBlock(value)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ResidualBlock, {"groups": 2}, "basic block takes `groups` 1 .*got 2 and 64"),
        (PreActResidualBlock, {"width_per_group": 128}, "got 1 and 128"),
        (BottleneckBlock, {"groups": 0}, "`groups` must be a whole number"),
        (BottleneckBlock, {"use_bias": "some"}, "`use_bias` must be True, False or .*'some'"),
        (BottleneckBlock, {"shortcut_pool": "max"}, "`shortcut_pool` must be None or .*'max'"),
        (BottleneckBlock, {"shortcut_pool": "pad", "use_1x1conv": True}, "must be False where"),
        (ResidualBlock, {"use_shortcut": False, "use_1x1conv": True}, "must be False .*got True"),
        (ResidualBlock, {"use_shortcut": False, "stochastic_depth": 0.1}, "needs a shortcut.*0.1"),
        (ResidualBlock, {"use_shortcut": False, "zero_init_residual": True}, "needs a shortcut"),
        (BottleneckBlock, {"stochastic_depth": 1.0}, "`stochastic_depth` must be .*got 1.0"),
        (BottleneckBlock, {"stochastic_depth": -0.1}, "`stochastic_depth` must be .*got -0.1"),
        (BottleneckBlock, {"width_per_group": 1}, "must be at least 64, .*got 4 and 1"),
        (BottleneckBlock, {"se_reduction": 0}, "`reduction` must be a whole number"),
    ],
)
def test_arguments_out_of_range_are_an_error(kind, arguments, message):
    with pytest.raises(InputError, match=message):
        kind(4, **arguments)


def test_even_kernels_are_an_error():
    with pytest.raises(InputError, match="`kernel_size` must be odd, got 2"):
        PaddedConv2D(3, 2)


# Maps of one pixel, where only the middle of a kernel is used


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (2, 1)])
def test_a_map_of_one_pixel_gives_the_numbers_of_the_whole_kernel(size):
    layer = PaddedConv2D(4, 3)
    x = keras.random.normal((2, *size, 3))
    layer.build(x.shape)
    with tf.GradientTape(persistent=True) as tape:
        ours = tf.reduce_sum(layer(x) ** 2)
        whole = keras.ops.conv(x, layer.kernel.value, padding="same", data_format="channels_last")
        theirs = tf.reduce_sum((whole + layer.bias.value) ** 2)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    gradients = [tape.gradient(loss, layer.kernel.value).numpy() for loss in (ours, theirs)]
    assert np.any(gradients[0]) and np.any(gradients[0] == 0)
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-5)


# Frozen layers

FROZEN = {
    "a block": lambda block: setattr(block, "trainable", False),
    "one normalisation": lambda block: setattr(block.bn1, "trainable", False),
    "all of a block but one": lambda block: (
        setattr(block, "trainable", False),
        setattr(block.bn2, "trainable", True),
    ),
    "a layer of a layer": lambda block: setattr(block.se.fc1, "trainable", False),
    "a layer of a frozen layer": lambda block: (
        setattr(block.se, "trainable", False),
        setattr(block.se.fc2, "trainable", True),
    ),
}


def trainability(model):
    """Returns `trainable` of each layer of a model, and the paths of the trainable weights."""
    layers = model._flatten_layers(include_self=False)
    flags = {layer.name: layer.trainable for layer in layers}
    return flags, [weight.path for weight in model.trainable_weights]


@pytest.mark.parametrize("case", FROZEN)
def test_what_is_frozen_stays_so_in_a_file_and_in_a_copy(case, tmp_path):
    inputs = keras.Input((8, 8, 4))
    block = BottleneckBlock(4, use_1x1conv=True, se_reduction=2, shortcut_norm=True, name="block")
    model = keras.Model(inputs, block(inputs))
    FROZEN[case](block)
    before = trainability(model)
    assert len(before[1]) < len(block.get_weights()) - 8  # the eight are moving statistics
    for path in (tmp_path / "first.keras", tmp_path / "second.keras"):
        model.save(path)
        model = keras.models.load_model(path)
        assert trainability(model) == before
    assert trainability(keras.models.clone_model(model)) == before


@pytest.mark.parametrize("case", FROZEN)
def test_a_loaded_block_is_unfrozen_as_a_new_one_is(case):
    def build():
        block = BottleneckBlock(4, use_1x1conv=True, se_reduction=2, name="block")
        FROZEN[case](block)
        return block

    blocks = [build(), BottleneckBlock.from_config(build().get_config())]
    for block in blocks:
        block.trainable = False
        block.trainable = True
        block.build((None, 8, 8, 4))
    assert trainability(blocks[0]) == trainability(blocks[1])
    assert all(trainability(blocks[1])[0].values())


def test_a_block_made_frozen_trains_nothing():
    for block in (ResidualBlock(4, trainable=False), SqueezeExcitation(trainable=False)):
        before = block(keras.random.normal((2, 6, 6, 4)))
        assert not block.trainable_weights
        assert not any(weight.trainable for weight in block.weights)
        after = block(keras.random.normal((2, 6, 6, 4)), training=True)
        assert before.shape == after.shape


def test_fit_leaves_a_loaded_frozen_block_as_it_is(tmp_path):
    spec = keras_resnet.Spec((1, 1), (4, 8))
    network = keras_resnet.build_resnet(spec, (8, 8, 1), 2, stem="small")
    for name in ("stem_conv", "stem_bn", "stage1_block1"):
        network.get_layer(name).trainable = False
    network.get_layer("stage2_block1").bn1.trainable = False
    network.save(tmp_path / "network.keras")
    loaded = keras.models.load_model(tmp_path / "network.keras")
    before = {weight.path: np.array(weight) for weight in loaded.weights}
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    loaded.compile(keras.optimizers.SGD(0.5), loss)
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(8, 8, 8, 1)), rng.integers(0, 2, 8)
    loaded.fit(images.astype("float32"), labels, verbose=0)
    kept = ("stem_", "stage1_", "stage2_block1/bn1")
    for weight in loaded.weights:
        same = np.array_equal(before[weight.path], weight)
        # A bias before a normalisation has no gradient but rounding.
        if not weight.path.endswith("bias"):
            assert same == weight.path.startswith(kept), weight.path
