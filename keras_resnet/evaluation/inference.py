"""One way to ask a trained model, whatever file it came from."""

import os
from pathlib import Path

import numpy as np

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
from keras_resnet.evaluation.metrics import SUM_TOLERANCE, evaluate
from keras_resnet.runtimes import Runtime, open_runtime
from keras_resnet.runtimes.base import BINARY_LOGIT, BINARY_SIGMOID, LOGITS, SIGMOID, SOFTMAX
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.runtimes.normalized import normalized
from keras_resnet.utils.errors import ImageError, InputError, one_line
from keras_resnet.utils.files import expand_user
from keras_resnet.utils.progress import bar, note

_NO_IMAGES = (
    "it takes floats that are normalised already, not images: name how they are with --normalize, "
    "such as --normalize imagenet; or put `keras_resnet.with_preprocessing(network, image_shape, "
    "mean=…, std=…)` before the network and save that; or export with the preprocessing inside"
)

_CHANNELS_FIRST = (
    "; its channels come first: export the network with channels last, or read the weights of a "
    "PyTorch network with `keras-resnet convert`"
)

_DATA_SETTINGS = {"data_dir": str, "validation_split": float, "skip_bad": bool, "seed": int}

# Pixels in a batch that measures: 256 images of 224×224.
_BATCH_PIXELS = 256 * 224 * 224


class Predictor:
    """A trained model that answers with probabilities.

    Args:
        model: A `Runtime`, or a Keras model: images to numbers of one of the kinds in
            `runtimes.base.OUTPUT_KINDS`.
        metadata: What the model's file says about itself; by default what the runtime read there.
            "class_names"; "background" ("dark", "light" or None) of the images it was trained
            on; "data", how to load them again; "takes_raw_images", false for a network without
            its preprocessing.
        path: The file it came from, for messages.

    Attributes:
        runtime: The `Runtime`.
        model: The Keras model; None for the other formats.
        output_kind: What the model's numbers are, a row of `runtimes.base.OUTPUT_KINDS`.
        several_labels: Whether an image can have several labels: the probabilities of an image
            have any sum then.
        class_names: One name for each class; two where the model gives one number.
        image_shape: (height, width, channels) that the model takes; None is any size.
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
            # One number for two classes is p of the second, and 1 − p of the first.
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
            InputError: If the images are not so, the model cannot be run on them, or it answers
                with no such numbers.
        """
        return to_probabilities(self.runtime.run(images), self.output_kind, self.name)


def to_probabilities(answers, kind, name):
    """Returns a model's answers as probabilities.

    Args:
        answers: [count, columns], floats.
        kind: What they are, a row of `runtimes.base.OUTPUT_KINDS`.
        name: The model's name, for messages.

    Returns:
        float32, [count, classes]. Each row sums to 1, but for the kind "sigmoid", where each label
        has a number of its own. One column becomes two: 1 − p and p.

    Raises:
        InputError: If they are not finite, or are said to be probabilities and are not.

    Example:
        >>> to_probabilities(np.zeros((1, 4)), "logits", "a model").tolist()
        [[0.25, 0.25, 0.25, 0.25]]
        >>> to_probabilities(np.array([[0.75]]), "binary_sigmoid", "a model").tolist()
        [[0.25, 0.75]]
    """
    if not np.isfinite(answers).all():
        raise InputError(f"{name}: the model answers with numbers that are not finite")
    # In float64, so that rows sum to 1 also where the model computes in half precision.
    numbers = answers.astype("float64")
    if kind == BINARY_LOGIT:
        numbers = np.concatenate([np.zeros_like(numbers), numbers], axis=1)
    if kind in (LOGITS, BINARY_LOGIT):
        numbers = np.exp(numbers - numbers.max(axis=-1, keepdims=True))
    most = np.inf if kind in (LOGITS, BINARY_LOGIT, SOFTMAX) else 1 + SUM_TOLERANCE
    if ((numbers < 0) | (numbers > most)).any():
        raise InputError(f"{name}: the model answers with what are no probabilities")
    if kind == SIGMOID:
        return numbers.astype("float32")
    if kind == BINARY_SIGMOID:
        numbers = np.concatenate([1 - np.minimum(numbers, 1), numbers], axis=1)
    sums = numbers.sum(axis=-1, keepdims=True)
    if not sums.all():
        raise InputError(f"{name}: the model answers with what are no probabilities")
    return (numbers / sums).astype("float32")


def measure(predictor, split, class_names, batch_size=256):
    """Evaluates a model; on a terminal a bar shows how far it is.

    Args:
        predictor: A `Predictor`.
        split: The `Split`. Images that keep their own sizes are asked one by one.
        class_names: Its classes.
        batch_size: Images a call; fewer where they are large.

    Returns:
        An `Evaluation`.
    """
    height, width = split.images.shape[1:3]
    largest = _BATCH_PIXELS // (height * width) if height and width else 1
    batch_size = max(1, min(batch_size, largest))
    with bar(len(split), "evaluation") as shown:
        return evaluate(
            predictor,
            split,
            class_names,
            batch_size=batch_size,
            progress=lambda done, total: shown.update(done - shown.n),
        )


def resolve_model_path(path):
    """Returns the model that `path` means: itself, or the model of a run folder.

    Args:
        path: A model's file, a SavedModel folder, or a run folder.

    Raises:
        InputError: If the run folder has no finished model.
    """
    path = Path(path)
    if not path.is_dir() or (path / "saved_model.pb").is_file():
        return path
    model = path / "model.keras"
    if model.is_file():
        return model
    last = path / "checkpoints" / "last.keras"
    hint = "it is neither a run folder nor a SavedModel"
    if last.is_file():
        hint = f"the run has not finished; name {last}, or finish it with train --resume"
    raise InputError(f"{path}: no model.keras there: {hint}")


def load(path, *, trust=False, normalize=None, threads=None, prober=None):
    """Loads a model for inference, of any format; runs no code from a file that is not trusted.

    Args:
        path: A .keras, .tflite or .onnx file, a SavedModel folder, or the folder of a finished
            run.
        trust: Whether to load what runs code, a SavedModel, and to load .tflite and .onnx files
            without trying them in another process first.
        normalize: How the floats are normalised that the model takes, a row of
            `preprocessing.NORMALIZATIONS`; None for a model that takes raw images. A quantized
            .tflite file says it by its scale and zero point, if it can.
        threads: How many threads compute one answer of a .tflite or .onnx file.
        prober: A `runtimes.Prober` to try many files with.

    Returns:
        A `Predictor`.

    Raises:
        InputError: If there is no model there, it is damaged, or of a kind that is refused: HDF5
            models, Lambda layers, custom operators.

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
    path = resolve_model_path(path)
    runtime = open_runtime(path, threads=threads, trust=trust, prober=prober)
    return Predictor(normalized(runtime, normalize))


def evaluate_file(path, dataset=None, *, trust=False, normalize=None, **options):
    """Measures a trained model on images that it was not trained on.

    Args:
        path: What `load` takes.
        dataset: The data set's name; see `load_data`.
        trust: See `load`.
        normalize: See `load`.
        **options: What `load_dataset` takes.

    Returns:
        An `Evaluation`.

    Raises:
        InputError: If model and data do not fit each other, or one of them cannot be loaded.
    """
    predictor = load(path, trust=trust, normalize=normalize)
    data, split = load_data(predictor, dataset, **options)
    return measure(predictor, split, data.class_names)


def load_data(predictor, dataset=None, **options):
    """Loads the images that measure a model, as it takes them.

    The set that the model was trained on is split as it was then, and the part that was held out
    measures. Any other set is measured whole, or on its test split if it has one. If images that
    the model was trained on are among those that measure, a line on standard error says so.

    Args:
        predictor: A `Predictor`.
        dataset: A `Dataset`, or its name; by default the one the model was trained on.
        **options: What `load_dataset` takes.

    Returns:
        The `Dataset`, and the `Split` of it that measures.

    Raises:
        InputError: If model and data do not fit each other, the data cannot be loaded, or the
            options would measure images that the model was trained on.
    """
    return load_measured(predictor, dataset, options)[:2]


def load_measured(predictor, dataset, options):
    """Returns what `load_data` does, and the arguments of `load_dataset` that lead there."""
    if not isinstance(dataset, (Dataset, str, type(None))):
        raise InputError(f"`dataset` must be a Dataset or its name, got {type(dataset).__name__}")
    trained = predictor.metadata.get("data")
    trained = trained if isinstance(trained, dict) else {}
    if isinstance(dataset, Dataset):
        data, arguments = dataset, options
    else:
        data, arguments = _load_named(predictor, trained, dataset, options)
    if data.evaluation_split not in data.splits:
        raise InputError(f"{data.name}: it has no test or validation images")
    split = resize_to_model(data.splits[data.evaluation_split], predictor.image_shape)
    _check_fit(predictor, data, split)
    _note_trained_on(predictor, trained, data, split)
    return data, split, arguments


def _load_named(predictor, trained, dataset, options):
    """Loads a data set by its name: split as in training if it was trained on, else whole."""
    trained_on = trained.get("dataset")
    if dataset is None and not isinstance(trained_on, str):
        raise InputError(
            f"{predictor.name}: the file does not say what it was trained on: name --dataset"
        )
    image_size = predictor.image_shape[:2]
    asked = check_image_size(options.get("image_size", image_size))
    if None not in image_size and asked != image_size:
        raise InputError(
            f"{predictor.name}: the model takes images of {image_size[1]}×{image_size[0]} pixels, "
            f"got --image-size {options['image_size']}: leave it out"
        )
    arguments = {"name": dataset or trained_on, "image_size": image_size}
    known = {
        name: trained[name]
        for name, kind in _DATA_SETTINGS.items()
        if isinstance(trained.get(name), kind)
    }
    is_same = dataset is None or _is_same_set(dataset, trained_on)
    arguments |= known if is_same else {"validation_split": None}
    data = load_dataset(**arguments | options)
    if not is_same and data.fingerprint == trained.get("fingerprint"):
        # A copy of what was trained on, under another name.
        is_same = True
        arguments |= {name: known[name] for name in ("validation_split", "seed") if name in known}
        data = load_dataset(**arguments | options)
    if is_same and data.evaluation_split == "validation":
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
    """Refuses options that would measure images of the part that was trained on."""
    share, seed = known.get("validation_split"), known.get("seed")
    asked, asked_seed = options.get("validation_split", share), options.get("seed", seed)
    # Of one seed, a smaller share is a part of a larger one; see `stratified_share`.
    is_larger = share is not None and (asked is None or asked > share)
    if is_larger or asked_seed != seed:
        raise InputError(
            f"{data.name}: the model was trained on this set, with --validation-split {share} and "
            f"seed {seed}; a share of {asked} and seed {asked_seed} would measure images it was "
            "trained on: leave --validation-split out"
        )


def _note_trained_on(predictor, trained, data, split):
    """Says on standard error how many of the images that measure were trained on."""
    marks = predictor.metadata.get("trained_on")
    if isinstance(marks, str) and marks and isinstance(split.images, ImageFiles):
        marks = split_marks(marks)
        count = sum(mark in marks for mark in split_marks(content_marks(split.images), list))
        if count:
            note(
                f"{data.name}: {count} of the {len(split)} images measured are files that the "
                "model was trained on: the accuracy is too high for new images"
            )
    elif data.name == trained.get("dataset") and data.fingerprint != trained.get(
        "fingerprint", data.fingerprint
    ):
        note(
            f"{data.name}: the set has changed since the training: some of the {len(split)} images "
            "measured may have been trained on"
        )


def resize_to_model(split, image_shape):
    """Returns a split whose image files are decoded as a model takes them.

    Args:
        split: A `Split`; of arrays it is returned as it is.
        image_shape: (height, width, channels) that the model takes; None is any size.
    """
    if not isinstance(split.images, ImageFiles):
        return split
    *sizes, channels = image_shape
    # The sizes that the model leaves open are those that the images were loaded at.
    height, width = (a or b for a, b in zip(sizes, split.images.shape[1:3], strict=True))
    return Split(ImageFiles(split.images.sources, (height, width), channels), split.labels)


def _check_fit(predictor, data, split):
    shape = tuple(split.images.shape[1:])
    fits = all(a in (None, b) for a, b in zip(predictor.image_shape, shape, strict=True))
    if not fits:
        raise InputError(
            f"{predictor.name}: the model takes images of shape {predictor.image_shape}, and "
            f"those of {data.name} are {shape}"
        )
    known = predictor.metadata.get("class_names")
    if known and known != list(data.class_names):
        raise InputError(
            f"{predictor.name}: the model knows the classes {_some(known)}, and {data.name} has "
            f"{_some(data.class_names)}"
        )
    if len(predictor.class_names) != len(data.class_names):
        raise InputError(
            f"{predictor.name}: the model has {len(predictor.class_names)} outputs, and "
            f"{data.name} has {len(data.class_names)} classes"
        )


def _some(names, most=3):
    shown = ", ".join(names[:most])
    return f"{shown} … ({len(names)})" if len(names) > most else shown


def predict_files(
    path, images, *, top=3, invert="auto", trust=False, normalize=None, on_error=None
):
    """Names what is on image files.

    Args:
        path: What `load` takes.
        images: Paths of images: any size, colour or grey, any format that Pillow reads. Each is
            resized to what the model takes and converted to grey or colour.
        top: How many labels an image, the most probable first.
        invert: "yes", "no", or "auto": light and dark are swapped where the image's border is
            light, the model takes grey images, and those it was trained on are light on dark.
        trust: See `load`.
        normalize: See `load`.
        on_error: Called with the `ImageError` of each image that cannot be read, and the other
            images are named; None raises the first.

    Returns:
        One dict an image that could be read: "image" (the path), "inverted" (a bool), "labels" (a
        list of dicts with "label" and "probability").

    Raises:
        InputError: If the model cannot be loaded; an `ImageError` if an image cannot be read.
    """
    predictor = load(path, trust=trust, normalize=normalize)
    rows = []
    for image in images:
        try:
            rows.append(_predict_file(predictor, image, top, invert))
        except ImageError as error:
            if on_error is None:
                raise
            on_error(error)
    return rows


def _predict_file(predictor, path, top, invert):
    shown = printable_path(path)
    try:
        pixels = decode_image(path, predictor.image_shape[:2], predictor.image_shape[2])[None]
    except FileNotFoundError:
        raise ImageError(f"{shown}: no such image file") from None
    except Exception as error:  # Pillow raises many kinds on a damaged file
        raise ImageError(f"{shown}: cannot be read: {one_line(error)}") from error
    inverted = _is_inverted(pixels, invert, predictor.metadata.get("background"))
    try:
        probabilities = predictor(255 - pixels if inverted else pixels)[0]
    except InputError as error:
        if None not in predictor.image_shape:
            raise
        # A network of any size has a smallest one: the fault is this image's.
        size = f"{pixels.shape[2]}×{pixels.shape[1]} pixels"
        raise ImageError(f"{shown}: {size}: {error}") from error
    best = np.argsort(-probabilities, kind="stable")[:top]
    labels = [
        {"label": predictor.class_names[i], "probability": float(probabilities[i])} for i in best
    ]
    return {"image": shown, "inverted": inverted, "labels": labels}


def _is_inverted(pixels, invert, background):
    """Returns whether light and dark are to be swapped; colour is never touched by "auto"."""
    if invert != "auto":
        return invert == "yes"
    return background == "dark" and pixels.shape[-1] == 1 and border_level(pixels) >= 128
