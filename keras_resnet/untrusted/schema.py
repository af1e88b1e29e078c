"""Checks of parsed JSON: which keys there must be, and which values are allowed.

A schema is one of

- a `Rule`, or a tuple of rules, one of which must accept the value,
- a dict: an object with at least these keys, unless they are `Optional`,
- a list with one schema: an array of such values,
- a `Map`: an object with any keys, whose values follow one schema.
"""

import collections.abc
import math
import typing

from keras_resnet.utils.errors import InputError

_MAX = 2**63


class Rule(typing.NamedTuple):
    """A condition on one value, and the allowed values in words: "must be …"."""

    description: str
    accepts: collections.abc.Callable


class Map(typing.NamedTuple):
    """An object with any keys, whose values follow one schema."""

    values: object


class Optional(typing.NamedTuple):
    """The schema of a key that may be missing from its object."""

    value: object


def _is_text(value):
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX


def _is_number(value):
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and -_MAX < value < _MAX and math.isfinite(value)


def _is_sha256(value):
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_file(value):
    is_name = _is_text(value) and value.isprintable() and len(value) <= 255
    return is_name and value not in ("", ".", "..") and not set(value) & set("/\\:\0")


TEXT = Rule("text that UTF-8 can hold", _is_text)
COUNT = Rule("a whole number from 0 on", _is_count)
NUMBER = Rule("a finite number", _is_number)
SHARE = Rule("a number between 0 and 1", lambda value: _is_number(value) and 0 <= value <= 1)
SHA256 = Rule("64 hexadecimal digits", _is_sha256)
FILE = Rule("the name of a file in the manifest's own folder", _is_file)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
NULL = Rule("null", lambda value: value is None)
OBJECT = Rule("an object", lambda value: isinstance(value, dict))
ARRAY = Rule("an array", lambda value: isinstance(value, list))


def one_of(names):
    """Returns the `Rule` that a value is one of some names.

    Args:
        names: The names, or a dict with them as keys.
    """
    return Rule(f"one of {', '.join(names)}", lambda value: _is_text(value) and value in names)


def check(value, schema, name, where=""):
    """Checks a value of parsed JSON against a schema.

    Args:
        value: The value.
        schema: See the module.
        name: The file's name, for messages.
        where: The place of the value in the file, for messages; empty for the whole.

    Raises:
        InputError: If a value breaks a rule or a key is missing; the message has one line.

    Example:
        >>> check({"sizes": [3, 5]}, {"sizes": [COUNT]}, "a.json")
        >>> check({"sizes": [3, None]}, {"sizes": [COUNT]}, "a.json")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: a.json: damaged: `sizes[1]` must be a whole number \
from 0 on, got None
    """
    rules = {dict: OBJECT, Map: OBJECT, list: ARRAY}.get(type(schema), schema)
    rules = (rules,) if isinstance(rules, Rule) else rules
    if not any(rule.accepts(value) for rule in rules):
        allowed = " or ".join(rule.description for rule in rules)
        raise InputError(
            f"{name}: damaged: `{where or 'the file'}` must be {allowed}, got {value!a:.60}"
        )
    if isinstance(schema, dict):
        for key, inner in schema.items():
            inside = f"{where}.{key}" if where else key
            is_optional = isinstance(inner, Optional)
            if key in value:
                check(value[key], inner.value if is_optional else inner, name, inside)
            elif not is_optional:
                raise InputError(f"{name}: damaged: `{inside}` is missing")
    elif isinstance(schema, list):
        for index, each in enumerate(value):
            check(each, schema[0], name, f"{where}[{index}]")
    elif isinstance(schema, Map):
        for key, each in value.items():
            check(each, schema.values, name, f"{where}[{key!a:.40}]")
