"""Residual networks by the functional API. Pure Keras 3: any backend.

Depths, variants of the block and stems are the rows of three tables, `SPECS`, `VARIANTS` and
`STEMS`; one builder reads them.
"""

import dataclasses
import re

import keras

from keras_resnet.blocks import (
    TORCH_UNIFORM,
    DenseResidualBlock,
    PaddedConv2D,
    ResidualBlock,
    batch_norm,
)
from keras_resnet.errors import InputError, check_count


@dataclasses.dataclass(frozen=True)
class Spec:
    """Depth and width of a network: He et al. 2016, table 1.

    Attributes:
        blocks: Number of residual blocks in each stage.
        filters: Number of filters of each stage; the stem has as many as the first.
        block: The class of its blocks.
    """

    blocks: tuple[int, ...]
    filters: tuple[int, ...] = (64, 128, 256, 512)
    block: type = ResidualBlock

    def __post_init__(self):
        if len(self.blocks) != len(self.filters):
            raise InputError(
                "`blocks` and `filters` need one number a stage each, "
                f"got {self.blocks} and {self.filters}"
            )


SPECS = {
    "resnet18": Spec((2, 2, 2, 2)),
    "resnet34": Spec((3, 4, 6, 3)),
}

# What a block takes, and (`kernel_initializer`) the stem too.
VARIANTS = {
    # The textbook's: biases everywhere, a bare 1x1 convolution as shortcut, PyTorch's own init.
    "d2l": {"use_bias": True, "shortcut_norm": False, "kernel_initializer": TORCH_UNIFORM},
    # What published weights have. He et al. 2015 init, as torchvision draws it.
    "torchvision": {
        "use_bias": False,
        "shortcut_norm": True,
        "kernel_initializer": {
            "class_name": "VarianceScaling",
            "config": {"scale": 2.0, "mode": "fan_out", "distribution": "untruncated_normal"},
        },
    },
}

STEMS = {
    # He et al. 2016, table 1: conv1 and the max pooling of conv2_x.
    "imagenet": {"kernel_size": 7, "strides": 2, "pool": True},
    # For images of 28 to 64 pixels: He et al. 2016, section 4.2.
    "small": {"kernel_size": 3, "strides": 1, "pool": False},
}


def look_up(table, key, argument):
    """Returns `table[key]`.

    Args:
        table: The table, a dict.
        key: The row's name.
        argument: What the caller calls the key, for the error.

    Raises:
        InputError: If there is no such row; it lists those there are.
    """
    try:
        return table[key]
    except (KeyError, TypeError):
        raise InputError(f"`{argument}` must be one of {', '.join(table)}, got {key!r}") from None


def _check_input_shape(shape):
    known = isinstance(shape, (tuple, list)) and len(shape) == 3 and shape[-1] is not None
    if not known or not all(size is None or (isinstance(size, int) and size > 0) for size in shape):
        raise InputError(
            "`input_shape` must be (height, width, channels), positive, where height and width "
            f"may be None, got {shape!r}"
        )


def _features(shape):
    """Begins a network: its input, in the precision of its weights (Keras's own is float32)."""
    return keras.Input(shape, dtype=keras.config.dtype_policy().variable_dtype, name="features")


def _logits(x, num_classes):
    """Ends a network: logits in float32 (or float64), also where it computes in half precision.

    A softmax over half-precision logits loses the differences that training still needs.
    """
    return keras.layers.Dense(
        num_classes,
        kernel_initializer=TORCH_UNIFORM,
        dtype=keras.config.dtype_policy().variable_dtype,
        name="logits",
    )(x)


def _stem(x, filters, kernel_size, strides, pool, use_bias, kernel_initializer):
    x = PaddedConv2D(
        filters,
        kernel_size,
        strides,
        use_bias=use_bias,
        kernel_initializer=kernel_initializer,
        name="stem_conv",
    )(x)
    x = batch_norm(name="stem_bn")(x)
    x = keras.layers.ReLU(name="stem_relu")(x)
    if pool:
        # PyTorch pads its pooling with -inf; zeros are the same after a ReLU, and only there.
        x = keras.layers.ZeroPadding2D(1, data_format="channels_last", name="stem_pad")(x)
        x = keras.layers.MaxPooling2D(3, 2, data_format="channels_last", name="stem_pool")(x)
    return x


def residual_stage(
    x, filters, num_blocks, first_stage=False, *, block=ResidualBlock, name="stage", **block_args
):
    """Applies a stage: `num_blocks` residual blocks with the same number of filters.

    The first block halves height and width, unless `first_stage`: the stem has already reduced
    the size then. It has a 1×1 convolution on its shortcut where its output has another shape
    than `x`.

    Args:
        x: A Keras tensor, (batch, height, width, channels).
        filters: Number of filters of each block.
        num_blocks: Number of blocks, at least 1.
        first_stage: Whether this is the stage right behind the stem.
        block: The class of the blocks.
        name: The stage's name; its blocks are called ``{name}_block1``, ``{name}_block2``, …
        **block_args: Further arguments of `block`.

    Returns:
        A Keras tensor, (batch, ceil(height / 2), ceil(width / 2), filters), or of the same height
        and width as `x` if `first_stage`.

    Raises:
        InputError: If `num_blocks` is not a positive whole number.

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
    for index in range(num_blocks):
        halve = index == 0 and not first_stage
        x = block(
            filters,
            strides=2 if halve else 1,
            use_1x1conv=halve or x.shape[-1] != filters * block.expansion,
            name=f"{name}_block{index + 1}",
            **block_args,
        )(x)
    return x


def build_resnet(
    spec,
    input_shape=(224, 224, 1),
    num_classes=10,
    *,
    variant="d2l",
    stem="imagenet",
    zero_init_residual=False,
    name=None,
):
    """Builds a residual network: stem, stages, global average pooling, logits.

    Its layers are called ``stem_…``, ``stage1_block1`` …, ``global_avg_pool`` and ``logits``. It
    computes in the dtype policy in force (`keras.config.set_dtype_policy`); logits stay in
    float32.

    Args:
        spec: The name of a row of `SPECS`, or a `Spec` of your own.
        input_shape: (height, width, channels); height and width may be None.
        num_classes: Number of logits.
        variant: The form of the blocks, a row of `VARIANTS`: "d2l" (the textbook's: biases, bare
            1×1 shortcut) or "torchvision" (no biases, BatchNorm on the shortcut).
        stem: A row of `STEMS`: "imagenet" (7×7 at stride 2, max pooling) or "small" (3×3 at
            stride 1, no pooling).
        zero_init_residual: Whether every block starts as the identity.
        name: The model's name; by default the spec's.

    Returns:
        A `keras.Model`: float images, (batch, height, width, channels), to logits, (batch,
        num_classes).

    Raises:
        InputError: If an argument names no row of its table or is out of range.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2016, table 1.

    Example:
        >>> build_resnet(Spec((1, 1), (8, 16)), (32, 32, 3), stem="small").output_shape
        (None, 10)
    """
    if not isinstance(spec, Spec):
        name = name or spec
        spec = look_up(SPECS, spec, "spec")
    _check_input_shape(input_shape)
    check_count("num_classes", num_classes)
    blocks = look_up(VARIANTS, variant, "variant")
    stem = look_up(STEMS, stem, "stem")

    inputs = _features(tuple(input_shape))
    stem_args = {key: blocks[key] for key in ("use_bias", "kernel_initializer")}
    x = _stem(inputs, spec.filters[0], **stem, **stem_args)
    for index, (num_blocks, filters) in enumerate(zip(spec.blocks, spec.filters, strict=True)):
        x = residual_stage(
            x,
            filters,
            num_blocks,
            first_stage=index == 0,
            block=spec.block,
            name=f"stage{index + 1}",
            zero_init_residual=zero_init_residual,
            **blocks,
        )
    x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", name="global_avg_pool")(x)
    return keras.Model(inputs, _logits(x, num_classes), name=name or "resnet")


def build_resnet18(input_shape=(224, 224, 1), num_classes=10, **kwargs):
    """Builds ResNet-18: 18 layers with weights, counting convolutions and the last Dense layer.

    Args:
        input_shape: (height, width, channels); height and width may be None.
        num_classes: Number of logits.
        **kwargs: What `build_resnet` takes.

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


def build_resnet34(input_shape=(224, 224, 1), num_classes=10, **kwargs):
    """Builds ResNet-34; arguments, result and source as for `build_resnet18`, 34-layer column.

    Example:
        >>> build_resnet34((224, 224, 3), 1000).output_shape
        (None, 1000)
    """
    return build_resnet("resnet34", input_shape, num_classes, **kwargs)


def build_dense_resnet(input_features=12, hidden_features=24, output_features=8, num_blocks=10):
    """Builds the residual network of fully connected layers.

    A Dense layer to `hidden_features`, `num_blocks` times `DenseResidualBlock`, a Dense layer to
    `output_features`. The textbook's version, with residual branches drawn like any other layer,
    puts out numbers of 1e24 at ten blocks. Here the second layer of each branch starts at zero:
    at initialisation the stack passes on the first layer's output, however many blocks there
    are, and training moves the branches away from zero as far as they are of use.

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


def build_named(name, input_shape=None, num_classes=None):
    """Builds what the command line names: a row of `SPECS`, or "dense_resnet".

    Args:
        name: The name.
        input_shape: (height, width, channels), (224, 224, 1) by default; for "dense_resnet"
            (features,), (12,) by default.
        num_classes: Number of outputs; the builder's own default if None.

    Returns:
        The model, and its input shape without the batch.

    Raises:
        InputError: If there is no such network, or the shape is not one of its kind.

    Example:
        >>> model, shape = build_named("dense_resnet")
        >>> model.name, shape
        ('dense_resnet', (12,))
    """
    names = dict.fromkeys([*SPECS, "dense_resnet"])
    look_up(names, name, "model")
    if name != "dense_resnet":
        shape = tuple(input_shape or (224, 224, 1))
        return build_resnet(name, shape, num_classes or 10), shape
    shape = tuple(input_shape or (12,))
    if len(shape) != 1:
        raise InputError(f"`input_shape` of dense_resnet must be one number, got {shape}")
    return build_dense_resnet(*shape, output_features=num_classes or 8), shape


def count_parameters(model):
    """Returns the number of trainable parameters; moving statistics are not among them.

    That is what PyTorch counts as parameters, too.

    Args:
        model: A built Keras model or layer.
    """
    return sum(int(keras.ops.size(weight)) for weight in model.trainable_variables)


def summarize_shapes(model, input_shape):
    """Walks an input of `input_shape` through `model` and notes each module's output.

    Layers of one stage, ``stage1_block1``, ``stage1_block2``, are one module, as are those of the
    stem: the walk has a row for each step that a textbook figure has.

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
        module = re.sub(r"^(stem|stage\d+)_.*", r"\1", layer.name)
        row = rows.setdefault(module, {"module": module, "output_shape": None, "parameters": 0})
        row["output_shape"] = tuple(output.shape)
        row["parameters"] += count_parameters(layer)
    return list(rows.values())
