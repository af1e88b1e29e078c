import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from keras_resnet import InputError
from keras_resnet.exporters import saved_model
from keras_resnet.exporters.exporter import Job
from keras_resnet.exporters.formats import Artifact
from keras_resnet.runtimes.saved_model import IsolatedSavedModel

pytestmark = pytest.mark.thorough

METADATA = {"class_names": [str(i) for i in range(10)]}


@pytest.fixture(scope="module")
def folder(serving, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "saved_model"
    saved_model.write(Job(serving, METADATA, {}, None), Artifact("saved_model", "float32"), path)
    return path


def test_every_weight_is_stored_once(folder, small_model):
    stored = sum(path.stat().st_size for path in (folder / "variables").iterdir())
    weights = 4 * small_model.count_params()
    assert weights <= stored < weights + 10_000


def test_a_process_without_keras_and_this_package_answers_the_same(folder, small_model, fashion):
    images = fashion.splits["test"].images[:50]
    fresh = IsolatedSavedModel(folder)
    try:
        outputs = fresh.run(images)
    finally:
        fresh.close()
    assert outputs == pytest.approx(np.asarray(softmax(small_model, images)), abs=1e-6)
    assert fresh.metadata == METADATA
    assert (fresh.input.name, fresh.input.shape) == ("image", (None, 28, 28, 1))


def softmax(model, images):
    import keras

    return keras.ops.softmax(model(images, training=False))


def test_what_needs_keras_is_found_out(tmp_path):
    """A function of Python's that a SavedModel calls is not in it."""
    import tensorflow as tf

    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([None, 4, 4, 1], tf.uint8, "image")])
    def serve(image):
        sums = tf.numpy_function(lambda x: x.sum((1, 2)), [tf.cast(image, tf.float32)], tf.float32)
        return {"probabilities": tf.ensure_shape(sums, [None, 1])}

    tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": serve})
    fresh = IsolatedSavedModel(tmp_path)
    with pytest.raises(InputError, match="a process without Keras cannot run it"):
        fresh.run(np.zeros((1, 4, 4, 1), "uint8"))
    fresh.close()


def saved_model_cli(*arguments):
    command = Path(sys.executable).with_name("saved_model_cli")
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [command, *map(str, arguments)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_tensorflows_own_tool_shows_and_runs_it(folder, fashion, small_model, tmp_path):
    shown = saved_model_cli(
        *("show", "--dir", folder, "--tag_set", "serve", "--signature_def", "serving_default")
    )
    assert "inputs['image']" in shown
    assert "DT_UINT8" in shown
    assert "outputs['probabilities']" in shown
    images = fashion.splits["test"].images[:3]
    np.save(tmp_path / "images.npy", images)
    saved_model_cli(
        *("run", "--dir", folder, "--tag_set", "serve", "--signature_def", "serving_default"),
        *("--inputs", f"image={tmp_path / 'images.npy'}", "--outdir", tmp_path),
    )
    outputs = np.load(tmp_path / "probabilities.npy")
    assert outputs == pytest.approx(np.asarray(softmax(small_model, images)), abs=1e-6)


def test_the_metadata_lies_where_tensorflow_leaves_room_for_it(folder):
    assert json.loads((folder / "assets.extra/keras_resnet.json").read_text()) == METADATA
