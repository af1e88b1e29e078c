"""The residual layers, and the parts they are made of. Pure Keras 3: any backend.

A residual layer is two paths of layers that start at the same input and are summed:
``relu(branch(x) + shortcut(x))``. `_Residual` implements this; a block only lists its paths.

Layouts are channels last throughout, whatever `keras.config.image_data_format()` says.
"""

import keras
from keras import ops

from keras_resnet import PACKAGE
from keras_resnet.convolution import convolve, uses_products
from keras_resnet.normalization import BATCH_NORM, batch_norm
from keras_resnet.utils.errors import InputError, check_count, check_share

# PyTorch's default for Conv2d and Linear, kaiming_uniform(a=sqrt(5)): uniform, var 1 / (3 fan_in).
TORCH_UNIFORM = {
    "class_name": "VarianceScaling",
    "config": {"scale": 1 / 3, "mode": "fan_in", "distribution": "uniform"},
}


@keras.saving.register_keras_serializable(PACKAGE)
class PaddedConv2D(keras.layers.Conv2D):
    """A 2-D convolution padded like PyTorch's ``Conv2d(padding=(kernel_size - 1) // 2)``.

    Keras's ``"same"`` pads only the bottom and the right at stride 2: the output has the same
    shape as PyTorch's and other numbers. This layer pads all four sides, then convolves "valid".

    Args:
        filters: Number of output channels.
        kernel_size: Height and width of the kernel, odd.
        strides: Step in pixels, along both axes.
        **kwargs: Arguments of `keras.layers.Conv2D`, except `padding` and `data_format`.

    Input shape:
        (batch, height, width, channels).

    Output shape:
        (batch, ceil(height / strides), ceil(width / strides), filters).

    Example:
        >>> PaddedConv2D(8, 3, strides=2).compute_output_shape((None, 7, None, 3))
        (None, 4, None, 8)
    """

    def __init__(self, filters, kernel_size, strides=1, **kwargs):
        super().__init__(
            filters, kernel_size, strides, padding="valid", data_format="channels_last", **kwargs
        )
        if any(size % 2 == 0 for size in self.kernel_size):
            raise InputError(f"`kernel_size` must be odd, got {kernel_size}")
        # At stride 1 "same" is symmetric for an odd kernel, and one operation instead of two.
        if max(self.strides) == 1:
            self.padding = "same"

    def _pad(self, shape):
        """Returns `shape` with the height and the width that the "valid" convolution sees."""
        if self.padding == "same":
            return tuple(shape)
        height, width = (
            None if size is None else size + kernel - 1
            for size, kernel in zip(shape[1:3], self.kernel_size, strict=True)
        )
        return (shape[0], height, width, shape[3])

    def compute_output_shape(self, input_shape):
        """Returns the output's shape for an input of `input_shape`; `None` is an unknown size."""
        return super().compute_output_shape(self._pad(input_shape))

    def convolution_op(self, inputs, kernel):
        """Convolves, with the part of `kernel` that covers the image and not only its padding.

        Images of 28 or 32 pixels have a single pixel in the last stage, where this part is the
        middle of the kernel: the same result, with a ninth of the weights read. For the gradient
        of small maps in bfloat16 see `convolution.py`.
        """
        if self.padding == "same":
            middle = (
                slice(length // 2, length // 2 + 1) if size == 1 else slice(None)
                for size, length in zip(inputs.shape[1:3], self.kernel_size, strict=True)
            )
            kernel = kernel[tuple(middle)]
        is_plain = self.groups == 1 and max(self.dilation_rate) == 1
        if is_plain and uses_products(inputs, kernel, self.strides, self.padding):
            return convolve(inputs, kernel, self.strides, self.padding)
        return super().convolution_op(inputs, kernel)

    def call(self, inputs):
        """Convolves `inputs`."""
        if self.padding == "valid" and max(self.kernel_size) > 1:
            rows, columns = ((kernel - 1) // 2 for kernel in self.kernel_size)
            inputs = ops.pad(inputs, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
        return super().call(inputs)

    def get_config(self):
        """Returns the arguments that make this layer again."""
        config = super().get_config()
        for fixed in ("padding", "data_format"):
            del config[fixed]
        return config


def has_bias(use_bias, normalized):
    """Returns whether a convolution has a bias, by a network's `use_bias`.

    Args:
        use_bias: True, False, or "unnormalized".
        normalized: Whether a BatchNormalization follows the convolution, which subtracts any
            bias again.
    """
    return not normalized if use_bias == "unnormalized" else use_bias


class _Composite(keras.layers.Layer):
    """A layer made of layers, which saves which of them are frozen.

    Keras saves for a layer whether it is trainable, and nothing about the layers inside. Setting
    `trainable` passes it on to the layers that exist at that time; those made later start
    trainable. So a subclass makes its layers with `_inherited`, and the config lists the frozen
    layers if some, but not all, are frozen.
    """

    @property
    def _inherited(self):
        """The arguments that every layer inside takes from this one."""
        return {"dtype": self.dtype_policy, "trainable": self.trainable}

    @property
    def _parts(self):
        """All layers inside, by name; a layer comes before the layers inside it."""
        return {part.name: part for part in self._flatten_layers(include_self=False)}

    def get_config(self):
        """Returns the arguments that make this layer again, and the frozen layers inside."""
        config, parts = super().get_config(), self._parts
        if any(part.trainable != self.trainable for part in parts.values()):
            config["frozen"] = [name for name, part in parts.items() if not part.trainable]
        return config

    @classmethod
    def from_config(cls, config):
        """Returns the layer that `get_config` described."""
        config = {**config}
        frozen = config.pop("frozen", None)
        layer = cls(**config)
        if frozen is not None:
            for name, part in layer._parts.items():
                part.trainable = name not in frozen
        return layer


@keras.saving.register_keras_serializable(PACKAGE)
class SqueezeExcitation(_Composite):
    """Weights the channels of an image by the means of all channels.

    The mean of each channel goes through two fully connected layers, the first with fewer units;
    a sigmoid of the second's output multiplies the channel.

    Args:
        reduction: How many times fewer units the first layer has than there are channels; it has
            at least 8.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        (batch, height, width, channels).

    Output shape:
        That of the input.

    Source:
        Hu et al., Squeeze-and-Excitation Networks, 2018, section 3.

    Example:
        >>> tuple(SqueezeExcitation()(keras.random.normal((4, 6, 6, 32))).shape)
        (4, 6, 6, 32)
    """

    def __init__(self, reduction=16, **kwargs):
        super().__init__(**kwargs)
        check_count("reduction", reduction)
        self.reduction = reduction
        # Layers that exist from the start can be frozen before they are built; `build` knows the
        # number of units.
        self.fc1 = keras.layers.Dense(1, "relu", name="fc1", **self._inherited)
        self.fc2 = keras.layers.Dense(1, "sigmoid", name="fc2", **self._inherited)

    def build(self, input_shape):
        """Builds both layers for the channels of `input_shape`."""
        channels = input_shape[-1]
        self.fc1.units = max(8, channels // self.reduction)
        self.fc2.units = channels
        self.fc1.build((None, channels))
        self.fc2.build((None, self.fc1.units))

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`: every channel stays."""
        return tuple(input_shape)

    def call(self, inputs):
        """Returns `inputs`, each channel multiplied by its weight in 0 … 1."""
        return inputs * self.fc2(self.fc1(ops.mean(inputs, axis=(1, 2))))[:, None, None, :]

    def get_config(self):
        """Returns the arguments that make this layer again."""
        return {**super().get_config(), "reduction": self.reduction}


@keras.saving.register_keras_serializable(PACKAGE)
class EdgePadding2D(keras.layers.Layer):
    """Repeats the outermost pixels once on all four sides.

    Before a 3×3 max pooling this has the same result as padding with -inf, which PyTorch's pooling
    does, also for negative pixels: a repeated pixel is never larger than the one beside it. And it
    keeps infinities out of a graph that may be quantised.

    Input shape:
        (batch, height, width, channels).

    Output shape:
        (batch, height + 2, width + 2, channels).

    Example:
        >>> tuple(EdgePadding2D()(keras.random.normal((4, 6, 5, 3))).shape)
        (4, 8, 7, 3)
    """

    def compute_output_shape(self, input_shape):
        """Returns the output's shape for an input of `input_shape`; `None` is an unknown size."""
        rows, columns = (None if size is None else size + 2 for size in input_shape[1:3])
        return (input_shape[0], rows, columns, input_shape[3])

    def call(self, inputs):
        """Returns `inputs` with a border one pixel wide."""
        x = ops.concatenate([inputs[:, :1], inputs, inputs[:, -1:]], axis=1)
        return ops.concatenate([x[:, :, :1], x, x[:, :, -1:]], axis=2)


@keras.saving.register_keras_serializable(PACKAGE)
class PaddedShortcut(keras.layers.Layer):
    """The shortcut without parameters: it skips pixels, and adds channels that are zero.

    Half of the new channels come before those of the input, half of them after, as in most
    published networks for CIFAR; the paper does not say.

    Args:
        filters: Number of output channels.
        strides: The step in pixels, along both axes.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        (batch, height, width, channels), at most `filters` channels.

    Output shape:
        (batch, ceil(height / strides), ceil(width / strides), filters).

    Raises:
        InputError: On building, if the input has more than `filters` channels.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2016, section 3.3, option A, and
        section 4.2.

    Example:
        >>> tuple(PaddedShortcut(32, strides=2)(keras.random.normal((4, 7, 6, 16))).shape)
        (4, 4, 3, 32)
    """

    def __init__(self, filters, strides=1, **kwargs):
        super().__init__(**kwargs)
        check_count("filters", filters)
        check_count("strides", strides)
        self.filters = filters
        self.strides = strides

    def build(self, input_shape):
        """Checks the channels of `input_shape`."""
        if input_shape[-1] is None or input_shape[-1] > self.filters:
            raise InputError(
                f"{self.name}: a shortcut without parameters keeps all channels, at most "
                f"`filters` {self.filters}, got {input_shape[-1]}"
            )

    def compute_output_shape(self, input_shape):
        """Returns the output's shape for an input of `input_shape`; `None` is an unknown size."""
        sizes = (None if size is None else -(-size // self.strides) for size in input_shape[1:3])
        return (input_shape[0], *sizes, self.filters)

    def call(self, inputs):
        """Returns the pixels that are kept, with all channels."""
        added = self.filters - inputs.shape[-1]
        before = added // 2
        kept = inputs[:, :: self.strides, :: self.strides] if self.strides > 1 else inputs
        if not added:
            return kept
        return ops.pad(kept, ((0, 0), (0, 0), (0, 0), (before, added - before)))

    def get_config(self):
        """Returns the arguments that make this layer again."""
        return {**super().get_config(), "filters": self.filters, "strides": self.strides}


class _Residual(_Composite):
    """``relu(branch(x) + shortcut(x))``, where a path is a list of layers, each fed by the last.

    A subclass makes its layers in `__init__` and lists them in `branch` and `shortcut`.
    Both paths must give the same shape: the addition would otherwise broadcast silently.
    Without `use_shortcut` the result is ``relu(branch(x))``.

    With pre-activation there is no ReLU after the sum. `entry` comes first, and its output is the
    input of the branch, and of a shortcut that `shortcut_projects`. An identity shortcut starts at
    the block's input.
    """

    mismatch_advice = ""
    pre_activation = False
    shortcut_projects = False
    use_shortcut = True

    @property
    def entry(self):
        return []

    @property
    def branch(self):
        raise NotImplementedError

    @property
    def shortcut(self):
        return []

    def build(self, input_shape):
        self._check_input(input_shape)
        self._walk_shape(self.entry, input_shape, build=True)
        branch = self._walk_shape(self.branch, input_shape, build=True)
        shortcut = self._walk_shape(self.shortcut, input_shape, build=True)
        if self.use_shortcut and not self._shapes_agree(branch, shortcut):
            raise InputError(
                f"{self.name}: the branch gives shape {branch} and the shortcut {shortcut}, "
                f"which cannot be added; {self.mismatch_advice}"
            )

    def _check_input(self, input_shape):
        if input_shape[-1] is None:
            raise InputError(
                f"{self.name}: the last axis (channels or features) must be known, "
                f"got shape {tuple(input_shape)}"
            )

    def _shapes_agree(self, branch, shortcut):
        return branch == shortcut

    def _walk_shape(self, path, shape, build=False):
        shape = tuple(shape)
        for layer in path:
            if build and not layer.built:
                layer.build(shape)
            shape = tuple(layer.compute_output_shape(shape))
        return shape

    def compute_output_shape(self, input_shape):
        """Returns the output's shape for an input of `input_shape`; `None` is an unknown size."""
        return self._walk_shape(self.branch, input_shape)

    def call(self, inputs, training=None):
        """Returns the sum of both paths, through a ReLU unless the block is pre-activated.

        `training` reaches the layers of both paths through Keras's call context.
        """
        entered = _walk(self.entry, inputs)
        total = _walk(self.branch, entered)
        if self.use_shortcut:
            total = total + _walk(self.shortcut, entered if self.shortcut_projects else inputs)
        return total if self.pre_activation else ops.relu(total)


def _walk(path, x):
    for layer in path:
        x = layer(x)
    return x


# The order of convolution, normalisation and activation: He et al. 2016b, figure 1 (a) and (b).
_ORDER = {False: ("conv", "bn", "relu"), True: ("bn", "relu", "conv")}

# Layers that reduce the shortcut's size, instead of the stride of its 1×1 convolution.
SHORTCUT_POOLS = {
    # He et al. 2019 (Bag of Tricks), figure 2 (c): no pixel is dropped.
    "average": lambda filters, strides, **kwargs: keras.layers.AveragePooling2D(
        2, strides, padding="same", data_format="channels_last", **kwargs
    ),
    # Every second pixel as it is: the identity of a block that halves the size.
    "subsample": lambda filters, strides, **kwargs: keras.layers.MaxPooling2D(
        1, strides, data_format="channels_last", **kwargs
    ),
    # It also makes the new channels, so that no shortcut needs a 1×1 convolution.
    "pad": PaddedShortcut,
}


class _ConvResidual(_Residual):
    """The common part of the convolutional blocks: arguments, layers, paths, serialisation.

    A subclass defines the convolutions of its branch, and whether it is pre-activated.
    """

    expansion = 1  # output channels per filter

    def __init__(
        self,
        filters,
        strides=1,
        use_1x1conv=False,
        *,
        use_bias=True,
        shortcut_norm=False,
        shortcut_pool=None,
        use_shortcut=True,
        zero_init_residual=False,
        stride_on_1x1=False,
        groups=1,
        width_per_group=64,
        se_reduction=None,
        stochastic_depth=0.0,
        norm_epsilon=BATCH_NORM["epsilon"],
        kernel_initializer=TORCH_UNIFORM,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.filters = filters
        self.strides = strides
        self.use_1x1conv = use_1x1conv
        self.use_bias = use_bias
        self.shortcut_norm = shortcut_norm
        self.shortcut_pool = shortcut_pool
        self.use_shortcut = use_shortcut
        self.zero_init_residual = zero_init_residual
        self.stride_on_1x1 = stride_on_1x1
        self.groups = groups
        self.width_per_group = width_per_group
        self.se_reduction = se_reduction
        self.stochastic_depth = stochastic_depth
        self.norm_epsilon = norm_epsilon
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self._check_arguments()
        self._make_branch()
        self._make_shortcut()

    def _check_arguments(self):
        for name in ("filters", "strides", "groups", "width_per_group"):
            check_count(name, getattr(self, name))
        if self.use_bias not in (True, False, "unnormalized"):
            raise InputError(
                f"`use_bias` must be True, False or 'unnormalized', got {self.use_bias!r}"
            )
        if self.shortcut_pool not in (None, *SHORTCUT_POOLS):
            raise InputError(
                f"`shortcut_pool` must be None or one of {', '.join(SHORTCUT_POOLS)}, "
                f"got {self.shortcut_pool!r}"
            )
        if self.use_1x1conv and (self.shortcut_pool == "pad" or not self.use_shortcut):
            raise InputError(
                "`use_1x1conv` must be False where `shortcut_pool` is 'pad' or `use_shortcut` is "
                "False, got True"
            )
        check_share("stochastic_depth", self.stochastic_depth)
        for name in ("stochastic_depth", "zero_init_residual"):
            if not self.use_shortcut and (value := getattr(self, name)):
                # The block would give zeros, and nothing before it would be trained.
                raise InputError(
                    f"`{name}` needs a shortcut: with `use_shortcut` False, got {value}"
                )
        if self.filters * self.width_per_group < 64:
            raise InputError(
                "`filters` times `width_per_group` must be at least 64, for a channel in the "
                f"middle, got {self.filters} and {self.width_per_group}"
            )

    def _convolutions(self):
        """Returns (filters, kernel size, strides, groups) of each convolution of the branch."""
        raise NotImplementedError

    def _make_branch(self):
        convolutions = self._convolutions()
        for number, arguments in enumerate(convolutions, start=1):
            last = number == len(convolutions)
            # Pre-activated, the branch ends in a convolution; otherwise in a normalisation.
            zero = last and self.zero_init_residual
            normalized = not (last and self.pre_activation)
            start = {"zero": zero and self.pre_activation, "normalized": normalized}
            setattr(self, f"conv{number}", self._conv(f"conv{number}", *arguments, **start))
            zero = zero and not self.pre_activation
            setattr(self, f"bn{number}", self._norm(f"bn{number}", zero))
            if self.pre_activation or not last:
                relu = keras.layers.ReLU(name=f"relu{number}", **self._inherited)
                setattr(self, f"relu{number}", relu)
        self.se = self.drop_path = None
        if self.se_reduction is not None:
            self.se = SqueezeExcitation(self.se_reduction, name="se", **self._inherited)
        if self.stochastic_depth:
            # One draw per image, and the scale that keeps the expected sum.
            self.drop_path = keras.layers.Dropout(
                self.stochastic_depth, (None, 1, 1, 1), name="drop_path", **self._inherited
            )

    def _make_shortcut(self):
        self.shortcut_reduce = self.shortcut_conv = self.shortcut_bn = None
        strides, channels = self.strides, self.filters * self.expansion
        if not self.use_shortcut:
            return
        # With "pad" always: only `build` knows whether the number of channels changes.
        if self.shortcut_pool == "pad" or (self.shortcut_pool and strides > 1):
            pool = SHORTCUT_POOLS[self.shortcut_pool]
            named = {"name": "shortcut_reduce", **self._inherited}
            self.shortcut_reduce = pool(channels, strides, **named)
            strides = 1
        if self.use_1x1conv:
            self.shortcut_conv = self._conv(
                "shortcut_conv", channels, 1, strides, normalized=self.shortcut_norm
            )
            if self.shortcut_norm:
                self.shortcut_bn = self._norm("shortcut_bn")

    def _conv(self, name, filters, kernel_size, strides, groups=1, *, normalized, zero=False):
        return PaddedConv2D(
            filters,
            kernel_size,
            strides,
            groups=groups,
            use_bias=has_bias(self.use_bias, normalized),
            # An initializer object draws the same numbers each time: every layer needs a copy.
            kernel_initializer="zeros" if zero else self.kernel_initializer.clone(),
            name=name,
            **self._inherited,
        )

    def _norm(self, name, zero=False):
        return batch_norm(
            gamma_initializer="zeros" if zero else "ones",
            epsilon=self.norm_epsilon,
            name=name,
            **self._inherited,
        )

    @property
    def mismatch_advice(self):
        return (
            f"with {self.filters} filters at `strides` {self.strides}, set `use_1x1conv=True` to "
            "bring the input to the branch's shape"
        )

    @property
    def shortcut_projects(self):
        return self.use_1x1conv

    @property
    def _layers_in_order(self):
        numbers = range(1, len(self._convolutions()) + 1)
        names = [f"{part}{n}" for n in numbers for part in _ORDER[self.pre_activation]]
        return [getattr(self, name) for name in names if hasattr(self, name)]

    @property
    def entry(self):
        """The layers before both paths: the first two of a pre-activated block, else none."""
        return self._layers_in_order[:2] if self.pre_activation else []

    @property
    def branch(self):
        """The layers whose output is added to the shortcut's."""
        layers = self._layers_in_order[2:] if self.pre_activation else self._layers_in_order
        return layers + [layer for layer in (self.se, self.drop_path) if layer is not None]

    @property
    def shortcut(self):
        """The layers of the path around the branch; often none."""
        layers = (self.shortcut_reduce, self.shortcut_conv, self.shortcut_bn)
        return [layer for layer in layers if layer is not None]

    def _check_input(self, input_shape):
        if len(input_shape) != 4:
            raise InputError(
                f"{self.name}: the input must be (batch, height, width, channels), "
                f"got shape {tuple(input_shape)}"
            )
        super()._check_input(input_shape)

    def _shapes_agree(self, branch, shortcut):
        # With an unknown height or width both shapes say None; a stride still tells them apart.
        unknown = None in branch[1:3] and self.strides > 1 and not self.shortcut
        return branch == shortcut and not unknown

    def get_config(self):
        """Returns the arguments that make this layer again."""
        names = (
            *("filters", "strides", "use_1x1conv", "use_bias", "shortcut_norm", "shortcut_pool"),
            *("use_shortcut", "zero_init_residual", "stride_on_1x1", "groups", "width_per_group"),
            *("se_reduction", "stochastic_depth", "norm_epsilon"),
        )
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in names},
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(PACKAGE)
class ResidualBlock(_ConvResidual):
    """The basic residual block: two 3×3 convolutions and a shortcut around them.

    ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``. The shortcut is the input itself, or
    a 1×1 convolution of it where the number of channels or the size changes.

    The defaults are the block of Dive into Deep Learning (d2l): biases everywhere, no normalisation
    on the shortcut.

    Args:
        filters: Number of output channels.
        strides: Step of the first convolution (and of the 1×1), in pixels. 2 halves height and
            width, rounding up.
        use_1x1conv: Whether the shortcut has a 1×1 convolution. Needed where `strides` is not 1
            or the input does not have `filters` channels.
        use_bias: Whether convolutions have biases; "unnormalized": only those that no
            BatchNormalization follows.
        shortcut_norm: Whether a BatchNormalization follows the 1×1 convolution.
        shortcut_pool: The operation that reduces the shortcut where `strides` is not 1: None, the
            stride of the 1×1; "average", a 2×2 average pooling before it (ResNet-D); "subsample",
            every second pixel, with or without a 1×1; "pad", every second pixel, and zeros for
            the new channels, without a 1×1; see `PaddedShortcut`.
        use_shortcut: Whether there is a shortcut. Without one the layer is a plain stack of
            convolutions, for comparisons.
        zero_init_residual: Whether the branch starts at zero, so that the block starts as the
            identity followed by ReLU (Goyal et al. 2017, section 5.1): the last normalisation's
            gamma; pre-activated, the last convolution's kernel.
        stride_on_1x1: Whether a bottleneck's stride is that of its first 1×1 convolution, as in
            2016, and not of its 3×3. The basic block ignores it.
        groups: Number of groups of a bottleneck's 3×3 convolution (ResNeXt: Xie et al. 2017);
            1 for the basic block.
        width_per_group: Channels of a group in a bottleneck of 64 filters (128: Wide ResNet); 64
            for the basic block.
        se_reduction: None, or the `reduction` of a `SqueezeExcitation` at the branch's end.
        stochastic_depth: The probability that training drops the branch, image by image (Huang
            et al., Deep Networks with Stochastic Depth, 2016).
        norm_epsilon: The `epsilon` of every BatchNormalization.
        kernel_initializer: The initializer of convolution kernels; the default is PyTorch's.
        **kwargs: Arguments of `keras.layers.Layer` (`name`, `dtype`, `trainable`).

    Input shape:
        (batch, height, width, channels); batch, height and width may be unknown.

    Output shape:
        (batch, ceil(height / strides), ceil(width / strides), filters).

    Raises:
        InputError: If an argument is out of range; on building, if the two paths give different
            shapes, or the input does not have four axes.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2016, figure 2 and section 3.2.

    Example:
        >>> x = keras.random.normal((4, 6, 6, 3))
        >>> tuple(ResidualBlock(3)(x).shape)
        (4, 6, 6, 3)
        >>> tuple(ResidualBlock(6, strides=2, use_1x1conv=True)(x).shape)
        (4, 3, 3, 6)
    """

    def _check_arguments(self):
        super()._check_arguments()
        if (self.groups, self.width_per_group) != (1, 64):
            raise InputError(
                "the basic block takes `groups` 1 and `width_per_group` 64, got "
                f"{self.groups} and {self.width_per_group}; bottlenecks take others"
            )

    def _convolutions(self):
        return [(self.filters, 3, self.strides), (self.filters, 3, 1)]


@keras.saving.register_keras_serializable(PACKAGE)
class BottleneckBlock(_ConvResidual):
    """The bottleneck block: 1×1 to fewer channels, 3×3, 1×1 to four times as many.

    ``relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x))``.

    Arguments and errors are those of `ResidualBlock`. `filters` is the number of channels in the
    middle, at `groups` 1 and `width_per_group` 64; the block gives four times `filters`.

    Input shape:
        (batch, height, width, channels); batch, height and width may be unknown.

    Output shape:
        (batch, ceil(height / strides), ceil(width / strides), 4 * filters).

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2016, figure 5. The 3×3 convolution
        has the stride, as in every set of weights published since ("v1.5"); in the paper the first
        1×1 has it, as with `stride_on_1x1`. For groups: Xie et al., Aggregated Residual
        Transformations, 2017, figure 3 (c).

    Example:
        >>> x = keras.random.normal((4, 6, 6, 16))
        >>> tuple(BottleneckBlock(4)(x).shape)
        (4, 6, 6, 16)
        >>> tuple(BottleneckBlock(8, strides=2, use_1x1conv=True)(x).shape)
        (4, 3, 3, 32)
    """

    expansion = 4

    def _convolutions(self):
        width = self.filters * self.width_per_group // 64 * self.groups
        first, second = (self.strides, 1) if self.stride_on_1x1 else (1, self.strides)
        return [
            (width, 1, first),
            (width, 3, second, self.groups),
            (self.filters * self.expansion, 1, 1),
        ]


@keras.saving.register_keras_serializable(PACKAGE)
class PreActResidualBlock(ResidualBlock):
    """The basic block with normalisation and ReLU before each convolution, none after the sum.

    ``conv2(relu(bn2(conv1(h)))) + shortcut`` with ``h = relu(bn1(x))``: the shortcut is x itself,
    or a 1×1 convolution of h. Arguments, shapes and errors are those of `ResidualBlock`.

    Source:
        He et al., Identity Mappings in Deep Residual Networks, 2016, figure 1 (b).

    Example:
        >>> tuple(PreActResidualBlock(3)(keras.random.normal((4, 6, 6, 3))).shape)
        (4, 6, 6, 3)
    """

    pre_activation = True


@keras.saving.register_keras_serializable(PACKAGE)
class PreActBottleneckBlock(BottleneckBlock):
    """The bottleneck with normalisation and ReLU before each convolution, none after the sum.

    Arguments, shapes and errors are those of `BottleneckBlock`; the shortcut is that of
    `PreActResidualBlock`.

    Source:
        He et al., Identity Mappings in Deep Residual Networks, 2016, figure 1 (b).

    Example:
        >>> tuple(PreActBottleneckBlock(4)(keras.random.normal((4, 6, 6, 16))).shape)
        (4, 6, 6, 16)
    """

    pre_activation = True


@keras.saving.register_keras_serializable(PACKAGE)
class DenseResidualBlock(_Residual):
    """The residual block of fully connected layers: ``relu(fc2(relu(fc1(x))) + x)``.

    `fc2` starts at zero, so that a new block is the identity followed by ReLU. Without that every
    block adds to the variance of its input, and a deep stack explodes at initialisation (Zhang
    et al., Fixup Initialization, 2019, section 2).

    Args:
        units: Number of features, of the input as of the output.
        use_bias: Whether both fully connected layers have biases.
        **kwargs: Arguments of `keras.layers.Layer` (`name`, `dtype`, `trainable`).

    Input shape:
        (batch, units).

    Output shape:
        (batch, units).

    Raises:
        InputError: On building, if the input does not have `units` features.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2016, figure 2.

    Example:
        >>> tuple(DenseResidualBlock(24)(keras.random.normal((4, 24))).shape)
        (4, 24)
    """

    mismatch_advice = "the input's features and `units` must be equal"

    def __init__(self, units, use_bias=True, **kwargs):
        super().__init__(**kwargs)
        check_count("units", units)
        self.units = units
        self.use_bias = use_bias
        shared = {"use_bias": use_bias, **self._inherited}
        self.fc1 = keras.layers.Dense(units, "relu", name="fc1", **shared)
        self.fc2 = keras.layers.Dense(units, kernel_initializer="zeros", name="fc2", **shared)

    @property
    def branch(self):
        """The layers whose output is added to the input."""
        return [self.fc1, self.fc2]

    def get_config(self):
        """Returns the arguments that make this layer again."""
        return {**super().get_config(), "units": self.units, "use_bias": self.use_bias}
