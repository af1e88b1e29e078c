"""The batches that `model.fit` trains on and evaluates."""

import time
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np

from keras_resnet.datasets.base import cut_batches
from keras_resnet.datasets.mixing import BatchReader
from keras_resnet.utils.errors import InputError


class Batches(keras.utils.PyDataset):
    """A split as uint8 batches, on every Keras backend.

    While a batch is trained on, a thread decodes the files of the next one; images in memory need
    none.

    Args:
        split: A `datasets.Split`.
        batch_size: Images per batch; the last batch may have another size.
        least: Images that the last batch needs at least; see `datasets.base.cut_batches`.
        **reading: Arguments of `datasets.mixing.BatchReader`: `class_weights`, `mixing`, `classes`,
            `seed`.

    Attributes:
        order: The order of the images, an array of indices.
        failure: The `InputError` of an image that could not be read: TensorFlow hides which
            error ended `fit`.
    """

    def __init__(self, split, batch_size, least=1, **reading):
        super().__init__()
        self.split, self.reader = split, BatchReader(split, **reading)
        self.cuts = cut_batches(len(split), batch_size, least)
        self.order, self.epoch = np.arange(len(split)), 0
        self.failure = None
        self._ahead = {}  # index -> the `Future` of a batch
        self._read_times = {}

    def shuffle(self, seed, epoch):
        """Puts the images in the order of an epoch, counted from 0; see `Split.order`."""
        self.order, self.epoch = self.split.order(seed, epoch), epoch
        self._ahead = {}

    def read_from_to(self, epoch, step):
        """Returns when a batch was asked for and was there, by `time.perf_counter()`, or None."""
        return self._read_times.get(step)

    def __len__(self):
        return len(self.cuts)

    def __getitem__(self, index):
        start, future = time.perf_counter(), self._ahead.pop(index, None)
        if index + 1 < len(self) and not isinstance(self.split.images, np.ndarray):
            # A pool for one batch: its thread ends with it, also where training fails.
            pool = ThreadPoolExecutor(1)
            self._ahead[index + 1] = pool.submit(self._read, index + 1)
            pool.shutdown(wait=False)
        batch = future.result() if future else self._read(index)
        self._read_times[index] = start, time.perf_counter()
        return batch

    def _read(self, index):
        try:
            return self.reader.read(self.order[self.cuts[index]], self.epoch, index)
        except InputError as error:
            self.failure = error
            raise


class Shuffle(keras.callbacks.Callback):
    """Shuffles the training batches before each epoch, as a function of seed and epoch.

    The model's random numbers, for augmentation, begin anew with each epoch, also as a function of
    seed and epoch: Keras does not save their state, and a resumed run needs those of its epoch.

    `PyDataset.on_epoch_end` is unsuitable: Keras calls it once more when it builds a model.

    Args:
        batches: The training `Batches`.
        seed: The run's seed.
    """

    def __init__(self, batches, seed):
        super().__init__()
        self.batches = batches
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        """Shuffles, and sets the state of the random numbers."""
        self.batches.shuffle(self.seed, epoch)
        states = [v for v in self.model.variables if v.path.endswith("seed_generator_state")]
        for number, state in enumerate(states):
            first = np.random.SeedSequence([self.seed, epoch, number]).generate_state(1)[0]
            state.assign([int(first) >> 1, 0])  # PyTorch has 31 bits
