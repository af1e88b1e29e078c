"""Every notebook runs from its first cell to its last."""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.thorough

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, idx_folder, tmp_path, monkeypatch):
    import nbclient
    import nbformat

    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    # Committed without outputs: what they show is what running them shows.
    assert not any(cell.get("outputs") for cell in notebook.cells)
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": os.fspath(tmp_path)}}
    ).execute()
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "11,178,378 parameters" in text
    accuracy = float(text.split("test accuracy ")[1].split()[0])
    assert accuracy > 0.75


def test_there_are_notebooks():
    assert NOTEBOOKS
