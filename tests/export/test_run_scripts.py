"""The scripts for a device, run in an environment with their own requirements only."""

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_exports
from PIL import Image

from keras_resnet.evaluation.inference import load, predict_files
from keras_resnet.untrusted import checksums

pytestmark = pytest.mark.thorough

ROOT = Path(__file__).parents[2]
SUFFIXES = ("tflite", "onnx")
RUNTIME_PACKAGES = ("numpy", "pillow", "ai-edge-litert", "onnxruntime")


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory):
    """The interpreter of a virtual environment with the runtimes, and without TensorFlow."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    install += ["--no-compile"]
    install += ["--constraint", ROOT / "constraints.txt", *RUNTIME_PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        # Skipped where there is no index; where a change is checked nothing may go untested.
        stop = pytest.fail if os.environ.get("CI") else pytest.skip
        stop(f"cannot install {', '.join(RUNTIME_PACKAGES)}: {done.stderr.strip()[-200:]}")
    return python


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with one network as .keras, .tflite and .onnx, and with a batch of one."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_exports.build()
    tiny_exports.write(folder, model, tiny_exports.METADATA)
    single = tiny_exports.serving(model, batch=1)
    tiny_exports.save_tensorflow(single, folder / "saved_batch1")
    tflite, onnx = tiny_exports.to_tflite(folder / "saved_batch1"), tiny_exports.to_onnx(single)
    metadata = tiny_exports.METADATA
    (folder / "model-batch1.tflite").write_bytes(checksums.add_tflite_checksum(tflite, metadata))
    (folder / "model-batch1.onnx").write_bytes(checksums.add_onnx_checksum(onnx, metadata))
    return folder


@pytest.fixture(scope="session")
def run_script(bare_python, tmp_path_factory):
    """Runs the script for a model's suffix, from an empty folder."""
    folder = tmp_path_factory.mktemp("device")

    def run(model, *arguments, **environment):
        # -I: nothing of this checkout can be imported.
        script = ROOT / "export" / f"run_{model.suffix[1:]}.py"
        command = [bare_python, "-I", script, model, *map(str, arguments)]
        environment = {**os.environ, **environment}
        return subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=environment, timeout=60
        )

    return run


def answer(done):
    """Returns the JSON that a script printed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_same(rows, expected, bound=1e-5):
    """Holds a script's answers to others': files, labels and their order, probabilities."""
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert (row["image"], row["inverted"]) == (other["image"], other["inverted"])
        labels, others = row["labels"], other["labels"]
        assert [each["label"] for each in labels] == [each["label"] for each in others]
        found, wanted = ([each["probability"] for each in each_] for each_ in (labels, others))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("module", ["tensorflow", "keras", "keras_resnet", "onnx", "tf2onnx"])
def test_the_environment_has_only_what_the_scripts_ask_for(bare_python, module):
    done = subprocess.run([bare_python, "-I", "-c", f"import {module}"], capture_output=True)
    assert done.returncode == 1 and b"ModuleNotFoundError" in done.stderr


@pytest.fixture(scope="session")
def pictures(fashion, tmp_path_factory):
    """Real images as PNG files, and the same as an array."""
    folder = tmp_path_factory.mktemp("pictures")
    images = fashion.splits["test"].images[:12]
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image[..., 0]).save(path)
    return paths, images


def litert(path, images):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.allocate_tensors()
    answers = []
    for image in images:
        interpreter.set_tensor(taken["index"], image[None])
        interpreter.invoke()
        answers.append(interpreter.get_tensor(given["index"])[0])
    return np.array(answers)


def onnx_runtime(path, images):
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes())
    return np.array([session.run(None, {"image": image[None]})[0][0] for image in images])


@pytest.mark.parametrize("name", ["model", "model-batch1"])
@pytest.mark.parametrize(("suffix", "ask"), [("tflite", litert), ("onnx", onnx_runtime)])
def test_answers_are_those_of_the_runtime(run_script, models, pictures, name, suffix, ask):
    paths, images = pictures
    model = models / f"{name}.{suffix}"
    rows = answer(run_script(model, *paths, "--json", "--top", 10, "--invert", "no"))
    names = np.array(tiny_exports.METADATA["class_names"])
    for row, path, wanted in zip(rows, paths, ask(model, images), strict=True):
        best = np.argsort(-wanted, kind="stable")
        assert row["image"] == str(path) and row["inverted"] is False
        assert [each["label"] for each in row["labels"]] == names[best].tolist()
        found = [each["probability"] for each in row["labels"]]
        np.testing.assert_allclose(found, wanted[best], rtol=0, atol=1e-6)


def save_turned(image, path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90°
    image.save(path, exif=exif)


def save_with_broken_exif(image, path):
    entry = struct.pack("<HHLLHHLHH", 0x0102, 4, 1, 100_000, 0x0112, 3, 1, 6, 0)
    image.save(path, exif=b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + entry + bytes(4))


def save_transparent(image, path):
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(path)


# Name of an unusual file -> function that saves an RGB image to it.
ODD_FILES = {
    "colour.jpg": lambda image, path: image.save(path),
    "turned.jpg": save_turned,
    "broken_exif.jpg": save_with_broken_exif,
    "float.tiff": lambda image, path: Image.fromarray(
        np.asarray(image.convert("L")).astype("float32") / 255
    ).save(path),
    "transparent.png": save_transparent,
    "palette.gif": lambda image, path: image.convert("P").save(path),
    "sixteen.png": lambda image, path: Image.fromarray(
        np.asarray(image.convert("L")).astype("uint16") * 257
    ).save(path),
    "black_white.png": lambda image, path: image.convert("1").save(path),
    "light.png": lambda image, path: Image.eval(image, lambda level: 255 - level).save(path),
    "cmyk.tiff": lambda image, path: image.convert("CMYK").save(path),
}


@pytest.fixture(scope="session")
def odd_files(pictures, tmp_path_factory):
    """A real image, larger and in colour, in files of many kinds."""
    folder = tmp_path_factory.mktemp("odd")
    _, images = pictures
    planes = [Image.fromarray(images[index, ..., 0]).resize((61, 45)) for index in (0, 1, 2)]
    for name, save in ODD_FILES.items():
        save(Image.merge("RGB", planes), folder / name)
    return [folder / name for name in ODD_FILES]


@pytest.mark.parametrize("invert", ["auto", "yes", "no"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_answers_are_those_of_predict(run_script, models, odd_files, suffix, invert):
    done = run_script(models / f"model.{suffix}", *odd_files, "--json", "--invert", invert)
    expected = predict_files(models / "model.keras", odd_files, invert=invert)
    assert_same(answer(done), expected)
    if invert == "auto":
        inverted = {row["inverted"] for row in expected}
        assert inverted == {True, False}  # or nothing was decided


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_lines_are_image_label_and_probability(run_script, models, pictures, suffix):
    paths, _ = pictures
    done = run_script(models / f"model.{suffix}", *paths[:2], "--top", 2, "--threads", 1)
    rows = predict_files(models / "model.keras", paths[:2], top=2)
    expected = [(row["image"], label) for row in rows for label in row["labels"]]
    for line, (image, label) in zip(done.stdout.splitlines(), expected, strict=True):
        assert line.rsplit("  ", 1)[0] == f"{image}  {label['label']}"
        assert float(line.rsplit("  ", 1)[1]) == pytest.approx(label["probability"], abs=1e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_model_without_names_numbers_its_classes(run_script, models, pictures, tmp_path, suffix):
    add = {"tflite": checksums.add_tflite_checksum, "onnx": checksums.add_onnx_checksum}[suffix]
    model = tmp_path / f"model.{suffix}"
    model.write_bytes(add((models / f"foreign.{suffix}").read_bytes(), {}))
    (row,) = answer(run_script(model, pictures[0][0], "--json"))
    (named,) = predict_files(models / "model.keras", pictures[0][:1], invert="no")
    numbered = [each["label"].replace("name", "class") for each in named["labels"]]
    assert [each["label"] for each in row["labels"]] == numbered


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


DAMAGES = {
    "a bit flipped": flip_a_bit,
    "cut": lambda content: content[: len(content) * 2 // 3],
    "its end cut": lambda content: content[:-1],
    "empty": lambda content: b"",
    "text": lambda content: b"not a model",
}


def assert_refused(done, path):
    assert done.returncode == 2 and done.stdout == ""
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("run_"))
    assert str(path) in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_model_is_refused(run_script, models, pictures, tmp_path, suffix, damage):
    model = tmp_path / f"model.{suffix}"
    model.write_bytes(DAMAGES[damage]((models / f"model.{suffix}").read_bytes()))
    assert_refused(run_script(model, pictures[0][0]), model)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_is_missing_or_no_image_or_without_checksum_is_refused(
    run_script, models, pictures, tmp_path, suffix
):
    model, image = models / f"model.{suffix}", pictures[0][0]
    missing_model, unchecked = tmp_path / f"none.{suffix}", models / f"foreign.{suffix}"
    text = tmp_path / "text.png"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(image.read_bytes()[:100])
    for bad in (missing_model, unchecked):
        assert_refused(run_script(bad, image), bad)
    bad_images = (tmp_path / "none.png", text, cut, tmp_path)
    # Where one of many is bad, the others are named.
    done = run_script(model, *bad_images, image)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stdout == run_script(model, image).stdout != ""
    complaints = [line for line in done.stderr.splitlines() if line.startswith("run_")]
    for bad, line in zip(bad_images, complaints, strict=True):
        assert str(bad) in line
    assert_refused(run_script(model, text), text)
    # A program that reads JSON gets JSON.
    assert run_script(model, text, "--json").stdout == "[]\n"


def test_both_scripts_share_all_but_the_runtime():
    texts = [(ROOT / "export" / f"run_{suffix}.py").read_text() for suffix in SUFFIXES]
    shared = [text[text.index("class BadInput") :] for text in texts]
    assert shared[0].replace("MODEL.tflite", "MODEL.onnx") == shared[1]


def test_the_python_of_the_device_page_gives_the_same_probabilities(models, bare_python):
    text = (ROOT / "docs" / "device.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert "model-int8-batch1.tflite" in block
    block = block.replace("model-int8-batch1.tflite", str(models / "model-batch1.tflite"))
    path = models / "model.tflite"
    names, (height, width, channels) = tiny_exports.METADATA["class_names"], tiny_exports.SHAPE
    image = np.random.default_rng(0).integers(0, 256, (1, height, width, channels), "uint8")
    np.save(models / "image.npy", image)
    lines = [
        "import json, numpy as np",
        f"image, class_names = np.load({str(models / 'image.npy')!r}), {list(names)!r}",
        block,
        "print(json.dumps([float(each) for each in probabilities]))",
    ]
    done = subprocess.run(
        [bare_python, "-I", "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    expected = load(path, trust=True)(image)
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), expected[0], atol=1e-5)
