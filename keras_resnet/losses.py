"""Loss and accuracy of a classifier, with label smoothing and mixed labels. Any backend."""

import keras
from keras import ops

from keras_resnet import PACKAGE


@keras.saving.register_keras_serializable(PACKAGE)
class Crossentropy(keras.losses.SparseCategoricalCrossentropy):
    """Keras's sparse crossentropy of logits, with label smoothing and mixed labels.

    A label is a class number, or the shares of all classes; see `datasets.mixing`.

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
        >>> round(float(Crossentropy()(ops.array([[0.5, 0.5], [0.0, 1.0]]), logits)), 4)
        1.6269
    """

    def __init__(self, label_smoothing=0.0, **kwargs):
        kwargs.pop("from_logits", None)  # of a saved config
        super().__init__(from_logits=True, **kwargs)
        # Not `label_smoothing`: a later Keras may give the base class one of its own.
        self.smoothing = label_smoothing

    def call(self, y_true, y_pred):
        """Returns the loss of each image, (batch,)."""
        if _are_shares(y_true):
            losses = ops.categorical_crossentropy(y_true, y_pred, from_logits=True)
        else:
            losses = super().call(y_true, y_pred)
        if not self.smoothing:
            return losses
        spread = -ops.mean(ops.log_softmax(y_pred), axis=-1)
        return (1 - self.smoothing) * losses + self.smoothing * spread

    def get_config(self):
        """Returns the arguments that make this loss again."""
        return {**super().get_config(), "label_smoothing": self.smoothing}


@keras.saving.register_keras_serializable(PACKAGE)
class Accuracy(keras.metrics.SparseCategoricalAccuracy):
    """Keras's accuracy of logits; the label of a mixed image is the class of the largest share.

    Args:
        name: The name in the logs.
        **kwargs: Arguments of `keras.metrics.SparseCategoricalAccuracy`.

    Example:
        >>> accuracy = Accuracy()
        >>> accuracy.update_state(ops.array([[0.6, 0.4], [0.4, 0.6]]), ops.array([[2, 0], [2, 0]]))
        >>> float(accuracy.result())
        0.5
    """

    def __init__(self, name="accuracy", **kwargs):
        super().__init__(name=name, **kwargs)

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Counts a batch."""
        if _are_shares(y_true):
            y_true = ops.argmax(y_true, axis=-1)
        return super().update_state(y_true, y_pred, sample_weight)


def _are_shares(labels):
    """Returns whether labels are (batch, classes); class numbers are (batch,) or (batch, 1)."""
    return len(labels.shape) == 2 and labels.shape[-1] != 1


def make_loss(label_smoothing=0.0, mixing=None):
    """Returns the loss of logits and labels: Keras's own where that is enough.

    Args:
        label_smoothing: See `Crossentropy`.
        mixing: A row of `datasets.mixing.MIXINGS`, or None.

    Example:
        >>> type(make_loss()).__name__, type(make_loss(0.1)).__name__
        ('SparseCategoricalCrossentropy', 'Crossentropy')
    """
    if label_smoothing or mixing:
        return Crossentropy(label_smoothing)
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)
