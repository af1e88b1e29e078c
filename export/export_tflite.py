"""Exports a trained model as TFLite files, and asks each of them about one test image.

    python export_tflite.py RUN_OR_MODEL [--precision float32 float16 dynamic int8] [--out DIR]
        [--dataset NAME] [--no-preprocessing] [--force]

What is written to DIR (default: exported) has passed its proof: LiteRT answered to all test
images as the model does. The options are those of `keras-resnet export`.
"""

import sys
import zipfile

import numpy as np
from ai_edge_litert.interpreter import Interpreter

from keras_resnet import cli


def ask(path, images):
    """Returns the name of a .tflite file's output, and what it gives for a batch of images."""
    # The signature has names for input and output, and takes a batch of any size.
    run = Interpreter(str(path), num_threads=2).get_signature_runner("serving_default")
    ((name, answers),) = run(image=images).items()
    return name, answers


def class_names(path):
    """Returns what the numbers stand for: one name a line, in an archive behind the network."""
    with zipfile.ZipFile(path) as archive:
        return archive.read("labels.txt").decode().split("\n")


def main():
    """Exports, asks and prints; returns the exit status."""
    status, out = cli.export_to("tflite")
    if status:
        return status
    image = np.load(out / "reference.npz")["images"][:1]
    # Those with "batch1" in their names take one image: for accelerators and browsers.
    for path in sorted(out.glob("*.tflite")):
        name, (answer,) = ask(path, image)
        names = class_names(path)
        best = (f"{names[i]} {answer[i]:.4f}" for i in np.argsort(-answer)[:3])
        print(f"{path.name}: {name}:", ", ".join(best))
    return 0


if __name__ == "__main__":
    sys.exit(main())
