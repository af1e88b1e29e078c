"""Exports a trained model to ONNX files, and runs each of them on one test image.

    python export_onnx.py RUN_OR_MODEL [--precision float32 float16 int8] [--out DIR]
        [--dataset NAME] [--no-preprocessing] [--force]

The files in DIR (default: exported) are verified: ONNX Runtime gave the predictions of the model
for all test images. The options are those of `keras-resnet export`.
"""

import json
import sys

import numpy as np
import onnxruntime

from keras_resnet import cli


def open_file(path):
    """Returns the session of an .onnx file."""
    # Bytes, not the path: the model cannot make the runtime read other files.
    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def top3(session, images):
    """Returns the three most probable classes of the first image, as text."""
    # The class names are an entry of the file's metadata.
    names = json.loads(session.get_modelmeta().custom_metadata_map["class_names"])
    (output,) = session.get_outputs()
    (probabilities,) = session.run([output.name], {"image": images})
    best = np.argsort(-probabilities[0])[:3]
    return f"{output.name}: " + ", ".join(f"{names[i]} {probabilities[0, i]:.4f}" for i in best)


def main():
    """Exports, predicts and prints; returns the exit status."""
    status, out = cli.export_to("onnx")
    if status:
        return status
    image = np.load(out / "reference.npz")["images"][:1]
    for path in sorted(out.glob("*.onnx")):
        print(f"{path.name}: {top3(open_file(path), image)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
