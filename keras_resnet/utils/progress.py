"""Standard error: progress bars, which only a terminal shows, notes, and silence."""

import contextlib
import os
import sys
import warnings


@contextlib.contextmanager
def bar(total, description, unit=" images", stream=None):
    """Shows a bar with speed and remaining time during the block, if `stream` is a terminal.

    Args:
        total: The number of steps.
        description: The text before the bar.
        unit: The unit of a step.
        stream: The stream to write to; standard error by default, so that output stays clean.

    Yields:
        A `tqdm` bar, with `update(steps)` and `set_postfix`.

    Example:
        >>> with bar(2, "work") as shown:
        ...     _ = shown.update(2)
    """
    from tqdm import tqdm

    stream = stream or sys.stderr
    # `leave=False`: the line with the result replaces the bar.
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
    """Prints a line on standard error that concerns the reader of the result.

    Args:
        line: Text; line breaks become spaces.
    """
    print(f"keras-resnet: {' '.join(line.splitlines())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def suppress_stderr():
    """Drops everything written to standard error in the block, from C++ too, and warnings.

    It silences the messages that a library writes for its own developers.
    """
    try:
        own = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stderr.flush()
    os.dup2(nowhere, 2)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stderr.flush()
        os.dup2(own, 2)
        os.close(own)
        os.close(nowhere)
