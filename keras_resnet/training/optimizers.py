"""Optimizers and schedules of the recipes. On TensorFlow, Adam is one operator for each variable.

Keras updates a variable by a dozen operators, which each read and write as many numbers as the
network has weights; `benchmarks/optimizers.py` measures both.
"""

import keras


class _OneOperator:
    """Adam's update (Kingma and Ba, 2015, section 2) by TensorFlow's operator for it.

    Both compute the same formula. The operator rounds 1 - beta_2 to the variable's dtype, which
    changes a step in float32 by 2e-5 of its length. The classes keep the names that Keras's have
    in files: a checkpoint loads where only Keras is.
    """

    def update_step(self, gradient, variable, learning_rate):
        """Updates a variable and its two moments."""
        if keras.backend.backend() != "tensorflow":
            return super().update_step(gradient, variable, learning_rate)
        import tensorflow as tf

        index = self._get_variable_index(variable)
        steps = tf.cast(self.iterations + 1, variable.dtype)
        beta_1, beta_2 = (tf.constant(beta, variable.dtype) for beta in (self.beta_1, self.beta_2))
        return tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].value.handle,
            v=self._velocities[index].value.handle,
            beta1_power=beta_1**steps,
            beta2_power=beta_2**steps,
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.constant(self.epsilon, variable.dtype),
            grad=tf.cast(gradient, variable.dtype),
        )


class Adam(_OneOperator, keras.optimizers.Adam):
    """`keras.optimizers.Adam`; on TensorFlow one operator updates a variable."""

    __module__ = "keras.optimizers"


class AdamW(_OneOperator, keras.optimizers.AdamW):
    """`keras.optimizers.AdamW`; on TensorFlow one operator updates a variable."""

    __module__ = "keras.optimizers"


def _decaying_kernels(optimizer):
    # Not biases and the parameters of BatchNormalization.
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


OPTIMIZERS = {
    "adam": Adam,
    "adamw": lambda rate: _decaying_kernels(AdamW(rate, weight_decay=0.05)),
    # Keras decays the weights beside the gradient, PyTorch as a part of it, which the momentum
    # makes ten times as large: this is PyTorch's 5e-4.
    "sgd": lambda rate: _decaying_kernels(
        keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=5e-3)
    ),
}


def _cosine(rate, steps, warmup):
    rising = round(warmup * steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(1, steps - rising), warmup_target=rate, warmup_steps=rising
    )


def _warmup(rate, steps, warmup):
    rising = max(1, round(warmup * steps))
    return keras.optimizers.schedules.PolynomialDecay(0.0, rising, rate)  # power 1, then constant


SCHEDULES = {
    "constant": lambda rate, steps, warmup: rate,
    "warmup": _warmup,
    "cosine": _cosine,
}
