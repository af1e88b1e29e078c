"""The precision to train in on this machine."""

import keras

from keras_resnet.config import PRECISIONS
from keras_resnet.utils.errors import look_up

POLICIES = {
    name: name if name == "float32" else f"mixed_{name}" for name in PRECISIONS if name != "auto"
}
"""precision -> Keras's dtype policy."""

CPU_FLAGS = ("amx_bf16", "avx512_bf16")


def _cpu_has_bfloat16():
    """Returns the processor's flag for bfloat16 matrix products, or None."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return None
    return next((flag for flag in CPU_FLAGS if flag in flags), None)


def _tensorflow_gpu():
    import tensorflow as tf

    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return None
    details = tf.config.experimental.get_device_details(gpus[0])
    capable = details.get("compute_capability", (0, 0)) >= (8, 0)
    return details.get("device_name", "GPU"), capable


def _jax_gpu():
    import jax

    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    capable = float(getattr(device, "compute_capability", 0)) >= 8.0
    return device.device_kind, capable


def _torch_gpu():
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0) >= (8, 0)


# backend -> function that returns None, or the GPU's name and whether it has bfloat16.
_GPUS = {"tensorflow": _tensorflow_gpu, "jax": _jax_gpu, "torch": _torch_gpu}

# XLA's CPU compiler does not use the processor's bfloat16 instructions for convolutions.
_CPU_BACKENDS = ("tensorflow", "torch")


def choose_precision(precision="auto"):
    """Chooses the dtype to compute in; weights are kept in float32 in any case.

    Args:
        precision: One of `config.PRECISIONS`. "auto" is bfloat16 where the GPU or the
            processor computes in it (Ampere or newer; AVX512-BF16 or AMX), else float32.

    Returns:
        The precision ("float32", "bfloat16" or "float16"), and why, in a few words.

    Raises:
        InputError: If `precision` is none of these.

    Example:
        >>> choose_precision("float32")
        ('float32', 'as given')
    """
    look_up(dict.fromkeys(PRECISIONS), precision, "precision")
    if precision in POLICIES:
        return precision, "as given"
    backend = keras.backend.backend()
    gpu = _GPUS[backend]() if backend in _GPUS else None
    if gpu is not None:
        name, capable = gpu
        return ("bfloat16", f"{name} has it") if capable else ("float32", f"{name} lacks bfloat16")
    flag = _cpu_has_bfloat16()
    if flag is None:
        return "float32", f"this processor does not list {' or '.join(CPU_FLAGS)}"
    if backend not in _CPU_BACKENDS:
        return "float32", f"the {backend} backend is not faster in bfloat16 on a CPU"
    return "bfloat16", f"this processor has {flag.upper().replace('_', '-')}"
