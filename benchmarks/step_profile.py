"""The time of a training step by operator, from oneDNN's log.

    python benchmarks/step_profile.py [--contenders ours "keras layers" torch]
        [--precision bfloat16] [--model resnet18] [--image-size 96] [--batch-size 128] [--steps 5]

Contenders are those of `training_speed.py`; TensorFlow and PyTorch both compute convolutions by
oneDNN, which logs the time of each operator where `ONEDNN_VERBOSE` is set. "not oneDNN" is the rest
of the step: all other operators, the optimizer, and Python. TensorFlow runs one operator at a time
here, so that the times add up. The column "ms" is the mean of the
steps; the last column is the number of calls in a step.
"""

import argparse
import collections
import os
import subprocess
import sys
import time

import training_speed

BEGIN, END = "profile: begin", "profile: end"
KINDS = {"forward_training": "forward", "forward_inference": "forward"}


def work(args):
    """Makes the steps, between two lines that the parent process looks for."""
    steps = training_speed.CONTENDERS[args.worker](args)
    steps(3)
    print(BEGIN, flush=True)
    start = time.perf_counter()
    steps(args.steps)
    print(END, time.perf_counter() - start, flush=True)


def parse(line):
    """Returns (operator, ms) of a line of oneDNN's log, or None for another line."""
    fields = line.strip().split(",")
    if not fields[0].startswith("onednn_verbose") or "exec" not in fields:
        return None
    # …,exec,cpu,OPERATOR,IMPLEMENTATION,PROPAGATION,…,MILLISECONDS
    operator, _, propagation = fields[fields.index("exec") + 2 :][:3]
    return f"{operator}, {KINDS.get(propagation, propagation)}", float(fields[-1])


def profile(args, contender, precision):
    """Prints the table of a contender, the slowest operators first."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", contender]
    command += ["--precision", precision]
    environment = {**os.environ, "ONEDNN_VERBOSE": "1", "TF_NUM_INTEROP_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    _, _, measured = done.stdout.partition(BEGIN)
    log, _, seconds = measured.partition(END)
    total = float(seconds.split()[0]) * 1e3 / args.steps
    times, counts = collections.Counter(), collections.Counter()
    for operator, ms in filter(None, map(parse, log.splitlines())):
        times[operator] += ms / args.steps
        counts[operator] += 1
    times["not oneDNN"] = total - times.total()
    print(f"{contender}, {precision}: {total:.0f} ms a step")
    for operator, ms in times.most_common():
        print(f"  {operator:40} {ms:8.1f} ms {ms / total:6.1%}  {counts[operator] // args.steps:4}")


def main():
    """Profiles each contender, or is one of them."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    training_speed.add_options(parser)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    if args.worker:
        (args.precision,) = args.precision
        work(args)
        return
    for precision in args.precision:
        for contender in args.contenders:
            profile(args, contender, precision)


if __name__ == "__main__":
    main()
