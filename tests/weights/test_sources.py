"""`.keras` files of this package as a source of weights."""

import keras
import numpy as np
import pytest

from keras_resnet import Spec, build_dense_resnet, build_resnet, with_preprocessing
from keras_resnet.config import TrainConfig
from keras_resnet.preprocessing import find_normalization
from keras_resnet.training.fine_tuning import find_source
from keras_resnet.utils.errors import InputError

BASIC, BOTTLENECK = (Spec((1, 1), (4, 8), kind) for kind in ("basic", "bottleneck"))
NETWORKS = [
    (BASIC, "d2l", "small"),
    (BASIC, "v2", "deep"),
    (BOTTLENECK, "torchvision", "imagenet"),
    (BOTTLENECK, "v1", "deep"),
    (BOTTLENECK, "keras_v1", "small"),
    (BOTTLENECK, "keras_v2", "imagenet"),
    (Spec((1, 1), (4, 8), "bottleneck", se_reduction=2), "torchvision", "small"),
]


def save(model, path):
    model.save(path)
    return TrainConfig(weights=str(path))


@pytest.mark.parametrize(("spec", "variant", "stem"), NETWORKS)
def test_the_form_is_found_and_every_weight_loaded(spec, variant, stem, tmp_path):
    def build(num_classes):
        return build_resnet(spec, (32, 32, 3), num_classes, variant=variant, stem=stem)

    network = build(5)
    source = find_source(save(network, tmp_path / "own.keras"))
    found = source.checkpoint
    assert (found.variant, found.stem, found.channels) == (variant, stem, 3)
    assert (found.num_classes, found.num_tensors) == (5, len(network.weights))
    assert source.name_normalization() is None
    same, other = build(5), build(2)
    assert source.load_into(same).num_tensors == len(network.weights)
    for ours, theirs in zip(same.get_weights(), network.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    head = other.get_layer("logits").get_weights()
    with pytest.raises(InputError, match=r"own\.keras: tensors: .*only the head does not fit"):
        source.load_into(other)
    assert source.load_into(other, skip_head=True).skipped == ("logits/bias", "logits/kernel")
    np.testing.assert_array_equal(other.get_layer("logits").get_weights()[0], head[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["none", "imagenet", "inception", "caffe"])
def test_the_normalization_is_that_of_the_preprocessing(name, channels, tmp_path):
    network = build_resnet(BASIC, (8, 8, channels), 2)
    model = with_preprocessing(network, (28, 28, 3), **find_normalization(name, channels))
    # Preprocessing may lie deeper, in a model with another head.
    model = keras.Sequential(
        [keras.Input((28, 28, 3), dtype="uint8"), model, keras.layers.Softmax()]
    )
    source = find_source(save(model, tmp_path / "own.keras"))
    assert source.name_normalization() == name
    assert source.checkpoint.channels == channels


def test_a_normalization_of_ones_own_must_be_replaced(tmp_path):
    model = with_preprocessing(build_resnet(BASIC, (8, 8, 1), 2), (28, 28, 1), mean=0.3)
    source = find_source(save(model, tmp_path / "own.keras"))
    with pytest.raises(InputError, match=r"own\.keras: its preprocessing must .*got mean 0\.3"):
        source.name_normalization()


def test_another_head_stays_behind(tmp_path):
    backbone = build_resnet(BASIC, (32, 32, 3), include_top=False, pooling="avg")
    model = keras.Model(backbone.input, keras.layers.Dense(3, name="mine")(backbone.output))
    source = find_source(save(model, tmp_path / "own.keras"))
    assert source.checkpoint.num_classes is None
    network = build_resnet(BASIC, (32, 32, 3), 2)
    assert source.load_into(network, skip_head=True).num_tensors == len(backbone.weights)
    kernels = (each.get_layer("stem_conv").get_weights()[0] for each in (network, backbone))
    np.testing.assert_array_equal(*kernels)


def test_what_is_no_residual_network_or_not_finite_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no network of `build_resnet`, got 'dense_resnet'"):
        find_source(save(build_dense_resnet(4, 8, 2, 1), tmp_path / "dense.keras"))
    network = build_resnet(BASIC, (32, 32, 3), 2)
    network.get_layer("stem_bn").gamma.assign([1, 1, np.nan, 1])
    with pytest.raises(InputError, match=r"nan\.keras: 'stem_bn/gamma' holds NaN or infinity"):
        find_source(save(network, tmp_path / "nan.keras"))
    source = find_source(save(build_resnet(BASIC, (32, 32, 3), 2), tmp_path / "own.keras"))
    with pytest.raises(InputError, match='build the model with variant="d2l"') as error:
        source.load_into(build_resnet(BASIC, (32, 32, 3), 2, variant="v2"))
    assert "\n" not in str(error.value)


def test_code_in_ones_own_model_is_not_run(tmp_path):
    network = build_resnet(BASIC, (32, 32, 3), 2)
    doubled = keras.layers.Lambda(lambda x: 2 * x)(network.output)
    settings = save(keras.Model(network.input, doubled), tmp_path / "lambda.keras")
    with pytest.raises(InputError, match=r"lambda\.keras: cannot be loaded: it holds code"):
        find_source(settings)
