"""The time of a training step by TensorFlow operator.

    python benchmarks/operators.py [--contender ours "keras layers"] [--precision bfloat16]
        [--model resnet18] [--image-size 96] [--batch-size 128] [--steps 3]

It prints each operator's milliseconds a step, summed over the threads of one training step of
`training_speed.py`, and its share. TensorFlow's profiler records the operators.
"""

import argparse
import collections
import os
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from tensorflow.tsl.profiler.protobuf import xplane_pb2
from training_speed import CONTENDERS


def record(steps, count):
    """Runs training steps under the profiler; returns operator -> seconds."""
    with tempfile.TemporaryDirectory() as folder:
        tf.profiler.experimental.start(folder)
        steps(count)
        tf.profiler.experimental.stop()
        (path,) = Path(folder).rglob("*.xplane.pb")
        space = xplane_pb2.XSpace.FromString(path.read_bytes())
    found = collections.Counter()
    for plane in space.planes:
        names = {key: each.name for key, each in plane.stat_metadata.items()}
        events = {key: each.name for key, each in plane.event_metadata.items()}
        for line in plane.lines:
            for event in line.events:
                if any(names.get(stat.metadata_id) == "tf_op" for stat in event.stats):
                    # "graph/path/name:Operator"
                    operator = events[event.metadata_id].rpartition(":")[2]
                    found[operator] += event.duration_ps / 1e12
    return found


def main():
    """Prints a table for each contender."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--contender", nargs="+", default=["ours"], choices=CONTENDERS)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--variant", default="d2l")
    parser.add_argument("--precision", default="bfloat16")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rows", type=int, default=20)
    args = parser.parse_args()
    for name in args.contender:
        steps = CONTENDERS[name](args)
        steps(2)  # compiles
        found = record(steps, args.steps)
        total = sum(found.values())
        print(
            f"{name}, {args.model}, {args.precision}, {args.image_size} px, batch "
            f"{args.batch_size}: {1000 * total / args.steps:.0f} ms of operators a step"
        )
        for operator, seconds in found.most_common(args.rows):
            milliseconds = 1000 * seconds / args.steps
            print(f"  {operator:32} {milliseconds:8.1f} ms {seconds / total:6.1%}")


if __name__ == "__main__":
    main()
