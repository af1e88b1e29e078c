"""`keras-resnet verify`: an export folder checked again, on any machine."""

import contextlib
from pathlib import Path

import numpy as np

from keras_resnet.datasets import Dataset, load_dataset
from keras_resnet.evaluation.inference import resize_to_model
from keras_resnet.exporters.formats import PRECISIONS
from keras_resnet.exporters.graph import Contract
from keras_resnet.exporters.reference import digest_order, read_reference
from keras_resnet.exporters.verify_artifact import (
    Failure,
    check_tolerance,
    compare,
    open_artifact,
    predict,
    run_checks,
)
from keras_resnet.formats import EXPORTED
from keras_resnet.runtimes import Prober
from keras_resnet.runtimes.resized import find_resizing, resized
from keras_resnet.untrusted import schema
from keras_resnet.untrusted.manifest import MANIFEST, find_change, read_manifest
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.progress import bar

# The verdict on a file.
SOUND = "sound"
CHANGED = "changed"
DIFFERS = "predictions differ"
FORCED = "failed at its export"
NOT_RUN = "checksum fits, not run"


def _sizes(rank, known):
    return schema.Rule(
        f"{rank} sizes; only the first {rank - known} may be null",
        lambda shape: len(shape) == rank and None not in shape[-known:],
    )


# Rules for a row of the manifest beyond those of the manifest itself: this version can run it.
_ARTIFACT = {
    "format": schema.one_of(EXPORTED),
    "precision": schema.one_of(PRECISIONS),
    "batch": schema.Rule("null or 1", lambda batch: batch in (None, 1)),
    "input": {"shape": _sizes(4, known=1)},
    "output": {"shape": _sizes(2, known=1)},
}


def verify(folder, *, trust=False, dataset=None, **data_options):
    """Checks an export folder: checksums first, then every artifact by its own runtime.

    The folder is enough. It holds real images, and the predictions of the Keras model and of each
    artifact for them at the export; an artifact must give the same predictions again.

    Args:
        folder: The folder that `export` wrote.
        trust: Whether to run a SavedModel, which is code; otherwise only its checksum is compared.
        dataset: A `Dataset`, or the name of one, to evaluate all its images again; None for the
            images in the folder alone.
        **data_options: Options of `load_dataset`.

    Returns:
        A dict: "passed", and "files", a dict for each: "file"; "verdict", one of `SOUND`,
        `CHANGED`, `DIFFERS`, `FORCED` and `NOT_RUN`; "failures", a list of strings. For an artifact
        that ran: "max_difference" and "agreement" with its predictions at the export, "images", the
        number of those predictions, and "accuracy" and "accuracy_images", None without a data set.

    Raises:
        InputError: If there is no manifest, or it or the reference breaks a rule, or the data set
            is not the one of the export.

    Example:
        >>> verify("missing")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: missing/manifest.json: there is no such manifest
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    rows = manifest["artifacts"]
    for row in rows:
        schema.check(row, _ARTIFACT, f"{folder / MANIFEST}: {row['file']}")
    split = None if dataset is None else _load_split(manifest, dataset, data_options)
    # All checksums are compared before anything is parsed.
    files = [_compare_checksum(folder, row) for row in [manifest["reference"], *rows]]
    if files[0]["failures"]:
        return {"files": files, "passed": False}
    recorded = read_reference(folder, manifest)
    files[0]["verdict"] = SOUND
    with Prober() as prober, bar(len(rows), "verification", " files") as shown:
        for found, row in zip(files[1:], rows, strict=True):
            if not found["failures"] and (trust or not EXPORTED[row["format"]].runs_code):
                names = manifest["class_names"]
                found |= _verify(folder / row["file"], row, names, recorded, split, prober)
            if row["failures"] and not found["failures"]:
                found |= {"verdict": FORCED, "failures": row["failures"]}
            shown.update()
    return {"files": files, "passed": not any(found["failures"] for found in files)}


def _compare_checksum(folder, row):
    try:
        change = find_change(folder / row["file"], row)
    except InputError as error:
        change = str(error)
    verdict, failures = (CHANGED, [change]) if change else (NOT_RUN, [])
    return {"file": row["file"], "verdict": verdict, "failures": failures}


def _load_split(manifest, dataset, options):
    """Returns the images of the export's data set."""
    if not manifest["artifacts"]:
        raise InputError("--dataset needs artifacts, the manifest lists none")
    if manifest["keras"]["accuracy"] is None:
        raise InputError("--dataset needs an export that was verified on images with labels")
    image = manifest["artifacts"][0]["input"]
    if image["dtype"] != "uint8":
        raise InputError("--dataset needs artifacts that take images, these take floats")
    expected, shape = manifest["data"], tuple(image["shape"][1:])
    if find_resizing(manifest) is not None:
        shape = (None, None, shape[-1])  # as photographs, which `resized` prepares
    if not isinstance(dataset, Dataset):
        # Another name may stand for the same data set; it is split in the same way.
        known = {"image_size": shape[:2], **expected.get("options", {})}
        dataset = load_dataset(dataset, **{**known, **options})
    split = dataset.splits[dataset.evaluation_split]
    for key, own in (("fingerprint", dataset.fingerprint), ("images", len(split))):
        if own != expected[key]:
            raise InputError(
                f"{dataset.name}: not the data of the export: {key} must be {expected[key]}, got "
                f"{own}"
            )
    split = resize_to_model(split, shape)
    if expected.get("order") not in (None, digest_order(split)):
        raise InputError(
            f"{dataset.name}: the images or their order differ from those of the export: the data "
            "set was split differently"
        )
    return split


def _verify(path, row, class_names, recorded, split, prober):
    """Returns the figures, failures and verdict of an artifact that runs."""
    precision = row["precision"]
    figures = {"accuracy": None, "accuracy_images": None}
    try:
        with contextlib.closing(open_artifact(path, row["format"], prober=prober)) as runtime:
            probabilities, failures = run_checks(
                runtime, _contract(row), row["batch"], recorded.images
            )
            own_names = runtime.metadata.get("class_names")
            if own_names != class_names:
                failures.append(Failure("class names", own_names, class_names))
            if split is not None:
                top1 = predict(resized(runtime), split.images).argmax(axis=1)
    except InputError as error:
        return {"verdict": DIFFERS, "failures": [str(error)]}
    then = compare(probabilities, recorded.predictions[row["file"]])
    failures += check_tolerance(precision, then)
    if PRECISIONS[precision].tolerance.max_difference is not None:
        # For 8 bits a few hundred images are too few; the manifest has the agreement on all.
        now = compare(probabilities, recorded.probabilities)
        failures += check_tolerance(precision, now)
    if split is not None:
        accuracy, of_keras = (float(np.mean(x == split.labels)) for x in (top1, recorded.top1))
        figures = {"accuracy": accuracy, "accuracy_images": len(split)}
        agreement = float(np.mean(top1 == recorded.top1))
        change = {"agreement": agreement, "accuracy_change": accuracy - of_keras}
        failures += check_tolerance(precision, change)
    return {
        **{name: then[name] for name in ("max_difference", "agreement")},
        "images": len(probabilities),
        **figures,
        "verdict": DIFFERS if failures else SOUND,
        "failures": list(dict.fromkeys(map(str, failures))),
    }


def _contract(row):
    _, *image_shape = row["input"]["shape"]
    output = row["output"]
    return Contract(
        tuple(image_shape),
        row["input"]["dtype"],
        output["name"],
        output["shape"][-1],
        PRECISIONS[row["precision"]].output,
    )
