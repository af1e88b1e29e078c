"""What a training step costs on 8 to 1,024 workers, from what it costs on one: a model.

    python benchmarks/scaling_model.py scaling.json [--bandwidth 10 25 100] [--latency 50]
        [--plot scaling.png]
    python benchmarks/scaling_model.py --step 32:0.8 --step 64:1.5 --bytes 44.7e6

A step is computing and then the all-reduce of the gradients, whose cost is that of its messages: a
latency each, and bytes over bandwidth. Computing is affine in the batch, t = a + b·B, through what
`scaling.py` measured at two batch sizes with both cores at work. Its step of two workers is the
check. Two algorithms:

    ring          reduce-scatter and all-gather around one ring of all workers: Patarasuk and Yuan,
                  Bandwidth optimal all-reduce algorithms for clusters of workstations, 2009;
                  latencies counted as in Thakur, Rabenseifner and Gropp, Optimization of
                  collective communication operations in MPICH, 2005
    hierarchical  reduce-scatter inside each node over its own link, a ring of all nodes for each
                  shard, all-gather inside: Goyal et al., Accurate, large minibatch SGD, 2017,
                  section 4; the shards of a node share its link to the others

The cost of adding numbers up, stragglers, a busy network and the messages of metrics are left out:
it is the best that can be hoped for. The standard library, NumPy and Matplotlib suffice.
"""

import argparse
import itertools
import json
import math
import os
import secrets
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

WORKERS = tuple(2**power for power in range(3, 11))
GOAL = 0.9
BACKWARD = 2 / 3
"""Share of computing that is the backward pass, which has two convolutions for each one forwards.
Nothing can be hidden behind the rest."""

# From the palette of Okabe and Ito, which people with any form of colour blindness can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class BadInput(ValueError):
    """What was given breaks a rule; the message states rule and value in one line."""


class Link(NamedTuple):
    """What a message costs: `latency` s, and a second for `bandwidth` bytes."""

    bandwidth: float
    latency: float


class Cluster(NamedTuple):
    """Nodes of `node_workers` workers, joined by `link`; inside a node there is `inner`."""

    link: Link
    node_workers: int
    inner: Link


class Compute(NamedTuple):
    """The seconds of a step of one worker without communication: `fixed` + `image` · batch."""

    fixed: float
    image: float

    def seconds(self, batch):
        """Returns the seconds at a batch size, which need not be whole."""
        return self.fixed + self.image * batch


# ----------------------------------------------------------------------------------------------
# The model
# ----------------------------------------------------------------------------------------------


def fit_compute(points):
    """Returns the `Compute` that goes through measured steps, by least squares.

    Args:
        points: Pairs (batch, seconds), of two batch sizes at least.

    Raises:
        BadInput: If there are fewer, or more images take no longer.

    Example:
        >>> compute = fit_compute([(32, 0.9), (64, 1.7)])
        >>> round(compute.fixed, 3), round(compute.image, 3)
        (0.1, 0.025)
    """
    batches, seconds = map(np.array, zip(*points, strict=True))
    if len(set(batches.tolist())) < 2:
        raise BadInput(f"steps of two batch sizes are needed, got {batches.tolist()}")
    image, fixed = np.polyfit(batches, seconds, 1)
    if image <= 0:
        raise BadInput(f"a larger batch must take longer, got {list(points)}")
    # A measured line may meet zero above it: less than no time is spent by nobody.
    if fixed < 0:
        fixed, image = 0.0, float(batches @ seconds / (batches @ batches))
    return Compute(float(fixed), float(image))


def pass_seconds(workers, size, link):
    """Returns the seconds of a reduce-scatter, or of an all-gather, around a ring.

    Each worker sends `workers` - 1 messages of a `workers`-th of the tensor.

    Example:
        >>> pass_seconds(5, 100, Link(bandwidth=10, latency=1))
        12.0
    """
    return (workers - 1) * (link.latency + size / workers / link.bandwidth)


def ring_seconds(workers, size, cluster):
    """Returns the seconds of an all-reduce around one ring of all workers.

    Args:
        workers: How many.
        size: Bytes of the tensor.
        cluster: A `Cluster`; workers that fit into one node use its inner link.

    Example:
        >>> inner = Link(100, 0)
        >>> ring_seconds(1, 100, Cluster(Link(10, 1), 1, inner))
        0.0
        >>> ring_seconds(2, 100, Cluster(Link(10, 1), 1, inner))
        12.0
        >>> ring_seconds(2, 100, Cluster(Link(10, 1), 2, inner))
        1.0
    """
    link = cluster.inner if workers <= cluster.node_workers else cluster.link
    return 2 * pass_seconds(workers, size, link)


def hierarchical_seconds(workers, size, cluster):
    """Returns the seconds of an all-reduce inside the nodes, across them, and inside again.

    Args:
        workers: How many; those of one node, or whole nodes.
        size: Bytes of the tensor.
        cluster: A `Cluster`.

    Example:
        Two nodes of two: 2 · 100/2 bytes inside at 100 bytes/s, then a ring of two nodes.

        >>> hierarchical_seconds(4, 100, Cluster(Link(10, 1), 2, Link(100, 0)))
        13.0
    """
    inside = min(workers, cluster.node_workers)
    nodes = workers // inside
    if nodes * inside != workers:
        raise BadInput(f"nodes of {inside} workers must be full, got {workers} workers")
    # Each shard has a ring of its own, and all of them share the node's link.
    across = 2 * pass_seconds(nodes, size, cluster.link)
    return 2 * pass_seconds(inside, size, cluster.inner) + across


ALGORITHMS = {"ring": ring_seconds, "hierarchical": hierarchical_seconds}


def step_seconds(computing, communication, overlap=0.0):
    """Returns the seconds of a step, with a share of the communication behind the backward pass.

    Args:
        computing: Seconds without communication.
        communication: Seconds of the all-reduce.
        overlap: Share of it that is hidden, where the backward pass is long enough.

    Example:
        >>> step_seconds(3.0, 1.0), step_seconds(3.0, 1.0, 0.5), step_seconds(3.0, 10.0, 1.0)
        (4.0, 3.5, 11.0)
    """
    return computing + communication - min(overlap * communication, BACKWARD * computing)


def smallest_batch(compute, communication, overlap=0.0, goal=GOAL):
    """Returns the smallest batch of a worker whose step is computing for a share of `goal`.

    Example:
        >>> compute = Compute(fixed=0.1, image=0.01)
        >>> smallest_batch(compute, communication=0.1)
        80
        >>> computing = compute.seconds(80)
        >>> round(computing / step_seconds(computing, 0.1), 9)
        0.9
    """
    most = (1 - goal) / goal  # of what is not hidden, for a second of computing
    needed = max((1 - overlap) * communication / most, communication / (most + BACKWARD))
    # Not one image more for the last bit of a quotient.
    return max(1, math.ceil((needed - compute.fixed) / compute.image - 1e-9))


class Model(NamedTuple):
    """A network on workers of one kind: computing, bytes of gradients, share of overlap."""

    compute: Compute
    size: float
    overlap: float = 0.0

    def step(self, algorithm, workers, batch, cluster):
        """Returns the seconds of a step with `batch` images a worker."""
        communication = ALGORITHMS[algorithm](workers, self.size, cluster)
        return step_seconds(self.compute.seconds(batch), communication, self.overlap)

    def efficiency(self, algorithm, workers, batch, cluster):
        """Returns the weak-scaling efficiency: the step of one worker over that of many."""
        return self.compute.seconds(batch) / self.step(algorithm, workers, batch, cluster)

    def images_per_second(self, algorithm, workers, global_batch, cluster):
        """Returns the images/s of all workers together."""
        return global_batch / self.step(algorithm, workers, global_batch / workers, cluster)


def strong_limit(speed, most):
    """Returns the number of workers after which twice as many are no faster; None if below `most`.

    Args:
        speed: A function from a number of workers, a power of two, to images/s.
        most: The largest number.

    Example:
        >>> strong_limit(lambda workers: min(workers, 16), 1024), strong_limit(float, 1024)
        (16, None)
    """
    counts = [2**power for power in range(most.bit_length())]
    for few, many in itertools.pairwise(counts):
        if speed(many) <= speed(few):
            return few
    return None


def weak_limit(efficiency, counts, goal=GOAL):
    """Returns the largest of rising counts up to which the efficiency stays at `goal`; or None.

    Example:
        >>> weak_limit(lambda workers: 1 / (1 + workers / 1000), (8, 16, 128, 256))
        16
    """
    reached = list(itertools.takewhile(lambda count: efficiency(count) >= goal, counts))
    return reached[-1] if reached else None


# ----------------------------------------------------------------------------------------------
# What is given
# ----------------------------------------------------------------------------------------------


def read_measurement(path, precision=None):
    """Returns what `scaling.py` measured: its settings, and its result in a precision.

    Args:
        path: The JSON file.
        precision: Which result; the first by default.

    Raises:
        BadInput: If it is no such file.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        results = {result["precision"]: result for result in found["results"]}
        batch = found["settings"]["batch_size"]
        chosen = results[precision or next(iter(results))]
        numbers = [chosen["step_seconds"][name] for name in ("apart", "apart_half")]
        numbers += [chosen["step_seconds"][name] for name in ("weak", "strong")]
        numbers += [chosen["all_reduce"][name] for name in ("bandwidth", "latency")]
        numbers += [batch, chosen["gradient_bytes"]]
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        what = f"no {error}" if isinstance(error, LookupError) else type(error).__name__
        raise BadInput(f"{path} must be a file that scaling.py wrote with --out: {what}") from error
    if not all(isinstance(number, (int, float)) and 0 < number < math.inf for number in numbers):
        raise BadInput(f"{path}: all measured numbers must be positive, got {numbers}")
    return found["settings"], chosen


def predict_pair(result, batch):
    """Returns the check, a row for each form: the model's step of two workers, and the measured.

    The prediction is the step of two processes that know nothing of each other, and a ring of two
    over the link that was measured between them. With nothing hidden it has no free number.

    Args:
        result: A result of `scaling.py`.
        batch: Images a step of a worker in weak scaling.
    """
    reduce, seconds = result["all_reduce"], result["step_seconds"]
    link = Link(reduce["bandwidth"], reduce["latency"])
    communication = ring_seconds(2, result["gradient_bytes"], Cluster(link, 1, link))
    forms = (("weak", "apart", batch), ("strong", "apart_half", batch // 2))
    rows = []
    for form, apart, own_batch in forms:
        predicted = step_seconds(seconds[apart], communication)
        error = predicted / seconds[form] - 1
        rows.append((form, own_batch, 1000 * predicted, 1000 * seconds[form], f"{error:+.1%}"))
    return rows


# ----------------------------------------------------------------------------------------------
# What is shown
# ----------------------------------------------------------------------------------------------


def format_rows(headings, rows):
    """Returns a table. (That of keras_resnet would bring TensorFlow in.)

    Example:
        >>> print(format_rows(("workers", "ms"), [(8, 12.04), (1024, None)]))
        workers    ms
              8  12.0
           1024     –
    """

    def text(value):
        if value is None:
            return "–"
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    lines = [list(headings), *([text(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def workers_table(model, clusters, batch, workers):
    """Returns the table of one cluster: a row for each number of workers."""
    rows = []
    for count in workers:
        row = [count]
        for name, algorithm in ALGORITHMS.items():
            efficiency = model.efficiency(name, count, batch, clusters)
            least = smallest_batch(
                model.compute, algorithm(count, model.size, clusters), model.overlap
            )
            step = 1000 * model.step(name, count, batch, clusters)
            row += [step, f"{efficiency:.3f}", least]
        rows.append(row)
    headings = [f"{name} {what}" for name in ALGORITHMS for what in ("ms", "efficiency", "batch")]
    return format_rows(["workers", *headings], rows)


def limits_table(model, clusters, batch, global_batch, workers):
    """Returns the table of where scaling ends, a row for each bandwidth and algorithm."""
    rows = []
    most = min(max(workers), global_batch)
    for (label, cluster), name in itertools.product(clusters.items(), ALGORITHMS):

        def speed(count, name=name, cluster=cluster):
            return model.images_per_second(name, count, global_batch, cluster)

        def efficiency(count, name=name, cluster=cluster):
            return model.efficiency(name, count, batch, cluster)

        weak = weak_limit(efficiency, workers)
        strong = strong_limit(speed, most)
        # Powers of two alone: the largest that was looked at, where nothing ended it.
        best = strong or 2 ** (most.bit_length() - 1)
        ends = strong if strong else f"> {best}"
        rows.append((label, name, weak or f"< {workers[0]}", ends, speed(best)))
    headings = ("link", "algorithm", f"weak ≥ {GOAL}", f"strong, {global_batch} images", "images/s")
    return format_rows(headings, rows)


def plot_efficiency(model, clusters, batch, workers, path):
    """Draws the weak-scaling efficiency over the number of workers into a PNG file.

    Args:
        model: A `Model`.
        clusters: `Cluster`s by their names.
        batch: Images a step of a worker.
        workers: The numbers of workers, rising.
        path: The PNG file; it is written whole or not at all.
    """
    # A Figure of its own and not pyplot: no window system is looked for.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), facecolor="white", layout="constrained")
    axes = figure.subplots()
    for (label, cluster), colour in zip(clusters.items(), itertools.cycle(COLOURS)):
        for name, line in zip(ALGORITHMS, ("-", "--"), strict=True):
            values = [model.efficiency(name, count, batch, cluster) for count in workers]
            axes.plot(
                workers, values, line, color=colour, marker="o", ms=4, label=f"{label} {name}"
            )
    axes.axhline(GOAL, color="#222222", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(workers, map(str, workers))
    lowest = min(min(line.get_ydata()) for line in axes.get_lines())
    # Lines that stay near 1 would be one line if the axis began at 0.
    bottom = max(0, math.floor(10 * lowest - 1) / 10)
    axes.set(xlabel="workers", ylabel="weak-scaling efficiency", ylim=(bottom, 1.03))
    axes.set_title(f"{batch} images a worker", loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#d9d9d9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path = Path(path)
    if not path.parent.is_dir():
        raise BadInput(f"the folder of --plot must exist, got {path}")
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.partial.png")
    try:
        figure.savefig(temporary, format="png", dpi=130)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------


def _point(text):
    """Returns a pair (batch, seconds) of its text "BATCH:SECONDS"."""
    batch, colon, seconds = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError(f"must be BATCH:SECONDS, got {text}")
    return _count(batch), _positive(seconds)


def _positive(text):
    number = _number(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text}")
    return number


def _number(text):
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {text}") from None


def _count(text):
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return number


def _share(text):
    number = _number(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"must be in 0 … 1, got {text}")
    return number


class _Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"{message}\n")


def _parser():
    parser = _Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("file", nargs="?", help="what scaling.py wrote with --out")
    add("--precision", help="which of its results (default: the first)")
    add(
        "--step",
        type=_point,
        action="append",
        metavar="BATCH:SECONDS",
        help="in place of the file, a step of one worker; twice at least",
    )
    add("--bytes", type=_positive, metavar="N", help="with --step: bytes of the gradients")
    add(
        "--bandwidth",
        type=_positive,
        nargs="+",
        default=[10.0, 25.0, 100.0],
        metavar="GBIT/S",
        help="between nodes (default: 10 25 100)",
    )
    add("--latency", type=_positive, default=50.0, metavar="µS", help="of a message (default: 50)")
    add("--node-workers", type=_count, default=8, metavar="N", help="in a node (default: 8)")
    add("--node-bandwidth", type=_positive, default=400.0, metavar="GBIT/S", help="default: 400")
    add("--node-latency", type=_positive, default=10.0, metavar="µS", help="default: 10")
    add("--overlap", type=_share, default=0.0, metavar="SHARE", help="hidden (default: 0)")
    add("--batch-size", type=_count, metavar="N", help="of a worker (default: as measured)")
    add("--global-batch", type=_count, metavar="N", help="strong scaling (default: 1024)")
    add("--workers", type=_count, nargs="+", default=list(WORKERS), metavar="N")
    add("--plot", metavar="FILE", help="a PNG file")
    return parser


def _given(args):
    """Returns the points, the bytes, the batch, and the measured result or None."""
    if args.file and not (args.step or args.bytes):
        settings, result = read_measurement(args.file, args.precision)
        batch, seconds = settings["batch_size"], result["step_seconds"]
        points = [(batch // 2, seconds["apart_half"]), (batch, seconds["apart"])]
        return points, result["gradient_bytes"], batch, result
    if args.file or not (args.step and args.bytes):
        raise BadInput("give the file of scaling.py, or --step twice and --bytes")
    return args.step, args.bytes, max(batch for batch, _ in args.step), None


def report(args):
    """Prints the tables and draws the plot that the command line asks for."""
    points, size, measured_batch, result = _given(args)
    model = Model(fit_compute(points), size, args.overlap)
    batch, workers = args.batch_size or measured_batch, sorted(set(args.workers))
    inner = Link(args.node_bandwidth * 1e9 / 8, args.node_latency / 1e6)
    clusters = {
        f"{bandwidth:g} Gbit/s": Cluster(
            Link(bandwidth * 1e9 / 8, args.latency / 1e6), args.node_workers, inner
        )
        for bandwidth in args.bandwidth
    }
    fixed, image = (1000 * value for value in model.compute)
    print(f"computing: {fixed:.1f} ms + {image:.2f} ms an image; gradients {size / 1e6:.1f} MB")
    if result:
        reduce = result["all_reduce"]
        print(
            f"\ncheck, {result['precision']}: two workers over a link of "
            f"{reduce['bandwidth'] / 1e9:.2f} GB/s and {1e6 * reduce['latency']:.0f} µs"
        )
        headings = ("scaling", "batch", "predicted ms", "measured ms", "error")
        print(format_rows(headings, predict_pair(result, measured_batch)))
    for label, cluster in clusters.items():
        print(
            f"\n{label}, {args.latency:g} µs; nodes of {args.node_workers}; {batch} images a "
            f"worker; batch: the smallest for an efficiency of {GOAL}"
        )
        print(workers_table(model, cluster, batch, workers))
    print("\nhow many workers: the last with such an efficiency; after which more are no faster")
    print(limits_table(model, clusters, batch, args.global_batch or 1024, workers))
    if args.plot:
        plot_efficiency(model, clusters, batch, workers, args.plot)


def main(words=None):
    """Reads the command line, `sys.argv` by default, and reports; returns the exit status."""
    args = _parser().parse_args(words)
    try:
        report(args)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or 'output'}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
