"""Makes a trained model that is a part of the package, `keras_resnet/trained/NAME.keras`.

    python benchmarks/trained_model.py fashion_mnist [--epochs 8] [--run-dir RUN]

It trains `resnet10_narrow` by the recipe "fast", unless RUN is a finished run. The weights are
rounded to values of float16 and the file is compressed, which halves it; it stays an ordinary
.keras file in float32. NAME.json beside it has the file's checksum, its accuracy on the test
images, and the settings of the run.
"""

import argparse
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

from keras_resnet import archive, train
from keras_resnet.evaluation.inference import evaluate_file
from keras_resnet.untrusted.manifest import digest
from keras_resnet.utils import files

LARGEST = 1_000_000
"""Bytes that a model in the package may have."""


def write_small(run, path):
    """Writes the model of a run with rounded weights, compressed."""
    source = Path(run) / "model.keras"
    model, metadata = archive.load_model(source), archive.read_metadata(source)
    model.set_weights([np.float32(np.float16(weight)) for weight in model.get_weights()])
    path.parent.mkdir(exist_ok=True)
    with files.replacing(path) as temporary:
        archive.write_model(model, temporary, metadata)
        with zipfile.ZipFile(temporary) as stored:
            members = {name: stored.read(name) for name in stored.namelist()}
        with zipfile.ZipFile(temporary, "w") as small:
            for name, content in members.items():
                # Without the time, equal weights give equal files.
                member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                small.writestr(member, content, zipfile.ZIP_DEFLATED, compresslevel=9)


def main():
    """Writes the model and its record; status 1 if the file is too large."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=tuple(archive.TRAINED))
    parser.add_argument("--epochs", type=int, default=8, help="of a new run")
    parser.add_argument("--run-dir", type=Path)
    args = parser.parse_args()
    path = archive.TRAINED[args.name]
    with tempfile.TemporaryDirectory() as temporary:
        run = args.run_dir or Path(temporary) / "run"
        if not (run / "report.json").exists():
            train("resnet10_narrow", args.name, "fast", epochs=args.epochs, run_dir=run)
        write_small(run, path)
        report = json.loads((run / "report.json").read_text())
    size, sha256 = digest(path)
    record = {
        "sha256": sha256,
        "bytes": size,
        "accuracy": evaluate_file(path).accuracy,
        "accuracy_of_the_run": report["accuracy"],
        "settings": report["config"]["settings"],
        "recipe": report["config"]["recipe"],
    }
    files.write_json(path.with_suffix(".json"), record)
    print(f"{path}: {size:,} bytes, accuracy {record['accuracy']:.4f}")
    return 0 if size <= LARGEST else 1


if __name__ == "__main__":
    sys.exit(main())
