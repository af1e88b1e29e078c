"""Networks trained under every strategy: the same network, and Keras's features there.

`TABLE` is the table of docs/cluster.md: each of its cells is a test here.
"""

from pathlib import Path

import numpy as np
import pytest
import replica_job

import keras_resnet

pytestmark = pytest.mark.thorough

# name -> job, number of processes, number of replicas.
SETTINGS = {
    "none": ({"strategy": "none"}, 1, 1),
    "mirrored-2": ({"strategy": "mirrored", "devices": 2}, 1, 2),
    "mirrored-4": ({"strategy": "mirrored", "devices": 4}, 1, 4),
    "multiworker-2": ({"strategy": "multiworker"}, 2, 2),
    "multiworker-3": ({"strategy": "multiworker"}, 3, 3),
}
PAIRS = ["mirrored-2", "multiworker-2"]
REPLICATED = [name for name in SETTINGS if name != "none"]

# Classes of different weight, as balanced ones have: an image counts by its class.
WEIGHED = {"class_weights": [0.5 + label / 9 for label in range(10)], "label_smoothing": 0.1}

EQUIVALENCE = {
    # At a rate of real training; rounding is not in the way.
    "float64": ("train_epoch", {"policy": "float64", "rate": 0.02, "stages": 2, **WEIGHED}),
    # Training amplifies rounding: at this rate it stays below what is to be shown. The rate falls
    # by a schedule over the ten steps.
    "float32": ("train_epoch", {"rate": 2.0**-11, "stages": 2, "decay": 10}),
}
FEATURES = {
    "unsynchronized": ("train_epoch", {"sync": False}),
    "arrays": ("plain_arrays", {}),
    "mixed_bfloat16": ("train_epoch", {"policy": "mixed_bfloat16"}),
    "callbacks": ("with_callbacks", {}),
    "random": ("random_numbers", {}),
    "jit_compile": ("refusal", {"jit_compile": True}),
}
STEPS_PER_EXECUTION = {
    "none": ("plain_arrays", {"steps_per_execution": 4}),
    "mirrored-2": ("refusal", {"steps_per_execution": 4}),
    "multiworker-2": ("plain_arrays", {"steps_per_execution": 4}),
}


EXTRA = {
    "multiworker-2": {
        "not_averaged": ("train_without_average", {}),
        "normalize": ("normalize", {}),
    },
    "multiworker-3": {"frozen": ("frozen_statistics", {})},
    "mirrored-2": {
        "twice": ("train_twice", {}),
        "mixed": ("train_epoch", {"epochs": 2, "mixing": "cutmix", "rate": 0.02}),
        "normalize": ("normalize", {}),
        "unweighed": ("train_epoch", EQUIVALENCE["float64"][1] | {"weighed": False}),
    },
}


# Tasks of a setting in `make test`. The others are slow, and a job of their own.
FAST = {
    "none": ("float64", "random"),
    "mirrored-2": ("float64", "random", "normalize"),
    "multiworker-2": ("float64", "random", "normalize"),
}


def is_slow(setting, task):
    return task not in FAST.get(setting, ())


def marked(settings, task):
    """Returns test parameters: settings, marked as slow where the task is not in `FAST`."""
    return [
        pytest.param(setting, marks=pytest.mark.slow if is_slow(setting, task) else ())
        for setting in settings
    ]


@pytest.fixture(scope="module")
def done(tmp_path_factory, idx_folder):
    """Returns a function of a setting and a task that returns the results of each worker."""
    folders = {}

    def find(setting, task):
        slow = is_slow(setting, task)
        name = f"{setting}, slow" if slow else setting
        if name not in folders:
            job, workers, _ = SETTINGS[setting]
            tasks = EQUIVALENCE | EXTRA.get(setting, {})
            if setting in STEPS_PER_EXECUTION:
                tasks |= FEATURES | {"steps_per_execution": STEPS_PER_EXECUTION[setting]}
            tasks = {key: tasks[key] for key in tasks if is_slow(setting, key) == slow}
            folder = tmp_path_factory.mktemp("jobs") / name
            folders[name] = replica_job.run({**job, "tasks": tasks}, folder, workers)
        return [np.load(folder / f"{task}.npz") for folder in folders[name]]

    return find


def part(found, prefix):
    return {name: found[name] for name in found.files if name.startswith(f"{prefix}/")}


def distance(a, b):
    """Returns the norm of the difference of two sets of arrays, by that of the first."""
    squares = np.sum([np.sum((a[name] - b[name]) ** 2.0) for name in a])
    return np.sqrt(squares / np.sum([np.sum(a[name] ** 2.0) for name in a]))


# ----------------------------------------------------------------------------------------------
# One network, whatever the number of replicas
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", marked(REPLICATED, "float64"))
def test_in_float64_the_weights_are_those_of_one_replica(done, setting):
    (one,) = done("none", "float64")
    for found in done(setting, "float64"):
        for kind in ("weight", "optimizer"):
            difference = distance(part(one, kind), part(found, kind))
            print(f"{setting}, {kind}: {difference:.1e}")
            # Keras divides the loss by 3 in float32.
            assert difference < (1e-7 if setting == "multiworker-3" else 1e-13)


@pytest.mark.parametrize("setting", marked(REPLICATED, "float32"))
def test_in_float32_the_weights_are_those_of_one_replica(done, setting):
    (one,) = done("none", "float32")
    weights = part(one, "weight")
    (other,) = done("none", "float64")
    assert distance(weights, part(other, "weight")) > 1e-3  # the weights of another rate
    for found in done(setting, "float32"):
        difference = distance(weights, part(found, "weight"))
        print(f"{setting}: {difference:.1e}")
        assert difference < 1e-5


@pytest.mark.parametrize("setting", marked(REPLICATED, "float64"))
def test_the_loss_curve_is_that_of_one_replica(done, setting):
    check_curve(done, setting, "float64")


@pytest.mark.parametrize("setting", marked(REPLICATED, "float32"))
def test_the_loss_curve_in_float32_is_that_of_one_replica(done, setting):
    check_curve(done, setting, "float32")


def check_curve(done, setting, policy):
    (one,) = done("none", policy)
    assert len(one["curve"]) == 10 and one["curve"][-1] < one["curve"][0]
    workers = done(setting, policy)
    totals, counts = np.concatenate([found["own/sums"] for found in workers], axis=2).swapaxes(0, 1)
    bound = {"float32": 1e-5, "float64": 1e-6}[policy]
    np.testing.assert_allclose(totals.sum(1) / counts.sum(1), one["curve"], rtol=bound)
    for found in workers:
        # Within an epoch Keras reports the mean over the replicas of their own means: an image of
        # a shard of 21 counts for more than one of a shard of 22.
        np.testing.assert_allclose(found["curve"], (totals / counts).mean(1), rtol=1e-6)
        # Over the whole epoch each image counts once, also on shards of different sizes.
        for name, values in part(one, "history").items():
            np.testing.assert_allclose(found[name], values, rtol=1e-5, err_msg=name)


SAME_BITS = [
    *(("multiworker-2", task) for task in (*EQUIVALENCE, "unsynchronized")),
    *(("multiworker-3", task) for task in EQUIVALENCE),
]


@pytest.mark.parametrize(
    ("setting", "task"),
    [pytest.param(*each, marks=pytest.mark.slow if is_slow(*each) else ()) for each in SAME_BITS],
)
def test_all_workers_have_the_same_bits(done, setting, task):
    chief, *others = done(setting, task)
    assert others
    for other in others:
        for name in replica_job.shared_names(chief):
            np.testing.assert_array_equal(chief[name], other[name], err_msg=f"{task}: {name}")


@pytest.mark.slow
def test_keras_own_loss_counts_images_of_small_shards_for_more(done):
    # `GlobalBatchCrossentropy` is needed here: two replicas cannot share 37 images evenly.
    (one,) = done("none", "float64")
    (found,) = done("mirrored-2", "unweighed")
    assert distance(part(one, "weight"), part(found, "weight")) > 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("setting", PAIRS)
def test_without_synchronisation_moving_statistics_are_averaged(done, setting):
    (one,) = done("none", "unsynchronized")
    averaged = done(setting, "unsynchronized")[0]
    moving = [name for name in averaged.files if "moving" in name]
    assert moving
    for name in moving:
        np.testing.assert_allclose(averaged[name], one[name], rtol=0.3, atol=0.05, err_msg=name)
    # The replicas' own batches are other batches: this is not the network of one replica.
    assert distance(part(one, "weight"), part(averaged, "weight")) > 1e-4


@pytest.mark.slow
def test_left_alone_the_workers_would_save_different_networks(done):
    chief, other = done("multiworker-2", "not_averaged")
    moving = [name for name in chief.files if "moving" in name]
    assert any(not np.array_equal(chief[name], other[name]) for name in moving)


@pytest.mark.slow
def test_frozen_layers_keep_their_statistics_to_the_bit(done):
    # A mean of three equal numbers is often another number.
    for found in done("multiworker-3", "frozen"):
        np.testing.assert_array_equal(found["after"], found["before"])


@pytest.mark.slow
def test_a_process_can_train_twice_under_mirrored(done):
    (found,) = done("mirrored-2", "twice")
    assert np.isfinite(found["losses"]).all()


@pytest.mark.slow
def test_mixed_batches_are_trained_on_every_replica(done):
    (found,) = done("mirrored-2", "mixed")
    assert found["history/loss"][1] < found["history/loss"][0]
    assert found["history/val_loss"][1] < np.log(10)  # better than chance


@pytest.mark.parametrize("setting", PAIRS)
def test_each_replica_draws_its_own_random_numbers(done, setting):
    drawn = np.concatenate([found["drawn"] for found in done(setting, "random")])
    assert len(drawn) == 2 and not np.array_equal(drawn[0], drawn[1])
    (alone,) = done("none", "random")
    np.testing.assert_array_equal(alone["drawn"][0], drawn[0])


@pytest.mark.parametrize("setting", PAIRS)
def test_the_fused_normalization_updates_what_kerass_layer_does(done, setting):
    statistics = []
    for found in done(setting, "normalize"):
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            values = found[f"ours/{name}"]
            np.testing.assert_allclose(values, found[f"keras/{name}"], rtol=1e-5, atol=1e-6)
        statistics += list(found["ours/moving_mean"])
    # Each replica's own images: the second's are twice as bright.
    assert len(statistics) == 2 and statistics[1] > 1.5 * statistics[0]


# ----------------------------------------------------------------------------------------------
# The guide's table of features
# ----------------------------------------------------------------------------------------------


def fit_of_arrays(done, setting):
    (one,) = done("none", "arrays")
    for found in done(setting, "arrays"):
        assert len(found["history/loss"]) == 2
        np.testing.assert_allclose(found["history/loss"], one["history/loss"], rtol=1e-3)


def evaluate(done, setting):
    (one,) = done("none", "arrays")
    for found in done(setting, "arrays"):
        np.testing.assert_allclose(found["evaluate"], one["evaluate"], rtol=1e-3)


def predict(done, setting):
    (one,) = done("none", "arrays")
    for found in done(setting, "arrays"):
        assert found["predict"].shape == (70, 10)
        # In the order of the images, on every worker.
        np.testing.assert_allclose(found["predict"], one["predict"], atol=1e-3)


def metrics(done, setting):
    (one,) = done("none", "float32")
    for found in done(setting, "float32"):
        for name in ("history/accuracy", "history/val_accuracy"):
            np.testing.assert_allclose(found[name], one[name], atol=1e-6)


def callbacks(done, setting):
    chief, *others = done(setting, "callbacks")
    # ReduceLROnPlateau halves the rate after the second epoch, EarlyStopping stops there.
    assert len(chief["loss"]) == 2 and chief["rate"] == replica_job.RATE / 2
    names = {"1.weights.h5", "2.weights.h5", "backup", "history.csv", "tensorboard"}
    assert set(chief["names"]) == names and chief["chief"]
    assert set(map(str, chief["names"])) == {p.name for p in Path(str(chief["place"])).iterdir()}
    for other in others:
        assert not other["chief"] and set(other["names"]) == names
        assert not Path(str(other["place"])).parent.exists()  # scratch, taken away at the end


def steps_per_execution(done, setting):
    if "mirrored" in setting:
        refused(done, setting, "steps_per_execution")
        return
    (one,) = done("none", "arrays")
    for found in done(setting, "steps_per_execution"):
        # Four batches an epoch, of 64 images: one call of the callbacks for all four.
        assert found["calls"].tolist() == [3, 3]
        np.testing.assert_allclose(found["history/loss"], one["history/loss"], rtol=1e-3)


def refused(done, setting, argument):
    for found in done(setting, argument):
        assert str(found["message"]).startswith(f"`{argument}` must be "), found["message"]
        assert len(str(found["message"]).splitlines()) == 1 and not len(found["steps"])


def jit_compile(done, setting):
    if setting == "none":
        assert not str(done(setting, "jit_compile")[0]["message"])
        return
    refused(done, setting, "jit_compile")


def mixed_precision(done, setting):
    (one,) = done("none", "mixed_bfloat16")
    for found in done(setting, "mixed_bfloat16"):
        np.testing.assert_allclose(found["history/loss"], one["history/loss"], rtol=0.02)


def learning_rate_schedules(done, setting):
    (one,) = done("none", "float32")
    name = next(name for name in one.files if name.endswith("iteration"))
    for found in done(setting, "float32"):
        assert found[name] == one[name] == 10
        np.testing.assert_allclose(found["history/loss"], one["history/loss"], rtol=1e-3)


# row of the guide's table -> entries for mirrored and multiworker, the test, and its task.
TABLE = {
    "`fit`, of arrays or `Shards`": ("yes", "yes", fit_of_arrays, "arrays"),
    "`evaluate`": ("yes", "yes", evaluate, "arrays"),
    "`predict`": ("yes", "yes", predict, "arrays"),
    "metrics": ("yes", "yes", metrics, "float32"),
    "callbacks": ("yes", "yes, with `local_output_path`", callbacks, "callbacks"),
    "learning-rate schedules": ("yes", "yes", learning_rate_schedules, "float32"),
    "mixed precision": ("yes", "yes", mixed_precision, "mixed_bfloat16"),
    "`steps_per_execution` > 1": (
        *("error", "yes, no faster"),
        *(steps_per_execution, "steps_per_execution"),
    ),
    "`jit_compile=True`": ("error", "error", jit_compile, "jit_compile"),
}
CELLS = [
    pytest.param(row, *each.values, marks=each.marks)
    for row in TABLE
    for each in marked(("none", *PAIRS), TABLE[row][3])
]


@pytest.mark.parametrize(("row", "setting"), CELLS)
def test_each_cell_of_the_table(done, setting, row):
    TABLE[row][2](done, setting)


def test_the_guide_has_this_table():
    guide = Path(keras_resnet.__file__).parents[1] / "docs" / "cluster.md"
    lines = guide.read_text(encoding="utf-8").splitlines()
    for row, (mirrored, multiworker, *_) in TABLE.items():
        assert f"| {row} | yes | {mirrored} | {multiworker} |" in lines
