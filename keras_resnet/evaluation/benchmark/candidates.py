"""The candidates of a benchmark: the files of an export, Keras, and the d2l network in PyTorch."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import keras
import numpy as np

from keras_resnet import archive
from keras_resnet.blocks import ResidualBlock
from keras_resnet.formats import EXPORTED
from keras_resnet.models import STEMS
from keras_resnet.preprocessing import ImagePreprocessing
from keras_resnet.untrusted.manifest import check_listed, digest
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.weights import torch_state_dict

# Name -> whether the channels come last in memory. The first is PyTorch's default.
TORCH_LAYOUTS = {"PyTorch eager": False, "PyTorch eager, channels last": True}

_BLOCK = re.compile(r"stage(\d+)_block(\d+)$")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of the benchmark.

    Attributes:
        name: Its name in the table.
        format: A row of `worker.RUNTIMES`.
        precision: The type of its weights.
        batch: How many images it takes at a time; None is any number.
        path: The file or folder.
        bytes: Its size on disk.
        accuracy: On the test images of the export; None where it was not measured.
        options: Further arguments of the function that opens it in the worker.
    """

    name: str
    format: str
    precision: str
    batch: int | None
    path: Path
    bytes: int
    accuracy: float | None
    options: dict = dataclasses.field(default_factory=dict)


def find_all(folder, manifest, scratch, torch, trust):
    """Returns all candidates, and the reasons why others are left out.

    Args:
        folder: The export's folder.
        manifest: The result of `read_manifest`.
        scratch: A folder for PyTorch's weights.
        torch: Whether to include PyTorch.
        trust: Whether to include SavedModels, which can run code.

    Returns:
        A list of `Candidate`s, and a list of dicts with "name" and "reason".

    Raises:
        InputError: If an artifact is not as the manifest says, of an unknown format, or takes no
            images.
    """
    found, left_out = [], []
    for artifact in manifest["artifacts"]:
        candidate = _find_artifact(folder, artifact)
        if EXPORTED[candidate.format].runs_code and not trust:
            reason = "a SavedModel can run code when it is loaded: pass --trust"
            left_out.append({"name": candidate.name, "reason": reason})
        else:
            found.append(candidate)
    try:
        source = _find_keras(folder, manifest)
    except InputError as error:
        reason = one_line(error)  # PyTorch takes the weights of the Keras model
        names = ("Keras", "PyTorch eager")
        return found, left_out + [{"name": name, "reason": reason} for name in names]
    found.append(source)
    if torch:
        try:
            found += find_torch(source, scratch)
        except InputError as error:
            left_out.append({"name": "PyTorch eager", "reason": one_line(error)})
    return found, left_out


def _find_artifact(folder, artifact):
    path = folder / artifact["file"]
    check_listed(path)
    if artifact["format"] not in EXPORTED:
        raise InputError(
            f"{path}: the format must be one of {', '.join(EXPORTED)}, got {artifact['format']!r}"
        )
    if artifact["input"]["dtype"] != "uint8":
        raise InputError(
            f"{path}: the input must be uint8 images, got {artifact['input']['dtype']}: export the "
            "model with its preprocessing"
        )
    same = {name: artifact[name] for name in ("format", "precision", "batch", "bytes", "accuracy")}
    return Candidate(path.name, path=path.resolve(), **same)


def _find_keras(folder, manifest):
    """Returns the Keras model that an export was made from."""
    if not manifest["source"]["path"]:
        raise InputError("the export was made from a model in memory")
    recorded = Path(manifest["source"]["path"])
    # A run folder that was moved is found through its export.
    for path in (recorded, folder.resolve().parent / recorded.name):
        if path.is_file() and digest(path)[1] == manifest["source"]["sha256"]:
            accuracy, size = manifest["keras"]["accuracy"], path.stat().st_size
            # The precision in which it computes is known only after loading.
            return Candidate(path.name, "keras", "float32", None, path.resolve(), size, accuracy)
    raise InputError(f"{recorded}: is missing, or was changed after the export")


def find_torch(source, folder):
    """Returns the network of Dive into Deep Learning in PyTorch with a Keras model's weights.

    Args:
        source: The Keras model, a `Candidate`.
        folder: Where to put its weights.

    Returns:
        A `Candidate` for each row of `TORCH_LAYOUTS`.

    Raises:
        InputError: If PyTorch is missing, or the book has no such network.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError("PyTorch is not installed")
    model = archive.load_model(source.path)
    options = describe_d2l_network(model)
    state = torch_state_dict(model.layers[-1], "d2l_named")
    path = Path(folder) / "weights.npz"
    np.savez(path, **state)
    size = sum(array.nbytes for array in state.values())
    return [
        Candidate(
            name,
            *("torch", "float32", None, path, size, source.accuracy),
            {**options, "channels_last": channels_last},
        )
        for name, channels_last in TORCH_LAYOUTS.items()
    ]


# What `torch_network` repeats of `ImagePreprocessing`.
_RESIZING = {"resize": "squash", "crop_pct": 1, "interpolation": "bilinear", "antialias": False}


def describe_d2l_network(model):
    """Returns the arguments with which `torch_network.load` builds a Keras model's network.

    Args:
        model: A model of raw images, as `with_preprocessing` makes.

    Returns:
        A dict that JSON can hold.

    Raises:
        InputError: If Dive into Deep Learning (d2l) has no such network.

    Example:
        >>> from keras_resnet import Spec, build_resnet, with_preprocessing
        >>> network = build_resnet(Spec((1, 1), (8, 16)), (28, 28, 1))
        >>> found = describe_d2l_network(with_preprocessing(network, (28, 28, 1)))
        >>> found["stages"], found["image_size"]
        ([[(8, 1, False)], [(16, 2, True)]], 28)
    """
    first = [layer for layer in model.layers if isinstance(layer, ImagePreprocessing)]
    network = model.layers[-1]
    if len(first) != 1 or not isinstance(network, keras.Model):
        raise InputError("the model must be preprocessing and a network of `build_resnet`")
    preprocessing = first[0]
    layers = {layer.name: layer for layer in network.layers}
    blocks = {match: layers[match.string] for match in map(_BLOCK.match, layers) if match}
    stem = STEMS["imagenet"].convolutions[0][0]
    rules = {
        "basic blocks alone": all(
            type(block) is ResidualBlock and block.se_reduction is block.shortcut_pool is None
            for block in blocks.values()
        ),
        "the 7×7 stem": "stem_pool" in layers
        and getattr(layers.get("stem_conv"), "kernel_size", None) == (stem, stem),
        "logits at its end": network.layers[-1].name == "logits",
        "images of as many channels as it takes": model.input_shape[-1] == preprocessing.channels
        and not preprocessing.reverse_channels,
        "images resized as `ImagePreprocessing` does by default": all(
            getattr(preprocessing, name) == value for name, value in _RESIZING.items()
        ),
    }
    for rule, kept in rules.items():
        if not kept:
            raise InputError(
                f"a network of Dive into Deep Learning (d2l) has {rule}, this model has not"
            )
    stages = {}
    for match, block in blocks.items():
        stage = stages.setdefault(int(match[1]), [])
        stage.append((block.filters, block.strides, block.use_1x1conv))
    settings = preprocessing.get_config()
    return {
        "channels": network.input_shape[-1],
        "stages": list(stages.values()),
        "num_classes": network.output_shape[-1],
        **{name: settings[name] for name in ("image_size", "mean", "std")},
    }
