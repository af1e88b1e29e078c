"""The loss, beside Keras's own losses and class weights."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_resnet.losses import Crossentropy, make_loss

RANDOM = np.random.default_rng(0)
LOGITS = RANDOM.normal(size=(40, 5)).astype("float32")
LABELS = RANDOM.integers(0, 5, 40)
WEIGHTS = [0.2, 0.5, 1.0, 1.5, 4.0]


def value(loss):
    return float(loss(ops.array(LABELS), ops.array(LOGITS)))


def test_without_options_it_is_keras_own():
    own = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert type(make_loss()) is type(own)
    assert value(Crossentropy(from_logits=True)) == pytest.approx(value(own), rel=1e-6)
    assert value(Crossentropy([1] * 5, 0.0, True)) == pytest.approx(value(own), rel=1e-6)


def test_label_smoothing_is_that_of_keras():
    keras_own = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    expected = float(keras_own(np.eye(5, dtype="float32")[LABELS], ops.array(LOGITS)))
    assert value(make_loss(label_smoothing=0.1)) == pytest.approx(expected, rel=1e-6)
    probabilities = ops.softmax(ops.array(LOGITS))
    loss = Crossentropy(label_smoothing=0.1)
    assert float(loss(ops.array(LABELS), probabilities)) == pytest.approx(expected, rel=1e-5)


def test_class_weights_are_those_of_fit():
    inputs = keras.Input((5,))
    model = keras.Model(inputs, keras.layers.Dense(5, kernel_initializer="identity")(inputs))
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    weights = dict(enumerate(WEIGHTS))
    found = model.fit(LOGITS, LABELS, batch_size=40, class_weight=weights, verbose=0)
    assert value(make_loss(WEIGHTS)) == pytest.approx(found.history["loss"][0], rel=1e-5)


def test_config_makes_the_same_loss():
    loss = make_loss(WEIGHTS, 0.1)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(loss))
    assert type(again) is Crossentropy
    assert value(again) == value(loss) != value(make_loss(WEIGHTS))
