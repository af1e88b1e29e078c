"""Differences from torchvision, timm, Hugging Face and keras.applications, as one table.

    python benchmarks/parity.py [--networks "torchvision resnet50" …] [--quick]

Both networks have the same random weights and BatchNorm statistics. A cell is the largest relative
difference, max|ours − theirs| / max|theirs| of one tensor, in float32 / float64.
`tests/parity.py` computes the differences, and `tests/test_family_parity.py` holds the bounds.
"""

import argparse
import datetime
import gc
import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import parity
import tensorflow as tf
import torch

from keras_resnet.utils.tables import Column, format_duration, format_table

PACKAGES = ("keras", "tensorflow", "torch", "torchvision", "timm", "transformers", "numpy")
SEED = 0

COLUMNS = (
    Column("network", "network"),
    Column("source", "source"),
    Column("parameters", "parameters", ","),
    Column("logits", "logits"),
    Column("stages", "stages"),
    Column("gradients", "gradients"),
    Column("statistics", "BatchNorm statistics"),
    Column("losses", "20 losses"),
)
# 20 steps of a deep network take a minute.
TRAINED = {f"torchvision resnet{depth}" for depth in (18, 34, 50, 101, 152)}


def compare(network, dtype, quick):
    """Returns the differences of a network by column, and its number of parameters."""
    pair = parity.build_pair(network, dtype, SEED)
    found = {"logits": 0.0, "stages": 0.0}
    for size, count in parity.IMAGES[: 1 if quick else None]:
        differences = parity.activation_differences(pair, parity.random_images(size, count))
        found["logits"] = max(found["logits"], differences.pop("logits"))
        found["stages"] = max(found["stages"], *differences.values())
    found["gradients"] = parity.gradient_difference(pair).value
    found["statistics"] = parity.batch_norm_difference(pair)
    if str(network) in TRAINED and not quick:
        found["losses"] = parity.trajectory_difference(pair).value
    return found, pair.ours.num_parameters


def table_row(network, quick):
    """Returns the row of a network."""
    single, parameters = compare(network, "float32", quick)
    double, _ = compare(network, "float64", quick)
    options = ", ".join(name for name, value in network.options if value)
    return {
        "network": f"{network.name} ({options})" if options else network.name,
        "source": network.source,
        "parameters": parameters,
        **{name: f"{short(value)} / {short(double[name])}" for name, value in single.items()},
    }


def short(value):
    """Returns a difference in few characters."""
    return f"{value:.0e}" if value else "0"


def conditions():
    """Returns one line: machine, versions, date, seed."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{machine}, {versions}; {datetime.date.today()}, seed {SEED}"


def main():
    """Measures and prints the table; each network's time goes to standard error."""
    parser = argparse.ArgumentParser(
        description="Differences between each network and its original."
    )
    names = [str(network) for network in parity.NETWORKS]
    parser.add_argument("--networks", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--quick", action="store_true", help="one image size, no training")
    args = parser.parse_args()
    torch.set_num_threads(1)  # otherwise the threads of both libraries wait for each other
    tf.get_logger().setLevel("ERROR")  # no warnings of retraced graphs
    rows = []
    for network in parity.NETWORKS:
        if str(network) in args.networks:
            start = time.perf_counter()
            rows.append(table_row(network, args.quick))
            gc.collect()
            print(f"{network}: {format_duration(time.perf_counter() - start)}", file=sys.stderr)
    print(format_table(rows, COLUMNS, markdown=True))
    print(f"\nfloat32 / float64; {conditions()}")


if __name__ == "__main__":
    main()
