"""Artifacts of an earlier export in the same folder, which stay beside the new ones."""

import contextlib
import json

from keras_resnet.exporters import folder as folders
from keras_resnet.exporters.formats import OWN_FILES, PRECISIONS, choose_artifacts
from keras_resnet.exporters.reference import read_reference
from keras_resnet.untrusted.manifest import MANIFEST, find_change, read_manifest
from keras_resnet.utils.errors import InputError


def read_earlier(folder, contract):
    """Returns the manifest of an earlier export in a folder; one without artifacts if none.

    Args:
        folder: The folder.
        contract: The `Contract` of the new artifacts.

    Raises:
        InputError: If the manifest is damaged, or its artifacts have another input.
    """
    earlier = read_manifest(folder) if (folder / MANIFEST).is_file() else {"artifacts": []}
    for row in earlier["artifacts"]:
        if row["input"]["dtype"] != contract.dtype:
            raise InputError(
                f"{folder}: its files take {row['input']['dtype']}, and these would take "
                f"{contract.dtype}: choose another --out"
            )
    return earlier


def keep_earlier(folder, work, earlier, manifest, recorded, report):
    """Takes over the artifacts of an earlier export of the same model, and foreign files.

    Args:
        folder: The folder of the earlier export; it may be missing.
        work: The workspace.
        earlier: The result of `read_earlier`.
        manifest: The new manifest; rows are added to it.
        recorded: The new `Recorded`; predictions are added to it.
        report: Called with a line about each artifact that is not kept.
    """
    new = {row["file"] for row in manifest["artifacts"]}
    kept = []
    # A row needs its recorded predictions; a damaged `reference.npz` has none.
    with contextlib.suppress(InputError):
        if earlier["artifacts"] and _is_alike(earlier, manifest):
            predictions = read_reference(folder, earlier).predictions
            rows = [row for row in earlier["artifacts"] if row["file"] not in new]
            kept = [row for row in rows if _is_whole(folder, row)]
            recorded.predictions.update({row["file"]: predictions[row["file"]] for row in kept})
    kept_names = [row["file"] for row in kept]
    known = {*OWN_FILES, *new, *(row["file"] for row in earlier["artifacts"])}
    for name in sorted(known - new - {*OWN_FILES, *kept_names}):
        report(f"{name}: left out: of another model or other data, or changed since")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    folders.carry_over(folder, work, [*kept_names, *sorted(there - known)])
    every = choose_artifacts(precisions=[*PRECISIONS])
    places = {artifact.file: place for place, artifact in enumerate(every)}
    manifest["artifacts"] = sorted(
        [*manifest["artifacts"], *kept], key=lambda row: places.get(row["file"], 0)
    )


def _is_alike(earlier, manifest):
    """Returns whether two exports are of one model, verified on the same images."""
    # As JSON, which has lists in place of tuples. Exports without the entry resize images.
    described = json.loads(json.dumps(manifest["preprocessing"]))
    by_file = described is None or described["resizing"]["done_by"] == "file"
    before = earlier.get("preprocessing", described if by_file else None)
    return (
        before == described
        and all(earlier[name] == manifest[name] for name in ("data", "class_names"))
        and all(
            earlier["source"].get(name) == manifest["source"][name]
            for name in ("sha256", "normalize")
        )
    )


def _is_whole(folder, row):
    """Returns whether a file is still the one that its manifest lists."""
    try:
        return find_change(folder / row["file"], row) is None
    except InputError:  # it is missing
        return False
