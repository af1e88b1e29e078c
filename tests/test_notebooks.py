"""Every notebook runs from its first cell to its last, and shows what its text says."""

import json
import os
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

FOLDER = Path(__file__).parents[1] / "notebooks"


def residual_blocks(text):
    difference = float(text.split("largest difference: ")[1].split()[0])
    assert difference < 1e-5
    assert "output equals input: True" in text and "11,178,378 parameters" in text
    losses = json.loads(re.search(r"\{.*'cifar 56'.*\}", text)[0].replace("'", '"'))
    assert losses["plain 56"] > losses["plain 20"] > losses["cifar 20"]
    assert losses["plain 56"] > 1.5 * losses["cifar 56"]
    standard, ours = re.search(r"100 blocks: standard +(\S+) +ours (\S+)", text).groups()
    assert float(standard) > 1e3 > 1e2 > float(ours)


def train_fashion_mnist(text):
    ours, fit = (float(found) for found in re.findall(r"test accuracy (0\.\d+)", text)[:2])
    assert ours > 0.8 and fit > 0.8
    assert "exit status -9" in text and "resumed after epoch 1" in text
    assert "2 replicas" in text


def photos_to_a_phone(text):
    assert float(re.search(r"validation accuracy (\S+)", text)[1]) > 0.7
    found = re.findall(r"^(\w+(?: int8)?) +cat (\S+)  difference (\S+)$", text, re.MULTILINE)
    assert [name for name, *_ in found] == [
        *("Keras", "SavedModel", "TFLite", "TFLite int8", "ONNX", "ONNX int8")
    ]
    for name, _, difference in found:
        assert float(difference) < (0.3 if "int8" in name else 1e-5), name
    assert float(re.search(r"same class in 8 bits: (\S+)", text)[1]) > 0.95


CHECKS = {
    "01_residual_blocks": residual_blocks,
    "02_train_fashion_mnist": train_fashion_mnist,
    "03_your_photos_to_a_phone": photos_to_a_phone,
}


def read(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]


def printed(cells):
    """Returns the text that the cells printed."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", "")) for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_runs(name, idx_folder, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    resources = {"metadata": {"path": os.fspath(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    CHECKS[name](printed(notebook.cells))


@pytest.mark.parametrize("name", CHECKS)
def test_it_was_committed_as_it_ran(name):
    cells = [cell for cell in read(name) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    CHECKS[name](printed(cells))
    assert any("image/png" in output.get("data", {}) for c in cells for output in c["outputs"])


def test_every_notebook_has_a_check():
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(CHECKS)
