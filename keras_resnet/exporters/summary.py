"""Exports, failures and verifications as tables of text."""

from keras_resnet.exporters.verify_artifact import INCONCLUSIVE
from keras_resnet.utils.tables import Column, format_table


def format_manifest(manifest, *, markdown=False):
    """Returns a manifest's artifacts as a table: size, figures, latency, verification.

    Args:
        manifest: The result of `export`.
        markdown: Whether to write Markdown.
    """
    threads = sorted({key for row in manifest["artifacts"] for key in row["latency_ms"]}, key=int)
    rows = [{"file": "the Keras model", **manifest["keras"]}]
    for artifact in manifest["artifacts"]:
        row = {**artifact, "megabytes": artifact["bytes"] / 1e6}
        change = artifact["accuracy_change"]
        row["points"] = None if change is None else 100 * change
        rows.append({**row, "verification": _verdict(artifact["failures"])})
    for row in rows:
        row["images"] = manifest["data"]["images"]
        for count in threads:
            row[f"ms{count}"] = row["latency_ms"].get(count, {}).get("median")
    columns = [
        "file",
        Column("megabytes", "MB", ".1f"),
        Column("max_difference", "largest difference", ".0e"),
        Column("agreement", spec=".4f"),
        Column("accuracy", spec=".4f"),
        Column("images", spec=","),
        Column("points", "change, points", "+.2f"),
        *(Column(f"ms{count}", f"ms, {_threads(count)}", ".2f") for count in threads),
        "verification",
    ]
    return format_table(rows, columns, markdown=markdown)


def _verdict(failures):
    if not failures:
        return "passed"
    is_only_that = all(failure.startswith(INCONCLUSIVE) for failure in failures)
    return INCONCLUSIVE if is_only_that else "FAILED"


def _threads(count):
    return "1 thread" if count == "1" else f"{count} threads"


def format_failures(failures):
    """Returns failures as a table: file, check, result, limit.

    Args:
        failures: A list of `verify_artifact.Failure`s.
    """
    rows = [
        {**vars(failure), "found": _number(failure.found), "limit": _number(failure.limit)}
        for failure in failures
    ]
    return format_table(rows, ["file", "check", "found", Column("limit", "must be")])


def _number(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_verification(found):
    """Returns a verification as a table.

    Args:
        found: The result of `verify`.
    """
    rows = [{**row, "failures": "; ".join(row["failures"]) or None} for row in found["files"]]
    accuracy = [Column("accuracy", spec=".4f"), Column("accuracy_images", "of images", ",")]
    columns = [
        "file",
        "verdict",
        Column("max_difference", "largest difference", ".0e"),
        Column("agreement", spec=".4f"),
        Column("images", spec=","),
        *(accuracy if any(row.get("accuracy") is not None for row in rows) else []),
        *(["failures"] if any(row["failures"] for row in rows) else []),
    ]
    return format_table(rows, columns)
