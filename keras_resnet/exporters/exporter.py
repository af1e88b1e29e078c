"""`keras-resnet export`: a Keras model becomes a folder of verified artifacts."""

import dataclasses
import datetime
import importlib

import numpy as np

from keras_resnet.datasets import Dataset, Split
from keras_resnet.datasets.images import check_image_size
from keras_resnet.datasets.photos import load_photos
from keras_resnet.evaluation.inference import load_data
from keras_resnet.exporters import folder as folders
from keras_resnet.exporters import reference as references
from keras_resnet.exporters.calibration import calibration_images, draw_evenly
from keras_resnet.exporters.earlier import keep_earlier, read_earlier
from keras_resnet.exporters.formats import (
    BATCH_SIZES,
    LABELS,
    PRECISIONS,
    REFERENCE,
    choose_artifacts,
)
from keras_resnet.exporters.graph import Serving, find_preprocessing
from keras_resnet.exporters.source import open_export_source
from keras_resnet.exporters.verify_artifact import INCONCLUSIVE, measure_latency, verify_artifact
from keras_resnet.formats import EXPORTED
from keras_resnet.runtimes.base import OUTPUT_KIND_KEY
from keras_resnet.untrusted.manifest import MANIFEST, SPLIT_OPTIONS, VERSION, digest, read_manifest
from keras_resnet.utils import environment, files
from keras_resnet.utils.errors import ExportError, InputError

REFERENCE_IMAGES = 256
_REFERENCE_BYTES = 16 * 2**20
# Images of several sizes are recorded as crops of one size.
_MOST_CROPPED, _MOST_PIXELS = 20, 512


@dataclasses.dataclass(frozen=True)
class Job:
    """The input of the writers of all formats.

    Attributes:
        serving: The `Serving`.
        metadata: The metadata of the file: class names, data, background.
        provenance: The origin of the model: a dict of strings.
        calibration: Training images in the exported file's input format, balanced over the classes:
            an array, or a list of images of several sizes; None if no artifact needs them.
    """

    serving: Serving
    metadata: dict
    provenance: dict
    calibration: np.ndarray | list | None = None


def export(
    model,
    folder=None,
    *,
    to=None,
    precision=None,
    dataset=None,
    photos=None,
    normalize=None,
    preprocessing=True,
    input_size=None,
    force=False,
    report=None,
    **data_options,
):
    """Exports a model to other formats, and verifies that each file gives the same predictions.

    Every file is loaded by its own runtime and runs on all test images. A difference from the Keras
    model beyond the tolerance of its precision stops the export, and nothing is written.

    Args:
        model: A run folder, a .keras file, a published network's name or folder, or a Keras model
            with one image input and one output of a kind in `runtimes.base.OUTPUT_KINDS`. A model
            with one number for two classes is exported with two columns: 1 − p and p.
        folder: The folder to write. By default "export" in the run folder, NAME-export beside
            NAME.keras, or NAME-export here for a published network. It keeps an earlier export's
            files of the same model.
        to: Rows of `formats.EXPORTED`: "saved_model", "tflite", "onnx"; None for all.
        precision: Rows of `exporters.formats.PRECISIONS`: "float32", "float16", "dynamic",
            "int8", "integer"; None for all of each format that need no request.
        dataset: A `Dataset` or its name; by default the one that the model was trained on. See
            `inference.load_data` for the images that it is evaluated on.
        photos: Photographs without labels instead of a data set: files and folders; see
            `load_photos`. The verification then has no accuracy.
        normalize: For a Keras model that takes floats: the normalisation of its training images, a
            row of `preprocessing.NORMALIZATIONS`. The exported files contain it.
        preprocessing: Whether the files take raw uint8 images and give probabilities; otherwise
            they take the network's floats and give logits.
        input_size: (height, width) of images that the caller has resized and cropped already, for
            hardware that needs one size; it must be that of the network's input. By default the
            files of a model that takes images of any size take them, too.
        force: Whether to publish artifacts that fail, with the failures recorded.
        report: Called with a line about each artifact; None for none.
        **data_options: Options of `load_dataset`.

    Returns:
        The manifest, a dict: see docs/export.md.

    Raises:
        InputError: If an argument breaks a rule, or a format cannot hold the network.
        ExportError: If an artifact failed its verification.

    Example:
        >>> export("missing.keras")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: missing.keras: no such model file
    """
    report = report or (lambda line: None)
    artifacts = choose_artifacts(to, precision)
    source = open_export_source(model, normalize)
    if folder is None and source.folder is None:
        raise InputError("`folder` must be given to export a Keras model object")
    folder = folders.check_target(folder or source.folder)
    images = load_evaluation_images(source, dataset, photos, data_options)
    manifest = write_export(
        source,
        images,
        folder,
        artifacts,
        report,
        preprocessing=preprocessing,
        image_size=data_options.get("image_size"),
        input_size=input_size,
        force=force,
    )
    report(f"written to {folder}")
    return manifest


@dataclasses.dataclass(frozen=True)
class EvaluationImages:
    """The images that an export is verified on.

    Attributes:
        data: Their `Dataset`.
        split: The `Split` of it that is evaluated, decoded for the model.
        options: The arguments of `load_dataset` that load the same set again.
    """

    data: Dataset
    split: Split
    options: dict


def load_evaluation_images(source, dataset=None, photos=None, data_options=None):
    """Loads the images that an export is verified on.

    Args:
        source: The `ExportSource`.
        dataset: See `export`.
        photos: See `export`.
        data_options: Options of `load_dataset`, a dict.

    Returns:
        The `EvaluationImages`.

    Raises:
        InputError: If the model records no data set and none is given, or it does not fit.
    """
    predictor, data_options = source.predictor, data_options or {}
    if photos is not None:
        return EvaluationImages(*_load_photos(predictor, photos, dataset, data_options))
    if dataset is None and "data" not in predictor.metadata:
        raise InputError(
            f"{predictor.name}: does not record a data set to verify the files on: give "
            "photographs without labels, --photos FOLDER, or --dataset folder:…"
        )
    return EvaluationImages(*load_data(predictor, dataset, **data_options))


def write_export(
    source,
    images,
    folder,
    artifacts,
    report,
    *,
    preprocessing=True,
    image_size=None,
    input_size=None,
    force=False,
):
    """Writes artifacts, verifies each, and publishes them in a folder.

    Args:
        source: The `ExportSource`.
        images: The `EvaluationImages`.
        folder: The result of `folder.check_target`.
        artifacts: A list of `Artifact`s.
        report: Called with a line about each artifact.
        preprocessing: See `export`.
        image_size: (height, width) of all images; None if the model or the images determine it.
        input_size: See `export`.
        force: See `export`.

    Returns:
        The manifest, a dict.

    Raises:
        InputError: If a format cannot hold the network.
        ExportError: If an artifact failed its verification.
    """
    data, split, options = images.data, images.split, images.options
    size = _fixed_size(source.predictor.model, split, image_size)
    serving = Serving(source.predictor.model, preprocessing, size, input_size)
    if None in serving.contract.image_shape:
        if any(PRECISIONS[artifact.precision].on_request for artifact in artifacts):
            raise InputError(
                "--precision integer needs files that take images of one size, such as "
                "--input-size 224 224"
            )
        # A file of a fixed batch is for runtimes that need static shapes.
        artifacts = [artifact for artifact in artifacts if artifact.batch is None]
    files.check_space(folder.parent, 4 * serving.model.count_params() * len(artifacts))
    needs_calibration = any(PRECISIONS[each.precision].is_calibrated for each in artifacts)
    calibration = calibration_images(serving, data, options) if needs_calibration else None
    metadata = _make_metadata(source, data, serving)
    job = Job(serving, metadata, source.provenance, calibration)

    with folders.workspace(folder) as work:
        earlier = read_earlier(folder, serving.contract)
        # The predictions of the Keras model.
        keras_model = source.predictor.model
        reference = references.compute_reference(keras_model, serving, split, data.is_labelled)
        manifest = _make_manifest(source, job, data, split, options, reference)
        if manifest["keras"]["note"]:
            report(manifest["keras"]["note"])
        inputs, failures = _Inputs(serving, split), []
        recorded = _record_some(serving, split, reference)
        # Each artifact is written, then verified.
        for artifact in artifacts:
            path = work / artifact.file
            writer = importlib.import_module(f"keras_resnet.exporters.{artifact.format}")
            oldest_runtime = writer.write(job, artifact, path)
            row, failed = verify_artifact(
                path, artifact, serving.contract, inputs, reference, recorded
            )
            manifest["artifacts"].append({**row, "oldest_runtime": oldest_runtime})
            failures += failed
            report(_describe_row(row))
        _check_passed(manifest["artifacts"], failures, force)
        # The folder is completed and published.
        keep_earlier(folder, work, earlier, manifest, recorded, report)
        references.write_reference(work / REFERENCE, recorded)
        size, sha256 = digest(work / REFERENCE)
        manifest["reference"] = {"file": REFERENCE, "bytes": size, "sha256": sha256}
        names = "".join(f"{name}\n" for name in metadata["class_names"])
        files.write_text(work / LABELS, names)
        files.write_json(work / MANIFEST, manifest)
        folders.publish(work, folder)
    return read_manifest(folder)


def _load_photos(predictor, photos, dataset, data_options):
    """Returns the same as `load_data`, for photographs."""
    if dataset is not None:
        raise InputError("give `dataset` or `photos`, --dataset or --photos, not both")
    *size, channels = predictor.image_shape
    size = data_options.get("image_size") or size
    names = predictor.class_names
    data = load_photos(photos, names, image_size=size, channels=channels)
    return data, data.splits["validation"], {"validation_split": None}


def _fixed_size(model, split, image_size):
    """Returns the (height, width) of all images; None if the file takes images of any size."""
    if image_size is not None:
        return check_image_size(image_size)
    size = split.images.shape[1:3]
    return None if None in size or find_preprocessing(model) else size


class _Inputs:
    """The test images in the artifacts' input format; converted when they are indexed."""

    def __init__(self, serving, split):
        self._prepare, self._images = serving.prepare, split.images
        self.shape = split.images.shape

    def __len__(self):
        return len(self._images)

    def __getitem__(self, positions):
        return self._prepare(self._images[positions])


def _record_some(serving, split, reference):
    """Returns a `Recorded` of some images, without artifacts."""
    least = max(BATCH_SIZES)
    fitting = _REFERENCE_BYTES // serving.prepare(split.images[np.arange(1)]).nbytes
    some = draw_evenly(split.labels, max(least, min(REFERENCE_IMAGES, fitting)))
    if None in split.images.shape[1:]:
        images = _crop_alike([split.images[i] for i in some[:_MOST_CROPPED]])
    else:
        images = split.images[some]
    return references.Recorded(
        serving.prepare(images),
        references.predict(serving, images),
        reference.probabilities.argmax(axis=1),
        predictions={},
    )


def _crop_alike(images):
    """Returns the middles of images as one array: all as high and as wide as the smallest is."""
    height, width = (min(*(image.shape[axis] for image in images), _MOST_PIXELS) for axis in (0, 1))
    tops, lefts = (
        [(image.shape[axis] - size) // 2 for image in images]
        for axis, size in ((0, height), (1, width))
    )
    return np.stack(
        [
            image[top : top + height, left : left + width]
            for image, top, left in zip(images, tops, lefts, strict=True)
        ]
    )


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
        "preprocessing": serving.preprocessing,
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
        "preprocessing": job.serving.preprocessing,
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


def _check_passed(rows, failures, force):
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
        f"{reason} ({', '.join(names)}): nothing was written; --force publishes them with the "
        "failures recorded",
        failures,
    )
