"""`keras-resnet export --to web`: a static page that runs the network in a browser.

The folder needs a web server for static files and nothing else. Its scripts, its style and its
HTML are in `page/` beside this module; the runtimes come from their npm packages.
"""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import PIL
from ai_edge_litert import schema_py_generated as schema
from PIL import Image

from keras_resnet import __version__
from keras_resnet.evaluation.inference import load
from keras_resnet.exporters import folder as folders
from keras_resnet.exporters.calibration import draw_evenly
from keras_resnet.exporters.exporter import load_evaluation_images, write_export
from keras_resnet.exporters.formats import PRECISIONS, WEB, Artifact, choose_artifacts
from keras_resnet.exporters.source import open_export_source
from keras_resnet.exporters.web_html import fill_page
from keras_resnet.exporters.web_runtime import copy_runtime, find_runtime
from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError

METADATA = "metadata.json"
# The key by which `METADATA` is recognised, and its value in this version.
_VERSION_KEY, _VERSION = "page_version", 1

_PAGE = Path(__file__).parent / "page"
_COPIED = ("app.js", "pixels.js", "runtimes.js", "style.css", "icon.svg")
_MODELS = {"tflite": "model.tflite", "onnx": "model.onnx"}
_SAMPLES, _RUNTIME = "samples", "runtime"
_OWN = {"index.html", METADATA, *_COPIED, *_MODELS.values(), _SAMPLES, _RUNTIME}

_SAMPLES_A_CLASS, _MOST_SAMPLES = 2, 20
_SAMPLE_EDGE = 256  # of a photograph


def export_web(
    model,
    folder=None,
    *,
    precision="float16",
    runtime=None,
    dataset=None,
    photos=None,
    normalize=None,
    force=False,
    report=None,
    **data_options,
):
    """Writes a static page that runs a model in a browser, with files verified as by `export`.

    Args:
        model: See `export`.
        folder: The folder to write. By default "web" in the run folder, NAME-web beside NAME.keras,
            or NAME-web here for a published network. An earlier page is replaced; other files in
            its folder are kept.
        precision: "float32", "float16" or "int8": that of the .tflite and of the .onnx file.
        runtime: A folder with the npm packages of `page/package.json`, or its `node_modules`; None
            to install them with npm into a cache.
        dataset: See `export`.
        photos: See `export`.
        normalize: See `export`.
        force: See `export`.
        report: Called with a line about each file; None for none.
        **data_options: Options of `load_dataset`.

    Returns:
        The content of the page's metadata.json, a dict: see docs/web.md.

    Raises:
        InputError: If an argument breaks a rule, or the runtimes cannot be had.
        ExportError: If a file failed its verification.

    Example:
        >>> export_web("missing.keras")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: missing.keras: no such model file
    """
    report = report or (lambda line: None)
    choose_artifacts([*_MODELS], [precision])  # refuses a precision that one of them lacks
    source = open_export_source(model, normalize)
    if folder is None:
        if source.folder is None:
            raise InputError("`folder` must be given to export a Keras model object")
        folder = source.folder.with_name(f"{source.folder.name.removesuffix('export')}{WEB}")
    folder = folders.check_target(folder, _check_earlier)
    packages = find_runtime(runtime, report)
    images = load_evaluation_images(source, dataset, photos, data_options)
    with folders.workspace(folder) as work:
        inner = work / "export"
        manifest = write_export(
            source,
            images,
            inner,
            [Artifact(name, precision) for name in _MODELS],
            report,
            image_size=data_options.get("image_size"),
            force=force,
        )
        for row in manifest["artifacts"]:
            os.rename(inner / row["file"], work / _MODELS[row["format"]])
        shutil.rmtree(inner)
        for name in _COPIED:
            shutil.copyfile(_PAGE / name, work / name)
        copy_runtime(packages, work / _RUNTIME)
        samples = _write_samples(work, images, manifest)
        metadata = _make_metadata(work, manifest, samples, source.predictor.metadata)
        files.write_text(work / "index.html", fill_page(metadata))
        files.write_json(work / METADATA, metadata)
        if folder.is_dir():
            kept = {path.name for path in folder.iterdir()} - _OWN
            folders.carry_over(folder, work, sorted(kept))
        folders.publish(work, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    report(f"written to {folder}: {size / 1e6:.1f} MB")
    report(f"to see it: python -m http.server --directory {shlex.quote(str(folder))}")
    return metadata


def _check_earlier(folder, given):
    try:
        found = json.loads((folder / METADATA).read_text(encoding="utf-8"))
        is_page = isinstance(found, dict) and _VERSION_KEY in found
    except (OSError, ValueError):
        is_page = False
    if not is_page:
        raise InputError(
            f"{given}: a page is written to a new folder, an empty one or that of an earlier page: "
            "choose another --out"
        )


def _write_samples(work, images, manifest):
    """Writes sample images, and returns them with the answers of the files' Python runtimes."""
    split, names = images.split, manifest["class_names"]
    predictors = {name: load(work / file, trust=True) for name, file in _MODELS.items()}
    count = min(_SAMPLES_A_CLASS * len(names), _MOST_SAMPLES)
    (work / _SAMPLES).mkdir()
    samples = []
    for index in draw_evenly(split.labels, count):
        # A photograph is shown and checked at a size that downloads fast.
        image = _to_pillow(split.images[int(index)])
        if None in predictors["tflite"].image_shape[:2]:
            image.thumbnail((_SAMPLE_EDGE, _SAMPLE_EDGE), Image.Resampling.BILINEAR)
        file = f"{_SAMPLES}/{len(samples):02d}.png"
        image.save(work / file, optimize=True)
        pixels = np.asarray(image).reshape(image.height, image.width, -1)
        answers = {name: predict(pixels[None])[0] for name, predict in predictors.items()}
        samples.append(
            {
                "file": file,
                "label": names[split.labels[index]] if images.data.is_labelled else None,
                "height": image.height,
                "width": image.width,
                "answers": {
                    name: [float(f"{p:.6g}") for p in answer] for name, answer in answers.items()
                },
            }
        )
    return samples


def _to_pillow(pixels):
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _make_metadata(work, manifest, samples, own):
    """Returns the content of metadata.json.

    Args:
        work: The folder.
        manifest: The manifest of the export.
        samples: The result of `_write_samples`.
        own: The metadata of the model.
    """
    rows = {row["format"]: row for row in manifest["artifacts"]}
    _, height, width, channels = rows["tflite"]["input"]["shape"]
    described = {
        name: {
            "file": file,
            **{key: rows[name][key] for key in ("bytes", "sha256", "failures")},
            **{key: rows[name][key] for key in ("images", "max_difference", "agreement")},
            "accuracy": rows[name]["accuracy"],
        }
        for name, file in _MODELS.items()
    }
    described["tflite"]["shape_at"] = find_input_shape((work / _MODELS["tflite"]).read_bytes())
    precision, trained_on = rows["tflite"]["precision"], own.get("data")
    is_newer = int(PIL.__version__.partition(".")[0]) >= 13
    return {
        _VERSION_KEY: _VERSION,
        "created": manifest["created"],
        "keras_resnet": __version__,
        # `with_preprocessing` adds the suffix.
        "network": own.get("model") or manifest["model"]["name"].removesuffix("_classifier"),
        "parameters": manifest["model"]["parameters"],
        "source_sha256": manifest["source"]["sha256"],
        "origin": _describe_origin(manifest["source"].get("origin")),
        "trained_on": _public(trained_on.get("dataset") if isinstance(trained_on, dict) else None),
        "verified_on": {
            "dataset": _public(manifest["data"]["dataset"]),
            "split": manifest["data"]["split"],
            "images": manifest["data"]["images"],
        },
        "class_names": manifest["class_names"],
        "input": {
            "height": height,
            "width": width,
            "channels": channels,
            "dark_background": channels == 1 and own.get("background") == "dark",
            # The order of the passes of the Pillow that `predict` resizes with.
            "resampler": "pillow" if is_newer else "pillow12",
        },
        "precision": precision,
        "tolerance": PRECISIONS[precision].tolerance.max_difference,
        "files": described,
        "samples": samples,
    }


def _describe_origin(origin):
    """Returns the name and the licence of published weights; None for weights trained here.

    Example:
        >>> _describe_origin({"name": "timm/resnet18.a1_in1k", "license": "apache-2.0"})
        {'name': 'timm/resnet18.a1_in1k', 'license': 'apache-2.0'}
        >>> _describe_origin({"file": "resnet18.pth"})
        {'name': 'resnet18.pth', 'license': None}
    """
    if not isinstance(origin, dict):
        return None
    return {"name": origin.get("name") or origin.get("file"), "license": origin.get("license")}


def _public(dataset):
    """Returns a data set's name without the folders above it, which may be private.

    Example:
        >>> _public("folder:/home/me/flowers"), _public("fashion_mnist"), _public(None)
        ('folder:flowers', 'fashion_mnist', None)
    """
    kind, colon, path = (dataset or "").partition(":")
    return f"{kind}:{Path(path).name}" if colon and kind != "tfds" else dataset


def find_input_shape(content):
    """Returns where a .tflite file states the shape of its input.

    LiteRT.js takes tensors of the stated shape only. The page writes the shape of the image there,
    as 32-bit numbers with the lowest byte first, before it opens the file.

    Args:
        content: The file, bytes.

    Returns:
        The offsets of the first number: of the shape, and of its signature, where -1 is any size.
    """
    model = schema.Model.GetRootAs(content, 0)
    graph = model.Subgraphs(0)
    table = graph.Tensors(graph.Inputs(0))._tab
    # The slots of `shape` and `shape_signature` in the schema's table `Tensor`.
    slots = [slot for slot in (table.Offset(4), table.Offset(18)) if slot]
    return [table.Vector(slot) for slot in slots]
