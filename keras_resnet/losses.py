"""The loss of a classifier: crossentropy with label smoothing. Any backend."""

import keras
from keras import ops

from keras_resnet import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class Crossentropy(keras.losses.SparseCategoricalCrossentropy):
    """Keras's sparse crossentropy of logits, with label smoothing.

    Args:
        label_smoothing: The share of the target that is spread evenly over all classes, at least 0
            and below 1.
        **kwargs: Arguments of `keras.losses.SparseCategoricalCrossentropy` but `from_logits`.

    Source:
        Szegedy et al., Rethinking the Inception Architecture for Computer Vision, 2016, section 7.

    Example:
        >>> labels, logits = ops.array([0, 1]), ops.array([[2.0, 0.0], [2.0, 0.0]])
        >>> round(float(Crossentropy()(labels, logits)), 4)
        1.1269
        >>> round(float(Crossentropy(0.5)(ops.array([0, 0]), logits)), 4)
        0.6269
    """

    def __init__(self, label_smoothing=0.0, **kwargs):
        kwargs.pop("from_logits", None)  # of a saved config
        super().__init__(from_logits=True, **kwargs)
        # Not `label_smoothing`: a later Keras may give the base class one of its own.
        self.smoothing = label_smoothing

    def call(self, y_true, y_pred):
        """Returns the loss of each image, (batch,)."""
        losses = super().call(y_true, y_pred)
        if not self.smoothing:
            return losses
        spread = -ops.mean(ops.log_softmax(y_pred), axis=-1)
        return (1 - self.smoothing) * losses + self.smoothing * spread

    def get_config(self):
        """Returns the arguments that make this loss again."""
        return {**super().get_config(), "label_smoothing": self.smoothing}


def make_loss(label_smoothing=0.0):
    """Returns the loss of logits and class numbers: Keras's own where that is enough.

    Args:
        label_smoothing: See `Crossentropy`.

    Example:
        >>> type(make_loss()).__name__, type(make_loss(0.1)).__name__
        ('SparseCategoricalCrossentropy', 'Crossentropy')
    """
    if label_smoothing:
        return Crossentropy(label_smoothing)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
