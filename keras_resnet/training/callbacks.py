"""Beside `model.fit`: progress, the record of each epoch, and how a run stops early."""

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
from keras_resnet.evaluation.report import write_history
from keras_resnet.utils.errors import Interrupted, TrainingError
from keras_resnet.utils.files import replacing
from keras_resnet.utils.progress import bar
from keras_resnet.utils.tables import format_duration


class StopOnDivergence(keras.callbacks.Callback):
    """Ends the run with a `TrainingError` at the first step whose loss is not a finite number.

    Keras reports the mean loss of the epoch so far, which turns infinite or NaN with the first
    such step. It stands before `CheckpointCallback`, which would save the broken weights.
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
        """Remembers the epoch, for the message."""
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the loss."""
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
        """Looks at the measured loss: the last step's own is from before its update."""
        loss = float(logs.get("val_loss", 0))
        if not math.isfinite(loss):
            raise TrainingError(
                f"after epoch {epoch + 1}, step {self.params['steps']}, the loss measured is "
                f"{loss}; the last finite mean loss in training was {self.last_finite:.4g}. "
                f"{self.advice}"
            )


@contextlib.contextmanager
def catching_stop_signals():
    """Turns the first Ctrl-C or SIGTERM into a request, so that a run can stop between two steps.

    A second one acts as it always does. Outside the main thread, where Python allows no handlers,
    signals keep their meaning.

    Yields:
        A list; it holds the signal's number once one has come.
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
    """Raises `Interrupted` at the end of the step during which a stop signal came.

    Args:
        received: What `catching_stop_signals` yields.
        patience: Seconds to go on all the same. A worker that is not the chief gives it time to
            save: the chief's last step needs all of them.
    """

    def __init__(self, received, patience=0):
        super().__init__()
        self.received = received
        self.patience = patience
        self.since = None
        self.epoch = 0

    def _is_time(self):
        if self.received and self.since is None:
            self.since = time.monotonic()
        return self.since is not None and time.monotonic() - self.since >= self.patience

    def on_epoch_begin(self, epoch, logs=None):
        """Remembers the epoch, for the message."""
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Stops if it was asked for."""
        if self._is_time():
            raise Interrupted(f"in epoch {self.epoch + 1}, after step {batch + 1}")

    def on_test_batch_end(self, batch, logs=None):
        """Stops if it was asked for."""
        if self._is_time():
            raise Interrupted(f"while epoch {self.epoch + 1} was being measured")


class EpochTimer(keras.callbacks.Callback):
    """Adds an epoch's duration, its training speed and its learning rate to the epoch's logs.

    It stands before the callbacks that use these figures.

    Args:
        images: Number of training images.
    """

    def __init__(self, images):
        super().__init__()
        self.images = images
        self.started = self.trained = None

    def on_epoch_begin(self, epoch, logs=None):
        """Starts the clock."""
        self.started = time.perf_counter()
        self.trained = None

    def on_test_begin(self, logs=None):
        """Validation begins: training, which the speed counts alone, is over."""
        if self.trained is None:
            self.trained = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        """Adds seconds, images_per_second and learning_rate to `logs`."""
        now = time.perf_counter()
        logs["seconds"] = now - self.started
        logs["images_per_second"] = self.images / ((self.trained or now) - self.started)
        logs["learning_rate"] = float(
            keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)
        )


class History(keras.callbacks.Callback):
    """Keeps a row of figures for each epoch.

    Args:
        history: The rows of the epochs before; it grows in place.
    """

    def __init__(self, history):
        super().__init__()
        self.history = history

    def on_epoch_end(self, epoch, logs=None):
        """Keeps the epoch's."""
        self.history.append(self._row(epoch, logs))

    def _row(self, epoch, logs):
        return {"epoch": epoch + 1, **{name: float(value) for name, value in logs.items()}}


class CheckpointCallback(History):
    """Writes the checkpoint, `history.csv` and the TensorBoard events at the end of each epoch.

    The checkpoint is one file that holds weights, optimizer, epoch count and history, so that a
    process that is killed between two files leaves nothing that contradicts itself.

    Args:
        history: The rows of the epochs before; it grows in place.
        run_dir: The run folder.
        metadata: What every model file of the run says about itself.
    """

    def __init__(self, history, run_dir, metadata):
        super().__init__(history)
        self.run_dir = Path(run_dir)
        self.metadata = metadata
        self.events = {
            name: EventWriter(self.run_dir / "tensorboard" / name)
            for name in ("train", "validation")
        }

    def on_epoch_end(self, epoch, logs=None):
        """Saves the epoch."""
        row = self._row(epoch, logs)
        is_best = row["val_accuracy"] > max((r["val_accuracy"] for r in self.history), default=-1)
        checkpoints = self.run_dir / "checkpoints"
        with replacing(checkpoints / "last.keras") as new:
            metadata = {**self.metadata, "history": [*self.history, row]}
            write_model(self.model, new, metadata)
            # Before the new file becomes last.keras: killed in between, the epoch is done again.
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
    """Writes scalars that TensorBoard shows, without TensorFlow: on every Keras backend.

    Keras's own callback of this kind imports TensorFlow whatever the backend.

    Args:
        folder: Where the event file goes; it is made with the first scalar.
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
        stream: Where to write; standard output by default.
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
        """Moves the bar by a batch; the epoch's last may be of another size."""
        if not self.bar.disable:
            shown = {name: f"{float(logs[name]):.4f}" for name in ("loss", "accuracy")}
            self.bar.set_postfix(shown, refresh=False)
            last = self.params and batch + 1 == self.params["steps"]
            self.bar.update(min(self.images if last else self.batch_size, self.images - self.bar.n))

    def on_test_begin(self, logs=None):
        """Takes the bar away."""
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
        """Takes the bar away if there is one; also after a run that failed."""
        self.shown.close()
