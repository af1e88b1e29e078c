"""The progress bar, which only a terminal shows, and the names of learning's figures."""

import io
import signal
import threading

import pytest

from keras_resnet.training.callbacks import Progress, catching_stop_signals
from keras_resnet.training.trainer import train


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def run_epoch(stream):
    progress = Progress(images=250, batch_size=100, epochs=2, stream=stream)
    progress.on_epoch_begin(0)
    progress.bar.mininterval = 0
    for batch in range(3):
        progress.on_train_batch_end(batch, {"loss": 0.5, "accuracy": 0.75})
    counted = progress.bar.n
    progress.on_test_begin()
    progress.on_epoch_end(
        0, {"loss": 0.5, "accuracy": 0.75, "images_per_second": 1234.5, "seconds": 61.0}
    )
    return counted


def test_a_terminal_shows_a_bar_and_then_a_line():
    stream = Terminal()
    # The last batch is short: the bar ends at the number of images.
    assert run_epoch(stream) == 250
    text = stream.getvalue()
    assert "epoch 1/2" in text and "/250" in text
    assert "images/s" in text and "loss=0.5000" in text and "accuracy=0.7500" in text
    assert text.splitlines()[-1].startswith("epoch 1/2  loss 0.5000  accuracy 0.7500  1234 images")


def test_the_bar_ends_at_the_last_image_where_the_last_batch_is_larger():
    progress = Progress(images=201, batch_size=100, epochs=1, stream=Terminal())
    progress.set_params({"steps": 2})
    progress.on_epoch_begin(0)
    for batch, expected in enumerate([100, 201]):
        progress.on_train_batch_end(batch, {"loss": 0.5, "accuracy": 0.75})
        assert progress.bar.n == expected
    progress.close()


def test_a_log_has_one_line_an_epoch():
    stream = io.StringIO()
    run_epoch(stream)
    assert stream.getvalue() == (
        "epoch 1/2  loss 0.5000  accuracy 0.7500  1234 images/s  1 min 1 s\n"
    )


@pytest.fixture
def sigint():
    """Lets a test set what Ctrl-C does; a shell may have started pytest with it ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield lambda handler: signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGINT, before)


def test_signal_handlers_are_put_back(sigint):
    sigint(signal.default_int_handler)
    with catching_stop_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGINT]
        # A second one acts as it always does.
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_background_job_goes_on_ignoring_ctrl_c(sigint):
    sigint(signal.SIG_IGN)
    with catching_stop_signals() as received:
        signal.raise_signal(signal.SIGINT)
        assert received == []
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_run_in_a_thread_leaves_signals_alone(tmp_path, tiny, fashion):
    runs = []
    settings = {"image_size": 28, "epochs": 1, "precision": "float32", "verbose": False}
    thread = threading.Thread(
        target=lambda: runs.append(train(tiny, fashion, run_dir=tmp_path / "run", **settings))
    )
    thread.start()
    thread.join()
    assert len(runs) == 1
