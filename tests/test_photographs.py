"""Photographs that nobody prepared: `keras-resnet train --dataset folder:…` and nothing else."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import photographs


@pytest.mark.slow
def test_the_defaults_tell_seven_photographs_apart(tmp_path):
    for package in ("skimage", "sklearn"):
        pytest.importorskip(package)
    # The share of 280 crops that were not in the folder; chance is 1 / 7.
    assert photographs.prove(tmp_path) >= 0.95
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["accuracy"] >= 0.95
