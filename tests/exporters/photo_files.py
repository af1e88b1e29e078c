"""Small photographs, and a network of random weights that takes them at any size."""

import numpy as np
from PIL import Image

from keras_resnet import Spec, archive, build_resnet, with_preprocessing

NAMES = ["cat", "dog", "newt", "owl"]
COUNT = 12
PREPROCESSING = {
    "resize": "shorter_edge",
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "antialias": True,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
}


def write_photos(folder, size):
    """Writes images of several sizes in four colours, smooth ones and some with edges.

    The first has `size`, that of the network's input; it is cropped as the others are.
    """
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        height, width = generator.integers(size, 4 * size, 2) if number else (size, size)
        colour = 255 * np.array([number % 4 == 0, number % 4 == 1, number % 4 != 3])
        coarse = (0.8 * colour + generator.uniform(0, 51, (3, 4, 3))).astype("uint8")
        resample = Image.Resampling.NEAREST if number % 2 else Image.Resampling.BICUBIC
        image = Image.fromarray(coarse).resize((int(width), int(height)), resample)
        image.save(folder / f"{number:02d}.png")


def write_model(path, photos, size):
    """Writes the .keras file of a network with the preprocessing of a published one."""
    network = build_resnet(Spec((1, 1), (8, 16)), (size, size, 3), len(NAMES), stem="small")
    generator = np.random.default_rng(1)
    for weight in network.weights:
        low, high = (-0.3, 0.3) if weight.path.endswith("kernel") else (0.5, 1.5)
        weight.assign(generator.uniform(low, high, weight.shape))
    model = with_preprocessing(network, (None, None, 3), **PREPROCESSING)
    images = [np.asarray(Image.open(photo))[None] for photo in sorted(photos.iterdir())]
    logits = np.concatenate([model.predict_on_batch(image) for image in images])
    # Centred and spread, so that the photographs have several classes.
    head = network.get_layer("logits")
    head.kernel.assign(head.kernel / logits.std(axis=0))
    head.bias.assign((head.bias - logits.mean(axis=0)) / logits.std(axis=0))
    archive.save_model(model, path, {"class_names": NAMES})
