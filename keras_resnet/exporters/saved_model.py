"""SavedModel: what TensorFlow Serving and other TensorFlow programs load."""

import json
import shutil

import tensorflow as tf

from keras_resnet.utils import files

# TensorFlow's name for what others put beside a SavedModel.
METADATA = "assets.extra/keras_resnet.json"


def write(job, artifact, path):
    """Writes a SavedModel with the signature "serving_default".

    `tf.saved_model.save` of a bare module holds every weight once; Keras's `model.export` holds
    each twice (Keras 3.15), and needs Keras's names to load.

    Args:
        job: The `Job`.
        artifact: The `Artifact`.
        path: The folder to write.
    """
    shutil.copytree(job.serving.module(artifact.batch).save(), path)
    (path / METADATA).parent.mkdir()
    files.write_text(path / METADATA, json.dumps(job.metadata))


def oldest_runtime(path):
    """Returns the TensorFlow that wrote a folder: an older one may lack an operator of it."""
    return f"TensorFlow {'.'.join(tf.__version__.split('.')[:2])}"
