"""Recipes and precision: tables that other tables must know."""

import dataclasses
import platform
from pathlib import Path

import numpy as np
import pytest

from keras_resnet import models, preprocessing, resampling
from keras_resnet.config import PRECISIONS, TrainConfig
from keras_resnet.datasets import mixing
from keras_resnet.datasets.images import RESIZES
from keras_resnet.recipes import (
    FINE_TUNING,
    LEAST_EPOCHS,
    MOST_EPOCHS,
    RECIPES,
    choose_epochs,
    find_recipe,
    override,
    scale_batch,
    settle,
    stored_size,
)
from keras_resnet.training import optimizers
from keras_resnet.training.precision import POLICIES, choose_precision
from keras_resnet.utils.errors import InputError
from keras_resnet.utils.geometry import find_crop_pct


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_recipes_name_rows_that_exist(recipe):
    assert recipe.optimizer in optimizers.OPTIMIZERS
    assert recipe.schedule in optimizers.SCHEDULES
    assert recipe.variant in models.VARIANTS
    assert recipe.stem in (None, *models.STEMS)
    assert set(recipe.augmentation) <= set(preprocessing.AUGMENTATIONS)
    assert recipe.mixing in (None, *mixing.MIXINGS)


def test_d2l_is_the_recipe_of_the_book():
    d2l = RECIPES["d2l"]
    assert (d2l.image_size, d2l.batch_size, d2l.epochs) == (96, 256, 5)
    assert (d2l.optimizer, d2l.learning_rate, d2l.schedule) == ("adam", 1e-3, "constant")
    assert (d2l.variant, d2l.stem, d2l.augmentation) == ("d2l", None, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "`epochs` must be a whole number of at least 1, got 0"),
        ({"epochs": None}, "`images_seen` must be a whole number of at least 1, got None"),
        ({"batch_size": 2.0}, "`batch_size` must be a whole number"),
        ({"image_size": True}, "`image_size` must be a whole number"),
        ({"learning_rate": -1}, "`learning_rate` must be positive and finite, got -1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be positive and finite, got nan"),
    ],
)
def test_recipes_out_of_range(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(RECIPES["quick"], **change)


def test_fine_tuning_changes_rows_that_exist_into_valid_recipes():
    for name in FINE_TUNING:
        recipe = find_recipe(name, "imagenet")
        assert find_recipe(name) == RECIPES[name] != recipe
        assert recipe.learning_rate < recipe.head_learning_rate
    assert find_recipe("quick", "imagenet") == RECIPES["quick"]


def test_photos_is_for_photographs():
    photos = RECIPES["photos"]
    assert photos.schedule == "cosine" and photos.label_smoothing == 0.1 and photos.patience
    assert {"crop", "flip", "colour"} <= set(photos.augmentation)
    assert photos.resize == "shorter_edge"
    assert find_recipe("photos", "imagenet").image_size == 224


@pytest.mark.parametrize("images", [1, 75, 100, 500, 1000, 10_000, 1_000_000])
def test_more_images_need_fewer_epochs(images):
    seen = RECIPES["photos"].images_seen
    epochs = choose_epochs(seen, images)
    assert LEAST_EPOCHS <= epochs <= MOST_EPOCHS
    if LEAST_EPOCHS < epochs < MOST_EPOCHS:
        assert seen <= epochs * images < seen + images


@pytest.mark.parametrize("edge", range(8, 160, 7))
def test_small_images_make_a_small_network(edge):
    recipe = settle(RECIPES["photos"], 500, (edge, edge + 9, 3), stem="deep")
    assert recipe.image_size == min(128, edge)
    assert stored_size(recipe) == min(edge, 146)
    assert recipe.stem == ("small" if recipe.image_size <= 40 else "deep")
    fixed = settle(RECIPES["photos"], 500, (edge, edge, 3), stem="deep", fixed_size=True)
    assert (fixed.image_size, fixed.crop_pct) == (128, 0.875)


def test_other_recipes_resize_and_stay_as_they_are():
    for name in ("quick", "d2l"):
        settled = settle(RECIPES[name], 100, (9, 9, 1), stem="imagenet")
        assert settled == dataclasses.replace(RECIPES[name], stem="imagenet")
        assert stored_size(settled) == settled.image_size


@pytest.mark.parametrize("size", [28, 128, 224])
def test_the_share_of_a_crop_gives_its_edge_again(size):
    for edge in range(size, 2 * size):
        recipe = dataclasses.replace(
            RECIPES["photos"], image_size=size, crop_pct=find_crop_pct(size, edge)
        )
        assert stored_size(recipe) == edge


def test_a_scaled_batch_scales_both_rates():
    recipe = find_recipe("photos", "imagenet")
    scaled = scale_batch(recipe, 4)
    assert scaled.learning_rate == 4 * recipe.learning_rate
    assert scaled.head_learning_rate == 4 * recipe.head_learning_rate
    assert scale_batch(RECIPES["photos"], 4).head_learning_rate is None


def test_images_are_resized_alike_in_files_and_in_the_model():
    assert set(RESIZES) == set(resampling.LENGTHS)


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


def test_a_recipe_names_its_network_which_a_setting_overrides():
    assert TrainConfig(recipe="fast").model == "resnet12_narrow"
    assert TrainConfig(recipe="fast", model="resnet34").model == "resnet34"
    assert TrainConfig().model == TrainConfig(dataset="folder:photos").model == "resnet18"
    assert override(RECIPES["fast"], TrainConfig(model="resnet34")).model == "resnet34"
    with pytest.raises(InputError, match="`recipe` must be one of quick, fast"):
        TrainConfig(recipe="slow")


def test_adamw_decays_kernels_alone():
    model = models.build_resnet(models.Spec((1,), (4,)), (8, 8, 1), stem="small")
    optimizer = optimizers.OPTIMIZERS["adamw"](0.1)
    optimizer.build(model.trainable_variables)
    decayed = {v.path for v in model.trainable_variables if optimizer._use_weight_decay(v)}
    assert decayed == {v.path for v in model.trainable_variables if v.path.endswith("kernel")}
    before = {v.path: np.asarray(v) for v in model.trainable_variables}
    zeros = [np.zeros(v.shape, "float32") for v in model.trainable_variables]
    optimizer.apply(zeros, model.trainable_variables)
    for variable in model.trainable_variables:
        factor = 1 - 0.1 * 0.05 if variable.path in decayed else 1
        np.testing.assert_allclose(variable, factor * before[variable.path], rtol=1e-5)
