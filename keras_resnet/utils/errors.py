"""The errors that a user can cause, and checks of arguments.

The command line prints each of these errors in one line. Its exit status is 2 for an `InputError`,
75 (EX_TEMPFAIL of sysexits.h) for a `WorkerLost`, and 1 for another `TrainingError` or an
`ExportError`. Any other exception is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """An argument, a file or a data set breaks a rule; the message states rule and value."""


class ImageError(InputError):
    """One image cannot be read, or is too small for the network; others can be classified."""


class TrainingError(RuntimeError):
    """A run could not be finished; the message says which files it left."""


class Interrupted(TrainingError):
    """A run was stopped by Ctrl-C or SIGTERM; the message says after which epoch."""


class WorkerLost(TrainingError):
    """Another worker ended or cannot be reached; the same command may continue the run."""


class ExportError(RuntimeError):
    """An exported file differs from its network; the message names it, and nothing is written.

    Args:
        message: One line.
        failures: One `verify_artifact.Failure` for each failed check.
    """

    def __init__(self, message, failures=()):
        super().__init__(message)
        self.failures = list(failures)


def check_count(name, value, least=1):
    """Raises an `InputError` unless `value` is a whole number of at least `least`.

    Args:
        name: The argument's name.
        value: Its value.
        least: The smallest allowed number.

    Example:
        >>> check_count("epochs", 5)
        >>> check_count("epochs", 2.5)
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: `epochs` must be a whole number of at least 1, got 2.5
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"`{name}` must be a whole number of at least {least}, got {value!r}")


def check_share(name, value):
    """Raises an `InputError` unless `value` is a number of at least 0 and below 1.

    Args:
        name: The argument's name.
        value: Its value.

    Example:
        >>> check_share("drop_rate", 0.2)
        >>> check_share("drop_rate", 1)
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: `drop_rate` must be at least 0 and below 1, got 1
    """
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(f"`{name}` must be at least 0 and below 1, got {value!r}")


def look_up(table, key, argument):
    """Returns `table[key]`.

    Args:
        table: The table, a dict.
        key: The row's name.
        argument: The argument's name, for the error.

    Raises:
        InputError: There is no such row; the message lists the rows.
    """
    try:
        return table[key]
    except (KeyError, TypeError):
        raise InputError(f"`{argument}` must be one of {', '.join(table)}, got {key!r}") from None


def one_line(error):
    """Returns the first line of an error's message, or its type's name if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
