"""Checkpoints of PyTorch, read into NumPy arrays and written from them.

A checkpoint here is a mapping of names to arrays; `layouts.py` finds the network in it. Reading
never runs code from a file, and safetensors need no PyTorch.
"""

import dataclasses
import io
import math
import os
import re
from collections.abc import Mapping

import numpy as np
from safetensors import deserialize
from safetensors.numpy import save as safetensors_bytes

from keras_resnet.untrusted import torch_files
from keras_resnet.untrusted.common import check_claim, check_regular_file, refusing
from keras_resnet.utils.errors import InputError, one_line
from keras_resnet.utils.files import expand_user, replacing

# The dtype of a tensor -> the dtype that it is read as. NumPy has no bfloat16, and float32 holds
# every half-precision value.
READ_AS = {
    "float16": "float32",
    "bfloat16": "float32",
    "float32": "float32",
    "float64": "float64",
}
_SAFETENSORS_DTYPES = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
_SUFFIXES = (".safetensors", ".pth", ".pt")
_WRITTEN = {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "bool"}

# Counters beside the weights: of BatchNorm (used only with `momentum=None`), of
# torch.optim.swa_utils.AveragedModel, and those that thop leaves in a network it has profiled.
_COUNTERS = {"num_batches_tracked", "n_averaged", "total_ops", "total_params"}

# Keys under which training scripts save the state dict, beside the epoch and the optimizer.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
# A key or a prefix of averaged weights, such as "state_dict_ema", "model_ema" or "ema_model.".
# A script that keeps both sets evaluates the averaged one.
AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged)([._]|$)")
# DataParallel and torch.compile put these before every name.
_PREFIXES = ("module.", "_orig_mod.")


class Tensors(dict):
    """A checkpoint's weights: names -> contiguous arrays of float32 or float64, all finite.

    Attributes:
        taken: The key that they were under, such as "state_dict_ema"; None if there was none.
        unusable: The names of the entries that are no floating-point tensors -> the reason, one
            line. Other parts of the training script may need them, a network does not.
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
        tensors = _find_tensors("the mapping given", source)
        for name, array in tensors.items():
            # Copied: the tensors of a live model would change later.
            tensors[name] = array.copy()
        return tensors
    if not isinstance(source, (str, os.PathLike)):
        raise InputError(
            "a checkpoint must be a path or a mapping of names to tensors, such as "
            f"`model.state_dict()`, got {type(source).__name__}"
        )
    path = check_regular_file(source, "checkpoint")
    with refusing(path, torch_files.DAMAGED):
        with open(path, "rb") as file:
            start = file.read(16)
        if start[8:9] == b"{":  # after the length of the header, which is JSON
            content = _read_safetensors(path)
        elif start.startswith(torch_files.STARTS):
            content = torch_files.read_torch(path)
        else:
            raise InputError(
                f"{path}: is neither a safetensors file nor one that torch.save wrote, or it is "
                "damaged; save `model.state_dict()` with torch.save"
            )
        return _find_tensors(path, content, path.stat().st_size)


def write_checkpoint(tensors, path):
    """Writes arrays as a file that PyTorch loads, whole or not at all.

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
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(
            f"{path}: a checkpoint's name must end in {', '.join(_SUFFIXES)}, "
            f"got {suffix or 'no suffix'}"
        )
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    if not isinstance(tensors, Mapping) or not tensors:
        raise InputError(
            f"{path}: the tensors to write must be a mapping of names to arrays with at least one "
            f"entry, got {type(tensors).__name__}"
        )
    arrays = {name: _writable(path, name, value) for name, value in tensors.items()}
    if suffix == ".safetensors":
        # Loaders of the Hugging Face libraries refuse a file without this entry.
        data = safetensors_bytes(arrays, metadata={"format": "pt"})
    else:
        torch, buffer = torch_files.import_torch(path), io.BytesIO()
        torch.save({name: torch.tensor(array) for name, array in arrays.items()}, buffer)
        data = buffer.getbuffer()
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@dataclasses.dataclass(frozen=True)
class _OtherDtype:
    """A tensor of a safetensors file, of a dtype that is not read."""

    dtype: str


def _read_safetensors(path):
    """Returns the content of a safetensors file: names and arrays, halves still as they are."""
    content = {}
    # From bytes, not by `safe_open`, which fails on bfloat16 unless ml_dtypes is imported, and
    # maps the file, so that a file cut short meanwhile kills the process.
    for name, entry in deserialize(path.read_bytes()):
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            content[name] = _OtherDtype(entry["dtype"])
            continue
        array = np.frombuffer(entry["data"], _SAFETENSORS_DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            array = (array.astype("uint32") << 16).view("float32")
        content[name] = array.reshape(entry["shape"])
    return content


def _find_tensors(label, content, stored=math.inf):
    """Returns the `Tensors` in the content of a checkpoint, under names without prefixes."""
    taken, state = _state_dict(label, content)
    tensors = to_tensors(label, state, stored)
    return Tensors(_without_prefixes(tensors), taken, tensors.unusable)


def to_tensors(label, state, stored=math.inf):
    """Turns a mapping of names to tensors into `Tensors`, without the counters.

    Args:
        label: The source, for messages.
        state: The mapping; its values may be NumPy arrays, PyTorch tensors or anything else.
        stored: The number of bytes of the file; see `check_claim`.

    Raises:
        InputError: If it holds no floating-point tensor, or one that is empty or not finite.
    """
    arrays, unusable, claimed = {}, {}, 0
    for name, value in state.items():
        if not isinstance(name, str):
            raise InputError(f"{label}: the tensors' names must be strings, got {name!r:.80}")
        if name.rpartition(".")[2] in _COUNTERS:
            continue
        dtype = _dtype_name(value)
        if dtype is None:
            unusable[name] = (
                f"{label}: {name!r} must be a tensor, got {type(value).__name__}; "
                f"a state dict inside must be under {', '.join(_WRAPPERS)}"
            )
            continue
        if dtype not in READ_AS:
            unusable[name] = str(dtype_error(label, name, dtype))
            continue
        claimed += _claimed_bytes(value)
        check_claim(label, "its tensors", claimed, stored)
        arrays[name] = _array(label, name, value, dtype)
    if not arrays:
        nothing = f"{label}: holds no tensors; save the weights of a network"
        raise InputError(next(iter(unusable.values()), nothing))
    return Tensors(arrays, unusable=unusable)


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
        isinstance(name, str) and _dtype_name(entry) in READ_AS and len(entry.shape) > 0
        for name, entry in value.items()
    )


def _dtype_name(value):
    """Returns the dtype's name of an array or a PyTorch tensor; None for anything else."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype.name
    if isinstance(value, _OtherDtype):
        return value.dtype
    # PyTorch's tensors are recognised by an attribute, so that nothing imports PyTorch.
    return str(value.dtype).removeprefix("torch.") if hasattr(value, "detach") else None


def _claimed_bytes(value):
    """Returns the bytes of a dense copy of a tensor; a sparse or repeated one takes less itself."""
    if hasattr(value, "detach"):
        return value.numel() * value.element_size()
    return value.nbytes


def _array(label, name, value, dtype):
    """Returns a tensor of a dtype in `READ_AS` as a contiguous array of finite numbers."""
    try:
        if hasattr(value, "detach"):
            value = (value.float() if dtype == "bfloat16" else value).numpy(force=True)
        array = np.asarray(value, READ_AS[dtype], order="C")
    except Exception as error:  # sparse, nested, without data: PyTorch has many kinds
        raise InputError(
            f"{label}: {name!r} must be a dense tensor with data: {one_line(error)}"
        ) from error
    if array.size == 0:  # Its other axes may claim any size, and networks are built by them.
        raise InputError(
            f"{label}: {name!r} must have at least one number along each axis, "
            f"got shape {array.shape}"
        )
    # NaN would also pass every test whether a difference is too large.
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


def dtype_error(label, name, dtype):
    """Returns the `InputError` for a tensor of a dtype that is not read."""
    return InputError(
        f"{label}: {name!r} must be one of {', '.join(READ_AS)}, got {dtype}; "
        "convert it or leave it out"
    )


def _writable(path, name, value):
    """Returns `value` as files store it: contiguous and in the machine's byte order."""
    if not isinstance(name, str) or name == "__metadata__":  # reserved in .safetensors
        raise InputError(f"{path}: a tensor's name must be a string, got {name!r:.80}")
    dtype = _dtype_name(value)
    if dtype not in _WRITTEN or not isinstance(value, (np.ndarray, np.generic)):
        raise InputError(
            f"{path}: {name!r} must be a NumPy array of {', '.join(sorted(_WRITTEN))}, "
            f"got {dtype or type(value).__name__}"
        )
    # safetensors writes the bytes in memory order, also of a transposed array.
    return np.asarray(value, value.dtype.newbyteorder("="), order="C")
