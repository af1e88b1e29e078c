"""Settings: one field, and the command line, `train`, config.json, resume and report have it."""

import dataclasses
import subprocess
import sys

import pytest

import keras_resnet
from keras_resnet import config
from keras_resnet.config import DataConfig, TrainConfig
from keras_resnet.utils.errors import InputError

# A field more, before anything else of the package is imported.
ONE_MORE = """
import dataclasses, json, sys
import numpy as np
from keras_resnet import config

config.TrainConfig = dataclasses.make_dataclass(
    "More",
    [("paint", str, config._setting("red", "the colour of the bicycle shed"))],
    bases=(config.TrainConfig,),
    frozen=True,
)
from keras_resnet import Dataset, Spec, Split, cli, models, train
from keras_resnet.utils.errors import InputError

models.SPECS["tiny"] = Spec((1,), (4,))
images = np.random.default_rng(0).integers(0, 256, (32, 8, 8, 1), dtype="uint8")
split = Split(images, np.arange(32) % 2)
data = Dataset("noise", ("a", "b"), {"train": split, "test": split}, "made here", "0")
run = train("tiny", data, epochs=1, run_dir=sys.argv[1], verbose=False, paint="blue")
print(json.loads((run.run_dir / "config.json").read_text())["settings"]["paint"])
print([line for line in (run.run_dir / "report.md").read_text().splitlines() if "Paint" in line])
train(dataset=data, run_dir=run.run_dir, resume=True, verbose=False, paint="blue")
try:
    train(dataset=data, run_dir=run.run_dir, resume=True, verbose=False, paint="green")
except InputError as error:
    print(error)
sys.exit(cli.main(["train", "--help"]))
"""


@pytest.mark.thorough
def test_a_field_is_an_option_an_argument_a_record_and_a_row_of_the_report(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ONE_MORE, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    recorded, row, refused, *text = done.stdout.splitlines()
    assert recorded == "blue"
    assert "Paint" in row and "blue" in row
    assert "`paint` was 'blue', got 'green'" in refused
    assert "--paint NAME" in "\n".join(text)
    assert "the colour of the bicycle shed" in " ".join(" ".join(text).split())


def test_a_name_that_is_no_setting_is_named_with_all_that_are():
    with pytest.raises(TypeError, match=r"no setting is named 'epoch'; the settings are .*epochs"):
        keras_resnet.train(epoch=3)


def test_settings_are_documented():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["option"]["help"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "`seed` must be a whole number in 0"),
        ({"seed": 0.5}, "`seed` must be a whole number"),
        ({"weights": 3}, "`weights` must be the path of a checkpoint, got int"),
        ({"freeze": "stem"}, "`freeze` needs `weights`, --freeze needs --weights"),
        ({"weights": "a.pth", "freeze": [1]}, "`freeze` must be a list of names"),
        ({"model": "resnet17"}, "`model` must be one of resnet18"),
        ({"recipe": "slow"}, "`recipe` must be one of quick, fast, d2l"),
        ({"precision": "int8"}, "`precision` must be one of auto, float32"),
        ({"class_weights": "heavy"}, "`class_weights` must be one of none, balanced, got 'heavy'"),
        ({"normalize": "zca"}, "`normalize` must be one of none"),
    ],
)
def test_values_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings).check()


def test_names_of_modules_are_read_from_text():
    settings = TrainConfig(weights="a.pth", freeze="stem, stage1,stem")
    assert settings.freeze == ["stem", "stage1"]
    assert TrainConfig(weights="a.pth", freeze=[]).freeze is None


def test_a_resumed_run_takes_other_epochs_alone():
    before = TrainConfig(epochs=2, weights="a.pth")
    assert before.resume({"epochs": 5, "weights": "a.pth", "seed": None}).epochs == 5
    with pytest.raises(InputError, match="`seed` was 0, got 1; leave it out"):
        before.resume({"seed": 1})


def test_a_record_gives_the_data_settings_of_the_right_types():
    record = {
        "dataset": "folder:x",
        "validation_split": "0.1",
        "skip_bad": True,
        "seed": 3,
        "data_dir": None,
        "fingerprint": "0",
    }
    found = config.recorded_data_settings(record)
    assert found == {"dataset": "folder:x", "skip_bad": True, "seed": 3}
    assert DataConfig(**found).validation_split == 0.1


@pytest.mark.parametrize(
    ("settings", "recipe"),
    [
        ({}, "quick"),
        ({"dataset": "folder:x"}, "photos"),
        ({"dataset": "folder:x", "recipe": "d2l"}, "d2l"),
        ({"dataset": "tfds:cifar10"}, "quick"),
    ],
)
def test_the_data_choose_the_recipe_where_none_is_named(settings, recipe):
    assert TrainConfig(**settings).recipe == recipe
    assert "default: photos for a folder, else quick" in options_text("--recipe")


def options_text(option):
    return config.options(TrainConfig)[option]["help"]
