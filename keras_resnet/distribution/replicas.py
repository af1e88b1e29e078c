"""Shards of the data, the loss, and collective operations for several replicas of a network.

A global batch is cut into one shard for each replica; the sizes differ by at most one image. The
gradients of the replicas are summed with each replica's share of the images as its weight, so the
sum is the gradient of one replica that sees the whole batch.
"""

import hashlib
import time

import keras
import numpy as np
import tensorflow as tf

from keras_resnet import PACKAGE
from keras_resnet.datasets.base import cut_batches
from keras_resnet.datasets.mixing import BatchReader
from keras_resnet.losses import Crossentropy, make_loss
from keras_resnet.utils.errors import InputError


class Shards:
    """A split for `model.fit` under a strategy: each replica gets its shard of every batch.

    A worker reads only the images of its own replicas. The data set is infinite: `model.fit` takes
    `steps` batches an epoch. `steps_per_execution` must divide `steps`, or `fit` would take the
    rest from the next epoch.

    Args:
        split: A `datasets.Split`.
        batch_size: The number of images a step, over all replicas; the last batch of an epoch may
            have another size.
        strategy: A `tf.distribute.Strategy`.
        order: A function of the epoch, counted from 0, that returns the order of the images, such
            as `functools.partial(split.order, seed)`; by default the order of the split.
        first_epoch: The epoch that the data set starts with.
        least: The smallest last batch of an epoch, in images; a smaller one joins the batch before
            it. By default one image a replica. See `datasets.base.cut_batches`.
        **reading: Arguments of `datasets.mixing.BatchReader`: `class_weights`, `mixing`, `classes`,
            `seed`.

    Attributes:
        dataset: The input of `model.fit`.
        steps: The number of batches an epoch.
        failure: The `InputError` of an image that could not be read, or None: TensorFlow hides it.

    Example:
        >>> from keras_resnet import Split
        >>> split = Split(np.zeros((5, 8, 8, 1), "uint8"), np.arange(5))
        >>> shards = Shards(split, 4, tf.distribute.get_strategy())
        >>> batches = iter(shards.dataset)
        >>> [next(batches)[1].numpy().tolist() for _ in range(shards.steps)]
        [[0, 1, 2, 3], [4]]
    """

    def __init__(
        self,
        split,
        batch_size,
        strategy,
        order=None,
        first_epoch=0,
        least=None,
        **reading,
    ):
        replicas = strategy.num_replicas_in_sync
        check_batches(len(split), batch_size, replicas)
        self.split = split
        self.cuts = cut_batches(len(split), batch_size, max(least or 0, replicas))
        self.steps = len(self.cuts)
        self.order = order or (lambda epoch: np.arange(len(split)))
        self.first_epoch = first_epoch
        self.reader = BatchReader(split, **reading)
        self.failure = None
        self._read_times = {}
        self.dataset = strategy.distribute_datasets_from_function(self._local)

    def read_from_to(self, epoch, step):
        """Returns when this process's shards of a step were read; see `Batches.read_from_to`."""
        return self._read_times.get((epoch, step))

    def _local(self, context):
        """Returns the data set of this process: the shards of its replicas, in turn."""
        replicas = context.num_replicas_in_sync // context.num_input_pipelines
        first = context.input_pipeline_id * replicas

        def batches():
            epoch = self.first_epoch
            while True:
                order = self.order(epoch)
                for step, cut in enumerate(self.cuts):
                    shards = np.array_split(order[cut], context.num_replicas_in_sync)
                    start = time.perf_counter()
                    for replica in range(first, first + replicas):
                        batch = self._read(shards[replica], epoch, step, replica)
                        self._read_times[epoch, step] = start, time.perf_counter()
                        yield batch
                # Read ahead: the epoch before may still be trained.
                for key in [key for key in self._read_times if key[0] < epoch]:
                    del self._read_times[key]
                epoch += 1

        signature = tuple(
            tf.TensorSpec((None, *shape), dtype) for shape, dtype in self.reader.signature
        )
        dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
        # If a data set may end, the workers must agree before every step whether it has.
        endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
        return dataset.apply(endless).prefetch(2 * replicas)

    def _read(self, chosen, *place):
        try:
            return self.reader.read(chosen, *place)
        except InputError as error:
            self.failure = error
            raise


def check_batches(images, batch_size, replicas):
    """Raises an `InputError` if a replica would have no image.

    TensorFlow computes wrong shapes for an empty batch, and BatchNormalization has no statistics.

    Args:
        images: The number of images an epoch.
        batch_size: The number of images a step, over all replicas.
        replicas: The number of replicas.

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
class GlobalBatchCrossentropy(Crossentropy):
    """The mean crossentropy of a batch that is cut into shards of different sizes.

    Keras takes the mean of the replicas' means, in which an image of a smaller shard has a larger
    weight. Here the gradient of each replica's mean is weighted by its share of the images. The
    value is still the mean of the shard, because Keras's running mean of the loss needs that.

    Args:
        **kwargs: Arguments of `losses.Crossentropy`.
    """

    def __call__(self, y_true, y_pred, sample_weight=None):
        """Returns the mean loss of this replica's shard, with the gradient weighted."""
        loss = super().__call__(y_true, y_pred, sample_weight)
        context = tf.distribute.get_replica_context()
        if context is None or context.num_replicas_in_sync == 1:
            return loss
        images = tf.cast(tf.shape(y_pred)[0], loss.dtype)
        share = images / context.all_reduce("SUM", images)
        weight = share * context.num_replicas_in_sync
        return weight * loss + tf.stop_gradient((1 - weight) * loss)


def choose_loss(images, batch_size, replicas, least=None, label_smoothing=0.0, mixing=None):
    """Returns the loss of logits for several replicas with `Shards`.

    Args:
        images: The number of images an epoch.
        batch_size: The number of images a step, over all replicas.
        replicas: The number of replicas.
        least: See `Shards`.
        label_smoothing: See `losses.Crossentropy`.
        mixing: See `losses.make_loss`.

    Returns:
        The loss of one replica, `losses.make_loss`, if all shards have the same size, which saves
        a message a step; otherwise `GlobalBatchCrossentropy`.

    Example:
        >>> type(choose_loss(60000, 128, 4)).__name__, type(choose_loss(60000, 128, 3)).__name__
        ('SparseCategoricalCrossentropy', 'GlobalBatchCrossentropy')
    """
    cuts = cut_batches(images, batch_size, max(least or 0, replicas))
    even = all((cut.stop - cut.start) % replicas == 0 for cut in cuts)
    if not even:
        return GlobalBatchCrossentropy(label_smoothing)
    return make_loss(label_smoothing, mixing)


def synchronize_batchnorm(model):
    """Makes every BatchNormalization compute its statistics over all replicas.

    Args:
        model: A Keras model; compile it afterwards.
    """
    for layer in batchnorm_layers(model):
        layer.synchronized = True


def batchnorm_layers(model):
    """Returns the BatchNormalization layers of a model, including nested ones."""
    layers = model._flatten_layers(include_self=False)
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]


class AverageMovingStatistics(keras.callbacks.Callback):
    """Averages BatchNormalization's moving statistics over the replicas once an epoch.

    Each replica updates its own from its own images. After the average, every worker evaluates and
    saves the same network. The average is taken before the epoch's evaluation, or at the epoch's
    end if there is none. Frozen and synchronised layers are equal on all replicas already.
    """

    def __init__(self):
        super().__init__()
        self._average = None
        self._due = False

    def on_train_begin(self, logs=None):
        """Prepares the graph that averages the variables."""
        strategy = self.model.distribute_strategy
        layers = batchnorm_layers(self.model)
        layers = [layer for layer in layers if layer.trainable and not layer.synchronized]
        variables = [v for layer in layers for v in (layer.moving_mean, layer.moving_variance)]

        def average():
            context = tf.distribute.get_replica_context()
            # The variable's tensor has no device; the copy is on the replica's device.
            means = context.all_reduce("MEAN", [tf.identity(v.value) for v in variables])
            for variable, mean in zip(variables, means, strict=True):
                variable.assign(mean)

        graph = tf.function(lambda: strategy.run(average))
        self._average = graph if variables and strategy.num_replicas_in_sync > 1 else None

    def on_epoch_begin(self, epoch, logs=None):
        """Schedules the average of this epoch."""
        self._due = self._average is not None

    def on_test_begin(self, logs=None):
        """Averages before `fit` evaluates the epoch."""
        if self._due:
            self._average()
        self._due = False

    def on_epoch_end(self, epoch, logs=None):
        """Averages if there was no evaluation."""
        self.on_test_begin()


def broadcast(strategy, variables):
    """Assigns the chief's values on every replica.

    Args:
        strategy: A `tf.distribute.Strategy`.
        variables: Keras variables, created under it.
    """
    # An all-reduce packs its tensors, and a pack has one dtype.
    groups = {}
    for variable in variables:
        groups.setdefault(_summable(variable.value).dtype, []).append(variable)

    def from_chief():
        context = tf.distribute.get_replica_context()
        mine = tf.equal(context.replica_id_in_sync_group, 0)
        for group in groups.values():
            values = [_summable(variable.value) for variable in group]
            # The sum of one value and zeros is that value, bit by bit.
            values = [tf.where(mine, value, tf.zeros_like(value)) for value in values]
            for variable, value in zip(group, context.all_reduce("SUM", values), strict=True):
                variable.assign(tf.cast(value, variable.dtype))

    _run(strategy, from_chief)


def _run(strategy, function):
    """Runs a function on every replica, as a graph; returns the result of the first local one."""
    results = tf.function(lambda: strategy.run(function))()
    return strategy.experimental_local_results(results)[0]


def _summable(value):
    # Collective operations do not support unsigned integers and booleans.
    value = tf.convert_to_tensor(value)
    return value if value.dtype.is_floating else tf.cast(value, "int64")


def check_same(strategy, name, text):
    """Raises an `InputError` on a worker whose text differs from the chief's.

    Args:
        strategy: A `tf.distribute.Strategy`.
        name: The name of the text in the message.
        text: The text of this worker.
    """
    number = int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)

    def from_chief():
        context = tf.distribute.get_replica_context()
        mine = tf.equal(context.replica_id_in_sync_group, 0)
        return context.all_reduce("SUM", tf.where(mine, tf.constant(number, "int64"), 0))

    if int(_run(strategy, from_chief)) != number:
        raise InputError(f"every worker needs the chief's {name}; this worker's differs: {text}")


def find_failed(strategy, failed):
    """Returns the numbers of the replicas whose workers failed, a list.

    All workers must call it; they wait for each other.

    Args:
        strategy: A `tf.distribute.Strategy`.
        failed: Whether this worker failed.
    """

    def collect():
        context = tf.distribute.get_replica_context()
        replica = tf.range(context.num_replicas_in_sync) == context.replica_id_in_sync_group
        return context.all_reduce("SUM", tf.cast(replica, "int32") * int(failed))

    return np.flatnonzero(_run(strategy, collect)).tolist()


def separate_seeds(strategy, model):
    """Makes each replica draw different random numbers, for augmentation and dropout.

    Otherwise all replicas would flip and shift the images of their shards in the same way.

    Args:
        strategy: A `tf.distribute.Strategy`.
        model: A Keras model, created under it, with the chief's seeds on every replica.
    """
    states = [v for v in model.variables if v.path.endswith("seed_generator_state")]

    def move():
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        for state in states:
            moved = tf.cast(replica, "int64") * np.array([1, 0])
            state.assign(state.value + tf.cast(moved, state.dtype))

    if states:
        _run(strategy, move)
