import dataclasses
import json
import re
import shutil

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import run_main
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import keras_resnet
from keras_resnet import InputError, archive
from keras_resnet.datasets import Split
from keras_resnet.evaluation import inference
from keras_resnet.exporters import formats
from keras_resnet.exporters.calibration import draw_evenly
from keras_resnet.exporters.exporter import export
from keras_resnet.exporters.formats import choose_artifacts
from keras_resnet.preprocessing import find_normalization
from keras_resnet.runtimes import Prober, open_runtime
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.untrusted.manifest import digest, read_manifest

pytestmark = pytest.mark.thorough

ALL = {artifact.file for artifact in choose_artifacts()}
ONE = {"to": ["onnx"], "precision": ["float32"]}


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    """Every format and precision of a run, by the command line; its output."""
    folder = tmp_path_factory.mktemp("exported") / "export"
    done = run_main("export", trained_run, "--out", folder, "--force")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_every_format_and_precision_is_written(exported):
    folder, _ = exported
    beside = {"manifest.json", "reference.npz", "labels.txt"}
    assert {path.name for path in folder.iterdir()} == ALL | beside


def test_the_command_line_prints_a_line_each_and_a_table(exported):
    folder, done = exported
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[: len(ALL)]] == [
        artifact.file for artifact in choose_artifacts()
    ]
    assert lines[len(ALL)] == f"written to {folder}"
    assert lines[len(ALL) + 1].split()[:2] == ["file", "MB"]
    assert "Traceback" not in done.stderr


def test_the_manifest_says_what_is_there(exported, trained_run):
    folder, _ = exported
    manifest = read_manifest(folder)
    assert {row["file"] for row in manifest["artifacts"]} == ALL
    for row in manifest["artifacts"]:
        assert digest(folder / row["file"]) == (row["bytes"], row["sha256"])
        assert row["images"] == manifest["data"]["images"] == 100
        assert row["operators"]
        for figures in row["latency_ms"].values():
            assert 0 < figures["median"] <= figures["p95"]
        assert "1" in row["latency_ms"]
    _, sha256 = digest(trained_run / "model.keras")
    assert manifest["source"]["sha256"] == sha256
    assert manifest["source"]["run"]["recipe"] == "quick"
    assert None not in manifest["tool_versions"].values()
    assert manifest["data"]["fingerprint"]


def test_all_files_answer_as_the_keras_model_does(exported, trained_run):
    folder, _ = exported
    source = inference.load(trained_run)
    _, split, _ = inference.load_data(source)
    images = split.images[np.arange(20)]
    expected = source(images)
    for row in read_manifest(folder)["artifacts"]:
        predictor = inference.load(folder / row["file"], trust=True)
        assert predictor.class_names == source.class_names
        bound = {"float32": 1e-5, "float16": 2e-3}.get(row["precision"], 0.2)
        assert predictor(images) == pytest.approx(expected, abs=bound)


def test_evaluate_and_predict_take_any_of_them(exported, trained_run, fashion_folder):
    folder, _ = exported
    image = next(fashion_folder.glob("*/*.png"))
    labels = set()
    for file in ("model-float32.onnx", "model-int8-batch1.tflite", "saved_model"):
        trust = ["--trust"] if file == "saved_model" else []
        done = run_main("predict", folder / file, image, "--json", *trust)
        assert done.returncode == 0, done.stderr
        labels.add(json.loads(done.stdout)[0]["labels"][0]["label"])
    assert len(labels) == 1
    results = [
        run_main("evaluate", path, "--json")
        for path in (trained_run, folder / "model-float32.tflite")
    ]
    accuracies = [json.loads(done.stdout)["accuracy"] for done in results]
    assert accuracies[0] == accuracies[1]


def test_without_preprocessing_files_take_floats_and_give_logits(small_model, fashion, tmp_path):
    folder = tmp_path / "floats"
    # So small a network keeps less in 8 bits than a real one.
    options = {"precision": ["float32", "int8"], "preprocessing": False, "force": True}
    manifest = export(small_model, folder, to=["tflite", "onnx"], dataset=fashion, **options)
    for row in manifest["artifacts"]:
        assert row["input"] == {
            "name": "image",
            "shape": [row["batch"], 28, 28, 1],
            "dtype": "float32",
        }
        assert row["output"]["name"] == "logits"
        assert not row["failures"] or row["precision"] == "int8"
        assert row["agreement"] > 0.9
    with pytest.raises(InputError, match="takes floats that are normalised already"):
        inference.load(folder / "model-int8.onnx")
    floats = fashion.splits["test"].images[:5].astype("float32") / 255
    logits = open_runtime(folder / "model-float32.onnx").run(floats)
    expected = small_model(fashion.splits["test"].images[:5], training=False)
    assert logits == pytest.approx(np.asarray(expected), abs=1e-4)


# ----------------------------------------------------------------------------------------------
# Other people's models
# ----------------------------------------------------------------------------------------------


def functional_with_logits():
    inputs = keras.Input((28, 28, 1), name="pixels")
    x = keras.layers.Rescaling(1 / 255)(inputs)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", padding="same")(x)
    x = keras.layers.BatchNormalization()(x)
    return keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)), name="mine")


def sequential_with_softmax():
    return keras.Sequential(
        [
            keras.Input((28, 28, 1), dtype="uint8"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.DepthwiseConv2D(3, activation="relu6"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def with_a_softmax_in_a_nested_model():
    return keras.Sequential([keras.Input((28, 28, 1), dtype="uint8"), sequential_with_softmax()])


def with_a_softmax_behind_which_it_is_cast():
    inputs = keras.Input((28, 28, 1))
    logits = keras.layers.Dense(10)(keras.layers.Flatten()(inputs / 255.0))
    return keras.Model(inputs, keras.layers.Activation("linear")(keras.ops.softmax(logits)))


def in_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        return functional_with_logits()
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize(
    "make",
    [
        functional_with_logits,
        sequential_with_softmax,
        with_a_softmax_in_a_nested_model,
        with_a_softmax_behind_which_it_is_cast,
        in_mixed_precision,
    ],
)
def test_a_model_of_ones_own(make, fashion, tmp_path):
    keras.utils.set_random_seed(1)
    model = make()
    manifest = export(model, tmp_path / "out", dataset=fashion, precision=["float32"], to=["onnx"])
    assert [row["failures"] for row in manifest["artifacts"]] == [[]]
    assert manifest["class_names"] == list(fashion.class_names)
    images = fashion.splits["test"].images[:5]
    own = np.asarray(keras.ops.cast(model(images, training=False), "float32"))
    kind = KerasRuntime(model).output_kind
    assert kind == ("softmax" if "softmax" in make.__name__ else "logits")
    if kind == "logits":
        own = np.asarray(keras.ops.softmax(own))
    found = open_runtime(tmp_path / "out" / "model-float32.onnx").run(images)
    assert found == pytest.approx(own, abs=1e-2 if make is in_mixed_precision else 1e-5)


def ending_in(units, activation, **output):
    inputs = keras.Input((28, 28, 1), name="pixels")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1 / 255)(inputs))
    x = keras.layers.Dense(units, activation, kernel_initializer="he_normal")(x)
    return keras.Model(inputs, {"label": x} if output else x)


@pytest.mark.parametrize(
    ("units", "activation", "preprocessing", "kind"),
    [
        (10, "sigmoid", True, "sigmoid"),
        (1, "sigmoid", True, "softmax"),
        (1, None, True, "softmax"),
        (1, None, False, "logits"),
    ],
)
def test_one_number_and_several_labels(units, activation, preprocessing, kind, fashion, tmp_path):
    """One number for two classes becomes two columns; several labels are unchanged."""
    keras.utils.set_random_seed(2)
    model, data = ending_in(units, activation, named=True), fashion
    if units == 1:
        few = {
            name: Split(split.images[:60], split.labels[:60] % 2)
            for name, split in fashion.splits.items()
        }
        data = dataclasses.replace(fashion, splits=few, class_names=("even", "odd"))
    manifest = export(
        model,
        tmp_path / "out",
        dataset=data,
        precision=["float32"],
        to=["tflite", "onnx"],
        preprocessing=preprocessing,
    )
    assert [row["failures"] for row in manifest["artifacts"]] == [[], [], []]
    images = data.splits["test"].images[:5]
    own = np.asarray(model(images, training=False)["label"])
    if activation is None:
        own = 1 / (1 + np.exp(-own))
    expected = np.hstack([1 - own, own]) if units == 1 else own
    source = inference.Predictor(model)
    assert source(images) == pytest.approx(expected, abs=1e-6)
    for file in ("model-float32.onnx", "model-float32.tflite"):
        runtime = open_runtime(tmp_path / "out" / file)
        assert runtime.output_kind == runtime.metadata["output_kind"] == kind
        assert runtime.columns == len(data.class_names)
        if preprocessing:
            assert inference.Predictor(runtime)(images) == pytest.approx(expected, abs=1e-5)
    if preprocessing:
        figures = [
            keras_resnet.evaluate(p, data.splits["test"], data.class_names).accuracy
            for p in (source, inference.Predictor(runtime))
        ]
        assert figures[0] == figures[1] == manifest["keras"]["accuracy"]


def test_a_model_in_mixed_precision_is_compared_with_its_twin(fashion, tmp_path):
    """Compiled with a loss of its own, which Keras could not load again."""
    model = in_mixed_precision()
    model.compile("adam", loss=lambda labels, scores: scores[:, 0])
    manifest = export(model, tmp_path / "out", dataset=fashion, **ONE)
    twin = manifest["keras"]["twin"]
    assert twin["computed_in"] == "bfloat16"
    assert 0 < twin["difference"] < 0.05 < twin["tolerance"]
    row = manifest["artifacts"][0]
    assert row["max_difference"] <= 1e-5 < row["max_difference_in_own_precision"] < 0.05
    split = fashion.splits["test"]
    top1 = np.asarray(model(split.images, training=False)).argmax(axis=1)
    assert manifest["keras"]["accuracy"] == pytest.approx(np.mean(top1 == split.labels), abs=0.01)


class Forgetful(keras.layers.Layer):
    """A layer whose state is in no variable and no config."""

    factor = 1.0

    def call(self, x):
        return x * self.factor


def test_a_twin_that_answers_otherwise_is_refused(fashion, tmp_path):
    layer = Forgetful(dtype="mixed_float16")
    layer.factor = 1 / 255
    model = keras.Sequential([keras.Input((28, 28, 1)), layer, keras.layers.Flatten()])
    model.add(keras.layers.Dense(10))
    with pytest.raises(InputError, match=r"its float32 copy gives other outputs") as caught:
        export(model, tmp_path / "out", dataset=fashion, **ONE)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def alike(fashion_folder, tmp_path_factory):
    """A file of an untrained network that gives 1/4 for every image."""
    path = tmp_path_factory.mktemp("alike") / "alike.keras"
    keras.utils.set_random_seed(6)  # not better than chance
    inputs = keras.Input((28, 28, 1), dtype="uint8")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1e-9)(inputs))
    keras.Model(inputs, keras.layers.Dense(4)(x)).save(path)
    return path


def test_an_inconclusive_verification_is_a_failure(alike, fashion_folder, tmp_path):
    arguments = [alike, "--dataset", f"folder:{fashion_folder}", "--out", tmp_path / "out"]
    arguments += ["--to", "onnx", "--precision", "float32"]
    done = run_main("export", *arguments)
    assert done.returncode == 1
    assert "of 1 of 1 artifacts is inconclusive" in done.stderr.splitlines()[-1]
    assert "verified" not in done.stdout
    assert list(tmp_path.iterdir()) == []
    done = run_main("export", *arguments, "--force")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("inconclusive")
    assert "the constant prediction of the most frequent class" in done.stdout
    manifest = read_manifest(tmp_path / "out")
    assert manifest["artifacts"][0]["failures"][0].startswith("inconclusive")
    assert manifest["keras"]["note"]
    assert run_main("verify", tmp_path / "out").returncode == 1


@pytest.mark.parametrize("name", ["1/255", "imagenet", "inception"])
def test_a_model_of_floats_is_normalised(name, small_model, fashion, tmp_path):
    """The normalisation of a network's training becomes a part of its files."""
    normalization = {"reverse_channels": False, **find_normalization(name, 1)}
    network = small_model.layers[-1]
    manifest = export(network, tmp_path / "out", dataset=fashion, normalize=name, **ONE)
    assert manifest["source"]["normalize"] == name
    assert manifest["artifacts"][0]["input"]["dtype"] == "uint8"
    images = fashion.splits["test"].images[:9]
    floats = (images.astype("float32") / 255 - normalization["mean"]) / normalization["std"]
    expected = np.asarray(keras.ops.softmax(network(floats, training=False)))
    found = inference.load(tmp_path / "out" / "model-float32.onnx")(images)
    assert found == pytest.approx(expected, abs=1e-5)
    # It is no better than chance with the numbers of another.
    assert (manifest["keras"]["note"] is None) == (manifest["keras"]["accuracy"] > 0.2)


def test_a_model_of_raw_images_is_not_normalised_twice(small_model, fashion, tmp_path):
    with pytest.raises(InputError, match="takes raw images and normalises them itself"):
        export(small_model, tmp_path / "out", dataset=fashion, normalize="imagenet", **ONE)


def test_a_file_that_was_just_written_is_not_tried_in_another_process(
    small_model, fashion, tmp_path, monkeypatch
):
    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(Prober, "probe", fail)
    options = {"to": ["tflite", "onnx"], "precision": ["float32"]}
    assert export(small_model, tmp_path / "out", dataset=fashion, **options)["artifacts"]


def test_every_file_says_the_oldest_runtime(exported):
    rows = read_manifest(exported[0])["artifacts"]
    names = {"saved_model": "TensorFlow ", "tflite": "TensorFlow Lite ", "onnx": "ONNX Runtime "}
    for row in rows:
        name, version = names[row["format"]], row["oldest_runtime"]
        assert version.startswith(name)
        assert [*map(int, version.removeprefix(name).split("."))] > [1]


def test_an_export_is_not_made_of_code(tmp_path):
    """A SavedModel is refused before it is loaded."""
    marker = tmp_path / "ran"
    module = tf.Module()

    @tf.function(input_signature=[])
    def initialize():
        tf.io.write_file(str(marker), "ran")
        return tf.constant(0)

    module.__call__ = initialize
    tf.saved_model.save(module, str(tmp_path / "model"))
    with pytest.raises(InputError, match=r"made of a run folder or a \.keras file"):
        export(tmp_path / "model", tmp_path / "out")
    assert not marker.exists()


def test_int8_needs_training_images(small_model, fashion, tmp_path):
    data = dataclasses.replace(fashion, splits={"test": fashion.splits["test"]})
    with pytest.raises(InputError, match="int8 needs training images"):
        export(small_model, tmp_path / "out", dataset=data, to=["onnx"], precision=["int8"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"model": 3}, "a .keras file, a published name or a Keras model, got 3"),
        ({"to": "onnx"}, "`to` must be a list of"),
        ({"to": 3}, "`to` must be a list of"),
        ({"to": []}, "`to` must be a list of"),
        ({"precision": ["int4"]}, "`precision` must be one of"),
        ({"dataset": np.zeros(3)}, "`dataset` must be a Dataset or its name, got ndarray"),
    ],
)
def test_arguments_that_break_a_rule(arguments, message, small_model, fashion, tmp_path):
    given = {"model": small_model, "folder": tmp_path / "out", "dataset": fashion, **arguments}
    with pytest.raises(InputError, match=re.escape(message)):
        export(**given)


def test_a_class_name_is_one_line(small_model, fashion, tmp_path):
    names = ("two\nlines", *fashion.class_names[1:])
    with pytest.raises(InputError, match="a class name must be one line"):
        export(
            small_model,
            tmp_path / "out",
            dataset=dataclasses.replace(fashion, class_names=names),
            **ONE,
        )


def test_a_model_that_resizes_is_exported_for_any_size(fashion, tmp_path):
    network = keras_resnet.build_resnet(keras_resnet.Spec((1,), (8,)), (28, 28, 1), 10)
    model = keras_resnet.with_preprocessing(network, (None, None, 1))
    manifest = export(model, tmp_path / "out", dataset=fashion, **ONE)
    assert manifest["artifacts"][0]["input"]["shape"] == [None, None, None, 1]


@pytest.mark.parametrize("size", [23, 37])
def test_images_that_are_enlarged(size, fashion, tmp_path):
    """23 pixels times float32(28 / 23) are 27.99…, and would become 27."""
    network = keras_resnet.build_resnet(
        keras_resnet.Spec((1,), (8,)), (28 if size != 37 else 96,) * 2 + (1,), 10
    )
    model = keras_resnet.with_preprocessing(network, (size, size, 1))
    cut = {
        name: Split(split.images[:60, :size, :size], split.labels[:60])
        for name, split in fashion.splits.items()
    }
    if size > 28:
        cut = {
            name: Split(np.pad(split.images, ((0, 0), (0, 9), (0, 9), (0, 0))), split.labels)
            for name, split in cut.items()
        }
    data = dataclasses.replace(fashion, splits=cut)
    options = {"to": ["tflite", "onnx"], "precision": ["float32"]}
    manifest = export(model, tmp_path / "out", dataset=data, **options)
    assert not any(row["failures"] for row in manifest["artifacts"])


# ----------------------------------------------------------------------------------------------
# Bad input
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing"], "missing: no such model file"),
        (["{run}", "--to", "coreml"], "invalid choice: 'coreml'"),
        (["{run}", "--to", "saved_model", "--precision", "int8"], "saved_model comes in float32"),
        (["{run}", "--dataset", "folder:missing"], "missing"),
        (["{run}", "--out", "{run}"], "an export is written to a new folder"),
        (["{export}/model-int8.onnx"], "made of a run folder or a .keras file"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, exported, trained_run):
    names = {"run": trained_run, "export": exported[0]}
    before = sorted(trained_run.rglob("*"))
    done = run_main("export", *(argument.format(**names) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert sorted(trained_run.rglob("*")) == before


def test_a_keras_model_needs_a_folder_and_data(small_model, tmp_path):
    with pytest.raises(InputError, match="`folder` must be given"):
        export(small_model)
    with pytest.raises(InputError, match="or --dataset folder:"):
        export(small_model, tmp_path / "out")


def test_a_verification_needs_images(small_model, fashion, tmp_path):
    few = {name: Split(s.images[:6], s.labels[:6]) for name, s in fashion.splits.items()}
    with pytest.raises(InputError, match="at least 7 images, got 6"):
        export(
            small_model, tmp_path / "out", dataset=dataclasses.replace(fashion, splits=few), **ONE
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_verification_is_a_table_and_status_1(trained_run, tmp_path, monkeypatch):
    """With a tolerance for float32 that no arithmetic keeps."""
    tolerance = formats.Tolerance(1e-30, 1.0, None)
    monkeypatch.setitem(formats.PRECISIONS, "float32", formats.Precision("", tolerance))
    arguments = ["--to", "onnx", "--precision", "float32", "--out", tmp_path / "out"]
    done = run_main("export", trained_run, *arguments)
    assert done.returncode == 1, done.stderr
    table = [line.split() for line in done.stdout.splitlines()[1:]]
    assert table[0] == ["file", "check", "found", "must", "be"]
    assert table[2][:3] == ["model-float32.onnx", "largest", "difference"]
    assert "1 of 1 artifacts differ from the Keras model" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(1, 80))
def test_images_are_drawn_evenly(labels, count):
    drawn = draw_evenly(labels, count)
    assert len(set(drawn.tolist())) == len(drawn) == min(count, len(labels))
    assert (np.sort(drawn) == drawn).all()
    taken = np.bincount(np.array(labels)[drawn], minlength=5)
    there = np.bincount(labels, minlength=5)
    # No class has two more than another that has images left.
    for one in range(5):
        for other in range(5):
            if taken[other] < there[other]:
                assert taken[one] <= taken[other] + 1


def test_a_foreign_folder_is_evaluated_whole_and_verified_so(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            image = Image.new("RGB", (9 + i % 3, 8), (9 * i, 200 * label, 99))
            image.save(tmp_path / "data" / name / f"{i}.png")
    keras.utils.set_random_seed(1)
    layers = [keras.layers.Rescaling(1 / 255), keras.layers.GlobalAveragePooling2D()]
    inputs = keras.Input((None, None, 3), dtype="uint8")
    model = keras.Sequential([inputs, *layers, keras.layers.Dense(2)])
    archive.save_model(model, tmp_path / "model.keras", {"class_names": ["cat", "dog"]})
    out = tmp_path / "out"
    done = run_main(
        *("export", tmp_path / "model.keras", "--dataset", f"folder:{tmp_path / 'data'}"),
        *("--to", "onnx", "--image-size", 8, "--out", out, "--force"),
    )
    assert done.returncode == 0, done.stderr
    assert "int8 is calibrated on some of the images that it is evaluated on" in done.stderr
    assert "on 40 images: " in done.stdout
    manifest = read_manifest(out)
    assert manifest["data"]["images"] == 40
    assert manifest["data"]["options"]["validation_split"] is None
    copy = shutil.copytree(tmp_path / "data", tmp_path / "elsewhere")
    done = run_main("verify", out, "--dataset", f"folder:{copy}", "--json")
    ran = [row for row in json.loads(done.stdout)["files"] if row.get("agreement") is not None]
    assert {row["accuracy_images"] for row in ran} == {40}
    assert {row["images"] for row in ran} == {40}
