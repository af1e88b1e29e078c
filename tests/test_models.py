"""The networks: the shapes of d2l, parameter counts, names, errors, and the dense network."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import ops
from torch_reference import ResNet18, dense_resnet

from keras_resnet.blocks import (
    DenseResidualBlock,
    PreActBottleneckBlock,
    PreActResidualBlock,
    ResidualBlock,
)
from keras_resnet.models import (
    SPECS,
    STEMS,
    VARIANTS,
    Spec,
    build_dense_resnet,
    build_resnet,
    build_resnet18,
    build_resnet34,
    build_resnet50,
    build_resnet101,
    build_resnet152,
    count_parameters,
    last_map_size,
    residual_stage,
    summarize_shapes,
)
from keras_resnet.utils.errors import InputError

TINY = Spec((1, 1), (4, 8))


@pytest.fixture(scope="module")
def resnet18():
    return build_resnet18((None, None, 1))


# Shapes


@pytest.mark.parametrize(
    ("size", "sizes"), [(224, (56, 56, 28, 14, 7)), (96, (24, 24, 12, 6, 3)), (28, (7, 7, 4, 2, 1))]
)
def test_walk_through_resnet18_has_the_shapes_that_d2l_prints(resnet18, size, sizes):
    modules = ("stem", "stage1", "stage2", "stage3", "stage4")
    walk = [
        (module, (1, side, side, filters))
        for module, side, filters in zip(modules, sizes, (64, 64, 128, 256, 512), strict=True)
    ]
    walk += [("global_avg_pool", (1, 512)), ("logits", (1, 10))]
    rows = summarize_shapes(resnet18, (1, size, size, 1))
    assert [(row["module"], row["output_shape"]) for row in rows] == walk
    counts = [row["parameters"] for row in rows]
    assert counts == [3328, 148224, 525952, 2100480, 8395264, 0, 5130]


def test_summary_shapes_are_those_of_a_real_image(resnet18):
    rows = {
        row["module"]: row["output_shape"] for row in summarize_shapes(resnet18, (2, 33, 50, 1))
    }
    for module, layer in (("stem", "stem_pool"), ("stage3", "stage3_block2"), ("logits", "logits")):
        part = keras.Model(resnet18.input, resnet18.get_layer(layer).output)
        assert tuple(part(np.zeros((2, 33, 50, 1), "float32")).shape) == rows[module]


@pytest.mark.parametrize(
    "shape", [(1, 224, 224, 3), (224, 224, 1), (1, 0, 224, 1), (1, None, 224, 1), (1, 9.5, 9, 1)]
)
def test_summary_refuses_a_shape_that_does_not_fit(resnet18, shape):
    with pytest.raises(InputError) as error:
        summarize_shapes(resnet18, shape)
    assert str(shape) in str(error.value)


def test_small_stem_keeps_the_size():
    model = build_resnet18((32, 32, 3), stem="small")
    rows = {row["module"]: row["output_shape"] for row in summarize_shapes(model, (1, 32, 32, 3))}
    assert rows["stem"] == rows["stage1"] == (1, 32, 32, 64)
    assert rows["stage4"] == (1, 4, 4, 512)


# Counts and names


@pytest.mark.parametrize(
    ("build", "arguments", "count"),
    [
        (build_resnet18, {}, 11_178_378),
        # Published weights' counts, of torchvision's resnet18 and resnet34.
        (build_resnet18, {"input_shape": (64, 64, 3), "num_classes": 1000}, 11_689_512),
        (build_resnet34, {"input_shape": (64, 64, 3), "num_classes": 1000}, 21_797_672),
        (build_resnet50, {"input_shape": (64, 64, 3), "num_classes": 1000}, 25_557_032),
        (build_resnet101, {"input_shape": (64, 64, 3), "num_classes": 1000}, 44_549_160),
        pytest.param(
            build_resnet152,
            {"input_shape": (64, 64, 3), "num_classes": 1000},
            60_192_808,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_parameter_count(build, arguments, count):
    if arguments:
        arguments = {**arguments, "variant": "torchvision"}
    model = build(**arguments)
    assert count_parameters(model) == count
    assert sum(
        row["parameters"] for row in summarize_shapes(model, (1, *model.input_shape[1:]))
    ) == (count)


# The counts that the publishers of these networks give, of timm and torchvision.
COUNTS = {
    "resnet18d": 11_708_744,
    "resnet50d": 25_576_264,
    "seresnet50": 28_088_024,
    "resnext50_32x4d": 25_028_904,
    "resnext101_32x8d": 88_791_336,
    "wide_resnet50_2": 68_883_240,
    "wide_resnet101_2": 126_886_696,
}

# He et al. 2016a, table 6, in millions: 0.27, 0.46, 0.66, 0.85, 1.7.
CIFAR_COUNTS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "101" in n else ()) for n in COUNTS]
)
def test_parameter_count_of_the_relatives(name):
    model = build_resnet(name, (64, 64, 3), 1000, variant="torchvision")
    assert count_parameters(model) == COUNTS[name]


@pytest.mark.parametrize("name", CIFAR_COUNTS)
def test_parameter_count_of_the_networks_for_cifar(name):
    model = build_resnet(name, (32, 32, 3), variant="cifar")
    assert count_parameters(model) == CIFAR_COUNTS[name]
    assert [row["output_shape"] for row in summarize_shapes(model, (1, 32, 32, 3))] == [
        *((1, 32, 32, 16), (1, 32, 32, 16), (1, 16, 16, 32), (1, 8, 8, 64), (1, 64), (1, 10)),
    ]
    # Convolutions and the last Dense layer: its depth.
    depth = sum(path.endswith("/kernel") for path in (v.path for v in model.weights))
    assert depth == int(name.removeprefix("resnet"))


def test_the_plain_network_has_the_same_parameters():
    plain, residual = (
        build_resnet("resnet20", (32, 32, 3), variant=variant) for variant in ("plain", "cifar")
    )
    assert [v.path for v in plain.weights] == [v.path for v in residual.weights]
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    plain.set_weights(residual.get_weights())
    assert np.abs(plain(images) - residual(images)).max() > 1e-3
    # Without weights in the branches, nothing reaches the logits but the head's bias.
    for variable in plain.weights:
        if variable.path.endswith("gamma") and "block" in variable.path:
            variable.assign(np.zeros(variable.shape))
    np.testing.assert_array_equal(plain(images)[0], plain(images)[1])


def test_parameter_count_is_what_pytorch_counts():
    counted = sum(
        parameter.numel() for parameter in ResNet18().parameters() if parameter.requires_grad
    )
    assert counted == 11_178_378


def test_layers_are_named_like_the_chapter():
    model = build_resnet18()
    assert model.name == "resnet18"
    assert [layer.name for layer in model.layers] == [
        "features",
        *(f"stem_{part}" for part in ("conv", "bn", "relu", "pad", "pool")),
        *(f"stage{stage}_block{block}" for stage in (1, 2, 3, 4) for block in (1, 2)),
        "global_avg_pool",
        "logits",
    ]
    names = [layer.name for layer in build_resnet34().layers]
    stages = [sum(name.startswith(f"stage{stage}_") for name in names) for stage in (1, 2, 3, 4)]
    assert stages == [3, 4, 6, 3]


def test_a_variant_reaches_every_block():
    model = build_resnet(TINY, (16, 16, 3), variant="torchvision", zero_init_residual=True)
    blocks = [layer for layer in model.layers if isinstance(layer, ResidualBlock)]
    assert len(blocks) == 2
    assert not [weight.path for weight in model.weights if "conv/bias" in weight.path]
    for block in blocks:
        assert not block.use_bias
        assert block.shortcut_norm
        np.testing.assert_array_equal(block.bn2.gamma, 0)
    assert blocks[1].shortcut_bn is not None


def test_a_network_that_starts_with_identities_is_its_stem_and_its_shortcuts():
    """With the residual branches at zero only stem and shortcuts are left, as one can compute."""
    model = build_resnet(TINY, (16, 16, 1), zero_init_residual=True)
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 1)).astype("float32")
    stem = keras.Model(model.input, model.get_layer("stem_pool").output)(x)
    shortcut = ops.relu(model.get_layer("stage2_block1").shortcut_conv(stem))
    expected = model.get_layer("logits")(ops.mean(shortcut, axis=(1, 2)))
    np.testing.assert_allclose(model(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("policy", "weights", "logits"),
    [
        ("float32", "float32", "float32"),
        ("mixed_bfloat16", "float32", "float32"),
        ("float16", "float16", "float32"),
        ("bfloat16", "bfloat16", "float32"),
        ("float64", "float64", "float64"),
    ],
)
def test_logits_are_never_in_half_precision(policy, weights, logits):
    keras.config.set_dtype_policy(policy)
    try:
        model = build_resnet(TINY, (16, 16, 1))
        dense = build_dense_resnet(num_blocks=1)
    finally:
        keras.config.set_dtype_policy("float32")
    output = model(np.ones((1, 16, 16, 1)))
    assert keras.backend.standardize_dtype(output.dtype) == logits
    assert model.get_layer("stage1_block1").compute_dtype == policy.removeprefix("mixed_")
    head = model.get_layer("logits").weights
    assert {weight.dtype for weight in head} == {logits}
    assert {weight.dtype for weight in model.weights[: -len(head)]} == {weights}
    assert {weight.dtype for weight in dense.weights} == {weights}


def test_specs_are_data():
    assert {
        name: spec.blocks for name, spec in SPECS.items() if name in ("resnet18", "resnet34")
    } == {
        "resnet18": (2, 2, 2, 2),
        "resnet34": (3, 4, 6, 3),
    }
    with pytest.raises(InputError, match="one number each per stage"):
        Spec((2, 2), (64,))
    with pytest.raises(InputError, match="`block` must be one of basic, bottleneck, got 'wide'"):
        Spec((2,), (64,), "wide")
    with pytest.raises(InputError, match="at least one stage"):
        Spec((), ())
    with pytest.raises(InputError, match=r"one number each per stage.*got 2 and"):
        Spec(2)
    with pytest.raises(InputError, match="must be a whole number of at least 1, got 0"):
        Spec((1, 1), (8, 0))


# The family: variants, stems, and the outputs of a network


def test_pre_activation_moves_normalisation_from_the_stem_to_the_end():
    model = build_resnet(TINY, (32, 32, 3), variant="v2")
    assert [layer.name for layer in model.layers] == [
        *("features", "stem_conv", "stem_pad", "stem_pool", "stage1_block1", "stage2_block1"),
        *("final_bn", "final_relu", "global_avg_pool", "logits"),
    ]
    assert {type(layer) for layer in model.layers if "block" in layer.name} == {PreActResidualBlock}
    rows = summarize_shapes(model, (1, 32, 32, 3))
    modules = ["stem", "stage1", "stage2", "final", "global_avg_pool", "logits"]
    assert [row["module"] for row in rows] == modules


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_every_variant_builds_and_trains(variant, stem, block):
    spec = Spec((2, 2), (8, 16), block)
    model = build_resnet(spec, (None, None, 3), variant=variant, stem=stem)
    images = np.random.default_rng(0).normal(size=(4, 33, 32, 3)).astype("float32")
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        loss = tf.nn.sparse_softmax_cross_entropy_with_logits(np.arange(4), logits)
    variables = model.trainable_variables
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    for variable, gradient in zip(variables, gradients, strict=True):
        assert np.isfinite(gradient).all(), variable.path
        # A bias in front of a BatchNormalization has no gradient: the mean subtracts it again.
        assert np.abs(gradient).max() > 0 or variable.path.endswith("bias"), variable.path


def test_a_network_of_keras_applications_halves_in_the_last_block():
    model = build_resnet(Spec((2, 2, 2), (4, 8, 16), "bottleneck"), (32, 32, 3), variant="keras_v2")
    blocks = [layer for layer in model.layers if isinstance(layer, PreActBottleneckBlock)]
    assert [block.strides for block in blocks] == [1, 2, 1, 2, 1, 1]
    assert [block.use_1x1conv for block in blocks] == [True, False] * 3
    assert {block.norm_epsilon for block in blocks} == {1.001e-5}
    assert model.get_layer("final_bn").epsilon == 1.001e-5


def test_the_deep_stem_has_three_convolutions_of_half_and_whole_width():
    model = build_resnet("resnet18d", (64, 64, 3))
    convs = [model.get_layer(f"stem_conv{number}") for number in (1, 2, 3)]
    assert [(c.filters, c.kernel_size[0], c.strides[0]) for c in convs] == [
        *((32, 3, 2), (32, 3, 1), (64, 3, 1)),
    ]
    assert model.get_layer("stage2_block1").shortcut_pool == "average"
    # Another stem may be asked for.
    assert build_resnet("resnet18d", (64, 64, 3), stem="small").get_layer("stem_conv")


def test_stochastic_depth_grows_from_block_to_block():
    model = build_resnet(Spec((2, 2), (4, 8)), (32, 32, 3), stochastic_depth=0.2)
    blocks = [layer for layer in model.layers if isinstance(layer, ResidualBlock)]
    rates = [block.stochastic_depth for block in blocks]
    np.testing.assert_allclose(rates, [0.05, 0.1, 0.15, 0.2])


def test_without_a_top_the_last_stage_or_its_pooling_is_left():
    x = np.random.default_rng(0).normal(size=(2, 33, 32, 3)).astype("float32")
    ends = {}
    for pooling in (None, "avg", "max"):
        keras.utils.set_random_seed(0)
        model = build_resnet(TINY, (None, None, 3), include_top=False, pooling=pooling)
        ends[pooling] = np.array(model(x))
        assert not [layer.name for layer in model.layers if layer.name == "logits"]
    assert ends[None].shape == (2, 5, 4, 8)
    np.testing.assert_allclose(ends["avg"], ends[None].mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(ends["max"], ends[None].max(axis=(1, 2)))


def test_logits_may_follow_a_maximum():
    names = [layer.name for layer in build_resnet(TINY, (32, 32, 3), pooling="max").layers]
    assert names[-2:] == ["global_max_pool", "logits"]


@pytest.mark.parametrize("variant", ["d2l", "v2"])
def test_features_are_what_the_stages_give(variant):
    keras.utils.set_random_seed(0)
    model = build_resnet(TINY, (None, None, 3), 7, variant=variant, return_features=True)
    x = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype("float32")
    outputs = model(x)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "stage1": (2, 16, 16, 4),
        "stage2": (2, 8, 8, 8),
        "output": (2, 7),
    }
    for stage in (1, 2):
        part = keras.Model(model.input, model.get_layer(f"stage{stage}_block1").output)
        np.testing.assert_allclose(outputs[f"stage{stage}"], part(x), rtol=1e-5, atol=1e-6)
    # The same weights without the dict give the same logits.
    plain = build_resnet(TINY, (None, None, 3), 7, variant=variant)
    plain.set_weights(model.get_weights())
    np.testing.assert_allclose(outputs["output"], plain(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "resnet19"}, "`spec` must be one of resnet18, .*got 'resnet19'"),
        ({"spec": ["resnet18"]}, "`spec` must be one of"),
        ({"variant": "v9"}, "`variant` must be one of d2l, torchvision.*got 'v9'"),
        ({"stem": "big"}, "`stem` must be one of imagenet, small, deep, got 'big'"),
        ({"pooling": "sum"}, "`pooling` must be one of avg, max, got 'sum'"),
        ({"stochastic_depth": 1.5}, "`stochastic_depth` must be at least 0 .*got 1.5"),
        ({"stochastic_depth": -0.1}, "`stochastic_depth` .*got -0.1"),
        ({"stochastic_depth": "a"}, "`stochastic_depth` .*got 'a'"),
        ({"input_shape": (224, 224)}, r"`input_shape` must be .*got \(224, 224\)"),
        ({"input_shape": (1, 224, 224, 1)}, r"got \(1, 224, 224, 1\)"),
        ({"input_shape": (0, 224, 1)}, r"got \(0, 224, 1\)"),
        ({"input_shape": (224, -1, 1)}, r"got \(224, -1, 1\)"),
        ({"input_shape": (224, 224.0, 1)}, r"got \(224, 224.0, 1\)"),
        ({"input_shape": (224, 224, None)}, r"got \(224, 224, None\)"),
        ({"input_shape": 224}, "`input_shape` must be .*got 224"),
        ({"num_classes": 0}, "`num_classes` must be a whole number of at least 1, got 0"),
        ({"num_classes": 2.5}, "`num_classes` .*got 2.5"),
        ({"num_classes": True}, "`num_classes` .*got True"),
    ],
)
def test_bad_arguments_are_errors_with_rule_and_value(arguments, message):
    with pytest.raises(InputError, match=message):
        build_resnet(**{"spec": "resnet18", **arguments})


def test_a_stage_without_blocks_is_an_error():
    with pytest.raises(InputError, match=r"`num_blocks` .*got 0"):
        residual_stage(keras.Input((8, 8, 3)), 3, 0)


def test_a_stage_takes_one_rate_a_block_or_one_for_all():
    x = keras.Input((8, 8, 3))
    for rates, expected in ((0.5, [0.5, 0.5]), ([0.1, 0.2], [0.1, 0.2])):
        model = keras.Model(x, residual_stage(x, 3, 2, stochastic_depth=rates, name="stage1"))
        blocks = [model.get_layer(f"stage1_block{number}") for number in (1, 2)]
        assert [block.stochastic_depth for block in blocks] == expected
    with pytest.raises(InputError, match="one number per block, got 1 for 2 blocks"):
        residual_stage(x, 3, 2, stochastic_depth=[0.1])


def test_a_first_stage_keeps_the_size_and_brings_the_width():
    x = keras.Input((8, 8, 3))
    for filters, use_1x1conv in ((3, False), (4, True)):
        output = residual_stage(x, filters, 2, first_stage=True, name="stage1")
        assert output.shape == (None, 8, 8, filters)
        model = keras.Model(x, output)
        assert model.get_layer("stage1_block1").use_1x1conv is use_1x1conv
        assert model.get_layer("stage1_block2").use_1x1conv is False


# The dense network


@pytest.mark.parametrize(("num_blocks", "seeds"), [(10, 5), (100, 1)])
def test_dense_network_keeps_the_scale_of_its_input(num_blocks, seeds):
    x = np.arange(1.0, 13.0, dtype="float32")[None]  # the example of d2l
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        model = build_dense_resnet(num_blocks=num_blocks)
        for scale in (1e-3, 1.0, 1e3):
            largest = np.abs(model(scale * x)).max() / (scale * np.abs(x).max())
            assert 0.1 < largest < 10, f"seed {seed}, scale {scale}"


def test_the_dense_network_of_unit_variance_explodes_and_ours_does_not_because_of_its_start():
    """d2l reports 1e24, with weights of its own. PyTorch's smaller ones do not explode.

    Measured at ten blocks, over 20 seeds: 1 to 6 with PyTorch's weights, and at 100 blocks 11 to
    106; with weights of unit variance, 8e11 to 3e13 at ten blocks and an overflow at 100.
    """
    x = torch.arange(1.0, 13.0)[None]
    torch.manual_seed(0)
    net = dense_resnet(num_blocks=10)
    with torch.no_grad():
        assert net(x).abs().max() < 120
        for name, weight in net.named_parameters():
            if name.endswith("weight"):
                weight.normal_()
        assert net(x).abs().max() > 12e3

    # The same weights but for the last layers of the branches, which start at zero.
    model = build_dense_resnet(num_blocks=10)
    explosive = keras.initializers.RandomNormal(stddev=1.0)
    for block in model.layers:
        if isinstance(block, DenseResidualBlock):
            block.fc1.kernel.assign(explosive(block.fc1.kernel.shape))
    assert np.abs(model(x.numpy())).max() < 120


def test_dense_network_has_the_default_widths_and_count_of_the_chapter():
    model = build_dense_resnet()
    assert model.input_shape == (None, 12)
    assert model.output_shape == (None, 8)
    assert count_parameters(model) == sum(p.numel() for p in dense_resnet().parameters()) == 12_512
    names = [layer.name for layer in model.layers]
    assert names == ["features", "initial_fc", *(f"block{i + 1}" for i in range(10)), "final_fc"]


def test_training_moves_the_branches_away_from_zero():
    """At the start `fc2` is zero and lets no gradient through to `fc1`; after one step it does."""
    keras.utils.set_random_seed(0)
    model = build_dense_resnet(num_blocks=3)
    model.compile(keras.optimizers.SGD(0.01), "mse")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(64, 12)).astype("float32"), rng.normal(size=(64, 8)).astype("float32")

    def kernels(name):
        return [
            ops.convert_to_numpy(getattr(model.get_layer(f"block{i}"), name).kernel)
            for i in (1, 2, 3)
        ]

    start = kernels("fc1")
    first_loss = model.train_on_batch(x, y)
    assert all(np.abs(kernel).max() > 0 for kernel in kernels("fc2"))
    np.testing.assert_equal(kernels("fc1"), start)
    model.train_on_batch(x, y)
    for before, after in zip(start, kernels("fc1"), strict=True):
        assert np.abs(after - before).max() > 0
    for _ in range(20):
        model.train_on_batch(x, y)
    assert model.evaluate(x, y, verbose=0) < first_loss


def test_dense_network_refuses_another_number_of_features():
    model = build_dense_resnet()
    with pytest.raises(ValueError, match="12"):
        model(np.ones((1, 11), "float32"))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("input_features", 0),
        ("hidden_features", 2.0),
        ("output_features", None),
        ("num_blocks", -1),
        ("num_blocks", 1.5),
        ("num_blocks", False),
        ("num_blocks", 0.0),
    ],
)
def test_dense_network_refuses_what_is_no_count(argument, value):
    with pytest.raises(InputError, match=f"`{argument}` must be .*got {value}"):
        build_dense_resnet(**{argument: value})


def test_dense_network_may_have_no_blocks():
    assert build_dense_resnet(num_blocks=0).output_shape == (None, 8)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_last_map_has_the_size_that_is_said(variant, stem, monkeypatch):
    monkeypatch.setitem(SPECS, "tiny", TINY)
    for size in (1, 9, 30):
        backbone = build_resnet(
            TINY, (size, size, 1), variant=variant, stem=stem, include_top=False
        )
        assert backbone.output_shape[1:3] == (last_map_size("tiny", stem, size),) * 2
