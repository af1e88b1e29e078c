"""The .keras file: its metadata, models of every kind, and hostile archives."""

import io
import zipfile

import h5py
import keras
import numpy as np
import pytest

from keras_resnet import Spec, archive, build_resnet, with_preprocessing
from keras_resnet.untrusted import keras_files
from keras_resnet.utils.errors import InputError


def small_model():
    inputs = keras.Input((4, 4, 1))
    return keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Flatten()(inputs)))


def test_metadata_are_saved_with_the_model(tmp_path):
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    path = tmp_path / "model.keras"
    archive.save_model(model, path, {"class_names": ["ä", "b"]})
    assert archive.read_metadata(path) == {"class_names": ["ä", "b"]}
    # Keras itself reads the file as it reads its own.
    loaded = keras.models.load_model(path)
    np.testing.assert_array_equal(loaded.get_weights()[0], model.get_weights()[0])


def test_the_old_name_of_the_validation_split_is_understood(tmp_path):
    path = tmp_path / "model.keras"
    archive.save_model(small_model(), path, {"data": {"validation_share": 0.2, "seed": 1}})
    assert archive.read_metadata(path) == {"data": {"validation_split": 0.2, "seed": 1}}


# Hostile archives


def edited(path, built=None, **changes):
    """Writes an archive again with members changed: "config" is the name up to its dot."""
    (built or small_model()).save(path)
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in members.items():
            change = changes.get(name.split(".")[0], lambda content: content)
            target.writestr(name, change(content))
    return path


def config_with(old, new):
    def change(content):
        assert old in content
        return content.replace(old, new)

    return lambda path, built=None: edited(path, built, config=change)


def changed_byte(path):
    small_model().save(path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("model.weights.h5").header_offset + 3000] ^= 1
    path.write_bytes(content)
    return path


def one_name_twice(path):
    small_model().save(path)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("config.json", "{}")
    return path


def unpacks_to_much(path):
    return edited(path, metadata=lambda content: bytes(2**27))


def takes_large_images(path):
    inputs = keras.Input((400_000, 400_000, 1))
    keras.Model(inputs, keras.layers.GlobalAveragePooling2D()(inputs)).save(path)
    return path


def claims_large_tensors(path):
    """HDF5 stores nothing of a tensor until its numbers are written."""

    def change(content):
        file = io.BytesIO(content)
        with h5py.File(file, "a") as weights:
            group = weights["layers/dense/vars"]
            del group["0"]
            group.create_dataset("0", (2**20, 2**12), "float32", chunks=(1024, 1024))
        return file.getvalue()

    return edited(path, model=change)


def leads_to_another_file(path):
    """A link in the weights, which Keras may follow."""

    def change(content):
        file = io.BytesIO(content)
        with h5py.File(file, "a") as weights:
            group = weights["layers/dense/vars"]
            del group["0"]
            group["0"] = h5py.ExternalLink("/etc/other.h5", "/x")
        return file.getvalue()

    return edited(path, model=change)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            config_with(b'"units": 3', b'"units": 3000000000'),
            r"the model's variables claim over 4 times the file's size \(2040",
        ),
        (config_with(b'"units": 3', b'"units": 1e999'), "cannot be loaded"),
        (takes_large_images, "a layer would output 160000000000 elements for one image"),
        (lambda path: edited(path, config=lambda content: b"[" * 10**5), "damaged: maximum"),
        (lambda path: edited(path, config=lambda content: b"[]"), "damaged"),
        (lambda path: edited(path, config=lambda content: b" " * 2**25), "config.json is larger"),
        (changed_byte, "damaged: 'model.weights.h5' in it was changed"),
        (one_name_twice, "damaged: it holds two members of one name"),
        (unpacks_to_much, r"its members claim over 100 times the file's size \(1342\d+ bytes"),
        (claims_large_tensors, r"its tensors claim over 4 times the file's size \(17179869"),
        (leads_to_another_file, "refused: '0' in it is a link"),
    ],
    ids=[
        *("units", "infinite", "shape", "nested", "list", "long", "changed", "twice", "zeros"),
        *("tensors", "link"),
    ],
)
def test_hostile_archives_are_refused(tmp_path, make, reason):
    path = make(tmp_path / "model.keras")
    with pytest.raises(InputError, match=reason) as error:
        archive.load_model(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_layer_s_own_error_names_the_file(tmp_path):
    """A layer knows no file: its message alone would not tell which one is damaged."""
    network = build_resnet(Spec((1,), (4,)), (8, 8, 1), 3)
    path = tmp_path / "model.keras"
    change = config_with(b"[null, 8, 8, 1]", b"[null, 8, 8, 7]")
    change(path, with_preprocessing(network, (8, 8, 1)))
    with pytest.raises(InputError, match="1 or 3") as caught:
        archive.load_model(path)
    assert str(caught.value).startswith(f"{path}: cannot be loaded: preprocessing takes")


def test_a_compressed_file_of_a_pruned_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(keras_files, "SLACK_BYTES", 0)
    model = keras.Sequential([keras.Input((256,)), keras.layers.Dense(256)])
    kernel = np.zeros((256, 256), "float32")
    kernel[::20] = np.random.default_rng(0).normal(size=kernel[::20].shape)
    model.layers[0].set_weights([kernel, np.zeros(256)])
    model.save(tmp_path / "plain.keras")
    path = tmp_path / "compressed.keras"
    with (
        zipfile.ZipFile(tmp_path / "plain.keras") as source,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert path.stat().st_size < (tmp_path / "plain.keras").stat().st_size / 5
    np.testing.assert_array_equal(archive.load_model(path).get_weights()[0], kernel)


@pytest.mark.parametrize("member", ["model.weights.h5", "keras_resnet.json"])
def test_weights_of_a_damaged_archive_are_not_loaded(tmp_path, member):
    model, path = small_model(), tmp_path / "model.keras"
    archive.save_model(model, path, {})
    with zipfile.ZipFile(path) as source:
        place = source.getinfo(member).header_offset + 30 + len(member)
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)
    with pytest.raises(InputError, match="damaged"):
        archive.load_weights(model, path)


def recurrent():
    inputs = keras.Input((5,))
    x = keras.layers.Embedding(100, 8)(inputs)
    return keras.Model(inputs, keras.layers.Bidirectional(keras.layers.LSTM(3))(x))


def never_built():
    return keras.Sequential([keras.layers.Dense(2)])


def built_by_call():
    model = keras.Sequential([keras.layers.Dense(2), keras.layers.BatchNormalization()])
    model(np.zeros((1, 7), "float32"))
    return model


def nested_and_shared():
    inner = keras.Sequential([keras.Input((5,)), keras.layers.Dense(5)])
    inputs = keras.Input((5,))
    return keras.Model(inputs, inner(inner(inputs)))


@keras.saving.register_keras_serializable()
class OfItsOwnClass(keras.Model):
    """A model that only its own code can build."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(x)


def subclassed():
    model = OfItsOwnClass()
    model(np.zeros((1, 7), "float32"))
    return model


def adapted():
    layer = keras.layers.Normalization()
    layer.adapt(np.arange(20.0).reshape(4, 5))
    return keras.Sequential([keras.Input((5,)), layer, keras.layers.Dropout(0.5)])


@pytest.mark.parametrize(
    "build", [recurrent, never_built, built_by_call, nested_and_shared, subclassed, adapted]
)
def test_models_of_every_kind_are_loaded(tmp_path, build):
    model = build()
    archive.save_model(model, tmp_path / "model.keras", {})
    loaded = archive.load_model(tmp_path / "model.keras")
    for own, found in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(found, own)
    # The check of its size leaves no variable behind that a later scope would create.
    with keras.StatelessScope():
        pass
