import family
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_resnet import InputError, Spec, build_resnet, with_preprocessing
from keras_resnet.exporters.float32 import check_twin, in_float32
from keras_resnet.exporters.graph import Contract, Serving

IMAGES = family.noise(count=5)


def predict(serving, images):
    (outputs,) = serving.module().serve(tf.constant(serving.prepare(images))).values()
    return outputs.numpy()


def softmax(logits):
    return np.asarray(keras.ops.softmax(np.asarray(logits), axis=-1))


def small(**options):
    network = build_resnet(Spec((1,), (8,)), (28, 28, 1), 10, stem="small")
    return with_preprocessing(network, (28, 28, 1), **options)


def test_takes_raw_images_and_gives_probabilities():
    model = small(mean=0.3, std=0.2, augmentation=["flip", "shift"])
    serving = Serving(model)
    assert serving.contract == Contract((28, 28, 1), "uint8", "probabilities", 10)
    assert predict(serving, IMAGES) == pytest.approx(
        softmax(model(IMAGES, training=False)), abs=1e-6
    )


def test_without_preprocessing_it_takes_floats_and_gives_logits():
    model = small(mean=0.3, std=0.2)
    serving = Serving(model, preprocessing=False)
    assert serving.contract == Contract((28, 28, 1), "float32", "logits", 10)
    assert serving.prepare(IMAGES).dtype == "float32"
    assert predict(serving, IMAGES) == pytest.approx(
        np.asarray(model(IMAGES, training=False)), abs=1e-5
    )


def test_a_fixed_batch_is_in_the_signature():
    module = Serving(small()).module(batch=1)
    assert module.serve.input_signature[0].shape == (1, 28, 28, 1)


def test_the_module_holds_each_variable_once_and_nothing_of_keras():
    model = small()
    module = Serving(model).module()
    assert len(module.variables) == len({id(v) for v in module.variables}) == len(model.variables)
    assert not any(isinstance(part, keras.Layer) for part in vars(module).values())


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_other_precisions_are_exported_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = small()
    finally:
        keras.config.set_dtype_policy("float32")
    twin = in_float32(model)
    assert {layer.dtype_policy.name for layer in twin._flatten_layers()} == {"float32"}
    own = np.asarray(keras.ops.cast(model(IMAGES, training=False), "float32"))
    assert np.asarray(twin(IMAGES, training=False)) == pytest.approx(own, rel=0.05, abs=0.05)
    assert predict(Serving(model), IMAGES).dtype == "float32"


class Scale(keras.layers.Layer):
    """A layer of the user's own, not registered with Keras."""

    def __init__(self, factor, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def call(self, x):
        return keras.ops.cast(x, self.compute_dtype) * self.factor

    def get_config(self):
        return {**super().get_config(), "factor": self.factor}


class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Keras cannot save it: it has no `get_config`."""

    def __call__(self, step):
        return 0.1


def adapted():
    layer = keras.layers.Normalization()
    layer.adapt(IMAGES.astype("float32"))
    return layer


def lookup():
    layer = keras.layers.IntegerLookup()
    layer.adapt(IMAGES.astype("int64").ravel())
    return keras.Sequential([layer, keras.layers.Rescaling(1 / 255)])


def own_activations():
    def twice(x):
        return 2 * x

    return keras.Sequential(
        [
            keras.layers.Rescaling(1 / 255),
            keras.layers.Activation(twice),
            keras.layers.Activation(lambda x: keras.ops.tanh(x)),
            keras.layers.Dense(2, kernel_initializer=lambda shape, dtype: np.ones(shape)),
        ]
    )


# First layers with state outside their variables, or of the user.
FIRST = {
    "adapted": adapted,
    "given": lambda: keras.layers.Normalization(mean=100.0, variance=400.0),
    "nested": lambda: keras.Sequential([keras.Sequential([adapted()])]),
    "lookup": lookup,
    "own layer": lambda: Scale(1 / 255),
    "lambda": lambda: keras.layers.Lambda(lambda x: keras.ops.flip(x, axis=1) / 255),
    "own functions": own_activations,
}


def small_of(make, policy, dtype="uint8"):
    """Returns a model in `policy` whose first layer `make` returns."""
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((28, 28, 1), dtype=dtype)
        x = keras.layers.Conv2D(4, 3, strides=3)(make()(inputs))
        x = keras.layers.Dense(10, dtype="float32")(keras.layers.Flatten()(x))
        return keras.Model(inputs, x)
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "float16"])
@pytest.mark.parametrize("first", FIRST)
def test_a_twin_has_the_state_of_every_layer(first, policy):
    model = small_of(FIRST[first], policy)
    twin = in_float32(model)
    dtypes = {layer.compute_dtype for layer in model._flatten_layers()}
    own, found = (np.asarray(each(IMAGES, training=False)) for each in (model, twin))
    assert check_twin("model", dtypes, own, found)["difference"] < 0.05
    assert not any("float16" in layer.dtype_policy.name for layer in twin._flatten_layers())


def test_the_tables_of_a_look_up_are_in_the_saved_model(tmp_path):
    model = small_of(lookup, "float32")
    module = Serving(model).module()
    tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.serve})
    loaded = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    (found,) = loaded(tf.constant(IMAGES)).values()
    assert found.numpy() == pytest.approx(softmax(model(IMAGES, training=False)), abs=1e-6)


def test_what_a_model_was_compiled_with_plays_no_part():
    inner = small_of(lambda: keras.layers.Rescaling(1 / 255), "mixed_bfloat16")
    model = keras.Sequential([keras.Input((28, 28, 1), dtype="uint8"), inner])
    for each in (inner, model):
        each.compile(keras.optimizers.SGD(Schedule()), loss=lambda y, p: p[:, 0] - y)
    twin = in_float32(model)
    assert not twin.compiled and model.compiled and inner.compiled
    assert model.evaluate(IMAGES, np.zeros(len(IMAGES)), verbose=0)


def test_names_of_functions_are_as_before():
    model = small_of(own_activations, "mixed_bfloat16")
    first = model.layers[1]
    before = [getattr(layer, "activation", None) for layer in first.layers]
    in_float32(model)
    assert [each.__name__ for each in before[1:3]] == ["twice", "<lambda>"]


class Unsaved(keras.layers.Layer):
    """Keras cannot make it again: it needs an argument that its config lacks."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def call(self, x):
        return x * self.factor


def test_what_keras_cannot_save_is_refused_in_one_line():
    model = small_of(lambda: Unsaved(1 / 255), "mixed_bfloat16", dtype="float32")
    with pytest.raises(InputError, match="Keras cannot save it and load it in float32") as caught:
        in_float32(model)
    assert "\n" not in str(caught.value)


def test_a_float32_model_is_exported_itself():
    model = small()
    assert in_float32(model) is model


def test_a_quantized_model_is_refused():
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(10))
    model.quantize("int8")
    with pytest.raises(InputError, match="is quantized already"):
        Serving(model)


def test_a_softmax_is_not_taken_twice():
    model = keras.Sequential([keras.Input((28, 28, 1)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(10, activation="softmax"))
    images = IMAGES / np.float32(255)
    serving = Serving(model, preprocessing=False)
    assert serving.contract.output == "probabilities"
    assert predict(serving, images) == pytest.approx(np.asarray(model(images)), abs=1e-6)


def test_a_resizing_layer_does_not_switch_the_network_to_training():
    """Keras 3.15's `Resizing` makes the BatchNormalization behind it believe that it trains."""
    inputs = keras.Input((28, 28, 1))
    x = keras.layers.Resizing(14, 14)(inputs)
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(x))
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
    before = [weight.numpy() for weight in model.weights]
    expected = softmax(model(IMAGES.astype("float32"), training=False))
    assert predict(Serving(model), IMAGES) == pytest.approx(expected, abs=1e-6)
    assert all((old == new.numpy()).all() for old, new in zip(before, model.weights, strict=True))


def test_images_of_any_size_need_one_where_the_model_does_not_resize_them():
    network = build_resnet(Spec((1,), (8,)), (None, None, 1), 10, stem="small")
    with pytest.raises(InputError, match=r"does not resize them: .*--image-size"):
        Serving(network)
    assert Serving(network, image_size=(20, 24)).contract.image_shape == (20, 24, 1)
    network = build_resnet(Spec((1,), (8,)), (28, 28, 1), 10, stem="small")
    model = with_preprocessing(network, (None, None, 1))
    assert Serving(model).contract.image_shape == (None, None, 1)
    assert Serving(model, image_size=(20, 24)).contract.image_shape == (20, 24, 1)


def test_grouped_convolutions_leave_no_compiled_function_behind():
    """Keras hands them to XLA on a CPU; no converter reads that."""
    serve = Serving(family.build("resnext50_32x4d")).module().serve.get_concrete_function()
    assert "_XlaMustCompile" not in str(serve.graph.as_graph_def())
    assert not tf.config.functions_run_eagerly()
