"""Standard error kept back where a library writes notes for its developers to it."""

import contextlib
import os
import sys
import warnings


@contextlib.contextmanager
def stderr_kept_back():
    """Drops what is written to standard error in the block, from C++ too, and Python's warnings."""
    try:
        own = os.dup(2)
    except OSError:  # standard error is closed: nothing to keep back
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
