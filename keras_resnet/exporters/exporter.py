"""`keras-resnet export`: a Keras model becomes a folder of verified artifacts."""

import dataclasses
import datetime
import importlib

import keras
import numpy as np

from keras_resnet.evaluation.inference import load_data
from keras_resnet.exporters import folder as folders
from keras_resnet.exporters import reference as references
from keras_resnet.exporters.calibration import calibration_images, draw_evenly
from keras_resnet.exporters.earlier import keep_earlier, read_earlier
from keras_resnet.exporters.formats import BATCH_SIZES, PRECISIONS, REFERENCE, choose_artifacts
from keras_resnet.exporters.graph import Serving
from keras_resnet.exporters.source import open_export_source
from keras_resnet.exporters.verify_artifact import INCONCLUSIVE, measure_latency, verify_artifact
from keras_resnet.formats import EXPORTED
from keras_resnet.runtimes.base import OUTPUT_KIND_KEY
from keras_resnet.untrusted.manifest import MANIFEST, SPLIT_OPTIONS, VERSION, digest, read_manifest
from keras_resnet.utils import environment, files
from keras_resnet.utils.errors import ExportError, InputError

REFERENCE_IMAGES = 256
_REFERENCE_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Job:
    """The input of the writers of all formats.

    Attributes:
        serving: The `Serving`.
        metadata: The metadata of the file: class names, data, background.
        provenance: The origin of the model: a dict of strings.
        calibration: Training images in the exported file's input format, balanced over the classes;
            None if no artifact needs them.
    """

    serving: Serving
    metadata: dict
    provenance: dict
    calibration: np.ndarray | None = None


def export(
    model,
    folder=None,
    *,
    to=None,
    precision=None,
    dataset=None,
    normalize=None,
    preprocessing=True,
    force=False,
    report=None,
    **data_options,
):
    """Exports a model to other formats, and verifies that each file gives the same predictions.

    Every file is loaded by its own runtime and runs on all test images. A difference from the Keras
    model beyond the tolerance of its precision stops the export, and nothing is written.

    Args:
        model: A run folder, a .keras file, or a Keras model with one image input and one output
            of a kind in `runtimes.base.OUTPUT_KINDS`. A model with one number for two classes is
            exported with two columns: 1 − p and p.
        folder: The folder to write. By default "export" in the run folder, or NAME-export beside
            NAME.keras. It keeps an earlier export's files of the same model.
        to: Rows of `formats.EXPORTED`: "saved_model", "tflite", "onnx"; None for all.
        precision: Rows of `exporters.formats.PRECISIONS`: "float32", "float16", "dynamic",
            "int8"; None for all of each format.
        dataset: A `Dataset` or its name; by default the one that the model was trained on. See
            `inference.load_data` for the images that it is evaluated on.
        normalize: For a Keras model that takes floats: the normalisation of its training images, a
            row of `preprocessing.NORMALIZATIONS`. The exported files contain it.
        preprocessing: Whether the files take raw uint8 images and give probabilities; otherwise
            they take the network's floats and give logits.
        force: Whether to publish artifacts that fail, with the failures recorded.
        report: Called with a line about each artifact; None for none.
        **data_options: Options of `load_dataset`.

    Returns:
        The manifest, a dict: see README.

    Raises:
        InputError: If an argument breaks a rule, or a format cannot hold the network.
        ExportError: If an artifact failed its verification.

    Example:
        >>> export("missing.keras")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: missing.keras: no such model file
    """
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            f"an export needs Keras's TensorFlow backend, got {keras.backend.backend()}: set "
            "KERAS_BACKEND=tensorflow"
        )
    report = report or (lambda line: None)
    artifacts = choose_artifacts(to, precision)
    source = open_export_source(model, normalize)
    if folder is None and source.folder is None:
        raise InputError("`folder` must be given to export a Keras model object")
    folder = folders.check_target(folder or source.folder)
    data, split, options = load_data(source.predictor, dataset, **data_options)
    serving = Serving(source.predictor.model, preprocessing, _image_size(data, split))
    files.check_space(folder.parent, 4 * serving.model.count_params() * len(artifacts))
    needs_calibration = any(PRECISIONS[each.precision].is_calibrated for each in artifacts)
    calibration = calibration_images(serving, data, options) if needs_calibration else None
    metadata = _make_metadata(source, data, serving)
    job = Job(serving, metadata, source.provenance, calibration)

    with folders.workspace(folder) as work:
        earlier = read_earlier(folder, serving.contract)
        # The predictions of the Keras model.
        reference = references.compute_reference(source.predictor.model, serving, split)
        manifest = _make_manifest(source, job, data, split, options, reference)
        if manifest["keras"]["note"]:
            report(manifest["keras"]["note"])
        inputs, failures = _Inputs(serving, split), []
        recorded, some = _record_some(inputs, split, reference)
        # Each artifact is written, then verified.
        for artifact in artifacts:
            path = work / artifact.file
            writer = importlib.import_module(f"keras_resnet.exporters.{artifact.format}")
            oldest_runtime = writer.write(job, artifact, path)
            row, probabilities, failed = verify_artifact(
                path, artifact, serving.contract, inputs, reference
            )
            manifest["artifacts"].append({**row, "oldest_runtime": oldest_runtime})
            recorded.predictions[artifact.file] = probabilities[some]
            failures += failed
            report(_describe_row(row))
        _check_passed(manifest["artifacts"], failures, force, folder)
        # The folder is completed and published.
        keep_earlier(folder, work, earlier, manifest, recorded, report)
        references.write_reference(work / REFERENCE, recorded)
        size, sha256 = digest(work / REFERENCE)
        manifest["reference"] = {"file": REFERENCE, "bytes": size, "sha256": sha256}
        files.write_json(work / MANIFEST, manifest)
        folders.publish(work, folder)
    report(f"written to {folder}")
    return read_manifest(folder)


class _Inputs:
    """The test images in the artifacts' input format; converted when they are indexed."""

    def __init__(self, serving, split):
        self._prepare, self._images = serving.prepare, split.images

    def __len__(self):
        return len(self._images)

    def __getitem__(self, positions):
        return self._prepare(self._images[positions])


def _record_some(inputs, split, reference):
    """Returns a `Recorded` without artifacts, and the positions of its images."""
    most = max(max(BATCH_SIZES), _REFERENCE_BYTES // inputs[np.arange(1)].nbytes)
    some = draw_evenly(split.labels, min(REFERENCE_IMAGES, most))
    probabilities = reference.probabilities
    recorded = references.Recorded(
        inputs[some], probabilities[some], probabilities.argmax(axis=1), predictions={}
    )
    return recorded, some


def _image_size(data, split):
    size = split.images.shape[1:3]
    if None in size:
        raise InputError(
            f"{data.name}: the images have several sizes and the model takes any, but an export "
            "needs one: set it with --image-size (`image_size`)"
        )
    return size


def _make_metadata(source, data, serving):
    own = source.predictor.metadata
    names = list(map(str, own.get("class_names") or data.class_names))
    for name in names:
        # `labels.txt` has one line for each.
        if name.splitlines() != [name]:
            raise InputError(f"a class name must be one line of text, got {name!r}")
    return {
        # A published file must not contain checksums of the training images.
        **{key: value for key, value in own.items() if key != "trained_on"},
        "class_names": names,
        "takes_raw_images": serving.contract.dtype == "uint8",
        OUTPUT_KIND_KEY: serving.output_kind,
    }


def _make_manifest(source, job, data, split, options, reference):
    """Returns the manifest without artifacts; measures the latency of the Keras model."""
    described = environment.describe_environment()
    parameters = job.serving.model.count_params()
    tools = [name for row in EXPORTED.values() for name in (row.library[0], *row.converters)]
    takes_floats = not source.predictor.runtime.input.dtype.startswith(("int", "uint"))
    latency = measure_latency(job.serving.runtime, split.images[np.arange(1)])
    return {
        "manifest_version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": {"name": source.predictor.model.name, "parameters": parameters},
        "source": source.record,
        "tool_versions": environment.versions(*tools),
        "machine": {**described["machine"], "git_commit": described["git_commit"]},
        "class_names": job.metadata["class_names"],
        "data": {
            "dataset": data.name,
            "split": data.evaluation_split,
            "images": len(split),
            "fingerprint": data.fingerprint,
            "order": references.digest_order(split),
            "options": {name: options[name] for name in SPLIT_OPTIONS if name in options},
        },
        "keras": {
            "accuracy": reference.accuracy,
            # Keras computes in the threads of this process.
            "latency_ms": {str(environment.cores()): latency},
            "twin": reference.twin,
            "note": references.describe_chance(reference, takes_floats),
        },
        "artifacts": [],
    }


def _describe_row(row):
    verdict = "; ".join(row["failures"]) or "verified"
    return (
        f"{row['file']}: {row['bytes'] / 1e6:.1f} MB, largest difference "
        f"{row['max_difference']:.1e}, agreement {row['agreement']:.4f} on {row['images']:,} "
        f"images: {verdict}"
    )


def _check_passed(rows, failures, force, folder):
    if not failures or force:
        return
    wrong = [each for each in failures if not each.check.startswith(INCONCLUSIVE)]
    names = sorted({failure.file for failure in wrong or failures})
    if wrong:
        reason = f"{len(names)} of {len(rows)} artifacts differ from the Keras model"
    else:
        reason = (
            f"the verification of {len(names)} of {len(rows)} artifacts is {INCONCLUSIVE}, since "
            "the Keras model gives nearly the same output for all images; train it, or set the "
            "--normalize that it needs"
        )
    raise ExportError(
        f"{reason} ({', '.join(names)}): nothing was written to {folder}; --force publishes them "
        "with the failures recorded",
        failures,
    )
