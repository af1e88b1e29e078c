"""A float32 twin of a model in another precision, and the comparison of their outputs."""

import contextlib
import json
import tempfile
import types
from pathlib import Path

import keras
import numpy as np

from keras_resnet.utils.errors import InputError, one_line

_OTHER_FLOATS = ("mixed_bfloat16", "mixed_float16", "bfloat16", "float16", "float64")

# The model's dtype -> largest relative difference of its twin. A network rounds in each layer.
_TOLERANCES = {"bfloat16": 0.1, "float16": 0.02, "float64": 1e-3}


def in_float32(model):
    """Returns the model itself if it computes in float32, otherwise its float32 twin.

    A model in mixed precision would be exported with bfloat16 operations that no phone has. The
    twin is the model as Keras saves and loads it, so that every layer restores its own state: the
    statistics of a `Normalization`, the vocabulary of a look-up. `check_twin` compares the two
    before the twin is used.

    Args:
        model: A Keras model; its compilation is ignored.

    Raises:
        InputError: If it has quantized layers, or Keras cannot save it and load it again.
    """
    layers = list(model._flatten_layers())
    policies = {layer.dtype_policy.name for layer in layers}
    if any("_from_" in name for name in policies):
        raise InputError(f"{model.name} is quantized already ({', '.join(sorted(policies))})")
    # A look-up has the policy of an integer or a string, which does not change.
    if not any(name in _OTHER_FLOATS for name in policies):
        return model
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            _uncompiled(layers),
            _objects_named(layers) as named,
        ):
            saved = Path(folder, "model")
            model.save(saved, zipped=False)
            config = saved / "config.json"
            text = json.dumps(_float32_config(json.loads(config.read_text(encoding="utf-8"))))
            config.write_text(text, encoding="utf-8")
            return keras.models.load_model(
                saved, custom_objects=named, compile=False, safe_mode=True
            )
    except Exception as error:
        raise InputError(
            f"{model.name} computes in {', '.join(sorted(policies))} and Keras cannot save it and "
            f"load it in float32: {one_line(error)}; give its own layers `get_config`, or build it "
            "in float32"
        ) from error


def check_twin(name, dtypes, own, twins):
    """Compares the predictions of a float32 twin with those of the model itself.

    Args:
        name: The model's name, for messages.
        dtypes: The compute dtypes of the model's layers.
        own: The model's outputs, floats, [count, columns].
        twins: The twin's outputs for the same images.

    Returns:
        A dict: "computed_in", the dtype with the largest tolerance; "difference", the root mean
        square of the differences over that of the outputs; "tolerance".

    Raises:
        InputError: If they differ by more than the rounding of the dtype.

    Example:
        >>> own, twins = np.full((2, 3), 1.0), np.full((2, 3), 1.01)
        >>> check_twin("mine", {"float16"}, own, twins)["tolerance"]
        0.02
    """
    tolerance, dtype = max((_TOLERANCES.get(each, 0), each) for each in dtypes)
    own, twins = (np.asarray(each, "float64") for each in (own, twins))
    size = np.sqrt(np.mean(own**2))
    difference = float(np.sqrt(np.mean((own - twins) ** 2)) / max(size, np.finfo("float32").tiny))
    # A difference that is not a number fails.
    if not difference <= tolerance:
        raise InputError(
            f"{name} computes in {dtype}, and its float32 copy gives other outputs: "
            f"relative difference {difference:.2g}, must be at most {tolerance:g}; a layer keeps "
            "state that it does not save, or depends on the precision: build the model in float32"
        )
    return {"computed_in": dtype, "difference": difference, "tolerance": tolerance}


def _float32_config(value):
    """Returns a Keras configuration with float32 for every float, and without compilation."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if key != "compile_config"}
        return {key: _float32_config(item) for key, item in kept.items()}
    if isinstance(value, list):
        return [_float32_config(item) for item in value]
    return "float32" if isinstance(value, str) and value in _OTHER_FLOATS else value


@contextlib.contextmanager
def _uncompiled(layers):
    """Keeps Keras from saving optimizer and loss, which need not be serializable."""
    compiled = [layer for layer in layers if getattr(layer, "compiled", False)]
    for model in compiled:
        model.compiled = False
    try:
        yield
    finally:
        for model in compiled:
            model.compiled = True


@contextlib.contextmanager
def _objects_named(layers):
    """Yields the user's classes and functions by their names in a saved config.

    They need not be registered with Keras. Each function has a unique name in this context: Keras
    would save a lambda, which has no name, as code, and does not load code.
    """
    parts = [*layers, *(part for layer in layers for part in vars(layer).values())]
    classes = {type(part) for part in parts if hasattr(part, "get_config")}
    functions = {part: part.__name__ for part in parts if isinstance(part, types.FunctionType)}
    users = [each for each in (*classes, *functions) if not each.__module__.startswith("keras.")]
    named = {}
    for number, each in enumerate(users):
        if each in functions:
            each.__name__ = f"function_{number}"
        named[each.__name__] = each
    try:
        yield named
    finally:
        for function, name in functions.items():
            function.__name__ = name
