"""Callbacks of `model.fit`: progress, the record of each epoch, and early stops."""

import contextlib
import math
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import keras

from keras_resnet.archive import write_model
from keras_resnet.evaluation.report import find_best, write_history
from keras_resnet.utils.errors import Interrupted, TrainingError
from keras_resnet.utils.files import replacing
from keras_resnet.utils.progress import bar
from keras_resnet.utils.tables import format_duration


class StopOnDivergence(keras.callbacks.Callback):
    """Ends the run with a `TrainingError` at the first step whose loss is not a finite number.

    Keras reports the mean loss of the epoch so far, which turns infinite or NaN with the first
    such step. This callback stands before `CheckpointCallback`, which would save the weights.
    """

    advice = (
        "Try a smaller --learning-rate (a tenth), or --precision float32; the checkpoints of the "
        "epochs before are kept"
    )

    def __init__(self):
        super().__init__()
        self.epoch = 0
        self.last_finite = None

    def on_epoch_begin(self, epoch, logs=None):
        """Keeps the epoch, for the message."""
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Checks the loss."""
        loss = float(logs["loss"])
        if math.isfinite(loss):
            self.last_finite = loss
            return
        before = "there was no finite loss before"
        if self.last_finite is not None:
            before = f"the last finite mean loss was {self.last_finite:.4g}"
        raise TrainingError(
            f"the loss became {loss} in epoch {self.epoch + 1}, step {batch + 1} of "
            f"{self.params['steps']}; {before}. {self.advice}"
        )

    def on_epoch_end(self, epoch, logs=None):
        """Checks the evaluation loss: the last step's loss is from before its update."""
        loss = float(logs.get("val_loss", 0))
        if not math.isfinite(loss):
            raise TrainingError(
                f"after epoch {epoch + 1}, step {self.params['steps']}, the evaluation loss is "
                f"{loss}; the last finite mean loss in training was {self.last_finite:.4g}. "
                f"{self.advice}"
            )


@contextlib.contextmanager
def catching_stop_signals():
    """Turns the first Ctrl-C or SIGTERM into a request, so that a run stops between two steps.

    A second signal has its usual effect. Outside the main thread, where Python allows no
    handlers, signals keep their meaning.

    Yields:
        A list, to which the signal's number is added.
    """
    received = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # A shell starts background jobs with Ctrl-C ignored: it is not meant for them.
    before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}

    def request(number, frame):
        received.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in before:
        signal.signal(number, request)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnRequest(keras.callbacks.Callback):
    """Raises `Interrupted` at the end of the step in which a stop signal came.

    Args:
        received: The list of `catching_stop_signals`.
        delay: Seconds to go on after the signal. A worker that is not the chief gives the chief
            time to save, since the chief's last step needs all workers.
    """

    def __init__(self, received, delay=0.0):
        super().__init__()
        self.received = received
        self.delay = delay
        self.since = None
        self.epoch = 0

    def _stop_if_due(self, where):
        if self.received and self.since is None:
            self.since = time.monotonic()
        if self.since is not None and time.monotonic() - self.since >= self.delay:
            raise Interrupted(where)

    def on_epoch_begin(self, epoch, logs=None):
        """Keeps the epoch, for the message."""
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Stops if requested."""
        self._stop_if_due(f"in epoch {self.epoch + 1}, after step {batch + 1}")

    def on_test_batch_end(self, batch, logs=None):
        """Stops if requested."""
        self._stop_if_due(f"during the evaluation of epoch {self.epoch + 1}")


class EpochTimer(keras.callbacks.Callback):
    """Adds an epoch's duration, speed, wait for data and learning rate to the epoch's logs.

    It stands before the callbacks that use these values. A step waits while its batch is read, as
    far as that is after the end of the step before: batches are read ahead, so it is often 0.

    Args:
        images: Number of training images.
        batches: The training batches, with `read_from_to(epoch, step)`: when a batch was read, two
            times of `time.perf_counter()`, or None.
    """

    def __init__(self, images, batches):
        super().__init__()
        self.images = images
        self.batches = batches
        self.epoch, self.waited = 0, 0.0
        self.started = self.trained = self.last = None

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self.epoch, self.waited = epoch, 0.0
        self.started = self.last = time.perf_counter()
        self.trained = None

    def on_train_batch_end(self, batch, logs=None):
        """Adds the step's wait."""
        now = time.perf_counter()
        start, stop = self.batches.read_from_to(self.epoch, batch) or (now, now)
        self.waited += max(0.0, min(stop, now) - max(start, self.last))
        self.last = now

    def on_test_begin(self, logs=None):
        """Stops the clock of the training speed, which leaves the evaluation out."""
        if self.trained is None:
            self.trained = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Adds seconds, images_per_second, waiting and learning_rate to `logs`."""
        now = time.perf_counter()
        training = (self.trained or now) - self.started
        logs["seconds"] = now - self.started
        logs["images_per_second"] = self.images / training
        logs["waiting"] = self.waited / training
        logs["learning_rate"] = float(
            keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        )


class StopEarly(keras.callbacks.Callback):
    """Ends the training after an epoch, if a condition holds.

    Args:
        is_due: A function without arguments.
    """

    def __init__(self, is_due):
        super().__init__()
        self.is_due = is_due

    def on_epoch_end(self, epoch, logs=None):
        """Looks whether the condition holds."""
        if self.is_due():
            self.model.stop_training = True


class History(keras.callbacks.Callback):
    """Adds a row to the history for each epoch.

    Args:
        history: The rows of the epochs before, a list; rows are appended to it.
    """

    def __init__(self, history):
        super().__init__()
        self.history = history

    def on_epoch_end(self, epoch, logs=None):
        """Adds the epoch's row."""
        self.history.append(self._row(epoch, logs))

    def _row(self, epoch, logs):
        return {"epoch": epoch + 1, **{name: float(value) for name, value in logs.items()}}


class CheckpointCallback(History):
    """Writes the checkpoint, `history.csv` and the TensorBoard events at the end of each epoch.

    The checkpoint is one file with weights, optimizer and history: a process that is killed
    between two files would leave files that contradict each other.

    Args:
        history: See `History`.
        run_dir: The run folder.
        metadata: The metadata of each model file of the run.
    """

    def __init__(self, history, run_dir, metadata):
        super().__init__(history)
        self.run_dir = Path(run_dir)
        self.metadata = metadata
        self.events = {
            side: EventWriter(self.run_dir / "tensorboard" / side)
            for side in ("train", "validation")
        }

    def on_epoch_end(self, epoch, logs=None):
        """Saves the epoch."""
        row = self._row(epoch, logs)
        is_best = find_best([*self.history, row]) == len(self.history)
        checkpoints = self.run_dir / "checkpoints"
        with replacing(checkpoints / "last.keras") as new:
            metadata = {**self.metadata, "history": [*self.history, row]}
            write_model(self.model, new, metadata)
            # Before the rename of last.keras: if the process is killed here, the epoch is repeated.
            if is_best:
                with replacing(checkpoints / "best.keras") as copy:
                    shutil.copyfile(new, copy)
        self.history.append(row)
        write_history(self.run_dir / "history.csv", self.history)
        self._write_events(row)

    def _write_events(self, row):
        scalars = {"train": {}, "validation": {}}
        for name, value in row.items():
            if name != "epoch":
                side = "validation" if name.startswith("val_") else "train"
                scalars[side][f"epoch_{name.removeprefix('val_')}"] = value
        for side, values in scalars.items():
            if values:
                self.events[side].add(row["epoch"], values)


class EventWriter:
    """Writes scalars for TensorBoard without TensorFlow.

    Keras's callback and `tensorboard.summary.Writer` import TensorFlow on every backend.

    Args:
        folder: The folder of the event file; it is created with the first scalar.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.path = None

    def add(self, step, scalars):
        """Appends `scalars`, a dict of name to number, at `step`."""
        from tensorboard.compat.proto import event_pb2, summary_pb2

        if self.path is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            now = f"{time.time():.6f}"
            self.path = self.folder / f"events.out.tfevents.{now}.{socket.gethostname()}"
            self._append(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in scalars.items()
        ]
        summary = summary_pb2.Summary(value=values)
        self._append(event_pb2.Event(wall_time=time.time(), step=step, summary=summary))

    def _append(self, event):
        from tensorboard.summary.writer.record_writer import RecordWriter

        with open(self.path, "ab") as file:
            RecordWriter(file).write(event.SerializeToString())


class Progress(keras.callbacks.Callback):
    """A bar with images a second, loss, accuracy and time left on a terminal; a line per epoch.

    Args:
        images: Number of training images.
        batch_size: Images a step.
        epochs: Number of epochs of the whole run.
        stream: The stream to write to; standard output by default.
    """

    def __init__(self, images, batch_size, epochs, stream=None):
        super().__init__()
        self.images = images
        self.batch_size = batch_size
        self.epochs = epochs
        self.stream = stream or sys.stdout
        self.shown = contextlib.ExitStack()
        self.bar = None

    def on_epoch_begin(self, epoch, logs=None):
        """Opens the bar."""
        description = f"epoch {epoch + 1}/{self.epochs}"
        self.bar = self.shown.enter_context(bar(self.images, description, stream=self.stream))

    def on_train_batch_end(self, batch, logs=None):
        """Moves the bar by a batch; the last one of an epoch may have another size."""
        if not self.bar.disable:
            shown = {name: f"{float(logs[name]):.4f}" for name in ("loss", "accuracy")}
            self.bar.set_postfix(shown, refresh=False)
            last = self.params and batch + 1 == self.params["steps"]
            self.bar.update(min(self.images if last else self.batch_size, self.images - self.bar.n))

    def on_test_begin(self, logs=None):
        """Removes the bar."""
        self.close()

    def on_epoch_end(self, epoch, logs=None):
        """Prints the epoch's line."""
        self.close()
        figures = [
            f"{name} {float(logs[name]):.4f}"
            for name in ("loss", "accuracy", "val_loss", "val_accuracy")
            if name in logs
        ]
        print(
            f"epoch {epoch + 1}/{self.epochs}",
            *figures,
            f"{logs['images_per_second']:.0f} images/s",
            format_duration(logs["seconds"]),
            sep="  ",
            file=self.stream,
            flush=True,
        )

    def close(self):
        """Removes the bar, if there is one."""
        self.shown.close()
