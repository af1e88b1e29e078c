import family
import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_resnet import InputError, Spec, build_resnet, with_preprocessing
from keras_resnet.exporting.graph import Contract, Serving, in_float32

IMAGES = family.noise(count=5)


def ask(serving, images):
    (answers,) = serving.module().serve(tf.constant(serving.prepare(images))).values()
    return answers.numpy()


def softmax(logits):
    return np.asarray(keras.ops.softmax(np.asarray(logits), axis=-1))


def small(**options):
    network = build_resnet(Spec((1,), (8,)), (28, 28, 1), 10, stem="small")
    return with_preprocessing(network, (28, 28, 1), **options)


def test_takes_raw_images_and_gives_probabilities():
    model = small(mean=0.3, std=0.2, augmentation=["flip", "shift"])
    serving = Serving(model)
    assert serving.contract == Contract((28, 28, 1), "uint8", "probabilities", 10)
    assert ask(serving, IMAGES) == pytest.approx(softmax(model(IMAGES, training=False)), abs=1e-6)


def test_without_preprocessing_it_takes_floats_and_gives_logits():
    model = small(mean=0.3, std=0.2)
    serving = Serving(model, preprocessing=False)
    assert serving.contract == Contract((28, 28, 1), "float32", "logits", 10)
    assert serving.prepare(IMAGES).dtype == "float32"
    assert ask(serving, IMAGES) == pytest.approx(
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
def test_other_precisions_leave_in_float32(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = small()
    finally:
        keras.config.set_dtype_policy("float32")
    twin = in_float32(model)
    assert {layer.dtype_policy.name for layer in twin._flatten_layers()} == {"float32"}
    own = np.asarray(keras.ops.cast(model(IMAGES, training=False), "float32"))
    assert np.asarray(twin(IMAGES, training=False)) == pytest.approx(own, rel=0.05, abs=0.05)
    assert ask(Serving(model), IMAGES).dtype == "float32"


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
    assert ask(serving, images) == pytest.approx(np.asarray(model(images)), abs=1e-6)


def test_a_resizing_layer_does_not_switch_the_network_to_training():
    """Keras 3.15's `Resizing` makes the BatchNormalization behind it believe that it trains."""
    inputs = keras.Input((28, 28, 1))
    x = keras.layers.Resizing(14, 14)(inputs)
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(x))
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
    before = [weight.numpy() for weight in model.weights]
    expected = softmax(model(IMAGES.astype("float32"), training=False))
    assert ask(Serving(model), IMAGES) == pytest.approx(expected, abs=1e-6)
    assert all((old == new.numpy()).all() for old, new in zip(before, model.weights, strict=True))


def test_images_of_any_size_need_one():
    network = build_resnet(Spec((1,), (8,)), (28, 28, 1), 10, stem="small")
    model = with_preprocessing(network, (None, None, 1))
    with pytest.raises(InputError, match="takes images of any size: name `image_size`"):
        Serving(model)
    assert Serving(model, image_size=(20, 24)).contract.image_shape == (20, 24, 1)


def test_grouped_convolutions_leave_no_compiled_function_behind():
    """Keras hands them to XLA on a CPU; no converter reads that."""
    serve = Serving(family.build("resnext50_32x4d")).module().serve.get_concrete_function()
    assert "_XlaMustCompile" not in str(serve.graph.as_graph_def())
    assert not tf.config.functions_run_eagerly()
