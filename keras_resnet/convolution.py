"""Convolution. On a processor, TensorFlow trains small maps in bfloat16 by matrix products.

At each place of a kernel, its gradient is one product of two matrices: the pixels that this place
meets, and the gradient of the outputs. TensorFlow's own operator is up to ten times slower where a
feature map has few pixels and many filters, and took half of a training step of ResNet-18 with
images of 28 pixels. `benchmarks/training_speed.py` measures both (contender "keras layers").

In float32 the operator loses little, and on a GPU nothing: Keras's own code runs there.
"""

import keras

PIXELS_BY_FILTERS = 1 / 16
"""The largest height or width of the outputs, by the number of filters.

On an AMD EPYC with AVX512-BF16 the products are faster for all kernels up to this size, and slower
for some above it, because the pixels are copied for each place of the kernel.
"""


def trains_by_products(inputs, output_shape):
    """Returns whether `convolve` is faster in training than Keras's own code.

    Args:
        inputs: The feature map, [batch, height, width, channels].
        output_shape: The shape of the outputs, (batch, height, width, filters).

    Example:
        >>> trains_by_products(keras.ops.zeros((1, 4, 4, 8), "float32"), (1, 4, 4, 64))
        False
    """
    if keras.backend.backend() != "tensorflow":
        return False
    if keras.backend.standardize_dtype(inputs.dtype) != "bfloat16":
        return False
    import tensorflow as tf

    _, height, width, filters = output_shape
    if None in (height, width) or max(height, width) > filters * PIXELS_BY_FILTERS:
        return False
    return not tf.config.list_physical_devices("GPU")


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

        def gradients(upstream):
            of_inputs = tf.raw_ops.Conv2DBackpropInput(
                input_sizes=tf.shape(inputs), filter=kernel, out_backprop=upstream, **options
            )
            return of_inputs, _kernel_gradient(inputs, upstream, kernel.shape, strides, padding)

        return tf.nn.conv2d(inputs, kernel, **options), gradients

    return convolution(inputs, tf.cast(kernel, inputs.dtype))


def _kernel_gradient(inputs, upstream, kernel_shape, strides, padding):
    import tensorflow as tf

    rows, columns, channels, filters = kernel_shape
    if padding == "same":
        borders = [[size // 2, size // 2] for size in (rows, columns)]
        inputs = tf.pad(inputs, [[0, 0], *borders, [0, 0]])
    upstream_matrix = tf.reshape(upstream, [-1, filters])
    products = []
    for row in range(rows):
        # `gather` copies whole pixels; a slice with a step copies number by number.
        met = tf.gather(inputs, _met(row, upstream.shape[1], strides[0]), axis=1)
        for column in range(columns):
            pixels = tf.gather(met, _met(column, upstream.shape[2], strides[1]), axis=2)
            matrix = tf.reshape(pixels, [-1, channels])
            products.append(tf.matmul(matrix, upstream_matrix, transpose_a=True))
    return tf.reshape(tf.stack(products), kernel_shape)


def _met(place, outputs, stride):
    """Returns the rows (or columns) of the inputs that one of the kernel's places meets."""
    return range(place, place + stride * outputs, stride)
