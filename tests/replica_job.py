"""A script that trains under a strategy as a user's own would, and the function that starts it.

`python replica_job.py JOB RESULT`: JOB is a file with a JSON object, RESULT a folder for the
results of each worker.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

BATCH = 64
IMAGES = 613
"""Nine batches of 64 and one of 37, which 2, 3 and 4 replicas cannot share evenly."""


RATE = 2.0**-9


def run(job, folder, workers=1):
    """Runs a job in a process, or in one for each worker; returns their folders.

    Args:
        job: The JSON object that `main` reads.
        folder: A folder that is not there yet.
        workers: How many processes; more than one get a TF_CONFIG each.
    """
    folder.mkdir()
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    with open(folder / "log.txt", "w") as log:
        status = subprocess.run(
            [
                *(sys.executable, "-m", "keras_resnet.cli", "launch", "-n", str(workers), "--"),
                *(sys.executable, __file__, str(path), str(folder)),
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        ).returncode
    assert status == 0, (folder / "log.txt").read_text()[-5000:]
    return [folder / str(worker) for worker in range(workers)]


def shared_names(found):
    """Returns the names of the results that are the same on every worker."""
    return [name for name in found.files if not name.startswith("own/")]


def start_strategy(job):
    """Returns the strategy of a job; mirrored ones have logical processors for replicas."""
    import tensorflow as tf

    from keras_resnet.distribution import choose_strategy

    processor = tf.config.list_physical_devices("CPU")[0]
    devices = [tf.config.LogicalDeviceConfiguration()] * job.get("devices", 1)
    tf.config.set_logical_device_configuration(processor, devices)
    if not job.get("fix", True):
        from keras_resnet.distribution import keras_patch

        keras_patch.apply = lambda: None
    return choose_strategy(job["strategy"], timeout=60)


def read_split(count, start=0):
    """Returns some training images of Fashion-MNIST."""
    from keras_resnet.datasets import Split, load_dataset

    split = load_dataset("fashion_mnist").splits["train"]
    return Split(split.images[start : start + count], split.labels[start : start + count])


def build(
    strategy,
    images,
    sync=True,
    policy="float32",
    rate=RATE,
    decay=None,
    stages=1,
    weighed=True,
    label_smoothing=0.0,
    mixing=None,
    **compiled,
):
    """Returns a small compiled network of raw images; `decay` is steps of a cosine.

    Without `weighed` it has the loss of a single replica.
    """
    import keras

    from keras_resnet import Spec, build_resnet, with_preprocessing
    from keras_resnet.distribution import choose_loss, synchronize_batchnorm
    from keras_resnet.losses import Accuracy

    keras.utils.set_random_seed(0)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        with strategy.scope():
            # Without biases before a BatchNormalization: they have no gradient but rounding.
            spec = Spec((1,) * stages, (16, 32)[:stages])
            network = build_resnet(spec, (28, 28, 1), 10, variant="torchvision", stem="small")
            model = with_preprocessing(network, (28, 28, 1))
            if sync:
                synchronize_batchnorm(model)
            if decay:
                rate = keras.optimizers.schedules.CosineDecay(rate, decay)
            model.compile(
                keras.optimizers.SGD(rate, momentum=0.9),
                choose_loss(
                    images,
                    BATCH,
                    strategy.num_replicas_in_sync if weighed else 1,
                    label_smoothing=label_smoothing,
                    mixing=mixing,
                ),
                metrics=[Accuracy() if mixing else "accuracy"],
                **compiled,
            )
    finally:
        keras.config.set_dtype_policy(before)
    return model


class Curve:
    """The running mean of the loss after each step, as reported and as each replica has it."""

    def __new__(cls):
        """Returns a callback with `losses`, and `sums`: total and count of each local replica."""
        import keras

        def record(step, logs):
            callback.losses.append(float(logs["loss"]))
            total, count = callback.model.metrics[0].variables
            callback.sums.append([local_values(total), local_values(count)])

        callback = keras.callbacks.LambdaCallback(on_train_batch_end=record)
        callback.losses, callback.sums = [], []
        return callback


def local_values(variable):
    """Returns the values of a Keras variable on each replica of this process."""
    values = getattr(variable.value, "values", [variable.value])
    return [np.asarray(value) for value in values]


# ----------------------------------------------------------------------------------------------
# The tasks of a job: functions of the strategy that return arrays
# ----------------------------------------------------------------------------------------------


def train_epoch(strategy, sync=True, epochs=1, class_weights=None, mixing=None, **options):
    """Trains an epoch of ten steps; the last has fewer images."""
    import keras

    from keras_resnet.distribution import AverageMovingStatistics, Shards

    split, evaluation = read_split(IMAGES), read_split(100, 1000)
    model = build(strategy, len(split), sync, mixing=mixing, **options)
    curve = Curve()
    order = lambda epoch: split.order(0, epoch)  # noqa: E731
    reading = {"class_weights": class_weights, "mixing": mixing, "classes": 10}
    shards = Shards(split, BATCH, strategy, order, **reading)
    held = Shards(evaluation, BATCH, strategy)
    history = model.fit(
        shards.dataset,
        steps_per_epoch=shards.steps,
        validation_data=held.dataset,
        validation_steps=held.steps,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[curve, AverageMovingStatistics()],
    ).history
    found = {f"weight/{v.path}": np.asarray(v) for v in model.weights}
    found |= {f"optimizer/{v.path}": np.asarray(v) for v in model.optimizer.variables}
    for variable in model.weights:
        first, *others = local_values(variable)
        assert all(np.array_equal(first, other) for other in others), variable.path
    found |= {"curve": np.array(curve.losses), "own/sums": np.array(curve.sums)}
    found |= {"keras": np.array(keras.__version__)}
    return found | {f"history/{name}": np.array(values) for name, values in history.items()}


def train_without_average(strategy):
    """Trains as `train_epoch` without synchronised BatchNormalization, and averages nothing."""
    from keras_resnet.distribution import Shards

    split = read_split(IMAGES)
    model = build(strategy, len(split), sync=False)
    shards = Shards(split, BATCH, strategy)
    model.fit(shards.dataset, steps_per_epoch=shards.steps, shuffle=False, verbose=0)
    return {f"weight/{v.path}": np.asarray(v) for v in model.weights}


def plain_arrays(strategy, **compiled):
    """`fit`, `evaluate` and `predict` of arrays, as Keras deals them out itself."""
    split = read_split(200)
    model = build(strategy, len(split), **compiled)
    steps = []
    import keras

    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda step, logs: steps.append(step))
    history = model.fit(
        split.images,
        split.labels,
        batch_size=BATCH,
        epochs=2,
        shuffle=False,
        verbose=0,
        callbacks=[count],
    ).history
    found = {f"history/{name}": np.array(values) for name, values in history.items()}
    evaluation = model.evaluate(split.images, split.labels, batch_size=BATCH, verbose=0)
    found["evaluate"] = np.array(evaluation)
    found["predict"] = model.predict(split.images[:70], batch_size=32, verbose=0)
    found["calls"] = np.array(steps)
    found |= {f"weight/{v.path}": np.asarray(v) for v in model.weights}
    return found


def with_callbacks(strategy, folder):
    """Keras's own callbacks that write and read files, one place a worker."""
    import keras

    from keras_resnet.distribution import is_chief, local_output_path

    split = read_split(200)
    model = build(strategy, len(split))
    place = local_output_path(folder / "written", strategy)
    place.mkdir()
    callbacks = [
        keras.callbacks.ModelCheckpoint(place / "{epoch}.weights.h5", save_weights_only=True),
        keras.callbacks.BackupAndRestore(place / "backup", delete_checkpoint=False),
        keras.callbacks.TensorBoard(place / "tensorboard"),
        keras.callbacks.CSVLogger(place / "history.csv"),
        keras.callbacks.ReduceLROnPlateau("loss", patience=0, factor=0.5, min_delta=10),
        keras.callbacks.EarlyStopping("loss", patience=1, min_delta=10),
        keras.callbacks.TerminateOnNaN(),
    ]
    arguments = {"batch_size": BATCH, "epochs": 9, "verbose": 0, "callbacks": callbacks}
    history = model.fit(split.images, split.labels, **arguments).history
    names = sorted(path.name for path in place.iterdir())
    return {
        "loss": np.array(history["loss"]),
        "rate": keras.ops.convert_to_numpy(model.optimizer.learning_rate),
        "names": np.array(names),
        "chief": np.array(is_chief(strategy)),
        "place": np.array(str(place)),
    }


def refusal(strategy, **compiled):
    """The error for a model that cannot be trained under the strategy."""
    from keras_resnet.distribution import check_compiled

    split = read_split(80)
    model = build(strategy, len(split), **compiled)
    steps = []
    try:
        check_compiled(model)
        model.fit(split.images, split.labels, batch_size=BATCH, verbose=0)
    except ValueError as error:
        return {"message": np.array(str(error)), "steps": np.array(steps)}
    return {"message": np.array("")}


def frozen_statistics(strategy):
    """The moving statistics of a frozen layer, before and after an epoch."""
    from keras_resnet.distribution import AverageMovingStatistics, Shards
    from keras_resnet.distribution.replicas import batchnorm_layers

    split = read_split(BATCH)
    model = build(strategy, len(split), sync=False)
    layer, *_ = batchnorm_layers(model)
    layer.trainable = False
    model.compile("sgd", model.loss)
    layer.moving_mean.assign(np.linspace(0.1, 0.9, 16))
    before = np.asarray(layer.moving_mean)
    shards = Shards(split, BATCH, strategy)
    callbacks = [AverageMovingStatistics()]
    arguments = {"steps_per_epoch": shards.steps, "shuffle": False, "verbose": 0}
    model.fit(shards.dataset, epochs=3, callbacks=callbacks, **arguments)
    return {"before": before, "after": np.asarray(layer.moving_mean)}


def normalize(strategy):
    """The statistics and the gradients of one BatchNormalization, ours and Keras's own."""
    import keras
    import tensorflow as tf

    from keras_resnet.normalization import BatchNormalization

    # Few pixels: sums of thousands round differently in the two operators.
    images, found = tf.constant(read_split(16).images[:, ::4, ::4], "float32"), {}
    for name, layer_class in (("ours", BatchNormalization), ("keras", BatchNormalization.__base__)):
        with strategy.scope():
            layer = layer_class(name=name, dtype="mixed_bfloat16")
            layer.build(images.shape)
        optimizer = keras.optimizers.SGD(0.1)

        def step(layer=layer, optimizer=optimizer):
            replica = tf.distribute.get_replica_context().replica_id_in_sync_group
            own = images * tf.cast(replica + 1, "float32")
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.cast(layer(own, training=True), "float32") * images)
            variables = layer.trainable_variables
            gradients = tape.gradient(loss, [v.value for v in variables])
            optimizer.apply(gradients, variables)

        with strategy.scope():
            optimizer.build(layer.trainable_variables)
        tf.function(lambda step=step: strategy.run(step))()
        found |= {
            f"{name}/{variable.name}": np.stack(local_values(variable))
            for variable in layer.weights
        }
    return found


def train_twice(strategy, folder):
    """Two runs of `keras_resnet.train` in one process, of different networks."""
    import dataclasses

    from keras_resnet import SPECS, Spec, load_dataset, train

    data = dataclasses.replace(
        load_dataset("fashion_mnist"),
        splits={"train": read_split(128), "test": read_split(64, 999)},
    )
    losses = []
    for name, filters in (("narrow", 16), ("wide", 32)):
        SPECS[name] = Spec((1,), (filters,))
        options = {"epochs": 1, "batch_size": 32, "precision": "float32", "verbose": False}
        run = train(name, data, strategy="mirrored", run_dir=Path(folder) / name, **options)
        losses.append(run.history[0]["loss"])
    return {"losses": np.array(losses)}


def random_numbers(strategy):
    """The augmented images of each replica of this process, made from the same images."""
    import keras
    import tensorflow as tf

    from keras_resnet.distribution.replicas import separate_seeds
    from keras_resnet.preprocessing import Augmentation

    keras.utils.set_random_seed(0)
    with strategy.scope():
        inputs = keras.Input((28, 28, 1))
        model = keras.Model(inputs, Augmentation(["shift"])(inputs))
    separate_seeds(strategy, model)
    images = tf.constant(read_split(16).images, "float32")

    @tf.function
    def draw():
        return strategy.run(lambda: model(images, training=True))

    return {"drawn": np.stack([np.asarray(v) for v in strategy.experimental_local_results(draw())])}


TASKS = {
    function.__name__: function
    for function in (
        *(train_epoch, train_without_average, plain_arrays, with_callbacks),
        *(refusal, random_numbers, frozen_statistics, train_twice, normalize),
    )
}


def main(job_path, folder):
    """Does the tasks of a job one after another; their arrays go to NAME.npz."""
    import keras

    job, folder = json.loads(Path(job_path).read_text()), Path(folder)
    task = json.loads(os.environ["TF_CONFIG"]).get("task", {"index": 0})
    worker = folder / str(task["index"])
    worker.mkdir()
    strategy = start_strategy(job)
    # Without a policy, Keras takes the floatx of the first task for all.
    keras.config.set_dtype_policy("float32")
    for name, (task, options) in job["tasks"].items():
        if task in ("with_callbacks", "train_twice"):
            options = {"folder": folder}
        print("task", name, flush=True)
        # The loss is computed in floatx, whatever the policy.
        keras.config.set_floatx("float64" if options.get("policy") == "float64" else "float32")
        np.savez(worker / f"{name}.npz", **TASKS[task](strategy, **options))


if __name__ == "__main__":
    main(*sys.argv[1:])
