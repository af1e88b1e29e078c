"""Optimizers and schedules of the recipes.

On TensorFlow, one operator of Adam updates a variable. Keras runs a dozen operators, and each reads
and writes as many numbers as the variable has; `benchmarks/optimizers.py` measures both.
"""

import keras

Adam, AdamW = keras.optimizers.Adam, keras.optimizers.AdamW

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf

    class _OneOperator:
        """Adam's update (Kingma and Ba, 2015, section 2) by TensorFlow's operator for it.

        The operator computes the formula of Keras. It takes beta_2 in the variable's dtype, which
        changes a step in float32 by up to 7e-6 of its length.
        """

        def update_step(self, gradient, variable, learning_rate):
            """Updates a variable and its two moments."""
            if self.amsgrad:
                return super().update_step(gradient, variable, learning_rate)
            index, dtype = self._get_variable_index(variable), variable.dtype
            steps = tf.cast(self.iterations + 1, dtype)
            beta_1, beta_2 = (tf.constant(beta, dtype) for beta in (self.beta_1, self.beta_2))
            return tf.raw_ops.ResourceApplyAdam(
                var=variable.handle,
                m=self._momentums[index].value.handle,
                v=self._velocities[index].value.handle,
                beta1_power=beta_1**steps,
                beta2_power=beta_2**steps,
                lr=tf.cast(learning_rate, dtype),
                beta1=beta_1,
                beta2=beta_2,
                epsilon=tf.constant(self.epsilon, dtype),
                grad=tf.cast(gradient, dtype),
            )

    # A class keeps the name that Keras's has in files: a checkpoint loads where only Keras is.
    class Adam(_OneOperator, keras.optimizers.Adam):
        """`keras.optimizers.Adam`, by one operator."""

        __module__ = "keras.optimizers"

    class AdamW(_OneOperator, keras.optimizers.AdamW):
        """`keras.optimizers.AdamW`, by one operator."""

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
