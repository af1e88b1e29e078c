"""The residual layers, and the parts they are made of. Pure Keras 3: any backend.

A residual layer is two paths of layers that start at the same input and are summed:
``relu(branch(x) + shortcut(x))``. `_Residual` says that once; a block only lists its paths.

Layouts are channels last throughout, whatever `keras.config.image_data_format()` says.
"""

import keras
from keras import ops

from keras_resnet.errors import InputError, check_count

PACKAGE = "keras_resnet"

# PyTorch's BatchNorm2d defaults: eps=1e-5, and momentum=0.1, which Keras counts the other way.
BATCH_NORM = {"epsilon": 1e-5, "momentum": 0.9}

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
        **kwargs: What `keras.layers.Conv2D` takes, but for `padding` and `data_format`.

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
        """Convolves, with the part of `kernel` that meets the image rather than its padding.

        Over a single pixel, which the last stage sees of images of 28 or 32 pixels, that is the
        middle of the kernel alone: the same numbers for a ninth of the weights read.
        """
        if self.padding == "same":
            middle = (
                slice(length // 2, length // 2 + 1) if size == 1 else slice(None)
                for size, length in zip(inputs.shape[1:3], self.kernel_size, strict=True)
            )
            kernel = kernel[tuple(middle)]
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


def batch_norm(**kwargs):
    """Returns a BatchNormalization with PyTorch's constants, over the last axis.

    Args:
        **kwargs: What `keras.layers.BatchNormalization` takes.
    """
    return keras.layers.BatchNormalization(**{**BATCH_NORM, **kwargs})


class _Residual(keras.layers.Layer):
    """``relu(branch(x) + shortcut(x))``, where a path is a list of layers, each fed by the last.

    A subclass makes its layers in `__init__` and lists them in `branch` and `shortcut`.
    Both paths must give the same shape: adding would otherwise broadcast in silence.
    """

    mismatch_advice = ""

    @property
    def branch(self):
        raise NotImplementedError

    @property
    def shortcut(self):
        return []

    def build(self, input_shape):
        self._check_input(input_shape)
        branch = self._walk_shape(self.branch, input_shape, build=True)
        shortcut = self._walk_shape(self.shortcut, input_shape, build=True)
        if not self._shapes_agree(branch, shortcut):
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
        """Returns ``relu(branch(inputs) + shortcut(inputs))``.

        `training` reaches the layers of both paths through Keras's call context.
        """
        branch = shortcut = inputs
        for layer in self.branch:
            branch = layer(branch)
        for layer in self.shortcut:
            shortcut = layer(shortcut)
        return ops.relu(branch + shortcut)


class _ConvResidual(_Residual):
    """What the convolutional blocks share: arguments, parts, the shortcut, serialisation."""

    expansion = 1  # output channels per filter

    def __init__(
        self,
        filters,
        strides=1,
        use_1x1conv=False,
        *,
        use_bias=True,
        shortcut_norm=False,
        zero_init_residual=False,
        kernel_initializer=TORCH_UNIFORM,
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_count("filters", filters)
        check_count("strides", strides)
        self.filters = filters
        self.strides = strides
        self.use_1x1conv = use_1x1conv
        self.use_bias = use_bias
        self.shortcut_norm = shortcut_norm
        self.zero_init_residual = zero_init_residual
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.shortcut_conv = self.shortcut_bn = None
        if use_1x1conv:
            self.shortcut_conv = self._conv(filters * self.expansion, 1, strides, "shortcut_conv")
            if shortcut_norm:
                self.shortcut_bn = self._norm("shortcut_bn")

    def _conv(self, filters, kernel_size, strides, name):
        return PaddedConv2D(
            filters,
            kernel_size,
            strides,
            use_bias=self.use_bias,
            # One initializer object draws the same numbers each time: every layer needs a copy.
            kernel_initializer=self.kernel_initializer.clone(),
            dtype=self.dtype_policy,
            name=name,
        )

    def _norm(self, name, last=False):
        gamma = "zeros" if last and self.zero_init_residual else "ones"
        return batch_norm(gamma_initializer=gamma, dtype=self.dtype_policy, name=name)

    def _relu(self, name):
        return keras.layers.ReLU(dtype=self.dtype_policy, name=name)

    @property
    def mismatch_advice(self):
        return (
            f"with {self.filters} filters at `strides` {self.strides}, set `use_1x1conv=True` to "
            "bring the input to the branch's shape"
        )

    @property
    def shortcut(self):
        return [layer for layer in (self.shortcut_conv, self.shortcut_bn) if layer is not None]

    def _check_input(self, input_shape):
        if len(input_shape) != 4:
            raise InputError(
                f"{self.name}: the input must be (batch, height, width, channels), "
                f"got shape {tuple(input_shape)}"
            )
        super()._check_input(input_shape)

    def _shapes_agree(self, branch, shortcut):
        # With an unknown height or width both shapes say None; a stride still tells them apart.
        unknown = None in branch[1:3] and self.strides > 1 and not self.use_1x1conv
        return branch == shortcut and not unknown

    def get_config(self):
        """Returns the arguments that make this layer again."""
        names = ("filters", "strides", "use_1x1conv", "use_bias", "shortcut_norm")
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in names},
            "zero_init_residual": self.zero_init_residual,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
        }


@keras.saving.register_keras_serializable(PACKAGE)
class ResidualBlock(_ConvResidual):
    """The basic residual block: two 3×3 convolutions and a shortcut around them.

    ``relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))``. The shortcut is the input itself, or
    a 1×1 convolution of it where the number of channels or the size changes.

    The defaults are the textbook's block: biases everywhere, no normalisation on the shortcut.

    Args:
        filters: Number of output channels.
        strides: Step of the first convolution (and of the 1×1), in pixels. 2 halves height and
            width, rounding up.
        use_1x1conv: Whether the shortcut has a 1×1 convolution. Needed where `strides` is not 1
            or the input does not have `filters` channels.
        use_bias: Whether convolutions have biases.
        shortcut_norm: Whether a BatchNormalization follows the 1×1 convolution.
        zero_init_residual: Whether the last BatchNormalization's gamma starts at zero, so that
            the block starts as the identity followed by ReLU (Goyal et al. 2017, section 5.1).
        kernel_initializer: How convolution kernels start; the default is PyTorch's.
        **kwargs: What `keras.layers.Layer` takes (`name`, `dtype`, `trainable`).

    Input shape:
        (batch, height, width, channels); batch, height and width may be unknown.

    Output shape:
        (batch, ceil(height / strides), ceil(width / strides), filters).

    Raises:
        InputError: On building, if the two paths give different shapes, or the input does not
            have four axes.

    Source:
        He et al., Deep Residual Learning for Image Recognition, 2016, figure 2 and section 3.2.

    Example:
        >>> x = keras.random.normal((4, 6, 6, 3))
        >>> tuple(ResidualBlock(3)(x).shape)
        (4, 6, 6, 3)
        >>> tuple(ResidualBlock(6, strides=2, use_1x1conv=True)(x).shape)
        (4, 3, 3, 6)
    """

    def __init__(self, filters, strides=1, use_1x1conv=False, **kwargs):
        super().__init__(filters, strides, use_1x1conv, **kwargs)
        self.conv1 = self._conv(filters, 3, strides, "conv1")
        self.bn1 = self._norm("bn1")
        self.relu1 = self._relu("relu1")
        self.conv2 = self._conv(filters, 3, 1, "conv2")
        self.bn2 = self._norm("bn2", last=True)

    @property
    def branch(self):
        """The layers whose output is added to the shortcut's."""
        return [self.conv1, self.bn1, self.relu1, self.conv2, self.bn2]


@keras.saving.register_keras_serializable(PACKAGE)
class DenseResidualBlock(_Residual):
    """The residual block of fully connected layers: ``relu(fc2(relu(fc1(x))) + x)``.

    `fc2` starts at zero, so that a new block is the identity followed by ReLU. Without that every
    block adds to the variance of its input, and a deep stack explodes at initialisation (Zhang
    et al., Fixup Initialization, 2019, section 2).

    Args:
        units: Number of features, of the input as of the output.
        use_bias: Whether both fully connected layers have biases.
        **kwargs: What `keras.layers.Layer` takes (`name`, `dtype`, `trainable`).

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
        shared = {"use_bias": use_bias, "dtype": self.dtype_policy}
        self.fc1 = keras.layers.Dense(units, "relu", name="fc1", **shared)
        self.fc2 = keras.layers.Dense(units, kernel_initializer="zeros", name="fc2", **shared)

    @property
    def branch(self):
        """The layers whose output is added to the input."""
        return [self.fc1, self.fc2]

    def get_config(self):
        """Returns the arguments that make this layer again."""
        return {**super().get_config(), "units": self.units, "use_bias": self.use_bias}
