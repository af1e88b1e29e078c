"""Images/s of training in one process and in two, with one core each: weak and strong scaling.

    python benchmarks/scaling.py [--precision bfloat16] [--batch-size 128] [--out FILE]

Each process is bound to a core of its own before it imports TensorFlow, and trains as a user's
script does: `choose_strategy`, `Shards`, `model.fit`. The machine's speed drifts, so the
measurements take turns (A B A B …), and each ratio is the median of the ratios within a round:

    one         one process, batch B; the other core is idle
    apart       two independent processes, batch B each: the control for the effect of a busy
                second core on memory bandwidth and clock rate
    weak        two workers of one network, batch B each
    apart_half  two independent processes, batch B/2 each
    strong      two workers of one network, batch B/2 each

The all-reduce of tensors as large as the gradients, and of a single number, is timed by itself.
`scaling_model.py` reads the results and predicts the step time of more workers.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import time
import timeit
from concurrent.futures import ProcessPoolExecutor

os.environ.update(CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import SPECS, Spec, Split, build_resnet, with_preprocessing
from keras_resnet.distribution import Shards, choose_strategy
from keras_resnet.training.precision import POLICIES
from keras_resnet.utils.environment import describe_environment
from keras_resnet.utils.errors import InputError, check_count
from keras_resnet.utils.files import write_json
from keras_resnet.utils.tables import Column, format_table

TIMEOUT = 600.0
"""Time limit of a worker's answer, in seconds."""

WARM_UP = 3
"""Steps before the measurement: the first steps compile and allocate."""

ALL_REDUCES = 10

ALONE, PAIR = ("alone 0", "alone 1"), ("pair 0", "pair 1")

# turn -> (the processes that train, the divisor of the batch size)
TURNS = {
    "one": (ALONE[:1], 1),
    "apart": (ALONE, 1),
    "weak": (PAIR, 1),
    "apart_half": (ALONE, 2),
    "strong": (PAIR, 2),
}

# ----------------------------------------------------------------------------------------------
# In a worker process
# ----------------------------------------------------------------------------------------------


def build(tf_config, filters, image_size, precision):
    """Starts the strategy and builds the network; returns the number and bytes of the gradients."""
    global strategy, model
    if tf_config:
        os.environ["TF_CONFIG"] = json.dumps(tf_config)
    strategy = choose_strategy("multiworker" if tf_config else "none", say=None)
    spec = Spec((1,) * len(filters), tuple(filters)) if filters else SPECS["resnet18"]
    shape = (image_size, image_size, 1)
    keras.config.set_dtype_policy(POLICIES[precision])
    with strategy.scope():
        model = with_preprocessing(build_resnet(spec, shape), shape)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    sizes = [int(np.prod(variable.shape)) for variable in model.trainable_variables]
    # Weights and gradients are float32 in every precision.
    return {"gradients": len(sizes), "gradient_bytes": 4 * sum(sizes)}


def fit(image_size, batch_size, steps):
    """Trains and returns the mean seconds of a step, without the first, which waits for the data.

    Args:
        image_size: Height and width in pixels.
        batch_size: Images in a step of this process.
        steps: Number of steps.
    """
    images = steps * batch_size * strategy.num_replicas_in_sync
    random = np.random.default_rng(0)
    shape = (images, image_size, image_size, 1)
    split = Split(random.integers(0, 256, shape, "uint8"), random.integers(0, 10, images))
    shards = Shards(split, images // steps, strategy)
    ends = []
    clock = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
    )
    model.fit(
        shards.dataset, steps_per_epoch=shards.steps, shuffle=False, verbose=0, callbacks=[clock]
    )
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def all_reduce():
    """Returns the median seconds of an all-reduce of the gradients, and of a single number."""

    def timed(tensors):
        def reduce():
            return tf.distribute.get_replica_context().all_reduce("SUM", tensors())[0]

        graph = tf.function(lambda: strategy.run(reduce))
        graph()
        return statistics.median(timeit.repeat(graph, number=1, repeat=ALL_REDUCES))

    gradients = timed(lambda: [tf.identity(v.value) for v in model.trainable_variables])
    return gradients, timed(lambda: [tf.constant(1.0)])


def ignore_interrupts():
    """Leaves Ctrl-C to the parent process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ----------------------------------------------------------------------------------------------
# In the parent process
# ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bound_to(core):
    """Binds the processes that start inside the block to a core.

    TensorFlow counts the cores of its process when it is imported.
    """
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def free_addresses(count):
    """Returns addresses of this machine whose ports are free."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [f"localhost:{each.getsockname()[1]}" for each in sockets]


def run(args):
    """Measures all turns; returns the size of the gradients, and one dict of seconds a round."""
    cores = sorted(os.sched_getaffinity(0))
    addresses = free_addresses(2)
    spawn = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, spawn, ignore_interrupts) for name in (*ALONE, *PAIR)}
    network = args.filters, args.image_size, args.precision

    def call(names, function, *arguments):
        futures = [pools[name].submit(function, *arguments) for name in names]
        return [future.result(TIMEOUT) for future in futures]

    def turn(name, steps):
        workers, divisor = TURNS[name]
        return call(workers, fit, args.image_size, args.batch_size // divisor, steps)

    try:
        built = []
        for index, core in enumerate((cores[0], cores[len(cores) // 2])):
            task = {"type": "worker", "index": index}
            with bound_to(core):
                built.append(pools[ALONE[index]].submit(build, None, *network))
                tf_config = {"cluster": {"worker": addresses}, "task": task}
                built.append(pools[PAIR[index]].submit(build, tf_config, *network))
        sizes, *_ = [future.result(TIMEOUT) for future in built]
        for name in TURNS:
            turn(name, WARM_UP)
        rounds = []
        for number in range(args.rounds):
            # The harmonic mean of times belongs to the arithmetic mean of images/s.
            seconds = {name: statistics.harmonic_mean(turn(name, args.steps)) for name in TURNS}
            answers = zip(*call(PAIR, all_reduce), strict=True)
            seconds["all_reduce"], seconds["message"] = map(statistics.mean, answers)
            rounds.append(seconds)
            shown = ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())
            print(f"round {number + 1} of {args.rounds}: {shown}", file=sys.stderr, flush=True)
        return sizes, rounds
    finally:
        # Workers that end in an orderly way would wait for each other.
        for process in multiprocessing.active_children():
            process.kill()


def summarize(rounds, batch_size, gradient_bytes):
    """Returns the results as a dict of JSON values.

    Shares are fractions of a step of two workers; bandwidth (bytes/s) and latency (s) are those of
    a ring all-reduce of two workers, as in `scaling_model.py`.

    Args:
        rounds: Dicts of seconds: one for each of `TURNS`, "all_reduce" and "message".
        batch_size: Images in a step of one process; "strong" and "apart_half" have half of it.
        gradient_bytes: Bytes of the gradients.

    Example:
        >>> seconds = {"one": 0.9, "apart": 0.95, "weak": 1.0, "apart_half": 0.5, "strong": 0.6}
        >>> found = summarize([{**seconds, "all_reduce": 0.052, "message": 0.002}], 64, 50_000_000)
        >>> found["weak_efficiency"], found["strong_speedup"]
        (0.9, 1.5)
        >>> found["images_per_second"]["weak"], found["all_reduce"]["share_weak"]
        (128.0, 0.052)
        >>> round(found["all_reduce"]["bandwidth"] / 1e9, 3)
        1.0
    """

    def median(value):
        return statistics.median(map(value, rounds))

    seconds = {name: median(lambda r, name=name: r[name]) for name in rounds[0]}
    message, reduced = seconds.pop("message"), seconds.pop("all_reduce")
    return {
        "step_seconds": seconds,
        "images_per_second": {
            name: len(workers) * (batch_size // divisor) / seconds[name]
            for name, (workers, divisor) in TURNS.items()
        },
        "weak_efficiency": median(lambda r: r["one"] / r["weak"]),
        "strong_speedup": median(lambda r: r["one"] / r["strong"]),
        "all_reduce": {
            "seconds": reduced,
            "message_seconds": message,
            "share_weak": median(lambda r: r["all_reduce"] / r["weak"]),
            "share_strong": median(lambda r: r["all_reduce"] / r["strong"]),
            "bandwidth": gradient_bytes / max(reduced - message, 1e-9),
            "latency": message / 2,
        },
    }


def format_results(found, batch_size):
    """Returns the results as a table and the lines below it."""
    rows = [
        {
            "turn": name,
            "processes": len(workers),
            "batch a process": batch_size // divisor,
            "ms": 1000 * found["step_seconds"][name],
            "images/s": found["images_per_second"][name],
        }
        for name, (workers, divisor) in TURNS.items()
    ]
    columns = ["turn", "processes", "batch a process"]
    columns += [Column("ms", "ms a step", ".0f"), Column("images/s", spec=".1f")]
    reduce = found["all_reduce"]
    return (
        f"{format_table(rows, columns)}\n"
        f"weak scaling: efficiency {found['weak_efficiency']:.2f}, all-reduce "
        f"{reduce['share_weak']:.1%} of the step\n"
        f"strong scaling: speed-up {found['strong_speedup']:.2f}, all-reduce "
        f"{reduce['share_strong']:.1%} of the step\n"
        f"all-reduce: {found['gradient_bytes'] / 1e6:.1f} MB of gradients in "
        f"{1000 * reduce['seconds']:.0f} ms, a number in {1000 * reduce['message_seconds']:.1f} "
        f"ms: {reduce['bandwidth'] / 1e9:.2f} GB/s"
    )


def check(args):
    """Raises an `InputError` if an option is out of range, or there are no two cores."""
    check_count("--batch-size", args.batch_size, least=2)
    if args.batch_size % 2:
        raise InputError(f"`--batch-size` must be even, to be halved, got {args.batch_size}")
    check_count("--steps", args.steps, least=2)
    check_count("--image-size", args.image_size)
    check_count("--rounds", args.rounds)
    if not hasattr(os, "sched_getaffinity"):
        raise InputError(f"processes can be bound to cores on Linux only, got {sys.platform}")
    if len(os.sched_getaffinity(0)) < 2:
        raise InputError("two processes with a core each need two cores, got one")


def main():
    """Measures and prints the table; progress goes to standard error."""
    parser = argparse.ArgumentParser(description="Speed of training on several replicas.")
    add = parser.add_argument
    add("--precision", choices=("float32", "bfloat16"), default="float32")
    add("--batch-size", type=int, default=128, help="images in a step of a process (default: 128)")
    add("--image-size", type=int, default=96, help="pixels (default: 96)")
    add("--rounds", type=int, default=3, help="turns of each kind (default: 3)")
    add("--steps", type=int, default=4, help="steps in a turn (default: 4)")
    add("--filters", type=int, nargs="+", metavar="N", help="a small network instead of ResNet-18")
    add("--out", help="a JSON file for the results")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        check(args)
        sizes, rounds = run(args)
    except InputError as error:
        parser.exit(2, f"{error}\n")
    found = {
        "date": str(datetime.date.today()),
        **describe_environment(),
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        **sizes,
        **summarize(rounds, args.batch_size, sizes["gradient_bytes"]),
        "rounds": rounds,
    }
    print(format_results(found, args.batch_size))
    if args.out:
        write_json(args.out, found)


if __name__ == "__main__":
    main()
