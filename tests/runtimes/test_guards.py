"""Files that are refused before or while a runtime sees them; every one is really made."""

import json
import os
import shutil

import numpy as np
import pytest
import tiny_exports
from manifests import sample
from onnx import TensorProto, helper, load_model_from_string, numpy_helper

from keras_resnet.runtimes import Prober, open_runtime
from keras_resnet.untrusted import checksums
from keras_resnet.untrusted.manifest import digest
from keras_resnet.utils.errors import InputError


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    return tiny_exports.written(tmp_path_factory)


@pytest.fixture(scope="module")
def prober():
    with Prober() as prober:
        yield prober


def refuse(path, reason, prober=None, trust=False):
    with pytest.raises(InputError, match=reason) as error:
        open_runtime(path, trust=trust, prober=prober)
    assert str(error.value).startswith(str(path.parent)) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------
# Before parsing
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.tflite", "model.onnx", "model.keras"])
def test_a_missing_file_is_named(tmp_path, name):
    refuse(tmp_path / name, "no such model file")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.tflite", "model.onnx"])
def test_what_is_no_whole_file_is_refused(tmp_path, name):
    path = tmp_path / name
    path.touch()
    refuse(path, "from 1 to 2147483647 bytes, got 0")
    os.truncate(path, 2**31)  # a hole: it takes no space
    refuse(path, "got 2147483648")
    path.unlink()
    os.mkfifo(path)
    refuse(path, "must be a regular file")
    path.unlink()
    path.mkdir()
    refuse(path, "the folder has no saved_model.pb")


def test_other_names_are_answered_with_those_there_are(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    refuse(
        path,
        r"must be a \.keras, \.tflite or \.onnx file or the folder of a SavedModel, got .* '\.pt'",
    )
    refuse(path.with_suffix(".h5"), "HDF5 models can carry code")


@pytest.mark.parametrize("name", ["model.tflite", "model.onnx"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda content: content[:3000] + b"\x55" + content[3001:], "damaged or changed"),
        (lambda content: content[:3000], "cannot be loaded"),
        (lambda content: b"x" * 3000, "cannot be loaded"),
    ],
    ids=["changed", "cut", "noise"],
)
def test_damaged_files_are_refused(exports, tmp_path, prober, name, damage, reason):
    path = tmp_path / name
    path.write_bytes(damage((exports / name).read_bytes()))
    refuse(path, reason, prober)
    refuse(path, reason, trust=True)  # trust is for what a file does, not for whether it is whole


def test_an_onnx_file_that_lost_its_checksum_is_refused(exports, tmp_path, prober):
    content = (exports / "model.onnx").read_bytes()
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: content.rindex(checksums.ONNX_CHECKSUM_KEY.encode()) - 4])
    refuse(path, "it has metadata of an export without its checksum", prober)


@pytest.mark.parametrize("name", tiny_exports.FORMATS.values())
def test_a_manifest_beside_the_file_must_fit(exports, tmp_path, prober, name):
    path, other = tmp_path / name, tmp_path / "other"
    copy = shutil.copytree if (exports / name).is_dir() else shutil.copy
    copy(exports / name, path)
    size, sha256 = digest(path)

    def list_with(**changes):
        listed = {**sample()["artifacts"][0], "file": name, "bytes": size, "sha256": sha256}
        manifest = {**sample(), "artifacts": [{**listed, **changes}]}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    list_with()
    assert open_runtime(path, trust=name == "saved_model", prober=prober).run is not None
    for changes in ({"sha256": "0" * 64}, {"bytes": size + 1}):
        list_with(**changes)
        refuse(path, "not the file that its manifest.json lists", prober, trust=True)
    (tmp_path / "manifest.json").write_text("{")
    refuse(path, r"manifest\.json: damaged", prober, trust=True)
    assert not other.exists()


# ----------------------------------------------------------------------------------------------
# SavedModel
# ----------------------------------------------------------------------------------------------


def test_a_saved_model_needs_trust(exports):
    refuse(exports / "saved_model", r"can run code when it is loaded: pass --trust \(trust=True\)")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "saved_model.pb").write_bytes(b"\xff" * 99), "cannot be loaded"),
        (lambda path: shutil.rmtree(path / "variables"), "cannot be loaded"),
        (lambda path: (path / "assets.extra/keras_resnet.json").write_text("["), "damaged"),
        (lambda path: (path / "assets.extra/keras_resnet.json").write_text("[1]"), "JSON object"),
    ],
    ids=["graph", "variables", "metadata", "no metadata"],
)
def test_a_damaged_saved_model_is_refused(exports, tmp_path, damage, reason):
    shutil.copytree(exports / "saved_model", tmp_path / "copy")
    damage(tmp_path / "copy")
    refuse(tmp_path / "copy", reason, trust=True)


def test_a_saved_model_without_the_signature_is_refused(tmp_path):
    import tensorflow as tf

    tf.saved_model.save(tf.Module(), str(tmp_path / "empty"))
    refuse(tmp_path / "empty", "must have the signature serving_default", trust=True)


# ----------------------------------------------------------------------------------------------
# TFLite
# ----------------------------------------------------------------------------------------------


def write_tflite(folder, function, shape=(None, 4, 4, 1), flex=False):
    """Converts `function` of images to a .tflite file."""
    import tensorflow as tf

    module = tf.Module()
    module.serve = tf.function(function, [tf.TensorSpec(shape, tf.uint8, name="image")])
    tiny_exports.save_tensorflow(module, folder / "saved")
    (folder / "model.tflite").write_bytes(tiny_exports.to_tflite(folder / "saved", flex))
    return folder / "model.tflite"


def determinant(image):
    """No TFLite operator computes one."""
    import tensorflow as tf

    square = tf.cast(image[..., 0], tf.float32)
    return {"probabilities": tf.linalg.det(square)[:, None]}


def two_outputs(image):
    import tensorflow as tf

    flat = tf.cast(tf.reshape(image, [-1, 16]), tf.float32)
    return {"a": flat * 2, "b": flat + 1}


def test_custom_operators_of_a_tflite_file_are_refused(tmp_path, prober):
    path = write_tflite(tmp_path, determinant, flex=True)
    reason = r"custom operators \(FlexMatrixDeterminant\) are refused"
    refuse(path, reason, prober)
    refuse(path, reason, trust=True)


def test_a_tflite_file_with_two_outputs_is_refused(tmp_path, prober):
    refuse(write_tflite(tmp_path, two_outputs), "must have one output, got 2", prober)


# ----------------------------------------------------------------------------------------------
# ONNX
# ----------------------------------------------------------------------------------------------


def external(tensor, folder):
    """Moves a tensor's numbers into a file beside the model."""
    (folder / "weights.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.bin")
    return tensor


def floats(name, shape=(10,)):
    return numpy_helper.from_array(np.zeros(shape, "float32"), name)


def in_initializer(model, folder):
    external(next(each for each in model.graph.initializer if each.raw_data), folder)


def in_attribute(model, folder):
    value = external(floats("value"), folder)
    model.graph.node.append(helper.make_node("Constant", [], ["unused"], value=value))


def in_subgraph(model, folder):
    body = helper.make_graph(
        [helper.make_node("Identity", ["inner"], ["out"])],
        "body",
        [],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [10])],
        [external(floats("inner"), folder)],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(
        helper.make_node("If", ["yes"], ["unused"], then_branch=body, else_branch=body)
    )


def in_sparse(model, folder):
    values = external(floats("values", (1,)), folder)
    indices = numpy_helper.from_array(np.zeros(1, "int64"), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10]))


def in_training(model, folder):
    info = model.training_info.add()
    info.algorithm.initializer.append(external(floats("rate"), folder))


def custom_node(model, folder):
    node = helper.make_node("Gelu", ["image"], ["unused"], domain="com.microsoft")
    model.graph.node.append(node)


def custom_in_subgraph(model, folder):
    in_subgraph(model, folder)
    for attribute in model.graph.node[-1].attribute:
        attribute.g.initializer[0].CopyFrom(floats("inner"))
        attribute.g.node[0].domain = "org.example"


def local_function(model, folder):
    body = [helper.make_node("Identity", ["x"], ["y"])]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("org.example", "Mine", ["x"], ["y"], body, opsets)
    model.functions.append(function)


def second_input(model, folder):
    model.graph.input.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [1]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (in_initializer, "tensors in other files are refused"),
        (in_attribute, "tensors in other files are refused"),
        (in_subgraph, "tensors in other files are refused"),
        (in_sparse, "tensors in other files are refused"),
        (in_training, "tensors in other files are refused"),
        (custom_node, r"custom operators \(com\.microsoft\.Gelu\) are refused"),
        (custom_in_subgraph, r"custom operators \(org\.example\.Identity\) are refused"),
        (local_function, r"custom operators \(org\.example\.Mine\) are refused"),
        (second_input, "must have one input, got 2"),
    ],
)
def test_onnx_files_that_reach_further_are_refused(exports, tmp_path, prober, change, reason):
    model = load_model_from_string((exports / "foreign.onnx").read_bytes())
    change(model, tmp_path)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    refuse(path, reason, prober)
    refuse(path, reason, trust=True)
