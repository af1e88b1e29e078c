"""What several replicas need to train one network: their shares of the data, and of the loss.

A global batch is cut into as many shards as there are replicas, which differ by an image at most.
The gradients of the replicas are summed, each weighed by its share of the images: the sum is the
gradient of one replica that sees the whole batch.
"""

import hashlib

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import PACKAGE
from keras_resnet.datasets.base import cut_batches
from keras_resnet.utils.errors import InputError


class Shards:
    """A split for `model.fit` under a strategy: each replica gets its part of every batch.

    A worker reads the images of its own replicas and no others. The data set has no end:
    `model.fit` takes `steps` of it an epoch; a `steps_per_execution` must divide them, since it
    would take the rest from the next epoch.

    Args:
        split: A `datasets.Split`.
        batch_size: Images a step of all replicas together; the last of an epoch may be of another
            size.
        strategy: A `tf.distribute.Strategy`.
        order: A function of the epoch, counted from 0, that returns the order of the images, such
            as `functools.partial(split.order, seed)`; the split's own by default.
        first_epoch: The epoch that the data set begins with.
        least: Images that the last batch of an epoch needs, at least one a replica, which is the
            default; with fewer it joins the batch before it. See `datasets.base.cut_batches`.

    Attributes:
        dataset: What `model.fit` takes.
        steps: Batches an epoch.
        failure: The `InputError` that reading an image ended in, if any: TensorFlow hides it.

    Example:
        >>> from keras_resnet import Split
        >>> split = Split(np.zeros((5, 8, 8, 1), "uint8"), np.arange(5))
        >>> shards = Shards(split, 4, tf.distribute.get_strategy())
        >>> batches = iter(shards.dataset)
        >>> [next(batches)[1].numpy().tolist() for _ in range(shards.steps)]
        [[0, 1, 2, 3], [4]]
    """

    def __init__(self, split, batch_size, strategy, order=None, first_epoch=0, least=None):
        replicas = strategy.num_replicas_in_sync
        check_batches(len(split), batch_size, replicas)
        self.split = split
        self.cuts = cut_batches(len(split), batch_size, max(least or 0, replicas))
        self.steps = len(self.cuts)
        self.order = order or (lambda epoch: np.arange(len(split)))
        self.first_epoch = first_epoch
        self.failure = None
        self.dataset = strategy.distribute_datasets_from_function(self._local)

    def _local(self, context):
        """Returns the data set of this process: the shards of its replicas, one after another."""
        replicas = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * replicas

        def batches():
            epoch = self.first_epoch
            while True:
                order = self.order(epoch)
                for cut in self.cuts:
                    shards = np.array_split(order[cut], context.num_replicas_in_sync)
                    yield from map(self._read, shards[first : first + replicas])
                epoch += 1

        images = tf.TensorSpec((None, *self.split.images.shape[1:]), "uint8")
        dataset = tf.data.Dataset.from_generator(
            batches, output_signature=(images, tf.TensorSpec((None,), "int64"))
        )
        # Where a data set may end, the workers ask each other before every step.
        endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        return dataset.apply(endless).prefetch(2 * replicas)

    def _read(self, chosen):
        try:
            return self.split.images[chosen], self.split.labels[chosen].astype("int64")
        except InputError as error:
            self.failure = error
            raise


def check_batches(images, batch_size, replicas):
    """Raises an `InputError` if a replica would be left without an image.

    TensorFlow computes wrong shapes for a batch of none, and BatchNormalization no statistics.

    Args:
        images: Images an epoch.
        batch_size: Images a step of all replicas together.
        replicas: How many replicas there are.

    Example:
        >>> check_batches(60001, 128, 98)
        >>> check_batches(60001, 64, 98)
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: a batch of 64 images is too small for 98 replicas: ...
    """
    if images < replicas:
        raise InputError(f"each of {replicas} replicas needs an image, got {images} images")
    if batch_size < replicas:
        raise InputError(
            f"a batch of {batch_size} images is too small for {replicas} replicas: choose a "
            "larger --batch-size, or --scale-batch"
        )


@keras.saving.register_keras_serializable(PACKAGE)
class GlobalBatchCrossentropy(keras.losses.SparseCategoricalCrossentropy):
    """The mean crossentropy of a batch that is cut into shards of different sizes.

    Keras takes the mean of the replicas' means, which counts an image of a smaller shard for more.
    Here the gradient of each replica's mean is weighed by its share of the images. The value stays
    the mean of the shard, which is what Keras's running mean of the loss is made of.

    Args:
        from_logits: Whether the network gives logits.
        **kwargs: What `keras.losses.SparseCategoricalCrossentropy` takes.
    """

    def __call__(self, y_true, y_pred, sample_weight=None):
        """Returns the loss of this replica's shard, divided by the number of replicas."""
        loss = super().__call__(y_true, y_pred, sample_weight)
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return loss
        images = tf.cast(tf.shape(y_pred)[0], loss.dtype)
        share = images / context.all_reduce("SUM", images)
        weight = share * context.num_replicas_in_sync
        return weight * loss + tf.stop_gradient((1 - weight) * loss)


def choose_loss(images, batch_size, replicas, least=None):
    """Returns the loss for logits under several replicas that `Shards` feeds.

    Args:
        images: Images an epoch.
        batch_size: Images a step of all replicas together.
        replicas: How many replicas there are.
        least: See `Shards`.

    Returns:
        Keras's own where all shards have the same size, which saves a message a step; else
        `GlobalBatchCrossentropy`.

    Example:
        >>> type(choose_loss(60000, 128, 4)).__name__, type(choose_loss(60000, 128, 3)).__name__
        ('SparseCategoricalCrossentropy', 'GlobalBatchCrossentropy')
    """
    cuts = cut_batches(images, batch_size, max(least or 0, replicas))
    even = all((cut.stop - cut.start) % replicas == 0 for cut in cuts)
    kind = keras.losses.SparseCategoricalCrossentropy if even else GlobalBatchCrossentropy
    return kind(from_logits=True)


def synchronize_batchnorm(model):
    """Makes every BatchNormalization take its statistics over the batches of all replicas.

    Args:
        model: A Keras model; compile it afterwards.
    """
    for layer in batchnorm_layers(model):
        layer.synchronized = True


def batchnorm_layers(model):
    """Returns the BatchNormalization layers of a model, also those inside other layers."""
    layers = model._flatten_layers(include_self=False)
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


class AverageMovingStatistics(keras.callbacks.Callback):
    """Averages BatchNormalization's moving statistics over the replicas at each epoch's end.

    Each replica moves its own by the images that it sees. Averaged, every worker measures and
    saves the same network. It acts once an epoch, before that is measured, or at its end if it is
    not. Layers that are frozen or synchronised are equal everywhere, and stay as they are.
    """

    def __init__(self):
        super().__init__()
        self._average = None
        self._due = False

    def on_train_begin(self, logs=None):
        """Finds the variables."""
        strategy = self.model.distribute_strategy
        layers = batchnorm_layers(self.model)
        layers = [layer for layer in layers if layer.trainable and not layer.synchronized]
        variables = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]

        def average():
            context = tf.distribute.get_replica_context()
            # A variable's own tensor names no device; its copy is on the replica's.
            means = context.all_reduce("MEAN", [tf.identity(v.value) for v in variables])
            for variable, mean in zip(variables, means, strict=True):
                variable.assign(mean)

        graph = tf.function(lambda: strategy.run(average))
        self._average = graph if variables and strategy.num_replicas_in_sync > 1 else None

    def on_epoch_begin(self, epoch, logs=None):
        """Notes that there will be something to average."""
        self._due = self._average is not None

    def on_test_begin(self, logs=None):
        """Averages, where `fit` measures an epoch."""
        if self._due:
            self._average()
        self._due = False

    def on_epoch_end(self, epoch, logs=None):
        """Averages, where it does not."""
        self.on_test_begin()


def broadcast(strategy, variables):
    """Gives every replica the chief's values.

    Args:
        strategy: A `tf.distribute.Strategy`.
        variables: Keras variables, made under it.
    """
    # Messages are packed, and a pack holds one dtype.
    groups = {}
    for variable in variables:
        groups.setdefault(_summable(variable.value).dtype, []).append(variable)

    def from_chief():
        context = tf.distribute.get_replica_context()
        mine = tf.equal(context.replica_id_in_sync_group, 0)
        for group in groups.values():
            values = [_summable(variable.value) for variable in group]
            # A sum of one value and zeros is that value, bit by bit.
            values = [tf.where(mine, value, tf.zeros_like(value)) for value in values]
            for variable, value in zip(group, context.all_reduce("SUM", values), strict=True):
                variable.assign(tf.cast(value, variable.dtype))

    _run(strategy, from_chief)


def _run(strategy, function):
    """Runs a function on every replica, as a graph; returns what this process's first returns."""
    results = tf.function(lambda: strategy.run(function))()
    return strategy.experimental_local_results(results)[0]


def _summable(value):
    # Collective operations know no unsigned integers and no booleans.
    value = tf.convert_to_tensor(value)
    return value if value.dtype.is_floating else tf.cast(value, "int64")


def check_same(strategy, what, text):
    """Raises an `InputError` where a worker has something else than the chief.

    Args:
        strategy: A `tf.distribute.Strategy`.
        what: What it is, for the message.
        text: What each worker has.
    """
    number = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)

    def from_chief():
        context = tf.distribute.get_replica_context()
        mine = tf.equal(context.replica_id_in_sync_group, 0)
        return context.all_reduce("SUM", tf.where(mine, tf.constant(number, "int64"), 0))

    if int(_run(strategy, from_chief)) != number:
        raise InputError(f"every worker needs the chief's {what}; this one has another: {text}")


def find_failed(strategy, failed):
    """Returns the replicas on whose workers something failed: a list of their numbers.

    All workers call it, and wait for each other.

    Args:
        strategy: A `tf.distribute.Strategy`.
        failed: Whether something failed on this worker.
    """

    def collect():
        context = tf.distribute.get_replica_context()
        replica = tf.range(context.num_replicas_in_sync) == context.replica_id_in_sync_group
        return context.all_reduce("SUM", tf.cast(replica, "int32") * int(failed))

    return np.flatnonzero(_run(strategy, collect)).tolist()


def separate_seeds(strategy, model):
    """Makes each replica draw other random numbers, for augmentation and dropout.

    As Keras has it, all replicas would flip and shift the images of their shards alike.

    Args:
        strategy: A `tf.distribute.Strategy`.
        model: A Keras model, made under it; its seeds are those of the chief on every replica.
    """
    states = [v for v in model.variables if v.path.endswith("seed_generator_state")]

    def move():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        for state in states:
            moved = tf.cast(replica, "int64") * np.array([1, 0])
            state.assign(state.value + tf.cast(moved, state.dtype))

    if states:
        _run(strategy, move)
