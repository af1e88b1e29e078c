import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_resnet.datasets.base import Split
from keras_resnet.evaluation import report as reports
from keras_resnet.evaluation.metrics import Evaluation
from keras_resnet.evaluation.report import (
    HISTORY_COLUMNS,
    read_history,
    write_history,
    write_report,
)
from keras_resnet.utils.errors import InputError

PICTURES = {"learning_curves.png", "confusion_matrix.png", "confused_pairs.png", "predictions.png"}

CONFIG = {
    "model": "resnet18",
    "num_parameters": 11178378,
    "dataset": {
        "name": "fashion_mnist",
        "source": "IDX files in /data",
        "fingerprint": "ab" * 32,
        "class_names": ["cat", "dog|cow", "_bird_"],
        "image_shape": [28, 28, 1],
        "splits": {"train": 60000, "validation": 10},
        "evaluation_split": "validation",
    },
    "recipe": {"name": "quick", "epochs": 2, "augmentation": [], "description": "A quick one."},
    "seed": 0,
    "precision": "bfloat16",
    "precision_reason": "the processor computes it",
    "backend": "tensorflow",
    "versions": {"keras": "3.15.1"},
    "git_commit": None,
    "machine": {"processor": "A CPU", "cores": 2},
    "command": "keras-resnet train --recipe quick",
}


def row(epoch, **changes):
    values = {
        "loss": 0.5,
        "accuracy": 0.8,
        "val_loss": 0.6,
        "val_accuracy": 0.7,
        "learning_rate": 0.001,
        "seconds": 10.0,
        "images_per_second": 100.0,
        "waiting": 0.25,
    }
    return {"epoch": epoch, **values, **changes}


@pytest.fixture
def evaluated():
    labels = np.array([0, 0, 1, 1, 1, 0, 0, 1, 1, 0])
    probabilities = np.full((10, 3), 0.1, "float32")
    # One error: image 2.
    probabilities[np.arange(10), [0, 0, 0, 1, 1, 0, 0, 1, 1, 0]] = 0.8
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 1), "uint8")
    return Evaluation(labels, probabilities, ("cat", "dog|cow", "_bird_"), 0.5), Split(
        images, labels
    )


# -------------------------------------------------------------------------------------- history

NUMBERS = st.none() | st.floats(allow_nan=False) | st.floats(width=32, allow_nan=False)


@st.composite
def histories(draw):
    epochs = sorted(draw(st.sets(st.integers(0, 1000), max_size=6)))
    columns = HISTORY_COLUMNS[1:]
    return [
        {
            "epoch": epoch,
            **draw(st.fixed_dictionaries({}, optional=dict.fromkeys(columns, NUMBERS))),
        }
        for epoch in epochs
    ]


@given(rows=histories())
def test_history_comes_back_as_it_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("history") / "history.csv"
    write_history(path, rows)
    found = read_history(path)
    assert found == [{column: row.get(column) for column in HISTORY_COLUMNS} for row in rows]
    assert all(type(row["epoch"]) is int for row in found)
    assert all(type(v) in (float, type(None)) for row in found for v in list(row.values())[1:])


def test_numpy_numbers_and_nan_survive(tmp_path):
    path = tmp_path / "history.csv"
    write_history(path, [row(np.int64(1), loss=np.float32(0.1), accuracy=np.float64("nan"))])
    (found,) = read_history(path)
    assert found["epoch"] == 1
    assert found["loss"] == float(np.float32(0.1))
    assert math.isnan(found["accuracy"])


HEADER = ",".join(HISTORY_COLUMNS)
GOOD = "1,0.5,0.8,0.6,0.7,0.001,10,100,0.25"


@pytest.mark.parametrize(
    ("text", "line", "complaint"),
    [
        ("", 1, "the header must be epoch,loss.*got ''"),
        ("epoch,loss\n1,2\n", 1, "the header must be .* got 'epoch,loss'"),
        (HEADER + ",extra\n", 1, "the header must be"),
        (f"{HEADER}\n{GOOD}\n2,0.5\n", 3, "must have 9 cells, got 2"),
        (f"{HEADER}\n\n{GOOD}\n", 2, "must have 9 cells, got 0"),
        (f"{HEADER}\n{GOOD},9\n", 2, "must have 9 cells, got 10"),
        (f"{HEADER}\n{GOOD.replace('0.8', 'high')}\n", 2, "`accuracy` must be float, got 'high'"),
        (f"{HEADER}\n1.5{GOOD[1:]}\n", 2, "`epoch` must be int, got '1.5'"),
        (f"{HEADER}\n{GOOD[1:]}\n", 2, "`epoch` must be int, got ''"),
        (f"{HEADER}\n{GOOD}\n{GOOD}\n", 3, "`epoch` must be greater than the 1 before it, got 1"),
    ],
)
def test_broken_history_is_refused_with_file_and_line(tmp_path, text, line, complaint):
    path = tmp_path / "history.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=rf"history\.csv, line {line}: .*{complaint}"):
        read_history(path)


def test_unreadable_history_names_the_file(tmp_path):
    with pytest.raises(InputError, match=r"absent\.csv: cannot be read"):
        read_history(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"binary\.csv: cannot be read"):
        read_history(tmp_path / "binary.csv")


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([row(1, lr=0.1)], r"got also \['lr'\]"),
        ([{"loss": 0.5}], "`epoch` must be there, got None"),
        ([row(2), row(2)], "`epoch` must be greater than the 2 before it, got 2"),
    ],
)
def test_rows_that_could_not_be_read_back_are_not_written(tmp_path, rows, complaint):
    path = tmp_path / "history.csv"
    path.write_text("old")
    with pytest.raises(InputError, match=complaint):
        write_history(path, rows)
    assert path.read_text() == "old"


# --------------------------------------------------------------------------------------- report


def test_report_is_whole(tmp_path, evaluated):
    evaluation, split = evaluated
    history = [row(1, images_per_second=10.0), row(2), row(3, images_per_second=120.0)]
    report = write_report(tmp_path / "run", CONFIG, history, evaluation, split)
    assert {path.name for path in (tmp_path / "run").iterdir()} == PICTURES | {
        "report.json",
        "report.md",
    }
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
    assert report["accuracy"] == 0.9
    assert report["evaluation_split"] == "validation"
    assert report["epochs"] == 3
    assert report["wall_seconds"] == 30
    assert report["images_per_second"] == {"training": 100, "evaluation": 20}
    assert report["final_epoch"] == history[-1]
    assert report["confusion_matrix"] == [[5, 0, 0], [1, 4, 0], [0, 0, 0]]
    assert report["class_names"] == ["cat", "dog|cow", "_bird_"]
    assert report["per_class"][2]["recall"] is None
    assert report["config"] == CONFIG


def test_markdown_tells_the_run(tmp_path, evaluated):
    run = tmp_path / "a run"
    write_report(run, CONFIG, [row(1), row(2, val_accuracy=0.7654)], *evaluated)
    text = (run / "report.md").read_text()
    assert text.startswith("# resnet18 on fashion_mnist\n\n**Accuracy 90.00% ± 9.49%** on the 10 ")
    assert "validation split" in text
    assert "    keras-resnet train --recipe quick\n" in text
    assert "Training: 2 epochs, 20.0 s, 100 images/s" in text
    assert "| 0.7654 |" in text.replace("           ", "")
    assert r"| dog\|cow |" in text
    assert r"| \_bird\_ |" in text
    for setting in ("11,178,378", "28 × 28 × 1", "train 60,000, validation 10", "cores: 2"):
        assert setting in text
    assert "Git commit" not in text
    for name in PICTURES:
        assert text.count(f"]({name})") == 1
    assert f"keras-resnet evaluate '{run}'\n" in text
    assert f"keras-resnet train --run-dir '{run}' --resume" in text


@pytest.mark.parametrize(
    "config",
    [{}, {"dataset": None, "recipe": {}, "command": None}, dict.fromkeys(CONFIG)],
)
def test_report_does_without_a_config_and_a_history(tmp_path, evaluated, config):
    report = write_report(tmp_path, config, [], *evaluated)
    text = (tmp_path / "report.md").read_text()
    assert text.startswith("# A model\n")
    assert "None" not in text
    assert "learning_curves" not in text
    assert not (tmp_path / "learning_curves.png").exists()
    assert report["epochs"] == 0
    assert report["final_epoch"] is None
    assert report["wall_seconds"] is None


def test_nan_becomes_null_since_json_has_none(tmp_path, evaluated):
    history = [row(1), row(np.int64(2), loss=math.nan, seconds=np.float32(2), val_loss=None)]
    report = write_report(tmp_path, {}, history, *evaluated)

    def refuse(constant):
        pytest.fail(f"{constant} is not JSON")

    loaded = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert loaded == report
    assert report["final_epoch"]["loss"] is None
    assert report["wall_seconds"] == 12


def test_long_tables_are_thinned_and_keep_the_last_epoch(evaluated):
    history = [row(epoch) for epoch in range(1, 153)]
    text = reports._epochs(history)
    shown = [int(line.split("|")[1]) for line in text.splitlines()[2:] if line.startswith("|")]
    assert len(shown) <= reports.MAX_EPOCH_ROWS
    assert shown[-1] == 152
    assert "One row in 3 is shown; `history.csv` holds all 152." in text


def test_of_many_classes_the_worst_are_shown():
    rows = [
        {"name": f"c{i}", "precision": 1.0, "recall": 1.0, "f1": i / 200, "support": 1}
        for i in range(150)
    ]
    text = reports._classes({"per_class": [*rows[::-1], {**rows[0], "name": "none", "f1": None}]})
    assert "| c0 " in text
    assert "| c99 " in text
    assert "| c100 " not in text
    assert "| none " not in text
    assert "100 of 151 classes with the lowest F1" in text


def test_nothing_is_written_for_an_evaluation_of_another_split(tmp_path, evaluated):
    evaluation, split = evaluated
    with pytest.raises(InputError, match="same images"):
        write_report(
            tmp_path, {}, [row(1)], evaluation, Split(split.images, split.labels[::-1].copy())
        )
    assert not (tmp_path / "report.md").exists()
    assert not (tmp_path / "report.json").exists()
