"""The files of a run folder that people and programs read: history.csv, report.json, report.md."""

import csv
import io
import math
import shlex
import statistics
from pathlib import Path

from keras_resnet.evaluation import plots
from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.tables import (
    Column,
    escape_markdown,
    format_duration,
    format_table,
    printable,
)

_EPOCH_COLUMNS = (
    Column("epoch", "Epoch"),
    Column("loss", "Loss", ".4f"),
    Column("accuracy", "Accuracy", ".4f"),
    Column("val_loss", "Held-out loss", ".4f"),
    Column("val_accuracy", "Held-out accuracy", ".4f"),
    Column("learning_rate", "Learning rate", ".3g"),
    Column("seconds", "Seconds", ".1f"),
    Column("images_per_second", "Images/s", ",.0f"),
    Column("waiting", "Waiting for data", ".1%"),
)

HISTORY_COLUMNS = tuple(column.key for column in _EPOCH_COLUMNS)
"""The columns of `history.csv`: `epoch` is an int, the others are floats and may be empty."""

# ----------------------------------------------------------------------------------------------
# history.csv
# ----------------------------------------------------------------------------------------------


def write_history(path, rows):
    """Writes one line for each epoch as CSV, whole or not at all.

    Args:
        path: The file.
        rows: Mappings with keys of `HISTORY_COLUMNS`. None or an absent key is an empty cell;
            `epoch` is required and must increase from row to row.

    Raises:
        InputError: A row has an unknown key, or `epoch` is missing or does not increase.

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
            raise InputError(
                f"a history row has the columns {','.join(HISTORY_COLUMNS)}, got also {unknown}"
            )
        epoch = _check_epoch(row.get("epoch"), epoch)
        values = ((column, row.get(column)) for column in HISTORY_COLUMNS)
        # A NumPy number would be written with fewer digits than its float has.
        writer.writerow([None if v is None else _history_type(c)(v) for c, v in values])
    files.write_text(path, text.getvalue())


def read_history(path):
    """Reads a file that `write_history` wrote.

    Args:
        path: The file.

    Returns:
        A list of dicts, each with every key of `HISTORY_COLUMNS`: `epoch` an int, the others
        floats, or None for an empty cell.

    Raises:
        InputError: The file cannot be read, or a line breaks a rule; it names file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a history ({error})") from error
    reader = csv.reader(io.StringIO(text))
    rows, epoch = [], None
    try:
        header, columns = ",".join(next(reader, [])), ",".join(HISTORY_COLUMNS)
        if header != columns:
            raise InputError(f"the header must be {columns}, got {header!r}")
        for cells in reader:
            rows.append(_parse_row(cells))
            epoch = _check_epoch(rows[-1]["epoch"], epoch)
    except (InputError, csv.Error) as error:
        raise InputError(f"{path}, line {max(reader.line_num, 1)}: {error}") from error
    return rows


def _history_type(column):
    return int if column == "epoch" else float


def _parse_row(cells):
    if len(cells) != len(HISTORY_COLUMNS):
        raise InputError(f"a row must have {len(HISTORY_COLUMNS)} cells, got {len(cells)}")
    row = {}
    for column, cell in zip(HISTORY_COLUMNS, cells, strict=True):
        kind = _history_type(column)
        try:
            row[column] = None if cell == "" and column != "epoch" else kind(cell)
        except ValueError:
            raise InputError(f"`{column}` must be {kind.__name__}, got {cell!r}") from None
    return row


def _check_epoch(epoch, previous):
    if epoch is None or (previous is not None and epoch <= previous):
        rule = "be there" if previous is None else f"be greater than the {previous} before it"
        raise InputError(f"`epoch` must {rule}, got {epoch}")
    return epoch


# ----------------------------------------------------------------------------------------------
# report.json and report.md
# ----------------------------------------------------------------------------------------------

MAX_EPOCH_ROWS = 60
MAX_CLASS_ROWS = 100
"""The longest tables of `report.md`; history.csv and report.json hold all rows."""


def write_report(run_dir, config, history, evaluation, split, heat_maps=None):
    """Writes `report.json`, `report.md` and its plots.

    Args:
        run_dir: The run folder; it is made if it is missing.
        config: The contents of config.json. Keys that are missing or None are left out of the
            report.
        history: One mapping for each epoch; see `HISTORY_COLUMNS`. It may be empty.
        evaluation: The `Evaluation` of the trained model.
        split: The `Split` that was evaluated.
        heat_maps: See `plots.plot_heat_maps`; None draws none.

    Returns:
        The contents of `report.json`.

    Raises:
        InputError: `evaluation` is of another split.
    """
    run_dir = Path(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    report = build_report(config, history, evaluation)
    if has_curves := bool(_present(history, "loss")):
        plots.plot_learning_curves(
            history,
            run_dir / "learning_curves.png",
            split_name=_get(config, "dataset.selection_split") or report["evaluation_split"],
        )
    plots.plot_confusion_matrix(evaluation, run_dir / "confusion_matrix.png")
    plots.plot_confused_pairs(evaluation, split, run_dir / "confused_pairs.png")
    plots.plot_predictions(evaluation, split, run_dir / "predictions.png")
    if heat_maps is not None:
        plots.plot_heat_maps(evaluation, split, heat_maps, run_dir / "grad_cam.png")
    files.write_json(run_dir / "report.json", report)
    # Last: the files that it links to must exist.
    text = format_report(run_dir, report, history, has_curves, heat_maps is not None)
    files.write_text(run_dir / "report.md", text)
    return report


def build_report(config, history, evaluation):
    """Returns the metrics of a run as plain JSON values.

    Training speed and wait for data are medians over the epochs, since the first epoch may include
    compilation; the time is the sum over all epochs, including those before an interruption.

    Args:
        config: As for `write_report`.
        history: As for `write_report`.
        evaluation: As for `write_report`.

    Returns:
        A dict: evaluation_split, the keys of `Evaluation.to_dict`, epochs, wall_seconds,
        images_per_second ({"training", "evaluation"}), waiting_for_data (share of the training
        time), final_epoch, best_epoch (a number), config.
    """
    result = evaluation.to_dict()
    del result["seconds"], result["images_per_second"]
    speeds, waits, seconds = (
        _present(history, key) for key in ("images_per_second", "waiting", "seconds")
    )
    report = {
        "evaluation_split": _get(config, "dataset.evaluation_split") or "test",
        **result,
        "epochs": len(history),
        "wall_seconds": sum(seconds) if seconds else None,
        "evaluation_seconds": evaluation.seconds,
        "images_per_second": {
            "training": statistics.median(speeds) if speeds else None,
            "evaluation": evaluation.images_per_second,
        },
        "waiting_for_data": statistics.median(waits) if waits else None,
        "final_epoch": dict(history[-1]) if history else None,
        "best_epoch": _best_epoch(history),
        "config": config,
    }
    return _json_value(report)


def find_best(history):
    """Returns the index of the best epoch: the highest held-out accuracy, then the lowest loss.

    Args:
        history: One dict per epoch, with `val_accuracy` and `val_loss`; at least one.

    Example:
        >>> find_best([{"val_accuracy": 0.5, "val_loss": loss} for loss in (2.0, 1.0, 1.0)])
        1
    """
    rank = [(row["val_accuracy"], -row["val_loss"]) for row in history]
    return rank.index(max(rank))


def _best_epoch(history):
    measured = [
        row for row in history if None not in (row.get("val_accuracy"), row.get("val_loss"))
    ]
    return measured[find_best(measured)]["epoch"] if measured else None


def format_report(run_dir, report, history, has_curves=True, has_heat_maps=False):
    """Returns the text of `report.md`.

    Args:
        run_dir: The run folder, for the commands under "How to go on".
        report: The result of `build_report`.
        history: As for `write_report`.
        has_curves: Whether learning_curves.png exists.
        has_heat_maps: Whether grad_cam.png exists.

    Returns:
        Markdown.
    """
    curves = "![Loss, accuracy and learning rate by epoch](learning_curves.png)"
    sections = {
        "Epochs": [_epochs(history), curves if has_curves else ""],
        "Classes": [_classes(report), "![Confusion matrix](confusion_matrix.png)"],
        "Most confused classes": [
            _confused(report),
            "![Images of the most confused pairs of classes](confused_pairs.png)",
        ],
        "Predictions": ["![Images with their predictions](predictions.png)"],
        "Where the network looked": [_HEAT_MAPS if has_heat_maps else ""],
        "How it was made": [_setup(report)],
        "How to go on": [_next_commands(run_dir)],
    }
    parts = [_title(report), _result(report), _commands(report)]
    for title, texts in sections.items():
        if any(texts):
            parts += [f"## {title}", *texts]
    return "\n\n".join(part for part in parts if part) + "\n"


_HEAT_MAPS = (
    "![Images and heat maps of the predicted and of the true class](grad_cam.png)\n\n"
    "The parts of an image that raised the logit of a class most, by Grad-CAM (Selvaraju et al. "
    "2017); the most confident errors first. Light on the background, and not on the object, hints "
    "at a background that the photographs of a class share."
)


def format_run(run_dir, report):
    """Returns the lines that end a run on the terminal: the result, and the paths of the files.

    Args:
        run_dir: The run folder.
        report: The result of `build_report`.
    """
    split = report["evaluation_split"]
    facts = {
        f"{split} accuracy": f"{report['accuracy']:.4f} ± {report['accuracy_standard_error']:.4f}",
        f"{split} images": f"{report['num_images']:,}",
        f"{split} loss": f"{report['loss']:.4f}",
        "epochs": str(report["epochs"]),
        "training": format_duration(report["wall_seconds"]),
        "speed": f"{report['images_per_second']['training']:.0f} images/s",
        "model": str(Path(run_dir) / "model.keras"),
        "report": str(Path(run_dir) / "report.md"),
    }
    rows = [{"run": name, "": value} for name, value in facts.items()]
    return format_table(rows, ["run", ""])


def format_evaluation(evaluation):
    """Returns an evaluation as text: one row for each class, then the overall accuracy.

    Args:
        evaluation: An `Evaluation`.
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


def _title(report):
    model, dataset = _get(report, "config.model"), _get(report, "config.dataset.name")
    return f"# {_text(model or 'A model')}" + (f" on {_text(dataset)}" if dataset else "")


def _result(report):
    error, epochs = report["accuracy_standard_error"], report["epochs"]
    top_5, training = report["top_5_accuracy"], _pace(report, "wall_seconds", "training")
    if training and report["waiting_for_data"] is not None:
        training += f", {report['waiting_for_data']:.1%} of the time waiting for data"
    lines = [
        f"**Accuracy {report['accuracy']:.2%} ± {error:.2%}** on the {report['num_images']:,} "
        f"images of the {_text(report['evaluation_split'])} split.\n",
        "- ± is one binomial standard error: the accuracy on another sample of as many images "
        "would differ by about this much. It does not include the effect of another seed.",
        f"- Cross-entropy: {report['loss']:.4f}.",
        _selection(report),
        "" if top_5 is None else f"- Top-5 accuracy: {top_5:.2%}.",
        f"- Training: {epochs} epoch{'s' * (epochs != 1)}, {training}." if training else "",
        f"- Evaluation: {_pace(report, 'evaluation_seconds', 'evaluation')}.",
    ]
    return "\n".join(line for line in lines if line)


def _selection(report):
    """Returns a sentence about the images by which the best epoch was chosen; "" if none was."""
    if not _get(report, "config.recipe.patience"):
        return ""
    chosen = _get(report, "config.dataset.selection_split")
    epoch = _get(report, "best_epoch")
    if chosen == report["evaluation_split"]:
        return (
            f"- Epoch {epoch} was chosen, as the best on these same images: the accuracy on new "
            "images tends to be lower. A test split, a folder of its own, would show it."
        )
    return f"- Epoch {epoch} was chosen, as the best on the {_text(chosen)} split."


def _pace(report, seconds, speed):
    seconds, speed = report[seconds], report["images_per_second"][speed]
    parts = [
        "" if seconds is None else format_duration(seconds),
        "" if speed is None else f"{speed:,.0f} images/s",
    ]
    return ", ".join(part for part in parts if part)


def _commands(report):
    config = report.get("config") or {}
    commands = [("The command was", config.get("command"))]
    for each in config.get("continued") or ():
        commands.append((f"Continued after epoch {each['after_epoch']} by", each["command"]))
    return "\n\n".join(f"{text}\n\n{_code(command)}" for text, command in commands if command)


def _next_commands(run_dir):
    run = shlex.quote(str(run_dir))
    return _code(
        f"keras-resnet evaluate {run}\n"
        f"keras-resnet predict {run} IMAGE…\n"
        f"keras-resnet train --run-dir {run} --resume   # goes on after an interruption"
    )


def _epochs(history):
    if not history:
        return ""
    # Every n-th row, counted backwards so that the last epoch is included.
    step = math.ceil(len(history) / MAX_EPOCH_ROWS)
    note = (
        "Loss and accuracy are means over the epoch, computed while the weights changed and with "
        "augmentation, so they can be worse than the held-out values at its end."
    )
    if step > 1:
        note += f" One row in {step} is shown; `history.csv` holds all {len(history)}."
    rows = history[::-step][::-1]
    return f"{format_table(rows, _EPOCH_COLUMNS, markdown=True)}\n\n{note}"


def _classes(report):
    columns = (
        Column("name", "Class"),
        Column("precision", "Precision", ".3f"),
        Column("recall", "Recall", ".3f"),
        Column("f1", "F1", ".3f"),
        Column("support", "Images", ","),
    )
    rows = report["per_class"]
    note = "– marks an undefined value: the class was never predicted or has no images."
    if len(rows) > MAX_CLASS_ROWS:
        note += f" The {MAX_CLASS_ROWS} of {len(rows)} classes with the lowest F1 are shown; "
        note += "`report.json` holds all."
        rows = sorted(rows, key=lambda row: math.inf if row["f1"] is None else row["f1"])
    return f"{format_table(rows[:MAX_CLASS_ROWS], columns, markdown=True)}\n\n{note}"


def _confused(report):
    columns = (
        Column("true", "True"),
        Column("predicted", "Predicted"),
        Column("count", "Images", ","),
    )
    rows = report["most_confused"]
    return format_table(rows, columns, markdown=True) if rows else "Nothing."


def _pairs(template):
    return lambda mapping: ", ".join(template.format(*item) for item in mapping.items())


# (the row's title, its path in `config`, how to format its value); recipe and settings follow.
_FACTS = (
    ("Model", "model", str),
    ("Parameters", "num_parameters", "{:,}".format),
    ("Trained of them", "num_trained_parameters", "{:,}".format),
    ("Checkpoint", "weights.sha256", "sha256 {}".format),
    ("Data set", "dataset.name", str),
    ("Source", "dataset.source", str),
    ("Images", "dataset.splits", _pairs("{} {:,}")),
    ("Image shape", "dataset.image_shape", lambda shape: " × ".join(map(str, shape))),
    ("Fingerprint", "dataset.fingerprint", str),
    ("Computed in", "precision", str),
    ("Reason for the precision", "precision_reason", str),
    ("Strategy", "strategy", str),
    ("Reason for the strategy", "strategy_reason", str),
    ("Replicas", "replicas", str),
    ("Backend", "backend", str),
    ("Versions", "versions", _pairs("{} {}")),
    ("Git commit", "git_commit", str),
    ("Machine", "machine", _pairs("{}: {}")),
)


def _setup(report):
    found = {
        title: write(value)
        for title, path, write in _FACTS
        if (value := _get(report, f"config.{path}")) is not None
    }
    recipe, settings = (_get(report, f"config.{name}") or {} for name in ("recipe", "settings"))
    # The recipe holds the values of the settings that override it.
    for name, value in {"recipe": recipe.get("name"), **settings, **recipe}.items():
        is_off = value is None or value is False or value == []
        if name not in ("name", "model") and not is_off:
            values = value if isinstance(value, list) else [value]
            found[name.replace("_", " ").capitalize()] = ", ".join(map(str, values))
    rows = [{"": title, "value": value} for title, value in found.items()]
    return format_table(rows, ["", Column("value", "Value")], markdown=True) if rows else ""


def _code(text):
    # Indented and not fenced: no text can close the block.
    return "\n".join("    " + printable(line) for line in text.splitlines())


def _text(value):
    return escape_markdown(printable(str(value)))


def _present(history, key):
    values = (row.get(key) for row in history)
    return [value for value in values if value is not None and math.isfinite(value)]


def _get(mapping, path):
    """Returns the value at a path such as "dataset.name"; None if there is none."""
    for key in path.split("."):
        mapping = (mapping or {}).get(key)
    return mapping


def _json_value(value):
    """Returns `value` as JSON values: NaN and infinity, which JSON does not have, become None."""
    if isinstance(value, dict):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    # NumPy's scalars have `item`, which returns Python's.
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
