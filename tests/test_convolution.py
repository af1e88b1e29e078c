"""Gradients of kernels by matrix products, against TensorFlow's own operators."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_resnet import Spec, build_resnet, convolution
from keras_resnet.blocks import PaddedConv2D

# (batch, height, width, channels), filters, kernel size, strides: all are small maps.
CASES = [
    ((4, 2, 2, 16), 64, 3, 1),
    ((4, 4, 4, 8), 64, 3, 1),
    ((3, 7, 7, 8), 64, 3, 2),
    ((3, 8, 5, 8), 64, 3, 2),
    ((1, 1, 1, 64), 48, 3, 1),
    ((2, 1, 3, 8), 64, (3, 5), 1),
    ((2, 6, 6, 8), 64, 1, 2),
    ((2, 3, 3, 8), 64, 5, (2, 1)),
]


@pytest.fixture
def without_products(monkeypatch):
    """A function that lets Keras's own code run from then on."""
    return lambda: monkeypatch.setattr(convolution, "EDGE_PER_FILTER", 0)


def make(shape, filters, kernel_size, strides, policy="mixed_bfloat16", **kwargs):
    """Returns a built layer, and images of a shape."""
    keras.utils.set_random_seed(0)
    layer = PaddedConv2D(filters, kernel_size, strides, dtype=policy, **kwargs)
    layer.build((None, *shape[1:]))
    images = np.random.default_rng(0).normal(size=shape)
    return layer, tf.constant(images, layer.compute_dtype)


def step(layer, images):
    """Returns the outputs, and the gradients of a weighted sum of them."""
    trained = [variable.value for variable in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(images)
        outputs = layer(images)
        weights = np.random.default_rng(1).normal(size=outputs.shape)
        total = tf.reduce_sum(tf.cast(outputs, "float64") * weights)
    return [outputs, *tape.gradient(total, [images, *trained])]


def operators(layer, shape):
    """Returns the names of the operators of a training step."""

    @tf.function
    def train(images):
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(layer(images))
        return tape.gradient(total, layer.kernel.value)

    concrete = train.get_concrete_function(tf.TensorSpec(shape, layer.compute_dtype))
    return {operation.type for operation in concrete.graph.get_operations()}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "bfloat16"])
def test_a_training_step_equals_that_of_tensorflow(case, policy, without_products):
    layer, images = make(*case, policy)
    assert "MatMul" in operators(layer, images.shape)
    ours = step(layer, images)
    without_products()
    assert "MatMul" not in operators(layer, images.shape)
    for found, expected in zip(ours, step(layer, images), strict=True):
        assert found.dtype == expected.dtype
        found, expected = (np.asarray(tf.cast(each, "float64")) for each in (found, expected))
        # Both sum in float32 and round once, to bfloat16: to the same number or the one beside it.
        np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_of_the_kernel_is_the_derivative(case):
    """In float64, where a difference quotient has many digits."""
    layer, images = make(*case, "float64")
    inputs = tf.constant(np.random.default_rng(2).normal(size=layer._pad(images.shape)))
    kernel, padding = tf.Variable(layer.kernel.value), layer.padding
    direction = tf.constant(np.random.default_rng(3).normal(size=kernel.shape))

    def total(kernel):
        outputs = convolution.convolve(inputs, kernel, layer.strides, padding)
        return tf.reduce_sum(outputs * np.random.default_rng(4).normal(size=outputs.shape))

    with tf.GradientTape() as tape:
        value = total(kernel)
    slope = tf.reduce_sum(tape.gradient(value, kernel) * direction)
    # The sum is linear in the kernel.
    np.testing.assert_allclose(total(kernel + direction) - value, slope, rtol=1e-9)


@pytest.mark.parametrize(
    ("shape", "filters", "options"),
    [
        ((2, 4, 4, 8), 64, {"policy": "float32"}),
        ((2, 4, 4, 8), 64, {"policy": "mixed_float16"}),
        ((2, 5, 4, 8), 64, {}),
        ((2, None, None, 8), 64, {}),
        ((2, 4, 4, 8), 64, {"groups": 2}),
        ((2, 4, 4, 8), 64, {"dilation_rate": 2}),
    ],
    ids=str,
)
def test_other_cases_run_kerass_own_code(shape, filters, options):
    options = {"policy": "mixed_bfloat16", **options}
    layer = PaddedConv2D(filters, 3, dtype=options.pop("policy"), **options)
    layer.build((None, *shape[1:]))
    assert "MatMul" not in operators(layer, shape)


@pytest.mark.parametrize("kind", ["GPU", "TPU"])
def test_other_devices_run_kerass_own_code(kind, monkeypatch):
    layer, images = make((2, 4, 4, 8), 64, 3, 1)
    assert "MatMul" in operators(layer, images.shape)
    devices = [*tf.config.get_visible_devices(), tf.config.PhysicalDevice(f"{kind}:0", kind)]
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda: devices)
    assert "MatMul" not in operators(layer, images.shape)


def test_xla_gives_the_same():
    layer, images = make((2, 4, 4, 8), 64, 3, 2)
    results = []
    for compiled in (True, False):
        run = tf.function(lambda: step(layer, images)[2], jit_compile=compiled)
        results.append(np.asarray(run()))
    np.testing.assert_allclose(*results, rtol=2**-6, atol=1e-3)


def test_the_second_derivative(without_products):
    layer, images = make((2, 4, 4, 8), 64, 3, 2)
    results = []
    for is_own in (True, False):
        if not is_own:
            without_products()
        with tf.GradientTape() as tape:
            tape.watch(images)
            with tf.GradientTape() as inner:
                total = tf.reduce_sum(tf.cast(layer(images), "float32") ** 2)
            gradient = inner.gradient(total, layer.kernel.value)
            penalty = tf.reduce_sum(gradient**2)
        results.append(np.asarray(tf.cast(tape.gradient(penalty, images), "float64")))
    scale = np.abs(results[1]).max()
    assert scale > 0 and np.abs(results[0] - results[1]).max() < 0.02 * scale


def test_a_gradient_without_a_static_shape():
    layer, images = make((2, 4, 4, 8), 64, 3, 1)

    @tf.custom_gradient
    def unknown(outputs):
        return outputs, lambda upstream: tf.numpy_function(lambda x: x, [upstream], upstream.dtype)

    @tf.function
    def train():
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(unknown(layer(images)))
        return tape.gradient(total, layer.kernel.value)

    assert np.abs(train()).sum() > 0


def test_a_network_learns_the_same(without_products):
    """Twenty steps: the rounding of bfloat16 grows from step to step, and stays small."""
    losses = []
    for is_own in (True, False):
        if not is_own:
            without_products()
        keras.utils.set_random_seed(0)
        keras.config.set_dtype_policy("mixed_bfloat16")
        try:
            model = build_resnet(Spec((1, 1), (32, 64)), (8, 8, 1), 4, stem="small")
        finally:
            keras.config.set_dtype_policy("float32")
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss)
        random = np.random.default_rng(0)
        images, labels = random.normal(size=(16, 8, 8, 1)), random.integers(0, 4, 16)
        losses.append([model.train_on_batch(images, labels) for _ in range(20)])
    ours, theirs = map(np.ravel, losses)
    assert theirs[-1] < theirs[0] / 3
    np.testing.assert_allclose(ours[:5], theirs[:5], rtol=0.02)
    np.testing.assert_allclose(ours[-1], theirs[-1], atol=0.1)
