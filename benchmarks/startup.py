"""Start-up time of `import keras_resnet` and of the command line.

    python benchmarks/startup.py [--rounds 5]

The machine's speed drifts, so the programs run in turns. Each result is a median.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

PROGRAMS = {
    "python": ["-c", "pass"],
    "keras-resnet --help": ["-m", "keras_resnet.cli", "--help"],
    "import keras_resnet": ["-c", "import keras_resnet"],
    "import keras": ["-c", "import keras"],
    "import keras, keras_resnet": ["-c", "import keras, keras_resnet"],
}


def main():
    """Runs the programs in turns and prints a table."""
    parser = argparse.ArgumentParser(
        description="Start-up time of the import and the command line."
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns (default: 5)")
    arguments = parser.parse_args()
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    seconds = {name: [] for name in PROGRAMS}
    for _ in range(arguments.rounds):
        for name, words in PROGRAMS.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, *words], env=environment, capture_output=True, check=True
            )
            seconds[name].append(time.perf_counter() - start)
    for name, values in seconds.items():
        print(f"{name:28}{statistics.median(values):7.3f} s")
    pairs = zip(seconds["import keras, keras_resnet"], seconds["import keras"], strict=True)
    print(f"ratio of the last two: {statistics.median(a / b for a, b in pairs):.3f}")


if __name__ == "__main__":
    main()
