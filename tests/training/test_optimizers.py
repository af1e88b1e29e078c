"""Adam by one operator, against Keras's own."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_resnet.training import optimizers

RATES = {"constant": lambda: 0.01, "schedule": lambda: optimizers.SCHEDULES["cosine"](0.1, 10, 0.2)}


def train(optimizer, dtype):
    """Returns the variables of model and optimizer after ten steps with random gradients."""
    random = np.random.default_rng(0)
    shapes = ((3, 3, 2, 5), (5,), (7, 2))
    variables = [keras.Variable(random.normal(size=shape), dtype=dtype) for shape in shapes]
    optimizer.build(variables)

    @tf.function
    def step(gradients):
        optimizer.apply(gradients, variables)

    for _ in range(10):
        step([tf.constant(random.normal(size=shape), dtype) for shape in shapes])
    return [np.asarray(v) for v in (*variables, *optimizer.variables)], step


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_steps_are_those_of_keras(name, rate):
    ours, theirs = (
        train(getattr(module, name)(RATES[rate]()), "float32")[0]
        for module in (optimizers, keras.optimizers)
    )
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_steps_follow_the_formula_in_float64():
    """Keras itself rounds the betas to float32."""
    found = train(optimizers.Adam(0.01, beta_1=0.8, beta_2=0.95, epsilon=1e-3), "float64")[0]
    random = np.random.default_rng(0)
    shapes = [variable.shape for variable in found[:3]]
    expected = [random.normal(size=shape) for shape in shapes]
    mean, square = ([np.zeros(shape) for shape in shapes] for _ in range(2))
    for step in range(1, 11):
        for index, shape in enumerate(shapes):
            gradient = random.normal(size=shape)
            mean[index] += 0.2 * (gradient - mean[index])
            square[index] += 0.05 * (gradient**2 - square[index])
            rate = np.float32(0.01) * np.sqrt(1 - 0.95**step) / (1 - 0.8**step)
            expected[index] -= rate * mean[index] / (np.sqrt(square[index]) + 1e-3)
    for variable, value in zip(found, expected, strict=False):
        np.testing.assert_allclose(variable, value, rtol=1e-12)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_one_operator_updates_a_variable(name):
    _, step = train(optimizers.OPTIMIZERS[name](0.01), "float32")
    graph = step._list_all_concrete_functions()[0].graph
    found = [operation.type for operation in graph.get_operations()]
    assert found.count("ResourceApplyAdam") == 3 and "Sqrt" not in found


def test_amsgrad_is_that_of_keras():
    ours, theirs = (
        train(module.Adam(0.01, amsgrad=True), "float32")[0]
        for module in (optimizers, keras.optimizers)
    )
    for found, expected in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_file_goes_on_with_kerass_optimizer_and_back(name, tmp_path):
    images = np.random.default_rng(0).normal(size=(8, 3))

    def model_with(optimizer):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="dense")])
        model.compile(optimizer, "mse")
        return model

    results = []
    for saving, loading in ((optimizers, keras.optimizers), (keras.optimizers, optimizers)):
        saved = model_with(getattr(saving, name)(0.25))
        saved.train_on_batch(images, images[:, :2])
        saved.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert type(loaded.optimizer) is getattr(keras.optimizers, name)
        other = model_with(getattr(loading, name)(0.25))
        other.optimizer.build(other.trainable_variables)
        other.load_weights(tmp_path / "model.keras")
        for each in (saved, loaded, other):
            each.train_on_batch(images, images[:, :2])
            results.append([np.asarray(v) for v in (*each.weights, *each.optimizer.variables)])
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Two processors as replicas: devices are made before TensorFlow starts.
MIRRORED = """
import keras, numpy as np, tensorflow as tf
from keras_resnet.training import optimizers

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
random = np.random.default_rng(0)
images, labels = random.normal(size=(8, 5)), random.normal(size=(8, 1))
results = []
for module in (optimizers, keras.optimizers):
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3), keras.layers.Dense(1)])
        model.compile(module.AdamW(0.05), "mse")
    model.fit(images, labels, batch_size=4, epochs=3, shuffle=False, verbose=0)
    results.append([np.asarray(v) for v in (*model.variables, *model.optimizer.variables)])
    for variable in (*model.weights, *model.optimizer.variables):
        first, second = variable.value.values
        np.testing.assert_array_equal(first, second)
for ours, theirs in zip(*results, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
print("equal")
"""


def test_replicas_are_updated_alike():
    command = [sys.executable, "-c", MIRRORED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.slow
def test_on_pytorch_the_optimizers_are_those_of_keras():
    """Its own class updates all variables at once."""
    code = "import keras; from keras_resnet.training.optimizers import Adam; print(Adam(0.1))"
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "torch_adam" in done.stdout, done.stderr


def test_half_precision_with_a_scaled_loss():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, dtype="mixed_float16")])
    optimizer = keras.optimizers.LossScaleOptimizer(optimizers.Adam(0.1))
    model.compile(optimizer, "mse")
    images = np.random.default_rng(0).normal(size=(16, 4))
    losses = [model.train_on_batch(images, images[:, :2]) for _ in range(40)]
    assert losses[-1] < losses[0] / 4
    before = [np.asarray(v) for v in (*model.weights, *optimizer.inner_optimizer.variables)]
    model.train_on_batch(images * np.inf, images[:, :2])
    after = [np.asarray(v) for v in (*model.weights, *optimizer.inner_optimizer.variables)]
    for found, expected in zip(after, before, strict=True):
        np.testing.assert_array_equal(found, expected)
