"""The networks that are known to be published, as data: `published.csv`."""

import csv
import difflib
import importlib.resources

from keras_resnet.models import SPECS
from keras_resnet.utils.errors import look_up

PUBLISHED = "published.csv"
_NUMBERS = {
    "top1": float,
    "pixels": int,
    "test_top1": float,
    "test_pixels": int,
    "megabytes": float,
}


def published_networks(model=None):
    """Returns the published networks that are known for each row of `SPECS`.

    Args:
        model: A row of `SPECS`, for that one alone.

    Returns:
        A list of dicts, at least one for each row of `SPECS`: "model" (the row), "variant", "name"
        (the argument of `from_pretrained`), "top1" (percent of ImageNet-1k's validation images, as
        the publisher states it) at "pixels", the size that `from_pretrained` uses; "test_top1" at
        "test_pixels", the size of `test_size=True`; "megabytes" (10⁶ bytes) and "license". An
        unknown value is None.

    Raises:
        InputError: If there is no such row.

    Source:
        The first lines of `published.csv`.

    Example:
        >>> row = published_networks("resnet18")[0]
        >>> row["name"], row["top1"], row["pixels"], row["license"]
        ('timm/resnet18.a1_in1k', 71.504, 224, 'apache-2.0')
    """
    chosen = SPECS if model is None else {model: look_up(SPECS, model, "model")}
    file = importlib.resources.files("keras_resnet.weights") / PUBLISHED
    lines = file.read_text(encoding="utf-8").splitlines()
    table = csv.DictReader(line for line in lines if not line.startswith("#"))
    unknown = dict.fromkeys(table.fieldnames)
    found = {name: [] for name in chosen}
    for row in table:
        known = {key: _NUMBERS.get(key, str)(value) for key, value in row.items() if value}
        if row["model"] in found:
            found[row["model"]].append({**unknown, **known})
    return [row for name, rows in found.items() for row in rows or [{**unknown, "model": name}]]


def did_you_mean(text):
    """Returns "; did you mean NAME?" for a text that resembles a published name, otherwise "".

    Args:
        text: The name as the user wrote it, with or without an owner.

    Example:
        >>> did_you_mean("resnet18.a1in1k")
        '; did you mean timm/resnet18.a1_in1k?'
        >>> did_you_mean("runs/dmeo")
        ''
    """
    names = [row["name"] for row in published_networks() if row["name"]]
    compared = {(name if "/" in text else name.partition("/")[2]): name for name in names}
    if text in names:
        return ""
    close = difflib.get_close_matches(text, compared, n=1, cutoff=0.85)
    return f"; did you mean {compared[close[0]]}?" if close else ""
