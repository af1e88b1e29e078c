"""Runs a SavedModel where there is no Keras and none of this package: a script of its own.

Started by `fresh.FreshSavedModel`. A line of JSON comes in, then batches of images; answers go out,
and how many seconds each took, without the way here and back.
"""

import io
import json
import os
import sys
import time


def send(stream, array):
    """Writes an array to a stream, its length first."""
    import numpy as np

    content = io.BytesIO()
    np.save(content, array)
    stream.write(len(content.getvalue()).to_bytes(8, "little") + content.getvalue())
    stream.flush()


def receive(stream):
    """Returns the next array of a stream; None at its end."""
    import numpy as np

    length = stream.read(8)
    if len(length) < 8:
        return None
    content = stream.read(int.from_bytes(length, "little"))
    return np.load(io.BytesIO(content), allow_pickle=False)


def main():
    """Loads the SavedModel and answers until there are no more images."""
    task = json.loads(sys.stdin.buffer.readline())
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.path[:] = task["import_path"]
    # What the SavedModel needs of these would be an ImportError.
    sys.modules.update(dict.fromkeys(("keras", "tf_keras", "keras_resnet")))
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import numpy as np
    import tensorflow as tf

    if task["threads"]:
        tf.config.threading.set_intra_op_parallelism_threads(task["threads"])
        tf.config.threading.set_inter_op_parallelism_threads(task["threads"])
    loaded = tf.saved_model.load(task["path"])
    function = loaded.signatures["serving_default"]
    (argument,) = function.structured_input_signature[1]
    (output,) = function.structured_outputs
    while (images := receive(sys.stdin.buffer)) is not None:
        start = time.perf_counter()
        found = function(**{argument: tf.constant(images)})[output].numpy()
        seconds = time.perf_counter() - start
        send(answers, found)
        send(answers, np.float64(seconds))


if __name__ == "__main__":
    main()
