"""Writes SavedModel folders, for TensorFlow Serving and other TensorFlow programs."""

import json
import shutil

import tensorflow as tf

from keras_resnet.runtimes.saved_model import METADATA
from keras_resnet.utils import files


def write(job, artifact, path):
    """Writes a SavedModel with the signature "serving_default".

    `tf.saved_model.save` of a bare module stores every weight once; Keras's `model.export` stores
    each twice (Keras 3.15), and needs Keras to load.

    Args:
        job: The `Job`.
        artifact: The `Artifact`.
        path: The folder to write.

    Returns:
        The oldest runtime that loads it: this TensorFlow; an older one may lack an operator.
    """
    shutil.copytree(job.serving.module(artifact.batch).save(), path)
    (path / METADATA).parent.mkdir()
    files.write_text(path / METADATA, json.dumps(job.metadata))
    return f"TensorFlow {'.'.join(tf.__version__.split('.')[:2])}"
