"""The latency of a model after warm-up."""

import math
import statistics
import time

_WARM_UP = 5
_MIN_RUNS, _MAX_RUNS = 20, 200
_MAX_SECONDS = 1.0


def measure_latency(runtime, batch):
    """Returns the latency of a model for a batch, after warm-up.

    Args:
        runtime: A `Runtime`.
        batch: Images as it takes them.

    Returns:
        A dict: "median" and "p95", in milliseconds.
    """
    for _ in range(_WARM_UP):
        runtime.run(batch)
    taken, began = [], time.perf_counter()
    while len(taken) < _MIN_RUNS or (
        len(taken) < _MAX_RUNS and time.perf_counter() - began < _MAX_SECONDS
    ):
        taken.append(1000 * runtime.time(batch))
    p95 = sorted(taken)[math.ceil(0.95 * len(taken)) - 1]
    return {"median": statistics.median(taken), "p95": p95}
