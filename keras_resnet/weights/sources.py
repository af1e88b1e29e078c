"""Weights by path or by name, opened once: the tensors, and the network that they come from."""

import dataclasses
import os

import keras
import numpy as np
from keras import ops

from keras_resnet import archive
from keras_resnet.models import SPECS, module_of
from keras_resnet.preprocessing import NORMALIZATIONS, ImagePreprocessing, find_normalization
from keras_resnet.untrusted.common import check_regular_file
from keras_resnet.untrusted.manifest import digest
from keras_resnet.utils.errors import InputError
from keras_resnet.weights.applications import read_keras_applications
from keras_resnet.weights.checkpoint import read_checkpoint, to_tensors
from keras_resnet.weights.configuration import Configuration, read_configuration
from keras_resnet.weights.hub import (
    CONFIG,
    WEIGHTS,
    Repository,
    check_pin,
    check_sha256,
    find_repository,
    split_pin,
)
from keras_resnet.weights.layouts import (
    HEAD,
    LAYOUTS,
    OWN_LAYOUT,
    Checkpoint,
    Layout,
    find_network,
    inspect_tensors,
)
from keras_resnet.weights.transfer import find_variants, load_tensors, naming


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that were read once.

    Attributes:
        path: The file, or the repository, as it was named.
        sha256: The checksum (hex) of its bytes.
        checkpoint: The network that the tensors come from; see `inspect_tensors`.
        tensors: The tensors' names -> NumPy arrays.
        own_layout: The layout of a `.keras` file of this package; None for every other file, whose
            layout is a row of `LAYOUTS`.
        normalization: `mean`, `std` and `reverse_channels` of the preprocessing in such a
            `.keras` file, or of a repository's, a dict; None where it is not known.
        repository: The `hub.Repository` of the file; None for a file by itself.
        configuration: The `Configuration` of that repository; None for a file by itself.
        image_size: Height and width of the network's images, where the preprocessing in a `.keras`
            file has them.
        model: The row of `SPECS` that a repository or a run states; None for other files.
        class_names: The names of the head's classes, in each form that is known: words, and the ids
            of ImageNet's classes in WordNet. Empty where they are not known.
        recorded_origin: The `origin` that was recorded when the weights were read; None for
            weights that were read now.
    """

    path: str
    sha256: str
    checkpoint: Checkpoint
    tensors: dict = dataclasses.field(repr=False)
    own_layout: Layout | None = dataclasses.field(default=None, repr=False)
    normalization: dict | None = None
    repository: Repository | None = None
    configuration: Configuration | None = None
    image_size: int | None = None
    model: str | None = None
    class_names: tuple = dataclasses.field(default=(), repr=False)
    recorded_origin: dict | None = None

    @property
    def description(self):
        """The library that writes files of this layout, one line."""
        return (self.own_layout or LAYOUTS[self.checkpoint.layout]).description

    def load_into(self, model, *, skip_head=False, adapt_input=False):
        """Loads the tensors; arguments, result and errors as for `load_torch_weights`."""
        with naming(self.path):
            return load_tensors(
                model,
                self.tensors,
                layout=self.own_layout or self.checkpoint.layout,
                skip_head=skip_head,
                adapt_input=adapt_input,
            )

    @property
    def input_shape(self):
        """(height, width, channels) of the images; height and width are None if not known."""
        known = self.configuration and self.configuration.preprocessing
        size = known["image_size"] if known else self.image_size
        return size, size, self.checkpoint.channels

    @property
    def form(self):
        """Input shape, number of classes (None without a head), variant and stem of the network."""
        found = self.checkpoint
        return self.input_shape, found.num_classes, found.variant, found.stem

    @property
    def origin(self):
        """Where the weights come from, a dict that JSON can hold, for the metadata of models."""
        if self.recorded_origin is not None:
            return self.recorded_origin
        if self.configuration is None:
            return {"file": os.path.basename(self.path), "sha256": self.sha256}
        stated, name = self.configuration, self.repository.hub_name
        return {
            # A folder without its path, which other machines do not have.
            "name": name.repository if name else os.path.basename(os.path.abspath(self.path)),
            "revision": name.revision if name else None,
            "sha256": self.sha256,
            "library": stated.library,
            "architecture": stated.architecture,
            "license": stated.license,
            "url": stated.origin_url,
        }

    def has_classes(self, class_names):
        """Returns whether the head has as many classes, of these names where they are known."""
        known = [list(names) for names in self.class_names]
        is_as_large = self.checkpoint.num_classes == len(class_names)
        return is_as_large and (not known or list(class_names) in known)

    def check_spec(self, spec):
        """Refuses a network of another depth or width than the repository states.

        Args:
            spec: A row of `SPECS`, or a `Spec`.
        """
        stated = self.configuration
        if stated and SPECS.get(spec, spec) != stated.spec:
            raise InputError(
                f"{self.path}: its weights are of {stated.model or stated.spec}, got the network "
                f"{spec}"
            )

    def name_normalization(self):
        """Returns the row of `NORMALIZATIONS` of the preprocessing; None without preprocessing.

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


def open_source(path, layout=None, *, revision=None, sha256=None):
    """Reads weights and finds the network that they come from; runs no code in them.

    Args:
        path: A safetensors file or one of `torch.save`, whatever its name ends in; a `.h5` or
            `.keras` file of keras.applications; a `.keras` file with a network of `build_resnet`,
            with or without preprocessing; a finished run's folder; a row of `archive.TRAINED`; the
            name or the folder of a repository of timm or transformers, such as
            "timm/resnet18.a1_in1k" (see `hub`); or a `Repository`.
        layout: The name of a row of `LAYOUTS`, instead of recognising it.
        revision: See `hub.find_repository`.
        sha256: The checksum (hex) that the weights must have.

    Returns:
        A `Source`.

    Raises:
        InputError: If the weights cannot be read, are refused, or are of no known layout.
    """
    if not isinstance(path, (str, os.PathLike, Repository)):
        raise InputError(f"a checkpoint must be named by its path, got {type(path).__name__}")
    if repository := find_repository(path, revision=revision, sha256=sha256):
        return _open_repository(repository, layout)
    path, pin = split_pin(os.fspath(path))
    path = str(archive.find_model(path))
    if sha256 or pin:
        check_regular_file(path, "checkpoint")
        check_pin(path, path, check_sha256(sha256 or pin))
    return _open_file(path, layout)


def _open_repository(repository, layout):
    """Returns the `Source` of a repository's weights."""
    stated = read_configuration(repository)
    source = _open_file(str(repository.fetch_weights()), layout, repository.name)
    with naming(repository.name):
        _check_agreement(stated, source)
    checkpoint = dataclasses.replace(source.checkpoint, variant=stated.variant)
    names = ("mean", "std", "reverse_channels")
    known = stated.preprocessing
    return dataclasses.replace(
        source,
        checkpoint=checkpoint,
        normalization=known and {name: known[name] for name in names},
        repository=repository,
        configuration=stated,
        model=stated.model,
        class_names=tuple(filter(None, (stated.class_names, stated.class_ids))),
    )


def _check_agreement(stated, source):
    """Compares a configuration with the tensors beside it.

    The network is built as the configuration states: a large number in it must not fill the
    memory. Therefore each block has a kernel in the file whose size grows as the block's does.
    """
    row, found, spec = LAYOUTS[source.checkpoint.layout], source.checkpoint, stated.spec
    tensors = find_network(source.tensors, found.layout).select(source.tensors)
    last_conv, size, expansion = ("conv2", 3, 1) if spec.block == "basic" else ("conv3", 1, 4)
    # ResNeXt and Wide ResNet have other widths inside a block.
    widths = [filters * spec.width_per_group // 64 * spec.groups for filters in spec.filters]

    def last_kernel(stage, block):
        """Returns the shape of a block's last kernel, or None where there is no such block."""
        path = f"stage{stage}_block{block}/{last_conv}/kernel"
        kernel = tensors.get(row.name(path))
        return row.to_ours(path, kernel).shape if np.ndim(kernel) == 4 else None

    fits = stated.variant in (row.variant, *row.also)
    pairs = [
        ("variant", stated.variant, stated.variant if fits else row.variant),
        ("channels", stated.channels, found.channels),
        ("classes", stated.num_classes or None, found.num_classes),
        ("stem", spec.stem, found.stem),
    ]
    stages = zip(spec.blocks, spec.filters, widths, strict=True)
    for stage, (blocks, filters, width) in enumerate(stages, start=1):
        kernel = (size, size, width, filters * expansion)
        for block in range(1, blocks + 2):
            name = f"last kernel in block {block} of stage {stage}"
            pairs.append((name, kernel if block <= blocks else None, last_kernel(stage, block)))
    head = "logits/kernel"
    if (kernel := tensors.get(row.name(head))) is not None:
        pairs.append(
            ("inputs of the head", spec.filters[-1] * expansion, row.to_ours(head, kernel).shape[0])
        )
    for name, theirs, ours in pairs:
        if theirs != ours:
            raise InputError(
                f"{CONFIG} states {stated.architecture}: its {name} must be {theirs or 'none'}, "
                f"{WEIGHTS} has {ours or 'none'}"
            )


def _open_file(path, layout, name=None):
    """Returns the `Source` of a file; `name` stands for its path in messages."""
    name = name or path
    with naming(name):
        own_layout, known = None, {}
        if os.path.splitext(path)[1] == ".keras" and archive.is_ours(path):
            tensors, own_layout, known = _read_own(path)
        else:
            tensors = read_tensors(path)
        network = find_network(tensors, own_layout or layout)
        _check_head(network.select(tensors), network.row)
        checkpoint = inspect_tensors(tensors, own_layout or layout)
    # After the reader, which refuses files without an end, such as a pipe.
    return Source(name, digest(path)[1], checkpoint, tensors, own_layout=own_layout, **known)


def read_tensors(source):
    """Reads the weights of PyTorch or of keras.applications.

    Args:
        source: A source that `load_torch_weights` or `load_keras_applications_weights` takes.

    Returns:
        `Tensors`, a dict: names -> NumPy arrays.

    Raises:
        InputError: If it cannot be read.
    """
    suffix = os.path.splitext(source)[1].lower() if isinstance(source, (str, os.PathLike)) else None
    of_keras = isinstance(source, keras.Model) or suffix in (".keras", ".h5")
    return read_keras_applications(source) if of_keras else read_checkpoint(source)


def _read_own(path):
    """Reads a `.keras` file of ours; returns tensors, layout, and a `Source`'s other fields."""
    model = archive.load_model(path)
    models = [each for each in (model, *_layers(model)) if isinstance(each, keras.Model)]
    stems = {"stem_conv", "stem_conv1"}
    network = next((each for each in models if stems & {x.name for x in each.layers}), None)
    variants = find_variants(network) if network else []
    if not variants:
        raise InputError(f"{path}: holds no network of `build_resnet`, got {model.name!r}")
    # Basic blocks look alike in two variants: the metadata of the run names the right one.
    stated = archive.read_metadata(path)
    variant = stated.get("variant") if stated.get("variant") in variants else variants[0]
    # Another head than `logits` is left out.
    layers = [x for x in network.layers if module_of(x) != x.name or x.name == "logits"]
    weights = [weight for layer in layers for weight in layer.weights]
    tensors = {weight.path: ops.convert_to_numpy(weight) for weight in weights}
    before = next((x for x in _layers(model) if isinstance(x, ImagePreprocessing)), None)
    names = ("mean", "std", "reverse_channels")
    # The metadata of a foreign file have any type.
    named, class_names = stated.get("model"), stated.get("class_names")
    known = {
        "normalization": before and {name: getattr(before, name) for name in names},
        "image_size": before and before.image_size,
        "model": named if isinstance(named, str) and named in SPECS else None,
        "class_names": (tuple(class_names),)
        if class_names and isinstance(class_names, list)
        else (),
    }
    return to_tensors(path, tensors), dataclasses.replace(OWN_LAYOUT, variant=variant), known


def _layers(model):
    return model._flatten_layers(include_self=False)


def _check_head(tensors, row):
    """Refuses a head whose kernel and bias disagree.

    The model is built with as many classes as the head has: a short bias with a large number in
    its shape must not fill the memory.
    """
    names = [row.name(path) for path in HEAD]
    kernel, bias = (tensors.get(name) for name in names)
    if kernel is None and bias is None:
        return
    shapes = [None if array is None else array.shape for array in (kernel, bias)]
    if kernel is not None and bias is not None:
        ours = row.to_ours("logits/kernel", kernel)
        if ours.ndim == 2 and bias.shape == ours.shape[1:] and bias.size:
            return
    raise InputError(
        "the head must be a kernel and a bias of as many classes, "
        f"got {names[0]} of shape {shapes[0]} and {names[1]} of shape {shapes[1]}"
    )
