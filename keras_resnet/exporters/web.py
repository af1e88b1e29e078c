"""`keras-resnet export --to web`: a static page that runs the network in a browser.

The folder needs a web server for static files and nothing else. Its scripts, its style and its
HTML are in `page/` beside this module; the runtimes come from their npm packages.
"""

import base64
import csv
import hashlib
import html
import importlib.metadata
import json
import os
import shutil
import string
import subprocess
import tempfile
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
from keras_resnet.untrusted.manifest import digest
from keras_resnet.utils import files
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user

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
_BARS = 5
_NAMES_SHOWN = 20

# Name in the folder -> distribution and path in it. The npm packages hold no licence texts; the
# Python packages of the same projects do.
_LICENSES = {
    "LICENSE-LiteRT.txt": ("ai-edge-litert", "LICENSE"),
    "LICENSE-ONNX-Runtime.txt": ("onnxruntime", "LICENSE"),
    "NOTICES-ONNX-Runtime.txt": ("onnxruntime", "ThirdPartyNotices.txt"),
}

# LiteRT.js imports its loader by the name of the npm package.
_IMPORT_MAP = json.dumps(
    {"imports": {"@litertjs/wasm-utils": "./runtime/@litertjs/wasm-utils/dist/index.js"}}
)


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
        _copy_runtime(packages, work / _RUNTIME)
        samples = _write_samples(work, images, manifest)
        metadata = _make_metadata(work, manifest, samples, source.predictor.metadata)
        files.write_text(work / "index.html", _fill_page(metadata))
        files.write_json(work / METADATA, metadata)
        if folder.is_dir():
            kept = {path.name for path in folder.iterdir()} - _OWN
            folders.carry_over(folder, work, sorted(kept))
        folders.publish(work, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    report(f"written to {folder}: {size / 1e6:.1f} MB")
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


# ----------------------------------------------------------------------------------------------
# The runtimes
# ----------------------------------------------------------------------------------------------


def find_runtime(folder=None, report=None):
    """Returns a folder with the files of the npm packages, each compared with its checksum.

    Args:
        folder: A folder with the packages, or with `node_modules`; None for a cache, into which npm
            installs them once.
        report: Called with a line before npm starts.

    Returns:
        The `Path` of a folder with the structure of `node_modules`.

    Raises:
        InputError: If a file is missing or another one, or npm is missing or fails.

    Example:
        >>> find_runtime("missing")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: missing: no such folder (--runtime)
    """
    if folder is None:
        return _cached_runtime(report or (lambda line: None))
    given = expand_user(folder)
    if not given.is_dir():
        raise InputError(f"{folder}: no such folder (--runtime)")
    inner = given / "node_modules"
    packages = inner if inner.is_dir() else given
    _check_runtime(
        packages, f"name a folder with the npm packages {_packages()} as --runtime, or leave it out"
    )
    return packages


def _packages():
    """Returns the npm packages with their versions, in words."""
    wanted = json.loads((_PAGE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    return " and ".join(f"{name}@{version}" for name, version in wanted.items())


def _runtime_files():
    """Returns the rows of `page/runtime.csv`: dicts of "file", its path, and "sha256"."""
    with open(_PAGE / "runtime.csv", encoding="utf-8", newline="") as table:
        return list(csv.DictReader(table))


def _check_runtime(packages, advice):
    for row in _runtime_files():
        path = packages / row["file"]
        if not path.is_file():
            raise InputError(f"{path}: no such file of a runtime: {advice}")
        found = digest(path)[1]
        if found != row["sha256"]:
            raise InputError(
                f"{path}: of another version, or damaged: its sha256 must be {row['sha256']}, got "
                f"{found}: {advice}"
            )


def _cached_runtime(report):
    """Returns the folder in the cache, into which npm has installed the packages."""
    lock = (_PAGE / "package-lock.json").read_bytes()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(home, "keras_resnet", WEB, hashlib.sha256(lock).hexdigest()[:16])
    advice = f"remove {cache}, and npm installs it again"
    if not cache.is_dir():
        npm = shutil.which("npm")
        if npm is None:
            raise InputError(
                "the runtimes of a browser come from npm, and there is no npm here: install it "
                f"(Debian: apt-get install npm), or name a folder with {_packages()} as --runtime"
            )
        report(f"npm installs {_packages()} into {cache}")
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as scratch:
            packages = _install(npm, Path(scratch))
            _check_runtime(packages, "it is not what this version of keras_resnet was tested with")
            for row in _runtime_files():
                target = Path(scratch, "kept", row["file"])
                target.parent.mkdir(parents=True, exist_ok=True)
                os.rename(packages / row["file"], target)
            # Another process may have been faster.
            if not cache.is_dir():
                os.rename(Path(scratch, "kept"), cache)
    _check_runtime(cache, advice)
    return cache


def _install(npm, scratch):
    """Installs the packages of the lock file; returns their `node_modules`."""
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(_PAGE / name, scratch / name)
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        reason = one_line(done.stderr)
        raise InputError(
            f"npm could not install {_packages()}: {reason}: see `npm ping`, or name a folder with "
            "them as --runtime"
        )
    return scratch / "node_modules"


def _copy_runtime(packages, target):
    """Copies the files of the runtimes, and their licences beside them."""
    for row in _runtime_files():
        path = target / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(packages / row["file"], path)
    for name, (distribution, wanted) in _LICENSES.items():
        owned = importlib.metadata.files(distribution) or []
        path = next(path.locate() for path in owned if path.name == wanted)
        shutil.copyfile(path, target / name)


# ----------------------------------------------------------------------------------------------
# Samples and metadata
# ----------------------------------------------------------------------------------------------


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
    """Returns a data set's name without the folders above it, which are nobody's business.

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


# ----------------------------------------------------------------------------------------------
# The HTML
# ----------------------------------------------------------------------------------------------


def _policy():
    """Returns the Content-Security-Policy: this folder, WebAssembly, and nothing else."""
    checksum = base64.b64encode(hashlib.sha256(_IMPORT_MAP.encode()).digest()).decode()
    rules = {
        "default-src": "'none'",
        "script-src": f"'self' 'wasm-unsafe-eval' 'sha256-{checksum}'",
        "style-src": "'self'",
        "img-src": "'self'",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{rule} {value}" for rule, value in rules.items())


def _fill_page(metadata):
    """Returns the HTML: all that is known at the export, so that nothing moves when it loads."""
    template = string.Template((_PAGE / "index.html").read_text(encoding="utf-8"))
    count, taken = len(metadata["class_names"]), metadata["input"]
    is_fixed, is_grey = taken["height"] is not None, taken["channels"] == 1
    about = f" on {metadata['trained_on']}" if metadata["trained_on"] else ""
    size = f"{taken['height']} × {taken['width']} pixels{', grey' if is_grey else ''}"
    seen = (
        f'<figure>\n<canvas id="seen" width="{taken["width"]}" height="{taken["height"]}" '
        f'role="img" aria-label="the image as the network gets it"></canvas>\n'
        f"<figcaption>The network gets<br>{size}</figcaption>\n</figure>"
    )
    row = (
        '<li><span class="name">–</span><span class="track" aria-hidden="true"><span></span></span>'
        '<span class="share">–</span></li>'
    )
    return template.substitute(
        policy=_policy(),
        import_map=_IMPORT_MAP,
        title=html.escape(f"{metadata['network']}{about}"),
        lead=f"A residual network that tells {count:,} classes apart. It runs in this browser.",
        drawable='class="drawable"' if is_grey else "",
        picture_caption="Draw here, or drop a file." if is_grey else "Or drop a file on the page.",
        seen=seen if is_fixed else "",
        clear='<button type="button" id="clear">Clear</button>' if is_grey else "",
        samples_title=html.escape(f"Samples from the {metadata['verified_on']['split']} images")
        if metadata["samples"][0]["label"]
        else "Samples",
        samples="\n".join(
            _sample_button(place, sample) for place, sample in enumerate(metadata["samples"], 1)
        ),
        bars="\n".join([row] * min(count, _BARS)),
        facts="\n".join(
            f"<dt>{term}</dt><dd>{html.escape(text)}</dd>" for term, text in _facts(metadata)
        ),
    )


def _sample_button(place, sample):
    label = f", labelled {sample['label']}" if sample["label"] else ""
    small = ' class="small"' if sample["width"] < _SAMPLE_EDGE // 4 else ""
    return (
        f'<li><button type="button" aria-pressed="false" '
        f'aria-label="{html.escape(f"sample {place}{label}")}">'
        f'<img src="{sample["file"]}" alt="" width="{sample["width"]}" '
        f'height="{sample["height"]}"{small}></button></li>'
    )


def _facts(metadata):
    """Returns what the page says about the network: pairs of a term and a text."""
    names, taken = metadata["class_names"], metadata["input"]
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = f" and {len(names) - _NAMES_SHOWN:,} more" if len(names) > _NAMES_SHOWN else ""
    tflite, onnx = (metadata["files"][name] for name in _MODELS)
    verified, origin = metadata["verified_on"], metadata["origin"]
    images = f"{verified['images']:,} {verified['split']} images of {verified['dataset']}"
    accuracy = f"not measured: {verified['images']:,} photographs without labels"
    if tflite["accuracy"] is not None:
        accuracy = f"{100 * tflite['accuracy']:.1f} % of {images}"
    difference = max(tflite["max_difference"], onnx["max_difference"])
    agreement = min(tflite["agreement"], onnx["agreement"])
    kind = "grey images" if taken["channels"] == 1 else "photographs"
    size = "of any size"
    if taken["height"] is not None:
        size = f"of any size, which the page resizes to {taken['height']} × {taken['width']} pixels"
    failures = [*tflite["failures"], *onnx["failures"]]
    return [
        ("Network", f"{metadata['network']}, {metadata['parameters']:,} parameters"),
        ("Classes", f"{len(names):,}: {shown}{more}"),
        ("Takes", f"{kind} {size}"),
        ("Trained on", metadata["trained_on"] or "not recorded"),
        ("Accuracy", accuracy),
        (
            "Verified",
            f"against the Keras model, on the same images: largest difference of a probability "
            f"{difference:.1g}, same class for {100 * agreement:.2f} %",
        ),
        *([("Failed", "; ".join(failures))] if failures else []),
        (
            "Files",
            f"{tflite['file']}, {tflite['bytes'] / 1e6:.1f} MB, and {onnx['file']}, "
            f"{onnx['bytes'] / 1e6:.1f} MB: {PRECISIONS[metadata['precision']].description}",
        ),
        *([("Weights", origin["name"])] if origin else []),
        ("Licence", (origin or {}).get("license") or "not stated"),
        ("Exported", f"{metadata['created'][:10]} by keras_resnet {metadata['keras_resnet']}"),
    ]
