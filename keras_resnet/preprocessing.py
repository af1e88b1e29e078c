"""From a raw uint8 image to the input of a network, as layers inside the graph.

Training, evaluation and every exported file hold the same layers, so that no caller has to
repeat a resize or a normalisation. Pure Keras 3: any backend.
"""

import math

import keras
from keras import ops

from keras_resnet import PACKAGE, resampling
from keras_resnet.utils.errors import InputError, check_count, look_up
from keras_resnet.utils.geometry import resized_length

# ITU-R BT.601 luma, which Pillow's convert("L") uses too.
LUMA = (0.299, 0.587, 0.114)
# Pillow's own numbers: multiples of 1 / 65536.
PILLOW_LUMA = (19595, 38470, 7471)

# name -> arguments of `ImagePreprocessing`: on the scale [0, 1], of red, green and blue.
NORMALIZATIONS = {
    "none": {"mean": 0.0, "std": 1.0},
    # PyTorch's published weights: mean and standard deviation of ImageNet.
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    # To -1 … 1: ResNet50V2 … of keras.applications ("tf" there), and some of timm's.
    "inception": {"mean": 0.5, "std": 0.5},
    # ResNet50 … of keras.applications: 0 … 255 minus the mean, and blue first.
    "caffe": {
        "mean": (123.68 / 255, 116.779 / 255, 103.939 / 255),
        "std": 1 / 255,
        "reverse_channels": True,
    },
    # Many other networks: 0 … 1, or 0 … 255 if they scale the images themselves.
    "1/255": {"mean": 0.0, "std": 1.0},
    "0-255": {"mean": 0.0, "std": 1 / 255},
}


def find_normalization(name, channels):
    """Returns the `mean`, `std` and `reverse_channels` that `with_preprocessing` takes, as a dict.

    Args:
        name: A row of `NORMALIZATIONS`.
        channels: Channels of the images; for 1 the result is the average over the colours.

    Raises:
        InputError: If there is no such row.

    Example:
        >>> find_normalization("imagenet", 3)
        {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225)}
        >>> {name: round(value, 3) for name, value in find_normalization("imagenet", 1).items()}
        {'mean': 0.449, 'std': 0.226}
    """
    row = look_up(NORMALIZATIONS, name, "normalize")
    if channels != 1:
        return row
    return {name: sum(v) / len(v) if isinstance(v, tuple) else v for name, v in row.items()}


@keras.saving.register_keras_serializable(PACKAGE)
class ImagePreprocessing(keras.layers.Layer):
    """Resizes raw images, converts between grey and colour, scales to [0, 1] and normalises.

    It works in float32 whatever the policy (bfloat16 would round the 256 grey levels once they
    are scaled) and outputs the policy's compute dtype.

    With `antialias` it repeats the preprocessing that published weights were made with, grey level
    by grey level: `timm.data.create_transform`, `transforms()` of torchvision's weights, and the
    image processors of transformers. One dict of arguments describes it:

        {"image_size": 224, "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225),
         "reverse_channels": False, "resize": "shorter_edge", "crop_pct": 0.875,
         "interpolation": "bilinear", "antialias": True, "resampler": "pillow",
         "rounding": "torchvision"}

    Keras's own `Resizing` layer is not used: up to Keras 3.15 it switches the BatchNormalization
    layers behind it to training mode.

    Args:
        image_size: Height and width of the result, in pixels.
        channels: Number of channels of the result, 1 or 3. Grey becomes colour by repetition,
            colour becomes grey by its luma (ITU-R BT.601).
        mean: The mean to subtract, on the scale [0, 1]; a number, or one for each channel.
        std: The standard deviation to divide by; a number, or one for each channel.
        reverse_channels: Whether the result's channels are in the other order: blue, green, red.
        resize: "squash": both edges become `image_size` / `crop_pct`, rounded down, whatever the
            ratio. "shorter_edge": the shorter edge does, and the ratio is kept. The centre is the
            result. (timm's crop modes "squash" and "center"; its "border" is none of them.)
        crop_pct: The share of the resized edge that the result keeps, above 0 and at most 1.
        interpolation: "bilinear" or "bicubic".
        antialias: Whether to resample as Pillow does: the filter grows with the scale, and grey
            levels are whole numbers after each of the two passes. Otherwise as `tf.image.resize`.
        resampler: With `antialias`, the library with whose arithmetic: "pillow", "pillow12" (up to
            Pillow 12, where the columns always come first), or "torch" (tensors of PyTorch).
        rounding: The library by whose rule the offset of the crop is rounded: "torchvision" (timm,
            too) or "transformers".
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        (batch, height, width, 1 or 3), uint8 or any number in 0 … 255; batch, height and width
        may be unknown.

    Output shape:
        (batch, image_size, image_size, channels).

    Raises:
        InputError: If `channels`, or the input's number of channels, is neither 1 nor 3, the
            length of `mean` or `std` is not `channels`, `crop_pct` is out of range, or an argument
            is no row of its table.

    Example:
        >>> images = ops.full((2, 28, 28, 1), 255, dtype="uint8")
        >>> result = ImagePreprocessing(96)(images)
        >>> tuple(result.shape), float(ops.max(result))
        ((2, 96, 96, 1), 1.0)
    """

    def __init__(
        self,
        image_size,
        channels=1,
        mean=0.0,
        std=1.0,
        reverse_channels=False,
        resize="squash",
        crop_pct=1.0,
        interpolation="bilinear",
        antialias=False,
        resampler="pillow",
        rounding="torchvision",
        **kwargs,
    ):
        super().__init__(**kwargs)
        check_count("image_size", image_size)
        if channels not in (1, 3):
            raise InputError(f"`channels` must be 1 or 3, got {channels!r}")
        for argument, value in (("mean", mean), ("std", std)):
            # Any other length would broadcast the image to more channels.
            if isinstance(value, (list, tuple)) and len(value) != channels:
                raise InputError(
                    f"`{argument}` must be a number, or one for each of {channels} channels, "
                    f"got {value!r}"
                )
        if not isinstance(crop_pct, (int, float)) or not 0 < crop_pct <= 1:
            raise InputError(f"`crop_pct` must be above 0 and at most 1, got {crop_pct!r}")
        self.image_size = image_size
        self.channels = channels
        self.mean = mean
        self.std = std
        self.reverse_channels = reverse_channels
        self.resize = resize
        self.crop_pct = crop_pct
        self.interpolation = interpolation
        self.antialias = antialias
        self.resampler = resampler
        self.rounding = rounding
        for argument, table in (
            ("resize", resampling.LENGTHS),
            ("interpolation", resampling.FILTERS),
            ("resampler", resampling.RESAMPLERS),
            ("rounding", resampling.OFFSETS),
        ):
            look_up(table, getattr(self, argument), argument)

    def build(self, input_shape):
        """Checks `input_shape`; there are no weights."""
        if len(input_shape) != 4 or input_shape[-1] not in (1, 3):
            raise InputError(
                f"{self.name} takes (batch, height, width, 1 or 3), got {tuple(input_shape)}"
            )

    def compute_output_shape(self, input_shape):
        """Returns the output's shape for images of `input_shape`."""
        return (input_shape[0], self.image_size, self.image_size, self.channels)

    def call(self, images):
        """Returns the input of the network."""
        exact = "float64" if self.variable_dtype == "float64" else "float32"
        x = images
        if x.shape[-1] > self.channels:
            x = self._luma(ops.cast(x, exact))
        x = ops.cast(self._resized(x, exact), exact)
        if x.shape[-1] < self.channels:
            x = ops.repeat(x, self.channels, axis=-1)
        mean, std = (ops.cast(ops.array(v), exact) for v in (self.mean, self.std))
        x = (x / 255 - mean) / std
        if self.reverse_channels:
            x = ops.flip(x, axis=-1)
        return ops.cast(x, self.compute_dtype)

    def _luma(self, x):
        if self.antialias:  # Pillow's grey levels are whole numbers
            luma = ops.cast(ops.array(PILLOW_LUMA), x.dtype)
            return ops.floor((ops.sum(x * luma, axis=-1, keepdims=True) + 2**15) / 2**16)
        return ops.sum(x * ops.cast(ops.array(LUMA), x.dtype), axis=-1, keepdims=True)

    def _resized(self, x, exact):
        size, length = self.image_size, resized_length(self.image_size, self.crop_pct)
        if (*x.shape[1:3], length) == (size, size, size):
            return x
        if (self.resize, length, self.interpolation) == ("squash", size, "bilinear") and (
            not self.antialias
        ):
            x = ops.cast(x, exact)
            return ops.image.resize(
                x, (size, size), interpolation="bilinear", data_format="channels_last"
            )
        return resampling.resample(
            x,
            size,
            self.resize,
            length,
            self.interpolation,
            self.antialias,
            self.resampler,
            self.rounding,
            exact,
        )

    def get_config(self):
        """Returns the arguments that make this layer again."""
        names = (
            *("image_size", "channels", "mean", "std", "reverse_channels", "resize", "crop_pct"),
            *("interpolation", "antialias", "resampler", "rounding"),
        )
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(PACKAGE)
class RandomResizedCrop(keras.layers.Layer):
    """Cuts a random rectangle out of each image and resizes it; in inference, the middle.

    Resizing is bilinear with antialiasing: two matrix products, whose weights are triangles as
    wide as an output pixel, or as an input pixel where the image is enlarged.

    Args:
        image_size: Height and width of the result, in pixels.
        crop_pct: In inference, the share of the shorter edge that the square in the middle has. If
            this is `image_size` pixels, the square is cut out at the offset of torchvision's
            `CenterCrop`; otherwise it is resized.
        area: (smallest, largest) share of the image's area, in training.
        proportions: (smallest, largest) width over height, relative to the image's, in training.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        (batch, height, width, channels), numbers; height and width are known.

    Output shape:
        (batch, image_size, image_size, channels), float32.

    Raises:
        InputError: If the height or the width of the images is not known.

    Source:
        Szegedy et al., Going Deeper with Convolutions, 2015, section 6: 8 % to 100 % of the area,
        proportions of 3/4 to 4/3.

    Example:
        >>> images = keras.random.uniform((2, 40, 40, 3))
        >>> crop = RandomResizedCrop(32, crop_pct=0.8)
        >>> tuple(crop(images, training=True).shape)
        (2, 32, 32, 3)
        >>> bool(ops.all(crop(images) == images[:, 4:36, 4:36]))
        True
    """

    def __init__(
        self, image_size, crop_pct=1.0, area=(0.35, 1.0), proportions=(3 / 4, 4 / 3), **kwargs
    ):
        super().__init__(**{"dtype": "float32", **kwargs})
        check_count("image_size", image_size)
        self.image_size = image_size
        self.crop_pct = crop_pct
        self.area = tuple(area)
        self.proportions = tuple(proportions)
        self.seeds = keras.random.SeedGenerator()

    def build(self, input_shape):
        """Checks `input_shape`; there are no weights."""
        if None in input_shape[1:3]:
            raise InputError(f"a crop needs images of a known size, got {tuple(input_shape)}")

    def compute_output_shape(self, input_shape):
        """Returns the output's shape for images of `input_shape`."""
        return (input_shape[0], self.image_size, self.image_size, input_shape[-1])

    def call(self, images, training=False):
        """Returns a random part of each image, or the middle."""
        height, width = images.shape[1:3]
        images = ops.cast(images, self.compute_dtype)
        if training:
            count = ops.shape(images)[0]
            area = self._uniform(count, *self.area)
            ratio = ops.exp(self._uniform(count, *map(math.log, self.proportions)))
            tall = ops.minimum(ops.sqrt(area / ratio), 1.0) * height
            wide = ops.minimum(ops.sqrt(area * ratio), 1.0) * width
            top = self._uniform(count, 0.0, 1.0) * (height - tall)
            left = self._uniform(count, 0.0, 1.0) * (width - wide)
            return self._resize(images, (top, left), (tall, wide))
        edge = self.crop_pct * min(height, width)
        if round(edge) == self.image_size:
            top, left = (round((size - self.image_size) / 2) for size in (height, width))
            return images[:, top : top + self.image_size, left : left + self.image_size]
        starts = [ops.array([(size - edge) / 2], self.compute_dtype) for size in (height, width)]
        return self._resize(images, starts, [ops.array([edge], self.compute_dtype)] * 2)

    def _uniform(self, count, low, high):
        return keras.random.uniform((count,), low, high, self.compute_dtype, self.seeds)

    def _resize(self, images, starts, lengths):
        """Returns rectangles of the images: their starts and lengths by axis, one or one each."""
        _, height, width, channels = images.shape
        rows, columns = (
            self._weights(start, length, size)
            for start, length, size in zip(starts, lengths, (height, width), strict=True)
        )
        # (·, size, height) × (count, height, width · channels), then the same for the columns.
        x = ops.matmul(rows, ops.reshape(images, (-1, height, width * channels)))
        x = ops.reshape(x, (-1, self.image_size, width, channels))
        return ops.matmul(columns[:, None], x)

    def _weights(self, start, length, size):
        """Returns weights (·, image_size, size) of a part of an axis of `size` pixels."""
        step = length / self.image_size
        places = ops.arange(self.image_size, dtype=self.compute_dtype) + 0.5
        centres = start[:, None] + step[:, None] * places
        pixels = ops.arange(size, dtype=self.compute_dtype) + 0.5
        distances = ops.abs(pixels - centres[..., None]) / ops.maximum(step, 1.0)[:, None, None]
        weights = ops.relu(1 - distances)
        return weights / ops.sum(weights, axis=-1, keepdims=True)

    def get_config(self):
        """Returns the arguments that make this layer again."""
        names = ("image_size", "crop_pct", "area", "proportions")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable(PACKAGE)
class ColourJitter(keras.layers.Layer):
    """Changes brightness, contrast and saturation of each image at random, in training.

    Each of the three mixes the image with another one, black, its mean grey level or itself in
    grey, by a factor from 1 − strength to 1 + strength.

    Args:
        strength: The largest change, above 0 and at most 1.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        (batch, height, width, 1 or 3), numbers in 0 … 255.

    Output shape:
        That of the input, float32 in 0 … 255.

    Source:
        Howard, Some Improvements on Deep Convolutional Neural Network Based Image Classification,
        2013, section 2.

    Example:
        >>> images = ops.full((1, 4, 4, 3), 100, dtype="uint8")
        >>> changed = ColourJitter(0.2)(images, training=True)
        >>> bool(ops.all(ops.abs(changed - 100) <= 20.001))
        True
    """

    def __init__(self, strength=0.3, **kwargs):
        super().__init__(**{"dtype": "float32", **kwargs})
        if not 0 < strength <= 1:
            raise InputError(f"`strength` must be above 0 and at most 1, got {strength!r}")
        self.strength = strength
        self.seeds = keras.random.SeedGenerator()

    def compute_output_shape(self, input_shape):
        """Returns `input_shape`."""
        return input_shape

    def call(self, images, training=False):
        """Returns `images`, changed at random if `training`."""
        x = ops.cast(images, self.compute_dtype)
        if not training:
            return x
        x = self._mix(x, 0.0)
        x = self._mix(x, ops.mean(_grey(x), axis=(1, 2), keepdims=True))
        return self._mix(x, _grey(x)) if x.shape[-1] == 3 else x

    def _mix(self, x, other):
        shape = (ops.shape(x)[0], 1, 1, 1)
        low, high = 1 - self.strength, 1 + self.strength
        factor = keras.random.uniform(shape, low, high, self.compute_dtype, self.seeds)
        return ops.clip(other + factor * (x - other), 0.0, 255.0)

    def get_config(self):
        """Returns the arguments that make this layer again."""
        return {**super().get_config(), "strength": self.strength}


def _grey(x):
    if x.shape[-1] == 1:
        return x
    return ops.sum(x * ops.cast(ops.array(LUMA), x.dtype), axis=-1, keepdims=True)


# These change raw images, before the preprocessing; the others change its result.
RAW_AUGMENTATIONS = ("crop", "colour")

# name -> a function that makes a layer, which changes training images at random. Its arguments are
# the network's image size, and the share of the shorter edge that the network sees in inference.
AUGMENTATIONS = {
    "crop": RandomResizedCrop,
    "colour": lambda *_: ColourJitter(),
    "flip": lambda *_: keras.layers.RandomFlip("horizontal", data_format="channels_last"),
    "shift": lambda *_: keras.layers.RandomTranslation(
        0.1, 0.1, fill_mode="constant", data_format="channels_last"
    ),
    "erase": lambda *_: keras.layers.RandomErasing(
        scale=(0.02, 0.25), fill_value=0.0, value_range=(0, 1), data_format="channels_last"
    ),
}


@keras.saving.register_keras_serializable(PACKAGE)
class Augmentation(keras.layers.Layer):
    """Changes images at random in training; otherwise returns them, "crop" the middle of them.

    Keras's random layers are called only in training: like `Resizing`, they would otherwise switch
    the layers behind them to training mode.

    Args:
        names: Rows of `AUGMENTATIONS`, applied in the order given.
        image_size: Height and width of the result of "crop", in pixels.
        crop_pct: See `RandomResizedCrop`; for "crop" only.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        (batch, height, width, channels): raw images for `RAW_AUGMENTATIONS`, for the others scaled
        to [0, 1].

    Output shape:
        That of the input; (batch, image_size, image_size, channels) with "crop".

    Raises:
        InputError: If a name is no row of `AUGMENTATIONS`.

    Example:
        >>> images = keras.random.uniform((2, 8, 8, 1))
        >>> bool(ops.all(Augmentation(["flip"])(images) == images))
        True
    """

    def __init__(self, names=(), image_size=None, crop_pct=1.0, **kwargs):
        super().__init__(**kwargs)
        if isinstance(names, str):
            raise InputError(f"`names` must be a list of names, got {names!r}")
        self.names = tuple(names)
        self.image_size, self.crop_pct = image_size, crop_pct
        rows = [look_up(AUGMENTATIONS, name, "augmentation") for name in self.names]
        self.steps = [row(image_size, crop_pct) for row in rows]

    def build(self, input_shape):
        """Builds each step; there are no weights."""
        for step in self.steps:
            step.build(input_shape)
            input_shape = step.compute_output_shape(input_shape)

    def compute_output_shape(self, input_shape):
        """Returns the output's shape for images of `input_shape`."""
        for step in self.steps:
            input_shape = step.compute_output_shape(input_shape)
        return input_shape

    def call(self, images, training=False):
        """Returns `images`, changed at random if `training`."""
        for step in self.steps:
            if training or isinstance(step, RandomResizedCrop):
                images = step(images, training=training)
        return images

    def get_config(self):
        """Returns the arguments that make this layer again."""
        names = () if self.image_size is None else ("image_size", "crop_pct")
        crop = {name: getattr(self, name) for name in names}
        return {**super().get_config(), "names": list(self.names), **crop}


def with_preprocessing(
    network,
    image_shape,
    augmentation=(),
    mean=0.0,
    std=1.0,
    reverse_channels=False,
    image_size=None,
    **preprocessing,
):
    """Puts preprocessing and augmentation before a network.

    Args:
        network: A Keras model that takes (batch, size, size, 1 or 3) and gives logits.
        image_shape: (height, width, channels) of raw images; height and width may be None.
        augmentation: Rows of `AUGMENTATIONS`, active in training only.
        mean: See `ImagePreprocessing`.
        std: See `ImagePreprocessing`.
        reverse_channels: See `ImagePreprocessing`.
        image_size: The size of a network that leaves it open; otherwise its own, or None.
        **preprocessing: More arguments of `ImagePreprocessing`: `resize`, `crop_pct`,
            `interpolation`, `antialias`, `resampler` and `rounding`.

    Returns:
        A Keras model: input "image", uint8, (batch, *image_shape), to the network's logits. Its
        layers are "preprocessing", "augmentation" and the network under its own name; before
        them "raw_augmentation", if there are `RAW_AUGMENTATIONS`.

    Raises:
        InputError: If the network's images are not square, or not of `image_size`.

    Example:
        >>> from keras_resnet.models import build_resnet18
        >>> model = with_preprocessing(build_resnet18((96, 96, 1)), (28, 28, 1))
        >>> model.input.dtype, model.input_shape, model.output_shape
        ('uint8', (None, 28, 28, 1), (None, 10))
    """
    _, height, width, channels = network.input_shape
    size = image_size or height
    if size is None or (height or size, width or size) != (size, size):
        raise InputError(
            f"the network must take square images of a known size, got {height}x{width}"
            + (f" and `image_size` {image_size}" if image_size else "")
        )
    inputs = keras.Input(tuple(image_shape), dtype="uint8", name="image")
    raw, others = (
        [name for name in augmentation if (name in RAW_AUGMENTATIONS) == is_raw]
        for is_raw in (True, False)
    )
    x = inputs
    if raw:
        crop_pct = preprocessing.get("crop_pct", 1.0)
        x = Augmentation(raw, size, crop_pct, dtype="float32", name="raw_augmentation")(x)
    if "crop" in raw:  # the images have their final size then
        preprocessing = {**preprocessing, "resize": "squash", "crop_pct": 1.0}
    x = ImagePreprocessing(
        size,
        channels,
        mean=mean,
        std=std,
        reverse_channels=reverse_channels,
        **preprocessing,
        name="preprocessing",
    )(x)
    x = Augmentation(others, name="augmentation")(x)
    return keras.Model(inputs, network(x), name=f"{network.name}_classifier")


def with_normalization(network, name):
    """Puts a normalization before a network that takes floats, so that it takes raw images.

    Args:
        network: A Keras model of (batch, height, width, 1 or 3), floats.
        name: A row of `NORMALIZATIONS`: the normalization of its training images.

    Returns:
        A Keras model of the same input shape, "image", uint8, and the same outputs.

    Raises:
        InputError: If there is no such row, or the network takes integers, or holds an
            `ImagePreprocessing` already.

    Example:
        >>> network = keras.Sequential([keras.Input((8, 8, 3)), keras.layers.Flatten()])
        >>> model = with_normalization(network, "inception")
        >>> model.input.dtype, float(ops.max(model(ops.full((1, 8, 8, 3), 255, dtype="uint8"))))
        ('uint8', 1.0)
    """
    shape = tuple(network.inputs[0].shape[1:])
    normalization = {"reverse_channels": False, **find_normalization(name, shape[-1])}
    if "int" in keras.backend.standardize_dtype(network.inputs[0].dtype) or any(
        isinstance(layer, ImagePreprocessing) for layer in network.layers
    ):
        raise InputError(
            f"{network.name} takes raw images and normalises them itself: leave --normalize "
            f"{name} out"
        )
    means, stds = (
        value if isinstance(value, tuple) else (value,) * shape[-1]
        for value in (normalization["mean"], normalization["std"])
    )
    scale = [1 / (255 * std) for std in stds]
    offset = [-mean / std for mean, std in zip(means, stds, strict=True)]
    inputs = keras.Input(shape, dtype="uint8", name="image")
    # In float32 whatever the policy: see `ImagePreprocessing`.
    x = keras.layers.Rescaling(scale, offset, dtype="float32", name="normalization")(inputs)
    if normalization["reverse_channels"]:
        x = ops.flip(x, axis=-1)
    return keras.Model(inputs, network(x), name=network.name)
