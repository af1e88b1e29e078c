"""The preprocessing of published networks: the libraries' own, and arguments of ours.

`PREPROCESSORS` has a row for each library and configuration. Nothing here downloads.
"""

import dataclasses
import io
from collections.abc import Callable

import keras
import numpy as np
import references
from PIL import Image
from pillow_resize import PILLOW

from keras_resnet.preprocessing import NORMALIZATIONS
from keras_resnet.utils.geometry import find_crop_pct


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """The preprocessing of a published network.

    Attributes:
        function: Function of a Pillow image in colour that returns (size, size, 3) floats.
        arguments: Arguments of `ImagePreprocessing` that describe it.
    """

    function: Callable
    arguments: dict

    def grey_levels(self, image):
        """Returns floats of `image` without the normalization: on the scale 0 … 255."""
        levels = image[..., ::-1] if self.arguments.get("reverse_channels") else image
        mean, std = (np.asarray(self.arguments[name]) for name in ("mean", "std"))
        return (levels * std + mean) * 255


def timm_preprocessor(name):
    """Returns timm's `create_transform` for one of its published networks."""
    data = references.import_timm().data
    pretrained = references.import_timm().get_pretrained_cfg(name).to_dict()
    settings = data.resolve_data_config({}, pretrained_cfg=pretrained)
    return _timm(**settings)


def timm_transform(**settings):
    """Returns timm's `create_transform` for settings that no network has to have."""
    normalization = NORMALIZATIONS["imagenet"]
    return _timm(input_size=(3, 96, 96), **normalization, **settings)


def _timm(input_size, mean, std, crop_pct, interpolation, crop_mode):
    create = references.import_timm().data.create_transform
    settings = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation}
    transform = create(input_size, crop_mode=crop_mode, **settings)
    return Preprocessor(
        lambda image: transform(image).permute(1, 2, 0).numpy(),
        {
            **settings,
            "image_size": input_size[-1],
            "resize": {"squash": "squash", "center": "shorter_edge"}[crop_mode],
            "antialias": True,
            "resampler": PILLOW,
        },
    )


def torchvision_preprocessor(network, weights):
    """Returns `transforms()` of torchvision's weights."""
    references.import_torchvision()
    from torchvision.models import get_model_weights

    transforms = get_model_weights(network)[weights].transforms()
    (size,), (length,) = transforms.crop_size, transforms.resize_size
    return Preprocessor(
        lambda image: transforms(image).permute(1, 2, 0).numpy(),
        {
            "image_size": size,
            "crop_pct": find_crop_pct(size, length),
            "mean": transforms.mean,
            "std": transforms.std,
            "resize": "shorter_edge",
            "interpolation": transforms.interpolation.value,
            "antialias": transforms.antialias,
            "resampler": PILLOW,
        },
    )


def transformers_preprocessor(resampler, size=224, crop_pct=0.875, resample=3):
    """Returns the image processor of the ResNets in transformers.

    Args:
        resampler: "torch" for its PyTorch backend, `PILLOW` for its Pillow backend.
        size: `shortest_edge` of its configuration.
        crop_pct: That of its configuration.
        resample: That of its configuration: 2 is bilinear, 3 bicubic.
    """
    references.import_transformers()
    from transformers.models.convnext import (
        image_processing_convnext,
        image_processing_pil_convnext,
    )

    make = {
        "torch": image_processing_convnext.ConvNextImageProcessor,
        PILLOW: image_processing_pil_convnext.ConvNextImageProcessorPil,
    }[resampler]
    processor = make(size={"shortest_edge": size}, crop_pct=crop_pct, resample=resample)
    squash = size >= 384
    return Preprocessor(
        lambda image: np.moveaxis(np.asarray(processor(image)["pixel_values"][0]), 0, -1),
        {
            "image_size": size,
            "mean": tuple(processor.image_mean),
            "std": tuple(processor.image_std),
            "resize": "squash" if squash else "shorter_edge",
            "crop_pct": 1.0 if squash else crop_pct,
            "interpolation": {2: "bilinear", 3: "bicubic"}[resample],
            "antialias": True,
            "resampler": resampler,
            "rounding": "transformers",
        },
    )


def keras_preprocessor(family, interpolation=None):
    """Returns `preprocess_input` of keras.applications behind a resizing to 224 pixels.

    Args:
        family: "resnet" or "resnet_v2".
        interpolation: That of `keras.utils.load_img`, "bilinear" or "bicubic"; None for the
            resizing of `keras.utils.image_dataset_from_directory`, which has no antialiasing.
    """
    preprocess = getattr(keras.applications, family).preprocess_input

    def function(image):
        if interpolation is None:
            resized = keras.ops.image.resize(np.asarray(image, "float32")[None], (224, 224))[0]
            return preprocess(np.array(resized))
        file = io.BytesIO()
        image.save(file, "png")
        loaded = keras.utils.load_img(file, target_size=(224, 224), interpolation=interpolation)
        return preprocess(keras.utils.img_to_array(loaded))

    normalization = NORMALIZATIONS[{"resnet": "caffe", "resnet_v2": "inception"}[family]]
    resizing = {"interpolation": interpolation, "antialias": True, "resampler": PILLOW}
    return Preprocessor(
        function,
        {"image_size": 224, **normalization, **(resizing if interpolation else {})},
    )


# name -> function that returns the `Preprocessor`.
PREPROCESSORS = {
    "timm resnet18.a1_in1k": lambda: timm_preprocessor("resnet18.a1_in1k"),
    "timm resnet50.tv_in1k": lambda: timm_preprocessor("resnet50.tv_in1k"),
    "timm resnetv2_50.a1h_in1k": lambda: timm_preprocessor("resnetv2_50.a1h_in1k"),
    "timm, crop mode squash": lambda: timm_transform(
        crop_mode="squash", crop_pct=0.9, interpolation="bicubic"
    ),
    "torchvision resnet18 V1": lambda: torchvision_preprocessor("resnet18", "IMAGENET1K_V1"),
    "torchvision resnet50 V2": lambda: torchvision_preprocessor("resnet50", "IMAGENET1K_V2"),
    "transformers resnet, PyTorch": lambda: transformers_preprocessor("torch"),
    "transformers resnet, Pillow": lambda: transformers_preprocessor(PILLOW),
    "transformers resnet, 384 pixels": lambda: transformers_preprocessor("torch", 384),
    "keras.applications resnet, Resizing": lambda: keras_preprocessor("resnet"),
    "keras.applications resnet, load_img": lambda: keras_preprocessor("resnet", "bilinear"),
    "keras.applications resnet_v2, load_img": lambda: keras_preprocessor("resnet_v2", "bicubic"),
}


def open_photograph(file):
    """Returns a photograph as a Pillow image in colour."""
    return Image.open(file).convert("RGB")
