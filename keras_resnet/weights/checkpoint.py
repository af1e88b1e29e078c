"""Checkpoints as PyTorch's world keeps them, read into NumPy arrays and written from them.

A checkpoint here is a mapping of names to arrays; `layouts.py` finds the network in it. Reading
never runs code from a file, and safetensors need no PyTorch.
"""

import dataclasses
import io
import math
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping

import numpy as np
from safetensors import deserialize
from safetensors.numpy import save as safetensors_bytes

from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user, replacing

# Before 2.10 a file can take over the process in spite of `weights_only=True`
# (CVE-2025-32434, CVE-2026-24747).
MIN_TORCH = (2, 10)

# What arrives as what: NumPy has no bfloat16, and float32 holds every half-precision value.
_READ_AS = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
}
_SAFETENSORS_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_WRITTEN = {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"}

# Counts that lie beside the weights: BatchNorm's (used only with `momentum=None`), the one of
# torch.optim.swa_utils.AveragedModel, and those that thop leaves in a network it has measured.
_COUNTERS = {"num_batches_tracked", "n_averaged", "total_ops", "total_params"}

# Where training scripts put the state dict, beside the epoch and the optimizer.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
# A key or a prefix of averaged weights, such as "state_dict_ema", "model_ema" or "ema_model.".
# A script that keeps both sets evaluates the averaged one.
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)")
# What DataParallel and torch.compile put before every name.
_PREFIXES = ("module.", "_orig_mod.")

# Tensors may share memory in a file (tied weights), so their sum may pass the file's size; by
# more than this only a file made to fill the memory does.
_MAX_EXPANSION = 4


class Tensors(dict):
    """A checkpoint's weights: names -> contiguous arrays of float32 or float64, all finite.

    Attributes:
        taken: The key that they were under, such as "state_dict_ema"; None if there was none.
        unusable: The names of the entries that are no floating-point tensors -> the reason, one
            line: another part of the training script may need them, a network does not.
    """

    def __init__(self, arrays=(), taken=None, unusable=()):
        super().__init__(arrays)
        self.taken, self.unusable = taken, dict(unusable)


def read_checkpoint(source):
    """Reads the weights of a PyTorch network, as NumPy arrays.

    float16 and bfloat16 become float32, exactly; float32 and float64 stay. Counters, such as
    `num_batches_tracked`, are left out. A state dict that a training script has wrapped is found
    under the usual keys, averaged weights (`state_dict_ema`, `model_ema`) before all others.
    `module.` and `_orig_mod.` before every name are taken off.

    Args:
        source: A safetensors file (needs no PyTorch) or a file of `torch.save` (needs it); the
            content decides which, whatever the name ends in. Or a mapping of names to PyTorch
            tensors or NumPy arrays, which is copied.

    Returns:
        `Tensors`, a dict of names to contiguous arrays of float32 or float64, all of them finite.

    Raises:
        InputError: If the file is missing, damaged, would run code, or holds something other
            than finite floating-point tensors.

    Example:
        >>> weights = {"module.fc.bias": np.float16([1, 2])}
        >>> read_checkpoint({"epoch": 3, "state_dict": weights})
        {'fc.bias': array([1., 2.], dtype=float32)}
    """
    if isinstance(source, Mapping):
        arrays = _arrays("the mapping given", source, limit=math.inf)
        for name, array in arrays.items():
            # Copied: a live model's tensors would change under the caller's hands.
            arrays[name] = array.copy()
        return arrays
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            "a checkpoint must be a path or a mapping of names to tensors, such as "
            f"`model.state_dict()`, got {type(source).__name__}"
        )
    path = _check_path(source)
    try:
        content = _find_reader(path)(path)
        limit = _MAX_EXPANSION * path.stat().st_size
    except InputError:
        raise
    # A damaged or hostile file can fail in any of the parsers' ways.
    except Exception as error:
        raise InputError(
            f"{path}: cannot be read, fetch or write it anew: {one_line(error)}"
        ) from error
    return _arrays(path, content, limit)


def write_checkpoint(tensors, path):
    """Writes arrays as a file that PyTorch's world loads, whole or not at all.

    `read_checkpoint` gives the same bits back, if they are finite float32 or float64.

    Args:
        tensors: A mapping of names to NumPy arrays.
        path: The file to write: `.safetensors`, or `.pth` or `.pt` (these need PyTorch). Its
            folder must exist.

    Raises:
        InputError: If the suffix is another, the folder is missing, or an array is of a dtype
            that such files do not hold.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> path = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> write_checkpoint({"fc.bias": np.float32([1, 2])}, path)
        >>> read_checkpoint(path)
        {'fc.bias': array([1., 2.], dtype=float32)}
    """
    path = expand_user(path)
    if path.suffix.lower() not in _ENCODERS:
        raise InputError(
            f"{path}: a checkpoint's name must end in {', '.join(_ENCODERS)}, "
            f"got {path.suffix or 'no suffix'}"
        )
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    if not isinstance(tensors, Mapping) or not tensors:
        raise InputError(
            f"{path}: what is written must be a mapping of names to arrays with at least one "
            f"entry, got {type(tensors).__name__}"
        )
    arrays = {name: _writable(path, name, value) for name, value in tensors.items()}
    data = _ENCODERS[path.suffix.lower()](path, arrays)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def _check_path(source):
    """Returns `source` as a path that is a file, not empty."""
    path = expand_user(source)
    # os.path's questions answer False where pathlib's raise, such as for a name too long.
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; name the checkpoint file in it")
    if not os.path.exists(path):
        raise InputError(f"{path}: no such checkpoint file")
    if not os.path.isfile(path):  # Opening a pipe would wait for ever.
        raise InputError(f"{path}: a checkpoint must be a regular file, not a pipe or a device")
    if os.path.getsize(path) == 0:
        raise InputError(f"{path}: is empty; fetch or write it anew")
    return path


def _find_reader(path):
    """Returns the function that reads a file, by its first bytes.

    The suffix decides only which of the errors a file gets that is neither.
    """
    with open(path, "rb") as file:
        start = file.read(16)
    if start.startswith(_TORCH_STARTS):
        return _read_torch
    if start[8:9] == b"{":  # after the length of the header, which is JSON
        return _read_safetensors
    if path.suffix.lower() not in _READERS:
        raise InputError(
            f"{path}: is neither a safetensors file nor one that torch.save wrote; a damaged one "
            f"must end in {', '.join(_READERS)}, got {path.suffix or 'no suffix'}"
        )
    return _READERS[path.suffix.lower()]


@dataclasses.dataclass(frozen=True)
class _OtherDtype:
    """A tensor in a safetensors file whose numbers are not read."""

    dtype: str


def _read_safetensors(path):
    """Returns the content of a safetensors file: names and arrays, halves still as they are."""
    content = {}
    # From bytes, not by `safe_open`: that fails on bfloat16 unless somebody has imported
    # ml_dtypes, and maps the file, so that a file cut short meanwhile kills the process.
    for name, entry in deserialize(path.read_bytes()):
        if _is_counter(name):
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            content[name] = _OtherDtype(entry["dtype"])
            continue
        array = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype("uint32") << 16).view("float32")
        content[name] = array.reshape(entry["shape"])
    return content


def _read_torch(path):
    """Returns what `torch.save` put into a file, if it is plain data and tensors."""
    torch = _import_torch(path)
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
        least = ".".join(map(str, MIN_TORCH))
        raise InputError(
            f"{path}: PyTorch {torch.__version__} can be made to run code from such a file: "
            f"`pip install 'torch>={least}'`, or convert the file to .safetensors"
        )
    if zipfile.is_zipfile(path):  # else of the format before PyTorch 1.6, without checksums
        _check_zip(path)
    try:
        allowed = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals(allowed),
            open(path, "rb") as file,  # given a path, PyTorch goes by the suffix
        ):
            warnings.simplefilter("ignore")  # about how to load it with less care
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise _torch_error(path, error) from error


def _import_torch(path):
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: files of torch.save need PyTorch: `pip install torch`, "
            "or use a .safetensors file"
        ) from error
    return torch


def _check_zip(path):
    """Checks what PyTorch does not: the checksums, and that the content is no zip bomb."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > _MAX_EXPANSION * path.stat().st_size:
            raise _size_error(path)
        # For a member marked as a folder PyTorch returns memory that it has not filled.
        folders = [each.filename for each in members if each.external_attr & 16 and each.file_size]
        damaged = folders[0] if folders else archive.testzip()
    if damaged is not None:
        raise InputError(
            f"{path}: damaged: {damaged!r} in it is not what was written; fetch or write it anew"
        )


def _torch_error(path, error):
    """Returns the InputError for what torch.load has raised.

    Its own message for a file with code in it recommends `weights_only=False`, which runs it.
    """
    code = re.search(r"GLOBAL ([\w.]+)", str(error))
    if code:
        return InputError(
            f"{path}: refused: it holds {code[1]}, and loading that may run code; "
            "save `model.state_dict()` alone"
        )
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return InputError(
            f"{path}: no file of tensors that PyTorch wrote (damaged, a TorchScript program or "
            "another format); save `model.state_dict()` with torch.save"
        )
    return InputError(f"{path}: cannot be read, fetch or write it anew: {one_line(error)}")


def _arrays(label, content, limit):
    """Turns what a checkpoint holds into `Tensors`; `limit` is how many bytes they may claim."""
    taken, state = _state_dict(label, content)
    arrays, unusable, size = {}, {}, 0
    for name, value in state.items():
        if not isinstance(name, str):
            raise InputError(f"{label}: the tensors' names must be strings, got {name!r:.80}")
        if _is_counter(name):
            continue
        dtype = _dtype_name(value)
        if dtype is None:
            unusable[name] = (
                f"{label}: {name!r} must be a tensor, got {type(value).__name__}; "
                f"a state dict inside must be under {', '.join(_WRAPPERS)}"
            )
            continue
        if dtype not in _READ_AS:
            unusable[name] = str(_dtype_error(label, name, dtype))
            continue
        size += _claimed_bytes(value)
        if size > limit:
            raise _size_error(label)
        arrays[name] = _array(label, name, value, dtype)
        if arrays[name].size == 0:  # its other axes may claim any size, and networks are built so
            raise InputError(
                f"{label}: {name!r} must have at least one number along each axis, "
                f"got shape {arrays[name].shape}"
            )
    if not arrays:
        nothing = f"{label}: holds no tensors; save `model.state_dict()`"
        raise InputError(next(iter(unusable.values()), nothing))
    return Tensors(_without_prefixes(arrays), taken, unusable)


def _state_dict(label, content):
    """Returns the mapping of names to tensors that `content` is, or wraps, and its key in it."""
    if not isinstance(content, Mapping):
        raise InputError(
            f"{label}: must hold a mapping of names to tensors, got {type(content).__name__}; "
            "save `model.state_dict()`"
        )
    usual = [key for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
    if not usual and _is_state_dict(content):
        return None, content
    inside = [key for key, value in content.items() if _is_state_dict(value)]
    averaged = [key for key in inside if AVERAGED.search(str(key))]
    found = averaged or usual[:1] or inside
    if len(found) == 1:
        return found[0], content[found[0]]
    # Several parts, such as a backbone and a head: their keys tell them apart.
    parts = {f"{key}.{name}": value for key in found for name, value in content[key].items()}
    return None, parts or content


def _is_state_dict(value):
    """Tells names of weights from other mappings: an optimizer's state has numbers for names."""
    return isinstance(value, Mapping) and any(
        isinstance(name, str) and _dtype_name(entry) in _READ_AS and len(entry.shape) > 0
        for name, entry in value.items()
    )


def _is_counter(name):
    return name.rpartition(".")[2] in _COUNTERS


def _dtype_name(value):
    """Returns the dtype's name of an array or a PyTorch tensor; None for anything else."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.name
    if isinstance(value, _OtherDtype):
        return value.dtype
    # Told by what it has, so that nothing imports PyTorch.
    return str(value.dtype).removeprefix("torch.") if hasattr(value, "detach") else None


def _claimed_bytes(value):
    """Returns what a dense copy of a tensor takes; a sparse or repeated one has less itself."""
    if hasattr(value, "detach"):
        return value.numel() * value.element_size()
    return value.nbytes


def _array(label, name, value, dtype):
    """Returns a tensor of a dtype in `_READ_AS` as a contiguous array of finite numbers."""
    try:
        if hasattr(value, "detach"):
            value = (value.float() if dtype == "bfloat16" else value).numpy(force=True)
        array = np.asarray(value, _READ_AS[dtype], order="C")
    except Exception as error:  # sparse, nested, without data: PyTorch has many kinds
        raise InputError(
            f"{label}: {name!r} must be a dense tensor with data: {one_line(error)}"
        ) from error
    # Of no use to anybody, and NaN would pass comparisons that ask whether a difference is large.
    if not np.isfinite(array).all():
        raise InputError(
            f"{label}: {name!r} holds NaN or infinity, its training has diverged; "
            "take an earlier checkpoint"
        )
    return array


def _without_prefixes(arrays):
    """Takes off the prefixes that every name has; there may be several, in any order."""
    while True:
        shared = [p for p in _PREFIXES if all(name.startswith(p) for name in arrays)]
        if not shared:
            return arrays
        arrays = {name.removeprefix(shared[0]): array for name, array in arrays.items()}


def _dtype_error(label, name, dtype):
    return InputError(
        f"{label}: {name!r} must be one of {', '.join(_READ_AS)}, got {dtype}; "
        "convert it or leave it out"
    )


def _size_error(label):
    return InputError(
        f"{label}: refused: its tensors claim over {_MAX_EXPANSION} times the file's size; "
        "save `model.state_dict()` with torch.save, not compressed"
    )


def _writable(path, name, value):
    """Returns `value` as files hold it: contiguous and in the machine's byte order."""
    if not isinstance(name, str) or name == "__metadata__":  # reserved in .safetensors
        raise InputError(f"{path}: a tensor's name must be a string, got {name!r:.80}")
    dtype = _dtype_name(value)
    if dtype not in _WRITTEN or not isinstance(value, (np.ndarray, np.generic)):
        raise InputError(
            f"{path}: {name!r} must be a NumPy array of {', '.join(sorted(_WRITTEN))}, "
            f"got {dtype or type(value).__name__}"
        )
    # safetensors writes the memory as it lies: a transposed array would be stored as another.
    return np.asarray(value, value.dtype.newbyteorder("="), order="C")


def _encode_safetensors(path, arrays):
    # Loaders of the Hugging Face libraries refuse a file that does not say so.
    return safetensors_bytes(arrays, metadata={"format": "pt"})


def _encode_torch(path, arrays):
    torch = _import_torch(path)
    buffer = io.BytesIO()
    torch.save({name: torch.tensor(array) for name, array in arrays.items()}, buffer)
    return buffer.getbuffer()


class _StandIn:
    """Takes the place of an object beside the weights, so that nothing of its class runs."""

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class _DictStandIn:
    """The same for a dictionary of some kind, whose content may be weights."""

    def __new__(cls, *arguments):
        return OrderedDict()  # the one kind that PyTorch fills, and gives attributes


class _ListStandIn:
    """The same for a list of some kind."""

    def __new__(cls, *arguments):
        return []


# The stand-in -> the module -> its classes and functions that training scripts save beside the
# weights: options, paths, times and metrics. PyTorch refuses a file with any other.
_BESIDE = {
    _StandIn: {
        "argparse": "Namespace",
        "types": "SimpleNamespace",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "scalar _reconstruct",
        "numpy._core.multiarray": "scalar _reconstruct",
        "pathlib": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
        "pathlib._local": "Path PosixPath WindowsPath PurePosixPath PureWindowsPath",
        "datetime": "datetime date time timedelta timezone",
        "builtins": "bool dict float frozenset int list object range slice str tuple",
        "typing": "Any",
        "omegaconf.base": "ContainerMetadata Metadata",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode PathNode StringNode",
    },
    _DictStandIn: {
        "collections": "defaultdict",
        "easydict": "EasyDict",
        "lightning.fabric.utilities.data": "AttributeDict",
        "lightning.pytorch.utilities.parsing": "AttributeDict",
        "lightning_fabric.utilities.data": "AttributeDict",
        "pytorch_lightning.utilities.parsing": "AttributeDict",
        "yacs.config": "CfgNode",
    },
    _ListStandIn: {"collections": "deque"},
}
# The full name -> a class of that name, for errors, that makes nothing but a stand-in.
_STAND_INS = {
    f"{module}.{name}": type(f"{module}.{name}", (stand_in,), {})
    for stand_in, modules in _BESIDE.items()
    for module, names in modules.items()
    for name in names.split()
}

# A ZIP, and the magic number of the format before PyTorch 1.6.
_TORCH_STARTS = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9")
_READERS = {
    ".safetensors": _read_safetensors,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
}
_ENCODERS = {".safetensors": _encode_safetensors, ".pth": _encode_torch, ".pt": _encode_torch}
