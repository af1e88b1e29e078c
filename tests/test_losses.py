"""The loss and the class weights, beside Keras's own."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_resnet import Split
from keras_resnet.losses import Crossentropy, make_loss
from keras_resnet.training.inputs import Batches

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(40, 5)).astype("float32")
LABELS = RANDOM.integers(0, 5, 40)


def value(loss):
    return float(loss(ops.array(LABELS), ops.array(LOGITS)))


def test_without_smoothing_it_is_keras_own():
    own = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert type(make_loss()) is type(own)
    assert value(Crossentropy()) == pytest.approx(value(own), rel=1e-6)


def test_label_smoothing_is_that_of_keras():
    own = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    expected = float(own(np.eye(5, dtype="float32")[LABELS], ops.array(LOGITS)))
    assert value(make_loss(0.1)) == pytest.approx(expected, rel=1e-6)


def test_config_makes_the_same_loss():
    loss = make_loss(0.1)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert type(again) is Crossentropy
    assert value(again) == value(loss) != value(make_loss(0.2))


def test_class_weights_are_those_of_fit():
    images, weights = RANDOM.integers(0, 256, (40, 2, 2, 1), "uint8"), [0.2, 0.5, 1.0, 1.5, 4.0]

    def fit(*data, **options):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((2, 2, 1))
        x = keras.layers.Rescaling(1 / 255)(inputs)
        model = keras.Model(inputs, keras.layers.Dense(5)(keras.layers.Flatten()(x)))
        model.compile("sgd", make_loss(0.1), metrics=["accuracy"])
        found = model.fit(*data, verbose=0, shuffle=False, epochs=2, **options).history
        return [found[key] for key in ("loss", "accuracy")]

    found = fit(Batches(Split(images, LABELS), 16, class_weights=weights))
    by_keras = {"batch_size": 16, "class_weight": dict(enumerate(weights))}
    np.testing.assert_allclose(found, fit(images, LABELS, **by_keras), rtol=1e-5)
    assert found[0] != pytest.approx(fit(Batches(Split(images, LABELS), 16))[0], rel=1e-2)
