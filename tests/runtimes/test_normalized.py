"""Models of floats, and quantized ones, that get raw images."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import run_main

from keras_resnet import InputError
from keras_resnet.evaluation.inference import Predictor, load
from keras_resnet.preprocessing import NORMALIZATIONS, find_normalization
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.runtimes.normalized import normalized

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (9, 12, 12, 3), dtype="uint8")
IMAGES[:, 0, 0], IMAGES[:, 0, 1] = 0, 255
QUANTIZED = ("int8", "uint8")


def normalise(name, images):
    row = {"reverse_channels": False, **find_normalization(name, images.shape[-1])}
    floats = (images.astype("float64") / 255 - row["mean"]) / row["std"]
    return (floats[..., ::-1] if row["reverse_channels"] else floats).astype("float32")


def network(name, channels=3):
    """A network of floats; its outputs to `IMAGES`, normalised by a row, are far from alike."""
    keras.utils.set_random_seed(3)
    return keras.Sequential(
        [
            keras.Input((12, 12, channels)),
            keras.layers.Rescaling(1 / np.abs(normalise(name, IMAGES)).max()),
            keras.layers.Conv2D(4, 3, strides=2, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dense(5, activation="softmax"),
        ]
    )


def convert(model, dtype, name):
    """Returns a flatbuffer as TensorFlow's guide makes it."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if dtype in QUANTIZED:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([normalise(name, i[None])] for i in IMAGES)
        converter.inference_input_type = converter.inference_output_type = tf.as_dtype(dtype)
    return converter.convert()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Returns the file of a network, by its input's dtype and normalization; and its outputs."""
    folder, made = tmp_path_factory.mktemp("files"), {}

    def make(dtype, name):
        if (dtype, name) not in made:
            model = network(name)
            path = folder / f"{len(made)}.tflite"
            path.write_bytes(convert(model, dtype, name))
            made[dtype, name] = path, np.asarray(model(normalise(name, IMAGES)))
        return made[dtype, name]

    return make


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("name", ["1/255", "0-255", "inception"])
def test_a_quantized_input_is_normalised_by_its_scale_and_zero_point(dtype, name, files):
    path, expected = files(dtype, name)
    assert load(path)(IMAGES) == pytest.approx(expected, abs=0.02)
    assert load(path, normalize=name)(IMAGES) == pytest.approx(expected, abs=0.02)
    assert np.ptp(expected, axis=0).max() > 0.1


@pytest.mark.parametrize("dtype", QUANTIZED)
@pytest.mark.parametrize("name", ["imagenet", "caffe"])
def test_a_quantized_input_of_another_range_needs_a_name(dtype, name, files):
    path, expected = files(dtype, name)
    with pytest.raises(
        InputError, match=r"represents numbers from -\S+ to \S+, as no normalisation does: name one"
    ) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert load(path, normalize=name)(IMAGES) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_a_file_of_floats_is_normalised_by_name(name, files):
    path, expected = files("float32", name)
    assert load(path, normalize=name)(IMAGES) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match="name their normalisation, such as --normalize imagenet"):
        load(path)


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_keras_model_of_floats(name, channels):
    images = IMAGES[..., :channels]
    model = network(name, channels)
    expected = np.asarray(model(normalise(name, images)))
    found = Predictor(normalized(KerasRuntime(model), name))(images)
    assert found == pytest.approx(expected, abs=1e-5)


def test_what_takes_images_is_not_normalised(small_model, tmp_path):
    with pytest.raises(InputError, match="leave --normalize imagenet out"):
        normalized(KerasRuntime(small_model), "imagenet")
    module = tf.Module()
    spec = tf.TensorSpec([None, 12, 12, 3], tf.uint8)
    serve = tf.function(lambda x: tf.reduce_mean(tf.cast(x, "float32"), [1, 2]), [spec])
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [serve.get_concrete_function()], module
    )
    (tmp_path / "model.tflite").write_bytes(converter.convert())
    with pytest.raises(InputError, match="needs a model that takes floats, this one takes uint8"):
        load(tmp_path / "model.tflite", normalize="1/255")
    assert load(tmp_path / "model.tflite")(IMAGES).shape == (9, 3)


def test_a_model_of_no_images_is_refused():
    model = keras.Sequential([keras.Input((7,)), keras.layers.Dense(3)])
    with pytest.raises(InputError, match="must take images"):
        Predictor(normalized(KerasRuntime(model), "imagenet"))


def test_the_command_line(files, tmp_path, fashion_folder):
    path, _ = files("float32", "imagenet")
    image = next(fashion_folder.glob("*/*.png"))
    done = run_main("predict", path, image, "--normalize", "imagenet")
    assert done.returncode == 0, done.stderr
    done = run_main("predict", path, image, "--normalize", "torch")
    assert done.returncode == 2
    assert "`normalize` must be one of none, imagenet" in done.stderr.splitlines()[-1]
    evaluated = ["evaluate", path, "--dataset", f"folder:{fashion_folder}", "--normalize", "caffe"]
    done = run_main(*evaluated)
    assert done.returncode == 2  # five outputs, and four classes
    assert "5 outputs" in done.stderr and "Traceback" not in done.stderr
