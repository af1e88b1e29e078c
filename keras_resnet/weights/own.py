"""A `.keras` file with a network of ours as a source of weights."""

import dataclasses

import keras
import numpy as np
from keras import ops

from keras_resnet import archive
from keras_resnet.models import STEMS, module_of
from keras_resnet.preprocessing import NORMALIZATIONS, ImagePreprocessing, find_normalization
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.files import expand_user
from keras_resnet.weights.conversion import Source, sha256_of
from keras_resnet.weights.layouts import Checkpoint, Layout
from keras_resnet.weights.transfer import find_variants, load_tensors, naming

OWN = "keras_resnet"
"""The layout of such a source: our own names. No row of `LAYOUTS`: no other library has it."""

_VARIABLES = ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")
_STEM = [f"stem_{part}{number}" for part in ("conv", "bn") for number in ("", 1, 2, 3)]
_HEAD = "logits"
_REST = ("shortcut_conv", "shortcut_bn", "se/fc1", "se/fc2", "final_bn", _HEAD)


@dataclasses.dataclass(frozen=True)
class OwnSource(Source):
    """A `.keras` file of ours that was read once; see `Source`.

    Attributes:
        normalization: `mean`, `std` and `reverse_channels` of the preprocessing, a dict; None
            where the network takes floats.
    """

    normalization: dict | None = None

    @property
    def description(self):
        """Where files of this layout come from, one line."""
        return "a network of this package"

    def load_into(self, model, *, skip_head=False, adapt_input=False):
        """Loads the tensors; arguments, result and errors as for `load_torch_weights`."""
        row = Layout(
            self.description,
            self.checkpoint.variant,
            block="stage{stage}_block{block}/",
            names={name: name for name in (*_STEM, *_REST)},
            marker="",
            variables={name: f"/{name}" for name in _VARIABLES},
            channels_first=False,
        )
        options = {"skip_head": skip_head, "adapt_input": adapt_input}
        with naming(self.path):
            return load_tensors(model, self.tensors, layout=OWN, row=row, **options)

    def find_normalization(self):
        """Returns the row of `NORMALIZATIONS` that the preprocessing has; None without one.

        Raises:
            InputError: If there is no such row.
        """
        if self.normalization is None:
            return None
        for name in NORMALIZATIONS:
            row = find_normalization(name, self.checkpoint.channels)
            row = {"reverse_channels": False, **row}
            if all(np.allclose(row[key], value) for key, value in self.normalization.items()):
                return name
        found = ", ".join(f"{name} {value}" for name, value in self.normalization.items())
        raise InputError(
            f"{self.path}: its preprocessing must normalise as --normalize "
            f"{', '.join(NORMALIZATIONS)} do, got {found}; choose one of them"
        )


def open_own(path):
    """Reads a `.keras` file with a network of `build_resnet`; runs no code in it.

    Args:
        path: The file: model.keras or a checkpoint of a run, or what `save` of such a network
            wrote, with or without preprocessing before the network.

    Returns:
        An `OwnSource`.

    Raises:
        InputError: If the file cannot be read, is refused, or holds no such network.
    """
    path = str(expand_user(path))
    model = archive.load_model(path)
    network = _find_network(model)
    variants = find_variants(network) if network else []
    if not variants:
        raise InputError(f"{path}: holds no network of `build_resnet`, got {model.name!r}")
    # Another head than `logits` stays behind.
    layers = [each for each in network.layers if module_of(each) != each.name or each.name == _HEAD]
    weights = [weight for layer in layers for weight in layer.weights]
    tensors = {weight.path: ops.convert_to_numpy(weight) for weight in weights}
    broken = [name for name, array in tensors.items() if not np.isfinite(array).all()]
    if broken:
        raise InputError(f"{path}: weights must be finite, got infinity or NaN in {broken[0]}")
    named = archive.read_metadata(path).get("variant")
    kernel = tensors.get("stem_conv/kernel", tensors.get("stem_conv1/kernel"))
    head = tensors.get(f"{_HEAD}/bias")
    checkpoint = Checkpoint(
        layout=OWN,
        # Basic blocks look alike in two variants: the run says which it is.
        variant=named if named in variants else variants[0],
        stem=_find_stem(tensors, kernel),
        channels=kernel.shape[2],
        num_classes=None if head is None else len(head),
        num_tensors=len(tensors),
    )
    layers = model._flatten_layers(include_self=False)
    before = next((layer for layer in layers if isinstance(layer, ImagePreprocessing)), None)
    names = ("mean", "std", "reverse_channels")
    normalization = {name: getattr(before, name) for name in names} if before else None
    return OwnSource(path, sha256_of(path), checkpoint, tensors, normalization)


def _find_network(model):
    """Returns the model that the stem is a layer of: the model given, or one inside it."""
    models = [model, *model._flatten_layers(include_self=False)]
    for each in models:
        if isinstance(each, keras.Model):
            names = {layer.name for layer in each.layers}
            if names & {"stem_conv", "stem_conv1"}:
                return each
    return None


def _find_stem(tensors, kernel):
    count = sum(name.startswith("stem_conv") and name.endswith("kernel") for name in tensors)
    for name, stem in STEMS.items():
        if len(stem.convolutions) == count and stem.convolutions[0][0] == kernel.shape[0]:
            return name
    raise InputError(f"the stem must be one of {', '.join(STEMS)}, got {count} convolutions")
