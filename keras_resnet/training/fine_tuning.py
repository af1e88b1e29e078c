"""Fine-tuning: where a run's first weights come from, and which of them stay as they are."""

import dataclasses
import os

from keras_resnet.models import module_of
from keras_resnet.utils.errors import InputError
from keras_resnet.weights.layouts import Checkpoint
from keras_resnet.weights.sources import Source, open_source


def plain_settings(settings):
    """Returns the settings of a run with `init` and `freeze` as config.json holds them.

    Args:
        settings: A dict; `init` may be a `pathlib.Path`, `freeze` a list or tuple of names or
            a string with commas between them.

    Raises:
        InputError: If one of them is of another kind.

    Example:
        >>> plain_settings({"init": "a.pth", "freeze": "stem, stage1"})
        {'init': 'a.pth', 'freeze': ['stem', 'stage1']}
    """
    settings = dict(settings)
    init, freeze = settings.get("init"), settings.get("freeze")
    if init is not None:
        if not isinstance(init, (str, os.PathLike)):
            raise InputError(f"`init` must be the path of a checkpoint, got {type(init).__name__}")
        settings["init"] = os.fspath(init)
    if freeze is not None:
        names = freeze.split(",") if isinstance(freeze, str) else freeze
        if not isinstance(names, (list, tuple)) or not all(isinstance(n, str) for n in names):
            raise InputError(f"`freeze` must be a list of names of modules, got {freeze!r}")
        settings["freeze"] = list(dict.fromkeys(name.strip() for name in names)) or None
    return settings


def open_init(settings, recorded=None, needed=True):
    """Reads the checkpoint that a run starts from.

    Args:
        settings: The run's, with `init` and `freeze`.
        recorded: What `record` returned when the run that is now resumed was started.
        needed: Whether its weights are; a run that is resumed from a checkpoint of its own does
            without the file.

    Returns:
        A `Source`, without tensors where they are not needed; None for a run without `init`.

    Raises:
        InputError: If the file cannot be read, or is not the one that the run was started with;
            or there is something to freeze, and nothing to start from.
    """
    path = settings["init"]
    if path is None:
        if settings["freeze"]:
            raise InputError(
                "`freeze` needs `init`, --freeze needs --init: a layer that is neither loaded nor "
                f"trained would stay random; got {', '.join(settings['freeze'])}"
            )
        return None
    before = _read_record(path, recorded)
    if before and not needed:
        return before
    source = open_source(path)
    if before and source.sha256 != before.sha256:
        raise InputError(
            f"{path}: not the file that the run was started with: sha256 {before.sha256[:16]}…, "
            f"got {source.sha256[:16]}…; put that back, or start a new run"
        )
    return source


def record(source):
    """Returns what config.json says about a `Source`, a dict: sha256, and what was found."""
    return {"sha256": source.sha256, **dataclasses.asdict(source.checkpoint)}


def _read_record(path, recorded):
    if recorded is None:
        return None
    try:
        fields = {**recorded}
        source = Source(path, fields.pop("sha256"), Checkpoint(**fields), {})
        if not isinstance(source.sha256, str):
            raise TypeError
    except (TypeError, KeyError, ValueError) as error:
        raise InputError(f"config.json of the run is damaged: its init is {recorded!r}") from error
    return source


def adopt_form(recipe, source, kept):
    """Returns a recipe with the form of the network that the run starts from.

    Args:
        recipe: A `Recipe`.
        source: What `open_init` returned.
        kept: Settings; those of `variant` and `stem` that are not None stay as they are.
    """
    if source is None:
        return recipe
    names = [name for name in ("variant", "stem") if kept[name] is None]
    return dataclasses.replace(recipe, **{n: getattr(source.checkpoint, n) for n in names})


def adopt_normalization(settings, given, source):
    """Returns a run's settings with the normalisation of the model that the run starts from.

    Args:
        settings: The run's.
        given: What the run was asked for; a `normalize` there stays.
        source: What `open_init` returned. Only a model of ours with preprocessing has one.

    Raises:
        InputError: If the model's is no row of `NORMALIZATIONS`.
    """
    if given.get("normalize") is not None or source is None:
        return settings
    return {**settings, "normalize": source.find_normalization() or settings["normalize"]}


def load_init(network, source, recipe, num_classes):
    """Loads the first weights of a run: all but a head of another number of classes.

    The first convolution is fitted to the network's number of channels; see `adapt_channels`.

    Args:
        network: The network, with or without preprocessing before it.
        source: What `open_init` returned; its tensors are gone then, so that a run does not hold
            them to its end.
        recipe: What `adopt_form` returned.
        num_classes: The network's.

    Returns:
        What was done, one line.

    Raises:
        InputError: If the checkpoint does not fit; the network is as it was then.
    """
    found = source.checkpoint
    new_head = found.num_classes != num_classes
    transfer = source.load_into(network, skip_head=new_head, adapt_input=True)
    source.tensors.clear()
    parts = [
        f"{source.path}: {source.description}; variant {recipe.variant}, stem {recipe.stem}, "
        f"{transfer.num_tensors} tensors loaded"
    ]
    if new_head:
        before = "none" if found.num_classes is None else found.num_classes
        parts.append(f"new head: {num_classes} classes, the checkpoint has {before}")
    else:
        parts.append(f"head of {num_classes} classes loaded")
    if transfer.taken:
        parts.append(f"weights under {transfer.taken}")
    if transfer.ignored:
        parts.append(f"{len(transfer.ignored)} tensors of other parts left out")
    if transfer.adapted:
        parts.append("first convolution adapted from {} channels to {}".format(*transfer.adapted))
    return "; ".join(parts)


def freeze(network, names):
    """Makes modules of a network keep their weights in training, and their moving statistics.

    Keras runs a frozen BatchNormalization as in inference. Compile the model afterwards.

    Args:
        network: What `build_resnet` returns.
        names: Modules, as `summarize_shapes` names them: "stem", "stage1" …, "final", "logits".

    Raises:
        InputError: If there is no such module, or nothing would be left to train.

    Example:
        >>> from keras_resnet import Spec, build_resnet
        >>> network = build_resnet(Spec((1, 1), (4, 8)), (32, 32, 3))
        >>> freeze(network, ["stem", "stage1"])
        >>> sorted({variable.path.split("/")[0] for variable in network.trainable_variables})
        ['logits', 'stage2_block1']
    """
    if isinstance(names, str):
        raise InputError(f"`names` must be a list of modules, got {names!r}")
    modules = list(dict.fromkeys(module_of(layer) for layer in network.layers if layer.weights))
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise InputError(
            f"`freeze` names modules of the network, {', '.join(modules)}, got {unknown[0]!r}"
        )
    if not set(modules) - set(names):
        raise InputError(f"`freeze` must leave something to train, got all of {', '.join(modules)}")
    for layer in network.layers:
        if module_of(layer) in names:
            layer.trainable = False
