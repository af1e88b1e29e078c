"""The blocks, models and preprocessing on TensorFlow, JAX and PyTorch, and what an import costs.

Keras chooses its backend when it is imported, so that each backend needs a process of its own.
"""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from conftest import backend_environment

from keras_resnet.models import Spec, build_resnet
from keras_resnet.preprocessing import ImagePreprocessing, with_preprocessing

pytestmark = pytest.mark.thorough


def run_python(code, *arguments, backend="tensorflow"):
    """Returns what `code` prints in a new process with Keras on `backend`."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=backend_environment(backend),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# The model comes from TensorFlow; `import keras_resnet` is all it takes to load it. It must not
# matter that the layers' class names were never mentioned.
LOAD_AND_TRAIN = """
import sys
import keras
import keras_resnet
import numpy as np

folder = sys.argv[1]
images, labels = np.load(f"{folder}/images.npy"), np.load(f"{folder}/labels.npy")
model = keras.models.load_model(f"{folder}/model.keras")
logits = keras.ops.convert_to_numpy(model(images))
again = keras.ops.convert_to_numpy(model(images, training=False))
np.testing.assert_array_equal(logits, again)
np.save(f"{folder}/{keras.config.backend()}.npy", logits)

resize = {"resize": "shorter_edge", "crop_pct": 0.7, "antialias": True, "std": 1 / 255}
levels = keras_resnet.ImagePreprocessing(24, **resize)(images)
levels = np.round(keras.ops.convert_to_numpy(levels))
np.testing.assert_array_equal(levels, np.load(f"{folder}/levels.npy"))

before = [keras.ops.convert_to_numpy(w) for w in model.weights]
model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
assert np.isfinite(model.train_on_batch(images, labels))
for old, weight in zip(before, model.weights):
    # A bias in front of a BatchNormalization has no gradient: the mean takes it off again.
    if not weight.path.endswith("bias") and "seed" not in weight.path:
        change = np.abs(keras.ops.convert_to_numpy(weight) - old).max()
        assert change > 0, f"{weight.path} did not move"

dense = keras_resnet.build_dense_resnet(num_blocks=3)
dense.compile("sgd", "mse")
x = np.ones((4, 12), "float32")
losses = [dense.train_on_batch(x, np.ones((4, 8), "float32")) for _ in range(3)]
assert losses[-1] < losses[0], losses
assert dense(x).shape == (4, 8)

assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a saved classifier, images, and TensorFlow's logits for them."""
    folder = tmp_path_factory.mktemp("backends")
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    network = build_resnet(Spec((1, 1), (4, 8)), (24, 24, 1))
    model = with_preprocessing(network, (None, None, 1), ["flip", "shift", "erase"], 0.3, 0.4)
    for weight in network.weights:  # as after training: moving statistics are not 0 and 1
        weight.assign(weight + rng.uniform(0, 0.3, weight.shape))
    images = rng.integers(0, 256, size=(6, 28, 28, 1)).astype("uint8")
    model.save(folder / "model.keras")
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", np.arange(6))
    np.save(folder / "tensorflow.npy", model(images))
    resize = {"resize": "shorter_edge", "crop_pct": 0.7, "antialias": True, "std": 1 / 255}
    np.save(folder / "levels.npy", np.round(ImagePreprocessing(24, **resize)(images)))
    return folder


@pytest.mark.parametrize("backend", [pytest.param("jax", marks=pytest.mark.slow), "torch"])
def test_one_file_gives_the_same_logits_and_trains_without_tensorflow(folder, backend):
    if not os.environ.get("CI"):  # where a change is checked all backends are there
        pytest.importorskip(backend)
    run_python(LOAD_AND_TRAIN, folder, backend=backend)
    expected, logits = np.load(folder / "tensorflow.npy"), np.load(folder / f"{backend}.npy")
    assert np.abs(expected).max() > 1e-2
    assert np.abs(logits - expected).max() / np.abs(expected).max() < 1e-5


IMPORTED = """
import sys
import keras
before = set(sys.modules)
import keras_resnet
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_import_brings_nothing_but_keras():
    """`benchmarks/startup.py` measures what that takes."""
    modules = set(run_python(IMPORTED, backend="torch").split())
    assert "keras_resnet" in modules
    assert modules <= {"keras_resnet", "keras", *sys.stdlib_module_names}


def test_the_package_imports_no_keras():
    """So that `keras-resnet --help` and the processes of `runtimes.remote` start without it."""
    code = "import keras_resnet, keras_resnet.cli, keras_resnet.runtimes"
    assert run_python(f"import sys; {code}; print('keras' in sys.modules)").strip() == "False"


SLOW = pytest.mark.slow


# `LOAD_AND_TRAIN` imports Keras first.
@pytest.mark.parametrize(
    "imports",
    [
        "import keras_resnet; import keras",
        "from keras_resnet import ResidualBlock; import keras",
        pytest.param("from keras_resnet import Augmentation; import keras", marks=SLOW),
        pytest.param("from keras_resnet import build_resnet18; import keras", marks=SLOW),
        pytest.param("import keras_resnet; from keras import layers; import keras", marks=SLOW),
    ],
)
def test_layers_are_registered_whatever_is_imported_first(folder, imports):
    load = "print(keras.models.load_model(sys.argv[1]).count_params())"
    printed = run_python(f"import sys; {imports}; {load}", folder / "model.keras", backend="torch")
    assert int(printed) > 0
