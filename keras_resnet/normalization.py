"""Batch normalization. In half precision, TensorFlow trains it by one fused operator.

Keras computes the statistics and the normalization by a dozen operators that each read or write
the whole feature map, in float32. `benchmarks/training_speed.py` measures it, together with
`convolution.py` and Adam.

In float32, Keras's own code runs everywhere. The fused operator adds the pixels of a channel one by
one, which rounds several times more; the comparisons with PyTorch in float32 detect that. In half
precision the rounding of the feature map itself is larger.
"""

import keras

# PyTorch's BatchNorm2d defaults: eps=1e-5, and momentum=0.1, which is 0.9 for Keras.
BATCH_NORM = {"epsilon": 1e-5, "momentum": 0.9}

_FUSED_DTYPES = ("bfloat16", "float16")


class BatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization`, trained by TensorFlow's fused operator where it can be.

    Arguments, variables, results and files are those of `keras.layers.BatchNormalization`. The
    fused operator takes feature maps of shape (batch, height, width, channels) in bfloat16 or
    float16 while the layer is trained on TensorFlow. In all other cases Keras's own code runs: in
    inference, in a frozen layer, on other backends, in float32 and float64, with a mask, with
    `synchronized` or `renorm`, or without `scale` or `center`.

    A file names `keras.layers.BatchNormalization`. In a loaded network, a layer inside a residual
    block is of this class again, one beside the blocks (``stem_bn``, ``final_bn``) of Keras's.

    Source:
        Ioffe and Szegedy, Batch Normalization, 2015, algorithm 1.
    """

    # Keras writes the module and the name of a class into its files. Under these names a file
    # loads where only Keras is, and weights have the keys that files of Keras's layer have.
    __module__ = "keras.layers"

    def call(self, inputs, training=None, mask=None):
        """Normalizes `inputs`; in training by the statistics of the batch."""
        if not (training and self.trainable) or mask is not None or not self._can_fuse(inputs):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=tf.cast(self.gamma, "float32"),
            offset=tf.cast(self.beta, "float32"),
            mean=[],
            variance=[],
            epsilon=self.epsilon,
            exponential_avg_factor=1.0,
            data_format="NHWC",
            is_training=True,
        )
        # The operator returns the unbiased variance, the sum over count - 1; Keras's is over count.
        count = tf.cast(tf.size(inputs) // inputs.shape[-1], "float32")
        variance *= tf.maximum(count - 1.0, 1.0) / count
        for moving, batch in ((self.moving_mean, mean), (self.moving_variance, variance)):
            kept = tf.cast(moving, "float32") * self.momentum
            moving.assign(kept + batch * (1.0 - self.momentum))
        return tf.cast(outputs, self.compute_dtype)

    def _can_fuse(self, inputs):
        return (
            keras.backend.backend() == "tensorflow"
            and len(inputs.shape) == 4
            and self.axis in (-1, 3)
            and keras.backend.standardize_dtype(inputs.dtype) in _FUSED_DTYPES
            and self.scale
            and self.center
            and not self.synchronized
            and not getattr(self, "renorm", False)  # Keras 3.14 and newer
        )


def batch_norm(**kwargs):
    """Returns a `BatchNormalization` with PyTorch's constants, over the last axis.

    Args:
        **kwargs: Arguments of `keras.layers.BatchNormalization`.

    Example:
        >>> layer = batch_norm()
        >>> outputs = layer(keras.random.normal((4, 6, 6, 3)), training=True)
        >>> tuple(outputs.shape), layer.epsilon, layer.momentum
        ((4, 6, 6, 3), 1e-05, 0.9)
    """
    return BatchNormalization(**{**BATCH_NORM, **kwargs})
