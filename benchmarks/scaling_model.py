"""Predicts the step time of training on 8 to 1,024 workers from the results of `scaling.py`.

    python benchmarks/scaling_model.py scaling.json [--plot scaling.png]
    python benchmarks/scaling_model.py --step 32:0.8 --step 64:1.5 --bytes 44.7e6

A step is computation, t = a + b · batch, followed by the all-reduce of the gradients. The cost of a
message is a latency, and its bytes divided by the bandwidth. The parameters come from the two batch
sizes that `scaling.py` measured with both cores busy; its step of two workers is the check.

    ring          reduce-scatter and all-gather around one ring of all workers (Patarasuk and Yuan,
                  2009; latencies as in Thakur, Rabenseifner and Gropp, 2005)
    hierarchical  a ring inside each node over its own link, and a ring of all nodes for each shard
                  (Goyal et al., 2017, section 4); the shards of a node share its link

The prediction is optimistic: additions, stragglers, other traffic and the messages of metrics are
left out, and no communication is hidden behind the backward pass.
"""

import argparse
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from keras_resnet.evaluation import plots
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.tables import Column, format_table

WORKERS = tuple(2**power for power in range(3, 11))
GLOBAL_BATCH = 1024
GOAL = 0.9
"""The weak-scaling efficiency to reach."""


class Link(NamedTuple):
    """A network link: `bandwidth` in bytes/s, `latency` in seconds."""

    bandwidth: float
    latency: float


NODE_WORKERS = 8
INNER = Link(400e9 / 8, 10e-6)
"""The link inside a node: 400 Gbit/s, 10 µs."""

LATENCY = 50e-6
"""The latency between nodes, in seconds."""

# ----------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------


class Compute(NamedTuple):
    """The seconds of a step without communication: `fixed` + `image` · batch size."""

    fixed: float
    image: float

    def seconds(self, batch):
        """Returns the seconds of a step with `batch` images, which need not be whole."""
        return self.fixed + self.image * batch


def fit_compute(points):
    """Fits a `Compute` to measured steps by least squares.

    Args:
        points: Pairs (batch size, seconds), with at least two batch sizes.

    Raises:
        InputError: There is one batch size only, or larger batches are faster.

    Example:
        >>> compute = fit_compute([(32, 0.9), (64, 1.7)])
        >>> round(compute.fixed, 3), round(compute.image, 3)
        (0.1, 0.025)
    """
    batches, seconds = map(np.array, zip(*points, strict=True))
    if len(set(batches.tolist())) < 2:
        raise InputError(f"steps of two batch sizes are needed, got {batches.tolist()}")
    image, fixed = np.polyfit(batches, seconds, 1)
    if image <= 0:
        raise InputError(f"a larger batch must take longer, got {list(points)}")
    if fixed < 0:  # a negative time, from noise: fit a line through zero
        fixed, image = 0.0, batches @ seconds / (batches @ batches)
    return Compute(float(fixed), float(image))


def all_reduce_seconds(workers, size, link):
    """Returns the seconds of a ring all-reduce: reduce-scatter, then all-gather.

    In each of the two, a worker sends `workers` - 1 messages of size / `workers` bytes.

    Example:
        >>> all_reduce_seconds(5, 100, Link(bandwidth=10, latency=1))
        24.0
    """
    return 2 * (workers - 1) * (link.latency + size / workers / link.bandwidth)


def ring_seconds(workers, size, link, node_workers=NODE_WORKERS, inner=INNER):
    """Returns the seconds of an all-reduce around one ring of all workers.

    Args:
        workers: Number of workers.
        size: Bytes of the gradients.
        link: The `Link` between nodes.
        node_workers: Number of workers in a node; a ring inside one node uses `inner`.
        inner: The `Link` inside a node.
    """
    return all_reduce_seconds(workers, size, inner if workers <= node_workers else link)


def hierarchical_seconds(workers, size, link, node_workers=NODE_WORKERS, inner=INNER):
    """Returns the seconds of an all-reduce inside the nodes and across them.

    Args:
        workers: Number of workers: those of one node, or of full nodes.
        size: See `ring_seconds`.
        link: See `ring_seconds`.
        node_workers: See `ring_seconds`.
        inner: See `ring_seconds`.

    Example:
        Two nodes of two: 2 · 100/2 bytes inside at 100 bytes/s, then a ring of two nodes.

        >>> hierarchical_seconds(4, 100, Link(10, 1), 2, Link(100, 0))
        13.0
    """
    inside = min(workers, node_workers)
    return all_reduce_seconds(inside, size, inner) + all_reduce_seconds(
        workers // inside, size, link
    )


ALGORITHMS = {"ring": ring_seconds, "hierarchical": hierarchical_seconds}


def smallest_batch(compute, communication, goal=GOAL):
    """Returns the smallest batch of a worker that reaches the efficiency `goal`.

    Example:
        >>> compute = Compute(fixed=0.1, image=0.01)
        >>> smallest_batch(compute, communication=0.1)
        80
        >>> round(compute.seconds(80) / (compute.seconds(80) + 0.1), 9)
        0.9
    """
    needed = communication * goal / (1 - goal)
    # 1e-9: rounding must not add an image.
    return max(1, math.ceil((needed - compute.fixed) / compute.image - 1e-9))


def predict(compute, size, links, batch):
    """Predicts training with each link, algorithm and number of workers.

    Args:
        compute: A `Compute`.
        size: Bytes of the gradients.
        links: `Link`s between the nodes, by name.
        batch: Images in a step of a worker, for weak scaling.

    Returns:
        One dict for each case. "ms" and "efficiency" are of weak scaling: a step with `batch`
        images a worker, and the step of one worker divided by it. "smallest batch" reaches the
        efficiency `GOAL`. "images/s" is of strong scaling: `GLOBAL_BATCH` images for all workers.
    """
    rows = []
    cases = itertools.product(links.items(), ALGORITHMS.items(), WORKERS)
    for (label, link), (name, algorithm), workers in cases:
        computation, communication = compute.seconds(batch), algorithm(workers, size, link)
        strong_step = compute.seconds(GLOBAL_BATCH / workers) + communication
        rows.append(
            {
                "link": label,
                "algorithm": name,
                "workers": workers,
                "ms": 1000 * (computation + communication),
                "efficiency": computation / (computation + communication),
                "smallest batch": smallest_batch(compute, communication),
                "images/s": GLOBAL_BATCH / strong_step,
            }
        )
    return rows


# ----------------------------------------------------------------------------------------------
# Input and output
# ----------------------------------------------------------------------------------------------


def read_results(path):
    """Returns the batch size and the results in a file of `scaling.py`.

    Raises:
        InputError: The file cannot be read, or is another one.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        batch, seconds = found["settings"]["batch_size"], found["step_seconds"]
        numbers = [seconds[name] for name in ("apart", "apart_half", "weak", "strong")]
        numbers += [found["all_reduce"][name] for name in ("bandwidth", "latency")]
        if min(batch, found["gradient_bytes"], *numbers) <= 0:
            raise ValueError(f"all results must be positive, got {numbers}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{path}: must be a file that scaling.py wrote with --out: {error!r}"
        ) from error
    return batch, found


def format_check(found, batch):
    """Returns the check: predicted and measured steps of two workers, as a table.

    The prediction is the step of two independent processes, and a ring of two workers over the
    link that was measured between them. It has no free parameter.
    """
    seconds = found["step_seconds"]
    link = Link(found["all_reduce"]["bandwidth"], found["all_reduce"]["latency"])
    communication = all_reduce_seconds(2, found["gradient_bytes"], link)
    rows = []
    for scaling, apart, own in (("weak", "apart", batch), ("strong", "apart_half", batch // 2)):
        predicted, measured = seconds[apart] + communication, seconds[scaling]
        rows.append(
            {
                "scaling": scaling,
                "batch": own,
                "predicted ms": 1000 * predicted,
                "measured ms": 1000 * measured,
                "error": predicted / measured - 1,
            }
        )
    columns = [Column(name, spec=".1f") for name in ("predicted ms", "measured ms")]
    return format_table(rows, ["scaling", "batch", *columns, Column("error", spec="+.1%")])


def plot_efficiency(rows, batch, path):
    """Draws the weak-scaling efficiency over the number of workers into a PNG file."""
    figure = plots.new_figure(7, 4.2)
    axes = figure.subplots()
    colours = itertools.cycle((plots.BLUE, plots.RED, plots.GREEN, plots.PURPLE, plots.ORANGE))
    colours = dict(zip(dict.fromkeys(row["link"] for row in rows), colours, strict=False))
    for link, colour in colours.items():
        for algorithm, line in zip(ALGORITHMS, ("-", "--"), strict=True):
            own = [row for row in rows if (row["link"], row["algorithm"]) == (link, algorithm)]
            values = [row["efficiency"] for row in own]
            label = f"{link} {algorithm}"
            axes.plot(WORKERS, values, line, color=colour, marker="o", ms=4, label=label)
    axes.axhline(GOAL, color=plots.INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(WORKERS, map(str, WORKERS))
    # On an axis that begins at 0, lines near 1 would overlap.
    bottom = max(0, math.floor(10 * min(row["efficiency"] for row in rows) - 1) / 10)
    axes.set(xlabel="workers", ylabel="weak-scaling efficiency", ylim=(bottom, 1.03))
    plots.set_title(axes, f"{batch} images a worker")
    plots.draw_grid(axes)
    axes.legend(frameon=False, fontsize=8)
    plots.save_png(figure, path)


def report(args):
    """Prints the check and the table, and draws the plot."""
    found, points, size = None, args.step, args.bytes
    if args.file and not (points or size):
        batch, found = read_results(args.file)
        seconds, size = found["step_seconds"], found["gradient_bytes"]
        points = [(batch // 2, seconds["apart_half"]), (batch, seconds["apart"])]
    elif args.file or not (points and size):
        raise InputError("give the file of scaling.py, or --step twice and --bytes")
    compute, batch = fit_compute(points), max(batch for batch, _ in points)
    print(
        f"computation: {1000 * compute.fixed:.1f} ms + {1000 * compute.image:.2f} ms an image; "
        f"gradients {size / 1e6:.1f} MB"
    )
    if found:
        print(f"\ncheck: a step of two workers\n{format_check(found, batch)}")
    links = {f"{each:g} Gbit/s": Link(each * 1e9 / 8, LATENCY) for each in args.bandwidth}
    rows = predict(compute, size, links, batch)
    columns = [
        *("link", "algorithm", "workers"),
        Column("ms", spec=".1f"),
        Column("efficiency", spec=".3f"),
        *("smallest batch", Column("images/s", spec=",.0f")),
    ]
    print(
        f"\nms, efficiency: {batch} images a worker; smallest batch: for an efficiency of {GOAL}; "
        f"images/s: {GLOBAL_BATCH} images for all workers\n{format_table(rows, columns)}"
    )
    if args.plot:
        plot_efficiency(rows, batch, args.plot)


def _point(text):
    batch, _, seconds = text.partition(":")
    return int(batch), float(seconds)


# argparse names the type in "invalid … value".
_point.__name__ = "BATCH:SECONDS"


def main(words=None):
    """Reads the command line, `sys.argv` by default, and reports."""
    parser = argparse.ArgumentParser(description="A model of the scaling over machines.")
    add = parser.add_argument
    add("file", nargs="?", help="the file that scaling.py wrote with --out")
    add(
        "--step",
        type=_point,
        action="append",
        metavar="BATCH:SECONDS",
        help="instead of the file, a step of one worker; at least twice",
    )
    add("--bytes", type=float, metavar="N", help="with --step: bytes of the gradients")
    add(
        "--bandwidth",
        type=float,
        nargs="+",
        default=[10.0, 25.0, 100.0],
        metavar="GBIT/S",
        help="between nodes (default: 10 25 100)",
    )
    add("--plot", metavar="FILE", help="a PNG file")
    args = parser.parse_args(words)
    try:
        report(args)
    except (InputError, OSError) as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
