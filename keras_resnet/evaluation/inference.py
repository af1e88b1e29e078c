"""Predictions of a trained model in any format, and the images to evaluate it on."""

import os
from pathlib import Path

import numpy as np

from keras_resnet import config
from keras_resnet.archive import find_model
from keras_resnet.datasets import Dataset, Split, load_dataset
from keras_resnet.datasets.images import (
    ImageFiles,
    border_level,
    check_image_size,
    content_marks,
    decode_image,
    printable_path,
    split_marks,
)
from keras_resnet.datasets.photos import find_images
from keras_resnet.evaluation.metrics import SUM_TOLERANCE, evaluate
from keras_resnet.runtimes import Runtime, open_runtime
from keras_resnet.runtimes.base import BINARY_LOGIT, BINARY_SIGMOID, LOGITS, SIGMOID, SOFTMAX
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.runtimes.normalized import normalized
from keras_resnet.runtimes.resized import resized
from keras_resnet.utils.errors import ImageError, InputError, one_line
from keras_resnet.utils.files import expand_user
from keras_resnet.utils.progress import note
from keras_resnet.weights.hub import find_repository
from keras_resnet.weights.pretrained import from_pretrained

_NO_IMAGES = (
    "it takes floats that are normalised already, not images: name their normalisation, such as "
    "--normalize imagenet, or 0-255 where it was trained on 0…255; or put "
    "`keras_resnet.with_preprocessing(network, image_shape, mean=…, std=…)` before the network and "
    "save that; or export with the preprocessing inside"
)

_CHANNELS_FIRST = (
    "; its channels come first: export the network with channels last, or read the weights of a "
    "PyTorch network with `keras-resnet convert`"
)


class Predictor:
    """A trained model that predicts probabilities.

    Args:
        model: A `Runtime`, or a Keras model from images to outputs of one of the kinds in
            `runtimes.base.OUTPUT_KINDS`.
        metadata: The metadata of the model's file; by default the runtime's. Keys: "class_names";
            "background" ("dark", "light" or None) of the training images; "data", the arguments
            that load them again; "takes_raw_images", false for a network without preprocessing.
        path: The model's file, for messages.

    Attributes:
        runtime: The `Runtime`.
        model: The Keras model; None for the other formats.
        output_kind: The kind of the model's outputs, a row of `runtimes.base.OUTPUT_KINDS`.
        several_labels: Whether an image can have several labels. Its probabilities then have any
            sum.
        class_names: One name for each class; two for a model with one output.
        image_shape: (height, width, channels) of the model's input; None is any size.
    """

    def __init__(self, model, metadata=None, path=None):
        if not isinstance(model, Runtime):
            model = KerasRuntime(model, metadata, path)
        self.runtime = model
        self.model = getattr(model, "model", None)
        self.metadata = model.metadata if metadata is None else metadata
        self.path = path or model.path
        self.name = model.name
        self.image_shape, outputs = self._check_shapes()
        if self.metadata.get("takes_raw_images") is False or not model.takes_images:
            raise InputError(f"{self.name}: {_NO_IMAGES}")
        self.output_kind = model.output_kind
        self.several_labels = self.output_kind == SIGMOID
        names = self.metadata.get("class_names") or [f"class {i}" for i in range(outputs)]
        if not isinstance(names, list) or len(names) != outputs:
            raise InputError(
                f"{self.name}: the model has {outputs} outputs, and its metadata the class names "
                f"{names!r:.60}"
            )
        self.class_names = tuple(map(str, names))

    def _check_shapes(self):
        """Returns the shape of an image and the number of classes."""
        shapes = [self.runtime.input.shape, self.runtime.output.shape]
        _, *image = shapes[0] or (None,)
        columns = self.runtime.columns
        if len(image) == 3 and image[-1] in (1, 3) and columns is not None:
            # A single output is the probability of the second of two classes.
            return tuple(image), max(columns, 2)
        is_channels_first = len(image) == 3 and image[0] in (1, 3)
        raise InputError(
            f"{self.name}: the model must take images (batch, height, width, 1 or 3) and give "
            f"logits (batch, classes); its inputs and outputs are {shapes!s:.200}"
            f"{_CHANNELS_FIRST if is_channels_first else ''}"
        )

    def __call__(self, images):
        """Returns the probability of each class for each image.

        Args:
            images: uint8, [count, height, width, channels], of the model's `image_shape`.

        Returns:
            float32, [count, classes]; each row sums to 1, unless `several_labels`.

        Raises:
            InputError: The images have another type or shape, the model fails on them, or its
                outputs are not finite or not probabilities.
        """
        return to_probabilities(self.runtime.run(images), self.output_kind, self.name)


def to_probabilities(outputs, kind, name):
    """Converts a model's outputs to probabilities.

    Args:
        outputs: The outputs, floats, [count, columns].
        kind: Their kind, a row of `runtimes.base.OUTPUT_KINDS`.
        name: The model's name, for messages.

    Returns:
        float32, [count, classes]. Each row sums to 1, except for the kind "sigmoid", whose labels
        are independent. One column becomes two: 1 − p and p.

    Raises:
        InputError: The outputs are not finite, or not probabilities although `kind` requires them.

    Example:
        >>> to_probabilities(np.zeros((1, 4)), "logits", "a model").tolist()
        [[0.25, 0.25, 0.25, 0.25]]
        >>> to_probabilities(np.array([[0.75]]), "binary_sigmoid", "a model").tolist()
        [[0.25, 0.75]]
    """
    if not np.isfinite(outputs).all():
        raise InputError(f"{name}: the model's outputs are not finite")
    # float64: rows must sum to 1 for models in half precision too.
    numbers = outputs.astype("float64")
    if kind == BINARY_LOGIT:
        numbers = np.concatenate([np.zeros_like(numbers), numbers], axis=1)
    if kind in (LOGITS, BINARY_LOGIT):
        numbers = np.exp(numbers - numbers.max(axis=-1, keepdims=True))
    largest = np.inf if kind in (LOGITS, BINARY_LOGIT, SOFTMAX) else 1 + SUM_TOLERANCE
    is_valid = ((numbers >= 0) & (numbers <= largest)).all()
    if kind == BINARY_SIGMOID:
        numbers = np.concatenate([1 - np.minimum(numbers, 1), numbers], axis=1)
    sums = 1 if kind == SIGMOID else numbers.sum(axis=-1, keepdims=True)
    if not is_valid or not np.all(sums):
        raise InputError(f"{name}: the model's outputs are not probabilities")
    return (numbers / sums).astype("float32")


def load(path, *, trust=False, normalize=None, threads=None, prober=None):
    """Loads a model of any format for inference; runs no code from a file that is not trusted.

    Args:
        path: A .keras, .tflite or .onnx file, a SavedModel folder, the folder of a finished run, a
            published network's name or folder, such as "timm/resnet18.a1_in1k"; or a row of
            `archive.TRAINED`: "fashion_mnist".
        trust: Whether to load a SavedModel, which is code, and to load .tflite and .onnx files
            without trying them in another process first.
        normalize: The normalisation of the floats that the model takes, a row of
            `preprocessing.NORMALIZATIONS`; None for a model that takes raw images. A quantized
            .tflite file's scale and zero point usually determine it.
        threads: Number of threads for one prediction of a .tflite or .onnx file.
        prober: A `runtimes.Prober` to try many files with.

    Returns:
        A `Predictor`.

    Raises:
        InputError: There is no model, it is damaged, or it is of a refused kind: HDF5 models,
            Lambda layers, custom operators.

    Example:
        >>> import tempfile
        >>> from keras_resnet import Spec, archive, build_resnet, with_preprocessing
        >>> network = build_resnet(Spec((1,), (4,)), (8, 8, 1), 3)
        >>> path = Path(tempfile.mkdtemp()) / "small.keras"
        >>> archive.save_model(with_preprocessing(network, (8, 8, 1)), path, {})
        >>> probabilities = load(path)(np.zeros((2, 8, 8, 1), "uint8"))
        >>> probabilities.shape, probabilities.sum(axis=1).round(3).tolist()
        ((2, 3), [1.0, 1.0])
    """
    return Predictor(open_model(path, normalize, threads=threads, trust=trust, prober=prober))


def open_model(model, normalize=None, **options):
    """Opens a model by its path or by its published name: the one place for all commands.

    Args:
        model: See `load`, as for all that follow.
        normalize: See `load`.
        **options: Arguments of `open_runtime`.

    Returns:
        A `Runtime`.

    Raises:
        InputError: If there is no such model, or it cannot be loaded.
    """
    repository = find_repository(model)
    if repository is None:
        runtime = open_runtime(find_model(model), **options)
        return normalized(resized(runtime), normalize)
    runtime = KerasRuntime(from_pretrained(repository), path=repository.name)
    return normalized(runtime, normalize)


# ----------------------------------------------------------------------------------------------
# Evaluation, on images that were not trained on
# ----------------------------------------------------------------------------------------------


def evaluate_file(path, dataset=None, *, trust=False, normalize=None, **options):
    """Evaluates a trained model on images that it was not trained on.

    Args:
        path: See `load`.
        dataset: The data set's name; see `load_data`.
        trust: See `load`.
        normalize: See `load`.
        **options: Arguments of `load_dataset`.

    Returns:
        An `Evaluation`.

    Raises:
        InputError: The model and the data do not match, or one of them cannot be loaded.
    """
    predictor = load(path, trust=trust, normalize=normalize)
    data, split, _ = load_data(predictor, dataset, **options)
    return evaluate(predictor, split, data.class_names)


def load_data(predictor, dataset=None, **options):
    """Loads the images to evaluate a model on.

    The training set is split as it was in training, and the held-out part is used. Another set is
    represented by its test split, else by its validation split, else by all its images. If training
    images are among the images, a note on standard error states their number.

    Args:
        predictor: A `Predictor`.
        dataset: A `Dataset`, or its name; by default the set that the model was trained on.
        **options: Arguments of `load_dataset`.

    Returns:
        The `Dataset`; its `Split` to evaluate on, decoded for the model; and the arguments of
        `load_dataset` that load the same set again.

    Raises:
        InputError: The model and the data do not match, the data cannot be loaded, or `options`
            would evaluate training images.
    """
    if not isinstance(dataset, (Dataset, str, type(None))):
        raise InputError(f"`dataset` must be a Dataset or its name, got {type(dataset).__name__}")
    training = predictor.metadata.get("data")
    training = training if isinstance(training, dict) else {}
    if isinstance(dataset, Dataset):
        data = dataset
    else:
        data, options = _load_by_name(predictor, training, dataset, options)
    if data.evaluation_split not in data.splits:
        raise InputError(f"{data.name}: it has no test or validation images")
    split = resize_to_model(data.splits[data.evaluation_split], predictor.image_shape)
    _check_match(predictor, data, split)
    _note_training_images(predictor, training, data, split)
    return data, split, options


def _load_by_name(predictor, training, dataset, options):
    """Loads a set, split as in training if it is the training set; returns it and all options."""
    trained_on = training.get("dataset")
    if dataset is None and not isinstance(trained_on, str):
        raise InputError(f"{predictor.name}: does not record a training set: name --dataset")
    image_size = predictor.image_shape[:2]
    given_size = check_image_size(options.get("image_size", image_size))
    if None not in image_size and given_size != image_size:
        raise InputError(
            f"{predictor.name}: the model takes images of {image_size[1]}×{image_size[0]} pixels, "
            f"got --image-size {options['image_size']}: leave it out"
        )
    arguments = {"name": dataset or trained_on, "image_size": image_size}
    known = config.recorded_data_settings(training)
    known.pop("dataset", None)
    is_training_set = dataset is None or _is_same_set(dataset, trained_on)
    arguments |= known if is_training_set else {"validation_split": None}
    data = load_dataset(**arguments | options)
    if not is_training_set and data.fingerprint == training.get("fingerprint"):
        # A copy of the training set under another name.
        is_training_set = True
        arguments |= {name: known[name] for name in ("validation_split", "seed") if name in known}
        data = load_dataset(**arguments | options)
    if is_training_set and data.evaluation_split == "validation":
        _check_held_out(data, known, options)
    return data, arguments | options


def _is_same_set(dataset, other):
    """Returns whether two names are of one data set: equal, or paths of one folder."""
    if dataset == other or not isinstance(other, str):
        return dataset == other
    if not (dataset.startswith("folder:") and other.startswith("folder:")):
        return False
    one, another = (
        os.path.realpath(expand_user(name.removeprefix("folder:"))) for name in (dataset, other)
    )
    return one == another


def _check_held_out(data, known, options):
    """Refuses options that would evaluate training images."""
    share, seed = known.get("validation_split"), known.get("seed")
    given, given_seed = options.get("validation_split", share), options.get("seed", seed)
    # With one seed a smaller validation part is a subset of a larger one; see `stratified_split`.
    is_larger = share is not None and (given is None or given > share)
    if is_larger or given_seed != seed:
        raise InputError(
            f"{data.name}: the model was trained on this set, with --validation-split {share} and "
            f"seed {seed}; --validation-split {given} and seed {given_seed} would evaluate images "
            "it was trained on: leave --validation-split out"
        )


def _note_training_images(predictor, training, data, split):
    """Reports on standard error how many images of a split the model was trained on."""
    marks = predictor.metadata.get("trained_on")
    if isinstance(marks, str) and marks and isinstance(split.images, ImageFiles):
        marks = split_marks(marks)
        count = sum(mark in marks for mark in split_marks(content_marks(split.images), list))
        if count:
            note(
                f"{data.name}: {count} of the {len(split)} images measured are files that the "
                "model was trained on: the accuracy is too high for new images"
            )
    elif data.name == training.get("dataset") and data.fingerprint != training.get(
        "fingerprint", data.fingerprint
    ):
        note(
            f"{data.name}: the set has changed since the training: some of the {len(split)} images "
            "measured may have been trained on"
        )


def resize_to_model(split, image_shape):
    """Returns a split whose image files are decoded at the size and channels of a model's input.

    Args:
        split: A `Split`; one of arrays is returned unchanged.
        image_shape: (height, width, channels) of the model's input; None is any size.
    """
    if not isinstance(split.images, ImageFiles):
        return split
    *sizes, channels = image_shape
    # A size that the model leaves open stays the size that the images were loaded at.
    height, width = (a or b for a, b in zip(sizes, split.images.shape[1:3], strict=True))
    images = split.images
    images = ImageFiles(images.sources, (height, width), channels, images.resize)
    return Split(images, split.labels)


def _check_match(predictor, data, split):
    shape = tuple(split.images.shape[1:])
    if not all(a in (None, b) for a, b in zip(predictor.image_shape, shape, strict=True)):
        raise InputError(
            f"{predictor.name}: the model takes images of shape {predictor.image_shape}, and "
            f"those of {data.name} are {shape}"
        )
    known, ids = (predictor.metadata.get(key) for key in ("class_names", "class_ids"))
    # Folders of ImageNet have WordNet's ids for names.
    if known and list(data.class_names) not in (known, ids):
        raise InputError(
            f"{predictor.name}: the model knows the classes {_first(known)}, and {data.name} has "
            f"{_first(data.class_names)}"
        )
    if len(predictor.class_names) != len(data.class_names):
        raise InputError(
            f"{predictor.name}: the model has {len(predictor.class_names)} outputs, and "
            f"{data.name} has {len(data.class_names)} classes"
        )


def _first(names, most=3):
    shown = ", ".join(names[:most])
    return f"{shown} … ({len(names)})" if len(names) > most else shown


# ----------------------------------------------------------------------------------------------
# Prediction for image files
# ----------------------------------------------------------------------------------------------


def predict_files(
    path, images, *, top=3, invert="auto", trust=False, normalize=None, on_error=None
):
    """Classifies image files.

    Args:
        path: See `load`.
        images: Paths of images, and of folders that are searched for images: any size, colour or
            grey, any format that Pillow reads. Each is resized to the model's input and converted
            to grey or colour.
        top: Number of labels for each image, the most probable first.
        invert: "yes", "no", or "auto": light and dark are swapped if the image's border is light,
            the model takes grey images, and its training images were light on dark.
        trust: See `load`.
        normalize: See `load`.
        on_error: Called with the `ImageError` of each image that cannot be read; the other images
            are classified. None raises the first error.

    Returns:
        One dict for each readable image: "image" (the path), "inverted" (a bool), "labels" (a list
        of dicts with "label" and "probability").

    Raises:
        InputError: The model cannot be loaded; an `ImageError` if an image cannot be read.
    """
    predictor = load(path, trust=trust, normalize=normalize)
    rows = []
    for image in _list_images(images):
        try:
            rows.append(_predict_file(predictor, image, top, invert))
        except ImageError as error:
            if on_error is None:
                raise
            on_error(error)
    return rows


def _list_images(paths):
    """Yields the images' paths as they were given; a folder's images in its place."""
    for path in paths:
        yield from (find_images(Path(path)) if os.path.isdir(path) else []) or [path]


def _predict_file(predictor, path, top, invert):
    shown = printable_path(path)
    try:
        pixels = decode_image(path, predictor.image_shape[:2], predictor.image_shape[2])[None]
    except FileNotFoundError:
        raise ImageError(f"{shown}: no such image file") from None
    except IsADirectoryError:
        raise ImageError(f"{shown}: the folder holds no images") from None
    except Exception as error:  # Pillow raises many kinds on a damaged file
        raise ImageError(f"{shown}: cannot be read: {one_line(error)}") from error
    is_inverted = invert == "yes"
    if invert == "auto":
        is_grey_on_dark = predictor.metadata.get("background") == "dark" and pixels.shape[-1] == 1
        is_inverted = is_grey_on_dark and border_level(pixels) >= 128
    try:
        probabilities = predictor(255 - pixels if is_inverted else pixels)[0]
    except InputError as error:
        if None not in predictor.image_shape:
            raise
        # A network for images of any size has a smallest size: only this image is unusable.
        size = f"{pixels.shape[2]}×{pixels.shape[1]} pixels"
        raise ImageError(f"{shown}: {size}: {error}") from error
    best = np.argsort(-probabilities, kind="stable")[:top]
    labels = [
        {"label": predictor.class_names[i], "probability": float(probabilities[i])} for i in best
    ]
    return {"image": shown, "inverted": is_inverted, "labels": labels}
