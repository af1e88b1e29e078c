import gzip
import shutil
import time

import numpy as np
import pytest

from keras_resnet.datasets import fashion_mnist, load_dataset
from keras_resnet.datasets.base import fingerprint_arrays
from keras_resnet.datasets.fashion_mnist import CLASS_NAMES, FINGERPRINT, NAME, SHA256
from keras_resnet.utils.errors import InputError

# The time in the gzip header of the official files; the file's name stands there too.
OFFICIAL_TIME = {"train": 1504176606, "t10k": 1504176627}
IMAGES = "train-images-idx3-ubyte"
LABELS = "t10k-labels-idx1-ubyte"


@pytest.fixture(autouse=True)
def no_other_places(tmp_path, monkeypatch):
    """Hides the data sets of this machine from the tests."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "no tfds"))
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "no keras"))


@pytest.fixture(scope="module")
def prepared(idx_folder, tmp_path_factory):
    """A data folder in which TFDS's own builder has prepared Fashion-MNIST."""
    import tensorflow_datasets as tfds

    manual = tmp_path_factory.mktemp("manual")
    for name in SHA256:
        packed = (idx_folder / f"{name}.gz").read_bytes()
        # TFDS checks the digest of the .gz. Debian's differ from the official files in the
        # header: flags, time and name.
        stamp = OFFICIAL_TIME[name.split("-")[0]].to_bytes(4, "little")
        header = packed[:3] + b"\x08" + stamp + packed[8:10] + name.encode() + b"\0"
        (manual / f"{name}.gz").write_bytes(header + packed[10:])
    root = tmp_path_factory.mktemp("tfds")
    builder = tfds.builder(NAME, data_dir=root)
    config = tfds.download.DownloadConfig(manual_dir=manual, try_download_gcs=False)
    builder.download_and_prepare(download_config=config)
    return root


@pytest.fixture
def linked(idx_folder, tmp_path):
    """A folder with links to the four files; tests replace one."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in SHA256:
        (folder / f"{name}.gz").symlink_to(idx_folder / f"{name}.gz")
    return folder


def replace(folder, name, raw):
    (folder / f"{name}.gz").unlink()
    (folder / f"{name}.gz").write_bytes(raw)


def error_of(**options):
    with pytest.raises(InputError) as caught:
        load_dataset(NAME, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_idx_files_of_debian(idx_folder):
    dataset = load_dataset()
    assert dataset.name == NAME
    assert dataset.class_names == CLASS_NAMES
    assert dataset.source == f"IDX files in {idx_folder}"
    assert dataset.evaluation_split == "test"
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert train.images.shape == (60000, 28, 28, 1)
    assert test.images.shape == (10000, 28, 28, 1)
    assert train.images.dtype == test.images.dtype == np.uint8
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    # The first images: an ankle boot and a T-shirt in train, an ankle boot in test.
    assert (train.labels[:2].tolist(), test.labels[0]) == ([9, 0], 9)


def test_the_pinned_fingerprint_is_that_of_the_verified_files(idx_folder):
    dataset = load_dataset()
    assert fingerprint_arrays(*dataset.splits.values()) == FINGERPRINT == dataset.fingerprint


@pytest.mark.parametrize("subfolder", fashion_mnist.IDX_SUBFOLDERS)
def test_data_dir_and_its_subfolders(linked, tmp_path, subfolder):
    place = tmp_path / "given" / subfolder
    place.parent.mkdir(parents=True, exist_ok=True)
    linked.rename(place)
    assert load_dataset(data_dir=str(tmp_path / "given")).source == f"IDX files in {place}"


def test_unpacked_files(linked, idx_folder):
    for name in SHA256:
        raw = gzip.decompress((idx_folder / f"{name}.gz").read_bytes())
        (linked / f"{name}.gz").unlink()
        (linked / name).write_bytes(raw)
    assert load_dataset(data_dir=linked).fingerprint == FINGERPRINT


def test_a_missing_file_is_named(linked):
    (linked / f"{LABELS}.gz").unlink()
    message = error_of(data_dir=linked)
    assert f"{linked}: {LABELS} (plain or .gz) missing" in message


def test_a_data_dir_without_anything(tmp_path):
    message = error_of(data_dir=tmp_path)
    assert str(tmp_path) in message
    for name in (*SHA256, "dataset_info.json", "FashionMNIST/raw"):
        assert name in message
    assert "nowhere" in error_of(data_dir=tmp_path / "nowhere")


def test_a_truncated_file(linked, idx_folder):
    replace(linked, IMAGES, (idx_folder / f"{IMAGES}.gz").read_bytes()[:1_000_000])
    assert f"{IMAGES}.gz: the gzip file is cut short" in error_of(data_dir=linked)


def test_an_image_file_where_labels_belong(linked, idx_folder):
    replace(linked, LABELS, (idx_folder / "t10k-images-idx3-ubyte.gz").read_bytes())
    message = error_of(data_dir=linked)
    assert f"{LABELS}.gz: not an IDX file of 1-dimensional bytes" in message


def test_the_training_labels_where_test_labels_belong(linked, idx_folder):
    replace(linked, LABELS, (idx_folder / "train-labels-idx1-ubyte.gz").read_bytes())
    assert "must hold 10000 items, the header says 60000" in error_of(data_dir=linked)


@pytest.mark.parametrize(
    ("label", "message"), [(10, "must be in 0–9, got 10 at item 5"), (0, "before 2017-08-31")]
)
def test_altered_labels(linked, idx_folder, label, message):
    raw = bytearray(gzip.decompress((idx_folder / f"{LABELS}.gz").read_bytes()))
    assert raw[8 + 5] != label
    raw[8 + 5] = label
    replace(linked, LABELS, gzip.compress(raw, 1))
    assert message in error_of(data_dir=linked)


def test_channels(linked):
    assert load_dataset(channels=1, data_dir=linked).image_shape == (28, 28, 1)
    assert "`channels` must be 1" in error_of(channels=3)


@pytest.mark.slow
def test_a_prepared_tfds_folder(prepared):
    dataset = load_dataset(data_dir=prepared)
    assert dataset.source == f"prepared TFDS folder {prepared / NAME / '3.0.1'}"
    assert dataset.image_shape == (28, 28, 1)
    assert dataset.class_names == CLASS_NAMES
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 60_000,
        "test": 10_000,
    }
    # Computed from the arrays: the pinned one would say nothing.
    assert fingerprint_arrays(*dataset.splits.values()) == FINGERPRINT == dataset.fingerprint


@pytest.mark.slow
def test_the_backend_decides_which_comes_first(prepared, linked, monkeypatch):
    (linked / NAME).symlink_to(prepared / NAME)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    assert load_dataset(data_dir=linked).source.startswith("IDX files")
    # The folder comes from the environment; the argument overrules the backend.
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))
    assert load_dataset().source.startswith("IDX files")
    assert load_dataset(prefer_tensorflow=True).source.startswith("prepared TFDS")


@pytest.mark.slow
def test_a_truncated_tfrecord(prepared, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(prepared / NAME, root / NAME)
    (record,) = (root / NAME / "3.0.1").glob("*train.tfrecord*")
    with open(record, "r+b") as file:
        file.truncate(1_000_000)
    message = error_of(data_dir=root)
    assert f"{root / NAME / '3.0.1'}: the prepared TFDS folder is damaged" in message


@pytest.mark.slow
def test_a_damaged_description(prepared, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(prepared / NAME, root / NAME)
    (root / NAME / "3.0.1" / "dataset_info.json").write_text('{"name": ')
    assert f"{root / NAME / '3.0.1'}: the prepared TFDS folder is damaged" in error_of(
        data_dir=root
    )


def test_half_prepared_folders_are_not_taken(linked):
    (linked / NAME / "3.0.1").mkdir(parents=True)
    unfinished = linked / NAME / "incomplete.ABCDEF_3.0.1"
    unfinished.mkdir()
    (unfinished / "dataset_info.json").write_text("{}")
    assert load_dataset(data_dir=linked).source == f"IDX files in {linked}"


def test_another_set_under_the_name(tmp_path, monkeypatch):
    import tensorflow_datasets as tfds

    examples = [(i, {"image": np.zeros((28, 28, 1), np.uint8), "label": 0}) for i in range(4)]
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(28, 28, 1)),
            "label": tfds.features.ClassLabel(names=CLASS_NAMES),
        }
    )
    tfds.dataset_builders.store_as_tfds_dataset(
        name=NAME,
        version="3.0.1",
        features=features,
        split_datasets={"train": examples, "test": examples},
        data_dir=tmp_path,
    )
    assert "the train split must hold 60000 images, found 4" in error_of(data_dir=tmp_path)
    monkeypatch.setattr(fashion_mnist, "COUNTS", {"train": 4, "test": 4})
    assert f"expected fingerprint {FINGERPRINT}, got " in error_of(data_dir=tmp_path)


def test_a_download_that_fails_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, capfd, caplog):
    root = tmp_path / "tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nothing")
    # Nothing listens there: the download fails on a machine with network as well.
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
    start = time.monotonic()
    message = error_of()
    # With TFDS's own number of retries it is 200 seconds.
    assert time.monotonic() - start < 60
    assert "was not found on this machine" in message
    assert "ubyte.gz cannot be reached; install Debian's package dataset-fashion-mnist" in message
    assert "--data-dir" in message
    assert not root.exists()
    assert capfd.readouterr().out == ""
    assert "Retrying" not in caplog.text
