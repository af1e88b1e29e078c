"""A Keras model -> a folder of artifacts, each proven before it is there."""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib
import json
import os
from pathlib import Path

import keras
import numpy as np

from keras_resnet.evaluation.inference import (
    Predictor,
    load_data,
    resize_to_model,
    resolve_model_path,
    to_probabilities,
)
from keras_resnet.exporters import folder as folders
from keras_resnet.exporters import verification
from keras_resnet.exporters.formats import OWN_FILES, PRECISIONS, REFERENCE, choose_artifacts
from keras_resnet.exporters.graph import Serving
from keras_resnet.exporters.reference import Recorded, read_reference, write_reference
from keras_resnet.runtimes import Prober, open_runtime
from keras_resnet.runtimes.base import LOGITS, OUTPUT_KIND_KEY, as_rows, kind_by_numbers
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.runtimes.normalized import normalized
from keras_resnet.training import run_folder
from keras_resnet.untrusted.manifest import MANIFEST, VERSION, digest, read_manifest
from keras_resnet.utils import files
from keras_resnet.utils.errors import ExportError, InputError
from keras_resnet.utils.progress import bar, note

TOOLS = ("tensorflow", "tf2onnx", "onnx", "onnxruntime", "ai-edge-litert")

# How a data set was split, for who measures it again.
_SPLIT_OPTIONS = ("validation_split", "seed", "skip_bad")

CALIBRATION_IMAGES = 300
REFERENCE_IMAGES = 256
_REFERENCE_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Job:
    """What every writer of a format is given.

    Attributes:
        serving: The `Serving`.
        metadata: What the file says about itself: class names, data, background.
        provenance: Where it comes from: a dict of strings.
        calibration: Training images as the exported file takes them, evenly over the classes.
    """

    serving: Serving
    metadata: dict
    provenance: dict
    calibration: np.ndarray


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
    """Writes a model in other formats, and proves that each file is still the same network.

    Every file is loaded by its own runtime and asked for all images that measure the model; what
    does not pass its gate (`formats.PRECISIONS`) stops the export, and nothing is left of it.

    Args:
        model: A run folder, a .keras file, or a Keras model with one image input and one output
            of a kind in `runtimes.base.OUTPUT_KINDS`. A model of one number for two classes is
            exported with two columns: 1 − p and p.
        folder: Where to. By default "export" in the run folder, or beside a .keras file, with the
            file's name before it. An earlier export of the same model in it is added to.
        to: Rows of `formats.FORMATS`: "saved_model", "tflite", "onnx"; None for all.
        precision: Rows of `formats.PRECISIONS`: "float32", "float16", "dynamic", "int8"; None
            for all that the formats come in.
        dataset: A `Dataset` or its name; by default what the model was trained on. See
            `inference.load_data` for the images of it that measure.
        normalize: How the images are normalised that a Keras model of floats was trained on, a row
            of `preprocessing.NORMALIZATIONS`; the files then do that themselves.
        preprocessing: Whether the files take raw uint8 images and give probabilities; without,
            they take the network's floats and give logits.
        force: Whether to publish what failed, with the failures recorded.
        report: Called with a line about each artifact; None for none.
        **data_options: What `load_dataset` takes.

    Returns:
        The manifest, a dict: see README.

    Raises:
        InputError: If an argument breaks a rule, or a format cannot hold the network.
        ExportError: If an artifact failed its proof.

    Example:
        >>> export("missing.keras")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: missing.keras: no such model file
    """
    if keras.backend.backend() != "tensorflow":
        raise InputError(
            f"an export needs Keras on TensorFlow, and it runs on {keras.backend.backend()}: set "
            "KERAS_BACKEND=tensorflow"
        )
    artifacts = choose_artifacts(to, precision)
    source = _open_source(model, folder, normalize)
    folder = folders.check_target(source.folder)
    data, split, options = load_data(source.predictor, dataset, **data_options)
    size = split.images.shape[1:3]
    if None in size:
        raise InputError(
            f"{data.name}: images of several sizes, and the model takes any: an export has one; "
            "choose it with --image-size (`image_size`)"
        )
    serving = Serving(source.predictor.model, preprocessing, size)
    _check_contract_kept(folder, serving.contract)
    run_folder.check_space(folder.parent, 4 * serving.model.count_params() * len(artifacts))
    job = Job(
        serving,
        _make_metadata(source.predictor, data, serving),
        source.provenance,
        _calibration_images(serving, data, options, artifacts),
    )
    with folders.workspace(folder) as work, Prober() as prober:
        session = _Session(job, work, prober, report)
        session.compute_reference(source.predictor, split)
        for artifact in artifacts:
            session.add(artifact)
        _check_passed(session.rows, session.failures, force, folder)
        manifest = _make_manifest(source, data, options, session)
        _keep_earlier(manifest, session, folder)
        _write_record(manifest, session)
        folders.publish(work, folder)
    session.report(f"written to {folder}")
    return read_manifest(folder)


# ----------------------------------------------------------------------------------------------
# What is exported
# ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Source:
    """A model, and where it comes from."""

    predictor: Predictor
    folder: Path
    record: dict

    @property
    def provenance(self):
        """The record as strings, for a file's own metadata."""
        run = self.record.get("run", {})
        known = {**run, "source_sha256": self.record["sha256"]}
        known["keras_resnet_version"] = run_folder.versions()["keras-resnet-edge"]
        return {name: str(value) for name, value in known.items() if value is not None}


def _open_source(model, folder, normalize):
    if isinstance(model, keras.Model):
        if folder is None:
            raise InputError("`folder` must be named where a Keras model is exported")
        weights = hashlib.sha256()
        for weight in model.get_weights():
            weights.update(np.ascontiguousarray(weight))
        record = {"path": "", "sha256": weights.hexdigest(), "of": "the weights"}
        runtime = normalized(KerasRuntime(model), normalize)
        return _Source(Predictor(runtime), Path(folder), {**record, "normalize": normalize})
    if not isinstance(model, (str, os.PathLike)):
        raise InputError(
            f"a model is a run folder, a .keras file or a Keras model, got {model!r:.60}"
        )
    given, path = Path(model), resolve_model_path(model)
    if path.is_dir() or path.suffix in (".tflite", ".onnx"):
        raise InputError(f"{path}: an export is made of a run folder or a .keras file")
    predictor = Predictor(normalized(open_runtime(path), normalize))
    is_run = given.is_dir()
    default = given / "export" if is_run else path.with_name(f"{path.stem}-export")
    size, sha256 = digest(path)
    record = {"path": str(path.resolve()), "sha256": sha256, "bytes": size}
    record["normalize"] = normalize
    if is_run:
        record["run"] = _describe_run(given)
    return _Source(predictor, Path(folder) if folder else default, record)


def _describe_run(run_dir):
    """Returns how a run was made, as far as its config.json says it."""
    try:
        config = json.loads((run_dir / run_folder.CONFIG).read_text(encoding="utf-8"))
        recipe = config.get("recipe", {}).get("name")
        known = {name: config.get(name) for name in ("model", "seed", "git_commit", "command")}
    except (OSError, ValueError, AttributeError):  # it is a note, and not needed
        return {}
    return {**known, "recipe": recipe}


def _make_metadata(predictor, data, serving):
    names = list(map(str, predictor.metadata.get("class_names") or data.class_names))
    for name in names:
        # `labels.txt` has a line for each.
        if name.splitlines() != [name]:
            raise InputError(f"a class name must be one line of text, got {name!r}")
    metadata = {
        **predictor.metadata,
        "class_names": names,
        "takes_raw_images": serving.contract.dtype == "uint8",
        OUTPUT_KIND_KEY: serving.output_kind,
    }
    # A published file does not tell which photographs it was trained on.
    metadata.pop("trained_on", None)
    return metadata


def _calibration_images(serving, data, options, artifacts):
    """Returns the training images that find the ranges, if an artifact needs them.

    A set that is measured whole has no other images than those.
    """
    if not any(PRECISIONS[artifact.precision].is_calibrated for artifact in artifacts):
        return np.zeros((0, *serving.contract.image_shape), serving.contract.dtype)
    if not len(data.splits.get("train", ())):
        raise InputError(f"{data.name}: int8 needs training images, and there are none")
    if data.evaluation_split == "validation" and options.get("validation_split", 0) is None:
        note(f"{data.name}: int8 is calibrated on images that are measured, too: all are measured")
    split = resize_to_model(data.splits["train"], serving.raw_shape)
    return serving.prepare(split.images[draw_evenly(split.labels, CALIBRATION_IMAGES)])


def draw_evenly(labels, count):
    """Returns the positions of `count` images, as evenly over the classes as there are images.

    Args:
        labels: int64, [images].
        count: How many to draw; fewer if there are fewer.

    Returns:
        int64, [count], in order.

    Example:
        >>> draw_evenly(np.array([0, 0, 0, 0, 1, 2]), 4).tolist()
        [0, 1, 4, 5]
    """
    labels = np.asarray(labels)
    # An image's rank within its class: 0 for the first of each.
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    ranks = np.empty(len(labels), "int64")
    ranks[order] = np.arange(len(labels)) - starts
    return np.sort(np.argsort(ranks, kind="stable")[:count])


# ----------------------------------------------------------------------------------------------
# Artifact by artifact
# ----------------------------------------------------------------------------------------------


class _Session:
    """What has been written and proven so far."""

    def __init__(self, job, work, prober, report):
        self.job = job
        self.work = work
        self.rows, self.failures, self.answers = [], [], {}
        self.twin = self.note = None
        self._prober = prober
        self.report = report or (lambda line: None)
        self.threads = sorted({1, run_folder.cores()})

    def compute_reference(self, predictor, split):
        """Asks the Keras model itself, layer by layer as Keras calls it, and its float32 twin."""
        if len(split) < max(verification.BATCHES):
            raise InputError(
                f"the proof takes at least {max(verification.BATCHES)} images, got {len(split)}"
            )
        self.split = split
        model, twin = predictor.model, self.job.serving.twin
        runtime, kind = KerasRuntime(twin), self.job.serving.source_kind
        answers = own = _ask_keras(model, split)
        if twin is not model:
            answers = _ask_keras(twin, split)
            dtypes = {layer.compute_dtype for layer in model._flatten_layers()}
            self.twin = verification.check_twin(model.name, dtypes, own, answers)
            own = to_probabilities(own, kind, model.name)
        _check_kind(runtime, kind, answers)
        probabilities = to_probabilities(answers, kind, model.name)
        self.reference = verification.Reference(
            split.images, split.labels, probabilities, None if twin is model else own
        )
        takes_floats = not predictor.runtime.input.dtype.startswith(("int", "uint"))
        self.note = verification.describe_chance(self.reference, takes_floats)
        if self.note:
            self.report(self.note)
        image = split.images[np.arange(1)]
        latency = verification.measure_latency(runtime, image)
        # Keras's threads are those of this process.
        self.keras_latency = {str(self.threads[-1]): latency}
        most = max(max(verification.BATCHES), _REFERENCE_BYTES // self.inputs(0, 1).nbytes)
        self.picked = draw_evenly(split.labels, min(REFERENCE_IMAGES, most))

    def inputs(self, start, stop):
        """Returns a part of the images as the artifacts take them."""
        stop = min(stop, len(self.split))
        if start >= stop:
            return ()
        return self.job.serving.prepare(self.split.images[np.arange(start, stop)])

    def add(self, artifact):
        """Writes an artifact, asks its runtime, and keeps the figures."""
        path = self.work / artifact.file
        writer = importlib.import_module(f"keras_resnet.exporters.{artifact.format}")
        writer.write(self.job, artifact, path)
        try:
            row, failures = self._examine(path, artifact)
        except InputError as error:
            # What does not run has no figures: --force could not publish it either.
            failure = verification.Failure(artifact.file, "loads and answers", str(error), "yes")
            raise ExportError(
                f"{artifact.file} is not run by its own runtime: nothing was written", [failure]
            ) from error
        row["oldest_runtime"] = writer.oldest_runtime(path)
        self.rows.append(row)
        self.failures += failures
        self.report(_describe_row(row, len(self.split)))

    def _examine(self, path, artifact):
        """Returns an artifact's row of the manifest, and its `Failure`s."""
        size, sha256 = digest(path)
        with contextlib.closing(self._open(path, artifact, self.threads[-1])) as runtime:
            figures, failures = self._prove(artifact, runtime)
            row = {
                "file": artifact.file,
                **{name: getattr(artifact, name) for name in ("format", "precision", "batch")},
                "bytes": size,
                "sha256": sha256,
                "input": dataclasses.asdict(runtime.input),
                "output": dataclasses.asdict(runtime.output),
                **figures,
                "gate": dataclasses.asdict(PRECISIONS[artifact.precision].gate),
                "failures": [str(failure) for failure in failures],
                "published_by_force": bool(failures),
                "latency_ms": self._time(path, artifact, runtime),
                "operators": runtime.operators,
            }
        return row, failures

    def _open(self, path, artifact, threads):
        return verification.open_artifact(path, artifact.format, threads, self._prober)

    def _prove(self, artifact, runtime):
        file = artifact.file
        failures = verification.check_contract(
            file, runtime, self.job.serving.contract, artifact.batch
        )
        with bar(len(self.split), file) as shown:
            answers = verification.ask(runtime, self.inputs, shown.update)
        self.answers[file] = answers[self.picked]
        failures += verification.check_batches(file, runtime, self.inputs, answers)
        figures = verification.compare(answers, self.reference)
        wrong = verification.check_gate(file, artifact.precision, figures)
        nothing_shown = verification.check_shown(file, artifact.precision, self.reference)
        if nothing_shown:
            # Of answers that are alike, rounding decides which is the largest.
            wrong = [failure for failure in wrong if failure.check != "agreement"]
        return figures, failures + wrong + nothing_shown

    def _time(self, path, artifact, runtime):
        """Returns the latency of one image, by the number of threads."""
        image = self.inputs(0, 1)
        found = {}
        for threads in self.threads[:-1]:
            with contextlib.closing(self._open(path, artifact, threads)) as other:
                found[str(threads)] = verification.measure_latency(other, image)
        # `runtime` is open already, with the most threads.
        return {**found, str(self.threads[-1]): verification.measure_latency(runtime, image)}


def _ask_keras(model, split):
    """Returns a Keras model's answers to a split, float32, [count, columns]."""
    parts = []
    with bar(len(split), "the Keras model") as shown:
        for images, _ in split.batches(256):
            (answers,) = keras.tree.flatten(model(images, training=False))
            answers = keras.ops.convert_to_numpy(keras.ops.cast(answers, "float32"))
            parts.append(as_rows(answers))
            shown.update(len(images))
    return np.concatenate(parts)


def _check_kind(runtime, kind, answers):
    """Refuses a model whose graph does not say what it gives, if real images say another thing."""
    found = kind_by_numbers(answers)
    if runtime.graph_kind is None and not kind.endswith(found) and found != LOGITS:
        raise InputError(
            f"{runtime.name}: it gives {kind} for some images and what looks like {found} for "
            "others: end it in a Dense layer without activation, a Softmax layer, or a sigmoid"
        )


def _describe_row(row, images):
    verdict = "; ".join(row["failures"]) or "proven"
    return (
        f"{row['file']}: {row['bytes'] / 1e6:.1f} MB, largest difference "
        f"{row['max_difference']:.1e}, agreement {row['agreement']:.4f} on {images:,} images: "
        f"{verdict}"
    )


def _check_passed(rows, failures, force, folder):
    if not failures or force:
        return
    wrong = [each for each in failures if not each.check.startswith(verification.NOTHING_SHOWN)]
    files_ = sorted({failure.file for failure in wrong or failures})
    reason = f"{len(files_)} of {len(rows)} artifacts are not the network they were made of"
    if not wrong:
        reason = (
            f"{verification.NOTHING_SHOWN} of {len(files_)} of {len(rows)} artifacts, since the "
            "Keras model gives (nearly) the same answer to all images; train it, or name the "
            "--normalize that it needs"
        )
    raise ExportError(
        f"{reason} ({', '.join(files_)}): nothing was written to {folder}; --force publishes them "
        "with the failures recorded",
        failures,
    )


# ----------------------------------------------------------------------------------------------
# The record
# ----------------------------------------------------------------------------------------------


def _make_manifest(source, data, options, session):
    serving = session.job.serving
    surroundings = run_folder.describe_surroundings()
    return {
        "manifest_version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": {"name": source.predictor.model.name, "parameters": serving.model.count_params()},
        "source": source.record,
        "tool_versions": run_folder.versions(*TOOLS),
        "machine": {**surroundings["machine"], "git_commit": surroundings["git_commit"]},
        "class_names": session.job.metadata["class_names"],
        "data": {
            "dataset": data.name,
            "split": data.evaluation_split,
            "images": len(session.reference.labels),
            "fingerprint": data.fingerprint,
            "order": verification.digest_order(session.split),
            "options": {name: options[name] for name in _SPLIT_OPTIONS if name in options},
        },
        "keras": {
            "accuracy": session.reference.accuracy,
            "latency_ms": session.keras_latency,
            "twin": session.twin,
            "note": session.note,
        },
        "artifacts": session.rows,
    }


def _keep_earlier(manifest, session, folder):
    """Takes over what an earlier export left, and what others have put there."""
    if not folder.is_dir():
        return
    earlier = _read_earlier(folder)
    new = {row["file"] for row in session.rows}
    kept = []
    # A row needs its answers; what has been damaged since is left behind.
    with contextlib.suppress(InputError):
        if earlier["artifacts"] and _is_alike(earlier, manifest):
            answers = read_reference(folder, earlier).answers
            rows = [row for row in earlier["artifacts"] if row["file"] not in new]
            kept = [row for row in rows if _is_whole(folder, row)]
            session.answers |= {row["file"]: answers[row["file"]] for row in kept}
    known = {row["file"] for row in earlier["artifacts"]} | {*OWN_FILES, *new}
    others = sorted({path.name for path in folder.iterdir()} - known)
    for name in sorted(known - new - {*OWN_FILES, *(row["file"] for row in kept)}):
        session.report(f"{name}: left out: of another model or other data, or changed since")
    folders.carry_over(folder, session.work, [*(row["file"] for row in kept), *others])
    manifest["artifacts"] = sorted(
        [*manifest["artifacts"], *kept], key=lambda row: _PLACES.get(row["file"], 0)
    )


def _read_earlier(folder):
    return read_manifest(folder) if (folder / MANIFEST).is_file() else {"artifacts": []}


def _is_alike(earlier, manifest):
    """Returns whether two exports are of one model, measured on the same images."""
    return all(earlier[name] == manifest[name] for name in ("data", "class_names")) and all(
        earlier["source"].get(name) == manifest["source"][name] for name in ("sha256", "normalize")
    )


def _check_contract_kept(folder, contract):
    """Refuses to put files that take floats beside files that take images."""
    for row in _read_earlier(folder)["artifacts"]:
        if row["input"]["dtype"] != contract.dtype:
            raise InputError(
                f"{folder}: its files take {row['input']['dtype']}, and these would take "
                f"{contract.dtype}: choose another --out"
            )


def _is_whole(folder, row):
    """Returns whether a file is still what its manifest lists."""
    try:
        return digest(folder / row["file"]) == (row["bytes"], row["sha256"])
    except InputError:  # it is not there any more
        return False


_PLACES = {artifact.file: place for place, artifact in enumerate(choose_artifacts())}


def _write_record(manifest, session):
    """Writes the reference answers and the manifest into the workspace."""
    reference, picked = session.reference, session.picked
    recorded = Recorded(
        np.concatenate([session.inputs(i, i + 1) for i in picked]),
        reference.probabilities[picked],
        reference.probabilities.argmax(axis=1),
        session.answers,
    )
    write_reference(session.work / REFERENCE, recorded)
    size, sha256 = digest(session.work / REFERENCE)
    manifest["reference"] = {"file": REFERENCE, "bytes": size, "sha256": sha256}
    files.write_json(session.work / MANIFEST, manifest)
