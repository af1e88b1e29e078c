"""The errors that a user can cause, apart from those that a bug causes.

The command line turns an `InputError` into one line and exit status 2, and a `TrainingError`
into one line and exit status 1. Anything else is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """An argument, a file or a data set breaks a rule; the message states rule and value."""


class TrainingError(RuntimeError):
    """A run that began could not be finished; the message says what is left on disk."""


class Interrupted(TrainingError):
    """A run was asked to stop, by Ctrl-C or SIGTERM; the message says where it stopped."""
