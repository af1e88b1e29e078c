"""Checkpoint files: written and read bit for bit; damaged and hostile files are refused."""

import argparse
import datetime
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from keras_resnet.utils.errors import InputError
from keras_resnet.weights import checkpoint
from keras_resnet.weights.checkpoint import read_checkpoint, write_checkpoint

WRITTEN = (".safetensors", ".pth", ".pt")
PI_HALF = 3.140625  # π in bfloat16 and in float16


def weights():
    """Two arrays whose every bit counts: a subnormal, a negative zero, the largest float32."""
    values = np.float32([[1.5, -0.0, 1e-45], [np.finfo("float32").max, 1 / 3, -2]])
    return {"conv.weight": values, "fc.bias": np.float64([1 / 3, 5e-324])}


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes(), name


def message(source):
    """The one line with which `source` is refused."""
    with pytest.raises(InputError) as caught:
        read_checkpoint(source)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 500
    if isinstance(source, Path):
        assert text.startswith(f"{source}: ")
    return text


# Reading, from every kind of source.


@pytest.mark.parametrize("suffix", WRITTEN)
def test_what_was_written_comes_back_bit_for_bit(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    write_checkpoint(weights(), path)
    assert_same(read_checkpoint(path), weights())
    assert_same(read_checkpoint(str(path)), weights())
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


names = st.text(min_size=1).filter(
    lambda name: (
        not name.endswith("num_batches_tracked")
        and name != "__metadata__"
        and not name.startswith(checkpoint._PREFIXES)
    )
)
arrays = hnp.arrays(
    st.sampled_from(["float32", "float64", ">f4", "<f8"]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=1, max_side=3),
    elements={"allow_nan": False, "allow_infinity": False},
)


@pytest.mark.thorough
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(names, arrays, min_size=1, max_size=4), st.sampled_from(WRITTEN))
@example({"transposed": np.arange(6, dtype="float32").reshape(2, 3).T}, ".safetensors")
@example({"every other": np.arange(6, dtype="float32")[::2]}, ".pth")
@example({"scalar": np.float32(3)}, ".safetensors")
def test_any_arrays_come_back(tmp_path_factory, tensors, suffix):
    path = tmp_path_factory.mktemp("any") / f"model{suffix}"
    write_checkpoint(tensors, path)
    # The same values, in the machine's byte order.
    expected = {
        name: np.array(array, array.dtype.newbyteorder("=")) for name, array in tensors.items()
    }
    assert_same(read_checkpoint(path), expected)


@pytest.fixture(scope="module")
def network():
    """A small PyTorch network with the kinds of entry that a ResNet has."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        OrderedDict(conv=torch.nn.Conv2d(2, 3, 3), bn=torch.nn.BatchNorm2d(3))
    ).eval()


def plain(network):
    """Returns the arrays that must be read from its state dict."""
    state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    del state["bn.num_batches_tracked"]
    return state


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


SOURCES = {
    "a state dict": lambda state: state,
    "wrapped": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "wrapped as by torchvision": lambda state: {"model": state, "epoch": 3},
    "wrapped as in PyTorch's tutorial": lambda state: {"epoch": 3, "model_state_dict": state},
    "DataParallel": lambda state: prefixed(state, "module."),
    "torch.compile": lambda state: prefixed(state, "_orig_mod."),
    "compiled, then DataParallel": lambda state: prefixed(state, "module._orig_mod."),
    "DataParallel, then compiled": lambda state: prefixed(state, "_orig_mod.module."),
    "wrapped and prefixed": lambda state: {"state_dict": prefixed(state, "module.")},
    "parameters": lambda state: {
        name: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    },
    "not contiguous": lambda state: {
        name: tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        for name, tensor in state.items()
    },
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("form", ["mapping", ".pth", ".bin", "before PyTorch 1.6"])
def test_a_networks_weights_are_found(network, tmp_path, make, form):
    source = make(network.state_dict())
    if form != "mapping":
        content, source = source, tmp_path / f"model{form if form[0] == '.' else '.pth'}"
        torch.save(content, source, _use_new_zipfile_serialization=form[0] == ".")
    found = read_checkpoint(source)
    assert_same(found, plain(network))
    assert all(array.flags["C_CONTIGUOUS"] for array in found.values())


@pytest.mark.parametrize("name", ["a.pth.tar", "a.ckpt", "a", "epoch=3-acc=0.9.ckpt", "a.h5"])
@pytest.mark.parametrize("form", ["torch", "before PyTorch 1.6", "safetensors"])
def test_the_content_decides_whatever_the_name(network, tmp_path, name, form):
    if form == "safetensors":
        save_file(network.state_dict(), tmp_path / name)
    else:
        new = form == "torch"
        torch.save(network.state_dict(), tmp_path / name, _use_new_zipfile_serialization=new)
    assert_same(read_checkpoint(tmp_path / name), plain(network))


@pytest.mark.parametrize(("name", "form"), [("a.pth", "safetensors"), ("a.safetensors", "torch")])
def test_a_name_of_the_other_format_does_no_harm(network, tmp_path, name, form):
    save = save_file if form == "safetensors" else torch.save
    save(network.state_dict(), tmp_path / name)
    assert_same(read_checkpoint(tmp_path / name), plain(network))


# Objects that training scripts save beside the weights.
BESIDE = {
    "options": argparse.Namespace(lr=0.1, path=Path("a"), more=argparse.Namespace(x=[1])),
    "NumPy scalars": [np.float64(71.2), np.int64(3), np.bool_(True)],
    "a NumPy array": np.ones(3),
    "collections": [defaultdict(list, a=[1]), defaultdict(dict), deque([1], 3), Counter("a")],
    "times": [datetime.datetime.now(), datetime.timedelta(1)],
    "PyTorch's": [torch.Size([1]), torch.float32, torch.device("cpu")],
    "types and ranges": [int, range(3), slice(1, 2), frozenset([1])],
}


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kind", BESIDE)
def test_metadata_beside_the_weights_do_no_harm(network, tmp_path, kind, new):
    content = {"state_dict": network.state_dict(), "extra": BESIDE[kind]}
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=new)
    before = torch.serialization.get_safe_globals()
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert_same(found, plain(network))
    assert (found.taken, found.unusable) == ("state_dict", {})
    assert torch.serialization.get_safe_globals() == before


def test_a_kind_of_dictionary_may_hold_the_weights(network, tmp_path):
    torch.save({"net": defaultdict(list, network.state_dict())}, tmp_path / "a.ckpt")
    assert_same(read_checkpoint(tmp_path / "a.ckpt"), plain(network))


class Options(argparse.Namespace):
    """A class of the user's own, whose code a file must not run."""


def test_an_object_of_an_unknown_class_is_refused(network, tmp_path):
    torch.save({"state_dict": network.state_dict(), "args": Options()}, tmp_path / "a.ckpt")
    assert f"{CODE} {__name__}.Options" in message(tmp_path / "a.ckpt")


def test_an_allowed_class_is_a_stand_in_that_runs_nothing(tmp_path):
    # The names of pathlib, argparse and builtins are allowed; their code does not run.
    torch.save({"w": torch.ones(1), "n": argparse.Namespace(a=1)}, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert_same(found, {"w": np.ones(1, "float32")})
    assert "got argparse.Namespace" in found.unusable["n"]


def test_a_prefix_that_one_name_lacks_stays():
    state = {"module.a": np.ones(1), "_orig_mod.b": np.zeros(1)}
    assert_same(read_checkpoint(state), state)


def test_a_tensor_under_a_wrappers_key_is_a_tensor():
    state = {"model": np.ones(1), "net": np.zeros(1)}
    assert_same(read_checkpoint(state), state)


def test_safetensors_written_by_pytorch_are_read(network, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path)
    assert_same(read_checkpoint(path), plain(network))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["mapping", ".pth", ".safetensors"])
def test_half_precision_becomes_float32_exactly(tmp_path, dtype, form):
    # Every finite value of the type.
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    source = {"w": every[every.isfinite()].reshape(-1, 2)}
    expected = {"w": source["w"].to(torch.float32).numpy()}
    assert PI_HALF in expected["w"]
    if form != "mapping":
        content, source = source, tmp_path / f"model{form}"
        (save_file if form == ".safetensors" else torch.save)(content, source)
    assert_same(read_checkpoint(source), expected)


def test_what_a_mapping_gave_does_not_change_with_it(network):
    live = {"w": torch.zeros(2, requires_grad=True), "v": np.zeros(2)}
    found = read_checkpoint(live)
    with torch.no_grad():
        live["w"] += 1
    live["v"] += 1
    assert_same(found, {"w": np.zeros(2, "float32"), "v": np.zeros(2)})


# Writing, for other libraries.


def test_pytorch_loads_what_was_written(network, tmp_path):
    for suffix in WRITTEN:
        path = tmp_path / f"model{suffix}"
        write_checkpoint(plain(network), path)
        state = load_file(path) if suffix == ".safetensors" else torch.load(path)
        copy = torch.nn.Sequential(
            OrderedDict(conv=torch.nn.Conv2d(2, 3, 3), bn=torch.nn.BatchNorm2d(3))
        )
        copy.load_state_dict(state, strict=True)
        assert_same(plain(copy), plain(network))
    with safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("suffix", WRITTEN)
def test_a_file_of_the_same_weights_is_the_same_file(tmp_path, suffix):
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for path in (first, second):
        write_checkpoint(weights(), path)
    assert first.read_bytes() == second.read_bytes()


ONE = {"w": np.float32([1])}


@pytest.mark.parametrize(
    ("name", "tensors", "expected"),
    [
        ("model.h5", ONE, "must end in .safetensors, .pth, .pt, got .h5"),
        ("model", ONE, "got no suffix"),
        ("model.bin", ONE, "got .bin"),
        ("nowhere/model.pth", ONE, "there is no folder"),
        ("model.pth", {}, "at least one entry"),
        ("model.pth", [np.ones(1)], "got list"),
        ("model.pth", {3: np.ones(1)}, "must be a string, got 3"),
        ("model.safetensors", {"__metadata__": np.ones(1)}, "got '__metadata__'"),
        ("model.safetensors", {"w": np.array(["a"])}, "got str32"),
        ("model.pth", {"w": np.array([{}])}, "got object"),
        ("model.pth", {"w": [1.0]}, "got list"),
        ("model.pth", {"w": torch.ones(1)}, "must be a NumPy array"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_left(tmp_path, name, tensors, expected):
    with pytest.raises(InputError) as caught:
        write_checkpoint(tensors, tmp_path / name)
    assert expected in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", WRITTEN)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    def fill(path, data):
        with open(path, "wb") as file:
            file.write(bytes(data)[:10])
        raise OSError(28, "No space left on device")

    path = tmp_path / f"model{suffix}"
    write_checkpoint(ONE, path)
    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(weights(), path)
    assert_same(read_checkpoint(path), ONE)
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


# Files that are not checkpoints.


def safetensors_file(header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def torch_file(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def zipped_again(
    data, change=lambda name, content: content, compression=zipfile.ZIP_STORED, more=()
):
    """A .pth file with each member changed, and `more` members; its checksums hold."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(buffer, "w", compression) as new,
    ):
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
        for name, content in more:
            new.writestr(name, content)
    return buffer.getvalue()


def claiming(data, elements):
    """A .pth of 100 float32 whose pickle claims `elements`."""
    size = b"\x8a\x08" + struct.pack("<q", elements)
    return zipped_again(
        data, lambda name, old: old.replace(b"Kd", size) if name.endswith("data.pkl") else old
    )


def marked_as_folder(data):
    """A .pth whose first tensor's bytes the ZIP's directory calls a folder."""
    start = data.index(b"archive/data/0", data.index(b"PK\x01\x02")) - 8
    return data[:start] + b"\x10" + data[start + 1 :]


def flipped(data, where):
    """`data` with a bit flipped in the first byte of `where`."""
    index = data.index(where)
    return data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :]


HUNDRED = torch_file({"w": torch.ones(100)})
CODE = "refused: it holds"
NOT_TENSORS = "no file of tensors that PyTorch wrote"
NEITHER = "is neither a safetensors file nor one that torch.save wrote"
# The text after it differs between versions of the libraries.
DAMAGED = "cannot be read, fetch or write it anew: "

FILES = {
    "empty": ("a.safetensors", b"", "is empty"),
    "empty pth": ("a.pth", b"", "is empty"),
    "wrong suffix": ("a.h5", b"x", NEITHER),
    "no suffix": ("weights", b"x", NEITHER),
    "garbage": ("a.safetensors", b"garbage " * 20, NEITHER),
    "7 bytes": ("a.safetensors", b"\0" * 7, NEITHER),
    "huge header": ("a.safetensors", safetensors_file({}, length=2**62), DAMAGED),
    "long header": ("a.safetensors", safetensors_file({}, length=99_000_000), DAMAGED),
    "not JSON": ("a.safetensors", safetensors_file(b"{w:"), DAMAGED),
    "not UTF-8": ("a.safetensors", safetensors_file(b"\xff\xfe{}"), NEITHER),
    "JSON list": ("a.safetensors", safetensors_file(b"[]"), NEITHER),
    "cut": ("a.safetensors", safetensors_file(entry(), b"\0\0"), DAMAGED),
    "too long": ("a.safetensors", safetensors_file(entry(), b"\0" * 9), DAMAGED),
    "offsets outside": (
        "a.safetensors",
        safetensors_file(entry(shape=[2**40], offsets=[0, 2**42]), b"\0" * 4),
        DAMAGED,
    ),
    "no numbers, large claims": (
        "a.safetensors",
        safetensors_file(entry(shape=[0, 10**6, 7, 7], offsets=[0, 0]), b""),
        "'w' must have at least one number along each axis, got shape (0, 1000000, 7, 7)",
    ),
    "shape and offsets differ": (
        "a.safetensors",
        safetensors_file(entry(shape=[2**40]), b"\0" * 4),
        DAMAGED,
    ),
    "shape overflows": (
        "a.safetensors",
        safetensors_file(entry(shape=[2**40, 2**40]), b"\0" * 4),
        DAMAGED,
    ),
    "shape nobody can have": (
        "a.safetensors",
        safetensors_file(entry(shape=[0, 2**62], offsets=[0, 0])),
        DAMAGED,
    ),
    "100 axes": ("a.safetensors", safetensors_file(entry(shape=[1] * 100), b"\0" * 4), DAMAGED),
    "unknown dtype": ("a.safetensors", safetensors_file(entry("F31"), b"\0" * 4), DAMAGED),
    "float8": (
        "a.safetensors",
        safetensors_file(entry("F8_E4M3", offsets=[0, 1]), b"\0"),
        "'w' must be one of float16, bfloat16, float32, float64, got F8_E4M3",
    ),
    "integers": ("a.safetensors", safetensors_file(entry("I32"), b"\0" * 4), "got I32"),
    "no tensors": ("a.safetensors", safetensors_file({}), "holds no tensors"),
    "NaN": (
        "a.safetensors",
        safetensors_file(entry(), np.float32([np.nan]).tobytes()),
        "'w' holds NaN or infinity, its training has diverged",
    ),
    "infinite bfloat16": (
        "a.safetensors",
        safetensors_file(entry("BF16", offsets=[0, 2]), b"\x80\x7f"),
        "'w' holds NaN or infinity",
    ),
    "garbage pth": ("a.pth", b"garbage " * 20, NEITHER),
    "garbage bin": ("a.bin", b"garbage " * 20, NEITHER),
    "plain pickle": ("a.pth", pickle.dumps({"w": 1}), NOT_TENSORS),
    "cut pth": ("a.pth", HUNDRED[:-100], DAMAGED),
    "cut old pth": (
        "a.pth",
        torch_file({"w": torch.ones(9)}, _use_new_zipfile_serialization=False)[:-3],
        DAMAGED,
    ),
    "flipped bit": (
        "a.pth",
        flipped(HUNDRED, b"\x00\x00\x80\x3f" * 100),
        "damaged: 'archive/data/0' in it was changed",
    ),
    "two members of one name": (
        "a.pth",
        zipped_again(HUNDRED, more=[("archive/versio2", b"3")]).replace(b"versio2", b"version"),
        "damaged: it holds two members of one name",
    ),
    "bytes marked as a folder": (
        "a.pth",
        marked_as_folder(HUNDRED),
        "damaged: 'archive/data/0' in it was changed",
    ),
    "more elements than bytes": ("a.pth", claiming(HUNDRED, 101), DAMAGED),
    "a terabyte of elements": ("a.pth", claiming(HUNDRED, 2**40), DAMAGED),
    "one element shown often": (
        "a.pth",
        torch_file({"w": torch.ones(1).expand(10**6, 10**6)}),
        "claim over 4 times the file's size",
    ),
    "zip bomb": (
        "a.pth",
        zipped_again(torch_file({"w": torch.zeros(10**6)}), compression=zipfile.ZIP_DEFLATED),
        "claim over 4 times the file's size",
    ),
    "zip bomb beside the tensors": (
        "a.pth",
        zipped_again(HUNDRED, compression=zipfile.ZIP_DEFLATED, more=[("more", bytes(2**24))]),
        "claim over 4 times the file's size",
    ),
    "whole module": ("a.pth", torch_file(torch.nn.Linear(1, 1)), f"{CODE} torch.nn.modules"),
    "module inside": (
        "a.pth",
        torch_file({"model": torch.nn.Linear(1, 1), "epoch": 3}),
        f"{CODE} torch.nn.modules",
    ),
    "list": ("a.pth", torch_file([torch.ones(1)]), "must hold a mapping of names to tensors, got"),
    "one tensor": ("a.pth", torch_file(torch.ones(1)), "got Tensor"),
    "empty dict": ("a.pth", torch_file({}), "holds no tensors"),
    "nothing but counters": (
        "a.pth",
        torch_file({"bn.num_batches_tracked": torch.tensor(3)}),
        "holds no tensors",
    ),
    "wrapped empty": ("a.pth", torch_file({"state_dict": {}}), "holds no tensors"),
    "number for a name": (
        "a.pth",
        torch_file({3: torch.ones(1)}),
        "the tensors' names must be strings, got 3",
    ),
    "number for a tensor": (
        "a.pth",
        torch_file({"epoch": 3, "parameters": {}}),
        "'epoch' must be a tensor, got int; a state dict inside must be under state_dict, model",
    ),
    "wrapped twice": (
        "a.pth",
        torch_file({"state_dict": {"model": {"w": torch.ones(1)}}}),
        "'model' must be a tensor, got dict",
    ),
    "integer tensor": ("a.pth", torch_file({"w": torch.ones(1, dtype=torch.int64)}), "got int64"),
    "complex tensor": ("a.pth", torch_file({"w": torch.ones(1) * 1j}), "got complex64"),
    "boolean tensor": ("a.pth", torch_file({"w": torch.ones(1) > 0}), "got bool"),
    "sparse tensor": (
        "a.pth",
        torch_file({"w": torch.eye(3).to_sparse()}),
        "'w' must be a dense tensor with data",
    ),
    "tensor without data": (
        "a.pth",
        torch_file({"w": torch.empty(3, device="meta")}),
        "'w' must be a dense tensor with data",
    ),
    "NaN pth": ("a.pth", torch_file({"a\nb": torch.tensor([1, torch.nan])}), r"'a\nb' holds NaN"),
    "infinite half": (
        "a.pth",
        torch_file({"w": torch.tensor([torch.inf], dtype=torch.float16)}),
        "'w' holds NaN",
    ),
}


@pytest.mark.parametrize(("name", "data", "expected"), FILES.values(), ids=FILES)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, recwarn, name, data, expected):
    path = tmp_path / name
    path.write_bytes(data)
    assert expected in message(path)
    assert not recwarn.list  # PyTorch warns about some of them, in many lines


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "no such checkpoint file"),
        (lambda path: path.mkdir(), "is a folder"),
        (os.mkfifo, "must be a regular file"),
        (lambda path: path.symlink_to(path), "no such checkpoint file"),
    ],
    ids=["missing", "folder", "pipe", "link to itself"],
)
@pytest.mark.parametrize("suffix", [*WRITTEN, ".bin"])
def test_a_path_that_is_no_file_is_refused(tmp_path, make, expected, suffix):
    path = tmp_path / f"model{suffix}"
    make(path)
    assert expected in message(path)


def test_a_name_too_long_for_the_system_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such checkpoint file"):
        read_checkpoint(tmp_path / ("long" * 100 + ".pth"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_an_unreadable_file_is_refused(tmp_path, monkeypatch, suffix):
    # By a patch: the tests may run as root, who may read any file.
    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / f"model{suffix}"
    write_checkpoint(ONE, path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert "Permission denied" in message(path)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (torch.nn.Linear(1, 1), "such as `model.state_dict()`, got Linear"),
        (None, "got NoneType"),
        ([np.ones(1)], "got list"),
        ({}, "the mapping given: holds no tensors"),
        ({"w": [1.0]}, "the mapping given: 'w' must be a tensor, got list"),
        ({"w": np.ones(1, "int32")}, "'w' must be one of"),
        ({"w": np.array([np.nan])}, "'w' holds NaN"),
        ({"w": torch.tensor([-torch.inf])}, "'w' holds NaN"),
        ({("w",): np.ones(1)}, "names must be strings"),
    ],
)
def test_other_sources_are_refused(source, expected):
    assert expected in message(source)


# Files that would do harm.


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("wrap", [lambda payload: payload, lambda payload: {"w": payload}])
@pytest.mark.parametrize(
    "dump",
    [
        torch_file,
        lambda content: torch_file(content, _use_new_zipfile_serialization=False),
        lambda content: pickle.dumps(content, protocol=2),
    ],
    ids=["zip", "before PyTorch 1.6", "plain pickle"],
)
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
def test_no_code_from_a_file_runs(tmp_path, suffix, dump, wrap):
    harm, path = tmp_path / "harm", tmp_path / f"model{suffix}"
    path.write_bytes(dump(wrap(Payload(harm))))
    text = message(path)
    assert f"{CODE} posix.system" in text or NOT_TENSORS in text
    assert "weights_only" not in text  # PyTorch's message advises to switch the safety off
    assert not harm.exists()
    pickle.loads(pickle.dumps(Payload(harm)))
    assert harm.exists()  # The payload works where it is not stopped.


@pytest.mark.parametrize("version", ["2.5.1", "2.9.1+cu128"])
def test_a_pytorch_that_runs_code_all_the_same_is_refused(tmp_path, monkeypatch, version):
    path = tmp_path / "model.pth"
    write_checkpoint(ONE, path)
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    assert "pip install 'torch>=2.10'" in message(path)


def test_without_pytorch_only_its_own_files_are_refused(tmp_path, monkeypatch):
    for suffix in (".pth", ".safetensors"):
        write_checkpoint(ONE, tmp_path / f"model{suffix}")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_same(read_checkpoint(tmp_path / "model.safetensors"), ONE)
    text = message(tmp_path / "model.pth")
    assert "`pip install torch`" in text and ".safetensors" in text
    with pytest.raises(InputError, match="pip install torch"):
        write_checkpoint(ONE, tmp_path / "other.pth")


ALONE = """
import sys
import numpy as np
from keras_resnet.weights.checkpoint import read_checkpoint, write_checkpoint
print(read_checkpoint(sys.argv[1])["w"].tolist())
write_checkpoint({"w": np.ones(1)}, sys.argv[1])
read_checkpoint({"w": np.ones(1)})
print("torch" in sys.modules)
"""


@pytest.mark.thorough
def test_safetensors_need_no_pytorch(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.tensor([PI_HALF], dtype=torch.bfloat16)}, path)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"[{PI_HALF}]", "False"]


# Any damage at all.


@pytest.fixture(scope="module")
def sound_files(network, tmp_path_factory):
    """One file of each format, and a place to write damaged ones to."""
    folder = tmp_path_factory.mktemp("sound")
    write_checkpoint(plain(network), folder / "model.safetensors")
    write_checkpoint(plain(network), folder / "model.pth")
    torch.save(network.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    return {path.name: (path, path.read_bytes()) for path in folder.iterdir()}


def refused_or_valid(path):
    """Reads a damaged file; returns the arrays, or None if it was refused properly."""
    try:
        found = read_checkpoint(path)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and str(error).startswith(f"{path}: ")
        return None
    assert found
    for name, array in found.items():
        assert isinstance(name, str) and array.dtype.name in ("float32", "float64")
        assert np.isfinite(array).all()
    return found


KINDS = st.sampled_from(["model.safetensors", "model.pth", "old.pth"])


@settings(deadline=None, max_examples=300)
@given(
    KINDS,
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8
    ),
)
def test_changed_bytes_are_noticed_or_harmless(sound_files, kind, changes):
    path, sound = sound_files[kind]
    damaged = bytearray(sound)
    for position, byte in changes:
        damaged[int(position * len(damaged))] = byte
    path.write_bytes(damaged)
    found = refused_or_valid(path)
    if kind == "model.pth" and found is not None:  # its checksums find every change
        path.write_bytes(sound)
        assert_same(found, read_checkpoint(path))


@settings(deadline=None, max_examples=150)
@given(KINDS, st.floats(0, 1, exclude_max=True), st.binary(max_size=20))
def test_no_part_of_a_file_passes_for_the_whole(sound_files, kind, share, tail):
    path, sound = sound_files[kind]
    path.write_bytes(sound[: int(share * len(sound))])
    assert refused_or_valid(path) is None
    path.write_bytes(sound[: int(share * len(sound))] + tail)
    refused_or_valid(path)
