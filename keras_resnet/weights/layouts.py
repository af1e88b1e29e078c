"""The names that each library gives the weights of a residual network, as data.

Our own names are the paths of Keras's variables, such as ``stage1_block1/conv1/kernel``. A row of
`LAYOUTS` converts one to another library's. To add a layout, add a row, and a real network to
`REAL` in tests/weights/test_layouts.py.

`find_network` finds a network among a checkpoint's tensors: its layout, the prefix before its
names, its head, and the tensors that are of other parts of the training script.
"""

import collections
import dataclasses
import functools
import re

import numpy as np

from keras_resnet.models import STEMS
from keras_resnet.utils.errors import InputError, look_up
from keras_resnet.weights.checkpoint import AVERAGED

_BLOCK = re.compile(r"stage(\d+)_block(\d+)$")

# No name of a layout has more parts, with dots or slashes between them.
_MAX_PARTS = 12

HEAD = ("logits/kernel", "logits/bias")

_BRANCH = {f"{part}{n}": f"{part}{n}" for part in ("conv", "bn") for n in (1, 2, 3)}

_TORCH = {
    "kernel": ".weight",
    "bias": ".bias",
    "gamma": ".weight",
    "beta": ".bias",
    "moving_mean": ".running_mean",
    "moving_variance": ".running_var",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The names that a library gives the weights, and the order of their axes.

    Attributes:
        description: Where it comes from, one line.
        variant: The row of `models.VARIANTS` that its networks have.
        block: The beginning of a name within a block. It may use {stage} and {block}, counted
            from 1, {stage0} and {block0}, counted from 0, {stage2} and {stage4}, the stage counted
            from 2 and from 4.
        names: Our layer's name (within a block, the path in it) -> theirs. The convolutions and
            normalisations of a branch, conv1, bn1, …, need no entry where they have the same name.
        variables: The variable's name -> the end of their name.
        channels_first: Whether kernels have PyTorch's order of axes.
        dense_as_conv: Dense layers of ours that are 1×1 convolutions in the library.
        marker: A pattern that at least one name in every network of this layout matches.
        also: Further variants that the library builds with the same names and shapes.
    """

    description: str
    variant: str
    block: str
    names: dict
    marker: str
    variables: dict = dataclasses.field(default_factory=lambda: _TORCH)
    channels_first: bool = True
    dense_as_conv: tuple[str, ...] = ()
    also: tuple[str, ...] = ()

    def name(self, path):
        """Returns their name of the variable that Keras calls `path`.

        Raises:
            KeyError: If networks of this layout have no such variable.

        Example:
            >>> LAYOUTS["torchvision"].name("stage2_block1/shortcut_bn/moving_mean")
            'layer2.0.downsample.1.running_mean'
        """
        first, *inner, variable = path.split("/")
        prefix, part, names = "", first, self.names
        if match := _BLOCK.match(first):
            stage, block = map(int, match.groups())
            indices = {"stage0": stage - 1, "stage2": stage + 1, "block0": block - 1}
            indices["stage4"] = stage + 3
            prefix = self.block.format(stage=stage, block=block, **indices)
            part = "/".join(inner)
            names = {**_BRANCH, **names}
        return prefix + names[part] + self.variables[variable]

    @functools.cached_property
    def pattern(self):
        """The pattern of all names but the logits'; those within a block are its group "block"."""
        outside = ("stem_", "final_", "logits")  # our names of layers that are in no block
        block = self.block.format(
            stage="#", stage0="#", stage2="#", stage4="#", block="#", block0="#"
        )
        inner = [n for ours, n in {**_BRANCH, **self.names}.items() if not ours.startswith(outside)]
        outer = [n for ours, n in self.names.items() if ours.startswith(outside[:2])]
        layers, inner, variables = (
            "|".join(map(re.escape, names)) for names in (outer, inner, self.variables.values())
        )
        block = re.escape(block).replace(re.escape("#"), r"\d+")
        return re.compile(f"(?:{layers}|(?P<block>{block}(?:{inner})))(?:{variables})")

    def split(self, name):
        """Returns the prefix before a name of this layout, and the match of the rest; or None.

        Example:
            >>> LAYOUTS["torchvision"].split("model.backbone.layer1.0.conv1.weight")[0]
            'model.backbone.'
        """
        starts = [0, *(mark.end() for mark in re.finditer(r"[./]", name))]
        for start in starts[-_MAX_PARTS:]:
            if match := self.pattern.fullmatch(name, start):
                return name[:start], match
        return None

    def from_ours(self, path, array):
        """Returns the array of our variable `path` with their order of axes.

        Example:
            >>> kernel = np.zeros((3, 3, 8, 16))
            >>> LAYOUTS["torchvision"].from_ours("stem_conv/kernel", kernel).shape
            (16, 8, 3, 3)
        """
        if not self.channels_first:
            return array
        if array.ndim == 4:
            return array.transpose(3, 2, 0, 1)
        if array.ndim == 2:
            return array.T[:, :, None, None] if self._is_conv(path) else array.T
        return array

    def to_ours(self, path, array):
        """Returns their array with the order of axes of our variable `path`."""
        if not self.channels_first:
            return array
        if array.ndim == 4:
            kernel = array.transpose(2, 3, 1, 0)
            return kernel[0, 0] if self._is_conv(path) and kernel.shape[:2] == (1, 1) else kernel
        return array.T

    def _is_conv(self, path):
        return path.rsplit("/", 1)[0].endswith(self.dense_as_conv) if self.dense_as_conv else False


def _numbered(ours, theirs, count=3):
    """Returns {ours1: theirs1, …}, where both end in a number."""
    return {f"{ours}{n}": theirs.format(n=n, n0=n - 1) for n in range(1, count + 1)}


_SE = {"se/fc1": "se.fc1", "se/fc2": "se.fc2"}

_TORCHVISION = Layout(
    "torchvision; timm's ResNet, SE-ResNet and ResNeXt",
    variant="torchvision",
    block="layer{stage}.{block0}.",
    names={
        "stem_conv": "conv1",
        "stem_bn": "bn1",
        "shortcut_conv": "downsample.0",
        "shortcut_bn": "downsample.1",
        "logits": "fc",
        **_SE,
    },
    dense_as_conv=("se/fc1", "se/fc2"),
    marker=r"conv1\.weight",
)

_HUGGINGFACE = Layout(
    "Hugging Face transformers, ResNetForImageClassification",
    variant="torchvision",
    block="resnet.encoder.stages.{stage0}.layers.{block0}.",
    names={
        "stem_conv": "resnet.embedder.embedder.convolution",
        "stem_bn": "resnet.embedder.embedder.normalization",
        **_numbered("conv", "layer.{n0}.convolution"),
        **_numbered("bn", "layer.{n0}.normalization"),
        "shortcut_conv": "shortcut.convolution",
        "shortcut_bn": "shortcut.normalization",
        "logits": "classifier.1",
    },
    marker=r"resnet\.embedder\..*",
    also=("v1",),  # downsample_in_bottleneck=True
)

_D2L = Layout(
    "Dive into Deep Learning (d2l): an nn.Sequential of five stages",
    variant="d2l",
    block="{stage}.{block0}.",
    names={"stem_conv": "0.0", "stem_bn": "0.1", "shortcut_conv": "conv3", "logits": "7"},
    marker=r"0\.0\.weight",
)

_KERAS_V1 = Layout(
    "keras.applications, ResNet50, ResNet101 and ResNet152",
    variant="keras_v1",
    block="conv{stage2}_block{block}_",
    names={
        "stem_conv": "conv1_conv",
        "stem_bn": "conv1_bn",
        **_numbered("conv", "{n}_conv"),
        **_numbered("bn", "{n}_bn"),
        "shortcut_conv": "0_conv",
        "shortcut_bn": "0_bn",
        "logits": "predictions",
    },
    variables={name: f"/{name}" for name in _TORCH},
    channels_first=False,
    marker=r"conv1_bn/gamma",
)

LAYOUTS = {
    "torchvision": _TORCHVISION,
    "timm_d": dataclasses.replace(
        _TORCHVISION,
        description="timm's ResNet-D: a deep stem, an average pooling in the shortcut",
        names={
            **{ours: _TORCHVISION.names[ours] for ours in ("logits", *_SE)},
            # Places in the Sequential of the stem, whose ReLUs have no weights.
            "stem_conv1": "conv1.0",
            "stem_bn1": "conv1.1",
            "stem_conv2": "conv1.3",
            "stem_bn2": "conv1.4",
            "stem_conv3": "conv1.6",
            "stem_bn3": "bn1",
            "shortcut_conv": "downsample.1",
            "shortcut_bn": "downsample.2",
        },
        marker=r"conv1\.0\.weight",
    ),
    "timm_v2": Layout(
        "timm's ResNetV2 with BatchNorm: pre-activation",
        variant="v2",
        block="stages.{stage0}.blocks.{block0}.",
        names={
            "stem_conv": "stem.conv",
            **_numbered("stem_conv", "stem.conv{n}"),
            **_numbered("stem_bn", "stem.norm{n}"),
            **_numbered("bn", "norm{n}"),
            "shortcut_conv": "downsample.conv",
            "final_bn": "norm",
            "logits": "head.fc",
        },
        dense_as_conv=("logits",),
        marker=r"stem\.conv1?\.weight",
    ),
    # Before the next row: without a 1×1 convolution on a shortcut, all names are of both.
    "pytorch_resnet_cifar10": dataclasses.replace(
        _TORCHVISION,
        description="ResNet-20 … 110 as pytorch_resnet_cifar10 (akamaster) has them",
        variant="cifar",
        names={"stem_conv": "conv1", "stem_bn": "bn1", "logits": "linear"},
        dense_as_conv=(),
    ),
    "pytorch_cifar": dataclasses.replace(
        _TORCHVISION,
        description="ResNets for CIFAR as pytorch-cifar (kuangliu) has them",
        names={
            **_TORCHVISION.names,
            "shortcut_conv": "shortcut.0",
            "shortcut_bn": "shortcut.1",
            "logits": "linear",
        },
    ),
    "torchvision_sequential": dataclasses.replace(
        _TORCHVISION,
        description="nn.Sequential(*resnet.children()) of torchvision's: numbers for names",
        block="{stage4}.{block0}.",
        names={**_TORCHVISION.names, "stem_conv": "0", "stem_bn": "1", "logits": "10"},
        marker=r"4\.0\.conv1\.weight",
    ),
    "huggingface": _HUGGINGFACE,
    "huggingface_backbone": dataclasses.replace(
        _HUGGINGFACE,
        description="Hugging Face transformers, ResNetModel: no head",
        block=_HUGGINGFACE.block.removeprefix("resnet."),
        names={ours: name.removeprefix("resnet.") for ours, name in _HUGGINGFACE.names.items()},
        marker=r"embedder\.embedder\..*",
    ),
    "d2l": _D2L,
    "d2l_named": dataclasses.replace(
        _D2L,
        description="Dive into Deep Learning (d2l): stages called resnet_block1 …",
        block="resnet_block{stage}.{block0}.",
        names={**_D2L.names, "stem_conv": "0", "stem_bn": "1", "logits": "fc.1"},
        marker=r"resnet_block1\..*",
    ),
    "keras_v1": _KERAS_V1,
    "keras_v2": dataclasses.replace(
        _KERAS_V1,
        description="keras.applications, ResNet50V2, ResNet101V2 and ResNet152V2",
        variant="keras_v2",
        names={
            **_KERAS_V1.names,
            "bn1": "preact_bn",
            "bn2": "1_bn",
            "bn3": "2_bn",
            "final_bn": "post_bn",
        },
        marker=r"post_bn/gamma",
    ),
}

OWN = "keras_resnet"
"""The name of the layout of our own names. It is not in `LAYOUTS`: no other library uses it."""

OWN_LAYOUT = Layout(
    "a network of this package",
    variant="d2l",  # replaced by the network's own variant
    block="stage{stage}_block{block}/",
    names={
        name: name
        for name in (
            *(f"stem_{part}{number}" for part in ("conv", "bn") for number in ("", 1, 2, 3)),
            *("shortcut_conv", "shortcut_bn", *_SE, "final_bn", "logits"),
        )
    },
    variables={name: f"/{name}" for name in _TORCH},
    channels_first=False,
    marker=r"stem_conv1?/kernel",
)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network among a checkpoint's tensors.

    Attributes:
        layout: The name of a row of `LAYOUTS`, or `OWN`.
        row: That row.
        prefix: The text before the layout's names, such as "model.backbone."; else "".
        names: The names that the layout gives the tensors -> their names in the checkpoint.
            Tensors under the prefix that the layout does not know have the rest of their names.
        head: The keys of `names` that belong to the head, in any form.
        ignored: The names of the tensors that belong to other parts.
        taken: The key or, where there are several networks, the prefix that it was under, such as
            "state_dict_ema" or "ema_model."; None for a bare state dict.
    """

    layout: str
    row: Layout
    prefix: str
    names: dict
    head: frozenset
    ignored: tuple[str, ...]
    taken: str | None

    def select(self, tensors):
        """Returns the tensors under the layout's names."""
        return {name: tensors[theirs] for name, theirs in self.names.items()}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The network that a checkpoint comes from, by its names and shapes.

    Attributes:
        layout: The name of a row of `LAYOUTS`, or `OWN`.
        variant: A row of `models.VARIANTS`.
        stem: A row of `models.STEMS`.
        channels: Channels of the images.
        num_classes: Number of logits; None without a head of one layer.
        num_tensors: How many tensors the network has.
        taken: See `Network`.
        ignored: The names of the tensors that belong to other parts than the network.
    """

    layout: str
    variant: str
    stem: str
    channels: int
    num_classes: int | None
    num_tensors: int
    taken: str | None = None
    ignored: tuple[str, ...] = ()


def detect_layout(names):
    """Returns the row of `LAYOUTS` that tensors of these names have.

    Args:
        names: The tensors' names.

    Raises:
        InputError: If no layout has such names; it lists the known layouts.

    Example:
        >>> detect_layout(["model.conv1.weight", "model.layer1.0.conv1.weight", "loss.weight"])
        'torchvision'
    """
    return _choose_body(names, LAYOUTS).layout


def find_network(tensors, layout=None):
    """Finds the network among a checkpoint's tensors.

    The prefix before its names is any text before those that match a layout. Tensors without this
    prefix belong to other parts of a training script, such as a loss, except those of a head. A
    head of one dense layer gets the layout's name.

    Args:
        tensors: Their names -> arrays, as `read_checkpoint` returns.
        layout: The name of a row of `LAYOUTS`, or an `OWN_LAYOUT`, if it need not be found.

    Returns:
        A `Network`.

    Raises:
        InputError: If the names are of no layout, or of several networks.

    Example:
        >>> tensors = {"net.conv1.weight": np.zeros((64, 3, 7, 7)), "loss.weight": np.zeros(10)}
        >>> network = find_network(tensors)
        >>> network.layout, network.names, network.ignored
        ('torchvision', {'conv1.weight': 'net.conv1.weight'}, ('loss.weight',))
    """
    if isinstance(layout, Layout):
        rows = {OWN: layout}
    else:
        rows = {layout: look_up(LAYOUTS, layout, "layout")} if layout else LAYOUTS
    body = _choose_body(tensors, rows)
    row = rows[body.layout]
    ours = [row.name(path) for path in HEAD]
    names = {n.removeprefix(body.prefix): n for n in tensors if n.startswith(body.prefix)}
    # A lone number, such as the best accuracy, is no weight of a network.
    lone = {n for n, theirs in names.items() if not np.ndim(tensors[theirs]) and n not in ours}
    names = {n: theirs for n, theirs in names.items() if n not in lone or theirs in body.names}
    head = _find_head(row, tensors, body, names)
    layers = _dense_layers(row, tensors, head)
    if len(layers) == 1 and len(head) == 2:
        names = {name: theirs for name, theirs in names.items() if theirs not in head}
        names.update(zip(ours, (layers[0].kernel, layers[0].bias), strict=True))
    else:
        outside = sorted(head - set(names.values()))
        names.update({f"{name} outside {body.prefix}": name for name in outside})
    of_head = {name for name, theirs in names.items() if theirs in head} | set(ours)
    ignored = tuple(sorted(tensors.keys() - set(names.values())))
    taken = body.taken or getattr(tensors, "taken", None)
    return Network(body.layout, row, body.prefix, names, frozenset(of_head), ignored, taken)


@dataclasses.dataclass
class _Body:
    """Tensors whose names match a layout behind one prefix: a network but for its head."""

    layout: str
    prefix: str
    names: set = dataclasses.field(default_factory=set)
    marked: bool = False
    num_in_blocks: int = 0
    taken: str | None = None
    rivals: tuple[str, ...] = ()  # the prefixes of other networks, where this one was taken


def _choose_body(names, rows):
    """Returns the largest `_Body` of any layout, or the averaged one of several networks."""
    bodies = {}
    for layout, row in rows.items():
        for name in names:
            if split := row.split(name):
                prefix, match = split
                body = bodies.setdefault((layout, prefix), _Body(layout, prefix))
                body.names.add(name)
                body.marked |= bool(re.fullmatch(row.marker, match[0]))
                body.num_in_blocks += match["block"] is not None
    # Layouts share names, so that one network gives several bodies. The name of the head decides
    # between equal ones, then the order of the table.
    known, networks = set(names), []
    marked = [body for body in bodies.values() if body.marked]

    def order(body):
        head = body.prefix + rows[body.layout].name(HEAD[0])
        return not body.num_in_blocks, -len(body.names), len(body.prefix), head not in known

    for body in sorted(marked, key=order):
        if not networks or (body.num_in_blocks and not any(body.names & n.names for n in networks)):
            networks.append(body)
    averaged = [body for body in networks if AVERAGED.search(body.prefix)]
    if len(networks) > 1 and len(averaged) == 1:
        body = averaged[0]
        rivals = tuple(other.prefix for other in networks if other is not body)
        return dataclasses.replace(body, taken=body.prefix, rivals=rivals)
    if len(networks) > 1:
        prefixes = " and ".join(sorted(repr(body.prefix) for body in networks))
        raise InputError(
            f"holds {len(networks)} networks, whose names begin with {prefixes}: pass the tensors "
            "of one of them alone, as a mapping or in a file"
        )
    if networks or len(rows) == 1:  # a layout that the user named
        return networks[0] if networks else _Body(*rows, "")
    if any(re.fullmatch(OWN_LAYOUT.marker, name) for name in names):
        raise InputError(
            "is a model of ours already: `keras_resnet.archive.load_model` loads it, and "
            "`save_torch_weights` makes a checkpoint of it"
        )
    seen = ", ".join(list(names)[:3])
    raise InputError(
        f"the names of the {len(names)} tensors ({seen}, …) are of no known layout; known: "
        f"{', '.join(LAYOUTS)}"
    )


def _find_head(row, tensors, body, names):
    """Returns the names of all tensors that may be of the network's head.

    Under the prefix these are the modules without convolutions and beside the body. Elsewhere they
    are the dense layers that take the body's features, or the output of such a layer.
    """
    root = functools.partial(re.compile(r"[./]").split, maxsplit=1)
    modules = collections.defaultdict(list)
    for name, theirs in names.items():
        modules[root(name)[0]].append(theirs)
    head = set()
    for module in modules.values():
        ranks = {np.ndim(tensors[name]) for name in module}
        if body.names.isdisjoint(module) and 2 in ranks and max(ranks) == 2:
            head.update(module)
    lengths = [tensors[name].shape[0] for name in body.names if np.ndim(tensors[name]) == 1]
    sizes = {max(lengths, default=0)} | {n.outputs for n in _dense_layers(row, tensors, head)}
    outside = {name for name in tensors if not name.startswith((body.prefix, *body.rivals))}
    elsewhere = _dense_layers(row, tensors, outside)
    while layers := [n for n in elsewhere if n.inputs in sizes and n.kernel not in head]:
        head.update(name for layer in layers for name in (layer.kernel, layer.bias))
        sizes.update(layer.outputs for layer in layers)
    return head


@dataclasses.dataclass(frozen=True)
class _Dense:
    """A dense layer with a bias: the names of its tensors, its numbers of features."""

    kernel: str
    bias: str
    inputs: int
    outputs: int


def _dense_layers(row, tensors, names):
    """Returns the `_Dense` layers among the tensors of these names."""
    layers, ends = [], (row.variables["kernel"], row.variables["bias"])
    for kernel in sorted(names):
        bias = kernel.removesuffix(ends[0]) + ends[1]
        if (
            kernel.endswith(ends[0])
            and bias in names
            and np.ndim(tensors[kernel]) == 2
            and np.ndim(tensors[bias]) == 1
        ):
            sizes = tensors[kernel].shape
            inputs, outputs = sizes[::-1] if row.channels_first else sizes
            layers.append(_Dense(kernel, bias, inputs, outputs))
    return layers


def _find_stem(tensors, layout, row):
    """Returns the row of `STEMS` that the first convolution is of, and its kernel."""
    for stem, form in STEMS.items():
        layer = "stem_conv" if len(form.convolutions) == 1 else "stem_conv1"
        path = f"{layer}/kernel"
        kernel = tensors.get(row.name(path)) if layer in row.names else None
        if kernel is not None and kernel.ndim == 4:
            kernel = row.to_ours(path, kernel)
            if kernel.shape[:2] == (form.convolutions[0][0],) * 2:
                return stem, kernel
    sizes = sorted({f"{k}×{k}" for form in STEMS.values() for k, _, _ in form.convolutions[:1]})
    first = "stem_conv" if "stem_conv" in row.names else "stem_conv1"
    raise InputError(
        f"of layout {layout}, but {row.name(f'{first}/kernel')} is missing or is not "
        f"{' or '.join(sizes)}"
    )


def inspect_tensors(tensors, layout=None):
    """Finds the form of the network that a checkpoint's tensors come from.

    The place of a bottleneck's stride ("torchvision" or "v1") is not recorded in the weights: the
    variant is the layout's usual one.

    Args:
        tensors: Their names -> arrays, as `read_checkpoint` returns.
        layout: See `find_network`.

    Returns:
        A `Checkpoint`.

    Raises:
        InputError: If the names fit no layout, or there is no stem.

    Example:
        >>> tensors = {"conv1.weight": np.zeros((64, 3, 7, 7)), "fc.weight": np.zeros((10, 512))}
        >>> inspect_tensors(tensors)
        ... # doctest: +NORMALIZE_WHITESPACE
        Checkpoint(layout='torchvision', variant='torchvision', stem='imagenet', channels=3,
                   num_classes=10, num_tensors=2, taken=None, ignored=())
    """
    network = find_network(tensors, layout)
    row, tensors = network.row, network.select(tensors)
    stem, kernel = _find_stem(tensors, network.layout, row)
    bias = tensors.get(row.name("logits/bias"), tensors.get(row.name("logits/kernel")))
    axis = 0 if row.channels_first or np.ndim(bias) == 1 else -1
    return Checkpoint(
        layout=network.layout,
        variant=row.variant,
        stem=stem,
        channels=kernel.shape[2],
        num_classes=bias.shape[axis] if np.ndim(bias) else None,
        num_tensors=len(tensors),
        taken=network.taken,
        ignored=network.ignored,
    )
