"""Each test writes a wrong file, and the verification finds it."""

import contextlib
import dataclasses

import numpy as np
import pytest
import tensorflow as tf
from conftest import run_main

from keras_resnet import ExportError, InputError
from keras_resnet.exporters import exporter, graph, tflite, verify_artifact
from keras_resnet.exporters.exporter import export
from keras_resnet.exporters.float32 import check_twin
from keras_resnet.exporters.formats import BATCH_SIZES
from keras_resnet.exporters.graph import Contract
from keras_resnet.exporters.reference import Reference, describe_chance
from keras_resnet.exporters.verify_folder import FORCED, verify
from keras_resnet.runtimes import Runtime, Tensor

pytestmark = pytest.mark.thorough

# format -> its float32 files.
FILES = {
    "saved_model": {"saved_model"},
    "tflite": {"model-float32.tflite", "model-float32-batch1.tflite"},
    "onnx": {"model-float32.onnx"},
}


def training_mode(serving, image):
    scores = serving.model(tf.cast(image, serving.model.inputs[0].dtype), training=True)
    return {"probabilities": tf.nn.softmax(scores)}


def swapped_classes(serving, image):
    scores = serving.model(tf.cast(image, serving.model.inputs[0].dtype), training=False)
    return {"probabilities": tf.nn.softmax(tf.gather(scores, [1, 0, *range(2, 10)], axis=1))}


def mirrored_image(serving, image):
    image = tf.cast(image, serving.model.inputs[0].dtype)
    scores = serving.model(tf.reverse(image, [2]), training=False)
    return {"probabilities": tf.nn.softmax(scores)}


def wrong_name(serving, image):
    return {"output_0": next(iter(CORRECT(serving, image).values()))}


def logits(serving, image):
    scores = serving.model(tf.cast(image, serving.model.inputs[0].dtype), training=False)
    return {"probabilities": scores - tf.reduce_min(scores, axis=1, keepdims=True)}


def not_normalised(serving, image):
    return {"probabilities": 3 * CORRECT(serving, image)["probabilities"]}


CORRECT = graph.Serving._serve


@pytest.mark.parametrize(
    "wrong, checks, formats",
    [
        (training_mode, {"largest difference", "agreement"}, ["tflite", "onnx"]),
        (swapped_classes, {"largest difference", "agreement"}, ["tflite", "onnx"]),
        (mirrored_image, {"largest difference", "agreement"}, ["tflite"]),
        (logits, {"largest difference"}, ["onnx"]),
        (not_normalised, {"largest difference"}, ["onnx"]),
        (wrong_name, {"output name"}, ["tflite", "onnx"]),
    ],
)
def test_a_wrong_graph_is_not_published(
    small_model, fashion, tmp_path, monkeypatch, wrong, checks, formats
):
    monkeypatch.setattr(graph.Serving, "_serve", wrong)
    with pytest.raises(ExportError, match="differ from the Keras model") as caught:
        export(small_model, tmp_path / "export", dataset=fashion, to=formats, precision=["float32"])
    failures = caught.value.failures
    files = set().union(*(FILES[name] for name in formats))
    assert {failure.file for failure in failures} == files
    for file in files:
        assert checks <= {failure.check for failure in failures if failure.file == file}
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_sees_its_batch_fails_by_its_batches(small_model, fashion, tmp_path):
    """In training mode an image's prediction depends on its neighbours."""
    serving = graph.Serving(small_model)
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, graph.Serving, "_serve", CORRECT)
        graph.Serving._serve = training_mode
        module = serving.module()
        tf.saved_model.save(module, str(tmp_path), signatures={"serving_default": module.serve})
    runtime = stack.enter_context(
        contextlib.closing(verify_artifact.open_artifact(tmp_path, "saved_model"))
    )
    images = fashion.splits["test"].images[:64]
    predictions = verify_artifact.predict(runtime, images)
    failures = verify_artifact.check_batch_sizes(runtime, images, predictions)
    assert {failure.check for failure in failures} == {
        f"batch of {count}, difference" for count in BATCH_SIZES
    }


@pytest.mark.parametrize("format", ["tflite", "onnx"])
def test_a_badly_calibrated_int8_is_not_published(
    small_model, fashion, tmp_path, monkeypatch, format
):
    """Ranges found on black images are wrong for all others."""
    monkeypatch.setattr(
        exporter, "calibration_images", lambda *_: np.zeros((20, 28, 28, 1), "uint8")
    )
    with pytest.raises(ExportError) as caught:
        export(small_model, tmp_path / "export", dataset=fashion, to=[format], precision=["int8"])
    assert {"agreement", "accuracy drop"} <= {f.check for f in caught.value.failures}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_what_its_runtime_does_not_load_is_never_published(
    small_model, fashion, tmp_path, monkeypatch, force
):
    def write_half(job, artifact, path):
        write(job, artifact, path)
        path.write_bytes(path.read_bytes()[:-1000])

    write = tflite.write
    monkeypatch.setattr(tflite, "write", write_half)
    with pytest.raises(ExportError, match=r"model-int8.tflite is not run by its own runtime"):
        export(
            small_model,
            tmp_path / "export",
            dataset=fashion,
            to=["tflite"],
            precision=["int8"],
            force=force,
        )
    assert list(tmp_path.iterdir()) == []


def test_force_publishes_and_records(small_model, fashion, tmp_path, monkeypatch):
    """The few images in the folder cannot show it again for int8; the manifest does."""
    monkeypatch.setattr(graph.Serving, "_serve", swapped_classes)
    options = {"dataset": fashion, "to": ["onnx"], "precision": ["int8"]}
    manifest = export(small_model, tmp_path / "export", force=True, **options)
    (row,) = manifest["artifacts"]
    assert row["published_by_force"]
    assert any("agreement" in failure for failure in row["failures"])
    assert (tmp_path / "export" / "model-int8.onnx").is_file()
    found = verify(tmp_path / "export")
    assert not found["passed"]
    assert found["files"][1]["verdict"] == FORCED
    assert found["files"][1]["failures"] == row["failures"]
    done = run_main("verify", tmp_path / "export")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "export: the files are unchanged, but failed at their export, which --force published"
    )


# ----------------------------------------------------------------------------------------------
# The checks by themselves
# ----------------------------------------------------------------------------------------------

GOOD = {"max_difference": 0.0, "agreement": 1.0, "accuracy_change": 0.0}


@pytest.mark.parametrize(
    "precision, change, passes",
    [
        ("float32", {"max_difference": 1e-5}, True),
        ("float32", {"max_difference": 1.01e-5}, False),
        ("float32", {"agreement": 0.9999}, False),
        ("float16", {"max_difference": 2e-3, "agreement": 0.999}, True),
        ("float16", {"max_difference": 2.1e-3}, False),
        ("float16", {"agreement": 0.9989}, False),
        ("dynamic", {"max_difference": 0.5, "agreement": 0.985}, True),
        ("int8", {"agreement": 0.9849}, False),
        ("int8", {"accuracy_change": -0.003}, True),
        ("int8", {"accuracy_change": -0.0031}, False),
        ("int8", {"accuracy_change": 0.05}, True),
        # One image may differ, however few there are.
        ("int8", {"accuracy_change": -1 / 40, "agreement": 39 / 40, "images": 40}, True),
        ("int8", {"accuracy_change": -2 / 40, "agreement": 39 / 40, "images": 40}, False),
        ("int8", {"accuracy_change": -2 / 40, "agreement": 38 / 40, "images": 40}, False),
        ("int8", {"accuracy_change": -0.0031, "images": 10_000}, False),
        *(
            (precision, {name: float("nan")}, False)
            for precision in ("float32", "int8")
            for name in ("agreement",)
        ),
        ("float32", {"max_difference": float("nan")}, False),
    ],
)
def test_tolerance(precision, change, passes):
    assert (not verify_artifact.check_tolerance(precision, {**GOOD, **change})) == passes


class Fake(Runtime):
    """A runtime with the given input and output."""

    def __init__(self, image, output):
        super().__init__("fake")
        self.input, self.output = image, output


@pytest.mark.parametrize(
    "side, change",
    [
        ("input", {"name": "input_1"}),
        ("input", {"dtype": "float32"}),
        ("input", {"shape": (1, 28, 28, 1)}),
        ("input", {"shape": (None, 28, 28, 3)}),
        ("input", {"shape": (None, 784)}),
        ("output", {"name": "output_0"}),
        ("output", {"shape": (None, 9)}),
        ("output", {"shape": (None, 10, 1)}),
        ("output", {"dtype": "uint8"}),
    ],
)
def test_contract(side, change):
    contract = Contract((28, 28, 1), "uint8", "probabilities", 10)
    ends = {
        "input": Tensor("image", (None, 28, 28, 1), "uint8"),
        "output": Tensor("probabilities", (None, 10), "float32"),
    }
    assert verify_artifact.check_contract(Fake(*ends.values()), contract) == []
    ends[side] = dataclasses.replace(ends[side], **change)
    (failure,) = verify_artifact.check_contract(Fake(*ends.values()), contract)
    assert failure.check == f"{side} {next(iter(change))}"


def test_compare():
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.7, 0.3]], "float32")
    reference = Reference(np.array([0, 1, 1]), probabilities)
    predictions = np.array([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]], "float32")
    figures = verify_artifact.compare_with_reference(predictions, reference)
    assert figures["max_difference"] == pytest.approx(0.2)
    assert figures["mean_difference"] == pytest.approx(0.4 / 6)
    assert figures["agreement"] == pytest.approx(2 / 3)
    assert figures["accuracy"] == pytest.approx(1 / 3)
    assert figures["accuracy_change"] == pytest.approx(-1 / 3)


@pytest.mark.parametrize(
    "dtypes, factor, passes",
    [
        ({"float32", "bfloat16"}, 1.09, True),
        ({"bfloat16"}, 1.11, False),
        ({"float32", "float16"}, 1.019, True),
        ({"float16"}, 1.021, False),
        ({"float64"}, 1.0009, True),
        ({"float64"}, 1.0011, False),
        ({"bfloat16"}, float("nan"), False),
    ],
)
def test_a_twin_differs_by_the_rounding_of_its_dtype_at_most(dtypes, factor, passes):
    own = np.random.default_rng(0).normal(size=(9, 4))
    if passes:
        assert check_twin("mine", dtypes, own, factor * own)["computed_in"] in dtypes
        return
    with pytest.raises(
        InputError, match=r"mine computes in .* its float32 copy gives other outputs"
    ) as caught:
        check_twin("mine", dtypes, own, factor * own)
    assert "\n" not in str(caught.value)


LABELS = np.arange(100) % 4


def reference(spread=0.5, classes=4):
    """Predictions whose most probable classes are the first so many, in turns."""
    top1 = np.arange(100) % classes
    probabilities = np.full((100, 4), 0.25) + spread * 0.75 * np.eye(4)[top1]
    return Reference(LABELS, probabilities.astype("float32"))


@pytest.mark.parametrize(
    "precision, predictions, conclusive",
    [
        ("float32", reference(), True),
        ("float32", reference(spread=0), False),
        ("float32", reference(spread=1e-4), False),
        ("float32", reference(spread=2e-4), True),
        ("float16", reference(spread=2e-4), False),
        ("float16", reference(), True),
        ("int8", reference(), True),
        ("int8", reference(spread=1e-4), True),
        ("int8", reference(classes=1), False),
        ("dynamic", reference(classes=2), True),
    ],
)
def test_a_verification_that_could_not_fail_is_inconclusive(precision, predictions, conclusive):
    found = verify_artifact.check_conclusive(precision, predictions)
    assert (not found) == conclusive
    assert all(str(each).startswith(verify_artifact.INCONCLUSIVE) for each in found)


def test_a_model_at_chance_is_described():
    assert describe_chance(reference(), takes_floats=True) is None
    line = describe_chance(reference(classes=1), takes_floats=True)
    assert "an accuracy of 25.0%" in line and "--normalize" in line
    assert "--normalize" not in describe_chance(reference(classes=1), takes_floats=False)
    certain = Reference(LABELS[:7] * 0, np.tile([[0.9, 0.1]], (7, 1)))
    assert describe_chance(certain, takes_floats=True) is None


def test_a_difference_from_the_users_model_is_recorded_beside_that_from_its_twin():
    predictions = reference().probabilities
    both = dataclasses.replace(reference(), own=predictions + np.float32(0.01))
    figures = verify_artifact.compare_with_reference(predictions, both)
    assert figures["max_difference"] == 0
    assert figures["max_difference_in_own_precision"] == pytest.approx(0.01, abs=1e-6)
