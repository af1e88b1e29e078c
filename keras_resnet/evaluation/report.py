"""What a run leaves for people and programs to read: `history.csv`, `report.json`, `report.md`."""

import csv
import io
import math
import shlex
import statistics
from pathlib import Path

from keras_resnet.evaluation import metrics as figures
from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.tables import (
    Column,
    escape_markdown,
    format_duration,
    format_table,
    printable,
)

# ----------------------------------------------------------------------------------------------
# history.csv
# ----------------------------------------------------------------------------------------------

# What turns a cell back into its value. Only `epoch` may not be empty.
_HISTORY_TYPES = {
    "epoch": int,
    "loss": float,
    "accuracy": float,
    "val_loss": float,
    "val_accuracy": float,
    "learning_rate": float,
    "seconds": float,
    "images_per_second": float,
}

HISTORY_COLUMNS = tuple(_HISTORY_TYPES)
"""The columns of `history.csv`, in their order."""


def write_history(path, rows):
    """Writes one line for each epoch as CSV, whole or not at all.

    Args:
        path: The file.
        rows: Mappings with keys of `HISTORY_COLUMNS`. None or absent is an empty cell; `epoch`
            must be there and grow from row to row.

    Raises:
        InputError: A row has an unknown key, or `epoch` is missing or does not grow.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "history.csv"
        >>> write_history(path, [{"epoch": 1, "loss": 0.5}])
        >>> read_history(path)[0]["loss"], read_history(path)[0]["val_loss"]
        (0.5, None)
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(HISTORY_COLUMNS)
    epoch = None
    for row in rows:
        unknown = sorted(set(row) - set(HISTORY_COLUMNS))
        if unknown:
            raise InputError(f"a history row has the columns {_COLUMNS}, got also {unknown}")
        epoch = _next_epoch(row.get("epoch"), epoch)
        writer.writerow([_to_cell(column, row.get(column)) for column in HISTORY_COLUMNS])
    files.write_text(path, text.getvalue())


def read_history(path):
    """Reads what `write_history` wrote.

    Args:
        path: The file.

    Returns:
        A list of dicts, each with every key of `HISTORY_COLUMNS`: `epoch` an int, the others
        floats, or None where the cell is empty.

    Raises:
        InputError: The file cannot be read, or a line breaks a rule; it names file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a history ({error})") from error
    reader = csv.reader(io.StringIO(text))
    rows = []
    try:
        _check_header(next(reader, []))
        for cells in reader:
            rows.append(_from_cells(cells))
            _next_epoch(rows[-1]["epoch"], rows[-2]["epoch"] if len(rows) > 1 else None)
    except (InputError, csv.Error) as error:
        raise InputError(f"{path}, line {max(reader.line_num, 1)}: {error}") from error
    return rows


_COLUMNS = ",".join(HISTORY_COLUMNS)


def _to_cell(column, value):
    # Converted first: the repr of a NumPy number is not what `float` reads.
    return "" if value is None else repr(_HISTORY_TYPES[column](value))


def _check_header(cells):
    if tuple(cells) != HISTORY_COLUMNS:
        raise InputError(f"the header must be {_COLUMNS}, got {','.join(cells)!r}")


def _from_cells(cells):
    if len(cells) != len(HISTORY_COLUMNS):
        raise InputError(f"a row must have {len(HISTORY_COLUMNS)} cells, got {len(cells)}")
    named = zip(HISTORY_COLUMNS, cells, strict=True)
    return {column: _from_cell(column, cell) for column, cell in named}


def _from_cell(column, cell):
    kind = _HISTORY_TYPES[column]
    if cell == "" and column != "epoch":
        return None
    try:
        return kind(cell)
    except ValueError:
        raise InputError(f"`{column}` must be {kind.__name__}, got {cell!r}") from None


def _next_epoch(epoch, before):
    if epoch is None or (before is not None and epoch <= before):
        rule = "be there" if before is None else f"be greater than the {before} before it"
        raise InputError(f"`epoch` must {rule}, got {epoch}")
    return epoch


# ----------------------------------------------------------------------------------------------
# report.json and report.md
# ----------------------------------------------------------------------------------------------

MAX_EPOCH_ROWS = 60
MAX_CLASS_ROWS = 100
"""How long the tables of `report.md` may be; the files beside it hold everything."""


def write_report(run_dir, config, history, evaluation, split):
    """Writes `report.json`, `report.md` and the four pictures beside it.

    Args:
        run_dir: The run folder; it is made where it is missing.
        config: What the run was: settings, model, num_parameters, weights, dataset, recipe, seed,
            precision, strategy, replicas, backend, versions, git_commit, machine, command. What is
            missing or None is left out.
        history: One mapping for each epoch; see `HISTORY_COLUMNS`. It may be empty.
        evaluation: The `evaluation.Evaluation` of the trained model.
        split: The `Split` that was evaluated.

    Returns:
        What `report.json` holds.

    Raises:
        InputError: `evaluation` is of another split.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    report = build_report(config, history, evaluation)
    pictures = _draw_pictures(run_dir, report, history, evaluation, split)
    files.write_json(run_dir / "report.json", report)
    # Last, so that what it points at is there.
    files.write_text(run_dir / "report.md", format_report(run_dir, report, history, pictures))
    return report


def build_report(config, history, evaluation):
    """Returns the figures of a run as plain JSON values.

    The speed of training is the median over the epochs, since the first one may include
    compilation; the time is the sum over all epochs, those before an interruption included.

    Args:
        config: As for `write_report`.
        history: As for `write_report`.
        evaluation: As for `write_report`.

    Returns:
        A dict: evaluation_split, the keys of `Evaluation.to_dict`, epochs, wall_seconds,
        images_per_second ({"training", "evaluation"}), final_epoch, config.
    """
    result = evaluation.to_dict()
    del result["seconds"], result["images_per_second"]
    speeds = _present(history, "images_per_second")
    seconds = _present(history, "seconds")
    report = {
        "evaluation_split": _get(config, "dataset", "evaluation_split") or "test",
        **result,
        "epochs": len(history),
        "wall_seconds": sum(seconds) if seconds else None,
        "evaluation_seconds": evaluation.seconds,
        "images_per_second": {
            "training": statistics.median(speeds) if speeds else None,
            "evaluation": evaluation.images_per_second,
        },
        "final_epoch": dict(history[-1]) if history else None,
        "config": config,
    }
    return _json_value(report)


def format_report(run_dir, report, history, pictures):
    """Returns the text of `report.md`.

    Args:
        run_dir: The run folder, as the commands under "How to go on" name it.
        report: What `build_report` returned.
        history: As for `write_report`.
        pictures: The names of the pictures that lie beside the file.

    Returns:
        Markdown.
    """
    parts = [
        _title(report),
        _result(report),
        _command(report),
        _section("Epochs", _epochs(history), _picture(pictures, "learning_curves.png")),
        _section("Classes", _classes(report), _picture(pictures, "confusion_matrix.png")),
        _section("What is confused", _confused(report), _picture(pictures, "confused_pairs.png")),
        _section("Predictions", _picture(pictures, "predictions.png")),
        _section("How it was made", _setup(report)),
        _section("How to go on", _commands(run_dir)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def format_run(run_dir, report):
    """Returns the lines that end a run on the terminal: the result, and where to look.

    Args:
        run_dir: The run folder.
        report: What `build_report` returned.
    """
    speeds = report["images_per_second"]
    split = report["evaluation_split"]
    facts = {
        f"{split} accuracy": f"{report['accuracy']:.4f} ± {report['accuracy_standard_error']:.4f}",
        f"{split} images": f"{report['num_images']:,}",
        f"{split} loss": f"{report['loss']:.4f}",
        "epochs": str(report["epochs"]),
        "training": format_duration(report["wall_seconds"]),
        "speed": f"{speeds['training']:.0f} images/s",
        "model": str(Path(run_dir) / "model.keras"),
        "report": str(Path(run_dir) / "report.md"),
    }
    rows = [{"run": name, "": value} for name, value in facts.items()]
    return format_table(rows, ["run", ""])


def format_evaluation(evaluation):
    """Returns an evaluation as text: a row a class, then the accuracy over all.

    Args:
        evaluation: An `evaluation.Evaluation`.
    """
    columns = [
        Column("name", "class"),
        *(Column(key, spec=".4f") for key in ("precision", "recall", "f1")),
        Column("support", "images", ","),
    ]
    return (
        f"{format_table(evaluation.per_class, columns)}\n\n"
        f"accuracy {evaluation.accuracy:.4f} ± {evaluation.accuracy_standard_error:.4f}, "
        f"loss {evaluation.loss:.4f}, on {len(evaluation):,} images, "
        f"{evaluation.images_per_second:.0f} images/s"
    )


_ALT_TEXTS = {
    "learning_curves.png": "Loss, accuracy and learning rate by epoch",
    "confusion_matrix.png": "Confusion matrix",
    "confused_pairs.png": "Images of the most confused pairs of classes",
    "predictions.png": "Images with what was predicted for them",
}


def _draw_pictures(run_dir, report, history, evaluation, split):
    name = report["evaluation_split"]
    draw = {
        "learning_curves.png": lambda p: figures.plot_learning_curves(history, p, split_name=name),
        "confusion_matrix.png": lambda p: figures.plot_confusion_matrix(evaluation, p),
        "confused_pairs.png": lambda p: figures.plot_confused_pairs(evaluation, split, p),
        "predictions.png": lambda p: figures.plot_predictions(evaluation, split, p),
    }
    if not _present(history, "loss"):
        del draw["learning_curves.png"]
    for file_name, plot in draw.items():
        plot(run_dir / file_name)
    return tuple(draw)


def _picture(pictures, name):
    return f"![{_ALT_TEXTS[name]}]({name})" if name in pictures else ""


def _section(title, *parts):
    body = "\n\n".join(part for part in parts if part)
    return f"## {title}\n\n{body}" if body else ""


def _title(report):
    model = _get(report, "config", "model") or "A model"
    dataset = _get(report, "config", "dataset", "name")
    return f"# {_text(model)}" + (f" on {_text(dataset)}" if dataset else "")


def _result(report):
    error, images = report["accuracy_standard_error"], report["num_images"]
    lines = [
        f"**Accuracy {report['accuracy']:.2%} ± {error:.2%}** on the {images:,} images of the "
        f"{_text(report['evaluation_split'])} split.\n",
        "- ± is one binomial standard error: other images of the same kind, as many, would move "
        "the accuracy by about so much. It does not hold what another seed would change.",
        f"- Cross-entropy: {report['loss']:.4f}.",
        _top_5(report),
        _training(report),
        f"- Evaluation: {_pace(report, 'evaluation_seconds', 'evaluation')}.",
    ]
    return "\n".join(line for line in lines if line)


def _top_5(report):
    share = report["top_5_accuracy"]
    return "" if share is None else f"- Top-5 accuracy: {share:.2%}."


def _training(report):
    pace = _pace(report, "wall_seconds", "training")
    plural = "" if report["epochs"] == 1 else "s"
    return f"- Training: {report['epochs']} epoch{plural}, {pace}." if pace else ""


def _pace(report, seconds, speed):
    seconds, speed = report[seconds], report["images_per_second"][speed]
    parts = [
        format_duration(seconds) if seconds is not None else "",
        f"{speed:,.0f} images/s" if speed is not None else "",
    ]
    return ", ".join(part for part in parts if part)


def _command(report):
    config = report.get("config") or {}
    parts = [("The command was", config.get("command"))]
    for each in config.get("continued") or ():
        parts.append((f"Continued after epoch {each['after_epoch']} by", each["command"]))
    return "\n\n".join(f"{text}\n\n{_code(command)}" for text, command in parts if command)


_EPOCH_COLUMNS = (
    Column("epoch", "Epoch"),
    Column("loss", "Loss", ".4f"),
    Column("accuracy", "Accuracy", ".4f"),
    Column("val_loss", "Held-out loss", ".4f"),
    Column("val_accuracy", "Held-out accuracy", ".4f"),
    Column("learning_rate", "Learning rate", ".3g"),
    Column("seconds", "Seconds", ".1f"),
    Column("images_per_second", "Images/s", ",.0f"),
)


def _epochs(history):
    if not history:
        return ""
    # Every n-th row, counted from the last, which is the one that must not be missing.
    step = math.ceil(len(history) / MAX_EPOCH_ROWS)
    rows = history[::-step][::-1]
    note = (
        "Loss and accuracy are means over the epoch, taken while the weights changed and with "
        "augmentation, so they can be worse than the held-out figures measured at its end."
    )
    if step > 1:
        note += f" One row in {step} is shown; `history.csv` holds all {len(history)}."
    return f"{format_table(rows, _EPOCH_COLUMNS, markdown=True)}\n\n{note}"


_CLASS_COLUMNS = (
    Column("name", "Class"),
    Column("precision", "Precision", ".3f"),
    Column("recall", "Recall", ".3f"),
    Column("f1", "F1", ".3f"),
    Column("support", "Images", ","),
)


def _classes(report):
    rows = report["per_class"]
    note = "– stands where nothing can be measured: the class was never predicted or has no images."
    if len(rows) > MAX_CLASS_ROWS:
        note += f" The {MAX_CLASS_ROWS} of {len(rows)} classes with the lowest F1 are shown; "
        note += "`report.json` holds all."
        rows = sorted(rows, key=lambda row: math.inf if row["f1"] is None else row["f1"])
    table = format_table(rows[:MAX_CLASS_ROWS], _CLASS_COLUMNS, markdown=True)
    return f"{table}\n\n{note}"


_CONFUSED_COLUMNS = (
    Column("true", "True"),
    Column("predicted", "Predicted"),
    Column("count", "Images", ","),
)


def _confused(report):
    rows = report["most_confused"]
    return format_table(rows, _CONFUSED_COLUMNS, markdown=True) if rows else "Nothing."


# (what a reader sees, where `config` keeps it, how to write it)
_SETUP = (
    ("Model", ("model",), str),
    ("Parameters", ("num_parameters",), "{:,}".format),
    ("Trained of them", ("num_trained_parameters",), "{:,}".format),
    ("Started from", ("settings", "weights"), str),
    ("", ("weights", "sha256"), "sha256 {}".format),
    ("Frozen", ("settings", "freeze"), ", ".join),
    ("Data set", ("dataset", "name"), str),
    ("Found", ("dataset", "source"), str),
    ("Images", ("dataset", "splits"), lambda splits: _pairs(splits, "{} {:,}")),
    ("Image shape", ("dataset", "image_shape"), lambda shape: " × ".join(map(str, shape))),
    ("Fingerprint", ("dataset", "fingerprint"), str),
    ("Recipe", ("recipe", "name"), str),
    ("", ("recipe", "description"), str),
    ("Epochs", ("recipe", "epochs"), str),
    ("Batch size", ("recipe", "batch_size"), str),
    ("Image size", ("recipe", "image_size"), str),
    ("Normalization", ("settings", "normalize"), str),
    ("Variant", ("recipe", "variant"), str),
    ("Stem", ("recipe", "stem"), str),
    ("Optimizer", ("recipe", "optimizer"), str),
    ("Learning rate", ("recipe", "learning_rate"), str),
    ("Schedule", ("recipe", "schedule"), str),
    (
        "Augmentation",
        ("recipe", "augmentation"),
        lambda names: ", ".join(map(str, names)) or "none",
    ),
    ("Seed", ("seed",), str),
    ("Precision", ("precision",), str),
    ("", ("precision_reason",), str),
    ("Strategy", ("strategy",), str),
    ("", ("strategy_reason",), str),
    ("Replicas", ("replicas",), str),
    ("Synchronised BatchNorm", ("settings", "sync_batchnorm"), str),
    ("Backend", ("backend",), str),
    ("Versions", ("versions",), lambda versions: _pairs(versions, "{} {}")),
    ("Git commit", ("git_commit",), str),
    ("Machine", ("machine",), lambda machine: _pairs(machine, "{}: {}")),
)


def _setup(report):
    found = ((title, _get(report, "config", *keys), write) for title, keys, write in _SETUP)
    rows = [
        {"setting": title, "value": write(value)}
        for title, value, write in found
        if value is not None
    ]
    columns = Column("setting", "Setting"), Column("value", "Value")
    return format_table(rows, columns, markdown=True) if rows else ""


def _commands(run_dir):
    run = shlex.quote(str(run_dir))
    return _code(
        f"keras-resnet evaluate {run}\n"
        f"keras-resnet predict {run} IMAGE…\n"
        f"keras-resnet train --run-dir {run} --resume   # goes on after an interruption"
    )


def _code(text):
    # Indented, not fenced: no text can close the block.
    return "\n".join("    " + printable(line) for line in text.splitlines())


def _text(value):
    return escape_markdown(printable(str(value)))


def _pairs(mapping, template):
    return ", ".join(template.format(key, value) for key, value in mapping.items())


def _present(history, key):
    values = (row.get(key) for row in history)
    return [value for value in values if value is not None and math.isfinite(value)]


def _get(mapping, *keys):
    for key in keys:
        mapping = (mapping or {}).get(key)
    return mapping


def _json_value(value):
    """Returns `value` as what JSON can hold: NaN and infinity, which it cannot, become None."""
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    # NumPy's scalars have `item`, which gives Python's.
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
