"""Shards of a global batch: every image once an epoch, whatever the number of replicas."""

import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_resnet.datasets import Split
from keras_resnet.datasets.base import cut_batches
from keras_resnet.distribution.replicas import (
    Shards,
    check_batches,
    choose_loss,
)
from keras_resnet.utils.errors import InputError


class Pipeline:
    """The part of a strategy that `Shards` uses, for one of several workers."""

    def __init__(self, workers, replicas, index):
        self.num_replicas_in_sync = workers * replicas
        self.context = types.SimpleNamespace(
            num_replicas_in_sync=self.num_replicas_in_sync,
            num_input_pipelines=workers,
            input_pipeline_id=index,
        )

    def distribute_datasets_from_function(self, function):
        """Returns the data set of the worker."""
        return function(self.context)


def number_split(count):
    images = np.zeros((count, 2, 2, 1), "uint8")
    return Split(images, np.arange(count))


@given(
    images=st.integers(4, 60),
    batch_size=st.integers(8, 20),
    workers=st.integers(1, 2),
    replicas=st.integers(1, 2),
    first_epoch=st.integers(0, 2),
    each=st.sampled_from([1, 2]),
)
@settings(max_examples=25, deadline=None)
def test_every_image_comes_once_an_epoch(images, batch_size, workers, replicas, first_epoch, each):
    split, least = number_split(images), each * workers * replicas
    inputs = [
        Shards(
            split,
            batch_size,
            Pipeline(workers, replicas, i),
            split_order(split),
            first_epoch,
            least,
        )
        for i in range(workers)
    ]
    streams = [shards.dataset.as_numpy_iterator() for shards in inputs]
    for epoch in (first_epoch, first_epoch + 1):
        seen = []
        for step in range(inputs[0].steps):
            shards = [next(stream)[1] for stream in streams for _ in range(replicas)]
            sizes = [len(shard) for shard in shards]
            assert max(sizes) - min(sizes) <= 1
            last = step == inputs[0].steps - 1
            assert sum(sizes) == (images - step * batch_size if last else batch_size)
            # Two images on every replica, wherever there are as many.
            assert min(sizes) >= min(each, images // (workers * replicas))
            seen += np.concatenate(shards).tolist()
        # The batches of one replica, cut in pieces.
        assert seen == split.labels[split.order(7, epoch)].tolist()


def split_order(split):
    return lambda epoch: split.order(7, epoch)


def test_a_worker_reads_the_images_of_its_replicas_alone():
    class Noting:
        shape = (40, 2, 2, 1)

        def __init__(self):
            self.read = []

        def __len__(self):
            return 40

        def __getitem__(self, chosen):
            self.read += chosen.tolist()
            return np.zeros((len(chosen), 2, 2, 1), "uint8")

    images = Noting()
    shards = Shards(Split(images, np.arange(40)), 8, Pipeline(2, 1, 1))
    stream = shards.dataset.as_numpy_iterator()
    labels = [next(stream)[1].tolist() for _ in range(shards.steps)]
    assert labels[:2] == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert {image % 8 for image in images.read} == {4, 5, 6, 7}


def test_an_image_that_cannot_be_read_is_remembered():
    class Broken:
        shape = (8, 2, 2, 1)

        def __len__(self):
            return 8

        def __getitem__(self, chosen):
            raise InputError("cat.png: truncated")

    import tensorflow as tf

    shards = Shards(Split(Broken(), np.arange(8)), 4, Pipeline(1, 2, 0))
    with pytest.raises(tf.errors.OpError):
        next(iter(shards.dataset))
    assert str(shards.failure) == "cat.png: truncated"


@pytest.mark.parametrize(
    ("images", "batch_size", "replicas", "reason"),
    [
        (100, 3, 4, "a batch of 3 images is too small for 4 replicas"),
        (3, 32, 4, "each of 4 replicas needs an image, got 3"),
        (33, 32, 2, None),
        (64, 32, 32, None),
    ],
)
def test_no_replica_may_be_left_without_an_image(images, batch_size, replicas, reason):
    if reason is None:
        check_batches(images, batch_size, replicas)
        return
    with pytest.raises(InputError, match=reason):
        check_batches(images, batch_size, replicas)


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (None, [[[0, 1], [2, 3]], [[4, 5], [6]]]),
        # The second replica would have one image.
        (4, [[[0, 1, 2, 3], [4, 5, 6]]]),
    ],
)
def test_a_last_batch_that_is_too_small_joins_the_one_before(least, expected):
    shards = Shards(number_split(7), 4, Pipeline(1, 2, 0), least=least)
    stream = shards.dataset.as_numpy_iterator()
    steps = [[next(stream)[1].tolist() for _ in range(2)] for _ in range(shards.steps)]
    assert steps == expected


@given(st.integers(1, 500), st.integers(1, 64), st.integers(2, 8))
def test_keras_own_loss_is_used_where_all_shards_are_equal(images, batch_size, replicas):
    sizes = [cut.stop - cut.start for cut in cut_batches(images, batch_size, replicas)]
    even = all(size % replicas == 0 for size in sizes)
    kind = type(choose_loss(images, batch_size, replicas)).__name__
    assert kind == ("SparseCategoricalCrossentropy" if even else "GlobalBatchCrossentropy")
