"""Residual networks by the functional API. Pure Keras 3: any backend.

Depths, variants of the block and stems are the rows of three tables, `SPECS`, `VARIANTS` and
`STEMS`; one builder reads them.
"""

import dataclasses
import math
import re

import keras

from keras_resnet.blocks import (
    TORCH_UNIFORM,
    BottleneckBlock,
    DenseResidualBlock,
    EdgePadding2D,
    PaddedConv2D,
    PreActBottleneckBlock,
    PreActResidualBlock,
    ResidualBlock,
    has_bias,
)
from keras_resnet.normalization import BATCH_NORM, batch_norm
from keras_resnet.utils.errors import InputError, check_count, check_share, look_up

# name -> the block without and with pre-activation.
BLOCKS = {
    "basic": (ResidualBlock, PreActResidualBlock),
    "bottleneck": (BottleneckBlock, PreActBottleneckBlock),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Depth and width of a network: He et al. 2016a, table 1, and later extensions.

    Attributes:
        blocks: Number of residual blocks in each stage.
        filters: Number of filters of each stage; the stem has as many as the first.
        block: A row of `BLOCKS`: "basic" or "bottleneck".
        groups: See `BottleneckBlock`.
        width_per_group: See `BottleneckBlock`.
        shortcut_pool: See `ResidualBlock`.
        se_reduction: See `ResidualBlock`.
        stem: The default stem, a row of `STEMS`.
    """

    blocks: tuple[int, ...]
    filters: tuple[int, ...] = (64, 128, 256, 512)
    block: str = "basic"
    groups: int = 1
    width_per_group: int = 64
    shortcut_pool: str | None = None
    se_reduction: int | None = None
    stem: str = "imagenet"

    def __post_init__(self):
        lists = all(isinstance(v, (tuple, list)) for v in (self.blocks, self.filters))
        if not lists or len(self.blocks) != len(self.filters) or not self.blocks:
            raise InputError(
                "`blocks` and `filters` need one number each per stage, and at least one stage, "
                f"got {self.blocks} and {self.filters}"
            )
        for count in (*self.blocks, *self.filters):
            check_count("blocks` and `filters", count)
        look_up(BLOCKS, self.block, "block")

    @property
    def block_args(self):
        """The arguments of every block of the network."""
        names = ("groups", "width_per_group", "shortcut_pool", "se_reduction")
        return {name: getattr(self, name) for name in names}


def _bottlenecks(*blocks, **kwargs):
    return Spec(blocks, block="bottleneck", **kwargs)


# ResNet-D: He et al. 2019, Bag of Tricks for Image Classification, section 4.
_D = {"stem": "deep", "shortcut_pool": "average"}

SPECS = {
    # He et al. 2016a, table 1.
    "resnet18": Spec((2, 2, 2, 2)),
    "resnet34": Spec((3, 4, 6, 3)),
    "resnet50": _bottlenecks(3, 4, 6, 3),
    "resnet101": _bottlenecks(3, 4, 23, 3),
    "resnet152": _bottlenecks(3, 8, 36, 3),
    # He et al. 2016b, table 5; meant for variant "v2".
    "resnet200": _bottlenecks(3, 24, 36, 3),
    "resnet18d": Spec((2, 2, 2, 2), **_D),
    "resnet34d": Spec((3, 4, 6, 3), **_D),
    "resnet50d": _bottlenecks(3, 4, 6, 3, **_D),
    "resnet101d": _bottlenecks(3, 4, 23, 3, **_D),
    # He et al. 2016a, section 4.2; meant for variant "cifar". 6n + 2 layers.
    **{f"resnet{6 * n + 2}": Spec((n, n, n), (16, 32, 64), stem="small") for n in (3, 5, 7, 9, 18)},
    # For small grey images in minutes: few filters where the maps are large.
    "resnet10_narrow": Spec((1, 1, 1, 1), (16, 32, 64, 128), stem="small"),
    "resnet12_narrow": Spec((1, 1, 1, 1, 1), (16, 32, 64, 128, 256), stem="small"),
    # Hu et al. 2018, table 1.
    "seresnet50": _bottlenecks(3, 4, 6, 3, se_reduction=16),
    # Xie et al. 2017, table 1.
    "resnext50_32x4d": _bottlenecks(3, 4, 6, 3, groups=32, width_per_group=4),
    "resnext101_32x8d": _bottlenecks(3, 4, 23, 3, groups=32, width_per_group=8),
    "resnext101_64x4d": _bottlenecks(3, 4, 23, 3, groups=64, width_per_group=4),
    # Zagoruyko and Komodakis, Wide Residual Networks, 2016, table 8.
    "wide_resnet50_2": _bottlenecks(3, 4, 6, 3, width_per_group=128),
    "wide_resnet101_2": _bottlenecks(3, 4, 23, 3, width_per_group=128),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A form of the network: arguments of its blocks, and changes around them.

    Attributes:
        use_bias: See `ResidualBlock`; also for the stem.
        shortcut_norm: See `ResidualBlock`.
        kernel_initializer: The initializer of convolution kernels; also for the stem.
        norm_epsilon: The `epsilon` of every BatchNormalization.
        stride_on_1x1: See `ResidualBlock`.
        shortcut_pool: See `ResidualBlock`; that of the spec takes precedence, but not over "pad".
        pre_activation: Whether normalisation and ReLU come before each convolution. If so, the
            stem has none, and one more of each follows the last stage.
        halving_block: Which block of a stage halves height and width: 0, the first, of every
            stage but the first; -1, the last, of every stage but the last.
        pool_padding: The padding of the stem's pooling: "zeros" or "edge"; see `EdgePadding2D`.
        use_shortcut: See `ResidualBlock`.
    """

    use_bias: bool | str
    shortcut_norm: bool
    kernel_initializer: dict | str
    norm_epsilon: float = BATCH_NORM["epsilon"]
    stride_on_1x1: bool = False
    shortcut_pool: str | None = None
    pre_activation: bool = False
    halving_block: int = 0
    pool_padding: str = "zeros"
    use_shortcut: bool = True

    @property
    def block_args(self):
        """The arguments of every block of the network."""
        names = (
            *("use_bias", "shortcut_norm", "use_shortcut", "kernel_initializer", "norm_epsilon"),
            "stride_on_1x1",
        )
        return {name: getattr(self, name) for name in names}


# He et al., Delving Deep into Rectifiers, 2015, by the kernel's outputs, as torchvision draws it.
_HE_NORMAL = {
    "class_name": "VarianceScaling",
    "config": {"scale": 2.0, "mode": "fan_out", "distribution": "untruncated_normal"},
}

VARIANTS = {
    # Dive into Deep Learning (d2l): biases everywhere, a bare 1×1 convolution as shortcut, the
    # default initialisation of PyTorch.
    "d2l": Variant(True, False, TORCH_UNIFORM),
    # The form of most published weights.
    "torchvision": Variant(False, True, _HE_NORMAL),
    # He et al. 2016a.
    "v1": Variant(False, True, _HE_NORMAL, stride_on_1x1=True),
    # He et al. 2016a, section 4.2: the networks for CIFAR-10, without parameters on the shortcut.
    "cifar": Variant(False, True, _HE_NORMAL, shortcut_pool="pad"),
    # The networks without shortcuts that He et al. 2016a compare with.
    "plain": Variant(False, True, _HE_NORMAL, use_shortcut=False),
    # He et al. 2016b.
    "v2": Variant(False, False, _HE_NORMAL, pre_activation=True, pool_padding="edge"),
    # The forms of keras.applications: ResNet50 …, and ResNet50V2 …. The only difference is the
    # momentum of the moving statistics: 0.99 there, PyTorch's 0.9 here.
    "keras_v1": Variant(True, True, "glorot_uniform", 1.001e-5, stride_on_1x1=True),
    "keras_v2": Variant(
        "unnormalized",
        False,
        "glorot_uniform",
        1.001e-5,
        shortcut_pool="subsample",
        pre_activation=True,
        halving_block=-1,
    ),
}


@dataclasses.dataclass(frozen=True)
class Stem:
    """The layers before the first stage.

    Attributes:
        convolutions: (kernel size, strides, filters relative to those of the first stage) of each.
        pool: Whether a 3×3 max pooling at stride 2 follows.
    """

    convolutions: tuple[tuple[int, int, float], ...]
    pool: bool


STEMS = {
    # He et al. 2016a, table 1: conv1 and the max pooling of conv2_x.
    "imagenet": Stem(((7, 2, 1),), pool=True),
    # For images of 28 to 64 pixels: He et al. 2016a, section 4.2.
    "small": Stem(((3, 1, 1),), pool=False),
    # Three 3×3 for the 7×7: He et al. 2019, figure 2 (b).
    "deep": Stem(((3, 2, 0.5), (3, 1, 0.5), (3, 1, 1)), pool=True),
}

_POOL_PADDINGS = {
    # PyTorch pads its pooling with -inf; zeros are the same after a ReLU, and only there.
    "zeros": lambda name: keras.layers.ZeroPadding2D(1, data_format="channels_last", name=name),
    "edge": lambda name: EdgePadding2D(name=name),
}

# `pooling` -> the layer that makes one number per channel, without and with the classifier.
_POOLINGS = {
    "avg": keras.layers.GlobalAveragePooling2D,
    "max": keras.layers.GlobalMaxPooling2D,
}


def _check_input_shape(shape):
    known = isinstance(shape, (tuple, list)) and len(shape) == 3 and shape[-1] is not None
    if not known or not all(size is None or (isinstance(size, int) and size > 0) for size in shape):
        raise InputError(
            "`input_shape` must be (height, width, channels), positive, where height and width "
            f"may be None, got {shape!r}"
        )


def _features(shape):
    """Returns the input of a network, in the precision of its weights (Keras takes float32)."""
    return keras.Input(shape, dtype=keras.config.dtype_policy().variable_dtype, name="features")


def _logits(x, num_classes):
    """Returns logits in float32 (in float64 under that policy), whatever the compute dtype.

    A softmax over half-precision logits loses differences that training needs.
    """
    exact = "float64" if keras.config.dtype_policy().variable_dtype == "float64" else "float32"
    return keras.layers.Dense(
        num_classes,
        kernel_initializer=TORCH_UNIFORM,
        dtype=exact,
        name="logits",
    )(x)


def _norm_relu(x, module, number, variant):
    x = batch_norm(epsilon=variant.norm_epsilon, name=f"{module}_bn{number}")(x)
    return keras.layers.ReLU(name=f"{module}_relu{number}")(x)


def _stem(x, filters, stem, variant):
    last = len(stem.convolutions)
    for index, (kernel_size, strides, share) in enumerate(stem.convolutions, start=1):
        number = index if last > 1 else ""
        # With pre-activation, the first block normalises the stem's output.
        normalized = index < last or not variant.pre_activation
        x = PaddedConv2D(
            round(filters * share),
            kernel_size,
            strides,
            use_bias=has_bias(variant.use_bias, normalized),
            kernel_initializer=variant.kernel_initializer,
            name=f"stem_conv{number}",
        )(x)
        if normalized:
            x = _norm_relu(x, "stem", number, variant)
    if stem.pool:
        x = _POOL_PADDINGS[variant.pool_padding]("stem_pad")(x)
        x = keras.layers.MaxPooling2D(3, 2, data_format="channels_last", name="stem_pool")(x)
    return x


def residual_stage(
    x,
    filters,
    num_blocks,
    first_stage=False,
    *,
    block=ResidualBlock,
    halving_block=0,
    stochastic_depth=0.0,
    name="stage",
    **block_args,
):
    """Applies a stage: `num_blocks` residual blocks with the same number of filters.

    The first block halves height and width, unless `first_stage`: the stem has already reduced
    the size then. A block has a 1×1 convolution on its shortcut where its output has another shape
    than its input.

    Args:
        x: A Keras tensor, (batch, height, width, channels).
        filters: Number of filters of each block.
        num_blocks: Number of blocks, at least 1.
        first_stage: Whether height and width stay, as right behind the stem.
        block: The class of the blocks.
        halving_block: Index of the block that halves height and width: 0, the first, or -1, the
            last (as keras.applications has it in ResNetV2).
        stochastic_depth: The blocks' `stochastic_depth`: a number, or a list of one per block.
        name: The stage's name; its blocks are called ``{name}_block1``, ``{name}_block2``, …
        **block_args: Further arguments of `block`.

    Returns:
        A Keras tensor, (batch, ceil(height / 2), ceil(width / 2), filters), or of the same height
        and width as `x` if `first_stage`; four times as many channels if `block` is a bottleneck.

    Raises:
        InputError: If `num_blocks` is not a positive whole number, or `stochastic_depth` has
            another length.

    Source:
        He et al. 2016, table 1: conv2_x … conv5_x.

    Example:
        >>> x = keras.Input((56, 56, 64))
        >>> residual_stage(x, 64, 2, first_stage=True, name="stage1").shape
        (None, 56, 56, 64)
        >>> residual_stage(x, 128, 2, name="stage2").shape
        (None, 28, 28, 128)
    """
    check_count("num_blocks", num_blocks)
    rates = stochastic_depth
    if not isinstance(rates, (list, tuple)):
        rates = [rates] * num_blocks
    if len(rates) != num_blocks:
        raise InputError(
            f"`stochastic_depth` needs one number per block, got {len(rates)} for {num_blocks} "
            "blocks"
        )
    pool = block_args.get("shortcut_pool")
    # The changes of shape for which the shortcut has a 1×1 convolution.
    projects_width = block_args.get("use_shortcut", True) and pool != "pad"
    projects_size = projects_width and pool != "subsample"
    for index, rate in enumerate(rates):
        halve = index == halving_block % num_blocks and not first_stage
        widen = x.shape[-1] != filters * block.expansion
        x = block(
            filters,
            strides=2 if halve else 1,
            use_1x1conv=(widen and projects_width) or (halve and projects_size),
            stochastic_depth=rate,
            name=f"{name}_block{index + 1}",
            **block_args,
        )(x)
    return x


def _stages(x, spec, variant, stochastic_depth, **block_args):
    """Applies every stage; returns the output of each."""
    total, outputs = sum(spec.blocks), []
    # Huang et al. 2016, equation 4: from zero at the input to the full rate at the last block.
    rates = [stochastic_depth * (block + 1) / total for block in range(total)]
    block_args = {**variant.block_args, **spec.block_args, **block_args}
    pools = (spec.shortcut_pool, variant.shortcut_pool)
    block_args["shortcut_pool"] = "pad" if "pad" in pools else pools[0] or pools[1]
    unhalved = 0 if variant.halving_block == 0 else len(spec.blocks) - 1
    for index, (num_blocks, filters) in enumerate(zip(spec.blocks, spec.filters, strict=True)):
        x = residual_stage(
            x,
            filters,
            num_blocks,
            first_stage=index == unhalved,
            block=BLOCKS[spec.block][variant.pre_activation],
            halving_block=variant.halving_block,
            stochastic_depth=[rates.pop(0) for _ in range(num_blocks)],
            name=f"stage{index + 1}",
            **block_args,
        )
        outputs.append(x)
    return outputs


def _head(x, variant, num_classes, include_top, pooling):
    if variant.pre_activation:
        x = _norm_relu(x, "final", "", variant)
    if include_top:
        pooling = pooling or "avg"
    if pooling:
        pool = look_up(_POOLINGS, pooling, "pooling")
        x = pool(data_format="channels_last", name=f"global_{pooling}_pool")(x)
    return _logits(x, num_classes) if include_top else x


def _open_weights(weights, spec, form):
    """Opens a network's first weights, if there are any, and completes the network's form by them.

    Args:
        weights: See `build_resnet`.
        spec: See `build_resnet`.
        form: (input shape, number of classes, variant, stem); None where it was not given.

    Returns:
        A `weights.sources.Source` or None, and the form.
    """
    source, defaults = None, ((224, 224, 1), 10, "d2l", None)
    if weights is not None:
        from keras_resnet.weights.sources import open_source  # which imports this module

        source = open_source(weights)
        source.check_spec(spec)
        defaults = source.form
    pairs = zip(form, defaults, strict=True)
    return source, tuple(default if value is None else value for value, default in pairs)


def build_resnet(
    spec,
    input_shape=None,
    num_classes=None,
    *,
    variant=None,
    stem=None,
    weights=None,
    include_top=True,
    pooling=None,
    return_features=False,
    zero_init_residual=False,
    stochastic_depth=0.0,
    name=None,
):
    """Builds a residual network: stem, stages, global average pooling, logits.

    Its layers are called ``stem_…``, ``stage1_block1`` …, ``global_avg_pool`` and ``logits``. It
    computes in the dtype policy in force (`keras.config.set_dtype_policy`); the layer ``logits``
    computes in float32 under every policy, and in float64 under that one.

    Args:
        spec: The name of a row of `SPECS`, or a `Spec` of your own.
        input_shape: (height, width, channels); height and width may be None. By default
            (224, 224, 1), or the size and the channels of `weights`.
        num_classes: Number of logits, by default 10, or that of `weights`; ignored if not
            `include_top`.
        variant: The form of the network, a row of `VARIANTS`: "d2l" (Dive into Deep Learning:
            biases, a bare 1×1 shortcut; the default, or that of `weights`), "torchvision" (no
            biases, BatchNorm on the shortcut), "v1" (as "torchvision", a bottleneck's stride on its
            first 1×1), "cifar" (as "torchvision", shortcuts without parameters), "plain" (none),
            "v2" (pre-activation), or "keras_v1" and "keras_v2" (those of keras.applications).
        stem: A row of `STEMS`: "imagenet" (7×7 at stride 2, max pooling), "small" (3×3 at
            stride 1, no pooling) or "deep" (three 3×3, max pooling); by default the spec's own, or
            that of `weights`.
        weights: The first weights: a published network's name, such as "timm/resnet18.a1_in1k", or
            the path of a checkpoint; see `weights.sources.open_source`. A head with another number
            of classes stays random; the first convolution is adapted to the images' channels. By
            default all are random.
        include_top: Whether the network ends in logits. If not, it ends in the output of the last
            stage, or in one number per channel where `pooling` is given.
        pooling: "avg" or "max", over height and width; before logits, "avg" by default.
        return_features: Whether to return each stage's output, too, for a detector or a
            segmenter.
        zero_init_residual: Whether every block's branch starts at zero.
        stochastic_depth: The probability that training drops the last block's branch; it grows
            evenly from the first block to the last.
        name: The model's name; by default the spec's.

    Returns:
        A `keras.Model`: float images, (batch, height, width, channels), to logits, (batch,
        num_classes). With `return_features`, to a dict: "stage1", "stage2", … (batch, height / 4,
        width / 4, channels), each half the size of the one before, and "output", the result
        without the option. A stage's output is the next stage's input: a sum before normalization
        where the blocks are pre-activated.

    Raises:
        InputError: If an argument names no row of its table or is out of range.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2016 (2016a), table 1; He et al.,
        Identity Mappings in Deep Residual Networks, 2016 (2016b).

    Example:
        >>> build_resnet(Spec((1, 1), (8, 16)), (32, 32, 3), stem="small").output_shape
        (None, 10)
        >>> backbone = build_resnet(
        ...     "resnet18", (96, 96, 3), include_top=False, pooling="avg", return_features=True
        ... )
        >>> backbone.output["stage3"].shape, backbone.output["output"].shape
        ((None, 6, 6, 256), (None, 512))
    """
    given = (input_shape, num_classes, variant, stem)
    source, (input_shape, num_classes, variant, stem) = _open_weights(weights, spec, given)
    if not isinstance(spec, Spec):
        name = name or spec
        spec = look_up(SPECS, spec, "spec")
    _check_input_shape(input_shape)
    if include_top:
        check_count("num_classes", num_classes)
    variant = look_up(VARIANTS, variant, "variant")
    stem = look_up(STEMS, stem or spec.stem, "stem")
    if pooling is not None:
        look_up(_POOLINGS, pooling, "pooling")
    check_share("stochastic_depth", stochastic_depth)

    inputs = _features(tuple(input_shape))
    x = _stem(inputs, spec.filters[0], stem, variant)
    stages = _stages(x, spec, variant, stochastic_depth, zero_init_residual=zero_init_residual)
    outputs = _head(stages[-1], variant, num_classes, include_top, pooling)
    if return_features:
        named = {f"stage{index}": stage for index, stage in enumerate(stages, start=1)}
        outputs = {**named, "output": outputs}
    model = keras.Model(inputs, outputs, name=name or "resnet")
    if source:
        new_head = not include_top or source.checkpoint.num_classes != num_classes
        source.load_into(model, skip_head=new_head, adapt_input=True)
    return model


def build_resnet18(input_shape=None, num_classes=None, **kwargs):
    """Builds ResNet-18: 18 layers with weights, counting convolutions and the last Dense layer.

    Args:
        input_shape: (height, width, channels); height and width may be None. By default
            (224, 224, 1), or that of `weights`.
        num_classes: Number of logits; by default 10, or that of `weights`.
        **kwargs: Arguments of `build_resnet`.

    Returns:
        A `keras.Model`: float images, (batch, height, width, channels), to logits, (batch,
        num_classes).

    Raises:
        InputError: If an argument is out of range.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2016, table 1, 18-layer.

    Example:
        >>> model = build_resnet18()
        >>> model.output_shape
        (None, 10)
        >>> count_parameters(model)
        11178378
    """
    return build_resnet("resnet18", input_shape, num_classes, **kwargs)


def build_resnet34(input_shape=None, num_classes=None, **kwargs):
    """Builds ResNet-34; arguments, result and source as for `build_resnet18`, 34-layer column.

    Example:
        >>> build_resnet34((224, 224, 3), 1000).output_shape
        (None, 1000)
    """
    return build_resnet("resnet34", input_shape, num_classes, **kwargs)


def build_resnet50(input_shape=None, num_classes=None, **kwargs):
    """Builds ResNet-50, of bottlenecks; arguments and result as for `build_resnet18`.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2016, table 1, 50-layer; figure 5.

    Example:
        >>> count_parameters(build_resnet50((224, 224, 3), 1000, variant="torchvision"))
        25557032
    """
    return build_resnet("resnet50", input_shape, num_classes, **kwargs)


def build_resnet101(input_shape=None, num_classes=None, **kwargs):
    """Builds ResNet-101, of bottlenecks: `build_resnet18` with the 101-layer column of table 1.

    Example:
        >>> model = build_resnet101((64, 64, 3), include_top=False)
        >>> model.output_shape
        (None, 2, 2, 2048)
    """
    return build_resnet("resnet101", input_shape, num_classes, **kwargs)


def build_resnet152(input_shape=None, num_classes=None, **kwargs):
    """Builds ResNet-152, of bottlenecks: `build_resnet18` with the 152-layer column of table 1.

    Example:
        >>> model = build_resnet152((224, 224, 3), 1000, variant="v2")
        >>> sum(layer.name.startswith("stage3_") for layer in model.layers)
        36
    """
    return build_resnet("resnet152", input_shape, num_classes, **kwargs)


def build_dense_resnet(input_features=12, hidden_features=24, output_features=8, num_blocks=10):
    """Builds the residual network of fully connected layers.

    A Dense layer to `hidden_features`, `num_blocks` times `DenseResidualBlock`, a Dense layer to
    `output_features`. The version of Dive into Deep Learning (d2l), whose residual branches are
    initialised like any other layer, outputs numbers of 1e24 at ten blocks. Here the second layer
    of each branch starts at zero: at initialisation the blocks pass on the first layer's output,
    however many there are, and training moves the branches away from zero.

    Args:
        input_features: Number of features of the input.
        hidden_features: Number of features of every block.
        output_features: Number of features of the output.
        num_blocks: Number of blocks, 0 or more.

    Returns:
        A `keras.Model`: (batch, input_features) to (batch, output_features).

    Raises:
        InputError: If a number is not a whole number in range.

    Source:
        He et al. 2016, section 3.2; for the initialisation, Zhang et al., Fixup, 2019.

    Example:
        >>> model = build_dense_resnet(num_blocks=100)
        >>> output = model(keras.ops.arange(1.0, 13.0)[None])
        >>> bool(keras.ops.max(keras.ops.abs(output)) < 120)  # ten times the largest input
        True
    """
    for argument, value in (
        ("input_features", input_features),
        ("hidden_features", hidden_features),
        ("output_features", output_features),
    ):
        check_count(argument, value)
    check_count("num_blocks", num_blocks, least=0)
    inputs = _features((input_features,))
    x = keras.layers.Dense(hidden_features, name="initial_fc")(inputs)
    for index in range(num_blocks):
        x = DenseResidualBlock(hidden_features, name=f"block{index + 1}")(x)
    outputs = keras.layers.Dense(output_features, name="final_fc")(x)
    return keras.Model(inputs, outputs, name="dense_resnet")


def last_map_size(spec, stem, image_size):
    """Returns the height and width of the last stage's maps, for square images.

    Args:
        spec: A row of `SPECS`.
        stem: A row of `STEMS`.
        image_size: Height and width that the network takes, in pixels.

    Example:
        >>> last_map_size("resnet18", "imagenet", 224), last_map_size("resnet18", "imagenet", 28)
        (7, 1)
    """
    stem = STEMS[stem]
    halvings = stem.pool + len(SPECS[spec].blocks) - 1
    stride = math.prod(strides for _, strides, _ in stem.convolutions) * 2**halvings
    return math.ceil(image_size / stride)


def build_named(name, input_shape=None, num_classes=None, variant=None, stem=None):
    """Builds a network by its name on the command line: a row of `SPECS`, or "dense_resnet".

    Args:
        name: The name.
        input_shape: (height, width, channels), (224, 224, 1) by default; for "dense_resnet"
            (features,), (12,) by default.
        num_classes: Number of outputs; the builder's own default if None.
        variant: A row of `VARIANTS`, "d2l" by default; not for "dense_resnet".
        stem: A row of `STEMS`, the spec's own by default; not for "dense_resnet".

    Returns:
        The model, and its input shape without the batch.

    Raises:
        InputError: If there is no such network, or it does not take an argument.

    Example:
        >>> model, shape = build_named("dense_resnet")
        >>> model.name, shape
        ('dense_resnet', (12,))
    """
    names = dict.fromkeys([*SPECS, "dense_resnet"])
    look_up(names, name, "model")
    if name != "dense_resnet":
        shape = tuple(input_shape or (224, 224, 1))
        form = {"variant": variant or "d2l", "stem": stem}
        return build_resnet(name, shape, num_classes or 10, **form), shape
    for argument, value in (("variant", variant), ("stem", stem)):
        if value is not None:
            raise InputError(f"dense_resnet has no `{argument}`, got {value!r}; leave it out")
    shape = tuple(input_shape or (12,))
    if len(shape) != 1:
        raise InputError(f"`input_shape` of dense_resnet must be one number, got {shape}")
    return build_dense_resnet(*shape, output_features=num_classes or 8), shape


def count_parameters(model):
    """Returns the number of trainable parameters, without moving statistics, as PyTorch counts.

    Args:
        model: A built Keras model or layer.
    """
    return sum(int(keras.ops.size(weight)) for weight in model.trainable_variables)


def module_of(layer):
    """Returns the name of the module that a layer of a network is part of.

    Example:
        >>> [module_of(layer) for layer in build_resnet18().layers[-4:]]
        ['stage4', 'stage4', 'global_avg_pool', 'logits']
    """
    return re.sub(r"^(stem|stage\d+|final)_.*", r"\1", layer.name)


def summarize_shapes(model, input_shape):
    """Returns the output shape and the number of parameters of each module of a model.

    Layers of one stage, ``stage1_block1``, ``stage1_block2``, are one module, as are those of the
    stem: the walk has a row for each step of the usual figures.

    Args:
        model: A functional Keras model.
        input_shape: The input's shape, batch included, such as (1, 224, 224, 1). It may differ
            from the size the model was built with where the layers allow that.

    Returns:
        A list of dicts: "module" (a name), "output_shape" (a tuple), "parameters" (trainable, an
        int).

    Raises:
        InputError: If `input_shape` does not fit the model's input.

    Example:
        >>> for row in summarize_shapes(build_resnet18(), (1, 224, 224, 1)):
        ...     print(*row.values())
        stem (1, 56, 56, 64) 3328
        stage1 (1, 56, 56, 64) 148224
        stage2 (1, 28, 28, 128) 525952
        stage3 (1, 14, 14, 256) 2100480
        stage4 (1, 7, 7, 512) 8395264
        global_avg_pool (1, 512) 0
        logits (1, 10) 5130
    """
    expected = model.input_shape
    fits = len(input_shape) == len(expected) and input_shape[-1] == expected[-1]
    if not fits or not all(isinstance(size, int) and size > 0 for size in input_shape):
        raise InputError(
            f"`input_shape` must be whole and positive and fit the model's {expected}, "
            f"got {tuple(input_shape)}"
        )
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    walk = keras.Function(model.inputs, [layer.output for layer in layers])
    outputs = walk.compute_output_spec([keras.KerasTensor(input_shape)])
    rows = {}
    for layer, output in zip(layers, outputs, strict=True):
        module = module_of(layer)
        row = rows.setdefault(module, {"module": module, "output_shape": None, "parameters": 0})
        row["output_shape"] = tuple(output.shape)
        row["parameters"] += count_parameters(layer)
    return list(rows.values())
