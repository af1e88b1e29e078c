"""Classifies images with a .tflite file that `keras-resnet export` wrote.

    python run_tflite.py model-int8.tflite IMAGE… [--top 3] [--json]

Needs numpy, Pillow and ai-edge-litert (or tflite-runtime), and nothing else: copy this file and
the model to a Raspberry Pi.
"""

import argparse
import hashlib
import io
import json
import os
import sys
import warnings
import zipfile

import numpy as np
from PIL import Image

try:
    from ai_edge_litert.interpreter import Interpreter
except ImportError:
    from tflite_runtime.interpreter import Interpreter


def load(path, threads):
    """Returns a function that runs the model, an image's shape, the class count, the metadata."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        # A ZIP archive behind the network has the metadata: class names, checksum and more.
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            trailer = json.loads(archive.read("keras_resnet.json"))
        network = content[: trailer["bytes"]]
        if hashlib.sha256(network).hexdigest() != trailer["sha256"]:
            raise ValueError("damaged: its checksum is wrong")
        # Earlier exports have the key "card".
        metadata = trailer["metadata" if "metadata" in trailer else "card"]
        interpreter = Interpreter(model_content=network, num_threads=threads)
        (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
        if taken["dtype"] != np.uint8:
            raise ValueError("it takes numbers, not images: export it with its preprocessing")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such model file") from None
    except Exception as error:  # a damaged file raises many exceptions
        raise BadInput(f"{path}: cannot be used: {error}") from error

    def run(image):
        interpreter.resize_tensor_input(taken["index"], image.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(taken["index"], image)
        interpreter.invoke()
        output, (scale, zero) = interpreter.get_tensor(given["index"]), given["quantization"]
        # The output of a file of whole numbers.
        return (output.astype("float64") - zero) * scale if output.dtype == np.uint8 else output

    # -1: any size.
    sizes = [None if size < 0 else int(size) for size in taken["shape_signature"][1:]]
    return run, sizes, given["shape"][-1], metadata


class BadInput(Exception):
    """A file cannot be used; the message has its name and the reason."""


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def turn_upright(image):
    """Returns an image turned by its EXIF orientation; as stored if that is unreadable."""
    try:
        method = TURNS.get(image.getexif().get(0x0112))
    except Exception:  # broken EXIF raises many exceptions, and viewers show the pixels
        return image
    return image if method is None else image.transpose(method)


def to_eight_bits(image):
    """Returns an image of 16 bits or floats in 8 bits; refuses ambiguous ranges."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image).astype("float64")
    finite = pixels[np.isfinite(pixels)]
    low, high = (finite.min(), finite.max()) if finite.size else (np.nan, np.nan)
    whole = bool((finite == finite.round()).all())
    if image.mode == "F" and low >= -0.5 / 255 and high <= 1 + 0.5 / 255:
        scale = 255.0
    elif image.mode == "F" and low >= 0 and high <= 255 and (whole or high > 16):
        scale = 1.0
    elif low >= 0 and high <= 65535 and whole:
        scale = 1 / 256
    else:
        raise ValueError(f"numbers from {low:.4g} to {high:.4g}: must lie in 0…1, 0…255 or 0…65535")
    pixels = np.nan_to_num(pixels * scale, posinf=255)
    return Image.fromarray(pixels.clip(0, 255).astype("uint8"))


FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize(image, height, width, metadata):
    """Returns an image of the file's input size; of its own size if the file takes any."""
    if height is None:
        return image
    step = (metadata.get("preprocessing") or {}).get("resizing", {})
    if step.get("done_by") != "caller":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    length = int(width / step["crop_pct"])
    size = (length, length)
    if step["resize"] == "shorter_edge":
        size = tuple(length * edge // min(image.size) for edge in image.size)
    image = image.resize(size, FILTERS[step["interpolation"]])
    halves = [(edge - width) / 2 for edge in size]
    left, top = map(round if step["rounding"] == "torchvision" else int, halves)
    return image.crop((left, top, left + width, top + height))


def read_image(path, shape, metadata):
    """Returns an image file as uint8, [1, height, width, channels], as in training."""
    height, width, channels = shape
    try:
        # Pillow only warns of an image that would fill the memory.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as file:
            file.load()
            image = to_eight_bits(turn_upright(file))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if channels == 1 else "RGB")
        image = resize(image, height, width, metadata)
        return np.asarray(image).reshape(1, image.height, image.width, channels)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such image file") from None
    except Exception as error:  # Pillow raises many exceptions for a damaged file
        raise BadInput(f"{path}: not an image that can be read ({error})") from error


def is_inverted(image, invert, background):
    """Returns whether a grey image is light and those of the training are dark."""
    if invert != "auto":
        return invert == "yes"
    sides = (image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1])
    is_light = np.median(np.concatenate([side.reshape(-1) for side in sides])) >= 128
    return bool(background == "dark" and image.shape[-1] == 1 and is_light)


def classify(path, model, args):
    """Returns the most probable labels of an image file, like `keras-resnet predict`."""
    run, shape, outputs, metadata = model
    names = metadata.get("class_names") or [f"class {i}" for i in range(outputs)]
    image = read_image(path, shape, metadata)
    inverted = is_inverted(image, args.invert, metadata.get("background"))
    probabilities = run(255 - image if inverted else image)[0].astype("float64")
    if not np.isfinite(probabilities).all():
        raise BadInput(f"{path}: {args.model} gives numbers that are not finite")
    probabilities = (probabilities / probabilities.sum()).astype("float32")
    best = np.argsort(-probabilities, kind="stable")[: max(args.top, 1)]
    labels = [{"label": names[i], "probability": float(probabilities[i])} for i in best]
    return {"image": path, "inverted": inverted, "labels": labels}


def print_errors(program, errors):
    """Prints a line for each error; returns the exit status."""
    for error in errors:
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    return 2 if errors else 0


def main():
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Classifies images.")
    parser.add_argument("model", metavar="MODEL.tflite")
    parser.add_argument("images", metavar="IMAGE", nargs="+")
    parser.add_argument("--top", type=int, default=3, help="labels an image (default: 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    parser.add_argument("--invert", choices=("auto", "yes", "no"), default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # the terminal may lack letters of a class name
    try:
        model = load(args.model, max(args.threads, 1))
    except BadInput as error:
        return print_errors(parser.prog, [error])
    rows, errors = [], []
    for path in args.images:
        try:
            rows.append(classify(path, model, args))
        except BadInput as error:  # the other images are classified all the same
            errors.append(error)
    lines = [
        f"{row['image']}  {label['label']}  {label['probability']:.4f}"
        for row in rows
        for label in row["labels"]
    ]
    for row in rows:
        if row["inverted"] and not args.json:
            print(f"{row['image']}: light and dark were swapped (--invert)", file=sys.stderr)
    try:
        if rows or args.json:
            print(json.dumps(rows) if args.json else "\n".join(lines), flush=True)
    except BrokenPipeError:  # the reader has closed the pipe, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    return print_errors(parser.prog, errors)


if __name__ == "__main__":
    sys.exit(main())
