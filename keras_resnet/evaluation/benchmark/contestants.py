"""Who takes part in a benchmark: the files of an export, Keras, and the d2l network in PyTorch."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import keras
import numpy as np

from keras_resnet import archive
from keras_resnet.blocks import ResidualBlock
from keras_resnet.models import STEMS
from keras_resnet.preprocessing import ImagePreprocessing
from keras_resnet.untrusted.manifest import check_listed, digest
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.weights import torch_state_dict

# name -> whether the channels come last in memory.
TORCH_LAYOUTS = {"PyTorch eager": False, "PyTorch eager, channels last": True}

_BLOCK = re.compile(r"stage(\d+)_block(\d+)$")


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One row of the benchmark.

    Attributes:
        name: What the table calls it.
        runtime: The row of `worker.RUNTIMES` that runs it.
        format: "tflite", "onnx", "saved_model", "keras" or "torch".
        precision: What its weights are kept in.
        batch: How many images it takes at a time; None is any number.
        path: The file or folder.
        bytes: Its size on disk.
        accuracy: On the test images of the export; None where it was not measured.
        options: What its `load` in the worker takes beside the path.
    """

    name: str
    runtime: str
    format: str
    precision: str
    batch: int | None
    path: Path
    bytes: int
    accuracy: float | None
    options: dict = dataclasses.field(default_factory=dict)


def find_artifacts(folder, manifest):
    """Returns a `Contestant` for each artifact of an export, once all are as the manifest says.

    Args:
        folder: The export's folder.
        manifest: What `read_manifest` returned.

    Raises:
        InputError: If a file is missing or changed, of an unknown format, or takes no images.
    """
    found = []
    for artifact in manifest["artifacts"]:
        path = folder / artifact["file"]
        check_listed(path)
        if artifact["format"] not in ("tflite", "onnx", "saved_model"):
            raise InputError(f"{path}: of the format {artifact['format']!r}, which has no runtime")
        if artifact["input"]["dtype"] != "uint8":
            raise InputError(
                f"{path}: takes {artifact['input']['dtype']} and no images: export the model with "
                "its preprocessing"
            )
        fields = {name: artifact[name] for name in ("precision", "batch", "bytes", "accuracy")}
        kind = artifact["format"]
        found.append(Contestant(path.name, kind, kind, path=path.resolve(), **fields))
    return found


def find_keras(folder, manifest):
    """Returns the Keras model that an export was made from, as a `Contestant`.

    Args:
        folder: The export's folder; a run that was moved is found through it.
        manifest: What `read_manifest` returned.

    Raises:
        InputError: If the model is no longer there, or has changed since.
    """
    if not manifest["source"]["path"]:
        raise InputError("the export was made from a model in memory")
    said = Path(manifest["source"]["path"])
    for path in (said, folder.resolve().parent / said.name):
        if path.is_file() and digest(path)[1] == manifest["source"]["sha256"]:
            accuracy = manifest["keras"]["accuracy"]
            size = path.stat().st_size
            # What it computes in is known only to those who load it.
            return Contestant(
                path.name, "keras", "keras", "float32", None, path.resolve(), size, accuracy
            )
    raise InputError(f"{said}: not there any more, or not as it was when it was exported")


def find_torch(source, folder):
    """Returns the network of Dive into Deep Learning (d2l) in PyTorch with a Keras model's weights.

    Args:
        source: The Keras model, a `Contestant`.
        folder: Where its weights are put.

    Returns:
        A `Contestant` for each layout of memory; the first is PyTorch's default, as in d2l.

    Raises:
        InputError: If PyTorch is missing, or d2l has no such network.
    """
    if importlib.util.find_spec("torch") is None:
        raise InputError("PyTorch is not installed")
    model = archive.load_model(source.path)
    options = describe_chapter_network(model)
    state = torch_state_dict(model.layers[-1], "d2l_named")
    path = Path(folder) / "weights.npz"
    np.savez(path, **state)
    size = sum(array.nbytes for array in state.values())
    return [
        Contestant(
            name,
            *("torch", "torch", "float32", None, path, size, source.accuracy),
            {**options, "channels_last": channels_last},
        )
        for name, channels_last in TORCH_LAYOUTS.items()
    ]


def describe_chapter_network(model):
    """Returns what `torch_network.load` takes to build a Keras model's network in PyTorch.

    Args:
        model: A model of raw images, as `with_preprocessing` makes.

    Returns:
        A dict that JSON can hold.

    Raises:
        InputError: If d2l has no such network.

    Example:
        >>> from keras_resnet import Spec, build_resnet, with_preprocessing
        >>> network = build_resnet(Spec((1, 1), (8, 16)), (28, 28, 1))
        >>> found = describe_chapter_network(with_preprocessing(network, (28, 28, 1)))
        >>> found["stages"], found["image_size"]
        ([[(8, 1, False)], [(16, 2, True)]], 28)
    """
    first = [layer for layer in model.layers if isinstance(layer, ImagePreprocessing)]
    network = model.layers[-1]
    if len(first) != 1 or not isinstance(network, keras.Model):
        raise InputError("the model is not preprocessing and a network of ours")
    _check_chapter_network(first[0], model.input_shape[-1], network)
    stages = {}
    for layer in network.layers:
        if match := _BLOCK.match(layer.name):
            block = (layer.filters, layer.strides, layer.use_1x1conv)
            stages.setdefault(int(match[1]), []).append(block)
    settings = first[0].get_config()
    return {
        "channels": network.input_shape[-1],
        "stages": list(stages.values()),
        "num_classes": network.output_shape[-1],
        **{name: settings[name] for name in ("image_size", "mean", "std")},
    }


def _check_chapter_network(preprocessing, channels, network):
    names = {layer.name: layer for layer in network.layers}
    blocks = [layer for name, layer in names.items() if _BLOCK.match(name)]
    stem = STEMS["imagenet"].convolutions[0][0]
    rules = {
        "basic blocks alone": all(
            type(block) is ResidualBlock and block.se_reduction is block.shortcut_pool is None
            for block in blocks
        ),
        "the 7×7 stem": "stem_pool" in names
        and getattr(names.get("stem_conv"), "kernel_size", None) == (stem, stem),
        "logits at its end": network.layers[-1].name == "logits",
        "images of as many channels as it takes": channels == preprocessing.channels
        and not preprocessing.reverse_channels,
    }
    for rule, kept in rules.items():
        if not kept:
            raise InputError(
                f"the networks of Dive into Deep Learning (d2l) have {rule}, this model has not"
            )


def find_all(folder, manifest, scratch, torch, trust):
    """Returns all contestants, and why others could not take part.

    Args:
        folder: The export's folder.
        manifest: What `read_manifest` returned.
        scratch: A folder for PyTorch's weights.
        torch: Whether PyTorch may take part.
        trust: Whether a SavedModel may, which is code.

    Returns:
        A list of `Contestant`s, and a list of dicts with "name" and "reason".

    Raises:
        InputError: If an artifact is not as the manifest says.
    """
    found, left_out = find_artifacts(folder, manifest), []
    if not trust:
        code = [each for each in found if each.format == "saved_model"]
        reason = "a SavedModel is code that runs on loading: pass --trust"
        left_out += [{"name": each.name, "reason": reason} for each in code]
        found = [each for each in found if each not in code]
    try:
        found.append(find_keras(folder, manifest))
    except InputError as error:
        reason = one_line(error)
        both = [{"name": name, "reason": reason} for name in ("Keras", "PyTorch eager")]
        return found, left_out + both
    if torch:
        try:
            found += find_torch(found[-1], scratch)
        except InputError as error:
            left_out.append({"name": "PyTorch eager", "reason": one_line(error)})
    return found, left_out
