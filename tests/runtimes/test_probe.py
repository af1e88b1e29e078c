"""Files that would crash, stop or fill the process that loads them."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_exports
from onnx import TensorProto, helper, numpy_helper

from keras_resnet.runtimes import Prober, open_runtime
from keras_resnet.utils.errors import InputError

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    return tiny_exports.written(tmp_path_factory)


def hostile(nodes, **constants):
    """Returns an .onnx file whose outputs also need a number that `nodes` compute: "extra"."""
    shape = ["batch", 8, 8, 1]
    constants["kernel"] = np.ones((64, 3), "float32")
    nodes = [
        *nodes,
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Flatten", ["floats"], ["flat"]),
        helper.make_node("MatMul", ["flat", "kernel"], ["y"]),
        helper.make_node("Add", ["y", "extra"], ["probabilities"]),
    ]
    graph = helper.make_graph(
        nodes,
        "hostile",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def fills_memory():
    """Asks for 64 GB in one tensor."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["large"]),
        helper.make_node("ReduceSum", ["large"], ["extra"], keepdims=0),
    ]
    return hostile(nodes, shape=np.array([2**17, 2**17], "int64"))


def never_ends():
    """Loops for as long as its condition holds, which it does."""
    tensors = {"condition": TensorProto.BOOL, "carried": TensorProto.FLOAT}
    counter = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    body = helper.make_graph(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in tensors],
        "body",
        [counter, *(helper.make_tensor_value_info(n, kind, []) for n, kind in tensors.items())],
        [helper.make_tensor_value_info(f"{n}_out", kind, []) for n, kind in tensors.items()],
    )
    nodes = [helper.make_node("Loop", ["", "yes", "zero"], ["extra"], body=body)]
    return hostile(nodes, yes=True, zero=np.float32(0))


def test_a_model_that_fills_the_memory_is_refused(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(fills_memory())
    with pytest.raises(InputError, match=r"model\.onnx: .*(allocate memory|more memory)"):
        open_runtime(path)


@pytest.mark.timeout(60)
def test_a_model_that_never_ends_is_refused_and_the_next_one_is_tried(tmp_path, exports):
    path = tmp_path / "model.onnx"
    path.write_bytes(never_ends())
    with Prober(seconds=5) as prober:
        start = time.monotonic()
        with pytest.raises(InputError, match="hostile: the process took more than 5 s"):
            open_runtime(path, prober=prober)
        assert time.monotonic() - start < 15
        assert open_runtime(exports / "model.onnx", prober=prober).output.shape == (None, 10)


def test_a_crash_is_an_error_and_the_next_file_is_tried(tmp_path, exports):
    """A child that a signal ends in the middle of a model, as a fault in a runtime would."""
    path = tmp_path / "model.onnx"
    path.write_bytes(never_ends())
    with Prober(seconds=60) as prober:

        def crash():
            while prober._remote is None or _cpu_seconds(prober._remote.pid) < 1:
                time.sleep(0.05)
            os.kill(prober._remote.pid, signal.SIGSEGV)

        thread = threading.Thread(target=crash)
        thread.start()
        with pytest.raises(InputError, match=r"damaged or hostile: .* crashed \(SIGSEGV\)"):
            open_runtime(path, prober=prober)
        thread.join()
        images = tiny_exports.images(2)
        assert open_runtime(exports / "model.tflite", prober=prober).run(images).shape == (2, 10)


def test_a_child_that_ended_between_two_files_is_replaced(exports):
    with Prober() as prober:
        open_runtime(exports / "model.tflite", prober=prober)
        os.kill(prober._remote.pid, signal.SIGKILL)
        os.waitid(os.P_PID, prober._remote.pid, os.WEXITED | os.WNOWAIT)
        assert open_runtime(exports / "model.onnx", prober=prober).output.shape == (None, 10)


def _cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def writing_into_constants(content):
    """Yields a .tflite file for each tensor that its first PAD is made to write to.

    LiteRT 2.3 does not check that it may: the weights are in read-only memory.
    """
    from ai_edge_litert import schema_py_generated as schema

    model = schema.Model.GetRootAs(content, 0)
    graph = model.Subgraphs(0)
    codes = [model.OperatorCodes(i) for i in range(model.OperatorCodesLength())]
    pad = next(
        operator
        for operator in map(graph.Operators, range(graph.OperatorsLength()))
        if codes[operator.OpcodeIndex()].BuiltinCode() == schema.BuiltinOperator.PAD
    )
    place = pad._tab.Vector(pad._tab.Offset(8))  # its outputs
    for tensor in range(graph.TensorsLength()):
        changed = bytearray(content)
        changed[place] = tensor
        yield bytes(changed)


def test_a_file_that_makes_the_runtime_crash_is_refused(tmp_path, exports):
    path = tmp_path / "model.tflite"
    reasons = []
    with Prober() as prober:
        for content in writing_into_constants((exports / "foreign.tflite").read_bytes()):
            path.write_bytes(content)
            try:
                open_runtime(path, prober=prober)
            except InputError as error:
                reasons.append(str(error))
    crashed = [each for each in reasons if "crashed (SIGSEGV)" in each]
    assert crashed and crashed[0].startswith(f"{path}: damaged or hostile: ")


def test_one_child_tries_many_files_without_keras(exports):
    with Prober() as prober:
        open_runtime(exports / "model.tflite", prober=prober)
        child = prober._remote.pid
        open_runtime(exports / "model.onnx", prober=prober)
        assert prober._remote.pid == child
        loaded = Path(f"/proc/{child}/maps").read_text()
        assert "onnxruntime" in loaded and "ai_edge_litert" in loaded
        assert "tensorflow/" not in loaded and "h5py" not in loaded
    assert not Path(f"/proc/{child}").exists()


def test_a_small_memory_limit_is_kept(exports):
    with Prober(memory=2**20) as prober, pytest.raises(InputError, match=r"model\.onnx: "):
        open_runtime(exports / "model.onnx", prober=prober)
