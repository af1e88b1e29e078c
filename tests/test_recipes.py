"""Recipes and precision: tables that other tables must know."""

import dataclasses
import platform
from pathlib import Path

import pytest

from keras_resnet import models, preprocessing
from keras_resnet.config import PRECISIONS
from keras_resnet.recipes import RECIPES
from keras_resnet.training import trainer
from keras_resnet.training.precision import POLICIES, choose_precision
from keras_resnet.utils.errors import InputError


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_name_rows_that_exist(recipe):
    assert recipe.optimizer in trainer.OPTIMIZERS
    assert recipe.schedule in trainer.SCHEDULES
    assert recipe.variant in models.VARIANTS
    assert recipe.stem in (None, *models.STEMS)
    assert set(recipe.augmentation) <= set(preprocessing.AUGMENTATIONS)


def test_d2l_is_the_recipe_of_the_book():
    d2l = RECIPES["d2l"]
    assert (d2l.image_size, d2l.batch_size, d2l.epochs) == (96, 256, 5)
    assert (d2l.optimizer, d2l.learning_rate, d2l.schedule) == ("adam", 1e-3, "constant")
    assert (d2l.variant, d2l.stem, d2l.augmentation) == ("d2l", None, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "`epochs` must be a whole number of at least 1, got 0"),
        ({"batch_size": 2.0}, "`batch_size` must be a whole number"),
        ({"image_size": True}, "`image_size` must be a whole number"),
        ({"learning_rate": -1}, "`learning_rate` must be positive and finite, got -1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be positive and finite, got nan"),
    ],
)
def test_recipes_out_of_range(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(RECIPES["quick"], **change)


def test_precisions_are_those_of_the_command_line():
    assert ("auto", *POLICIES) == PRECISIONS
    with pytest.raises(InputError, match="must be one of auto, float32"):
        choose_precision("int8")
    for name in POLICIES:
        assert choose_precision(name) == (name, "as given")


def test_auto_is_bfloat16_where_the_processor_has_it():
    import tensorflow as tf

    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this machine computes on a GPU")
    precision, reason = choose_precision("auto")
    flags = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    capable = "avx512_bf16" in flags or "amx_bf16" in flags
    assert precision == ("bfloat16" if capable else "float32")
    assert ("BF16" if capable else "does not list") in reason
