"""Every command of the README and the guide: run here, or in `RUN_ELSEWHERE` with the place."""

import dataclasses
import os
import re
import shlex
import shutil

import hub as hubs
import keras
import numpy as np
import pytest
from conftest import run_main
from PIL import Image
from test_docs import PAGES, ROOT, commands

import keras_resnet
from keras_resnet import recipes
from keras_resnet.datasets import LOADERS, Loader
from keras_resnet.preprocessing import NORMALIZATIONS
from keras_resnet.weights import save_torch_weights

TIMM = "timm/resnet18.a1_in1k"
# A command, or its beginning -> where it is run, or why it is not.
RUN_ELSEWHERE = {
    "make": "CI runs `make test`; make demo, docs and notebooks take longer or change the checkout",
    "pip install": "`make test` installs the package",
    "pip download": "needs an index",
    "pytest": "this is pytest",
    "python3 -m venv": "`make test` makes an environment",
    ". .venv/bin/activate": "a shell's own command",
    "git clone": "needs the public repository",
    "keras-resnet launch": "tests/distribution/test_launch.py",
    # 8-bit files of a network with random weights are not within their tolerance.
    f"keras-resnet export {TIMM} --photos": "tests/weights/test_hub.py",
    "sbatch": "tests/distribution/test_launcher_files.py",
    "docker": "tests/distribution/test_launcher_files.py reads the Dockerfile",
    "kubectl": "tests/distribution/test_launcher_files.py reads the manifest",
    "python launchers/ray_train.py": "tests/distribution/test_launcher_files.py",
    "python benchmarks": "minutes to hours each",
    "python -m http.server": "serves until it is stopped; tests/exporters/test_web.py has a server",
    "python run_tflite.py": "tests/export/test_run_scripts.py",
    "touch LiteRT": "needs LiteRT's repository",
    "library=": "needs LiteRT's repository",
    "g++": "needs LiteRT's repository",
    "./run_litert": "needs LiteRT's repository",
}


def place(words):
    """Returns why a command is not run here; None for one that is."""
    line = shlex.join(words).replace("'", "")
    return next((why for start, why in RUN_ELSEWHERE.items() if line.startswith(start)), None)


def without_variables(words):
    """Returns a command without the variables before it."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return words


DOCUMENTED = {
    str(page.relative_to(ROOT)): [without_variables(words) for words in commands(page)]
    for page in PAGES
}


@pytest.mark.parametrize("page", DOCUMENTED)
def test_each_command_is_run_or_has_its_place(page):
    for words in DOCUMENTED[page]:
        assert words[0] == "keras-resnet" or place(words), shlex.join(words)


def test_the_places_exist():
    assert not any(place(["keras-resnet", name]) for name in ("train", "export", "predict"))
    for why in RUN_ELSEWHERE.values():
        for path in re.findall(r"tests/\S+\.py", why):
            assert (ROOT / path).exists()


# ----------------------------------------------------------------------------------------------
# The folder in which the commands run
# ----------------------------------------------------------------------------------------------


def write_images(folder, classes, each, size=40):
    """Writes images of stripes in class folders; the direction of the stripes is the class."""
    random = np.random.default_rng(0)
    places = np.mgrid[:size, : size + 4]
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(each):
            waves = np.sin(places[number % 2] * random.uniform(0.2, 2))[..., None]
            pixels = 128 + random.uniform(-100, 100, 3) * waves + random.normal(0, 8, waves.shape)
            path = folder / name / f"{index}.jpg"
            Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(path)


def train_own(folder):
    """Trains a network of normalized images without this package's training."""
    split = keras_resnet.load_dataset(f"folder:{folder}", image_size=32).splits["train"]
    mean, std = (np.array(NORMALIZATIONS["imagenet"][name]) for name in ("mean", "std"))
    images = (split.images[np.arange(len(split))] / 255 - mean) / std
    keras.utils.set_random_seed(0)
    network = keras_resnet.build_resnet("resnet20", (32, 32, 3), 2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    network.compile(keras.optimizers.Adam(1e-3), loss)
    network.fit(images, split.labels, batch_size=8, epochs=12, verbose=0)
    return network


def write_cifar10(folder):
    """Writes a prepared set of TensorFlow Datasets under the name of CIFAR-10."""
    import tensorflow_datasets as tfds

    random = np.random.default_rng(0)
    features = {
        "image": tfds.features.Image(shape=(32, 32, 3)),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    examples = [
        (index, {"image": random.integers(0, 256, (32, 32, 3), "uint8"), "label": index % 10})
        for index in range(60)
    ]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="cifar10",
        version="3.0.2",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples, "test": examples[:20]},
        data_dir=folder,
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything that the documented commands read."""
    folder = tmp_path_factory.mktemp("world")
    hubs.write_timm(folder / "hub", TIMM)
    write_cifar10(folder / "tfds")
    for name in ("photos", "flowers"):
        write_images(folder / name, ("cat", "dog"), 36)
    for name in ("holiday", "my_photos"):
        write_images(folder / name, ("2026",), 8)
    for name in ("shoe.jpg", "bag.png", "photo.jpg"):
        Image.open(folder / "photos" / "cat" / "0.jpg").save(folder / name)
    train_own(folder / "photos").save(folder / "my.keras")
    for name in ("resnet18", "resnet50"):
        network = keras_resnet.build_resnet(name, (32, 32, 3), 1000, variant="torchvision")
        save_torch_weights(network, folder / f"{name}.safetensors", "torchvision")
    return folder


@pytest.fixture
def run(world, fashion, tmp_path, monkeypatch):
    """Runs a command in a copy of the folder, by short recipes, on few images."""
    folder = tmp_path / "here"
    shutil.copytree(world, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    monkeypatch.setitem(LOADERS, "fashion_mnist", Loader(lambda: fashion, ()))
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "tfds"))
    for name, recipe in recipes.RECIPES.items():
        changes = {"epochs": 1, "image_size": min(32, recipe.image_size)}
        if name == "photos":  # an export needs a network that tells its images apart
            changes |= {"epochs": 8, "batch_size": 8}
        monkeypatch.setitem(recipes.RECIPES, name, dataclasses.replace(recipe, **changes))
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with hubs.serve(folder / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield run_main


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in DOCUMENTED if any(not place(words) for words in DOCUMENTED[page])]
)
def test_the_commands_of_a_page_run(page, run):
    # Pages continue the run of `make demo`; this one is shorter, and no worse.
    demo = ["train", "--recipe", "fast", "--weights", "fashion_mnist", "--run-dir", "runs/demo"]
    demo += ["--learning-rate", "1e-4"]
    before = [demo, ["export", "runs/demo"]] if page == "docs/predicting.md" else [demo]
    for words in before:
        done = run(*words)
        assert done.returncode == 0, done.stderr
    for words in DOCUMENTED[page]:
        if place(words):
            continue
        if "train" in words and "--run-dir" in words and "--resume" not in words:
            # The pages offer several ways to train into one folder.
            shutil.rmtree(words[words.index("--run-dir") + 1], ignore_errors=True)
        done = run(*words[1:])
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}\n{done.stdout[-2000:]}"
