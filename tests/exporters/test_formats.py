"""The tables of formats, precisions and tolerances, and the choice of artifacts."""

import importlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_resnet.exporters import onnx, tflite
from keras_resnet.exporters.formats import (
    OWN_FILES,
    PRECISIONS,
    Tolerance,
    choose_artifacts,
)
from keras_resnet.formats import EXPORTED
from keras_resnet.utils.errors import InputError

QUANTIZED = Tolerance(max_difference=None, agreement=0.985, accuracy_drop=0.003)
TOLERANCES = {
    "float32": Tolerance(max_difference=1e-5, agreement=1.0, accuracy_drop=None),
    "float16": Tolerance(max_difference=2e-3, agreement=0.999, accuracy_drop=None),
    "dynamic": QUANTIZED,
    "int8": QUANTIZED,
    "integer": QUANTIZED,
}
ALL = [
    "saved_model",
    "model-float32.tflite",
    "model-float32-batch1.tflite",
    "model-float16.tflite",
    "model-float16-batch1.tflite",
    "model-dynamic.tflite",
    "model-dynamic-batch1.tflite",
    "model-int8.tflite",
    "model-int8-batch1.tflite",
    "model-float32.onnx",
    "model-float16.onnx",
    "model-int8.onnx",
]
INTEGER = ["model-integer.tflite", "model-integer-batch1.tflite"]


def files(*arguments):
    return [artifact.file for artifact in choose_artifacts(*arguments)]


def test_the_tolerances_are_those_agreed_on():
    assert {name: row.tolerance for name, row in PRECISIONS.items()} == TOLERANCES


def test_only_whole_numbers_take_training_images():
    assert [name for name, row in PRECISIONS.items() if row.is_calibrated] == ["int8", "integer"]


@pytest.mark.parametrize("name", EXPORTED)
def test_a_format_has_a_writer_and_known_precisions_in_the_tables_order(name):
    assert callable(importlib.import_module(f"keras_resnet.exporters.{name}").write)
    own = EXPORTED[name].precisions
    assert own and list(own) == [precision for precision in PRECISIONS if precision in own]


@pytest.mark.parametrize("module", [tflite, onnx])
def test_a_writer_knows_each_precision_of_its_format(module):
    name = module.__name__.rpartition(".")[2]
    known = {"tflite": tflite._SETTINGS, "onnx": onnx._PRECISIONS}[name]
    assert tuple(known) == EXPORTED[name].precisions


def test_all_artifacts_by_name():
    assert files() == ALL
    assert not {*ALL} & {*OWN_FILES}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((["saved_model"],), ALL[:1]),
        ((["onnx", "saved_model"],), [ALL[0], *ALL[9:]]),
        ((["onnx", "onnx"], ["int8", "float32", "int8"]), [ALL[9], ALL[11]]),
        ((["tflite"], ["dynamic"]), ALL[5:7]),
        ((None, ["float32"]), [*ALL[:3], ALL[9]]),
        ((None, ["integer"]), INTEGER),
        ((("onnx",), ("float16",)), ALL[10:11]),
    ],
)
def test_formats_and_precisions_choose_files_once_each_in_the_tables_order(arguments, expected):
    assert files(*arguments) == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["coreml"],), r"`to` must be one of saved_model, tflite, onnx, got 'coreml'"),
        ((None, ["int4"]), r"`precision` must be one of float32, .*, got 'int4'"),
        (([],), r"`to` must be a list of saved_model, .*, got \[\]"),
        ((None, []), r"`precision` must be a list of float32, .*, got \[\]"),
        (("onnx",), r"`to` must be a list of .*, got 'onnx'"),
        ((None, "int8"), r"`precision` must be a list of .*, got 'int8'"),
        (([["onnx"]],), r"`to` must be one of .*, got \['onnx'\]"),
        ((["saved_model"], ["int8"]), "saved_model comes in float32, not in int8"),
        ((["onnx"], ["float32", "dynamic"]), "onnx comes in float32, float16, int8, not in dyn"),
        ((["onnx", "saved_model"], ["int8"]), "saved_model comes in float32, not in int8"),
        (([5],), "`to` must be one of"),
    ],
)
def test_a_name_without_a_file_is_refused(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        choose_artifacts(*arguments)
    assert "\n" not in str(caught.value)


def names(table):
    return st.none() | st.lists(st.sampled_from([*table]), max_size=6)


@given(names(EXPORTED), names(PRECISIONS))
def test_any_choice_is_refused_or_has_a_file_of_every_name(formats, precisions):
    try:
        chosen = choose_artifacts(formats, precisions)
    except InputError as error:
        wanted = precisions or [*PRECISIONS]
        # An empty list is refused, and a name without an artifact.
        assert (
            formats == []
            or precisions == []
            or any(not {*EXPORTED[each].precisions} & {*wanted} for each in formats or EXPORTED)
            or any(
                all(each not in EXPORTED[name].precisions for name in formats or EXPORTED)
                for each in wanted
            )
        ), error
        return
    if formats is not None:
        assert {artifact.format for artifact in chosen} == {*formats}
    if precisions is not None:
        assert {artifact.precision for artifact in chosen} == {*precisions}
    every = [*ALL[:9], *INTEGER, *ALL[9:]]
    places = [every.index(artifact.file) for artifact in chosen]
    assert places == sorted(set(places))
    for artifact in chosen:
        assert artifact.precision in EXPORTED[artifact.format].precisions
        assert artifact.batch in EXPORTED[artifact.format].batches


def test_help_names_every_format_and_precision(capsys):
    from keras_resnet import cli

    with pytest.raises(SystemExit, match="0"):
        cli.main(["export", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in (*EXPORTED, *PRECISIONS))
    assert all(row.description in shown for row in PRECISIONS.values())
