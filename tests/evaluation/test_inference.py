"""Predictions and evaluation of trained models that were loaded from files."""

import json
import shutil
import zipfile

import keras
import numpy as np
import pytest
from conftest import run_main
from PIL import Image, ImageOps

from keras_resnet import archive
from keras_resnet.datasets import load_dataset
from keras_resnet.datasets.images import content_marks
from keras_resnet.evaluation.inference import (
    Predictor,
    evaluate_file,
    load,
    load_data,
    predict_files,
)
from keras_resnet.utils.errors import InputError


@pytest.fixture
def bag(fashion_folder):
    return sorted((fashion_folder / "Bag").iterdir())[0]


def test_a_run_and_its_model_file_predict_the_same(trained_run, fashion):
    images = fashion.splits["test"].images[:7]
    by_run, by_file = load(trained_run), load(trained_run / "model.keras")
    probabilities = by_run(images)
    assert probabilities.shape == (7, 4) and probabilities.dtype == "float32"
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(probabilities, by_file(images))
    logits = keras.ops.convert_to_numpy(by_run.model(images, training=False))
    np.testing.assert_array_equal(probabilities.argmax(axis=1), logits.argmax(axis=1))
    assert by_run.class_names == ("Bag", "Sandal", "Sneaker", "Trouser")


def test_evaluating_a_run_reproduces_its_report(trained_run):
    report = json.loads((trained_run / "report.json").read_text())
    evaluation = evaluate_file(trained_run)
    assert evaluation.accuracy == report["accuracy"]
    assert evaluation.confusion.tolist() == report["confusion_matrix"]


def test_other_data_are_decoded_at_the_input_shape_of_the_model(
    trained_run, fashion_folder, tmp_path
):
    for name in ("Bag", "Sandal", "Sneaker", "Trouser"):
        (tmp_path / name).mkdir()
        for path in sorted((fashion_folder / name).iterdir())[:20]:
            image = Image.open(path).convert("RGB").resize((61, 45))
            image.save(tmp_path / name / path.name)
    evaluation = evaluate_file(trained_run, f"folder:{tmp_path}", validation_split=0.5)
    assert len(evaluation) == 40
    assert evaluation.accuracy > 0.5  # they are its own training images, four classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "Bag"), "knows the classes Bag, Sandal"),
        (lambda folder: (folder / "Bag").rename(folder / "Zebra"), "has Sandal, Sneaker"),
    ],
)
def test_data_of_other_classes_are_refused(trained_run, fashion_folder, tmp_path, change, message):
    copy = tmp_path / "copy"
    shutil.copytree(fashion_folder, copy)
    change(copy)
    with pytest.raises(InputError, match=message):
        evaluate_file(trained_run, f"folder:{copy}")


def test_a_model_without_metadata_needs_a_data_set(trained_run, tmp_path, fashion_folder):
    path = tmp_path / "plain.keras"
    load(trained_run).model.save(path)
    assert load(path).class_names[:2] == ("class 0", "class 1")
    with pytest.raises(InputError, match="name --dataset"):
        evaluate_file(path)
    assert evaluate_file(path, f"folder:{fashion_folder}").accuracy > 0.5


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (lambda image: image, 0),
        (lambda image: image.convert("RGB"), 1e-4),
        (lambda image: image.convert("RGBA"), 1e-4),
        (lambda image: ImageOps.invert(image), 1e-4),
        # Making an image smaller blurs it.
        (lambda image: image.resize((112, 140), Image.Resampling.BICUBIC), 0.3),
    ],
    ids=["as it is", "colour", "alpha", "dark on light", "large"],
)
def test_predict_converts_any_image(trained_run, bag, tmp_path, change, tolerance):
    path = tmp_path / "image.png"
    change(Image.open(bag)).save(path)
    expected, found = (predict_files(trained_run, [each])[0]["labels"][0] for each in (bag, path))
    assert found["label"] == expected["label"]
    assert found["probability"] == pytest.approx(expected["probability"], abs=tolerance)


def test_predict_inverts_on_request(trained_run, bag, tmp_path):
    light = tmp_path / "light.png"
    ImageOps.invert(Image.open(bag)).save(light)
    inverted = {
        (path.name == "light.png", invert): predict_files(trained_run, [path], invert=invert)[0]
        for path in (bag, light)
        for invert in ("auto", "yes", "no")
    }
    assert {key: row["inverted"] for key, row in inverted.items()} == {
        (False, "auto"): False,
        (False, "yes"): True,
        (False, "no"): False,
        (True, "auto"): True,
        (True, "yes"): True,
        (True, "no"): False,
    }
    assert inverted[True, "no"]["labels"] != inverted[True, "yes"]["labels"]


def test_top_counts_labels(trained_run, bag):
    labels = predict_files(trained_run, [bag, bag], top=2)[1]["labels"]
    assert len(labels) == 2 and labels[0]["probability"] >= labels[1]["probability"]
    assert len(predict_files(trained_run, [bag], top=99)[0]["labels"]) == 4


# ----------------------------------------------------------------------------------------------
# The images that a model is evaluated on
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path):
    """A folder of two classes of 20 images that all differ."""
    folder = tmp_path / "photographs"
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True)
        for i in range(20):
            Image.new("RGB", (8, 8), (i, label, 99)).save(folder / name / f"{i}.png")
    return folder


def save_any_size(path, size=(None, None), **metadata):
    """Saves a model of two classes, with the given metadata."""
    layers = [keras.layers.Conv2D(2, 3), keras.layers.GlobalAveragePooling2D()]
    model = keras.Sequential([keras.Input((*size, 3)), *layers, keras.layers.Dense(2)])
    archive.save_model(model, path, {"class_names": ["cat", "dog"], **metadata})
    return path


def test_a_folder_of_images_is_predicted_file_by_file(photographs, tmp_path):
    model = save_any_size(tmp_path / "model.keras")
    (photographs / "cat" / "notes.txt").write_text("no image")
    one = photographs / "dog" / "3.png"
    rows = predict_files(model, [photographs / "cat", one])
    assert [row["image"] for row in rows] == [
        *map(str, sorted((photographs / "cat").glob("*.png"))),
        str(one),
    ]
    (tmp_path / "empty").mkdir()
    done = run_main("predict", model, tmp_path / "empty")
    assert done.returncode == 2 and "empty: the folder holds no images" in done.stderr


@pytest.fixture
def trained_on(photographs, tmp_path):
    """A model trained on 32 of the photographs; 8 were held out."""
    data = load_dataset(f"folder:{photographs}", validation_split=0.2, seed=3)
    settings = {"dataset": data.name, "validation_split": 0.2, "seed": 3}
    return save_any_size(
        tmp_path / "model.keras",
        data={**settings, "fingerprint": data.fingerprint},
        trained_on=content_marks(data.splits["train"].images),
    )


def evaluated_files(model, dataset=None, **options):
    _, split, _ = load_data(load(model), dataset and f"folder:{dataset}", **options)
    return {path.parent.name + path.name for path in split.images.sources}


def test_another_folder_is_evaluated_as_a_whole(photographs, tmp_path, capsys):
    model = save_any_size(tmp_path / "model.keras")
    assert len(evaluate_file(model, f"folder:{photographs}")) == 40
    assert len(evaluate_file(model, f"folder:{photographs}", validation_split=0.5)) == 20
    assert capsys.readouterr().err == ""


def link(folder):
    folder.with_name("link").symlink_to(folder)
    return folder.with_name("link")


@pytest.mark.parametrize(
    "spell",
    [
        lambda folder: None,
        lambda folder: folder,
        lambda folder: f"{folder}/",
        lambda folder: f"{folder.parent}/photographs/../photographs",
        link,
        lambda folder: shutil.copytree(folder, folder.with_name("copy")),
        lambda folder: folder.rename(folder.with_name("moved")),
    ],
    ids=["unnamed", "name", "slash", "dots", "link", "copy", "moved"],
)
def test_the_training_folder_under_any_path_is_split_as_in_training(
    spell, trained_on, photographs, capsys
):
    held_out = evaluated_files(trained_on)
    assert len(held_out) == 8
    assert evaluated_files(trained_on, spell(photographs)) == held_out
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("options", [{"validation_split": 0.7}, {"seed": 0}])
def test_another_split_of_the_training_set_is_refused(options, trained_on, photographs, tmp_path):
    copy = shutil.copytree(photographs, tmp_path / "copy")
    for dataset in (None, photographs, copy):
        with pytest.raises(InputError, match="the model was trained on this set, with --valid"):
            evaluated_files(trained_on, dataset, **options)
    assert evaluated_files(trained_on, validation_split=0.1) < evaluated_files(trained_on)


def test_training_images_in_another_folder_are_counted(trained_on, photographs, tmp_path, capsys):
    held_out = evaluated_files(trained_on)
    other = shutil.copytree(photographs, tmp_path / "other")
    Image.new("RGB", (8, 8), "white").save(other / "cat" / "new.png")
    assert len(evaluated_files(trained_on, other)) == 41
    (line,) = capsys.readouterr().err.splitlines()
    assert "32 of the 41 images measured are files that the model was trained on" in line
    # Where the training folder itself has grown, another part of it is held out.
    Image.new("RGB", (8, 8), "white").save(photographs / "cat" / "0new.png")
    count = len(evaluated_files(trained_on) - held_out - {"cat0new.png"})
    assert f"{count} of the 8 images measured" in capsys.readouterr().err


def test_metadata_without_the_training_files_still_name_the_training_set(
    trained_on, photographs, tmp_path, capsys
):
    predictor = load(trained_on)
    metadata = {name: part for name, part in predictor.metadata.items() if name != "trained_on"}
    archive.save_model(predictor.model, tmp_path / "other.keras", metadata)
    evaluated_files(tmp_path / "other.keras")
    assert capsys.readouterr().err == ""
    Image.new("RGB", (8, 8), "white").save(photographs / "cat" / "0new.png")
    evaluated_files(tmp_path / "other.keras")
    assert "the set has changed since the training" in capsys.readouterr().err


def test_metadata_of_a_run_name_its_training_files(trained_run, fashion_folder):
    metadata = load(trained_run).metadata
    data = load_dataset(f"folder:{fashion_folder}")
    assert metadata["data"]["fingerprint"] == data.fingerprint
    assert metadata["trained_on"] == content_marks(data.splits["train"].images)


def test_images_of_many_sizes_are_evaluated_one_by_one(photographs, tmp_path):
    model = save_any_size(tmp_path / "model.keras")
    for i, path in enumerate(sorted((photographs / "cat").iterdir())):
        Image.new("RGB", (8 + i, 5), (i, 9 * i, 0)).save(path)
    done = run_main("evaluate", model, "--dataset", f"folder:{photographs}", "--json")
    assert done.returncode == 0, done.stderr
    labels = [
        row["labels"] for row in predict_files(model, sorted((photographs / "cat").iterdir()))
    ]
    recall = np.mean([each[0]["label"] == "cat" for each in labels])
    found = json.loads(done.stdout)
    assert found["num_images"] == 40
    assert found["per_class"][0]["recall"] == pytest.approx(recall)
    words = ("evaluate", model, "--dataset", f"folder:{photographs}", "--image-size", 6)
    done = run_main(*words)
    assert done.returncode == 0 and "on 40 images" in done.stdout
    done = run_main(
        "export", model, "--dataset", f"folder:{photographs}", "--out", tmp_path / "out"
    )
    assert done.returncode == 2 and "--image-size" in done.stderr.splitlines()[-1]
    fixed = save_any_size(tmp_path / "fixed.keras", (8, 8))
    done = run_main("evaluate", fixed, *words[2:])
    assert done.returncode == 2 and "takes images of 8×8 pixels" in done.stderr


# ----------------------------------------------------------------------------------------------
# Many files, some of them bad; light and dark
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_unreadable_files_among_others(form, photographs, tmp_path):
    model = save_any_size(tmp_path / "model.keras")
    good = [photographs / "cat" / "0.png", photographs / "dog" / "1.png"]
    (tmp_path / "page.png").write_text("<html>404</html>")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.gif")  # too small for the network
    (tmp_path / "nothing").mkdir()
    names = ("page.png", "none.png", "nothing", "dot.gif")
    bad = [tmp_path / name for name in names]
    done = run_main("predict", model, good[0], *bad, good[1], *form)
    assert done.returncode == 2
    for line, path in zip(done.stderr.splitlines(), bad, strict=True):
        assert line.startswith(f"keras-resnet: {path}: ")
    if form:
        assert [row["image"] for row in json.loads(done.stdout)] == [str(path) for path in good]
    else:
        assert all(str(path) in done.stdout for path in good) and str(bad[0]) not in done.stdout
    done = run_main("predict", model, *bad, *form)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == len(bad)
    assert done.stdout == ("[]\n" if form else "")


@pytest.mark.parametrize(
    ("channels", "background", "inverted"),
    [(1, "dark", True), (1, "light", False), (1, None, False), (3, "dark", False)],
)
def test_only_grey_sets_that_are_light_on_dark_invert(channels, background, inverted, tmp_path):
    metadata = {"class_names": ["a", "b", "c"], "background": background}
    model = small_model(keras.Input((4, 4, channels)))
    archive.save_model(model, tmp_path / "model.keras", metadata)
    for mode in ("L", "RGB"):
        Image.new(mode, (9, 9), "white").save(tmp_path / "white.jpg")
        (row,) = predict_files(tmp_path / "model.keras", [tmp_path / "white.jpg"])
        assert row["inverted"] is inverted
        Image.new(mode, (9, 9), "black").save(tmp_path / "black.jpg")
        assert not predict_files(tmp_path / "model.keras", [tmp_path / "black.jpg"])[0]["inverted"]


# ----------------------------------------------------------------------------------------------
# Files that are refused
# ----------------------------------------------------------------------------------------------


def hdf5(path):
    path = path.with_suffix(".h5")
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path)
    return path


def code(path):
    """A model whose Lambda layer would write a file on being loaded and called."""
    trace = str(path.with_suffix(".ran"))
    model = keras.Sequential(
        [keras.Input((4, 4, 1)), keras.layers.Lambda(lambda x: (open(trace, "w").close(), x)[1])]
    )
    model.save(path)
    path.with_suffix(".ran").unlink(missing_ok=True)
    return path


def truncated(path):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    return path


def text(path):
    path.write_text("not a model")
    return path


def bad_metadata(path):
    archive.save_model(keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]), path, [1])
    return path


def wrong_weights(path):
    """An archive whose weights are noise."""
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path)
    other = path.with_name("other.keras")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            noise = b"noise" * 100 if name.endswith(".h5") else source.read(name)
            target.writestr(name, noise)
    return other


def no_image_model(path):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hdf5, "HDF5 models can carry code"),
        (code, "cannot be loaded"),
        (truncated, "not a .keras file"),
        (text, "not a .keras file"),
        (bad_metadata, "must be a JSON object"),
        (wrong_weights, "damaged"),
        (no_image_model, "must take images"),
        (lambda path: path, "no such model file"),
        (lambda path: path.parent, "no model.keras there"),
    ],
)
def test_files_that_are_refused(tmp_path, make, reason):
    path = make(tmp_path / "model.keras")
    with pytest.raises(InputError, match=reason) as error:
        load(path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.ran"))


def outputs_two(path):
    inputs = keras.Input((4, 4, 1))
    x = keras.layers.Flatten()(inputs)
    keras.Model(inputs, [keras.layers.Dense(2)(x), keras.layers.Dense(3)(x)]).save(path)


def has_no_input(path):
    keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(2)]).save(path)


def takes_four_channels(path):
    small_model(keras.Input((4, 4, 4))).save(path)


def small_model(inputs, activation=None, kernel="glorot_uniform"):
    x = keras.layers.Flatten()(inputs)
    dense = keras.layers.Dense(3, activation, kernel_initializer=kernel)
    return keras.Model(inputs, dense(x))


@pytest.mark.parametrize("save", [outputs_two, has_no_input, takes_four_channels])
def test_models_of_another_kind_are_refused(tmp_path, save):
    save(tmp_path / "model.keras")
    with pytest.raises(InputError, match="must take images"):
        load(tmp_path / "model.keras")


@pytest.mark.parametrize(
    "metadata",
    [
        {"class_names": ["a", "b"]},
        {"class_names": 5},
        {"class_names": "abc"},
    ],
)
def test_metadata_that_do_not_match_are_refused(tmp_path, metadata):
    archive.save_model(small_model(keras.Input((4, 4, 1))), tmp_path / "model.keras", metadata)
    with pytest.raises(InputError, match="the model has 3 outputs, and its metadata"):
        load(tmp_path / "model.keras")


@pytest.mark.parametrize("data", [["x"], {"dataset": 5}, {"dataset": None}, {"other": 1}])
def test_metadata_without_a_data_set_need_one(tmp_path, data):
    path = tmp_path / "model.keras"
    archive.save_model(small_model(keras.Input((4, 4, 1))), path, {"data": data})
    with pytest.raises(InputError, match="name --dataset"):
        evaluate_file(path)


def test_a_softmax_is_not_applied_twice():
    inputs = keras.Input((4, 4, 1))
    with_softmax, logits = small_model(inputs, "softmax"), small_model(inputs)
    logits.set_weights(with_softmax.get_weights())
    images = np.random.default_rng(0).integers(0, 2, (5, 4, 4, 1), dtype="uint8")
    expected = Predictor(logits)(images)
    np.testing.assert_allclose(Predictor(with_softmax)(images), expected, atol=1e-6)


def test_a_model_that_outputs_nan_is_refused():
    model = small_model(keras.Input((4, 4, 1)), kernel=keras.initializers.Constant(np.nan))
    with pytest.raises(InputError, match="not finite"):
        Predictor(model)(np.ones((1, 4, 4, 1), "uint8"))


def test_a_run_that_is_not_finished_says_so(trained_run, tmp_path):
    shutil.copytree(trained_run / "checkpoints", tmp_path / "checkpoints")
    with pytest.raises(InputError, match="has not finished"):
        load(tmp_path)
    assert load(tmp_path / "checkpoints" / "last.keras").class_names[0] == "Bag"


def test_unreadable_images_are_named(trained_run, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG nothing")
    for path, reason in ((bad, "cannot be read"), (tmp_path / "none.png", "no such image")):
        with pytest.raises(InputError, match=f"{path}: {reason}"):
            predict_files(trained_run, [path])
