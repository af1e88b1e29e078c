import itertools
import os

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from keras_resnet.datasets import load_dataset
from keras_resnet.datasets.images import ImageFiles
from keras_resnet.datasets.tfds import data_root, keras_runs_on_tensorflow
from keras_resnet.utils.errors import InputError

NAMES = ["hat", "shoe"]
LABELS = [0, 1, 1, 0, 0, 1, 0, 1]


def images(shapes):
    """Images whose every pixel is 10 times their number, as TFDS's generators give them."""
    return [np.full(shape, 10 * i, np.uint8) for i, shape in enumerate(shapes)]


def store(root, name, shape, splits, *, label=None, image=None):
    """Writes a TFDS set; `splits` is {name: (images, labels)}."""
    features = {
        "image": image or tfds.features.Image(shape=shape),
        "label": label or tfds.features.ClassLabel(names=NAMES),
        "other": tfds.features.Text(),
    }
    return tfds.dataset_builders.store_as_tfds_dataset(
        name=name,
        version="1.2.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={
            split: [
                (i, {"image": image, "label": label, "other": "x"})
                for i, (image, label) in enumerate(zip(*examples, strict=True))
            ]
            for split, examples in splits.items()
        },
        data_dir=root,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    fixed = images([(6, 5, 3)] * 8)
    varying = images([(4 + i, 9 - i, 3) for i in range(8)])
    both = {"train": (fixed, LABELS), "test": (fixed[:3], LABELS[:3])}
    store(root, "fixed", (6, 5, 3), both)
    store(root, "varying", (None, None, 3), {"train": (varying, LABELS)})
    hidden = {"test": (fixed[:2], [-1, -1]), "validation": (fixed[:4], LABELS[:4])}
    store(root, "hidden", (6, 5, 3), {"train": (fixed, LABELS), **hidden})
    store(root, "trainless", (6, 5, 3), {"test": (fixed, LABELS)})
    store(root, "unlabelled", (6, 5, 3), {"train": (fixed, [-1] * 8)})
    number = tfds.features.Scalar(np.int64)
    store(root, "numbers", (6, 5, 3), {"train": (fixed, LABELS)}, label=number)
    deep = tfds.features.Image(shape=(6, 5, 1), dtype=np.uint16, encoding_format="png")
    sixteen = [np.zeros((6, 5, 1), np.uint16)] * 8
    store(root, "sixteen", None, {"train": (sixteen, LABELS)}, image=deep)
    return root


def load(root, name, **options):
    return load_dataset(f"tfds:{name}", data_dir=root, **options)


def error_of(root, name, **options):
    with pytest.raises(InputError) as caught:
        load(root, name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pairs(split):
    """(pixel, label) of every image, sorted: TFDS shuffles."""
    pixels = split.images[np.arange(len(split))][:, 0, 0, 0]
    return sorted(zip(pixels.tolist(), split.labels.tolist(), strict=True))


ALL_PAIRS = [(10 * i, label) for i, label in enumerate(LABELS)]


@pytest.mark.parametrize("name", ["fixed", "fixed:1.2.0"])
def test_images_of_one_shape_become_arrays(root, name):
    dataset = load(root, name)
    assert dataset.name == f"tfds:{name}"
    assert dataset.class_names == ("hat", "shoe")
    assert dataset.source == f"TFDS fixed/1.2.0 in {root / 'fixed' / '1.2.0'}"
    assert list(dataset.splits) == ["train", "test"]
    for split, wanted in zip(dataset.splits.values(), (ALL_PAIRS, ALL_PAIRS[:3]), strict=True):
        assert isinstance(split.images, np.ndarray)
        assert split.images.dtype == np.uint8
        assert split.images.shape == (len(wanted), 6, 5, 3)
        assert pairs(split) == wanted


def test_arrays_are_left_at_their_size(root):
    dataset = load(root, "fixed", image_size=20)
    assert dataset.image_shape == (6, 5, 3)
    assert "`channels` must be 3, as its images have, got 1" in error_of(root, "fixed", channels=1)


def test_images_of_varying_shapes_stay_encoded(root):
    assert "--image-size" in error_of(root, "varying")
    dataset = load(root, "varying", image_size=(4, 6), channels=1, validation_split=0.25)
    assert dataset.image_shape == (4, 6, 1)
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 6,
        "validation": 2,
    }
    assert all(isinstance(split.images, ImageFiles) for split in dataset.splits.values())
    # Uniform grey images: neither resizing nor the luma alters them.
    assert sorted(itertools.chain(*map(pairs, dataset.splits.values()))) == ALL_PAIRS
    assert sorted(dataset.splits["validation"].labels) == [0, 1]
    assert load(root, "varying", image_size=4).image_shape == (4, 4, 3)


def test_proportions_are_kept_and_images_not_enlarged(root):
    # Shorter edges of 4, 5, 6, 6, 5, 4, 3 and 2.
    dataset = load(root, "varying", image_size=20, resize="shorter_edge")
    assert dataset.image_shape == (4, 4, 3)
    assert {split.images.resize for split in dataset.splits.values()} == {"shorter_edge"}
    dataset = load(root, "varying", image_size=3, resize="shorter_edge")
    assert dataset.image_shape == (3, 3, 3)
    assert load(root, "fixed", image_size=3, resize="shorter_edge").image_shape == (6, 5, 3)


def test_validation_images_come_from_train_if_no_other_split_has_labels(root, tmp_path):
    arrays = images([(6, 5, 3)] * 8)
    store(tmp_path, "alone", (6, 5, 3), {"train": (arrays, LABELS)})
    dataset = load(tmp_path, "alone", validation_split=0.5)
    assert [len(split) for split in dataset.splits.values()] == [4, 4]
    assert sorted(itertools.chain(*map(pairs, dataset.splits.values()))) == ALL_PAIRS
    # The fingerprint does not depend on the fraction and the seed.
    assert load(tmp_path, "alone", seed=7).fingerprint == dataset.fingerprint


def test_a_test_split_without_labels_is_not_used(root):
    assert list(load(root, "hidden").splits) == ["train", "validation"]


@pytest.mark.parametrize("options", [{}, {"image_size": 4}])
def test_fingerprint_tells_sets_apart(root, tmp_path, options):
    name, shape = ("varying", (None, None, 3)) if options else ("fixed", (6, 5, 3))
    before = load(root, name, **options).fingerprint
    sized = [(6, 5, 3)] * 8 if not options else [(4 + i, 9 - i, 3) for i in range(8)]
    splits = {"train": (images(sized), LABELS)}
    if not options:
        splits["test"] = (images(sized)[:3], LABELS[:3])
    # The same examples, stored in another order.
    turned = {split: (a[::-1], b[::-1]) for split, (a, b) in splits.items()}
    store(tmp_path / "same", name, shape, turned)
    assert load(tmp_path / "same", name, **options).fingerprint == before
    altered = {**splits, "train": (splits["train"][0], [1 - LABELS[0], *LABELS[1:]])}
    store(tmp_path / "altered", name, shape, altered)
    assert load(tmp_path / "altered", name, **options).fingerprint != before


def test_sets_that_are_not_labelled_images(root):
    message = error_of(root, "numbers")
    assert "needs the features image (Image) and label (ClassLabel)" in message
    assert "image (Image), label (Scalar), other (Text)" in message
    assert "must be uint8" in error_of(root, "sixteen")
    assert "uint16 of shape (6, 5, 1)" in error_of(root, "sixteen")
    assert "needs a split called train, has test" in error_of(root, "trainless")
    assert "images without a label" in error_of(root, "unlabelled")


def test_jpeg_files_inside_a_set(tmp_path):
    for i in range(4):
        Image.new("RGB", (30 + i, 20), (i, i, i)).save(tmp_path / f"{i}.jpg")
    paths = [os.fspath(tmp_path / f"{i}.jpg") for i in range(4)]
    store(tmp_path, "jpegs", (None, None, 3), {"train": (paths, [0, 0, 1, 1])})
    dataset = load(tmp_path, "jpegs", image_size=8)
    sources = [s for split in dataset.splits.values() for s in split.images.sources]
    assert sorted(sources) == sorted((tmp_path / f"{i}.jpg").read_bytes() for i in range(4))


def test_a_damaged_folder_is_named(tmp_path):
    store(tmp_path, "torn", (6, 5, 3), {"train": (images([(6, 5, 3)] * 8), LABELS)})
    (record,) = (tmp_path / "torn" / "1.2.0").glob("*.tfrecord*")
    record.write_bytes(record.read_bytes()[:-20])
    assert f"{tmp_path / 'torn' / '1.2.0'}: the prepared TFDS folder is damaged" in error_of(
        tmp_path, "torn"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_set", "TensorFlow Datasets has no set of this name"),
        ("cifar10:9.9.9", "cannot be loaded at version 9.9.9"),
        ("cifar10/nothing", "BuilderConfig nothing not found"),
        ("a name!", "cannot be opened"),
    ],
)
def test_unknown_sets(tmp_path, name, message):
    assert message in error_of(tmp_path, name)


def test_a_download_that_fails(tmp_path, monkeypatch):
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
    (tmp_path / "kept").touch()
    message = error_of(tmp_path, "cifar10")
    assert f"tfds:cifar10 could not be downloaded and prepared in {tmp_path}: http" in message
    assert message.endswith("cannot be reached")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_data_root(monkeypatch, tmp_path):
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_root(None) == tmp_path / "tensorflow_datasets"
    assert data_root("~/here") == tmp_path / "here"
    monkeypatch.setenv("TFDS_DATA_DIR", "/elsewhere")
    assert str(data_root(None)) == "/elsewhere"


@pytest.mark.parametrize(
    ("variable", "file", "wanted"),
    [
        (None, None, True),
        ("jax", None, False),
        (None, '{"backend": "torch"}', False),
        ("tensorflow", '{"backend": "torch"}', True),
        (None, "damaged", True),
        (None, "[]", True),
    ],
)
def test_the_backend_that_keras_will_take(monkeypatch, tmp_path, variable, file, wanted):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    if variable:
        monkeypatch.setenv("KERAS_BACKEND", variable)
    if file:
        (tmp_path / "keras.json").write_text(file)
    assert keras_runs_on_tensorflow() == wanted
