"""BatchNormalization against Keras's own layer: outputs, gradients, statistics, files."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_resnet import Spec, build_resnet
from keras_resnet.normalization import BatchNormalization

# Policy -> the largest relative difference of outputs and gradients. The fused operator sums in
# another order, and a result in half precision then rounds to the number beside it.
BOUNDS = {"float32": 0, "mixed_bfloat16": 1e-2, "mixed_float16": 2e-3, "float64": 0}
SHAPES = ((16, 12, 12, 24), (8, 5, 3, 3), (8, 1, 1, 64), (1, 4, 4, 3), (1, 1, 1, 3))
"""(batch, height, width, channels); the last one has a variance of zero."""


NEEDS_RENORM = pytest.mark.skipif(
    not hasattr(keras.layers.BatchNormalization(), "renorm"), reason="Keras 3.14 and newer"
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def make(layer_class, policy="float32", channels=3, **kwargs):
    """Returns a built layer with random variables, the same for each class."""
    layer = layer_class(epsilon=1e-5, momentum=0.9, dtype=policy, **kwargs)
    layer.build((None, channels, None, channels))  # the channels of any `axis`
    for seed, variable in enumerate(layer.weights):
        variable.assign(np.abs(normal(channels, seed=seed)) + 0.5)
    return layer


def step(layer, images, training=True):
    """Returns the output, the gradients of a weighted sum of it, and the moving statistics."""
    images = tf.constant(images, layer.compute_dtype)
    weights = tf.constant(normal(*images.shape, seed=9), "float64")
    trained = [variable.value for variable in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(images)
        output = layer(images, training=training)
        total = tf.reduce_sum(tf.cast(output, "float64") * weights)
    gradients = tape.gradient(total, [images, *trained])
    moving = [layer.moving_mean.value, layer.moving_variance.value]
    return [tf.cast(value, "float64").numpy() for value in (output, *gradients, *moving)]


def operators(layer, shape, training=True, dtype="float32"):
    """Returns the names of the operators that a layer computes with."""
    graph = tf.function(lambda x: layer(x, training=training))
    concrete = graph.get_concrete_function(tf.TensorSpec(shape, dtype))
    return {operation.type for operation in concrete.graph.get_operations()}


@pytest.mark.parametrize("policy", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_training_step_equals_that_of_kerass_layer(policy, shape):
    images = normal(*shape) * 3 + 2
    ours, theirs = (
        step(make(each, policy, shape[-1]), images)
        for each in (BatchNormalization, keras.layers.BatchNormalization)
    )
    for number, (found, expected) in enumerate(zip(ours, theirs, strict=True)):
        is_moving = number >= len(ours) - 2
        bound = min(BOUNDS[policy], 1e-5) if is_moving else BOUNDS[policy]
        # Where the variance is zero, the sum of the gradients is: only rounding is left.
        scale = max(np.abs(expected).max(), 1e-2)
        assert np.abs(found - expected).max() <= bound * scale, (number, found, expected)


def test_moving_variance_is_the_biased_one():
    layer, images = make(BatchNormalization, "mixed_float16"), normal(2, 2, 1, 3).astype("float16")
    before = layer.moving_variance.numpy()
    layer(images, training=True)
    expected = 0.9 * before + 0.1 * images.astype("float32").var(axis=(0, 1, 2))
    np.testing.assert_allclose(layer.moving_variance.numpy(), expected, rtol=1e-6)


def test_large_means_lose_no_more_than_in_kerass_layer():
    """Grey values without normalization: the variance is a small difference of large sums."""
    images = normal(8, 16, 16, 3) + 255
    ours, theirs = (
        step(make(each, "mixed_float16"), images)
        for each in (BatchNormalization, keras.layers.BatchNormalization)
    )
    # Half precision has steps of 2e-3 there.
    assert np.abs(ours[0] - theirs[0]).max() < 4e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_in_half_precision_runs_the_fused_operator(dtype):
    layer = make(BatchNormalization, f"mixed_{dtype}")
    found = operators(layer, (8, 4, 4, 3), dtype=dtype)
    assert "FusedBatchNormV3" in found and "Mean" not in found
    assert "FusedBatchNormV3" in operators(layer, (None, None, None, 3), dtype=dtype)


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {"training": False}),
        ({"trainable": False}, {}),
        ({"synchronized": True}, {}),
        ({"axis": 1}, {}),
        ({"scale": False}, {}),
        ({"center": False}, {}),
        pytest.param({"renorm": True}, {}, marks=NEEDS_RENORM),
        ({"policy": "float32"}, {"dtype": "float32"}),
        ({"policy": "float64"}, {"dtype": "float64"}),
    ],
    ids=str,
)
def test_other_cases_run_kerass_own_code(options, arguments):
    results = []
    for layer_class in (BatchNormalization, keras.layers.BatchNormalization):
        layer = make(layer_class, **{"policy": "mixed_bfloat16", **options})
        found = operators(layer, (3, 3, 3, 3), **{"dtype": "bfloat16", **arguments})
        assert "FusedBatchNormV3" not in found
        training = arguments.get("training", True)
        output = layer(normal(3, 3, 3, 3), training=training)
        results.append(np.asarray(tf.cast(output, "float64")))
    np.testing.assert_array_equal(*results)


def test_masks_and_other_ranks_are_those_of_kerass_layer():
    for shape, mask in (((6, 3), None), ((2, 5, 3), np.array([[True] * 4 + [False]] * 2))):
        results = []
        for layer_class in (BatchNormalization, keras.layers.BatchNormalization):
            layer = layer_class()
            results.append(np.asarray(layer(normal(*shape), training=True, mask=mask)))
        np.testing.assert_array_equal(*results)


def test_keras_before_renorm(monkeypatch):
    """Keras 3.10 to 3.13 have no such attribute."""
    layer = make(BatchNormalization, "mixed_float16")
    images = normal(2, 3, 3, 3).astype("float16")
    before = layer(images, training=True)
    if hasattr(layer, "renorm"):
        del layer.renorm
    np.testing.assert_array_equal(layer(images, training=True), before)


def test_compiled_by_xla_it_updates_the_same_statistics():
    images, results = normal(4, 6, 6, 3).astype("float16"), []
    for compiled in (True, False):
        layer = make(BatchNormalization, "mixed_float16")
        tf.function(lambda x, own=layer: own(x, training=True), jit_compile=compiled)(images)
        results.append([np.asarray(variable) for variable in layer.weights])
    np.testing.assert_allclose(*results, rtol=1e-5)


def test_files_name_kerass_layer_and_load_where_only_keras_is(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 3)), BatchNormalization(name="bn")])
    model(normal(2, 4, 4, 3), training=True)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.get_layer("bn")) is keras.layers.BatchNormalization
    images = normal(2, 4, 4, 3)
    np.testing.assert_array_equal(loaded(images), model(images))


def test_weights_of_networks_with_kerass_layer_load(tmp_path, monkeypatch):
    """As they were saved before this layer existed; and in the other direction."""
    spec, arguments = Spec((1, 1), (8, 16)), {"input_shape": (16, 16, 3)}
    ours = build_resnet(spec, variant="v2", **arguments)
    for module in ("keras_resnet.models", "keras_resnet.blocks"):
        monkeypatch.setattr(f"{module}.batch_norm", keras.layers.BatchNormalization)
    theirs = build_resnet(spec, variant="v2", **arguments)
    assert {type(layer) for layer in theirs.layers} != {type(layer) for layer in ours.layers}
    assert [v.path for v in theirs.weights] == [v.path for v in ours.weights]
    for source, target in ((theirs, ours), (ours, theirs)):
        for seed, variable in enumerate(source.weights):
            variable.assign(np.abs(normal(*variable.shape, seed=seed)))
        source.save_weights(tmp_path / "a.weights.h5")
        target.load_weights(tmp_path / "a.weights.h5")
        for found, expected in zip(target.weights, source.weights, strict=True):
            np.testing.assert_array_equal(found, expected)


def test_every_normalization_of_a_network_is_ours():
    for variant in ("d2l", "torchvision", "v2"):
        model = build_resnet(Spec((1, 1), (8, 16)), (16, 16, 3), variant=variant)
        layers = model._flatten_layers()
        found = [each for each in layers if isinstance(each, keras.layers.BatchNormalization)]
        assert found and all(isinstance(each, BatchNormalization) for each in found)
