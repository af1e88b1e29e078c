"""The loss of a classifier: crossentropy with label smoothing and class weights. Any backend."""

import keras
from keras import ops

from keras_resnet import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class Crossentropy(keras.losses.SparseCategoricalCrossentropy):
    """Keras's sparse crossentropy, with label smoothing and a weight for each class.

    The result is the sum of weight · loss over the images, divided by their number (not by the sum
    of the weights), as `fit(class_weight=…)` computes it. Balanced weights, whose mean over the
    training images is 1, therefore keep the scale of the loss.

    Args:
        class_weights: One number for each class; None weighs all images alike.
        label_smoothing: The share of the target that is spread evenly over all classes, at least 0
            and below 1.
        from_logits: Whether the predictions are logits.
        **kwargs: Further arguments of `keras.losses.SparseCategoricalCrossentropy`.

    Source:
        Label smoothing: Szegedy et al., Rethinking the Inception Architecture for Computer Vision,
        2016, section 7.

    Example:
        >>> logits = ops.array([[2.0, 0.0], [2.0, 0.0]])
        >>> plain = Crossentropy(from_logits=True)(ops.array([0, 1]), logits)
        >>> weighted = Crossentropy([1.0, 0.0], from_logits=True)(ops.array([0, 1]), logits)
        >>> round(float(plain), 4), round(float(weighted), 4)
        (1.1269, 0.0635)
    """

    def __init__(self, class_weights=None, label_smoothing=0.0, from_logits=False, **kwargs):
        super().__init__(from_logits=from_logits, **kwargs)
        self.class_weights = None if class_weights is None else [float(w) for w in class_weights]
        # Not `label_smoothing`: a later Keras may give the base class one of its own.
        self.smoothing = float(label_smoothing)
        self.takes_logits = from_logits

    def call(self, y_true, y_pred):
        """Returns the loss of each image, (batch,)."""
        losses = super().call(y_true, y_pred)
        if self.smoothing:
            logs = ops.log_softmax(y_pred) if self.takes_logits else ops.log(y_pred)
            spread = -ops.mean(logs, axis=-1)
            losses = (1 - self.smoothing) * losses + self.smoothing * ops.cast(spread, losses.dtype)
        if self.class_weights is not None:
            weights = ops.convert_to_tensor(self.class_weights, losses.dtype)
            classes = ops.cast(ops.reshape(y_true, (-1,)), "int32")
            losses = losses * ops.take(weights, classes)
        return losses

    def get_config(self):
        """Returns the arguments that make this loss again."""
        own = {
            "class_weights": self.class_weights,
            "label_smoothing": self.smoothing,
            "from_logits": self.takes_logits,
        }
        return {**super().get_config(), **own}


def make_loss(class_weights=None, label_smoothing=0.0):
    """Returns the loss of logits and class numbers: Keras's own where that is enough.

    Args:
        class_weights: See `Crossentropy`.
        label_smoothing: See `Crossentropy`.

    Example:
        >>> type(make_loss()).__name__, type(make_loss(label_smoothing=0.1)).__name__
        ('SparseCategoricalCrossentropy', 'Crossentropy')
    """
    if class_weights is None and not label_smoothing:
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    return Crossentropy(class_weights, label_smoothing, from_logits=True)
