"""Checkpoints converted to `.keras` files: the report, the file, and refused sources."""

import hashlib
import json
import os
import pickle
import resource
import signal

import keras
import numpy as np
import pytest
import torch
from conftest import write_tiny

from keras_resnet import archive
from keras_resnet.evaluation import inference
from keras_resnet.utils.errors import InputError
from keras_resnet.weights import convert, read_tensors
from keras_resnet.weights.checkpoint import write_checkpoint


@pytest.fixture
def out(tmp_path):
    return tmp_path / "model.keras"


def images(channels=3, size=28):
    return np.random.default_rng(1).integers(0, 256, (2, size, size, channels), dtype="uint8")


# layout -> the variant that its networks have.
LAYOUTS = {
    "torchvision": "torchvision",
    "huggingface": "torchvision",
    "timm_v2": "v2",
    "d2l": "d2l",
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_model_answers_as_the_checkpoints_did(tmp_path, tiny, out, layout, channels):
    source = tmp_path / "tiny.safetensors"
    network = write_tiny(source, 12, channels, LAYOUTS[layout], layout)
    found = convert(source, tiny, out, num_classes=12)
    assert (found["layout"], found["variant"]) == (layout, LAYOUTS[layout])
    assert (found["stem"], found["channels"], found["num_classes"]) == ("imagenet", channels, 12)
    assert found["tensors"] == len(network.weights)
    assert found["head"] == "loaded"
    assert found["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    model = archive.load_model(out)
    assert model.input_shape == (None, None, None, channels)
    x = images(channels).astype("float32")
    np.testing.assert_array_equal(model.predict_on_batch(x), network.predict_on_batch(x))
    json.dumps(found)


def test_what_was_taken_and_what_was_left_out_is_reported(checkpoint, tmp_path, tiny, out):
    tensors = {f"net.{n}": torch.from_numpy(a) for n, a in read_tensors(checkpoint).items()}
    averaged = {**tensors, "loss_fn.weight": torch.ones(3)}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": tensors, "state_dict_ema": averaged, "acc": np.float64(9)}, path)
    found = convert(path, tiny, out)
    assert (found["taken"], found["ignored"]) == ("state_dict_ema", ["loss_fn.weight"])
    assert archive.read_metadata(out)["origin"]["taken"] == "state_dict_ema"


def test_the_file_says_where_it_came_from(checkpoint, tiny, out):
    convert(checkpoint, tiny, out)
    origin = archive.read_metadata(out)["origin"]
    assert origin["file"] == "tiny.safetensors" and origin["layout"] == "torchvision"
    assert origin["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    # The name of the file without its folder, which others do not have.
    assert str(checkpoint.parent) not in json.dumps(origin)


def test_with_normalization_it_takes_raw_images(checkpoint, tmp_path, tiny, out):
    network = write_tiny(tmp_path / "again.safetensors")
    found = convert(tmp_path / "again.safetensors", tiny, out, normalize="imagenet", image_size=28)
    assert found["input"] == "raw images, resized to 28×28×3 and normalised inside: imagenet"
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    logits = network.predict_on_batch((images() / np.float32(255) - mean) / std)
    probabilities = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    np.testing.assert_allclose(inference.load(out)(images()), probabilities, atol=1e-6)
    convert(checkpoint, tiny, out, normalize="inception")
    assert inference.load(out).image_shape == (224, 224, 3)


def test_a_network_of_floats_is_not_asked_about_images(checkpoint, tiny, out):
    convert(checkpoint, tiny, out)
    with pytest.raises(InputError, match=r"model\.keras: it takes floats .* imagenet"):
        inference.load(out)


def test_a_new_head_leaves_the_rest_as_it_was(checkpoint, tiny, out):
    found = convert(checkpoint, tiny, out, num_classes=5, skip_head=True)
    assert (found["head"], found["num_classes"], found["tensors"]) == ("new", 5, 30)
    model = archive.load_model(out)
    assert model.output_shape == (None, 5)
    kernel = read_tensors(checkpoint)["layer2.0.conv2.weight"]
    loaded = {weight.path: np.asarray(weight) for weight in model.weights}
    np.testing.assert_array_equal(
        loaded["stage2_block1/conv2/kernel"].transpose(3, 2, 0, 1), kernel
    )


def test_a_variant_that_leaves_no_trace_can_be_named(checkpoint, tiny, out):
    assert convert(checkpoint, tiny, out, variant="v1")["variant"] == "v1"


# ----------------------------------------------------------------------------------------------
# Refused sources: one line that names the file, nothing written, nothing run
# ----------------------------------------------------------------------------------------------


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def changed(checkpoint, path, **changes):
    """Writes the checkpoint with some tensors replaced, or left out where None."""
    names = {"head": "fc.weight", "bias": "fc.bias", "first": "conv1.weight"}
    tensors = read_tensors(checkpoint)
    tensors.update({names[key]: value for key, value in changes.items()})
    write_checkpoint({name: a for name, a in tensors.items() if a is not None}, path)


def zeros(*shape):
    return np.zeros(shape, "float32")


# file -> a function that makes it, and a pattern of the error.
FILES = {
    "cut.safetensors": (
        lambda c, path: path.write_bytes(c.read_bytes()[:-100]),
        "cannot be read, fetch or write it anew",
    ),
    "payload.pth": (
        lambda c, path: torch.save(Payload(path.with_name("ran")), path),
        "refused: it holds posix.mkdir, and loading that may run code",
    ),
    "pickle.pt": (
        lambda c, path: path.write_bytes(pickle.dumps(Payload(path.with_name("ran")))),
        "no file of tensors",
    ),
    "text.pt": (lambda c, path: path.write_text("no weights"), "neither a safetensors file"),
    "other.onnx": (lambda c, path: path.write_text("x"), "neither a safetensors file"),
    "folder.safetensors": (lambda c, path: path.mkdir(), "no model.keras there"),
    "missing.safetensors": (lambda c, path: None, "no such checkpoint file"),
    "missing.h5": (lambda c, path: None, "no such checkpoint file"),
    "text.h5": (lambda c, path: path.write_text("x"), "cannot be read as weights"),
    "text.keras": (lambda c, path: path.write_text("x"), "not a .keras file"),
    "names.safetensors": (
        lambda c, path: write_checkpoint({"a.weight": zeros(2)}, path),
        "of no known layout; known: torchvision, timm_d",
    ),
    "headless.safetensors": (
        lambda c, path: changed(c, path, head=None, bias=None),
        "has no head: .*--num-classes N --skip-head",
    ),
    "bias.safetensors": (
        lambda c, path: changed(c, path, bias=zeros(10**6)),
        r"the head must be a kernel and a bias of as many classes, got .*\(1000000,\)",
    ),
    "scalar.safetensors": (
        lambda c, path: changed(c, path, bias=zeros()),
        "the head must be a kernel and a bias",
    ),
    "half.safetensors": (lambda c, path: changed(c, path, head=None), "shape None and fc.bias"),
    "flat.safetensors": (lambda c, path: changed(c, path, first=zeros(8)), "conv1.weight is miss"),
    "no_channels.safetensors": (
        lambda c, path: changed(c, path, first=zeros(8, 0, 7, 7)),
        "must have at least one number along each axis",
    ),
    "wide.safetensors": (
        lambda c, path: changed(c, path, first=zeros(9, 3, 7, 7)),
        r"conv1.weight is \(9, 3, 7, 7\), must be \(8, 3, 7, 7\)",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_of_no_use_is_refused(checkpoint, tmp_path, tiny, out, name):
    make, expected = FILES[name]
    path = tmp_path / name
    make(checkpoint, path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError, match=expected) as caught:
        convert(path, tiny, out)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"{path}: ") and message.count(str(path)) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_of_a_wrapped_payload_runs(checkpoint, tmp_path, tiny, out):
    path = tmp_path / "wrapped.bin"
    content = {"state_dict": {"conv1.weight": zeros(1)}, "args": Payload(tmp_path / "ran")}
    torch.save(content, path)
    with pytest.raises(InputError, match="refused"):
        convert(path, tiny, out)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


# case -> arguments, and a pattern of the error.
ARGUMENTS = {
    "unknown model": ({"model": "vgg"}, "`model` must be one of resnet18"),
    "another depth": ({"model": "resnet18"}, "tiny.safetensors: .* missing .*depth, variant"),
    "another number of classes": ({"num_classes": 9}, "has 12 classes, got .* 9: .*--skip-head"),
    "classes that are no number": ({"num_classes": "12"}, "`num_classes` must be"),
    "unknown variant": ({"variant": "v3"}, "`variant` must be one of"),
    "another variant": ({"variant": "v2"}, "final_bn"),
    "unknown stem": ({"stem": "tall"}, "`stem` must be one of"),
    "another stem": ({"stem": "small"}, r"must be \(8, 3, 3, 3\)"),
    "unknown layout": ({"layout": "onnx"}, "`layout` must be one of"),
    "another layout": ({"layout": "d2l"}, "tiny.safetensors: of layout d2l, but 0.0.weight"),
    "unknown normalization": ({"normalize": "zca"}, "`normalize` must be one of none, imagenet"),
    "no pixels": ({"image_size": 0}, "`image_size` must be"),
    "another suffix": ({"out": "model.h5"}, "model.h5: a model file must end in .keras"),
    "no folder": ({"out": "no/model.keras"}, "there is no folder .*; make it first"),
    "a folder": ({"out": "folder.keras"}, "folder.keras: is a folder"),
    "the source": ({"source": "in.keras", "out": "in.keras"}, "is the checkpoint itself"),
    "the source, pinned": (
        {"source": f"in.keras#sha256={'0' * 64}", "out": "in.keras"},
        "is the checkpoint itself",
    ),
    "the source at home": ({"source": "~/in.keras", "out": "in.keras"}, "is the checkpoint itself"),
    "no path": ({"source": {}, "out": "in.keras"}, "named by its path, got dict"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments_that_do_not_fit_are_refused(checkpoint, tmp_path, tiny, monkeypatch, case):
    changes, expected = ARGUMENTS[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "folder.keras").mkdir()
    (tmp_path / "in.keras").write_bytes(b"mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=expected) as caught:
        convert(**{"source": checkpoint, "model": tiny, "out": "out.keras", **changes})
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "in.keras").read_bytes() == b"mine"


def test_a_model_of_this_package_is_not_converted(checkpoint, tiny, out):
    convert(checkpoint, tiny, out)
    with pytest.raises(InputError, match=r"model\.keras: is a file of this package already"):
        convert(out, tiny, out.with_name("again.keras"))
    assert [path.name for path in out.parent.glob("*.keras")] == [out.name]


def test_a_write_that_fails_leaves_what_was_there(checkpoint, tmp_path, tiny, out):
    out.write_bytes(b"an older model")
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))  # a full disk, for large files
    try:
        with pytest.raises(InputError, match=r"model\.keras: cannot be written: "):
            convert(checkpoint, tiny, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert out.read_bytes() == b"an older model"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
