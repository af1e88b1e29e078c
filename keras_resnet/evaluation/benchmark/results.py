"""What a benchmark found, as a table and as a picture. Matplotlib is imported when one is drawn."""

import itertools
import math

from keras_resnet.utils.files import replacing
from keras_resnet.utils.tables import Column, format_table, printable

# format -> (name, colour). From the palette of Okabe and Ito, which people with any form of
# colour blindness can tell apart.
FORMATS = {
    "torch": ("PyTorch", "#D55E00"),
    "keras": ("Keras", "#CC79A7"),
    "saved_model": ("SavedModel", "#E69F00"),
    "tflite": ("TFLite", "#0072B2"),
    "onnx": ("ONNX", "#009E73"),
}
_INK, _FAINT = "#222222", "#d9d9d9"

MOST_IDLE_LOAD = 0.1
"""How busy the processor may be between the turns before `format_benchmark` warns."""

# Whom the others are compared with: the first of these that was measured.
BASELINES = ("torch", "keras")


def add_speed_ups(rows, threads):
    """Returns the rows with "speed_up" each, and whose latency it is counted from.

    Args:
        rows: What `benchmark` measured, one dict a contestant.
        threads: How many threads the latencies compared had, as the rows' key.

    Returns:
        A dict: "baseline", a row's name, or None if there is none to compare with; "rows".

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
    candidates = (row for kind in BASELINES for row in measured if row["format"] == kind)
    baseline = next(candidates, None)
    if baseline is None:
        return {"baseline": None, "rows": rows}
    reference = baseline["latency_ms"][threads]["median"]
    quick = {row["name"]: reference / row["latency_ms"][threads]["median"] for row in measured}
    rows = [{**row, "speed_up": quick[r]} if (r := row["name"]) in quick else row for row in rows]
    return {"baseline": baseline["name"], "rows": rows}


# ----------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------


def format_benchmark(report):
    """Returns a benchmark as text: a row a contestant, and what the figures mean.

    Args:
        report: What `benchmark` returned.
    """
    settings = [str(threads) for threads in report["threads"]]
    batches = sorted({int(b) for row in report["rows"] for b in row.get("images_per_second", ())})
    columns = [
        Column("name", "file"),
        *(Column(f"median {t}", _threads(t), ".2f") for t in settings),
        Column("p95", "p95", ".2f"),
        *(Column(f"batch {b}", f"by {b}" if b > 1 else "images/s", ",.0f") for b in batches),
        Column("load", "load ms", ",.0f"),
        Column("memory", "peak MB", ",.0f"),
        Column("size", "size MB", ",.1f"),
        Column("accuracy", "accuracy", ".4f"),
        Column("agreement", "agreement", ".3f"),
        Column("speed_up", "speed-up", ".2f"),
    ]
    rows = [_cells(row, settings) for row in report["rows"]]
    return "\n".join([format_table(rows, columns), "", *_notes(report)])


def _threads(count):
    return f"{count} thread" if int(count) == 1 else f"{count} threads"


def _cells(row, settings):
    if "failed" in row:
        return {**row, "size": row["bytes"] / 1e6}
    latencies = {f"median {t}": row["latency_ms"][t]["median"] for t in settings}
    speeds = {f"batch {b}": speed for b, speed in row["images_per_second"].items()}
    return {
        **row,
        **latencies,
        **speeds,
        "p95": row["latency_ms"][settings[-1]]["p95"],
        "load": row["load_ms"],
        "memory": row["peak_memory_bytes"] / 1e6,
        "size": row["bytes"] / 1e6,
    }


def _notes(report):
    most = _threads(report["threads"][-1])
    machine = report["machine"]
    yield (
        f"threads: median milliseconds for one image; p95 (milliseconds), images/s one by one and "
        f"in batches, load, peak and speed-up: with {most}. Medians over {report['rounds']} rounds."
    )
    yield (
        "peak MB: memory of the whole process, one image at a time; interpreter and runtime are "
        "in it."
    )
    if report["baseline"] is not None:
        yield f"speed-up: the latency of {report['baseline']} divided by the row's."
    yield (
        f"agreement: the same label as Keras, on {report['images_checked']} test images in this "
        "run. accuracy: when it was exported; PyTorch has Keras's weights, so Keras's accuracy."
    )
    runtimes = sorted({row["runtime"] for row in report["rows"] if "runtime" in row})
    yield f"machine: {machine['processor']}, {machine['cores']} cores; {', '.join(runtimes)}."
    busy = report["idle_load"]
    if busy is not None and busy > MOST_IDLE_LOAD:
        yield (
            f"warning: the processor was {busy:.0%} busy while nothing was measured: other "
            "programs disturb, most of all what runs on several threads. Measure again without."
        )
    for row in report["rows"]:
        if "failed" in row:
            yield printable(f"failed: {row['name']}: {row['failed']}")
    for row in report["left_out"]:
        yield printable(f"left out: {row['name']}: {row['reason']}")


# ----------------------------------------------------------------------------------------------
# The picture
# ----------------------------------------------------------------------------------------------

# Square points of the largest file's marker, and of the smallest marker there is.
_MOST_AREA, _LEAST_AREA = 1000, 30


def plot_benchmark(report, path):
    """Draws accuracy by latency into a PNG file; a marker's area is the file's size.

    Files of a fixed batch are left out: they are those of any batch again.

    Args:
        report: What `benchmark` returned.
        path: The PNG file.
    """
    from matplotlib.figure import Figure

    threads = str(report["threads"][-1])
    rows = [row for row in report["rows"] if "failed" not in row and row["accuracy"] is not None]
    batched = [row for row in rows if row["batch"] is None] or rows
    figure = Figure(figsize=(10, 6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    largest = max((row["bytes"] for row in batched), default=1)
    points = [_point(row, threads, largest) for row in batched]
    for kind, (name, colour) in FORMATS.items():
        own = [p for row, p in zip(batched, points, strict=True) if row["format"] == kind]
        if own:
            x, y, area, _ = zip(*own, strict=True)
            axes.scatter(x, y, area, color=colour, alpha=0.55, linewidths=0, label=name)
            axes.scatter(x, y, 8, color=_INK, linewidths=0, zorder=3)
    _dress(figure, axes, report, points)
    _label_points(figure, axes, points)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)


def _point(row, threads, largest):
    """Returns (milliseconds, accuracy in %, marker area, label)."""
    area = max(_LEAST_AREA, _MOST_AREA * row["bytes"] / largest)
    latency = row["latency_ms"][threads]["median"]
    names = {"torch": row["name"], "keras": FORMATS["keras"][0]}
    name = names.get(row["format"], f"{FORMATS[row['format']][0]} {row['precision']}")
    # Matplotlib would read what stands between two dollar signs as a formula.
    label = printable(name).replace("$", r"\$")
    label += f"\n{latency:.3g} ms, {row['bytes'] / 1e6:.1f} MB"
    return latency, row["accuracy"] * 100, area, label


def _dress(figure, axes, report, points):
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log")
    latencies, accuracies = ([point[axis] for point in points] for axis in (0, 1))
    if points:
        axes.set_xlim(min(latencies) / 1.8, max(latencies) * 1.8)
        # A tenth of a point at least, so that equal accuracies look equal.
        margin = max(0.1, 0.45 * (max(accuracies) - min(accuracies)))
        axes.set_ylim(min(accuracies) - margin, max(accuracies) + margin)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(LogLocator(10, subs=()))
    most = _threads(report["threads"][-1])
    axes.set_xlabel(f"milliseconds an image, one at a time, {most}; logarithmic")
    axes.set_ylabel("accuracy on test images, %")
    name, processor = report["model"]["name"], report["machine"]["processor"]
    axes.set_title(
        printable(f"{name} on {processor}: accuracy, speed and size (area)").replace("$", r"\$"),
        fontsize=11,
        fontweight="bold",
        loc="left",
        color=_INK,
    )
    axes.grid(color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if points:
        legend = axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
        for handle in legend.legend_handles:
            handle.set_sizes([60])


def _label_points(figure, axes, points):
    """Puts a label beside each point, the nearest place where it covers no other label or point."""
    figure.draw_without_rendering()
    centres = [axes.transData.transform(point[:2]) for point in points]
    # A square of a marker's area, from points to pixels.
    sides = [0.5 * math.sqrt(area) * figure.dpi / 72 for _, _, area, _ in points]
    taken = [_box_around(c, side, side) for c, side in zip(centres, sides, strict=True)]
    frame = axes.get_window_extent()
    for (x, y, _, label), centre in zip(points, centres, strict=True):
        text = axes.annotate(
            label,
            (x, y),
            xytext=(0, 0),
            textcoords="offset pixels",
            fontsize=8,
            color=_INK,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#555555", "linewidth": 0.7, "shrinkB": 2},
        )
        own = text.get_window_extent()
        size = own.width / 2 + 8, own.height / 2 + 2
        offset = _free_place(centre, size, taken, frame)
        text.set_position(offset)
        taken.append(_box_around(centre + offset, *size))


def _free_place(centre, size, taken, frame):
    """Returns the offset from `centre`, in pixels, at which a label has room."""
    rings = itertools.product(range(24, 400, 12), range(0, 360, 15))
    for radius, angle in rings:
        turn = math.radians(angle + 90)
        # Labels are wider than high.
        offset = (1.5 * radius * math.cos(turn), radius * math.sin(turn))
        box = _box_around(centre + offset, *size)
        inside = frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1
        if inside and not any(box.overlaps(other) for other in taken):
            return offset
    return (0, 30)


def _box_around(centre, half_width, half_height):
    from matplotlib.transforms import Bbox

    x, y = centre
    return Bbox([[x - half_width, y - half_height], [x + half_width, y + half_height]])
