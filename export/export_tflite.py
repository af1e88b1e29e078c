"""Exports a trained model to TFLite files, and runs each of them on one test image.

    python export_tflite.py RUN_OR_MODEL [--precision float32 float16 dynamic int8] [--out DIR]
        [--dataset NAME] [--no-preprocessing] [--force]

The files in DIR (default: exported) are verified: the predictions of LiteRT for all test images
are those of the model. The options are those of `keras-resnet export`.
"""

import sys
import zipfile

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from keras_resnet import cli


def predict(path, images):
    """Returns the name of a .tflite file's output, and the output for a batch of images."""
    # The signature has names for input and output, and takes a batch of any size.
    run = Interpreter(str(path), num_threads=2).get_signature_runner("serving_default")
    ((name, probabilities),) = run(image=images).items()
    return name, probabilities


def class_names(path):
    """Returns the class names: the lines of a file in the ZIP archive after the network."""
    with zipfile.ZipFile(path) as archive:
        return archive.read("labels.txt").decode().split("\n")


def main():
    """Exports, predicts and prints; returns the exit status."""
    status, out = cli.export_to("tflite")
    if status:
        return status
    image = np.load(out / "reference.npz")["images"][:1]
    # Files with "batch1" in the name take one image, for accelerators and browsers.
    for path in sorted(out.glob("*.tflite")):
        name, (probabilities,) = predict(path, image)
        names = class_names(path)
        best = (f"{names[i]} {probabilities[i]:.4f}" for i in np.argsort(-probabilities)[:3])
        print(f"{path.name}: {name}:", ", ".join(best))
    return 0


if __name__ == "__main__":
    sys.exit(main())
