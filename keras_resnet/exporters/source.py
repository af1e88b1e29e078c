"""The Keras model that is exported, and its provenance."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import keras
import numpy as np

from keras_resnet.archive import TRAINED, find_model
from keras_resnet.evaluation.inference import Predictor, open_model
from keras_resnet.formats import EXPORTED, find_format
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.runtimes.normalized import normalized
from keras_resnet.training.run_folder import CONFIG
from keras_resnet.untrusted.manifest import digest
from keras_resnet.utils import environment
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.files import expand_user
from keras_resnet.weights.hub import find_repository


@dataclasses.dataclass(frozen=True)
class ExportSource:
    """A Keras model and its provenance.

    Attributes:
        predictor: The `Predictor` of the model.
        record: The entry "source" of the manifest.
        folder: The default export folder; None for a Keras model without a file.
    """

    predictor: Predictor
    record: dict
    folder: Path | None = None

    @property
    def provenance(self):
        """The record as strings, for the metadata of a file."""
        known = {**self.record.get("run", {}), "source_sha256": self.record["sha256"]}
        known["keras_resnet_version"] = environment.versions()["keras-resnet-edge"]
        return {name: str(value) for name, value in known.items() if value is not None}


def open_export_source(model, normalize=None):
    """Opens the model that is to be exported.

    Args:
        model: A run folder, a .keras file, a published network's name or folder, a row of
            `archive.TRAINED`, or a Keras model.
        normalize: See `export`.

    Returns:
        An `ExportSource`.

    Raises:
        InputError: If it is something else, or cannot be loaded; or if Keras has another backend
            than TensorFlow.
    """
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            f"an export needs Keras's TensorFlow backend, got {keras.backend.backend()}: set "
            "KERAS_BACKEND=tensorflow"
        )
    if isinstance(model, keras.Model):
        weights = hashlib.sha256()
        for weight in model.get_weights():
            weights.update(np.ascontiguousarray(weight))
        record = {"path": "", "sha256": weights.hexdigest(), "of": "the weights"}
        predictor = Predictor(normalized(KerasRuntime(model), normalize))
        record = {**record, "normalize": normalize, **_origin(predictor)}
        return ExportSource(predictor, record)
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(
            "a model is a run folder, a .keras file, a published name or a Keras model, got "
            f"{model!r:.60}"
        )
    if repository := find_repository(model):
        predictor = Predictor(open_model(repository, normalize))
        sha256 = predictor.metadata["origin"]["sha256"]
        record = {"path": repository.name, "sha256": sha256, "normalize": normalize}
        record |= _origin(predictor)
        return ExportSource(predictor, record, repository.folder("-export"))
    given, path = expand_user(model), find_model(model)
    if path.is_dir() or find_format(path) in EXPORTED:
        raise InputError(f"{path}: an export is made of a run folder or a .keras file")
    predictor = Predictor(open_model(path, normalize))
    size, sha256 = digest(path)
    record = {"path": str(path.resolve()), "sha256": sha256, "bytes": size, "normalize": normalize}
    record |= _origin(predictor)
    if path in TRAINED.values():
        return ExportSource(predictor, record, Path(f"{path.stem}-export"))
    if not given.is_dir():
        return ExportSource(predictor, record, path.with_name(f"{path.stem}-export"))
    return ExportSource(predictor, {**record, "run": _describe_run(given)}, given / "export")


def _origin(predictor):
    """Returns the source and licence of published weights in a model, as an entry of a record."""
    origin = predictor.metadata.get("origin")
    return {"origin": origin} if origin else {}


def _describe_run(run_dir):
    """Returns model, seed, commit, command and recipe of a run, as far as its config has them."""
    try:
        config = json.loads((run_dir / CONFIG).read_text(encoding="utf-8"))
        recipe = config.get("recipe", {}).get("name")
        known = {name: config.get(name) for name in ("model", "seed", "git_commit", "command")}
    except (OSError, ValueError, AttributeError):  # the export does not need it
        return {}
    return {**known, "recipe": recipe}
