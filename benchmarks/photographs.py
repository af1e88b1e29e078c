"""The accuracy of `keras-resnet train --dataset folder:…` on a few photographs.

    pip install scikit-image scikit-learn   # for their photographs; nothing else of them is used
    python benchmarks/photographs.py prove
    python benchmarks/photographs.py tfds
    python benchmarks/photographs.py story [--weights timm/resnet18.a1_in1k]
    python benchmarks/photographs.py transfer [--seeds 3] [--target scenes clothes digits]
    python benchmarks/photographs.py folder DIR

`prove` writes a folder of 84 crops of seven photographs, twelve for each, trains with nothing but
`--dataset folder:…`, and measures on 280 other crops. `tfds` does the same with a data set of
TensorFlow Datasets in the form of CIFAR: crops of 32×32 pixels, 100 for each photograph, trained by
the recipe "photos". `story` runs the three commands at the top of the README with the folder of
`prove` and prints their times; `--weights` may be a local repository, and the times are the same
with random weights. `transfer` compares fine-tuning with training from scratch at 20 images a
class, on three targets:

- scenes: the ten kinds of clothes of Fashion-MNIST, turned by up to 30° and in front of
  photographs, from the network of Fashion-MNIST in the package, which has seen none of these
  clothes; 2,000 test images;
- clothes: five classes of Fashion-MNIST, from weights trained on the other five;
- digits: scikit-learn's handwritten digits, from the network in the package; 1,597 test images.

All crops of a class come from one photograph, so parts of the test images have been seen in
training, at other positions and sizes: the task is easier than new photographs of a subject.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from PIL import Image

from keras_resnet import RECIPES

# class -> (package, path of its photograph in the package)
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "temple": ("sklearn", "datasets/images/china.jpg"),
}
NEW_CLASSES = (1, 4, 6, 8, 9)
"""The classes of Fashion-MNIST that the target "clothes" has: trouser, coat, shirt, bag and ankle
boot. The weights know the others: T-shirt, pullover, dress, sandal and sneaker."""


def open_photograph(name):
    """Returns a row of `PHOTOGRAPHS` as a Pillow image."""
    package, path = PHOTOGRAPHS[name]
    found = importlib.util.find_spec(package)
    if found is None:
        sys.exit("the photographs are in scikit-image and scikit-learn: pip install both")
    return Image.open(Path(found.origin).parent / path).convert("RGB")


def write_crops(folder, count, seed):
    """Writes `count` crops of each photograph: 35 to 70 % of its shorter edge, of many shapes."""
    random = np.random.default_rng(seed)
    for name in PHOTOGRAPHS:
        image = open_photograph(name)
        (folder / name).mkdir(parents=True)
        for index in range(count):
            height = int(min(image.size) * random.uniform(0.35, 0.7))
            width = min(int(height * random.uniform(0.75, 1.5)), image.width)
            left = random.integers(0, image.width - width + 1)
            top = random.integers(0, image.height - height + 1)
            box = (left, top, left + width, top + height)
            image.crop(box).save(folder / name / f"{index}.jpg", quality=90)
    return folder


def write_clothes(folder, count, test_count):
    """Writes `count` training and `test_count` test images of each class of `NEW_CLASSES`."""
    from keras_resnet import load_dataset

    dataset = load_dataset("fashion_mnist")
    for split, wanted in (("train", count), ("test", test_count)):
        images, labels = dataset.splits[split].images, dataset.splits[split].labels
        for label in NEW_CLASSES:
            name = dataset.class_names[label].replace("/", " or ")
            (folder / split / name).mkdir(parents=True)
            for index in np.flatnonzero(labels == label)[:wanted]:
                pixels = Image.fromarray(images[index, :, :, 0])
                pixels.save(folder / split / name / f"{index}.png")
    return folder


def write_scenes(folder, count, test_count):
    """Writes test images of Fashion-MNIST, turned, in front of parts of photographs, in grey.

    Each class has `count` training and `test_count` test images, all of different clothes. The
    background is half as bright as its photograph.
    """
    from keras_resnet import load_dataset

    dataset, random = load_dataset("fashion_mnist"), np.random.default_rng(0)
    images, labels = dataset.splits["test"].images[..., 0], dataset.splits["test"].labels
    backgrounds = [open_photograph(name).convert("L") for name in PHOTOGRAPHS]
    for label, name in enumerate(dataset.class_names):
        chosen = np.flatnonzero(labels == label)[: count + test_count]
        for place, index in enumerate(chosen):
            garment = Image.fromarray(images[index]).resize((24, 24), Image.Resampling.BICUBIC)
            canvas = Image.new("L", (40, 40))
            canvas.paste(garment, (8, 8))
            turned = canvas.rotate(random.uniform(-30, 30), Image.Resampling.BICUBIC)
            turned = np.asarray(turned.crop((6, 6, 34, 34)), "float32")
            background = backgrounds[random.integers(len(backgrounds))]
            left, top = (random.integers(0, edge - 112) for edge in background.size)
            part = background.crop((left, top, left + 112, top + 112)).resize((28, 28))
            # A dark pixel of the image belongs to the background, as far as it is dark.
            cover = np.minimum(turned / 32, 1)
            pixels = cover * turned + (1 - cover) * np.asarray(part, "float32") / 2
            split = "train" if place < count else "test"
            path = folder / split / name.replace("/", " or ") / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype("uint8")).save(path)
    return folder


def write_digits(folder, count):
    """Writes `count` training images of each digit, all others as test images; 28×28 pixels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(10):
        for split in ("train", "test"):
            (folder / split / str(label)).mkdir(parents=True)
        for place, index in enumerate(np.flatnonzero(digits.target == label)):
            pixels = Image.fromarray((digits.images[index] * 255 / 16).astype("uint8"))
            split = "train" if place < count else "test"
            path = folder / split / str(label) / f"{index}.png"
            pixels.resize((28, 28), Image.Resampling.BICUBIC).save(path)
    return folder


def write_tfds(root, folders):
    """Writes a data set "crops" of TensorFlow Datasets, images of 32×32 pixels.

    Args:
        root: The folder of prepared data sets.
        folders: Split -> folder of classes.
    """
    import tensorflow_datasets as tfds

    names = list(PHOTOGRAPHS)
    splits = {}
    for split, folder in folders.items():
        paths = [path for name in names for path in sorted((folder / name).iterdir())]
        splits[split] = [
            (
                place,
                {
                    "image": np.array(Image.open(path).resize((32, 32), Image.Resampling.BICUBIC)),
                    "label": names.index(path.parent.name),
                },
            )
            for place, path in enumerate(paths)
        ]
    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(names=names),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="crops",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets=splits,
        data_dir=root,
    )


def pretrain(folder, classes):
    """Trains on classes of Fashion-MNIST by the recipe "fast"; returns the model's file."""
    from keras_resnet import Split, load_dataset, train

    dataset = load_dataset("fashion_mnist")
    splits = {}
    for name, split in dataset.splits.items():
        chosen = np.flatnonzero(np.isin(split.labels, classes))
        labels = np.searchsorted(classes, split.labels[chosen])
        splits[name] = Split(split.images[chosen], labels)
    names = tuple(dataset.class_names[label] for label in classes)
    part = dataclasses.replace(
        dataset, class_names=names, splits=splits, fingerprint=f"classes {classes}"
    )
    run = train(None, part, "fast", run_dir=folder, verbose=False)
    print(f"weights of {len(classes)} classes of Fashion-MNIST: {run.report['accuracy']:.1%}")
    return folder / "model.keras"


def run_command(*words):
    """Runs `keras-resnet`; returns its output and the seconds that it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "keras_resnet.cli", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, time.perf_counter() - start


def prove(folder):
    """Trains with the defaults on twelve crops a class; returns the accuracy on forty others."""
    train, fresh = write_crops(folder / "photos", 12, 0), write_crops(folder / "fresh", 40, 1)
    output, seconds = run_command(
        "train", "--dataset", f"folder:{train}", "--run-dir", folder / "run"
    )
    print(output)
    measured, _ = run_command("evaluate", folder / "run", "--dataset", f"folder:{fresh}", "--json")
    accuracy = json.loads(measured)["accuracy"]
    report = json.loads((folder / "run" / "report.json").read_text())
    print(
        f"{seconds:.0f} s; {report['accuracy']:.1%} of {report['num_images']} held-out crops, "
        f"{accuracy:.1%} of 280 crops that were not in the folder"
    )
    return accuracy


def prove_tfds(folder):
    """Trains on a set of TensorFlow Datasets; returns the accuracy on its test images."""
    splits = {
        split: write_crops(folder / split, count, seed)
        for split, count, seed in (("train", 100, 0), ("test", 40, 1))
    }
    write_tfds(folder / "prepared", splits)
    words = ("--dataset", "tfds:crops", "--data-dir", folder / "prepared", "--recipe", "photos")
    output, seconds = run_command("train", *words, "--run-dir", folder / "run")
    print(output)
    report = json.loads((folder / "run" / "report.json").read_text())
    print(f"{seconds:.0f} s; {report['accuracy']:.1%} of {report['num_images']} test images")
    return report["accuracy"]


def story(folder, weights):
    """Fine-tunes a published network, exports it and classifies a photograph."""
    photos, fresh = write_crops(folder / "photos", 12, 0), write_crops(folder / "fresh", 1, 1)
    run = folder / "run"
    for words in (
        ("train", "--weights", weights, "--dataset", f"folder:{photos}", "--run-dir", run),
        ("export", run, "--to", "tflite"),
        ("predict", run / "export" / "model-int8.tflite", fresh / "cat" / "0.jpg"),
    ):
        output, seconds = run_command(*words)
        print(output)
        print(f"keras-resnet {words[0]}: {seconds:.0f} s", flush=True)


# Target -> functions of a folder, one that writes the data and one that returns the weights to
# start from, and the network of both ways.
TARGETS = {
    "scenes": (
        lambda folder: write_scenes(folder, 20, 200),
        lambda folder: "fashion_mnist",
        "resnet10_narrow",
    ),
    "digits": (
        lambda folder: write_digits(folder, 20),
        lambda folder: "fashion_mnist",
        "resnet10_narrow",
    ),
    "clothes": (
        lambda folder: write_clothes(folder, 20, 200),
        lambda folder: pretrain(folder, [x for x in range(10) if x not in NEW_CLASSES]),
        RECIPES["fast"].model,
    ),
}


def transfer(folder, args):
    """Compares fine-tuning with training from scratch, seed by seed; prints a table."""
    better = []
    for target in args.target:
        write_data, find_weights, model = TARGETS[target]
        data, weights = write_data(folder / target), find_weights(folder / f"{target}-weights")
        ways = {
            "scratch": ("--model", model, "--stem", "small"),
            "fine-tuned": ("--weights", weights),
        }
        found = {way: [] for way in ways}
        for seed in range(args.seeds):
            for way, options in ways.items():
                run_dir = folder / f"{target}-{way}-{seed}"
                words = ("train", "--dataset", f"folder:{data}", "--run-dir", run_dir)
                _, seconds = run_command(*words, "--seed", seed, *options)
                report = json.loads((run_dir / "report.json").read_text())
                found[way].append(report["accuracy"])
                measured = f"{report['accuracy']:.1%} of {report['num_images']} test images"
                took = f"{report['epochs']} epochs, {seconds:.0f} s"
                print(f"{target}, seed {seed}, {way}: {measured}, {took}", flush=True)
        means = {way: statistics.mean(values) for way, values in found.items()}
        print(f"{target}: " + ", ".join(f"{way} {mean:.1%}" for way, mean in means.items()))
        better.append(means["fine-tuned"] > means["scratch"])
    return all(better)


def main():
    """Runs a sub-command in a temporary folder, or in --keep; status 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("prove", "tfds", "story", "transfer", "folder"))
    parser.add_argument("dir", nargs="?", type=Path, help="for `folder`: where to write")
    parser.add_argument("--weights", default="timm/resnet18.a1_in1k", help="for `story`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--target", nargs="+", choices=tuple(TARGETS), default=list(TARGETS))
    parser.add_argument("--keep", type=Path, help="a new folder that keeps data and runs")
    args = parser.parse_args()
    if args.what == "folder":
        print(write_crops(args.dir, 12, 0))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        if args.what == "story":
            story(folder, args.weights)
            return 0
        if args.what == "transfer":
            holds = transfer(folder, args)
        else:
            holds = {"prove": prove, "tfds": prove_tfds}[args.what](folder) >= 0.95
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
