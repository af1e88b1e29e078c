"""Preprocessing and augmentation inside the graph."""

import keras
import numpy as np
import pytest
import torch
from keras import ops
from matplotlib import cbook
from PIL import Image
from pillow_resize import PILLOW, pillow_resize
from preprocessors import PREPROCESSORS, open_photograph

from keras_resnet.models import Spec, build_resnet
from keras_resnet.preprocessing import (
    AUGMENTATIONS,
    NORMALIZATIONS,
    RAW_AUGMENTATIONS,
    Augmentation,
    ColourJitter,
    ImagePreprocessing,
    RandomResizedCrop,
    find_normalization,
    with_preprocessing,
)
from keras_resnet.utils.errors import InputError

RED, GREEN, BLUE = 0.299, 0.587, 0.114  # luma, ITU-R BT.601


def raw_images(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, size=shape).astype("uint8")


def torch_resize(images, size):
    """Returns uint8 images, channels last, resized by PyTorch and scaled to [0, 1]."""
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    tensor = torch.nn.functional.interpolate(
        tensor, (size, size), mode="bilinear", align_corners=False
    )
    return tensor.permute(0, 2, 3, 1).numpy() / 255


def tiny_classifier(augmentation=("flip", "shift", "erase"), size=16, image_shape=(28, 28, 1)):
    network = build_resnet(Spec((1, 1), (4, 8)), (size, size, image_shape[-1]), stem="small")
    return with_preprocessing(network, image_shape, augmentation, mean=0.3, std=0.35)


def moving_statistics(model):
    return [ops.convert_to_numpy(w) for w in model.non_trainable_variables if "moving" in w.path]


# Resizing, scaling, colour


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(28, 28, 96), (28, 28, 28), (28, 28, 13), (37, 91, 32), (1, 1, 5), (200, 150, 1)],
)
def test_any_size_becomes_what_pytorch_makes_of_it(height, width, size, channels):
    images = raw_images(2, height, width, channels)
    layer = ImagePreprocessing(size, channels)
    result = ops.convert_to_numpy(layer(images))
    assert layer.compute_output_shape(images.shape) == result.shape == (2, size, size, channels)
    assert result.dtype == "float32"
    assert result.min() >= 0
    assert result.max() <= 1
    np.testing.assert_allclose(result, torch_resize(images, size), rtol=0, atol=1e-5)


def test_grey_becomes_colour_by_repetition():
    images = raw_images(2, 28, 28, 1)
    expected = np.repeat(torch_resize(images, 40), 3, axis=-1)
    np.testing.assert_allclose(ImagePreprocessing(40, 3)(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("colour", "grey"),
    [
        ((255, 0, 0), RED),
        ((0, 255, 0), GREEN),
        ((0, 0, 255), BLUE),
        ((255, 255, 255), 1),
        ((90, 90, 90), 90 / 255),
        ((0, 0, 0), 0),
    ],
)
def test_colour_becomes_grey_by_its_luma(colour, grey):
    images = np.full((1, 8, 6, 3), colour, "uint8")
    result = ImagePreprocessing(4, 1)(images)
    np.testing.assert_allclose(result, np.full((1, 4, 4, 1), grey), rtol=0, atol=1e-6)


def test_mean_and_std_are_taken_on_the_scale_from_0_to_1():
    images = raw_images(2, 9, 9, 3)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = (torch_resize(images, 9) - mean) / std
    result = ImagePreprocessing(9, 3, mean=mean, std=std)(images)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)
    result = ImagePreprocessing(9, 3, mean=0.5, std=0.25)(images)
    np.testing.assert_allclose(result, (torch_resize(images, 9) - 0.5) / 0.25, rtol=0, atol=1e-5)


def test_numbers_of_other_types_mean_the_same():
    images = raw_images(2, 28, 28, 1)
    expected = ops.convert_to_numpy(ImagePreprocessing(20)(images))
    for dtype in ("int32", "float32", "float64"):
        np.testing.assert_array_equal(ImagePreprocessing(20)(images.astype(dtype)), expected)


def test_one_model_takes_every_size():
    inputs = keras.Input((None, None, 3), dtype="uint8")
    model = keras.Model(inputs, ImagePreprocessing(12, 1)(inputs))
    assert model.output_shape == (None, 12, 12, 1)
    for batch, height, width in ((1, 28, 28), (3, 12, 12), (2, 50, 7)):
        images = raw_images(batch, height, width, 3)
        assert model.predict(images, verbose=0).shape == (batch, 12, 12, 1)
        np.testing.assert_allclose(
            model(images),
            torch_resize(images, 12) @ np.array([[RED], [GREEN], [BLUE]]),
            rtol=0,
            atol=1e-5,
        )


def test_half_precision_comes_last():
    """All 256 grey levels differ until the last step: scaled by itself, bfloat16 merges some."""
    levels = np.arange(256, dtype="uint8").reshape(1, 16, 16, 1)
    exact = ops.convert_to_numpy(ImagePreprocessing(16)(levels))
    assert len(np.unique(exact)) == 256
    result = ImagePreprocessing(16, mean=0.5, std=1 / 255, dtype="mixed_bfloat16")(levels)
    assert keras.backend.standardize_dtype(result.dtype) == "bfloat16"
    # Had (x - mean) / std been computed in bfloat16, neighbours near 255 would be the same.
    expected = ops.cast((exact - 0.5) * 255, "bfloat16")
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ops.cast(result, "float32")),
        ops.convert_to_numpy(ops.cast(expected, "float32")),
    )
    assert len(np.unique(ops.convert_to_numpy(ops.cast(result, "float32")))) == 256


# The preprocessing of published networks

EXACT = {"resize": "shorter_edge", "crop_pct": 0.8, "antialias": True, "resampler": PILLOW}


@pytest.fixture(scope="module")
def photographs():
    """A photograph in all shapes: as it is, turned, a panorama, a tall strip, tiny, enlarged."""
    whole = open_photograph(cbook.get_sample_data("grace_hopper.jpg"))
    return [
        whole,
        whole.transpose(Image.Transpose.ROTATE_90),
        whole.crop((0, 100, 512, 220)),
        whole.crop((130, 0, 251, 606)),
        whole.crop((230, 140, 257, 159)),
        whole.crop((150, 60, 350, 260)),
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("name", PREPROCESSORS)
def test_published_preprocessing_is_repeated_to_the_grey_level(name, photographs):
    preprocessor = PREPROCESSORS[name]()
    layer = ImagePreprocessing(channels=3, **preprocessor.arguments)
    for photograph in photographs:
        expected = preprocessor.function(photograph)
        found = ops.convert_to_numpy(layer(np.asarray(photograph)[None]))[0]
        assert found.shape == expected.shape
        difference = np.abs(preprocessor.grey_levels(found) - preprocessor.grey_levels(expected))
        assert difference.max() < 1.01
        assert (difference > 0.01).mean() <= 2e-4
        assert np.ptp(preprocessor.grey_levels(expected)) > 50


def test_colour_becomes_the_grey_levels_of_pillow(photographs):
    for photograph in photographs:
        grey = np.asarray(photograph.convert("L"))
        expected = pillow_resize(grey, 32, 32, "bilinear")
        layer = ImagePreprocessing(32, 1, std=1 / 255, antialias=True, resampler=PILLOW)
        found = ops.convert_to_numpy(layer(np.asarray(photograph)[None]))[0, ..., 0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("shape", [(60, 90), (90, 40), (7, 3)])
def test_sizes_that_are_known_late_give_the_same(shape):
    """`resample` chooses between the orders of the passes in the graph, or before it."""
    images = raw_images(2, *shape, 3)
    inputs = keras.Input((None, None, 3), dtype="uint8")
    layer = ImagePreprocessing(24, 3, **{**EXACT, "resampler": "pillow"})
    found = keras.Model(inputs, layer(inputs)).predict(images, verbose=0)
    np.testing.assert_allclose(found, layer(images), rtol=0, atol=1e-6)


@pytest.mark.parametrize("resize", ["squash", "shorter_edge"])
def test_images_of_the_right_size_are_left_alone(resize):
    images = raw_images(2, 24, 24, 3)
    layer = ImagePreprocessing(24, 3, resize=resize, antialias=True, interpolation="bicubic")
    np.testing.assert_allclose(layer(images), images / 255, rtol=1e-6)
    assert np.abs(ImagePreprocessing(24, 3, **EXACT)(images) - images / 255).max() > 0.1


def test_layers_saved_before_there_was_a_crop_are_the_same():
    settings = {"image_size": 20, "channels": 3, "mean": 0.4, "std": 0.3, "reverse_channels": True}
    images = raw_images(2, 31, 45, 3)
    expected = (torch_resize(images, 20)[..., ::-1] - 0.4) / 0.3
    for layer in (ImagePreprocessing(**settings), ImagePreprocessing.from_config(settings)):
        np.testing.assert_allclose(layer(images), expected, rtol=0, atol=1e-4)


def test_a_dict_describes_the_preprocessing_of_a_network(photographs):
    arguments = {"image_size": 24, "mean": 0.4, "std": 0.3, "reverse_channels": False, **EXACT}
    for size in (24, None):
        network = build_resnet(Spec((1, 1), (4, 8)), (size, size, 3), stem="small")
        model = with_preprocessing(network, (None, None, 3), **arguments)
        images = np.asarray(photographs[0])[None]
        x = ImagePreprocessing(channels=3, **arguments)(images)
        np.testing.assert_allclose(model(images), network(x), rtol=1e-5, atol=1e-5)
        config = model.get_layer("preprocessing").get_config()
        assert {name: config[name] for name in arguments} == arguments


# The classifier: raw images to logits


def test_classifier_takes_raw_fashion_mnist():
    model = tiny_classifier()
    assert model.input_shape == (None, 28, 28, 1)
    assert model.input.dtype == "uint8"
    assert [layer.name for layer in model.layers] == [
        "image",
        "preprocessing",
        "augmentation",
        "resnet",
    ]
    images = raw_images(3, 28, 28, 1)
    x = (torch_resize(images, 16) - 0.3) / 0.35
    np.testing.assert_allclose(model(images), model.get_layer("resnet")(x), rtol=1e-5, atol=1e-5)


def model_behind(*layers):
    """Returns a model: raw images, `layers`, a small network with BatchNormalization."""
    inputs = x = keras.Input((28, 28, 1), dtype="uint8")
    for layer in layers:
        x = layer(x)
    return keras.Model(inputs, build_resnet(Spec((1, 1), (4, 8)), x.shape[1:], stem="small")(x))


@pytest.mark.parametrize(
    "make",
    [
        lambda: model_behind(ImagePreprocessing(16)),
        lambda: model_behind(Augmentation(AUGMENTATIONS, 28)),
        lambda: model_behind(Augmentation(AUGMENTATIONS, 16), ImagePreprocessing(16)),
        tiny_classifier,
    ],
    ids=["preprocessing", "augmentation", "both", "classifier"],
)
def test_nothing_before_a_batch_norm_makes_it_believe_that_it_trains(make):
    """A bare call is inference, to the last bit, and leaves the moving statistics alone.

    Up to Keras 3.15 `keras.layers.Resizing` and the random layers break this for all layers
    behind them. Each of ours is tried by itself, since one can cover up for another.
    """
    model, images = make(), raw_images(4, 28, 28, 1)
    before = moving_statistics(model)
    bare = ops.convert_to_numpy(model(images))
    np.testing.assert_array_equal(bare, model(images, training=False))
    np.testing.assert_equal(moving_statistics(model), before)
    np.testing.assert_allclose(bare, model.predict(images, verbose=0), rtol=1e-5, atol=1e-5)

    trained = ops.convert_to_numpy(model(images, training=True))
    assert np.abs(trained - bare).max() > 1e-3
    changes = [np.abs(a - b).max() for a, b in zip(before, moving_statistics(model), strict=True)]
    assert min(changes) > 0


def test_classifier_survives_saving(tmp_path):
    model, images = tiny_classifier(), raw_images(4, 28, 28, 1)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, np.arange(4), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images), model(images))
    assert loaded.get_layer("augmentation").names == ("flip", "shift", "erase")


def test_classifier_wants_a_square_network_of_a_known_size():
    for shape in ((None, None, 1), (16, 32, 1)):
        network = build_resnet(Spec((1,), (4,)), shape, stem="small")
        with pytest.raises(InputError, match="square"):
            with_preprocessing(network, (28, 28, 1))
    network = build_resnet(Spec((1,), (4,)), (16, 16, 1), stem="small")
    with pytest.raises(InputError, match="got 16x16 and `image_size` 24"):
        with_preprocessing(network, (28, 28, 1), image_size=24)


# Augmentation


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", [n for n in AUGMENTATIONS if n not in RAW_AUGMENTATIONS])
def test_augmentation_changes_images_in_training_only(name, channels):
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).uniform(size=(8, 24, 24, channels)).astype("float32")
    layer = Augmentation([name])
    np.testing.assert_array_equal(layer(images), images)
    np.testing.assert_array_equal(layer(images, training=False), images)

    first, second = (ops.convert_to_numpy(layer(images, training=True)) for _ in range(2))
    assert first.shape == images.shape == layer.compute_output_shape(images.shape)
    assert first.dtype == "float32"
    assert np.abs(first - images).max() > 0.1
    assert np.abs(first - second).max() > 0.1  # drawn anew in each step
    assert min(first.min(), second.min()) >= 0
    assert max(first.max(), second.max()) <= 1


def test_flip_mirrors_left_and_right():
    keras.utils.set_random_seed(0)
    images = np.random.default_rng(0).uniform(size=(16, 8, 8, 1)).astype("float32")
    flipped = ops.convert_to_numpy(Augmentation(["flip"])(images, training=True))
    mirrored = images[:, :, ::-1]
    kinds = {
        "same" if (new == old).all() else "mirrored" if (new == mirror).all() else "else"
        for new, old, mirror in zip(flipped, images, mirrored, strict=True)
    }
    assert kinds == {"same", "mirrored"}


def test_augmentations_run_one_after_another():
    keras.utils.set_random_seed(0)
    layer = Augmentation(["flip", "shift", "erase"])
    assert [type(step).__name__ for step in layer.steps] == [
        "RandomFlip",
        "RandomTranslation",
        "RandomErasing",
    ]
    images = np.full((64, 10, 10, 1), 0.5, "float32")
    result = ops.convert_to_numpy(layer(images, training=True))
    assert set(np.unique(result)) >= {0.0, 0.5}  # shifted in or erased; kept
    np.testing.assert_array_equal(Augmentation()(images, training=True), images)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_augmentation_hands_on_the_policy_s_type(policy):
    keras.config.set_dtype_policy(policy)
    try:
        inputs = keras.Input((10, 10, 1), dtype="uint8")
        model = keras.Model(
            inputs, Augmentation(["flip", "shift", "erase"])(ImagePreprocessing(8)(inputs))
        )
    finally:
        keras.config.set_dtype_policy("float32")
    for training in (False, True):
        result = model(raw_images(2, 10, 10, 1), training=training)
        assert keras.backend.standardize_dtype(result.dtype) == policy.removeprefix("mixed_")


def find_box(crop):
    """Returns the box that a crop of 20×20 shows of 90×60 pixels, 2·x red and 4·y green."""
    box = []
    for line, scale, length in ((crop[10, :, 0], 2, 90), (crop[:, 10, 1], 4, 60)):
        step = (line[15] - line[4]) / 11 / scale
        middle = (line[9] + line[10]) / 2 / scale + 0.5
        box.append(np.clip([middle - 10 * step, middle + 10 * step], 0, length))
    (left, right), (top, bottom) = box
    return left, top, right, bottom


def test_a_crop_is_a_part_of_the_image_as_pillow_resizes_it():
    keras.utils.set_random_seed(0)
    # Each pixel knows its place: red across, green down.
    down, across = np.mgrid[0:60, 0:90]
    image = np.stack([across * 2, down * 4, 0 * down], axis=-1).astype("uint8")
    crop = RandomResizedCrop(20)
    results = ops.convert_to_numpy(crop(np.stack([image] * 64), training=True))
    shares, offsets = [], []
    for result in results:
        box = find_box(result)
        expected = Image.fromarray(image).resize((20, 20), Image.Resampling.BILINEAR, box=box)
        # Pillow rounds, and its filter ends with the box, ours with the image.
        assert np.abs(result - np.asarray(expected))[2:-2, 2:-2].max() < 1.5
        shares.append((box[2] - box[0]) * (box[3] - box[1]) / 5400)
        offsets.append(box[:2])
    assert 0.33 < min(shares) < 0.5 and 0.8 < max(shares) <= 1
    assert np.std(offsets, axis=0).min() > 2


def test_the_middle_is_cut_out_where_no_training_is():
    images = raw_images(2, 41, 60, 3)
    crop = RandomResizedCrop(32, crop_pct=32 / 41)
    # torchvision: round(9 / 2) and round(28 / 2).
    np.testing.assert_array_equal(crop(images), images[:, 4:36, 14:46])
    # Another size is resized, as the model that is trained resizes photographs.
    model = ImagePreprocessing(
        32, 3, resize="shorter_edge", crop_pct=32 / 41, antialias=True, std=1 / 255
    )
    down, across = np.mgrid[0:90, 0:127]
    images = np.stack([across * 2, down * 2, down + across], axis=-1)[None].astype("uint8")
    found, expected = crop(images), model(images)
    # Lengths and offsets are rounded to pixels of 41 on the shorter edge there: 4.4 levels.
    assert np.abs(ops.convert_to_numpy(found) - ops.convert_to_numpy(expected)).max() < 4.4


@pytest.mark.parametrize("channels", [1, 3])
def test_colour_jitter_keeps_the_range_and_grey_grey(channels):
    keras.utils.set_random_seed(0)
    images = raw_images(8, 12, 12, channels)
    layer = ColourJitter(0.5)
    np.testing.assert_array_equal(layer(images), images)
    changed = ops.convert_to_numpy(layer(images, training=True))
    assert changed.dtype == "float32" and changed.min() >= 0 and changed.max() <= 255
    assert (
        len({round(float(np.abs(a - b).mean()), 3) for a, b in zip(changed, images, strict=True)})
        == 8
    )
    grey = np.repeat(images[..., :1], channels, axis=-1)
    result = ops.convert_to_numpy(layer(grey, training=True))
    np.testing.assert_allclose(result, result[..., :1].repeat(channels, axis=-1), atol=0.05)


def test_raw_augmentation_stands_before_preprocessing():
    network = build_resnet(Spec((1, 1), (4, 8)), (16, 16, 3), stem="small")
    model = with_preprocessing(
        network, (24, 24, 3), ["crop", "flip", "colour"], resize="shorter_edge", crop_pct=16 / 24
    )
    names = [layer.name for layer in model.layers[1:]]
    assert names == ["raw_augmentation", "preprocessing", "augmentation", network.name]
    assert model.get_layer("raw_augmentation").names == ("crop", "colour")
    assert model.get_layer("augmentation").names == ("flip",)
    images = raw_images(3, 24, 24, 3)
    inference = with_preprocessing(
        network, (None, None, 3), resize="shorter_edge", crop_pct=16 / 24, antialias=True
    )
    np.testing.assert_allclose(model(images), inference(images), atol=1e-5)


# Configuration and errors


@pytest.mark.parametrize(
    "layer",
    [
        ImagePreprocessing(
            12, 3, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0], name="p", dtype="mixed_bfloat16"
        ),
        ImagePreprocessing(7),
        ImagePreprocessing(
            *(12, 3, 0.1, 0.2, True, "shorter_edge", 0.9, "bicubic", True, "torch", "transformers")
        ),
        Augmentation(["erase", "flip"], name="a"),
    ],
    ids=["every argument", "defaults", "crop", "augmentation"],
)
def test_config_makes_the_same_layer(layer):
    config = layer.get_config()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is type(layer)
    assert again.get_config() == config
    arguments = {
        ImagePreprocessing: {
            *("image_size", "channels", "mean", "std", "reverse_channels", "resize", "crop_pct"),
            *("interpolation", "antialias", "resampler", "rounding"),
        },
        Augmentation: {"names"},
    }[type(layer)]
    assert arguments <= config.keys()
    for name in arguments:
        assert getattr(again, name) == getattr(layer, name)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImagePreprocessing(0), r"`image_size` .*got 0"),
        (lambda: ImagePreprocessing(9.5), r"`image_size` .*got 9.5"),
        (lambda: ImagePreprocessing((9, 9)), r"`image_size` .*got \(9, 9\)"),
        (lambda: ImagePreprocessing(True), r"`image_size` .*got True"),
        (lambda: ImagePreprocessing(9, channels=2), r"`channels` must be 1 or 3, got 2"),
        # A mean of another length would silently broadcast one channel to three.
        (lambda: ImagePreprocessing(9, 1, mean=[0.1, 0.2, 0.3]), r"`mean` .*each of 1 channels"),
        (lambda: ImagePreprocessing(9, 3, std=[0.1]), r"`std` .*each of 3 channels, got \[0.1\]"),
        (lambda: ImagePreprocessing(9, crop_pct=0), r"`crop_pct` must be above 0 .*got 0"),
        (lambda: ImagePreprocessing(9, crop_pct=1.1), r"`crop_pct` .*at most 1, got 1.1"),
        (lambda: ImagePreprocessing(9, crop_pct=None), r"`crop_pct` .*got None"),
        (lambda: ImagePreprocessing(9, resize="border"), r"`resize` .*shorter_edge, got 'border'"),
        (lambda: ImagePreprocessing(9, interpolation="lanczos"), r"`interpolation` .*'lanczos'"),
        (lambda: ImagePreprocessing(9, resampler="cv2"), r"`resampler` .*pillow.*got 'cv2'"),
        (lambda: ImagePreprocessing(9, rounding="timm"), r"`rounding` .*got 'timm'"),
        (lambda: ImagePreprocessing(9)(raw_images(1, 9, 9, 4)), r"1 or 3.*\(1, 9, 9, 4\)"),
        (lambda: ImagePreprocessing(9)(raw_images(9, 9, 1)), r"batch.*\(9, 9, 1\)"),
        (
            lambda: Augmentation(["spin"]),
            r"`augmentation` .*crop, colour, flip, shift, erase, got 'spin'",
        ),
        (lambda: Augmentation("flip"), r"`names` must be .*got 'flip'"),
    ],
)
def test_bad_arguments_are_errors_with_rule_and_value(make, message):
    with pytest.raises(InputError, match=message):
        make()


# Normalisations


@pytest.mark.parametrize(
    ("name", "application"),
    [
        ("caffe", keras.applications.resnet),
        ("inception", keras.applications.resnet_v2),
    ],
)
def test_normalization_is_that_of_keras_applications(name, application):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype("uint8")
    layer = ImagePreprocessing(8, 3, **find_normalization(name, 3))
    expected = application.preprocess_input(images.astype("float32"))
    np.testing.assert_allclose(layer(images), expected, rtol=1e-5, atol=1e-4)
    assert np.abs(expected[..., 0] - expected[..., 2]).max() > 0.1


def test_normalization_of_imagenet_is_that_of_torchvision():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3)).astype("uint8")
    layer = ImagePreprocessing(8, 3, **find_normalization("imagenet", 3))
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(layer(images), (images / 255 - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_grey_images_are_normalised_by_the_average_of_the_colours(name):
    normalization = find_normalization(name, 1)
    layer = ImagePreprocessing(8, 1, **normalization)
    images = np.full((1, 8, 8, 1), 51, "uint8")
    expected = (0.2 - normalization["mean"]) / normalization["std"]
    np.testing.assert_allclose(layer(images), np.full((1, 8, 8, 1), expected), rtol=1e-5)
    restored = ImagePreprocessing.from_config(layer.get_config())
    assert restored.get_config() == layer.get_config()


def test_a_normalization_that_is_no_row_is_an_error():
    with pytest.raises(InputError, match="`normalize` must be one of none, imagenet"):
        find_normalization("zscore", 3)
