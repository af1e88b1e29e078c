"""An export folder checked again: on another machine, after a copy, years later."""

import contextlib
import functools
from pathlib import Path

import numpy as np

from keras_resnet.datasets import Dataset, load_dataset
from keras_resnet.evaluation.inference import resize_to_model
from keras_resnet.exporters import verification
from keras_resnet.exporters.formats import FORMATS, PRECISIONS
from keras_resnet.exporters.graph import Contract
from keras_resnet.exporters.reference import read_reference
from keras_resnet.runtimes import Prober
from keras_resnet.untrusted.manifest import MANIFEST, digest, read_manifest
from keras_resnet.utils.errors import InputError, look_up
from keras_resnet.utils.progress import bar

# What `verify` says of a file.
SOUND = "sound"
CHANGED = "changed"
DIFFERS = "answers differ"
FORCED = "failed at its export"
NOT_RUN = "checksum fits, not run"


def verify(folder, *, trust=False, dataset=None, **data_options):
    """Checks an export folder: checksums first, then every artifact by its own runtime.

    The folder is enough. It holds real images, and what the Keras model and each artifact
    answered to them when they were exported; an artifact must answer so again.

    Args:
        folder: What `export` wrote.
        trust: Whether to run a SavedModel, which is code; otherwise only its checksum is compared.
        dataset: A `Dataset`, or the name of one, whose images are all measured again; None for
            the folder's own images alone.
        **data_options: What `load_dataset` takes.

    Returns:
        A dict: "passed", and "files", a dict for each: "file"; "verdict", one of `SOUND`,
        `CHANGED`, `DIFFERS`, `FORCED` and `NOT_RUN`; "failures", a list of strings; and of an
        artifact that ran "max_difference" and "agreement" with what it answered at its export,
        "images", the number of those answers, and "accuracy" and "accuracy_images", None without
        a data set.

    Raises:
        InputError: If there is no manifest, or it or the reference breaks a rule, or the data set
            is another than that of the export.

    Example:
        >>> verify("missing")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: missing/manifest.json: there is no such manifest
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    rows = [_check_row(folder, row) for row in manifest["artifacts"]]
    split = _load_split(manifest, dataset, data_options)
    # All checksums, before anything is parsed.
    files = [_compare_checksum(folder, row) for row in [manifest["reference"], *rows]]
    if files[0]["failures"]:
        return {"files": files, "passed": False}
    reference = read_reference(folder, manifest)
    files[0]["verdict"] = SOUND
    with Prober() as prober, bar(len(rows), "verification", " files") as shown:
        for found, row in zip(files[1:], rows, strict=True):
            if not found["failures"] and (trust or row["format"] != "saved_model"):
                names = manifest["class_names"]
                found |= _ask(folder / row["file"], row, names, reference, split, prober)
            if row["failures"] and not found["failures"]:
                found |= {"verdict": FORCED, "failures": row["failures"]}
            shown.update()
    return {"files": files, "passed": not any(found["failures"] for found in files)}


def _check_row(folder, row):
    """Returns a row of the manifest whose format, precision and batch are known here."""
    where = f"{folder / MANIFEST}: {row['file']}"
    for table, key in ((FORMATS, "format"), (PRECISIONS, "precision")):
        with _prefixed(where):
            look_up(table, row[key], key)
    if row["batch"] not in (None, 1):
        raise InputError(f"{where}: `batch` must be null or 1, got {row['batch']}")
    for side, rank in (("input", 4), ("output", 2)):
        shape = row[side]["shape"]
        if len(shape) != rank or None in shape[1:]:
            raise InputError(
                f"{where}: `{side}` must have {rank} sizes, open in the first alone, got {shape}"
            )
    return row


@contextlib.contextmanager
def _prefixed(where):
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _compare_checksum(folder, row):
    found = {"file": row["file"], "verdict": NOT_RUN, "failures": []}
    try:
        size, sha256 = digest(folder / row["file"])
    except InputError as error:
        return {**found, "verdict": CHANGED, "failures": [str(error)]}
    if (size, sha256) != (row["bytes"], row["sha256"]):
        changed = f"{size} bytes, sha256 {sha256[:12]}…; must be {row['bytes']}, "
        return {**found, "verdict": CHANGED, "failures": [changed + f"{row['sha256'][:12]}…"]}
    return found


# ----------------------------------------------------------------------------------------------
# What the answers are compared with
# ----------------------------------------------------------------------------------------------


def _load_split(manifest, dataset, options):
    """Returns the images of the manifest's data set, None if none are asked for."""
    if dataset is None:
        return None
    if not manifest["artifacts"]:
        raise InputError("--dataset needs artifacts, the manifest lists none")
    (*_, height, width, channels) = manifest["artifacts"][0]["input"]["shape"]
    if manifest["artifacts"][0]["input"]["dtype"] != "uint8":
        raise InputError("--dataset needs artifacts that take images, these take floats")
    if not isinstance(dataset, Dataset):
        # Whatever its name is here, it must be the set of the export, split as it was there.
        known = _split_options(manifest["data"])
        dataset = load_dataset(dataset, **{"image_size": (height, width), **known, **options})
    for what, own in (
        ("fingerprint", dataset.fingerprint),
        ("images", len(dataset.splits[dataset.evaluation_split])),
    ):
        if own != manifest["data"][what]:
            raise InputError(
                f"{dataset.name}: not the data of the export: {what} {own}, there "
                f"{manifest['data'][what]}"
            )
    split = resize_to_model(dataset.splits[dataset.evaluation_split], (height, width, channels))
    if manifest["data"].get("order") not in (None, verification.digest_order(split)):
        raise InputError(
            f"{dataset.name}: not the images of the export, or in another order: they were split "
            "otherwise"
        )
    return split


def _split_options(data):
    """Returns how the images were split at the export, as far as the manifest says it."""
    options = data.get("options")
    options = options if isinstance(options, dict) else {}
    # A set that was measured whole has the share None.
    kinds = {"validation_split": (float, type(None)), "seed": (int,), "skip_bad": (bool,)}
    return {
        name: options[name]
        for name, allowed in kinds.items()
        if name in options and type(options[name]) in allowed
    }


# ----------------------------------------------------------------------------------------------
# Asking
# ----------------------------------------------------------------------------------------------


def _ask(path, row, class_names, recorded, split, prober):
    """Returns the figures, failures and verdict of an artifact that runs."""
    file = row["file"]
    try:
        with contextlib.closing(
            verification.open_artifact(path, row["format"], None, prober)
        ) as runtime:
            failures = verification.check_contract(file, runtime, _contract(row), row["batch"])
            own = runtime.metadata.get("class_names")
            if own != class_names:
                failures.append(verification.Failure(file, "class names", own, class_names))
            inputs = functools.partial(_part, recorded.images)
            answers = verification.ask(runtime, inputs)
            failures += verification.check_batches(file, runtime, inputs, answers)
            everything = None if split is None else _measure(runtime, split, recorded)
    except InputError as error:
        return {"verdict": DIFFERS, "failures": [str(error)]}
    then = _compare(answers, recorded.answers[file])
    failures += verification.check_gate(file, row["precision"], then)
    if PRECISIONS[row["precision"]].gate.max_difference is not None:
        # Of 8 bits a few hundred images say too little: how they agreed on all is on record.
        failures += verification.check_gate(
            file, row["precision"], _compare(answers, recorded.probabilities)
        )
    if everything:
        failures += verification.check_gate(
            file, row["precision"], {**everything, "max_difference": then["max_difference"]}
        )
    return {
        **{name: then[name] for name in ("max_difference", "agreement")},
        "images": len(answers),
        "accuracy": everything["accuracy"] if everything else None,
        "accuracy_images": len(split) if everything else None,
        "verdict": DIFFERS if failures else SOUND,
        "failures": list(dict.fromkeys(map(str, failures))),
    }


def _part(images, start, stop):
    return images[np.arange(start, min(stop, len(images)))] if start < len(images) else ()


def _compare(answers, others):
    labels = others.argmax(axis=1)
    return {
        **verification.compare(answers, verification.Reference(None, labels, others)),
        "accuracy_change": 0,
    }


def _measure(runtime, split, recorded):
    """Returns agreement with the Keras model and accuracy over a whole split."""
    top1 = verification.ask(runtime, functools.partial(_part, split.images)).argmax(axis=1)
    accuracy, own = (float(np.mean(each == split.labels)) for each in (top1, recorded.top1))
    return {
        "agreement": float(np.mean(top1 == recorded.top1)),
        "accuracy": accuracy,
        "accuracy_change": accuracy - own,
    }


def _contract(row):
    _, *image_shape = row["input"]["shape"]
    output = row["output"]
    return Contract(tuple(image_shape), row["input"]["dtype"], output["name"], output["shape"][-1])
