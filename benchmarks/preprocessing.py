"""Preprocessing beside timm, torchvision, transformers and keras.applications, on photographs.

    pip install scikit-image scikit-learn
    python benchmarks/preprocessing.py [--photographs FOLDER …] [--libraries NAME …] [--out FILE]

Each photograph is a file: it is decoded and preprocessed by the library's own code, and once more
by our model, as Keras runs it and as the SavedModel, TFLite and ONNX files that were made of it,
which take photographs of any size. The network behind is a narrow ResNet-18 with random weights. By
default the photographs are those that scikit-image, scikit-learn and matplotlib bring, and parts of
them: turned by their EXIF tags, panoramas, tall strips, tiny ones, grey ones.

`tests/preprocessors.py` has the libraries, and `tests/test_preprocessing.py` holds the bounds.
"""

import argparse
import datetime
import gc
import importlib.metadata
import importlib.util
import io
import os
import platform
import sys
import time
from pathlib import Path

os.environ.update(CUDA_VISIBLE_DEVICES="-1", KERAS_BACKEND="tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import keras
import numpy as np
import onnxruntime
import tensorflow as tf
import torch
from ai_edge_litert.interpreter import Interpreter
from PIL import Image, ImageOps
from preprocessors import PREPROCESSORS
from references import randomize_keras

from keras_resnet import Spec, build_resnet, with_preprocessing
from keras_resnet.datasets.images import decode_image
from keras_resnet.exporters import onnx, tflite
from keras_resnet.exporters.graph import ServedModule
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.files import write_json
from keras_resnet.utils.tables import Column, format_duration, format_table

PACKAGES = (
    *("keras", "tensorflow", "ai-edge-litert", "onnxruntime", "pillow"),
    *("timm", "torch", "torchvision", "transformers"),
)
SEED = 0
# A ResNet-18 of a quarter of the width, so that the photographs take minutes.
SPEC = Spec((2, 2, 2, 2), (16, 32, 64, 128))

# package -> the folder of its images, and those that are photographs.
SOURCES = {
    "skimage": (
        "data",
        (
            *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png"),
            *("clock_motion.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
            *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png"),
            *("motorcycle_right.png", "page.png", "retina.jpg", "rocket.jpg"),
        ),
    ),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
    "matplotlib": ("mpl-data/sample_data", ("grace_hopper.jpg",)),
}

FORMATS = ("Keras", "SavedModel", "TFLite", "ONNX")

# Measured for each format; a cell has one number where all formats have the same.
MEASURES = {
    "levels": ("largest difference of grey levels", ".0f"),
    "pixels": ("pixels that differ", ".4%"),
    "most": ("in one photograph", ".2%"),
    "logits": ("largest relative difference of logits", ".0e"),
    "top1": ("same top-1", ".1%"),
}
COLUMNS = (
    Column("library"),
    *(Column(key, heading) for key, (heading, _) in MEASURES.items()),
)
SPEED_COLUMNS = (
    Column("size", "photograph"),
    Column("pillow", "Pillow, ms", ".1f"),
    *(Column(name, f"{name}, ms", ".1f") for name in FORMATS[1:]),
)


def find_photographs(folders):
    """Returns the files of photographs in `folders`, or of the packages that are installed."""
    if folders:
        found = [path for folder in folders for path in sorted(Path(folder).rglob("*"))]
        return [path for path in found if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    found = []
    for package, (folder, names) in SOURCES.items():
        if spec := importlib.util.find_spec(package):
            found += [Path(spec.origin).parent / folder / name for name in names]
    return found


def make_variants(files):
    """Returns name -> the bytes of an image file: the photographs, and parts of some of them."""
    photographs = {path.name: path.read_bytes() for path in files}
    generator = np.random.default_rng(SEED)
    for index, path in enumerate(files):
        with Image.open(path) as image:
            image = image.convert("RGB")
        width, height = image.size
        kind, variant = list(VARIANTS.items())[index % len(VARIANTS)]
        photographs[f"{path.stem}, {kind}"] = variant(image, width, height, generator)
        left, top = (int(generator.integers(0, edge // 2)) for edge in image.size)
        right, bottom = (
            int(generator.integers(begin + edge // 8 + 1, edge + 1))
            for begin, edge in ((left, width), (top, height))
        )
        photographs[f"{path.stem}, part"] = to_png(image.crop((left, top, right, bottom)))
    return photographs


def to_png(image):
    """Returns the bytes of a PNG file of a Pillow image."""
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def turned(image, width, height, generator):
    """Returns a JPEG file with an EXIF tag that turns or mirrors the image."""
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = int(generator.integers(2, 9))
    image.save(file, "jpeg", exif=exif, quality=92)
    return file.getvalue()


# name -> function of a Pillow image, its width, its height and a generator that returns a file.
VARIANTS = {
    "turned by EXIF": turned,
    "panorama": lambda image, width, height, generator: to_png(
        image.crop((0, height // 3, width, height // 3 + width // 5))
    ),
    "tall strip": lambda image, width, height, generator: to_png(
        image.crop((width // 3, 0, width // 3 + height // 4, height))
    ),
    "tiny": lambda image, width, height, generator: to_png(
        image.resize(tuple(generator.integers(9, 60, 2).tolist()))
    ),
    "grey": lambda image, width, height, generator: to_png(image.convert("L")),
    "turned by EXIF, too": turned,
}


def make_runners(module):
    """Returns format -> function of an image with a batch axis that returns input and logits."""
    saved = tf.saved_model.load(module.save())
    lite, standard = tflite.convert(module, "float32"), onnx.convert(module, "float32")
    interpreter = Interpreter(model_content=lite, num_threads=1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        standard.SerializeToString(), options, ["CPUExecutionProvider"]
    )

    def run_tflite(image, content=lite):  # the interpreter reads the bytes, and keeps none
        found = interpreter.get_signature_runner()(image=image)
        return found["input"], found["logits"]

    def run_saved_model(image):
        found = saved.serve(tf.constant(image))
        return found["input"].numpy(), found["logits"].numpy()

    return {
        "SavedModel": run_saved_model,
        "TFLite": run_tflite,
        "ONNX": lambda image: session.run(["input", "logits"], {"image": image}),
    }


def compare(preprocessor, photographs):
    """Returns the row of a library: for each measure, a number for each format."""
    size = preprocessor.arguments["image_size"]
    keras.utils.set_random_seed(SEED)
    network = build_resnet(SPEC, (size, size, 3), 1000, variant="torchvision")
    randomize_keras(network, SEED)
    model = with_preprocessing(network, (None, None, 3), **preprocessor.arguments)
    layer = model.get_layer("preprocessing")

    def serve(image):
        x = layer(image)
        return {"input": x, "logits": network(x, training=False)}

    module = ServedModule(model, serve, tf.TensorSpec([1, None, None, 3], "uint8", "image"))

    def run_keras(image):
        x = np.asarray(layer(image))
        return x, network.predict_on_batch(x)  # the model itself would be traced for each size

    run = {"Keras": run_keras, **make_runners(module)}
    found = {name: {key: [] for key in MEASURES} for name in run}
    for content in photographs.values():
        with Image.open(io.BytesIO(content)) as image:
            theirs = preprocessor.function(ImageOps.exif_transpose(image).convert("RGB"))
        logits = network.predict_on_batch(theirs[None])[0]
        image = decode_image(content, (None, None), 3)[None]
        for name, function in run.items():
            ours, own_logits = (array[0] for array in function(image))
            differences = np.abs(
                preprocessor.grey_levels(ours) - preprocessor.grey_levels(theirs)
            ).max(axis=-1)
            row = found[name]
            row["levels"].append(differences.max())
            row["pixels"].append((differences > 0.5).mean())
            row["most"].append(row["pixels"][-1])
            row["logits"].append(np.abs(own_logits - logits).max() / np.abs(logits).max())
            row["top1"].append(own_logits.argmax() == logits.argmax())
    reduce = {"pixels": np.mean, "top1": np.mean}
    return {
        key: {name: float(reduce.get(key, np.max)(row[key])) for name, row in found.items()}
        for key in MEASURES
    }


def to_cells(found):
    """Returns measure -> the text of its cell."""
    cells = {}
    for key, (_, spec) in MEASURES.items():
        texts = [format(found[key][name], spec) for name in FORMATS]
        cells[key] = texts[0] if len(set(texts)) == 1 else " / ".join(texts)
    return cells


def measure_speed(shape, rounds=15):
    """Returns the row of a photograph of `shape`: a core's milliseconds for the preprocessing."""
    image = np.random.default_rng(SEED).integers(0, 256, (1, *shape, 3)).astype("uint8")
    preprocessor = PREPROCESSORS["torchvision resnet18 V1"]()
    model = with_preprocessing(
        keras.Sequential([keras.Input((224, 224, 3)), keras.layers.Flatten()]),
        (None, None, 3),
        **preprocessor.arguments,
    )
    layer = model.get_layer("preprocessing")

    def serve(image):
        return {"input": layer(image), "logits": tf.zeros([1, 1])}

    module = ServedModule(model, serve, tf.TensorSpec([1, None, None, 3], "uint8", "image"))
    picture = Image.fromarray(image[0])
    run = {
        "pillow": lambda image: preprocessor.function(picture),
        **make_runners(module),
    }
    row = {"size": f"{shape[1]}×{shape[0]}"}
    for name, function in run.items():
        times = []
        for _ in range(2 + rounds):
            start = time.process_time()
            function(image)
            times.append(time.process_time() - start)
        row[name] = 1e3 * float(np.median(times[2:]))
    return row


def conditions(count):
    """Returns one line: photographs, machine, versions, date, seed."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{count} photographs; {machine}, {versions}; {datetime.date.today()}, seed {SEED}"


def main():
    """Measures and prints the tables; each library's time goes to standard error."""
    parser = argparse.ArgumentParser(description="Preprocessing beside the libraries' own.")
    parser.add_argument("--photographs", nargs="+", metavar="FOLDER", help="folders of images")
    names = list(PREPROCESSORS)
    parser.add_argument("--libraries", nargs="+", choices=names, metavar="NAME", default=names)
    parser.add_argument("--out", help="a JSON file for the results")
    args = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    torch.set_num_threads(1)
    files = find_photographs(args.photographs)
    if not files:
        raise InputError(f"`--photographs` has no .jpg or .png files: {args.photographs}")
    photographs = make_variants(files)
    rows = {}
    for name in args.libraries:
        start = time.perf_counter()
        rows[name] = compare(PREPROCESSORS[name](), photographs)
        gc.collect()
        print(f"{name}: {format_duration(time.perf_counter() - start)}", file=sys.stderr)
    speed = [measure_speed(shape) for shape in ((400, 600), (3000, 4000))]
    table = [{"library": name, **to_cells(found)} for name, found in rows.items()]
    print(format_table(table, COLUMNS, markdown=True))
    print(f"\n{' / '.join(FORMATS)}; {conditions(len(photographs))}\n")
    print(format_table(speed, SPEED_COLUMNS, markdown=True))
    print("\nTo 224 pixels of the shorter edge at 256, normalised; time of one core; median of 15.")
    if args.out:
        found = {"conditions": conditions(len(photographs)), "libraries": rows, "speed": speed}
        write_json(args.out, {**found, "photographs": list(photographs)})


if __name__ == "__main__":
    main()
