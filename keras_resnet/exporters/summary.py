"""Exports, failures and verifications as tables of text."""

from keras_resnet.exporters.verification import NOTHING_SHOWN
from keras_resnet.utils.tables import Column, format_table


def format_manifest(manifest, *, markdown=False):
    """Returns a manifest's artifacts as a table: size, proof, images, accuracy, speed.

    Args:
        manifest: What `export` returned.
        markdown: Whether to write Markdown.
    """
    threads = sorted({key for row in manifest["artifacts"] for key in row["latency_ms"]}, key=int)
    rows = [{"file": "the Keras model", **manifest["keras"]}]
    for artifact in manifest["artifacts"]:
        row = {**artifact, "megabytes": artifact["bytes"] / 1e6}
        row["points"] = 100 * artifact["accuracy_change"]
        rows.append({**row, "proof": _verdict(artifact["failures"])})
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
        "proof",
    ]
    return format_table(rows, columns, markdown=markdown)


def _verdict(failures):
    if not failures:
        return "passed"
    only_this = all(failure.startswith(NOTHING_SHOWN) for failure in failures)
    return NOTHING_SHOWN if only_this else "FAILED"


def _threads(count):
    return "1 thread" if count == "1" else f"{count} threads"


def format_failures(failures):
    """Returns what failed, and by how much, as a table.

    Args:
        failures: `verification.Failure`s.
    """
    rows = [
        {**vars(failure), "found": _number(failure.found), "limit": _number(failure.limit)}
        for failure in failures
    ]
    return format_table(rows, ["file", "check", "found", Column("limit", "must be")])


def _number(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def format_verification(found):
    """Returns what `verify` found as a table.

    Args:
        found: What it returned.
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
        *([Column("failures", "what failed")] if any(row["failures"] for row in rows) else []),
    ]
    return format_table(rows, columns)
