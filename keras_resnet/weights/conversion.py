"""From a checkpoint file to a `.keras` file of ours, and what was found on the way."""

import dataclasses
import hashlib
import os
from pathlib import Path

from keras_resnet import archive
from keras_resnet.models import SPECS, STEMS, VARIANTS, build_resnet, count_parameters
from keras_resnet.preprocessing import NORMALIZATIONS, find_normalization, with_preprocessing
from keras_resnet.utils.errors import InputError, check_count, look_up, one_line
from keras_resnet.utils.files import expand_user
from keras_resnet.weights.layouts import LAYOUTS, Checkpoint, find_network, inspect_tensors
from keras_resnet.weights.transfer import load_tensors, naming, read_tensors

# What a raw image is resized to where nothing else is asked for: what weights of ImageNet expect.
_IMAGE_SIZE = 224


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint file that was read once, and what it turned out to be.

    Attributes:
        path: The file, as it was named.
        sha256: The digest (hex) of its bytes.
        checkpoint: What the names and shapes of its tensors say; see `inspect_tensors`.
        tensors: The tensors' names -> NumPy arrays.
    """

    path: str
    sha256: str
    checkpoint: Checkpoint
    tensors: dict = dataclasses.field(repr=False)

    @property
    def description(self):
        """Where files of this layout come from, one line."""
        return LAYOUTS[self.checkpoint.layout].description

    def load_into(self, model, *, skip_head=False, adapt_input=False):
        """Loads the tensors; arguments, result and errors as for `load_torch_weights`."""
        layout = self.checkpoint.layout
        options = {"skip_head": skip_head, "adapt_input": adapt_input}
        with naming(self.path):
            return load_tensors(model, self.tensors, layout=layout, **options)


def open_source(path, layout=None):
    """Reads a checkpoint file and finds out what network it is of; runs nothing in it.

    Args:
        path: A safetensors file or one of `torch.save`, whatever its name ends in; or a `.h5` or
            `.keras` file of keras.applications.
        layout: A row of `LAYOUTS`, if it need not be found out.

    Returns:
        A `Source`.

    Raises:
        InputError: If the file cannot be read, or is of no layout known.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"a checkpoint must be named by its path, got {type(path).__name__}")
    path = str(expand_user(path))
    with naming(path):
        tensors = read_tensors(path)
        checkpoint = _inspect(tensors, layout)
    # After the reader, which refuses what has no end, such as a pipe.
    return Source(path, sha256_of(path), checkpoint, tensors)


def _inspect(tensors, layout):
    network = find_network(tensors, layout)
    _check_head(network.select(tensors), LAYOUTS[network.layout])
    return inspect_tensors(tensors, layout)


def _check_head(tensors, row):
    """Refuses a head whose kernel and bias disagree.

    The number of classes is read off it, and a network is built with as many: a short bias with a
    large number in its shape must not fill the memory.
    """
    names = [row.name(path) for path in ("logits/kernel", "logits/bias")]
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


def sha256_of(path):
    """Returns the digest (hex) of a file's bytes."""
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            whole.update(chunk)
    return whole.hexdigest()


def _check_options(model, variant, stem, layout, normalize, num_classes, image_size):
    look_up(SPECS, model, "model")
    for table, key, argument in (
        (VARIANTS, variant, "variant"),
        (STEMS, stem, "stem"),
        (LAYOUTS, layout, "layout"),
        (NORMALIZATIONS, normalize, "normalize"),
    ):
        if key is not None:
            look_up(table, key, argument)
    for argument, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value is not None:
            check_count(argument, value)


def _check_out(source, out):
    """Returns `out` as a path that can be written to."""
    path = expand_user(out)
    # os.path's questions answer False where pathlib's raise, such as for a name too long.
    if path.suffix != ".keras":
        raise InputError(f"{path}: a model file must end in .keras")
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; name a file in it")
    if not os.path.isdir(path.parent):
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot be written: no permission in {path.parent}")
    named = isinstance(source, (str, os.PathLike)) and os.path.exists(source)
    if named and os.path.exists(path) and os.path.samefile(path, source):
        raise InputError(f"{path}: is the checkpoint itself; name another file for the model")
    return path


def _choose_classes(source, num_classes, skip_head):
    """Returns how many logits the model gets; the head's, unless that is left out."""
    found = source.checkpoint.num_classes
    if found is None and not (skip_head and num_classes):
        raise InputError(
            f"{source.path}: the checkpoint has no head: `num_classes` and `skip_head=True`, "
            "--num-classes N --skip-head, give the model a new one, untrained; a head here is one "
            "dense layer with a bias"
        )
    if num_classes not in (None, found) and not skip_head:
        raise InputError(
            f"{source.path}: the checkpoint's head has {found} classes, got `num_classes` "
            f"{num_classes}: leave that out, or `skip_head=True`, --skip-head, for a new head, "
            "untrained"
        )
    return num_classes or found


def _build(source, found, size, normalize):
    """Builds the network in the form found, with preprocessing before it if that is asked for."""
    shape = (size, size, found["channels"])
    form = {"variant": found["variant"], "stem": found["stem"]}
    network = build_resnet(found["model"], shape, found["num_classes"], **form)
    transfer = source.load_into(network, skip_head=found["head"] == "new")
    if normalize is None:
        return network, transfer
    normalization = find_normalization(normalize, shape[-1])
    return with_preprocessing(network, shape, **normalization), transfer


def _describe_input(channels, size, normalize):
    shape = f"{size or 'any'}×{size or 'any'}×{channels}"
    if normalize is None:
        return f"floats, normalised already, {shape}"
    return f"raw images, made {shape} and normalised inside: {normalize}"


def _save(model, out, source, found, normalize):
    """Writes the model with metadata that say where it is from: no data set, no class names."""
    origin = {"file": Path(source.path).name, "sha256": source.sha256, **found}
    metadata = {
        "model": found["model"],
        "takes_raw_images": normalize is not None,
        "origin": origin,
    }
    try:
        archive.save_model(model, out, metadata)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"{out}: cannot be written: {reason}") from error


def convert(
    source,
    model,
    out,
    *,
    num_classes=None,
    variant=None,
    stem=None,
    layout=None,
    skip_head=False,
    image_size=None,
    normalize=None,
):
    """Turns a checkpoint file into a `.keras` file; no code in it is run.

    Variant, stem, channels and number of classes are the checkpoint's. `out` is written whole or
    not at all.

    Args:
        source: The path of a safetensors file or one of `torch.save`, whatever its name ends in;
            or of a `.h5` or `.keras` file of keras.applications.
        model: A row of `models.SPECS`: the depth is not guessed.
        out: The file to write; it ends in .keras, and its folder exists.
        num_classes: What the head must have; with `skip_head`, what the new one gets.
        variant: A row of `models.VARIANTS`, instead of the layout's usual one; "v1" leaves no
            trace in a file of layout "torchvision".
        stem: A row of `models.STEMS`, instead of the one found.
        layout: A row of `LAYOUTS`, instead of recognising it.
        skip_head: Whether the head is left out, for a new, untrained one.
        image_size: Height and width that the network takes; any by default, and 224 where
            `normalize` is given.
        normalize: A row of `preprocessing.NORMALIZATIONS`: the model takes raw images then,
            resized and normalised inside, as `keras-resnet predict` and `evaluate` need it. By
            default it is the network alone, and takes floats that are normalised already.

    Returns:
        What was found, a dict that JSON can hold: model, layout, description, variant, stem,
        channels, num_classes, head ("loaded" or "new"), parameters, tensors (how many were
        loaded), taken (the key or prefix of the weights, such as "state_dict_ema", or None),
        ignored (the names of tensors of other parts), input, sha256, path.

    Raises:
        InputError: If an argument, the source or `out` does not allow it; nothing was written.

    Example:
        >>> import tempfile
        >>> from keras_resnet import Spec
        >>> from keras_resnet.weights import save_torch_weights
        >>> folder = Path(tempfile.mkdtemp())
        >>> SPECS["small"] = Spec((1,), (4,))
        >>> trained = build_resnet("small", (32, 32, 3), variant="torchvision")
        >>> save_torch_weights(trained, folder / "small.safetensors")
        >>> found = convert(folder / "small.safetensors", "small", folder / "small.keras")
        >>> del SPECS["small"]
        >>> found["layout"], found["num_classes"], found["tensors"], found["parameters"]
        ('torchvision', 10, 17, 950)
    """
    _check_options(model, variant, stem, layout, normalize, num_classes, image_size)
    out = _check_out(source, out)
    source = open_source(source, layout)
    size = image_size or (_IMAGE_SIZE if normalize else None)
    found = {
        "model": model,
        "layout": source.checkpoint.layout,
        "description": source.description,
        "variant": variant or source.checkpoint.variant,
        "stem": stem or source.checkpoint.stem,
        "taken": source.checkpoint.taken,
        "ignored": list(source.checkpoint.ignored),
        "channels": source.checkpoint.channels,
        "num_classes": _choose_classes(source, num_classes, skip_head),
        "head": "new" if skip_head else "loaded",
        "input": _describe_input(source.checkpoint.channels, size, normalize),
    }
    built, transfer = _build(source, found, size, normalize)
    found.update(parameters=count_parameters(built), tensors=transfer.num_tensors)
    _save(built, out, source, found, normalize)
    return {**found, "sha256": source.sha256, "path": str(out)}
