"""Images/s of training in one process and in two, a core each: weak and strong scaling.

    python benchmarks/scaling.py [--precision float32 bfloat16] [--batch-size 128] [--out FILE]

Every process is bound to a core of its own before it imports TensorFlow, and trains as a user's
script would: `choose_strategy`, `Shards`, `model.fit`. The machine's speed drifts, so the forms
take turns (A B A B …), and every ratio is the median of the rounds' own:

    one    one process, batch B; the other core has nothing to do
    apart  two processes at once that know nothing of each other, batch B each: the control, for a
           core whose neighbour rests may have more memory bandwidth and a higher clock
    weak   two workers of one network, batch B each
    strong two workers of one network, batch B of both together

"apart" is also measured at half the batch. The all-reduce of tensors as large as the gradients, and
of a single number, is timed by itself; the time that two workers take longer than two processes
apart is the check. `scaling_model.py` reads the file and says what more workers would do.
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
import tempfile
import time
from multiprocessing.connection import wait
from typing import NamedTuple

os.environ.update(CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="3")

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import SPECS, Spec, Split, build_resnet, with_preprocessing
from keras_resnet.distribution import Shards, choose_strategy
from keras_resnet.distribution.launch import share_cores
from keras_resnet.training.precision import POLICIES
from keras_resnet.training.run_folder import describe_surroundings
from keras_resnet.utils.errors import InputError, check_count, look_up, one_line
from keras_resnet.utils.files import write_json
from keras_resnet.utils.tables import Column, format_table

PRECISIONS = ("float32", "bfloat16")

TIMEOUT = 600.0
"""Seconds after which a worker that does not answer is taken for stuck."""

NOTES = ("WARNING: All log messages", "I0000")
"""How the lines begin that TensorFlow writes to standard error whenever it is imported."""

WARM_UP = 3
"""Steps before anything is measured: the first ones compile and allocate."""


class Turn(NamedTuple):
    """What is measured in a turn: which workers train, and what part of the batch each has."""

    workers: tuple[str, ...]
    part: int


ALONE, PAIR = ("alone 0", "alone 1"), ("pair 0", "pair 1")
TURNS = {
    "one": Turn(ALONE[:1], 1),
    "apart": Turn(ALONE, 1),
    "weak": Turn(PAIR, 1),
    "apart_half": Turn(ALONE, 2),
    "strong": Turn(PAIR, 2),
}

COLUMNS = (
    Column("what", "turn"),
    Column("processes", "processes"),
    Column("batch", "batch a process"),
    Column("milliseconds", "ms a step", ".0f"),
    Column("images_per_second", "images/s", ".1f"),
)


class Failed(Exception):
    """A worker failed, ended or did not answer; the message says so in one line."""


# ----------------------------------------------------------------------------------------------
# A worker
# ----------------------------------------------------------------------------------------------


def work(connection, environment, settings):
    """Answers requests until the other end is closed.

    Args:
        connection: Where a request (method of `Trainer`, arguments) comes and its answer goes.
        environment: Environment variables.
        settings: What `Trainer` takes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    os.environ.update(environment)
    trainer = Trainer(**settings)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            what, arguments = connection.recv()
            try:
                answer = {"value": getattr(trainer, what)(*arguments)}
            except Exception as error:
                kind = InputError if isinstance(error, InputError) else Failed
                answer = {"error": kind(one_line(error))}
            connection.send(answer)
    os._exit(0)  # TensorFlow would wait for a partner that has gone


class Trainer:
    """One network in training.

    Args:
        spec: A `Spec`.
        image_size: Height and width in pixels.
        precision: A row of `POLICIES`.
    """

    def __init__(self, spec, image_size, precision):
        self.spec = spec
        self.image_size = image_size
        self.precision = precision

    def build(self):
        """Starts the strategy and builds the network; returns how large its gradients are."""
        several = "TF_CONFIG" in os.environ
        self.strategy = choose_strategy("multiworker" if several else "none", say=None)
        shape = (self.image_size, self.image_size, 1)
        keras.config.set_dtype_policy(POLICIES[self.precision])
        with self.strategy.scope():
            network = build_resnet(self.spec, shape)
            self.model = with_preprocessing(network, shape)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            self.model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
        sizes = [int(np.prod(variable.shape)) for variable in self.model.trainable_variables]
        # Weights are float32, whatever the network computes in, and so are their gradients.
        return {"gradients": len(sizes), "gradient_bytes": 4 * sum(sizes)}

    def fit(self, batch_size, steps):
        """Trains and returns the seconds of a step: their mean without the first.

        Args:
            batch_size: Images a step of this process.
            steps: How many; the first one waits for the data.
        """
        images = steps * batch_size * self.strategy.num_replicas_in_sync
        random = np.random.default_rng(0)
        shape = (images, self.image_size, self.image_size, 1)
        split = Split(random.integers(0, 256, shape, "uint8"), random.integers(0, 10, images))
        shards = Shards(split, images // steps, self.strategy)
        ends = []
        clock = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: ends.append(time.perf_counter())
        )
        self.model.fit(
            shards.dataset,
            steps_per_epoch=shards.steps,
            shuffle=False,
            verbose=0,
            callbacks=[clock],
        )
        return (ends[-1] - ends[0]) / (len(ends) - 1)

    def all_reduce(self, count):
        """Returns the seconds of an all-reduce of the gradients, and of a number: medians.

        Args:
            count: How often.
        """
        variables = self.model.trainable_variables

        def gradients():
            return [tf.identity(variable.value) for variable in variables]

        def number():
            return [tf.constant(1.0)]

        def timed(tensors):
            def reduce():
                return tf.distribute.get_replica_context().all_reduce("SUM", tensors())[0]

            graph = tf.function(lambda: self.strategy.run(reduce))
            graph()
            return statistics.median(_seconds(graph) for _ in range(count))

        return timed(gradients), timed(number)


def _seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------------
# The process that asks them
# ----------------------------------------------------------------------------------------------


class Crew:
    """The four workers; a context manager that ends them.

    Args:
        settings: What `Trainer` takes.
    """

    def __init__(self, settings):
        self._workers = {}
        self._settings = settings
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (`__exit__` closes it)

    def __enter__(self):
        cores = [min(share) for share in share_cores(os.sched_getaffinity(0), 2)]
        addresses = [f"localhost:{port}" for port in _free_ports(2)]
        try:
            for index, core in enumerate(cores):
                task = {"type": "worker", "index": index}
                cluster = {"cluster": {"worker": addresses}, "task": task}
                with _leaving_to_children(core, self._errors):
                    self._add(ALONE[index], {})
                    self._add(PAIR[index], {"TF_CONFIG": json.dumps(cluster)})
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add(self, name, environment):
        # Not fork: TensorFlow counts the cores of its own process when it is imported.
        start = multiprocessing.get_context("spawn")
        ours, theirs = start.Pipe()
        arguments = (theirs, environment, self._settings)
        process = start.Process(target=work, args=arguments, name=name, daemon=True)
        process.start()
        self._workers[name] = process, ours
        theirs.close()  # or its end would not be noticed

    def __exit__(self, *error):
        for process, _ in self._workers.values():
            process.kill()
        for process, connection in self._workers.values():
            process.join()
            connection.close()
        self._errors.close()

    def ask(self, names, what, *arguments):
        """Returns the answers of several workers to one request, which they get together.

        Args:
            names: Who.
            what: A function of `Trainer`.
            *arguments: Its arguments.

        Raises:
            Failed: If one cannot answer.
            InputError: If one says so.
        """
        for name in names:
            with contextlib.suppress(BrokenPipeError):  # `_answer` says why
                self._workers[name][1].send((what, arguments))
        last = time.monotonic() + TIMEOUT
        return [self._answer(name, what, last) for name in names]

    def _answer(self, name, what, last):
        process, connection = self._workers[name]
        came = wait([connection, process.sentinel], max(0, last - time.monotonic()))
        if not came:
            raise Failed(f"{name}: `{what}` took longer than {TIMEOUT:g} s")
        try:
            answer = connection.recv()
        except (EOFError, ConnectionError):
            process.join()
            raise Failed(f"{name} ended with status {process.exitcode}{self._last()}") from None
        if "error" in answer:
            raise type(answer["error"])(f"{name}: {answer['error']}")
        return answer["value"]

    def _last(self):
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", "replace").splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith(NOTES)]
        return f": {lines[-1].strip()}" if lines else ""


@contextlib.contextmanager
def _leaving_to_children(core, errors):
    """Processes that are started in the block have one core, and `errors` for standard error."""
    cores, own = os.sched_getaffinity(0), os.dup(2)
    sys.stderr.flush()
    try:
        os.sched_setaffinity(0, {core})
        os.dup2(errors.fileno(), 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.sched_setaffinity(0, cores)


def _free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


def measure(crew, args, say):
    """Returns the sizes of the gradients, and the rounds: one dict of seconds each.

    Args:
        crew: A `Crew`.
        args: The command line's.
        say: Is called with a line of progress.
    """
    sizes, *_ = crew.ask((*PAIR, *ALONE), "build")
    for turn in TURNS.values():
        crew.ask(turn.workers, "fit", args.batch_size // turn.part, WARM_UP)
    rounds = []
    for number in range(args.rounds):
        seconds = {
            name: crew.ask(turn.workers, "fit", args.batch_size // turn.part, args.steps)
            for name, turn in TURNS.items()
        }
        # The harmonic mean of times: of the processes' images/s it is the mean.
        seconds = {name: statistics.harmonic_mean(each) for name, each in seconds.items()}
        answers = crew.ask(PAIR, "all_reduce", args.all_reduces)
        seconds["all_reduce"], seconds["message"] = map(statistics.mean, zip(*answers, strict=True))
        rounds.append(seconds)
        say(f"round {number + 1} of {args.rounds}: " + describe_round(seconds))
    return sizes, rounds


def describe_round(seconds):
    """Returns one line.

    Example:
        >>> describe_round({"one": 1.5, "all_reduce": 0.0721})
        'one 1500 ms, all_reduce 72 ms'
    """
    return ", ".join(f"{name} {1000 * value:.0f} ms" for name, value in seconds.items())


def summarize(rounds, batch_size, gradient_bytes):
    """Returns the figures that follow from the rounds.

    Args:
        rounds: Dicts of seconds: one for each of `TURNS`, "all_reduce" and "message".
        batch_size: Images a step of one process; "strong" and "apart_half" have half of it.
        gradient_bytes: What is all-reduced a step.

    Returns:
        A dict of JSON values. Shares are parts of a step of two workers; bandwidth (bytes/s) and
        latency (s) are those of a ring all-reduce of two, as `scaling_model.py` has it.

    Example:
        >>> seconds = {"one": 0.9, "apart": 0.95, "weak": 1.0, "apart_half": 0.5, "strong": 0.6}
        >>> found = summarize([{**seconds, "all_reduce": 0.052, "message": 0.002}], 64, 50_000_000)
        >>> found["weak"]["efficiency"], found["strong"]["speedup"]
        (0.9, 1.5)
        >>> found["images_per_second"]["weak"], found["all_reduce"]["share"]
        (128.0, 0.052)
        >>> round(found["all_reduce"]["bandwidth"] / 1e9, 3)
        1.0
    """

    def median(value):
        return statistics.median(map(value, rounds))

    names = {name: median(lambda r, name=name: r[name]) for name in rounds[0]}
    message, reduced = names.pop("message"), names.pop("all_reduce")
    return {
        "step_seconds": names,
        "images_per_second": {
            name: len(turn.workers) * (batch_size // turn.part) / names[name]
            for name, turn in TURNS.items()
        },
        "weak": {
            "efficiency": median(lambda r: r["one"] / r["weak"]),
            "efficiency_over_apart": median(lambda r: r["apart"] / r["weak"]),
        },
        "strong": {
            "speedup": median(lambda r: r["one"] / r["strong"]),
            "efficiency": median(lambda r: r["one"] / r["strong"] / 2),
            "efficiency_over_apart": median(lambda r: r["apart_half"] / r["strong"]),
        },
        "all_reduce": {
            "seconds": reduced,
            "message_seconds": message,
            "share": median(lambda r: r["all_reduce"] / r["weak"]),
            "share_strong": median(lambda r: r["all_reduce"] / r["strong"]),
            "difference_share": median(lambda r: 1 - r["apart"] / r["weak"]),
            "difference_share_strong": median(lambda r: 1 - r["apart_half"] / r["strong"]),
            "bandwidth": gradient_bytes / max(reduced - message, 1e-9),
            "latency": message / 2,
        },
    }


def format_result(result, batch_size):
    """Returns a result, of one precision, as a table and the lines below it."""
    rows = [
        {
            "what": name,
            "processes": len(turn.workers),
            "batch": batch_size // turn.part,
            "milliseconds": 1000 * result["step_seconds"][name],
            "images_per_second": result["images_per_second"][name],
        }
        for name, turn in TURNS.items()
    ]
    weak, strong, reduce = result["weak"], result["strong"], result["all_reduce"]
    megabytes = result["gradient_bytes"] / 1e6
    return "\n".join(
        (
            f"{result['precision']}",
            format_table(rows, COLUMNS),
            f"weak scaling: efficiency {weak['efficiency']:.3f}; beside two processes apart "
            f"{weak['efficiency_over_apart']:.3f}",
            f"strong scaling: speed-up {strong['speedup']:.2f}, efficiency "
            f"{strong['efficiency']:.3f}; beside two processes apart "
            f"{strong['efficiency_over_apart']:.3f}",
            f"all-reduce: {megabytes:.1f} MB of gradients a step in {1000 * reduce['seconds']:.1f} "
            f"ms, a number in {1000 * reduce['message_seconds']:.1f} ms: "
            f"{reduce['bandwidth'] / 1e9:.2f} GB/s",
            f"share of the step: all-reduce {reduce['share']:.1%}, by the difference to two "
            f"processes apart {reduce['difference_share']:.1%}; strong: "
            f"{reduce['share_strong']:.1%}, {reduce['difference_share_strong']:.1%}",
        )
    )


# ----------------------------------------------------------------------------------------------
# The command line
# ----------------------------------------------------------------------------------------------


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet18", help="a row of SPECS (default: resnet18)")
    parser.add_argument(
        "--filters",
        type=int,
        nargs="+",
        metavar="N",
        help="in place of --model a small network, a block of so many filters in each stage",
    )
    parser.add_argument("--image-size", type=int, default=96, help="pixels (default: 96)")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="images a step of a process (default: 128)"
    )
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["float32"], metavar="NAME"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of each form (default: 3)")
    parser.add_argument("--steps", type=int, default=4, help="a turn (default: 4)")
    parser.add_argument("--all-reduces", type=int, default=10, help="a round (default: 10)")
    parser.add_argument("--out", help="a JSON file for the figures")
    return parser


def _check(args):
    check_count("--batch-size", args.batch_size, least=2)
    if args.batch_size % 2:
        raise InputError(f"`--batch-size` must be even, to be halved, got {args.batch_size}")
    check_count("--steps", args.steps, least=2)
    for name in ("image_size", "rounds", "all_reduces"):
        check_count(f"--{name.replace('_', '-')}", getattr(args, name))
    if not hasattr(os, "sched_getaffinity"):
        raise InputError(f"processes can be bound to cores on Linux alone, got {sys.platform}")
    if len(os.sched_getaffinity(0)) < 2:
        raise InputError("two processes with a core each need two cores, got one")


def run(args, say):
    """Measures all precisions; returns what --out holds."""
    spec = look_up(SPECS, args.model, "model")
    if args.filters:
        spec = Spec((1,) * len(args.filters), tuple(args.filters))
    results = []
    for precision in args.precision:
        with Crew({"spec": spec, "image_size": args.image_size, "precision": precision}) as crew:
            sizes, rounds = measure(crew, args, say)
        figures = summarize(rounds, args.batch_size, sizes["gradient_bytes"])
        results.append({"precision": precision, **sizes, **figures, "rounds": rounds})
        print(f"\n{format_result(results[-1], args.batch_size)}", flush=True)
    names = ("model", "filters", "image_size", "batch_size", "steps")
    return {
        "date": str(datetime.date.today()),
        **describe_surroundings(),
        "settings": {name: getattr(args, name) for name in names},
        "results": results,
    }


def main():
    """Measures and prints a table for each precision; progress goes to standard error."""
    args = _parser().parse_args()
    # As Ctrl-C: by way of all `__exit__`s.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    network = f"filters {args.filters}" if args.filters else args.model
    print(f"{network}, {args.image_size} px, one core a process")
    try:
        _check(args)
        found = run(args, say=lambda line: print(line, file=sys.stderr, flush=True))
        if args.out:
            write_json(args.out, found)
    except (InputError, Failed, OSError) as error:
        print(one_line(error), file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
