"""The accuracy of the recipes on Fashion-MNIST, by seed, and a ledger of all measurements.

    python benchmarks/accuracy.py measure quick fast [--seeds 3]
    python benchmarks/accuracy.py choose fast [--set epochs=7] [--set learning_rate=0.01]
    python benchmarks/accuracy.py table

`measure` trains on all 60,000 training images and measures the 10,000 test images once. `choose` is
for the search of a recipe: it trains on 55,000 and measures the 5,000 held out, so that nothing is
chosen by the test set; `--set` changes fields of the recipe. Both append a line for each run to
`accuracy.jsonl`, with the machine and the commit; the time is that of training, without evaluation
of the finished model and without the start of the process. `table` prints the means.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from keras_resnet import RECIPES, load_dataset, train
from keras_resnet.datasets import Split

LEDGER = Path(__file__).parent / "accuracy.jsonl"
HELD_OUT = 5_000


def hold_out(dataset):
    """Returns the data set with `HELD_OUT` training images, chosen at random, as test set."""
    train_split = dataset.splits["train"]
    order = np.random.default_rng(0).permutation(len(train_split))
    chosen, rest = np.sort(order[:HELD_OUT]), np.sort(order[HELD_OUT:])
    splits = {
        name: Split(train_split.images[indices], train_split.labels[indices])
        for name, indices in (("train", rest), ("test", chosen))
    }
    return dataclasses.replace(dataset, splits=splits, fingerprint=f"held out {HELD_OUT}")


def run(recipe, seed, dataset, changes):
    """Trains once; returns the line of the ledger."""
    before = RECIPES[recipe]
    RECIPES[recipe] = dataclasses.replace(before, **changes)
    try:
        with tempfile.TemporaryDirectory() as folder:
            done = train(None, dataset, recipe, seed=seed, run_dir=Path(folder) / "run")
    finally:
        RECIPES[recipe] = before
    config = done.report["config"]
    return {
        "recipe": recipe,
        "changes": {name: repr(value) for name, value in changes.items()},
        "model": config["settings"]["model"],
        "parameters": config["num_parameters"],
        "seed": seed,
        "epochs": len(done.history),
        "images": "held out" if dataset.fingerprint.startswith("held") else "test",
        "accuracy": done.report["accuracy"],
        "seconds": round(done.report["wall_seconds"], 1),
        "precision": config["precision"],
        "machine": "{processor}, {cores} cores".format(**config["machine"]),
        "commit": config["git_commit"],
        "date": time.strftime("%Y-%m-%d"),
    }


def parse_change(text):
    """Returns (field, value) of "field=value"; the value is JSON, or else text."""
    name, _, value = text.partition("=")
    if name not in {field.name for field in dataclasses.fields(RECIPES["quick"])}:
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUE with a field of Recipe, got {text}")
    with contextlib.suppress(json.JSONDecodeError):
        value = json.loads(value)
    return name, value


def print_table():
    """Prints the mean accuracy and time of each configuration in the ledger."""
    if not LEDGER.exists():
        sys.exit(f"{LEDGER}: nothing was measured yet")
    groups = collections.defaultdict(list)
    for line in LEDGER.read_text().splitlines():
        row = json.loads(line)
        changes = ", ".join(f"{name} {value}" for name, value in row["changes"].items())
        key = (row["recipe"], changes, row["images"], row["model"], row["epochs"], row["machine"])
        groups[key].append(row)
    for key, rows in groups.items():
        accuracies = [row["accuracy"] for row in rows]
        spread = statistics.stdev(accuracies) if len(rows) > 1 else float("nan")
        seconds = statistics.mean(row["seconds"] for row in rows)
        recipe, changes, images, model, epochs, machine = key
        print(
            f"{recipe:6} {images:8} {statistics.mean(accuracies):.4f} ± {spread:.4f}  "
            f"{len(rows)} seeds  {seconds:4.0f} s  {epochs} epochs  {model}  {changes}  {machine}"
        )


def main():
    """Trains and measures, or prints the table of the ledger."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=("measure", "choose", "table"))
    parser.add_argument("recipes", nargs="*", choices=tuple(RECIPES), default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--set", type=parse_change, action="append", default=[], dest="changes")
    args = parser.parse_args()
    if args.action == "table":
        print_table()
        return
    dataset = load_dataset("fashion_mnist")
    if args.action == "choose":
        dataset = hold_out(dataset)
    elif args.changes:
        sys.exit("--set is for `choose`: a recipe is measured as it stands in recipes.py")
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for recipe in args.recipes:
            row = run(recipe, seed, dataset, dict(args.changes))
            with open(LEDGER, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
