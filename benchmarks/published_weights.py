"""Writes the data files of `keras-resnet models` and of ImageNet's classes, from their sources.

    python benchmarks/published_weights.py results-imagenet.csv

The names and the licences come from the installed timm, the accuracies from the file of timm's
repository that is given (`results/results-imagenet.csv`); a network without a row there has none.
The sizes are those of our own networks in float32.
"""

import argparse
import csv
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import references  # noqa: E402

from keras_resnet import SPECS, build_resnet  # noqa: E402

FOLDER = ROOT / "keras_resnet" / "weights"

# Published by transformers, whose repositories state no accuracy. The licence and the files as the
# hub's pages show them; the safetensors of ResNet-101 are in a branch only.
MICROSOFT = {
    "resnet18": "microsoft/resnet-18",
    "resnet34": "microsoft/resnet-34",
    "resnet50": "microsoft/resnet-50",
    "resnet101": "microsoft/resnet-101@refs/pr/2",
    "resnet152": "microsoft/resnet-152",
}

PUBLISHED_HEADER = """\
# Published weights of the networks of this package; `keras-resnet models` prints them.
# Names, licences and sizes of the images: the pretrained configurations of timm {version}
# (Apache-2.0). Top-1: ImageNet-1k validation as timm's repository states it, file
# results/results-imagenet.csv of 2025-10-30, at the size of the images in the column behind it.
# microsoft/…: licence and files as the hub's pages show them. MB: float32, computed.
"""
CLASSES_HEADER = """\
# The 1,000 classes of ImageNet (ILSVRC 2012) in the order of published networks.
# Ids: WordNet 3.0's synsets in the order of timm {timm}'s imagenet_synsets.txt (Apache-2.0).
# Names: torchvision {torchvision}'s _IMAGENET_CATEGORIES (BSD-3-Clause): lemmas of WordNet 3.0
# (WordNet 3.0 licence), shortened. imagenet_classes_licenses.txt has both licences.
"""


def timm_names(timm):
    """Yields (row of `SPECS`, variant, name) of the networks that timm publishes."""
    for row in SPECS:
        architectures = {"torchvision": row}
        if re.fullmatch(r"resnet\d+d?", row):
            architectures["v2"] = row.replace("resnet", "resnetv2_")
        for variant, architecture in architectures.items():
            for name in timm.list_pretrained(f"{architecture}.*"):
                yield row, variant, name


def megabytes(row, variant, num_classes):
    """Returns the size of a network's weights and statistics in float32, in MB (10⁶ bytes)."""
    network = build_resnet(row, (64, 64, 3), num_classes, variant=variant)
    return round(4 * network.count_params() / 1e6, 1)


def published(timm, results):
    """Yields the rows of `published.csv`."""
    sizes = {}
    for row, variant, name in timm_names(timm):
        cfg = timm.get_pretrained_cfg(name)
        if cfg.num_classes != 1000:
            continue  # features alone
        key = row, variant
        sizes[key] = sizes.get(key) or megabytes(row, variant, cfg.num_classes)
        at = cfg.input_size[-1]
        test_at = (cfg.test_input_size or cfg.input_size)[-1]
        yield {
            "model": row,
            "variant": variant,
            "name": cfg.hf_hub_id,
            "top1": results.get((name, at)),
            "pixels": at,
            "test_top1": results.get((name, test_at)) if test_at != at else None,
            "test_pixels": test_at if test_at != at else None,
            "megabytes": sizes[key],
            "license": cfg.license,
        }
    for row, name in MICROSOFT.items():
        yield {
            "model": row,
            "variant": "torchvision",
            "name": name,
            "pixels": 224,
            "megabytes": megabytes(row, "torchvision", 1000),
            "license": "apache-2.0",
        }


def write(path, header, rows):
    """Writes a CSV file with a header of comments."""
    rows = list(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        file.write(header)
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main():
    """Writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", help="timm's results/results-imagenet.csv")
    arguments = parser.parse_args()
    timm, torchvision = references.import_timm(), references.import_torchvision()
    with open(arguments.results, encoding="utf-8") as file:
        results = {(r["model"], int(r["img_size"])): float(r["top1"]) for r in csv.DictReader(file)}
    order = list(SPECS)
    rows = sorted(published(timm, results), key=lambda row: order.index(row["model"]))
    write(FOLDER / "published.csv", PUBLISHED_HEADER.format(version=timm.__version__), rows)

    synsets = timm.data.ImageNetInfo().label_names()
    names = torchvision.models._meta._IMAGENET_CATEGORIES
    classes = [{"id": id, "name": name} for id, name in zip(synsets, names, strict=True)]
    versions = {"timm": timm.__version__, "torchvision": torchvision.__version__}
    write(FOLDER / "imagenet_classes.csv", CLASSES_HEADER.format(**versions), classes)


if __name__ == "__main__":
    main()
