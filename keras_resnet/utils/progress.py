"""What is said on standard error: progress bars, which only a terminal shows, and notes."""

import contextlib
import sys


@contextlib.contextmanager
def bar(total, description, unit=" images", stream=None):
    """Shows a bar with speed and time left while the block runs, if `stream` is a terminal.

    Args:
        total: Where the bar ends.
        description: What stands before it.
        unit: What is counted.
        stream: Where to show it; standard error by default, so that output stays clean.

    Yields:
        A `tqdm` bar, with `update(steps)` and `set_postfix`.

    Example:
        >>> with bar(2, "work") as shown:
        ...     _ = shown.update(2)
    """
    from tqdm import tqdm

    stream = stream or sys.stderr
    # `leave=False`: the line that tells the result takes the bar's place.
    with tqdm(
        total=total,
        desc=description,
        unit=unit,
        file=stream,
        leave=False,
        disable=not stream.isatty(),
    ) as shown:
        yield shown


def note(line):
    """Prints a line on standard error that whoever reads the result should know.

    Args:
        line: Text; line breaks become spaces.
    """
    print(f"keras-resnet: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)
