"""The results of a benchmark as a table and as a plot."""

import itertools

from keras_resnet.evaluation import plots
from keras_resnet.formats import EXPORTED
from keras_resnet.utils.tables import Column, format_table, printable

MOST_IDLE_LOAD = 0.1
"""The processor load between the turns above which `format_benchmark` prints a warning."""

BASELINES = ("torch", "keras")
"""The formats of the baseline of the speed-ups: the first one that was measured."""

_PALETTE = itertools.cycle(
    (plots.RED, plots.PURPLE, plots.ORANGE, plots.BLUE, plots.GREEN, plots.SKY)
)
COLOURS = dict(zip((*BASELINES, *EXPORTED), _PALETTE, strict=False))


def add_speed_ups(rows, threads):
    """Returns the rows with a "speed_up" each, and the name of the baseline.

    Args:
        rows: The measurements, one dict for each candidate.
        threads: The key of the latencies to compare: a number of threads, as text.

    Returns:
        A dict: "baseline", a row's name, or None if no baseline was measured; "rows".

    Example:
        >>> rows = [
        ...     {"name": "a", "format": "keras", "latency_ms": {"2": {"median": 3.0}}},
        ...     {"name": "b", "format": "onnx", "latency_ms": {"2": {"median": 1.5}}},
        ... ]
        >>> found = add_speed_ups(rows, "2")
        >>> found["baseline"], [row["speed_up"] for row in found["rows"]]
        ('a', [1.0, 2.0])
    """
    measured = [row for row in rows if "failed" not in row]
    baseline = next((row for kind in BASELINES for row in measured if row["format"] == kind), None)
    if baseline is None:
        return {"baseline": None, "rows": rows}

    def latency(row):
        return row["latency_ms"][threads]["median"]

    rows = [
        row if "failed" in row else {**row, "speed_up": latency(baseline) / latency(row)}
        for row in rows
    ]
    return {"baseline": baseline["name"], "rows": rows}


# ----------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------


def format_benchmark(report):
    """Returns a benchmark as text: one row for each candidate, then the meaning of the columns.

    Args:
        report: The result of `benchmark`.
    """
    threads = [str(count) for count in report["threads"]]
    batches = sorted({int(b) for row in report["rows"] for b in row.get("images_per_second", ())})
    columns = [
        Column("name", "file"),
        *(Column(f"median {t}", _threads(t), ".2f") for t in threads),
        Column("p95", "p95", ".2f"),
        *(Column(f"batch {b}", f"by {b}" if b > 1 else "images/s", ",.0f") for b in batches),
        Column("load_ms", "load ms", ",.0f"),
        Column("memory", "peak MB", ",.0f"),
        Column("size", "size MB", ",.1f"),
        Column("accuracy", "accuracy", ".4f"),
        Column("agreement", "agreement", ".3f"),
        Column("speed_up", "speed-up", ".2f"),
    ]
    rows = [_cells(row, threads) for row in report["rows"]]
    return "\n".join([format_table(rows, columns), "", *_notes(report)])


def _threads(count):
    return f"{count} thread" if int(count) == 1 else f"{count} threads"


def _cells(row, threads):
    cells = {**row, "size": row["bytes"] / 1e6}
    if "failed" in row:
        return cells
    cells |= {f"median {t}": row["latency_ms"][t]["median"] for t in threads}
    cells |= {f"batch {b}": speed for b, speed in row["images_per_second"].items()}
    cells |= {
        "p95": row["latency_ms"][threads[-1]]["p95"],
        "memory": row["peak_memory_bytes"] / 1e6,
    }
    return cells


def _notes(report):
    machine, busy = report["machine"], report["idle_load"]
    yield (
        "threads: median milliseconds for one image; p95 (milliseconds), images/s one by one and "
        f"in batches, load, peak and speed-up: with {_threads(report['threads'][-1])}. Medians "
        f"over {report['rounds']} rounds."
    )
    yield (
        "peak MB: memory of the whole process, one image at a time; interpreter and runtime are "
        "in it."
    )
    if report["baseline"] is not None:
        yield f"speed-up: the latency of {report['baseline']} divided by the row's."
    yield (
        f"agreement: the same label as Keras, on {report['images_checked']} test images in this "
        "run. accuracy: measured by the export; PyTorch has Keras's weights and so its accuracy."
    )
    runtimes = sorted({row["runtime"] for row in report["rows"] if "runtime" in row})
    yield f"machine: {machine['processor']}, {machine['cores']} cores; {', '.join(runtimes)}."
    if busy is not None and busy > MOST_IDLE_LOAD:
        yield (
            f"warning: the processor was {busy:.0%} busy while nothing was measured: other "
            "programs slow the measurement down. Stop them and run the benchmark again."
        )
    for row in report["rows"]:
        if "failed" in row:
            yield printable(f"failed: {row['name']}: {row['failed']}")
    for row in report["left_out"]:
        yield printable(f"left out: {row['name']}: {row['reason']}")


# ----------------------------------------------------------------------------------------------
# The plot
# ----------------------------------------------------------------------------------------------


def plot_benchmark(report, path):
    """Draws the latency of each row as a bar, with accuracy and size beside it, into a PNG file.

    Files of a fixed batch size are left out: each is a copy of a file of any batch size.

    Args:
        report: The result of `benchmark`.
        path: The PNG file.
    """
    threads = str(report["threads"][-1])
    rows = [row for row in report["rows"] if "failed" not in row]
    rows = [row for row in rows if row["batch"] is None] or rows
    rows.sort(key=lambda row: row["latency_ms"][threads]["median"], reverse=True)
    latencies = [row["latency_ms"][threads]["median"] for row in rows]
    figure = plots.new_figure(9, 1.3 + 0.36 * len(rows))
    axes = figure.subplots()
    bars = axes.barh(
        range(len(rows)), latencies, color=[COLOURS[row["format"]] for row in rows], alpha=0.8
    )
    labels = [
        f"{latency:.3g} ms, {row['bytes'] / 1e6:.1f} MB"
        + ("" if row["accuracy"] is None else f", accuracy {row['accuracy']:.2%}")
        for row, latency in zip(rows, latencies, strict=True)
    ]
    axes.bar_label(bars, labels, padding=4, fontsize=8, color=plots.INK)
    axes.set_yticks(range(len(rows)), [plots.shorten(row["name"], 40) for row in rows])
    axes.set_xlim(0, 1.45 * max(latencies, default=1))  # room for the labels
    threads = _threads(report["threads"][-1])
    axes.set_xlabel(f"median milliseconds for one image, {threads}")
    name, processor = report["model"]["name"], report["machine"]["processor"]
    plots.set_title(axes, plots.shorten(f"{name} on {processor}", 100))
    plots.draw_grid(axes, axis="x")
    plots.save_png(figure, path)
