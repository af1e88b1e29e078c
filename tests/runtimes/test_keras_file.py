"""Keras models of all kinds: what goes in, and what comes out."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_resnet import InputError, Predictor, Spec, Split, build_resnet, evaluate
from keras_resnet.evaluation import inference
from keras_resnet.preprocessing import with_preprocessing
from keras_resnet.runtimes.keras_file import KerasRuntime, is_bare

SHAPE = (4, 4, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype="uint8")


@pytest.fixture(autouse=True)
def seed():
    keras.utils.set_random_seed(3)


def model_of(end, **options):
    """Returns a model of images whose last part is `end`, a function of features."""
    inputs = keras.Input(SHAPE, **options)
    return keras.Model(inputs, end(layers.Flatten()(layers.Rescaling(1 / 60)(inputs))))


def dense(activation=None, units=3):
    return layers.Dense(units, activation)


def nested(*parts):
    return keras.Sequential([keras.Input((48,)), *parts])


def maps(x):
    x = layers.Conv2D(3, 1, activation="softmax")(layers.Reshape(SHAPE)(x))
    return layers.GlobalAveragePooling2D()(x)


# What each gives, decided by the graph.
BY_GRAPH = {
    "logits": [
        dense(),
        dense("relu"),
        lambda x: ops.log_softmax(dense()(x)),
        lambda x: dense()(x) / 20.0,
        lambda x: layers.Average()([dense()(x), nested(dense())(x)]),
        lambda x: layers.Reshape((1, 1, 3))(dense()(x)),
    ],
    "softmax": [
        dense("softmax"),
        dense(layers.Softmax()),
        lambda x: layers.Softmax()(dense()(x)),
        lambda x: ops.softmax(dense()(x) / 3.0),
        lambda x: layers.Activation("linear")(dense("softmax")(x)),
        lambda x: layers.Average()([nested(dense("softmax"))(x), nested(dense("softmax"))(x)]),
        lambda x: layers.Reshape((1, 1, 3))(dense("softmax")(x)),
        lambda x: layers.Flatten()(layers.Reshape((1, 1, 3))(dense("softmax")(x))),
        lambda x: keras.Sequential([keras.Input((3,)), layers.Reshape((3,))])(dense("softmax")(x)),
        maps,
    ],
    "sigmoid": [dense("sigmoid"), lambda x: ops.sigmoid(dense()(x))],
    "binary_logit": [dense(None, 1), lambda x: layers.Reshape(())(dense(None, 1)(x))],
    "binary_sigmoid": [dense("sigmoid", 1), lambda x: layers.Reshape(())(dense("sigmoid", 1)(x))],
}
# Decided by the numbers that the model gives.
BY_NUMBERS = {
    "softmax": [
        lambda x: layers.Softmax(axis=1)(layers.Reshape((3, 1))(dense()(x)))[:, :, 0],
        lambda x: (dense("softmax")(x) + dense("softmax")(x)) / 2,
        lambda x: ops.softmax(dense()(x))[:, ::-1],
    ],
    "sigmoid": [
        lambda x: layers.Concatenate()([dense("sigmoid", 1)(x), dense("sigmoid", 2)(x)]),
        lambda x: 1 - dense("sigmoid")(x),
        lambda x: layers.Maximum()([dense("softmax")(x), dense("softmax")(x)]),
        lambda x: layers.Reshape((6,))(layers.Softmax()(layers.Reshape((2, 3))(dense(None, 6)(x)))),
    ],
    "logits": [lambda x: 10 * ops.sin(dense()(x))],
}


@pytest.mark.parametrize(
    ("kind", "end", "by_graph"),
    [(kind, end, True) for kind, ends in BY_GRAPH.items() for end in ends]
    + [(kind, end, False) for kind, ends in BY_NUMBERS.items() for end in ends],
)
def test_the_output_is_what_the_graph_or_else_the_numbers_say(kind, end, by_graph):
    model = model_of(end)
    runtime = KerasRuntime(model)
    assert runtime.output_kind == kind and (runtime.graph_kind is not None) == by_graph
    own = np.asarray(model(IMAGES, training=False), "float64").reshape(6, -1)
    if kind == "logits":
        own = np.asarray(ops.softmax(own))
    elif kind == "binary_logit":
        own = 1 / (1 + np.exp(-own))
    expected = np.hstack([1 - own, own]) if own.shape[1] == 1 else own
    assert Predictor(runtime)(IMAGES) == pytest.approx(expected, abs=1e-5)
    assert Predictor(runtime)(IMAGES[:0]).shape == (0, expected.shape[1])


def test_a_head_of_zeros_gives_equal_probabilities():
    model = model_of(lambda x: layers.Dense(3, kernel_initializer="zeros")(x)[:, ::-1])
    assert Predictor(model)(IMAGES) == pytest.approx(1 / 3)


def test_a_softmax_over_one_number_is_refused():
    with pytest.raises(InputError, match="a softmax over one number is always 1"):
        Predictor(model_of(dense("softmax", 1)))


@pytest.mark.parametrize("form", [dict, list])
def test_one_named_output_is_one_and_several_are_named(form):
    def outputs(x, names):
        made = {name: dense("softmax")(x) for name in names}
        return made if form is dict else list(made.values())

    model = model_of(lambda x: outputs(x, ["label"]))
    (own,) = keras.tree.flatten(model(IMAGES, training=False))
    assert Predictor(model)(IMAGES) == pytest.approx(np.asarray(own), abs=1e-6)
    several = model_of(lambda x: outputs(x, ["label", "box"]))
    with pytest.raises(InputError, match="give one output, it has 2") as error:
        Predictor(several)
    chosen = "label" if form is dict else 0
    assert f"model.output[{chosen!r}])`" in str(error.value)
    # The advice holds.
    assert Predictor(keras.Model(several.inputs, several.output[chosen]))(IMAGES).shape == (6, 3)


def test_several_labels_are_measured_by_the_largest_number():
    predictor = Predictor(model_of(dense("sigmoid")))
    assert predictor.several_labels
    labels = predictor(IMAGES).argmax(axis=1)
    found = evaluate(predictor, Split(IMAGES, labels), ("a", "b", "c"))
    assert found.accuracy == 1.0 and np.isfinite(found.to_dict()["loss"])


@pytest.mark.parametrize("metadata", [{"class_names": ["only"]}, {"class_names": ["a", "b", "c"]}])
def test_one_number_has_two_class_names(metadata):
    model = model_of(dense("sigmoid", 1))
    assert Predictor(model, {"class_names": ["no", "yes"]}).class_names == ("no", "yes")
    with pytest.raises(InputError, match="the model has 2 outputs, and its metadata"):
        Predictor(model, metadata)


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_the_check_of_images_does_not_depend_on_earlier_calls(dtype):
    inputs = keras.Input((8, 8, 1), dtype=dtype)
    x = layers.GlobalAveragePooling2D()(layers.Rescaling(1 / 255)(inputs))
    predictor = Predictor(keras.Model(inputs, dense()(x)))
    grey, colour, large = (np.zeros(s, "uint8") for s in [(2, 8, 8, 1), (2, 8, 8, 3), (2, 9, 9, 1)])
    for _ in range(2):
        for wrong in (colour, large, grey[0], grey / 255):
            with pytest.raises(InputError, match="it takes uint8 images"):
                predictor(wrong)
        assert predictor(grey).shape == (2, 3)


def test_images_of_any_size_are_taken_where_the_model_takes_them():
    inputs = keras.Input((None, None, 3))
    predictor = Predictor(keras.Model(inputs, dense()(layers.GlobalAveragePooling2D()(inputs))))
    for size in (5, 9):
        assert predictor(np.zeros((2, size, size + 1, 3), "uint8")).shape == (2, 3)


# ----------------------------------------------------------------------------------------------
# Bare networks
# ----------------------------------------------------------------------------------------------


def network(**options):
    return build_resnet(Spec((1,), (8,)), (16, 16, 3), 3, stem="small", **options)


def with_another_head():
    body = network(include_top=False, pooling="avg")
    return keras.Model(body.input, dense()(body.output))


def behind(*before, **options):
    return keras.Sequential([keras.Input((16, 16, 3), **options), *before, network()])


BARE = {
    "network": network,
    "v2": lambda: network(variant="v2"),
    "another head": with_another_head,
    "Sequential": behind,
    "flips": lambda: behind(keras.Sequential([layers.RandomFlip(), layers.RandomZoom(0.1)])),
    "resized": lambda: behind(layers.Resizing(16, 16)),
}
SCALED = {
    "with_preprocessing": lambda: with_preprocessing(network(), (16, 16, 3)),
    "Rescaling": lambda: behind(layers.Rescaling(1 / 255)),
    "Normalization": lambda: behind(layers.Normalization(mean=100.0, variance=50.0)),
    "nested": lambda: behind(keras.Sequential([layers.RandomFlip(), layers.Rescaling(1 / 255)])),
    "bytes": lambda: behind(dtype="uint8"),
}


@pytest.mark.parametrize("make", BARE.values(), ids=BARE)
def test_a_bare_network_is_recognised_without_metadata(make, tmp_path):
    model = make()
    assert is_bare(model)
    model.save(tmp_path / "bare.keras")
    with pytest.raises(InputError, match="normalised already, not images: name their") as error:
        inference.load(tmp_path / "bare.keras")
    assert "with_preprocessing(network, image_shape" in str(error.value)


@pytest.mark.parametrize("make", SCALED.values(), ids=SCALED)
def test_a_network_behind_its_scaling_takes_images(make):
    model = make()
    assert not is_bare(model)
    assert Predictor(model)(np.zeros((2, 16, 16, 3), "uint8")).shape == (2, 3)
