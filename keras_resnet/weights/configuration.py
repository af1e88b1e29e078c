"""The JSON files of a repository: its network's form, classes, preprocessing and licence.

timm writes one file, in two forms: nested, with the preprocessing under "pretrained_cfg", and flat,
in older repositories. transformers writes two. All are untrusted: sizes and types are checked, and
arguments of other networks than ours are refused.
"""

import csv
import dataclasses
import functools
import importlib.resources
import re

from keras_resnet.models import SPECS, Spec
from keras_resnet.resampling import FILTERS
from keras_resnet.untrusted import schema
from keras_resnet.untrusted.common import refusing
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.geometry import find_crop_pct
from keras_resnet.utils.tables import printable
from keras_resnet.weights.hub import CARD, CONFIG, PREPROCESSOR

_MAX_CLASSES = 100_000
_MAX_NAME = 300
# The characters of a README.md in which its header must lie.
_MAX_HEADER = 2**16

IMAGENET_CLASSES = "imagenet_classes.csv"
_NUM_IMAGENET_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A published network as its repository describes it.

    Attributes:
        library: "timm" or "transformers".
        architecture: The network's name in that library.
        spec: The network's `Spec`.
        model: The row of `SPECS` that `spec` is; None if it is none.
        variant: The row of `VARIANTS`.
        channels: Channels of the images.
        num_classes: Number of logits; 0 for a network without a head.
        class_names: One name a class; None if they are not known.
        class_ids: WordNet's ids of the classes of ImageNet, such as "n01440764"; None for others.
        preprocessing: Arguments of `with_preprocessing`; None if they are not known.
        test_preprocessing: The same at the size at which the publisher measured the accuracy, where
            that is another one; else None.
        license: The licence's name; None if it is not stated.
        origin_url: The address of the code or of the paper; None if it is not stated.
    """

    library: str
    architecture: str
    spec: Spec
    model: str | None
    variant: str
    channels: int
    num_classes: int
    class_names: tuple[str, ...] | None = None
    class_ids: tuple[str, ...] | None = None
    preprocessing: dict | None = None
    test_preprocessing: dict | None = None
    license: str | None = None
    origin_url: str | None = None


def read_configuration(repository):
    """Reads a repository's description of its network.

    Args:
        repository: A `hub.Repository`.

    Returns:
        A `Configuration`.

    Raises:
        InputError: If a file is damaged, or the network is none of ours.
    """
    with refusing(repository.name, f"{CONFIG} cannot be used"):
        return _read(repository)


def _read(repository):
    content = repository.read_json(CONFIG)
    if content is None:
        raise InputError(f"{repository.name}: has no {CONFIG}: not a repository of a network")
    file = _File(repository.name, CONFIG, content)
    found = _read_timm(file) if "architecture" in content else _read_transformers(file, repository)
    card = _read_card(repository)
    ids, names = None, found.class_names
    is_stated = any(name.lower().endswith("imagenet-1k") for name in card["datasets"])
    if found.num_classes == _NUM_IMAGENET_CLASSES and (is_stated or _is_imagenet_tag(content)):
        ids, usual = zip(*imagenet_classes(), strict=True)
        names = names or usual
        if not _are_alike(names, usual):
            ids = None
    known = found.license or card["license"]
    return dataclasses.replace(found, class_names=names, class_ids=ids, license=known)


def _are_alike(names, usual):
    """Returns whether names are those of ImageNet's classes, in the usual order.

    Longer ones contain ours: "tench, Tinca tinca". A few are written otherwise.
    """
    pairs = zip(names, usual, strict=True)
    return sum(short.lower() in name.lower() for name, short in pairs) > 0.9 * len(usual)


@functools.cache
def imagenet_classes():
    """Returns ImageNet's 1,000 classes in their usual order.

    Returns:
        A tuple of (id, name): WordNet's id, such as "n01440764", and a name that no other class
        has.

    Source:
        The first lines of `imagenet_classes.csv`.

    Example:
        >>> imagenet_classes()[0], len(imagenet_classes())
        (('n01440764', 'tench'), 1000)
    """
    file = importlib.resources.files("keras_resnet.weights") / IMAGENET_CLASSES
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return tuple((row["id"], row["name"]) for row in rows)


@dataclasses.dataclass(frozen=True)
class _File:
    """A JSON file of a repository."""

    repository: str
    name: str
    content: dict

    def check(self, rules):
        """Checks the content against a schema; see `schema.check`."""
        schema.check(self.content, rules, f"{self.repository}: {self.name}")

    def require(self, holds, rule, value):
        """Raises an `InputError` with a rule and the value received, unless it holds."""
        if not holds:
            raise InputError(
                f"{self.repository}: {self.name}: not one of our networks: {rule}, got "
                f"{printable(repr(value))[:80]}"
            )


def _between(least, most):
    return schema.Rule(
        f"a whole number from {least} to {most}",
        lambda value: schema.COUNT.accepts(value) and least <= value <= most,
    )


def _optional(*rules):
    return schema.Optional((*rules, schema.NULL))


_SIZE = _between(1, 4096)
_WIDTH = _between(1, 2**16)
_CHANNELS = schema.Rule("1 or 3", lambda value: schema.COUNT.accepts(value) and value in (1, 3))
_PIXEL = schema.Rule(
    "a number between -1000 and 1000",
    lambda value: schema.NUMBER.accepts(value) and -1000 <= value <= 1000,
)
_POSITIVE = schema.Rule(
    "a number above 0 and up to 1000", lambda value: _PIXEL.accepts(value) and value > 0
)
_CROP = schema.Rule(
    "a number above 0 and up to 1", lambda value: schema.NUMBER.accepts(value) and 0 < value <= 1
)
_NAMES = schema.Rule(
    f"at most {_MAX_CLASSES} names, in a list or by their numbers",
    lambda value: isinstance(value, (list, dict)) and len(value) <= _MAX_CLASSES,
)


def _list(rule, least, most, unit):
    """Returns the rule of a list of `least` to `most` values, which follow another rule."""
    return schema.Rule(
        f"{least} to {most} {unit}, each {rule.description}",
        lambda value: (
            isinstance(value, list)
            and least <= len(value) <= most
            and all(map(rule.accepts, value))
        ),
    )


_MEAN, _STD = (_list(rule, 1, 3, "channels") for rule in (_PIXEL, _POSITIVE))


# ----------------------------------------------------------------------------------------------
# timm
# ----------------------------------------------------------------------------------------------

_INPUT_SIZE = schema.Rule(
    "[channels, height, width], 1 or 3 channels, at most 4096 pixels",
    lambda value: (
        isinstance(value, list)
        and len(value) == 3
        and _CHANNELS.accepts(value[0])
        and all(map(_SIZE.accepts, value[1:]))
    ),
)
_PRETRAINED = {
    "input_size": _optional(_INPUT_SIZE),
    "test_input_size": _optional(_INPUT_SIZE),
    "crop_pct": _optional(_CROP),
    "test_crop_pct": _optional(_CROP),
    "crop_mode": _optional(schema.TEXT),
    "interpolation": _optional(schema.TEXT),
    "mean": _optional(_MEAN),
    "std": _optional(_STD),
    "num_classes": _optional(_between(0, _MAX_CLASSES)),
    "label_names": _optional(_NAMES),
    "label_descriptions": _optional(schema.OBJECT),
    "tag": _optional(schema.TEXT),
    "license": _optional(schema.TEXT),
    "origin_url": _optional(schema.TEXT),
}
# Arguments of timm's networks that change no output of a trained one, or that are read here.
_MODEL_ARGS = {
    *("in_chans", "num_classes", "global_pool", "img_size", "zero_init_last"),
    *("drop_rate", "drop_path_rate", "drop_block_rate"),
}
# timm's `crop_mode` -> `resize`.
_CROP_MODES = {"center": "shorter_edge", "squash": "squash"}


def _merge_timm(file):
    """Returns the preprocessing and the classes in a config.json of timm of either form, a dict."""
    content = file.content
    nested = content.get("pretrained_cfg")
    own = {"architecture": schema.TEXT, "pretrained_cfg": _optional(schema.OBJECT)}
    own |= {"model_args": _optional(schema.OBJECT)}
    own |= {key: _PRETRAINED[key] for key in ("num_classes", "label_names", "label_descriptions")}
    file.check({**_PRETRAINED, **own} if nested is None else {**own, "pretrained_cfg": _PRETRAINED})
    cfg = {**(content if nested is None else nested)}
    # As timm reads it: keys outside take precedence, and "labels" is an old name.
    for key in ("num_classes", "label_names", "label_descriptions"):
        if content.get(key) is not None:
            cfg[key] = content[key]
    if content.get("labels") is not None:
        file.check({"labels": _NAMES})
        cfg.setdefault("label_names", content["labels"])
    return cfg


def _read_timm(file):
    """Reads timm's config.json."""
    content, cfg = file.content, _merge_timm(file)
    arguments = content.get("model_args") or {}
    row, variant = _timm_network(file, content["architecture"])
    unknown = {name: value for name, value in arguments.items() if name not in _MODEL_ARGS}
    file.require(not unknown, f"model_args must be of {', '.join(sorted(_MODEL_ARGS))}", unknown)
    pool = arguments.get("global_pool", content.get("global_pool")) or "avg"
    file.require(pool == "avg", "global_pool must be avg", pool)
    file.require(not cfg.get("label_offset"), "label_offset must be 0", cfg.get("label_offset"))
    dataclasses.replace(file, content=arguments).check({"in_chans": _optional(_CHANNELS)})
    size = cfg.get("input_size") or [3, 224, 224]
    channels = arguments.get("in_chans") or size[0]
    num_classes = 1000 if cfg.get("num_classes") is None else cfg["num_classes"]
    test = None
    if cfg.get("test_input_size") or cfg.get("test_crop_pct"):
        crop = cfg.get("test_crop_pct") or cfg.get("crop_pct")
        test = _timm_preprocessing(file, cfg, channels, cfg.get("test_input_size") or size, crop)
    return Configuration(
        "timm",
        content["architecture"],
        SPECS[row],
        row,
        variant,
        channels,
        num_classes,
        class_names=_class_names(
            file, cfg.get("label_names"), num_classes, cfg.get("label_descriptions")
        ),
        preprocessing=_timm_preprocessing(file, cfg, channels, size, cfg.get("crop_pct")),
        test_preprocessing=test,
        license=_short(cfg.get("license")),
        origin_url=_short(cfg.get("origin_url")),
    )


def _timm_network(file, architecture):
    """Returns the row of `SPECS` and the variant of a network of timm's.

    The rows have timm's names; its ResNetV2 with BatchNorm are variants of them.
    """
    row, variant = architecture, "torchvision"
    if match := re.fullmatch(r"resnetv2_(\d+d?)", architecture):
        row, variant = f"resnet{match[1]}", "v2"
    known = f"architecture must be one of {', '.join(SPECS)}, or resnetv2_18 …"
    file.require(row in SPECS, known, architecture)
    return row, variant


def _timm_preprocessing(file, cfg, channels, size, crop_pct):
    """Returns the arguments of `with_preprocessing` for timm's evaluation of images.

    Keys that the file lacks have the values of timm's `resolve_data_config`.
    """
    _, height, width = size
    file.require(height == width, "images must be square", size)
    mode = cfg.get("crop_mode") or "center"
    file.require(mode in _CROP_MODES, f"crop_mode must be {' or '.join(_CROP_MODES)}", mode)
    kind = cfg.get("interpolation") or "bicubic"
    file.require(kind in FILTERS, f"interpolation must be {' or '.join(FILTERS)}", kind)
    return {
        "image_size": height,
        "mean": _for_channels(cfg.get("mean") or (0.485, 0.456, 0.406), channels),
        "std": _for_channels(cfg.get("std") or (0.229, 0.224, 0.225), channels),
        "reverse_channels": False,
        "resize": _CROP_MODES[mode],
        "crop_pct": crop_pct or 0.875,
        "interpolation": kind,
        "antialias": True,
        "resampler": "pillow",
        "rounding": "torchvision",
    }


def _for_channels(values, channels):
    """Returns a mean or a standard deviation as a tuple of one number a channel."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


def _is_imagenet_tag(content):
    """Returns whether timm's tag, such as "a1_in1k", says that the network is of ImageNet-1k."""
    tag = (content.get("pretrained_cfg") or content).get("tag")
    return isinstance(tag, str) and tag.endswith("in1k")


# ----------------------------------------------------------------------------------------------
# transformers
# ----------------------------------------------------------------------------------------------

_STAGES = _list(_between(1, 100), 1, 8, "stages")
_WIDTHS = _list(_WIDTH, 1, 8, "stages")
_RESNET = {
    "model_type": schema.TEXT,
    "depths": schema.Optional(_STAGES),
    "hidden_sizes": schema.Optional(_WIDTHS),
    "embedding_size": schema.Optional(_WIDTH),
    "layer_type": schema.Optional(schema.TEXT),
    "hidden_act": schema.Optional(schema.TEXT),
    "downsample_in_first_stage": schema.Optional(schema.FLAG),
    "downsample_in_bottleneck": schema.Optional(schema.FLAG),
    "num_channels": schema.Optional(_CHANNELS),
    "id2label": _optional(_NAMES),
    "num_labels": _optional(_between(1, _MAX_CLASSES)),
}
# The defaults of transformers' `ResNetConfig` for missing keys.
_RESNET_DEFAULTS = {
    "depths": [3, 4, 6, 3],
    "hidden_sizes": [256, 512, 1024, 2048],
    "embedding_size": 64,
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
    "num_channels": 3,
}
# The layer's type -> its output's width relative to our `filters`.
_EXPANSIONS = {"basic": 1, "bottleneck": 4}


def _read_transformers(file, repository):
    """Reads the config.json and preprocessor_config.json of a ResNet of transformers."""
    kind = file.content.get("model_type")
    file.require(kind == "resnet", "model_type must be resnet", kind)
    file.check(_RESNET)
    config = {**_RESNET_DEFAULTS, **file.content}
    block = config["layer_type"]
    file.require(block in _EXPANSIONS, "layer_type must be basic or bottleneck", block)
    for key in ("hidden_act", "downsample_in_first_stage"):
        value = _RESNET_DEFAULTS[key]
        file.require(config[key] == value, f"{key} must be {value}", config[key])
    widths, expansion = config["hidden_sizes"], _EXPANSIONS[block]
    fits = len(widths) == len(config["depths"]) and not any(width % expansion for width in widths)
    file.require(fits, "hidden_sizes must be one a stage, multiples of 4 for bottlenecks", widths)
    filters = tuple(width // expansion for width in widths)
    stem = config["embedding_size"]
    file.require(stem == filters[0], f"embedding_size must be {filters[0]}", stem)
    spec = Spec(tuple(config["depths"]), filters, block)
    names = file.content.get("id2label")
    num_classes = len(names) if names else file.content.get("num_labels") or 2
    names = _class_names(file, names, num_classes)
    if names and all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        names = None  # the names that transformers makes up
    is_v1 = block == "bottleneck" and config["downsample_in_bottleneck"]
    architectures = file.content.get("architectures")
    known = isinstance(architectures, list) and architectures and isinstance(architectures[0], str)
    return Configuration(
        "transformers",
        _short(architectures[0]) if known else "resnet",
        spec,
        next((name for name, row in SPECS.items() if row == spec), None),
        "v1" if is_v1 else "torchvision",
        config["num_channels"],
        num_classes,
        class_names=names,
        preprocessing=_transformers_preprocessing(repository, config["num_channels"]),
    )


_EDGES = {
    name: schema.Optional((_SIZE, schema.NULL)) for name in ("shortest_edge", "height", "width")
}
_PROCESSOR = {
    "size": schema.Optional((_SIZE, schema.OBJECT)),
    "crop_size": schema.Optional((_SIZE, schema.OBJECT, schema.NULL)),
    "crop_pct": _optional(_CROP),
    "resample": _optional(_between(0, 5)),
    "rescale_factor": schema.Optional(_POSITIVE),
    "image_mean": _optional(_MEAN),
    "image_std": _optional(_STD),
    **{
        key: _optional(schema.FLAG)
        for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad")
    },
}
# Pillow's numbers of filters.
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
# The defaults of ConvNextImageProcessor, which ResNet's repositories name, for missing keys.
_CONVNEXT = {
    "size": {"shortest_edge": 384},
    "crop_pct": 224 / 256,
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def _transformers_preprocessing(repository, channels):
    """Returns the arguments of `with_preprocessing` for an image processor of transformers."""
    content = repository.read_json(PREPROCESSOR)
    if content is None:
        return None
    file = _File(repository.name, PREPROCESSOR, content)
    file.check(_PROCESSOR)
    for key in ("size", "crop_size"):
        if isinstance(content.get(key), dict):
            file.check({key: _EDGES})
    kind = content.get("image_processor_type") or content.get("feature_extractor_type")
    family = re.sub("(FeatureExtractor|ImageProcessor)(Fast|Pil)?$", "", str(kind))
    known = f"image_processor_type must be of {', '.join(_GEOMETRIES)}"
    file.require(family in _GEOMETRIES, known, kind)
    if family == "ConvNext":
        content |= {key: value for key, value in _CONVNEXT.items() if content.get(key) is None}
    file.require(content.get("do_resize") is not False, "do_resize must be true", False)
    file.require(not content.get("do_pad"), "do_pad must be false", content.get("do_pad"))
    resample = content.get("resample")
    file.require(resample in _RESAMPLE, "resample must be 2 (bilinear) or 3 (bicubic)", resample)
    if content.get("do_normalize") is not False:
        stated = content.get("image_mean") and content.get("image_std")
        file.require(stated, "image_mean and image_std must be stated", None)
    return {
        **_transformers_normalization(content, channels),
        "reverse_channels": False,
        **_GEOMETRIES[family](file),
        "interpolation": _RESAMPLE[resample],
        "antialias": True,
        "resampler": "torch",
        "rounding": "transformers",
    }


def _transformers_normalization(content, channels):
    """Returns `mean` and `std` on the scale 0 … 1."""
    factor = content.get("rescale_factor", 1 / 255)
    # The value of a pixel of 255 before the normalization.
    white = 255 * factor if content.get("do_rescale") is not False else 255.0
    mean, std = (0.0,), (1.0,)
    if content.get("do_normalize") is not False:
        mean, std = content["image_mean"], content["image_std"]
    # Rounding noise would hide which row of `NORMALIZATIONS` it is.
    white = 1.0 if abs(white - 1) < 1e-9 else white
    mean, std = ([value / white for value in values] for values in (mean, std))
    return {"mean": _for_channels(mean, channels), "std": _for_channels(std, channels)}


def _edge(size):
    """Returns the length of the shorter edge that a size states, or None."""
    return size if isinstance(size, int) else size.get("shortest_edge")


def _square(file, size, key):
    """Returns the edge of the square that a size states."""
    if isinstance(size, int):
        return size
    edges = [size.get(name) for name in ("height", "width")]
    file.require(edges[0] and edges[0] == edges[1], f"{key} must be a square", size)
    return edges[0]


def _convnext_geometry(file):
    """Returns size, resizing and crop of ConvNextImageProcessor.

    Below 384 it resizes the shorter edge and crops, from 384 on it resizes to a square.
    """
    content = file.content
    size = _edge(content["size"])
    file.require(size is not None, "size must be a number or have shortest_edge", content["size"])
    file.require(not content.get("do_center_crop"), "do_center_crop must be false", True)
    if size >= 384:
        return {"image_size": size, "resize": "squash", "crop_pct": 1.0}
    return {"image_size": size, "resize": "shorter_edge", "crop_pct": content["crop_pct"]}


def _usual_geometry(file, number_is_edge, crop_size):
    """Returns size, resizing and crop of the other image processors, such as BiT's and ViT's.

    They resize to `size`, an edge or a square, and then crop to `crop_size`.

    Args:
        file: The `_File`.
        number_is_edge: Whether a `size` that is a number is the shorter edge, not a square.
        crop_size: The processor's own `crop_size`; None for one that crops only if told to.
    """
    content = file.content
    size = content.get("size")
    file.require(size, "size must be stated", size)
    edge = _edge(size) if number_is_edge or isinstance(size, dict) else None
    resized = edge or _square(file, size, "size")
    cropped = resized
    if content.get("do_center_crop", crop_size is not None):
        crop_size = content.get("crop_size") or crop_size
        file.require(crop_size, "crop_size must be stated", crop_size)
        cropped = _square(file, crop_size, "crop_size")
    else:
        file.require(edge is None, "do_center_crop must be true where the edges may differ", size)
    file.require(cropped <= resized, f"crop_size must be at most {resized}", cropped)
    return {
        "image_size": cropped,
        "resize": "shorter_edge" if edge else "squash",
        "crop_pct": find_crop_pct(cropped, resized),
    }


# Image processor -> a function of size, resizing and crop.
_GEOMETRIES = {
    "ConvNext": _convnext_geometry,
    "ViT": functools.partial(_usual_geometry, number_is_edge=False, crop_size=None),
    "DeiT": functools.partial(_usual_geometry, number_is_edge=False, crop_size=224),
    "Bit": functools.partial(_usual_geometry, number_is_edge=True, crop_size=224),
    "CLIP": functools.partial(_usual_geometry, number_is_edge=True, crop_size=224),
}


# ----------------------------------------------------------------------------------------------
# Classes and licence
# ----------------------------------------------------------------------------------------------


def _class_names(file, names, num_classes, descriptions=None):
    """Returns one line of text for each class, or None where the file has no names.

    Args:
        file: The `_File`.
        names: A list, or a dict from numbers, as JSON has them, to names; None without names.
        num_classes: The number of classes.
        descriptions: timm's names -> texts for people, where the names are WordNet's ids.
    """
    if not names:
        return None
    if isinstance(names, dict):
        numbers = {str(index) for index in range(num_classes)}
        known = f"classes must be numbered 0 … {num_classes - 1}"
        file.require(names.keys() == numbers, known, [*names][:3])
        names = [names[str(index)] for index in range(num_classes)]
    file.require(len(names) == num_classes, f"there must be {num_classes} class names", len(names))
    described, result = descriptions or {}, []
    for name in names:
        text = described.get(name, name) if isinstance(name, str) else name
        file.require(schema.TEXT.accepts(text), "a class name must be text", text)
        result.append(_short(text) or f"class {len(result)}")
    return tuple(result)


def _short(text):
    """Returns a text of a file in one printable line of limited length; None for none."""
    return printable(" ".join(text.split()))[:_MAX_NAME] if text else None


def _read_card(repository):
    """Returns the licence and the data sets in the header of a repository's README.md.

    The network can be used without them: a file that cannot be read is as none.
    """
    card = {"license": None, "datasets": []}
    try:
        text = repository.read(CARD) or ""
    except InputError:
        return card
    lines = [line.rstrip() for line in text[:_MAX_HEADER].splitlines()]
    if lines[:1] != ["---"] or "---" not in lines[1:]:
        return card
    key = None
    for line in lines[1 : lines.index("---", 1)]:
        # YAML; the headers that the libraries write use two forms of it: "key: value", and a
        # list of "- value" under a key. No regular expressions: their time can grow as a square.
        name, colon, value = line.partition(":")
        if colon and name.isidentifier():
            key, value = name, value.strip()
            if key in ("license", "license_name") and value:
                # "license: other" stands beside the name of an uncommon one.
                card["license"] = _short(value.strip("\"'"))
            elif key == "datasets" and value:
                card["datasets"] = [part.strip(" \"'") for part in value.strip("[]").split(",")]
        elif key == "datasets" and line.lstrip().startswith("-"):
            card["datasets"].append(line.strip().removeprefix("-").strip(" \"'"))
    return card
