"""The weights of keras.applications: every kind of file gives the same, hostile files none."""

import json
import zipfile
from pathlib import Path

import h5py
import keras
import ml_dtypes
import numpy as np
import pytest
from keras import layers, ops

from keras_resnet import archive
from keras_resnet.models import Spec, build_resnet
from keras_resnet.utils.errors import InputError
from keras_resnet.weights import LAYOUTS, load_keras_applications_weights, load_tensors
from keras_resnet.weights.applications import read_keras_applications

pytestmark = pytest.mark.thorough

BODY = Spec((1,), (4,), "bottleneck")
NETWORKS = {"keras_v1": "ResNet50", "keras_v2": "ResNet50V2"}
FORMS = ["a model", "model.keras", "model.h5", "weights.h5"]


def weights_of(model):
    return {weight.path: ops.convert_to_numpy(weight) for weight in model.weights}


def randomized(model):
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 1, w.shape) for w in model.weights])
    return model


def message(source):
    """The one line with which `source` is refused; nothing is assigned."""
    model = build_resnet(Spec((1,), (4,), "bottleneck"), (None, None, 3), 5, variant="keras_v1")
    before = weights_of(model)
    with pytest.raises(InputError) as caught:
        load_keras_applications_weights(model, source)
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and len(text) < 500
    if isinstance(source, Path):
        assert text.startswith(f"{source}: ")
    for path, array in weights_of(model).items():
        np.testing.assert_array_equal(array, before[path])
    return text


# Loaded weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Returns a function: layout -> a network of keras.applications, the folder of its files."""
    cache = {}

    def make(layout):
        if layout not in cache:
            folder = tmp_path_factory.mktemp(layout)
            network = getattr(keras.applications, NETWORKS[layout])
            model = randomized(network(weights=None, classes=5, classifier_activation=None))
            model.save(folder / "model.keras")
            model.save(folder / "model.h5")
            save_as_published(model, folder / "weights.h5")
            cache[layout] = model, folder
        return cache[layout]

    return make


def save_as_published(model, path):
    """Writes the weights as Keras 2 did, the form in which keras.applications publishes them."""
    from keras.src.legacy.saving import legacy_h5_format

    with h5py.File(path, "w") as file:
        legacy_h5_format.save_weights_to_hdf5_group(file, model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", NETWORKS)
def test_they_come_from_a_model_and_from_files(published, layout, form):
    theirs, folder = published(layout)
    model = build_resnet("resnet50", (None, None, 3), 5, variant=layout)
    source = theirs if form == "a model" else folder / form
    transfer = load_keras_applications_weights(model, source)
    assert (transfer.layout, transfer.num_tensors) == (layout, len(theirs.weights))
    expected = weights_of(theirs)
    for path, value in weights_of(model).items():
        np.testing.assert_array_equal(value, expected[LAYOUTS[layout].name(path)])


def small(head=True):
    """A network with every kind of variable; layers with no bias, no gamma and no beta too."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv1_conv")(inputs)
    x = layers.BatchNormalization(name="conv1_bn")(x)
    x = layers.Conv2D(4, 1, use_bias=False, name="a")(x)
    x = layers.BatchNormalization(scale=False, name="b")(x)
    x = layers.BatchNormalization(center=False, name="c")(layers.ReLU()(x))
    x = layers.GlobalAveragePooling2D()(x)
    return randomized(keras.Model(inputs, layers.Dense(5, name="predictions")(x) if head else x))


def fine_tuned():
    """A network around another, with an optimizer whose state is saved as well."""
    inputs = keras.Input((8, 8, 3))
    outputs = layers.Dense(2, name="predictions")(layers.Dropout(0.1)(small(head=False)(inputs)))
    model = keras.Model(inputs, outputs)
    model.compile("adam", "mse")
    model.fit(np.zeros((2, 8, 8, 3)), np.zeros((2, 2)), verbose=0)
    return model


@pytest.mark.parametrize("make", [small, fine_tuned])
def test_a_keras_file_is_read_without_building_what_it_describes(tmp_path, make, monkeypatch):
    model = make()
    model.save(tmp_path / "model.keras")
    monkeypatch.setattr(keras.models, "load_model", None)
    found = read_keras_applications(tmp_path / "model.keras")
    expected = weights_of(model)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_a_model_within_a_model_is_read_from_h5(tmp_path):
    model = fine_tuned()
    model.save(tmp_path / "model.h5")
    found = read_keras_applications(tmp_path / "model.h5")
    assert found.keys() == weights_of(model).keys()
    for name, array in weights_of(model).items():
        np.testing.assert_array_equal(found[name], array)


def test_a_head_of_ones_own_is_loaded_or_left_out():
    body = build_resnet(BODY, (None, None, 3), 5, variant="keras_v1")
    names = {weight.path: LAYOUTS["keras_v1"].name(weight.path) for weight in body.weights}
    tensors = {
        name: np.asarray(w) for (_, name), w in zip(names.items(), body.weights, strict=True)
    }
    for part in ("kernel", "bias"):
        tensors[f"sequential/dense_3/{part}"] = tensors.pop(f"predictions/{part}") + 1
    assert load_tensors(body, tensors).num_tensors == len(tensors)
    kernel = weights_of(body)["logits/kernel"]
    np.testing.assert_array_equal(kernel, tensors["sequential/dense_3/kernel"])
    other = build_resnet(BODY, (None, None, 3), 9, variant="keras_v1")
    skipped = load_tensors(other, tensors, skip_head=True).skipped
    assert skipped == ("sequential/dense_3/bias", "sequential/dense_3/kernel")


def test_variables_of_other_layers_are_seen(tmp_path):
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layers.DepthwiseConv2D(3)(layers.Conv2D(4, 3)(inputs)))
    model.save(tmp_path / "model.keras")
    found = read_keras_applications(tmp_path / "model.keras")
    assert {"depthwise_conv2d/0", "depthwise_conv2d/1"} < found.keys()


def test_names_are_kept_as_they_are(tmp_path):
    path = write_h5(tmp_path / "w.h5", {"module.a": np.ones(1), "module.b": np.ones(1)})
    assert set(read_keras_applications(path)) == {"module.a/kernel", "module.b/kernel"}


# Sources that are no files of weights


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.h5", None, "no such checkpoint file"),
        ("x" * 300 + ".h5", None, "no such checkpoint file"),
        ("garbage.h5", b"no h5 at all", "cannot be read as weights of keras.applications"),
        ("empty.h5", b"", "is empty"),
        ("garbage.keras", b"no zip at all", "not a .keras file"),
        ("weights.npz", b"", "must end in .keras or .h5, got .npz"),
        ("weights", b"", "must end in .keras or .h5, got no suffix"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, reason):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert reason in message(tmp_path / name)


@pytest.mark.parametrize("source", [{"a": 1}, None, 3])
def test_other_sources_are_refused(source):
    text = f"a model, or the path of a .keras or .h5 file, got {type(source).__name__}"
    assert text in message(source)


def test_weights_that_keras_3_saved_need_their_model(tmp_path):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    model.save_weights(tmp_path / "new.weights.h5")
    assert "must be loaded into its own model" in message(tmp_path / "new.weights.h5")


def test_a_model_without_weights_is_refused():
    inputs = keras.Input((4,))
    assert "the model given: holds no tensors" in message(
        keras.Model(inputs, layers.ReLU()(inputs))
    )


# Tensors of no use, in every form


def write_h5(path, arrays, variable="kernel"):
    """Writes a .h5 file as Keras 2 did, one variable per layer: an array or a function."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [name.encode() for name in arrays]
        for name, array in arrays.items():
            group = file.create_group(name)
            group.attrs["weight_names"] = [variable.encode()]
            if callable(array):
                array(group)
            else:
                group[variable] = array
    return path


def bad_model(value, folder, form):
    """Writes a network with `value` as one of its tensors; returns the file's path."""
    path = folder / f"model.{form}"
    if form == "h5":
        return write_h5(path, {"conv1_conv": np.ones(3, "float32"), "bad": value})
    small().save(folder / "good.keras")
    return rewritten(folder / "good.keras", path, lambda file: put(file, value))


def put(file, value):
    variables = file["layers/batch_normalization_2/vars"]
    del variables["0"]
    variables["0"] = value


def rewritten(source, target, change=None, config=None):
    """Writes a copy of a `.keras` file with other weights or another config."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        weights = target.with_name("model.weights.h5")
        weights.write_bytes(old.read("model.weights.h5"))
        if change:
            with h5py.File(weights, "a") as file:
                change(file)
        content = json.loads(old.read("config.json"))
        if config:
            config(content["config"]["layers"])
        new.writestr("metadata.json", old.read("metadata.json"))
        new.writestr("config.json", json.dumps(content))
        new.write(weights, "model.weights.h5")
    return target


BAD_TENSORS = {
    "NaN": (np.float32([1, np.nan]), "holds NaN or infinity"),
    "infinity": (np.float64([1, -np.inf]), "holds NaN or infinity"),
    "integers": (np.int32([1, 2]), "must be one of float16.*got int32"),
    "texts": (np.array([b"x", b"y"], object), "must be one of float16.*got object"),
    "bfloat16": (np.ones(2, ml_dtypes.bfloat16), "must be one of float16.*got void16"),
    "no numbers": (np.ones((0, 4), "float32"), "at least one number along each axis"),
    "nothing": (h5py.Empty("float32"), "must be a tensor"),
}


@pytest.mark.parametrize("form", ["h5", "keras"])
@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_tensor_of_no_use_is_named(tmp_path, case, form):
    value, reason = BAD_TENSORS[case]
    path = bad_model(value, tmp_path, form)
    name = "bad/kernel" if form == "h5" else "c/beta|c/gamma"
    with pytest.raises(InputError, match=f"'({name})'.*{reason}"):
        read_keras_applications(path)
    message(path)


def test_a_model_that_has_diverged_is_refused():
    model = small()
    model.get_layer("conv1_bn").gamma.assign([1, 2, np.nan, 4])
    assert "the model given: 'conv1_bn/gamma' holds NaN" in message(model)


# Names


def test_a_name_that_comes_twice_is_refused(tmp_path):
    def two(group):
        group.attrs["weight_names"] = [b"x/kernel:0", b"y/kernel:0"]
        group["x/kernel:0"] = group["y/kernel:0"] = np.ones(2, "float32")

    path = write_h5(tmp_path / "w.h5", {"conv": two})
    assert "a name of its own, got 'conv/kernel' twice" in message(path)


def rename(content):
    content[1]["config"]["name"] = "a"


def more_filters(content):
    content[-1]["config"]["units"] = 3 * 10**8


def no_bias(content):
    content[1]["config"]["use_bias"] = False


def reversed_convolutions(content):
    content[1], content[3] = content[3], content[1]
    assert content[1]["class_name"] == content[3]["class_name"] == "Conv2D"


@pytest.mark.parametrize("config", [rename, no_bias, reversed_convolutions])
def test_a_description_of_another_model_is_refused(tmp_path, config):
    small().save(tmp_path / "good.keras")
    path = rewritten(tmp_path / "good.keras", tmp_path / "bad.keras", config=config)
    assert "not those of the model it describes" in message(path)


def test_a_model_with_one_name_for_two_tensors_is_refused():
    inputs = keras.Input((4,))
    inner = keras.Model(inputs, layers.Dense(4, name="a")(inputs))
    model = keras.Model(inputs, layers.Dense(4, name="a")(inner(inputs)))
    assert "got 'a/kernel' twice" in message(model)


# Files made to fill the memory, or to read others


def unwritten(group, name="kernel"):
    group.create_dataset(name, (3 * 10**8,), "float32", chunks=(10**6,))


def overflowing(group, name="kernel"):
    group.create_dataset(name, (2**32, 2**32), "float32", chunks=(1, 10**6))


@pytest.mark.parametrize("create", [unwritten, overflowing])
@pytest.mark.parametrize("form", ["h5", "keras"])
def test_a_small_file_that_claims_much_is_refused_unread(tmp_path, create, form, monkeypatch):
    def change(file):
        del file["layers/dense/vars/0"]
        create(file["layers/dense/vars"], "0")

    if form == "h5":
        path = write_h5(tmp_path / "w.h5", {"a": np.ones(2, "float32"), "conv": create})
    else:
        small().save(tmp_path / "good.keras")
        path = rewritten(tmp_path / "good.keras", tmp_path / "bad.keras", change)
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(h5py.Dataset, "__getitem__", None)
    assert "its tensors claim over 4 times the file's size" in message(path)


def test_one_data_set_under_many_names_is_refused_unread(tmp_path, monkeypatch):
    path = write_h5(tmp_path / "w.h5", {"layer0": np.ones(10**4, "float32")})
    with h5py.File(path, "a") as file:
        names = [f"layer{n}" for n in range(50)]
        file.attrs["layer_names"] = [name.encode() for name in names]
        for name in names[1:]:
            file[name] = file["layer0"]
    monkeypatch.setattr(h5py.Dataset, "__getitem__", None)
    assert "its tensors claim over 4 times the file's size" in message(path)


def test_a_keras_file_that_unpacks_to_much_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.keras", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("config.json", b" " * 10**7)
        file.writestr("model.weights.h5", b"")
    assert "claim over 4 times" in message(tmp_path / "bomb.keras")


def test_a_described_layer_is_not_built(tmp_path):
    small().save(tmp_path / "good.keras")
    path = rewritten(tmp_path / "good.keras", tmp_path / "huge.keras", config=more_filters)
    assert read_keras_applications(path)["predictions/kernel"].shape == (4, 5)


def external(group):
    group.create_dataset("kernel", (2,), "float32", external=[("/etc/passwd", 0, 8)])


def virtual(group):
    source = h5py.VirtualSource("/tmp/other.h5", "x", (2,), "float32")
    layout = h5py.VirtualLayout((2,), "float32")
    layout[:] = source
    group.create_virtual_dataset("kernel", layout)


def external_link(group):
    group["kernel"] = h5py.ExternalLink("/etc/passwd", "/x")


def soft_link(group):
    group["kernel"] = h5py.SoftLink("/a/kernel")


def a_group(group):
    group.create_group("kernel")


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        (external, "refused: the numbers of 'conv/kernel' are in another file"),
        (virtual, "refused: the numbers of 'conv/kernel' are in another file"),
        (external_link, "refused: 'kernel' in it is a link"),
        (soft_link, "refused: 'kernel' in it is a link"),
        (a_group, "'kernel' in it must be a Dataset, got a Group"),
    ],
)
def test_what_leads_to_another_file_is_refused(tmp_path, create, reason):
    path = write_h5(tmp_path / "w.h5", {"a": np.ones(2, "float32"), "conv": create})
    assert reason in message(path)


def test_a_link_in_place_of_a_layer_is_refused(tmp_path):
    write_h5(tmp_path / "other.h5", {"conv": np.ones(2, "float32")})
    path = write_h5(tmp_path / "w.h5", {"conv": np.ones(2, "float32")})
    with h5py.File(path, "a") as file:
        del file["conv"]
        file["conv"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/conv")
    assert "refused: 'conv' in it is a link" in message(path)


# Files that Keras refuses to load


def test_code_is_refused_without_advice_to_run_it(tmp_path):
    inputs = keras.Input((4, 4, 3))
    keras.Model(inputs, layers.Lambda(lambda x: x + 1)(inputs)).save(tmp_path / "model.keras")
    with pytest.raises(InputError) as caught:
        archive.load_model(tmp_path / "model.keras")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'model.keras'}: cannot be loaded: it holds code")
    assert "safe_mode" not in text and "unsafe" not in text and "trust" not in text
    assert len(text.splitlines()) == 1


def test_weights_that_do_not_fit_their_layers_are_told_of(tmp_path):
    def remove(file):
        del file["layers/dense/vars/0"]

    small().save(tmp_path / "good.keras")
    path = rewritten(tmp_path / "good.keras", tmp_path / "bad.keras", remove)
    with pytest.raises(InputError, match=r"object <Dense name=predictions.*>: \S+") as caught:
        archive.load_model(path)
    assert len(str(caught.value).splitlines()) == 1
