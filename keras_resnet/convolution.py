"""Convolution. In bfloat16, TensorFlow computes some kernels' gradients by matrix products.

At each position of a kernel, its gradient is one product of two matrices: the pixels that meet this
position, and the gradient of the outputs. TensorFlow's own operator is up to ten times slower where
a feature map is small and has many filters; `benchmarks/kernel_gradients.py` measures both.

In float32 the products gain little, and on a GPU nothing is known: Keras's own code runs there.
"""

import keras

EDGE_PER_FILTER = 1 / 16
"""The largest height or width of the outputs, as a share of the number of filters.

For larger maps, copying the pixels for each position takes as long as the products save.
"""


def uses_products(inputs, kernel, strides, padding):
    """Returns whether `convolve` is faster in training than Keras's own code.

    Args:
        inputs: The feature map, [batch, height, width, channels].
        kernel: The weights, [rows, columns, channels, filters].
        strides: The steps along both axes, in pixels.
        padding: "valid" or "same".

    Example:
        >>> images, kernel = keras.ops.ones((1, 4, 4, 8)), keras.ops.ones((3, 3, 8, 64))
        >>> uses_products(images, kernel, (1, 1), "same")  # float32
        False
    """
    if keras.backend.backend() != "tensorflow":
        return False
    if keras.backend.standardize_dtype(inputs.dtype) != "bfloat16":
        return False
    import tensorflow as tf

    largest = kernel.shape[-1] * EDGE_PER_FILTER
    for size, length, stride in zip(inputs.shape[1:3], kernel.shape[:2], strides, strict=True):
        lost = length - 1 if padding == "valid" else 0
        if size is None or -(-(size - lost) // stride) > largest:
            return False
    return all(device.device_type == "CPU" for device in tf.config.get_visible_devices())


def convolve(inputs, kernel, strides, padding):
    """Convolves on TensorFlow; the gradient of the kernel is computed by matrix products.

    Args:
        inputs: The feature map, [batch, height, width, channels]; height and width are known.
        kernel: The weights, [rows, columns, channels, filters].
        strides: The steps along both axes, in pixels.
        padding: "valid", or "same" with strides of 1 and odd sizes of the kernel.

    Returns:
        The outputs, [batch, new height, new width, filters].

    Example:
        >>> images, kernel = keras.ops.ones((2, 5, 5, 3)), keras.ops.ones((3, 3, 3, 8))
        >>> tuple(convolve(images, kernel, (2, 2), "valid").shape)
        (2, 2, 2, 8)
    """
    import tensorflow as tf

    @tf.custom_gradient
    def convolution(inputs, kernel):
        options = {"strides": [1, *strides, 1], "padding": padding.upper()}
        outputs = tf.nn.conv2d(inputs, kernel, **options)

        def gradients(upstream):
            upstream = tf.ensure_shape(upstream, outputs.shape)
            of_inputs = tf.raw_ops.Conv2DBackpropInput(
                input_sizes=tf.shape(inputs), filter=kernel, out_backprop=upstream, **options
            )
            return of_inputs, kernel_gradient(inputs, upstream, kernel.shape, strides, padding)

        return outputs, gradients

    return convolution(inputs, tf.cast(kernel, inputs.dtype))


def kernel_gradient(inputs, upstream, kernel_shape, strides, padding):
    """Returns the gradient of a kernel, from that of the outputs; see `convolve`.

    Args:
        inputs: See `convolve`.
        upstream: The gradient of the outputs, of their shape.
        kernel_shape: The shape of the kernel.
        strides: See `convolve`.
        padding: See `convolve`.

    Example:
        >>> images, upstream = keras.ops.ones((2, 5, 5, 3)), keras.ops.ones((2, 2, 2, 8))
        >>> gradient = kernel_gradient(images, upstream, (3, 3, 3, 8), (2, 2), "valid")
        >>> gradient.shape, float(gradient[0, 0, 0, 0])  # 2 images of 2 x 2 outputs
        (TensorShape([3, 3, 3, 8]), 8.0)
    """
    import tensorflow as tf

    rows, columns, channels, filters = kernel_shape
    if padding == "same":
        borders = [[size // 2, size // 2] for size in (rows, columns)]
        inputs = tf.pad(inputs, [[0, 0], *borders, [0, 0]])
    upstream_matrix = tf.reshape(upstream, [-1, filters])
    products = []
    for row in range(rows):
        lines = _take(inputs, row, upstream.shape[1], strides[0], axis=1)
        for column in range(columns):
            pixels = _take(lines, column, upstream.shape[2], strides[1], axis=2)
            matrix = tf.reshape(pixels, [-1, channels])
            products.append(tf.matmul(matrix, upstream_matrix, transpose_a=True))
    return tf.reshape(tf.stack(products), kernel_shape)


def _take(images, first, count, stride, axis):
    """Returns `count` rows (axis 1) or columns (axis 2) of images, from `first` on."""
    import tensorflow as tf

    if stride == 1:
        return images[(slice(None),) * axis + (slice(first, first + count),)]
    # A slice with a step copies number by number, `gather` whole pixels.
    return tf.gather(images, range(first, first + stride * count, stride), axis=axis)
