"""Grad-CAM beside the gradients of its definition."""

import keras
import numpy as np
import pytest
from PIL import Image

from keras_resnet import Spec, build_resnet, with_preprocessing
from keras_resnet.evaluation.grad_cam import grad_cam
from keras_resnet.utils.errors import InputError


def tiny(variant="torchvision", size=64):
    keras.utils.set_random_seed(0)
    network = build_resnet(Spec((1, 1), (8, 16)), (size, size, 3), 4, variant=variant, stem="small")
    # Statistics other than those of a new network.
    network(np.random.default_rng(1).normal(size=(8, size, size, 3)), training=True)
    return network


def by_gradients(network, images, classes):
    """Selvaraju et al. 2017, equations 1 and 2, with TensorFlow's gradients."""
    import tensorflow as tf

    pooling, logits_layer = network.get_layer("global_avg_pool"), network.get_layer("logits")
    maps = keras.Model(network.input, pooling.input)(images, training=False)
    with tf.GradientTape() as tape:
        tape.watch(maps)
        logits = logits_layer(pooling(maps))
        score = tf.reduce_sum(tf.gather(logits, classes, batch_dims=1))
    alpha = tf.reduce_mean(tape.gradient(score, maps), axis=(1, 2), keepdims=True)
    return tf.nn.relu(tf.reduce_sum(alpha * maps, axis=-1)).numpy()


@pytest.mark.parametrize("variant", ["torchvision", "v2"])
def test_it_is_what_the_gradients_give(variant):
    network = tiny(variant)
    images = np.random.default_rng(0).normal(size=(6, 64, 64, 3)).astype("float32")
    classes = [0, 1, 2, 3, 1, 2]
    found = grad_cam(network, images, classes)
    expected = by_gradients(network, images, classes)
    assert found.shape == (6, 64, 64) and found.dtype == np.float32
    assert expected.max() > 0
    for each, heat in zip(found, expected, strict=True):
        heat = Image.fromarray(heat / heat.max()).resize((64, 64), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(each, np.clip(heat, 0, 1), atol=1e-4)


def test_the_predicted_class_is_the_default():
    network = tiny()
    images = np.random.default_rng(0).normal(size=(3, 64, 64, 3)).astype("float32")
    predicted = network.predict(images, verbose=0).argmax(axis=1)
    np.testing.assert_array_equal(grad_cam(network, images), grad_cam(network, images, predicted))
    assert not np.array_equal(
        grad_cam(network, images), grad_cam(network, images, (predicted + 1) % 4)
    )


@pytest.mark.parametrize(
    ("resizing", "rows", "columns"),
    [
        ({"resize": "shorter_edge", "crop_pct": 0.8}, slice(8, 72), slice(18, 82)),
        ({"resize": "squash", "crop_pct": 0.8}, slice(8, 72), slice(10, 90)),
        ({}, slice(0, 80), slice(0, 100)),
    ],
)
def test_maps_lie_where_the_network_looks(resizing, rows, columns):
    model = with_preprocessing(tiny(), (None, None, 3), antialias=True, **resizing)
    images = np.random.default_rng(0).integers(0, 256, (1, 80, 100, 3), dtype="uint8")
    (maps,) = grad_cam(model, images)
    seen = np.zeros((80, 100), bool)
    seen[rows, columns] = True
    assert maps.shape == (80, 100) and not maps[~seen].any()
    assert maps[seen].max() > 0.5


@pytest.mark.parametrize("classes", [[4, 0, 0], [-1, 0, 0], [0, 0], 1, [0.5, 1, 1]])
def test_classes_are_numbers_of_classes(classes):
    with pytest.raises(InputError, match="must be 3 whole numbers from 0 to 3, got"):
        grad_cam(tiny(size=32), np.zeros((3, 32, 32, 3), "float32"), classes)


def test_other_networks_are_refused():
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(inputs)))
    with pytest.raises(InputError, match="needs a network that ends in global_avg_pool and logits"):
        grad_cam(model, np.zeros((1, 8, 8, 3), "float32"))
