"""The errors that a user can cause, apart from those that a bug causes.

The command line turns an `InputError` into one line and exit status 2, a `WorkerLost` into one and
75 (EX_TEMPFAIL of sysexits.h), another `TrainingError` or an `ExportError` into one and 1. Anything
else is a bug and keeps its traceback.
"""


class InputError(ValueError):
    """An argument, a file or a data set breaks a rule; the message states rule and value."""


class ImageError(InputError):
    """One image cannot be read, or is too small for the network; the others can be named."""


class TrainingError(RuntimeError):
    """A run that began could not be finished; the message says what is left on disk."""


class Interrupted(TrainingError):
    """A run was asked to stop, by Ctrl-C or SIGTERM; the message says where it stopped."""


class WorkerLost(TrainingError):
    """Another worker of a run has ended or cannot be reached; the same command may go on."""


class ExportError(RuntimeError):
    """An artifact is not the network it was made of; the message says which, and nothing is left.

    Args:
        message: One line.
        failures: What failed and by how much, one `verify_artifact.Failure` each.
    """

    def __init__(self, message, failures=()):
        super().__init__(message)
        self.failures = list(failures)


def check_count(name, value, least=1):
    """Raises an `InputError` unless `value` is a whole number of at least `least`.

    Args:
        name: What the caller calls the value.
        value: Anything.
        least: The smallest number allowed.

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
        name: What the caller calls the value.
        value: Anything.

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
        argument: What the caller calls the key, for the error.

    Raises:
        InputError: If there is no such row; it lists those there are.
    """
    try:
        return table[key]
    except (KeyError, TypeError):
        raise InputError(f"`{argument}` must be one of {', '.join(table)}, got {key!r}") from None


def one_line(error):
    """Returns the first line of an error's message, or its type's name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
