"""What each library calls the weights of a residual network: name maps, as data.

Our own names are the paths of Keras's variables, such as ``stage1_block1/conv1/kernel``. A row of
`LAYOUTS` turns one into another library's. Adding a layout is adding a row.
"""

import dataclasses
import re

import numpy as np

from keras_resnet.errors import InputError, look_up
from keras_resnet.models import STEMS

_BLOCK = re.compile(r"stage(\d+)_block(\d+)$")

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
    """How a library names the weights, and in what order it keeps their axes.

    Attributes:
        description: Where it comes from, one line.
        variant: The row of `models.VARIANTS` that its networks have.
        block: What a name within a block begins with. It may use {stage} and {block}, counted
            from 1, {stage0} and {block0}, counted from 0, and {stage2}, the stage counted from 2.
        names: Our layer's name (within a block, the path in it) -> theirs. The convolutions and
            normalisations of a branch, conv1, bn1, …, need no entry where they have the same name.
        variables: The variable's name -> what their name ends in.
        channels_first: Whether kernels have PyTorch's order of axes.
        dense_as_conv: Our Dense layers that are 1×1 convolutions there.
        marker: A pattern that one tensor's name matches in this layout alone.
        also: Further variants that its library builds, from the same names and shapes.
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
            KeyError: If there is no such thing in networks of this layout.

        Example:
            >>> LAYOUTS["torchvision"].name("stage2_block1/shortcut_bn/moving_mean")
            'layer2.0.downsample.1.running_mean'
        """
        first, *inner, variable = path.split("/")
        prefix, part, names = "", first, self.names
        if match := _BLOCK.match(first):
            stage, block = map(int, match.groups())
            indices = {"stage0": stage - 1, "stage2": stage + 1, "block0": block - 1}
            prefix = self.block.format(stage=stage, block=block, **indices)
            part = "/".join(inner)
            names = {**_BRANCH, **names}
        return prefix + names[part] + self.variables[variable]

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

_CHAPTER = Layout(
    "the textbook's nn.Sequential of five stages",
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
    "huggingface": _HUGGINGFACE,
    "huggingface_backbone": dataclasses.replace(
        _HUGGINGFACE,
        description="Hugging Face transformers, ResNetModel: no head",
        block=_HUGGINGFACE.block.removeprefix("resnet."),
        names={ours: name.removeprefix("resnet.") for ours, name in _HUGGINGFACE.names.items()},
        marker=r"embedder\.embedder\..*",
    ),
    "d2l": _CHAPTER,
    "d2l_named": dataclasses.replace(
        _CHAPTER,
        description="the textbook's nn.Sequential with stages called resnet_block1 …",
        block="resnet_block{stage}.{block0}.",
        names={**_CHAPTER.names, "stem_conv": "0", "stem_bn": "1", "logits": "fc.1"},
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


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint's names and shapes say about the network it comes from.

    Attributes:
        layout: A row of `LAYOUTS`.
        variant: A row of `models.VARIANTS`.
        stem: A row of `models.STEMS`.
        channels: Channels of the images.
        num_classes: Number of logits; None without a head.
        num_tensors: How many tensors there are.
    """

    layout: str
    variant: str
    stem: str
    channels: int
    num_classes: int | None
    num_tensors: int


def detect_layout(names):
    """Returns the row of `LAYOUTS` that tensors of these names have.

    Args:
        names: The tensors' names.

    Raises:
        InputError: If no layout has such names; it lists those known.
    """
    for layout, row in LAYOUTS.items():
        if any(re.fullmatch(row.marker, name) for name in names):
            return layout
    if any(re.fullmatch(r"stem_conv1?/kernel", name) for name in names):
        raise InputError(
            "is a model of ours already: `keras_resnet.archive.load_model` loads it, and "
            "`save_torch_weights` makes a checkpoint of it"
        )
    seen = ", ".join(list(names)[:3])
    raise InputError(
        f"the names of the {len(names)} tensors ({seen}, …) are of no known layout; known: "
        f"{', '.join(LAYOUTS)}"
    )


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
    """Says what network a checkpoint's tensors come from.

    A bottleneck's place of the stride ("torchvision" or "v1") leaves no trace in the weights: the
    variant is the layout's usual one.

    Args:
        tensors: Their names -> arrays, as `read_checkpoint` returns.
        layout: A row of `LAYOUTS`, if it need not be found out.

    Returns:
        A `Checkpoint`.

    Raises:
        InputError: If the names fit no layout, or there is no stem.

    Example:
        >>> tensors = {"conv1.weight": np.zeros((64, 3, 7, 7)), "fc.weight": np.zeros((10, 512))}
        >>> inspect_tensors(tensors)
        ... # doctest: +NORMALIZE_WHITESPACE
        Checkpoint(layout='torchvision', variant='torchvision', stem='imagenet', channels=3,
                   num_classes=10, num_tensors=2)
    """
    layout = layout or detect_layout(tensors)
    row = look_up(LAYOUTS, layout, "layout")
    stem, kernel = _find_stem(tensors, layout, row)
    bias = tensors.get(row.name("logits/bias"), tensors.get(row.name("logits/kernel")))
    axis = 0 if row.channels_first or np.ndim(bias) == 1 else -1
    return Checkpoint(
        layout=layout,
        variant=row.variant,
        stem=stem,
        channels=kernel.shape[2],
        num_classes=bias.shape[axis] if np.ndim(bias) else None,
        num_tensors=len(tensors),
    )
