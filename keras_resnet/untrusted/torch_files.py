"""Files of `torch.save`, read without running code from them.

Such a file is a pickle, which can name any function to call. PyTorch's restricted unpickler
refuses all but tensors and plain containers; this module adds harmless stand-ins for the classes
that training scripts commonly save beside the weights.
"""

import pickle
import re
import warnings
import zipfile
from collections import OrderedDict

from keras_resnet.untrusted.common import refusing
from keras_resnet.untrusted.zip_files import check_members, opened
from keras_resnet.utils.errors import InputError

MIN_TORCH = (2, 10)
"""Before this version a file can take over the process in spite of `weights_only=True`.

See CVE-2025-32434 and CVE-2026-24747.
"""

STARTS = (b"PK\x03\x04", b"\x80")
"""The first bytes: of a ZIP archive, and of a pickle, the format before PyTorch 1.6."""

DAMAGED = "cannot be read, fetch or write it anew"


class _StandIn:
    """Takes the place of an object beside the weights, so that nothing of its class runs."""

    def __new__(cls, *arguments):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


class _DictStandIn:
    """Takes the place of a kind of dictionary, whose content may be weights."""

    def __new__(cls, *arguments):
        return OrderedDict()  # the one kind that PyTorch fills, and gives attributes


class _ListStandIn:
    """Takes the place of a kind of list."""

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


def import_torch(path):
    """Returns the module `torch`, which a file needs.

    Args:
        path: The file, for the message.

    Raises:
        InputError: If PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"{path}: files of torch.save need PyTorch: `pip install torch`, "
            "or use a .safetensors file"
        ) from error
    return torch


def read_torch(path):
    """Returns the content of a file of `torch.save`, if it is plain data and tensors.

    Args:
        path: The file, a `pathlib.Path`.

    Raises:
        InputError: If PyTorch is missing or too old, or the file is damaged or would run code.
    """
    torch = import_torch(path)
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
        least = ".".join(map(str, MIN_TORCH))
        raise InputError(
            f"{path}: PyTorch {torch.__version__} can be made to run code from such a file: "
            f"`pip install 'torch>={least}'`, or convert the file to .safetensors"
        )
    if zipfile.is_zipfile(path):  # The format before PyTorch 1.6 has no checksums.
        with opened(path, DAMAGED) as archive:
            check_members(path, archive)
    allowed = [(stand_in, name) for name, stand_in in _STAND_INS.items()]
    with (
        refusing(path, DAMAGED),
        warnings.catch_warnings(),
        torch.serialization.safe_globals(allowed),
        open(path, "rb") as file,  # given a path, PyTorch goes by the suffix
    ):
        warnings.simplefilter("ignore")  # about how to load it with less care
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # PyTorch's message recommends `weights_only=False`, which runs the code.
            if code := re.search(r"GLOBAL ([\w.]+)", str(error)):
                raise InputError(
                    f"{path}: refused: it holds {code[1]}, and loading that may run code; "
                    "save `model.state_dict()` alone"
                ) from error
            if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
                raise InputError(
                    f"{path}: no file of tensors that PyTorch wrote (damaged, a TorchScript "
                    "program or another format); save `model.state_dict()` with torch.save"
                ) from error
            raise
