"""Fashion-MNIST from a prepared TFDS folder, from IDX files, or by a download; always verified."""

import re
from pathlib import Path

from keras_resnet.datasets import tfds
from keras_resnet.datasets.base import Dataset, Split, fingerprint_arrays
from keras_resnet.datasets.idx import find_idx, read_idx
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.files import expand_user

NAME = "fashion_mnist"
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
COUNTS = {"train": 60_000, "test": 10_000}
IMAGE_SHAPE = (28, 28, 1)

# split -> (images, labels)
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
# file -> sha256 of the unpacked official file of 2017-08-31
SHA256 = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
# `fingerprint_arrays` of the four files above. TFDS stores the examples shuffled.
FINGERPRINT = "9d3039fec28d7705de3d683abc74850dbb9866df3e00d09af1e80c0540f54c6c"

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# The folder itself, torchvision's layout, and the name of Debian's folder.
IDX_SUBFOLDERS = ("", "FashionMNIST/raw", "fashion-mnist")
ADVICE = (
    "install Debian's package dataset-fashion-mnist, or put the four IDX files "
    f"({', '.join(SHA256)}, each may end in .gz) in a folder and give it as --data-dir"
)


def load_fashion_mnist(*, data_dir=None, channels=None, prefer_tensorflow=None):
    """Loads Fashion-MNIST: 60,000 training and 10,000 test images.

    The sources in their order: a folder that TFDS prepared, IDX files (in `data_dir`, else in the
    folder of Debian's package), a download by TFDS. With `data_dir` no other folder is searched
    and nothing is downloaded.

    Args:
        data_dir: The folder with `fashion_mnist/3.0.1` (TFDS) or with the IDX files.
        channels: None or 1: the images are grey.
        prefer_tensorflow: Whether to prefer a TFDS folder, which needs TensorFlow, to IDX files;
            by default if Keras's backend is TensorFlow.

    Returns:
        A `Dataset` of uint8 arrays, [60000, 28, 28, 1] and [10000, 28, 28, 1].

    Raises:
        InputError: Nothing was found, or it is damaged, or it is not the official release of
            2017-08-31.
    """
    if channels not in (None, 1):
        raise InputError(f"`channels` must be 1 for {NAME}, whose images are grey, got {channels}")
    if prefer_tensorflow is None:
        prefer_tensorflow = tfds.keras_runs_on_tensorflow()
    finders = [_find_prepared, _find_idx_folder]
    # Reading a TFDS folder imports TensorFlow, which training on JAX or PyTorch does not need.
    if not prefer_tensorflow:
        finders.reverse()
    for find in finders:
        dataset = find(data_dir)
        if dataset:
            return dataset
    if data_dir is not None:
        raise InputError(
            f"{data_dir}: holds neither {NAME}/VERSION/dataset_info.json (a folder prepared by "
            f"TFDS) nor the IDX files {', '.join(SHA256)} (plain or .gz), there or in "
            f"{' or '.join(filter(None, IDX_SUBFOLDERS))}"
        )
    return _download()


def _find_prepared(data_dir):
    """Returns the `Dataset` of a folder that TFDS prepared, or None if there is none."""
    folders = [
        path.parent
        for path in (tfds.data_root(data_dir) / NAME).glob("*/dataset_info.json")
        # A killed preparation leaves "incomplete.XXXXXX_3.0.1".
        if re.fullmatch(r"\d+\.\d+\.\d+", path.parent.name)
    ]
    if not folders:
        return None
    newest = max(folders, key=lambda folder: [int(part) for part in folder.name.split(".")])
    return _from_tfds(newest, f"prepared TFDS folder {newest}")


def _find_idx_folder(data_dir):
    """Returns the `Dataset` of the folder with the most IDX files, or None if there is none."""
    if data_dir is None:
        folders = [DEBIAN_FOLDER]
    else:
        folders = [expand_user(data_dir) / name for name in IDX_SUBFOLDERS]
    present = {folder: [name for name in SHA256 if find_idx(folder, name)] for folder in folders}
    folder = max(folders, key=lambda folder: len(present[folder]))
    if not present[folder]:
        return None
    missing = [name for name in SHA256 if name not in present[folder]]
    if missing:
        raise InputError(f"{folder}: {' and '.join(missing)} (plain or .gz) missing; {ADVICE}")
    return Dataset(
        name=NAME,
        class_names=CLASS_NAMES,
        splits={split: _read_split(folder, split) for split in COUNTS},
        source=f"IDX files in {folder}",
        # The four checksums were verified, so it need not be computed.
        fingerprint=FINGERPRINT,
    )


def _read_split(folder, split):
    count, (images, labels) = COUNTS[split], IDX_FILES[split]
    return Split(
        _read_file(folder, images, (count, *IMAGE_SHAPE[:2]), 256).reshape(count, *IMAGE_SHAPE),
        _read_file(folder, labels, (count,), len(CLASS_NAMES)).astype("int64"),
    )


def _read_file(folder, name, shape, values):
    return read_idx(
        find_idx(folder, name),
        shape,
        values=values,
        sha256=SHA256[name],
        advice=(
            "; it was altered, or it is from before 2017-08-31, when train and test shared images; "
            "install Debian's package dataset-fashion-mnist or take the present files"
        ),
    )


def _download():
    root = tfds.data_root(None)
    try:
        builder = tfds.prepare(NAME, root)
    except InputError as error:
        raise InputError(f"{NAME} was not found on this machine, and {error}; {ADVICE}") from error
    return _from_tfds(builder.data_dir, f"downloaded by TFDS to {builder.data_dir}")


def _from_tfds(folder, source):
    """Returns the `Dataset` of a prepared TFDS folder, after comparing its fingerprint."""
    builder = tfds.open_prepared(folder)
    tfds.check_features(builder)
    splits = {}
    for name, count in COUNTS.items():
        found = builder.info.splits[name].num_examples if name in builder.info.splits else 0
        if found != count:
            raise InputError(f"{folder}: the {name} split must hold {count} images, found {found}")
        splits[name] = tfds.read_arrays(builder, name)
    found = fingerprint_arrays(*splits.values())
    if found != FINGERPRINT:
        raise InputError(
            f"{folder}: is not Fashion-MNIST as it is since 2017-08-31: expected fingerprint "
            f"{FINGERPRINT}, got {found}; remove the folder and {ADVICE}"
        )
    return Dataset(NAME, CLASS_NAMES, splits, source, FINGERPRINT)
