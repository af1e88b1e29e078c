"""Fine-tuning: the checkpoint that a run starts from, and the modules that stay frozen."""

import dataclasses
from types import NoneType

import keras

from keras_resnet.models import module_of
from keras_resnet.recipes import LEAST_SIZE
from keras_resnet.utils.errors import InputError
from keras_resnet.weights.layouts import Checkpoint
from keras_resnet.weights.sources import Source, open_source


def find_source(settings, recorded=None, needed=True):
    """Reads the checkpoint that a run starts from.

    Args:
        settings: The run's `TrainConfig`.
        recorded: The result of `record` when the run that is now resumed was started.
        needed: Whether the tensors are needed; a run that is resumed from its own checkpoint does
            not read the file.

    Returns:
        A `Source`, without tensors where they are not needed; None for a run without `weights`.

    Raises:
        InputError: If the file cannot be read, or is not the one that the run was started with.
    """
    path = settings.weights
    if path is None:
        return None
    before = _read_record(path, recorded)
    if before and not needed:
        return before
    # A name without a revision stands for the newest one, which may have changed.
    source = open_source(path, revision=before and before.origin.get("revision"))
    if before and source.sha256 != before.sha256:
        raise InputError(
            f"{path}: not the file that the run was started with: sha256 {before.sha256[:16]}…, "
            f"got {source.sha256[:16]}…; restore that file, or start a new run"
        )
    return source


def record(source):
    """Returns the record of a `Source` in config.json, a dict.

    It has the sha256, the size of the images, the origin, the names of the classes, and the fields
    of the `Checkpoint`.
    """
    known = {"sha256": source.sha256, "image_size": source.input_shape[0], "origin": source.origin}
    names = [list(names) for names in source.class_names]
    return {**known, "class_names": names, **dataclasses.asdict(source.checkpoint)}


def _read_record(path, recorded):
    if recorded is None:
        return None
    try:
        fields = {**recorded}
        sha256, size = fields.pop("sha256"), fields.pop("image_size", None)
        origin = fields.pop("origin")
        # Earlier runs have no names.
        names = tuple(tuple(names) for names in fields.pop("class_names", ()))
        texts = all(isinstance(each, (str, NoneType)) for each in origin.values())
        if not texts or not isinstance(sha256, str):
            raise TypeError
        known = {"image_size": size, "recorded_origin": origin, "class_names": names}
        source = Source(path, sha256, Checkpoint(**fields), {}, **known)
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise InputError(
            f"config.json of the run is damaged: its weights are {recorded!r}"
        ) from error
    return source


def adopt_form(recipe, source, settings):
    """Returns a recipe with the form of the checkpoint that the run starts from.

    That is the variant and the stem; and the size of the images where the recipe keeps the
    proportions of photographs, but not below `recipes.LEAST_SIZE`.

    Args:
        recipe: A `Recipe`.
        source: The result of `find_source`.
        settings: The run's `TrainConfig`; its `variant`, `stem` and `image_size` take precedence if
            given.
    """
    if source is None:
        return recipe
    size = source.input_shape[0]
    if size and recipe.resize == "shorter_edge" and settings.image_size is None:
        recipe = dataclasses.replace(recipe, image_size=max(size, LEAST_SIZE))
    names = [name for name in ("variant", "stem") if getattr(settings, name) is None]
    return dataclasses.replace(recipe, **{n: getattr(source.checkpoint, n) for n in names})


def adopt_normalization(settings, given, source):
    """Returns a run's settings completed by the weights that it starts from.

    These are the normalization, and the row of `SPECS`, of a run's model or a published network.

    Args:
        settings: The run's `TrainConfig`.
        given: The settings that were given, a dict; `normalize` and `model` there stay.
        source: The result of `find_source`.

    Raises:
        InputError: If the normalization is no row of `NORMALIZATIONS`, or `model` is given and
            another than the published one.
    """
    if source is None:
        return settings
    if "normalize" not in given:
        settings = dataclasses.replace(settings, normalize=source.name_normalization() or "none")
    if "model" in given:
        source.check_spec(settings.model)
    elif source.model:
        settings = dataclasses.replace(settings, model=source.model)
    return settings


def keeps_head(source, class_names, frozen):
    """Returns whether a run has the checkpoint's head: it is of the same classes, or frozen.

    Args:
        source: The result of `find_source`.
        class_names: The names of the data set's classes.
        frozen: The names of the frozen modules.
    """
    is_as_large = source.checkpoint.num_classes == len(class_names)
    return source.has_classes(class_names) or (is_as_large and "logits" in frozen)


def load_source(network, source, recipe, class_names, frozen):
    """Loads the first weights of a run; a head of other classes stays random.

    The first convolution is adapted to the network's number of channels; see `adapt_channels`.

    Args:
        network: The network, with or without preprocessing before it.
        source: The result of `find_source`. Its tensors are released, so that a run does not hold
            them to its end.
        recipe: The result of `adopt_form`.
        class_names: The names of the data set's classes.
        frozen: The names of the frozen modules.

    Returns:
        One line about the tensors loaded.

    Raises:
        InputError: If the checkpoint does not fit; the network is unchanged then.
    """
    found, new_head = source.checkpoint, not keeps_head(source, class_names, frozen)
    transfer = source.load_into(network, skip_head=new_head, adapt_input=True)
    source.tensors.clear()
    parts = [
        f"{source.path}: {source.description}; variant {recipe.variant}, stem {recipe.stem}, "
        f"{transfer.num_tensors} tensors loaded"
    ]
    if new_head:
        before = "none" if found.num_classes is None else found.num_classes
        before = f"{before} others" if before == len(class_names) else before
        parts.append(f"new head: {len(class_names)} classes, the checkpoint has {before}")
    else:
        parts.append(f"head of {len(class_names)} classes loaded")
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
        network: The result of `build_resnet`.
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


def set_trainable(network, *, frozen=(), head_only=False, normalization=True):
    """Chooses the layers of a network that are trained. Compile the model afterwards.

    Args:
        network: The result of `build_resnet`.
        frozen: Modules that keep their weights; see `freeze`.
        head_only: Whether the module "logits" alone is trained.
        normalization: Whether BatchNormalization is trained; if not, it keeps its moving
            statistics, scale and offset, and normalises by them.

    Example:
        >>> from keras_resnet import Spec, build_resnet
        >>> network = build_resnet(Spec((1,), (4,)), (32, 32, 3))
        >>> set_trainable(network, head_only=True)
        >>> [variable.path for variable in network.trainable_variables]
        ['logits/kernel', 'logits/bias']
    """
    for layer in network.layers:
        module = module_of(layer)
        layer.trainable = module not in frozen and (module == "logits" or not head_only)
    if not normalization:
        for layer in network._flatten_layers(include_self=False):
            if isinstance(layer, keras.layers.BatchNormalization):
                layer.trainable = False
