"""Exports a trained model to a SavedModel, and runs it on one test image.

    python export_saved_model.py RUN_OR_MODEL [--out DIR] [--dataset NAME] [--no-preprocessing]
        [--force]

The folder in DIR (default: exported) is verified: TensorFlow, in a process without Keras, gave the
predictions of the model for all test images. The options are those of `keras-resnet export`.
"""

import json
import sys

import numpy as np
import tensorflow as tf

from keras_resnet import cli


def main():
    """Exports, predicts and prints; returns the exit status."""
    status, out = cli.export_to("saved_model")
    if status:
        return status
    # As TensorFlow Serving does: neither Keras nor keras_resnet is needed from here on.
    folder = out / "saved_model"
    loaded = tf.saved_model.load(str(folder))
    metadata = json.loads(
        (folder / "assets.extra" / "keras_resnet.json").read_text(encoding="utf-8")
    )
    image = np.load(out / "reference.npz")["images"][:1]
    serve = loaded.signatures["serving_default"]
    ((name, probabilities),) = serve(image=tf.constant(image)).items()
    best = np.argsort(-probabilities.numpy()[0])[:3]
    named = (f"{metadata['class_names'][i]} {probabilities[0, i]:.4f}" for i in best)
    print(f"{folder.name}: {name}:", ", ".join(named))
    return 0


if __name__ == "__main__":
    sys.exit(main())
