"""A picture of what each augmentation and each mixing makes of training images.

    python benchmarks/augmentations.py [docs/images/augmentations.png]

The images are the first ten of Fashion-MNIST's training images.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from keras_resnet import load_dataset
from keras_resnet.datasets.mixing import MIXINGS, mix
from keras_resnet.evaluation.plots import new_figure, save_png
from keras_resnet.preprocessing import AUGMENTATIONS, RAW_AUGMENTATIONS, Augmentation


def change(name, images):
    """Returns the images, changed by a row of `AUGMENTATIONS`, in 0 … 255."""
    is_raw = name in RAW_AUGMENTATIONS
    layer = Augmentation([name], images.shape[1], dtype="float32")
    changed = layer(images if is_raw else images / np.float32(255), training=True)
    return keras.ops.convert_to_numpy(changed) * (1 if is_raw else 255)


def main():
    """Draws a row of images for each augmentation, and writes the PNG."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", nargs="?", type=Path, default="docs/images/augmentations.png")
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    images = load_dataset("fashion_mnist").splits["train"].images[:10]
    rows = {"none": images} | {name: change(name, images) for name in AUGMENTATIONS}
    for name in MIXINGS:
        rows[name], _ = mix(name, images, np.arange(10), 10, np.random.default_rng(0))
    figure = new_figure(7.2, 0.72 * len(rows))
    axes = figure.subplots(len(rows), len(images))
    for row, (name, shown) in zip(axes, rows.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
        for cell, image in zip(row, shown, strict=True):
            cell.imshow(image[..., 0], cmap="gray", vmin=0, vmax=255)
            cell.set(xticks=[], yticks=[])
    save_png(figure, args.path)


if __name__ == "__main__":
    main()
