"""From a checkpoint to a `.keras` file of ours, with a report of the network found."""

import os

from keras_resnet import archive
from keras_resnet.models import SPECS, build_resnet, count_parameters
from keras_resnet.preprocessing import NORMALIZATIONS, find_normalization, with_preprocessing
from keras_resnet.utils.errors import InputError, check_count, look_up, one_line
from keras_resnet.utils.files import expand_user
from keras_resnet.weights.hub import is_repository, split_pin
from keras_resnet.weights.pretrained import add_preprocessing, choose_preprocessing, describe
from keras_resnet.weights.sources import open_source

# The size that raw images are resized to by default: weights of ImageNet expect it.
_IMAGE_SIZE = 224


def _check_out(source, out):
    """Returns `out` as a path that can be written to."""
    if out is None:
        raise InputError("`out` must name the .keras file to write, got None")
    path = expand_user(out)
    # Functions of os.path return False where pathlib's raise, such as for a name too long.
    if path.suffix != ".keras":
        raise InputError(f"{path}: a model file must end in .keras")
    if os.path.isdir(path):
        raise InputError(f"{path}: is a folder; name a file in it")
    if not os.path.isdir(path.parent):
        raise InputError(f"{path}: there is no folder {path.parent}; make it first")
    if isinstance(source, (str, os.PathLike)):
        given = expand_user(split_pin(os.fspath(source))[0])
        if not is_repository(given):
            given = archive.find_model(given)
        if os.path.exists(given) and os.path.exists(path) and os.path.samefile(path, given):
            raise InputError(f"{path}: is the checkpoint itself; name another file for the model")
    return path


def _choose_classes(source, num_classes, skip_head):
    """Returns the number of the model's classes; the head's, unless that is left out."""
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


def convert(
    source,
    model=None,
    out=None,
    *,
    num_classes=None,
    variant=None,
    stem=None,
    layout=None,
    skip_head=False,
    image_size=None,
    test_size=False,
    normalize=None,
    preprocessing=True,
):
    """Turns a checkpoint into a `.keras` file; no code in it is run.

    Variant, stem, channels and number of classes are the checkpoint's. `out` is written whole or
    not at all.

    Args:
        source: The path of a safetensors file or one of `torch.save`, with any suffix;
            of a `.h5` or `.keras` file of keras.applications; or a published network's name or
            folder, see `from_pretrained`.
        model: A row of `models.SPECS`: the depth is not guessed. A published network states it.
        out: The file to write; it ends in .keras, and its folder exists.
        num_classes: The number of classes that the head must have, or, with `skip_head`, that the
            new head gets.
        variant: A row of `models.VARIANTS`, instead of the layout's usual one; a file of
            layout "torchvision" does not record "v1".
        stem: A row of `models.STEMS`, instead of the one found.
        layout: The name of a row of `LAYOUTS`, instead of recognising it.
        skip_head: Whether the head is left out, for a new, untrained one.
        image_size: Height and width that the network takes. By default that of a published
            network; else any, and 224 where `normalize` is given.
        test_size: See `from_pretrained`; for a published network.
        normalize: A row of `preprocessing.NORMALIZATIONS`, for a model of raw images, which it
            resizes and normalises inside, as `keras-resnet predict` and `evaluate` need it. By
            default that of a published network; otherwise the model is the network alone, and
            takes floats that are normalised already.
        preprocessing: Whether the model of a published network has its preprocessing inside.

    Returns:
        A report, a dict that JSON can hold: model, layout, description, variant, stem,
        channels, num_classes, head ("loaded" or "new"), parameters, tensors (how many were
        loaded), taken (the key or prefix of the weights, such as "state_dict_ema", or None),
        ignored (the names of tensors of other parts), input, sha256, path; for a published network
        also class_names (how many are known) and license.

    Raises:
        InputError: If an argument, the source or `out` is invalid; nothing was written.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
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
    if model is not None:
        look_up(SPECS, model, "model")
    if normalize is not None:
        look_up(NORMALIZATIONS, normalize, "normalize")
    for argument, value in (("num_classes", num_classes), ("image_size", image_size)):
        if value is not None:
            check_count(argument, value)
    out = _check_out(source, out)
    source = open_source(source, layout)
    if source.own_layout:
        raise InputError(f"{source.path}: is a file of this package already; use it as it is")
    stated, checkpoint = source.configuration, source.checkpoint
    if model is None and stated is None:
        raise InputError(
            f"{source.path}: weights alone do not state their network: name it, --model NAME, "
            f"`model`, one of {', '.join(SPECS)}"
        )
    if model:
        source.check_spec(model)
    # The published preprocessing, another one, or none.
    inside = None
    if stated and preprocessing and normalize is None:
        inside = choose_preprocessing(source, image_size, test_size)
    size = inside["image_size"] if inside else image_size or (_IMAGE_SIZE if normalize else None)
    described = f"{size or 'any'}×{size or 'any'}×{checkpoint.channels}"
    if inside or normalize:
        how = normalize or "as published"
        described = f"raw images, resized to {described} and normalised inside: {how}"
    else:
        described = f"floats, normalised already, {described}"
    found = {
        "model": model or stated.model,
        "layout": checkpoint.layout,
        "description": source.description,
        "variant": variant or checkpoint.variant,
        "stem": stem or checkpoint.stem,
        "taken": checkpoint.taken,
        "ignored": list(checkpoint.ignored),
        "channels": checkpoint.channels,
        "num_classes": _choose_classes(source, num_classes, skip_head),
        "head": "new" if skip_head else "loaded",
        "input": described,
        "sha256": source.sha256,
    }
    form = {name: found[name] for name in ("variant", "stem")}
    shape = (size, size, checkpoint.channels)
    built = build_resnet(model or stated.model or stated.spec, shape, found["num_classes"], **form)
    transfer = source.load_into(built, skip_head=skip_head)
    if inside:
        built = add_preprocessing(built, inside)
    elif normalize:
        normalization = find_normalization(normalize, checkpoint.channels)
        built = with_preprocessing(built, shape, **normalization)
    found.update(parameters=count_parameters(built), tensors=transfer.num_tensors)
    # A file by itself has neither class names nor a licence.
    metadata = describe(source, inside, new_head=skip_head) if stated else {"model": model}
    if stated:
        found["class_names"] = len(metadata.get("class_names", ()))
        found["license"] = stated.license
    metadata["takes_raw_images"] = bool(inside or normalize)
    metadata["origin"] = {**found, **source.origin}
    try:
        archive.save_model(built, out, metadata)
    except OSError as error:
        reason = error.strerror or one_line(error)
        raise InputError(f"{out}: cannot be written: {reason}") from error
    return {**found, "path": str(out)}
