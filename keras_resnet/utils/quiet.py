"""Suppresses the messages that a library writes to standard error for its own developers."""

import contextlib
import os
import sys
import warnings


@contextlib.contextmanager
def suppress_stderr():
    """Drops everything written to standard error in the block, from C++ too, and warnings."""
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
