"""The HTML of the page of `exporters.web`."""

import base64
import hashlib
import html
import json
import string
from pathlib import Path

from keras_resnet.exporters.formats import PRECISIONS

_TEMPLATE = Path(__file__).parent / "page" / "index.html"
_BARS = 5
_NAMES_SHOWN = 20
_SMALL = 64  # the pixels of narrower samples are shown as squares

# LiteRT.js imports its loader by the name of the npm package.
_IMPORT_MAP = json.dumps(
    {"imports": {"@litertjs/wasm-utils": "./runtime/@litertjs/wasm-utils/dist/index.js"}}
)


def fill_page(metadata):
    """Returns the HTML: all that is known at the export, so that nothing moves when it loads.

    Args:
        metadata: The content of the page's metadata.json.
    """
    template = string.Template(_TEMPLATE.read_text(encoding="utf-8"))
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
        lead=f"A network that tells {count:,} classes apart. It runs in this browser.",
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


def _sample_button(place, sample):
    label = f", labelled {sample['label']}" if sample["label"] else ""
    small = ' class="small"' if sample["width"] < _SMALL else ""
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
    tflite, onnx = (metadata["files"][name] for name in ("tflite", "onnx"))
    verified, origin = metadata["verified_on"], metadata["origin"]
    images = f"{verified['images']:,} {verified['split']} images of {verified['dataset']}"
    accuracy = f"not measured: {verified['images']:,} photographs without labels"
    if tflite["accuracy"] is not None:
        accuracy = f"{100 * tflite['accuracy']:.1f}\N{NO-BREAK SPACE}% of {images}"
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
            f"{difference:.1g}, same class for {100 * agreement:.4g}\N{NO-BREAK SPACE}%",
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
