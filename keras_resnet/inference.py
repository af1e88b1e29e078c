"""One way to ask a trained model, whatever file it came from."""

from pathlib import Path

import numpy as np

from keras_resnet.datasets import Dataset, Split, load_dataset
from keras_resnet.datasets.images import (
    ImageFiles,
    border_level,
    decode_image,
    open_upright,
    printable_path,
)
from keras_resnet.errors import InputError, one_line
from keras_resnet.evaluation import evaluate
from keras_resnet.progress import bar
from keras_resnet.runtimes import Runtime, open_runtime
from keras_resnet.runtimes.keras_file import KerasRuntime
from keras_resnet.runtimes.normalized import normalized

_NO_IMAGES = (
    "it takes floats that are normalised already, not images: name how they are with --normalize, "
    "such as --normalize imagenet, or export with the preprocessing inside"
)

_DATA_SETTINGS = {"data_dir": str, "validation_share": float, "skip_bad": bool, "seed": int}


class Predictor:
    """A trained model that answers with probabilities.

    Args:
        model: A `Runtime`, or a Keras model: images to logits, or to probabilities if it ends in
            a softmax.
        card: What the model's file says about itself; by default what the runtime read there.
            "class_names"; "background" ("dark", "light" or None) of the images it was trained
            on; "data", how to load them again; "takes_raw_images", false for a network without
            its preprocessing.
        path: The file it came from, for messages.

    Attributes:
        runtime: The `Runtime`.
        model: The Keras model; None for the other formats.
        class_names: One name for each output.
        image_shape: (height, width, channels) that the model takes; None is any size.
    """

    def __init__(self, model, card=None, path=None):
        if not isinstance(model, Runtime):
            model = KerasRuntime(model, card, path)
        self.runtime = model
        self.model = getattr(model, "model", None)
        self.card = model.card if card is None else card
        self.path = path or model.path
        self.name = model.name
        if self.card.get("takes_raw_images") is False or not model.takes_images:
            raise InputError(f"{self.name}: {_NO_IMAGES}")
        self.image_shape, outputs = self._check_shapes()
        self.gives_probabilities = model.gives_probabilities
        names = self.card.get("class_names") or [f"class {i}" for i in range(outputs)]
        if not isinstance(names, list) or len(names) != outputs:
            raise InputError(
                f"{self.name}: the model has {outputs} outputs, and its card the class names "
                f"{names!r:.60}"
            )
        self.class_names = tuple(map(str, names))

    def _check_shapes(self):
        """Returns the shape of an image and the number of outputs."""
        shapes = [self.runtime.input.shape, self.runtime.output.shape]
        if [len(shape) for shape in shapes] == [4, 2]:
            (_, *image), (_, outputs) = shapes
            if image[-1] in (1, 3) and outputs is not None:
                return tuple(image), outputs
        raise InputError(
            f"{self.name}: the model must take images (batch, height, width, 1 or 3) and give "
            f"logits (batch, classes); its inputs and outputs are {shapes!s:.200}"
        )

    def __call__(self, images):
        """Returns the probability of each class for each image.

        Args:
            images: uint8, [count, height, width, channels], of the model's `image_shape`.

        Returns:
            float32, [count, classes]; each row sums to 1.

        Raises:
            InputError: If the model cannot be run on them, or answers with no such numbers.
        """
        return to_probabilities(self.runtime.run(images), self.gives_probabilities, self.name)


def to_probabilities(answers, are_probabilities, name):
    """Returns a model's answers as probabilities.

    Args:
        answers: [count, classes], floats.
        are_probabilities: Whether they are a softmax's; otherwise they are logits.
        name: The model's name, for messages.

    Returns:
        float32, [count, classes]; each row sums to 1.

    Raises:
        InputError: If they are not finite, or are said to be probabilities and are not.

    Example:
        >>> to_probabilities(np.zeros((1, 4)), False, "a model").tolist()
        [[0.25, 0.25, 0.25, 0.25]]
    """
    if not np.isfinite(answers).all():
        raise InputError(f"{name}: the model answers with numbers that are not finite")
    # In float64, so that rows sum to 1 also where the model computes in half precision.
    powers = answers.astype("float64")
    if not are_probabilities:
        powers = np.exp(powers - powers.max(axis=-1, keepdims=True))
    sums = powers.sum(axis=-1, keepdims=True)
    if (powers < 0).any() or not sums.all():
        raise InputError(f"{name}: the model answers with what are no probabilities")
    return (powers / sums).astype("float32")


def measure(predictor, split, class_names, batch_size=256):
    """Evaluates a model; on a terminal a bar shows how far it is.

    Args:
        predictor: A `Predictor`.
        split: The `Split`.
        class_names: Its classes.
        batch_size: Images a call.

    Returns:
        An `Evaluation`.
    """
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
    """Measures a trained model on the split that a data set holds for that.

    Args:
        path: What `load` takes.
        dataset: The data set's name; by default the one it was trained on, split as it was then.
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

    Args:
        predictor: A `Predictor`.
        dataset: A `Dataset`, or its name; by default the one the model was trained on, split as
            it was then.
        **options: What `load_dataset` takes.

    Returns:
        The `Dataset`, and the `Split` of it that measures.

    Raises:
        InputError: If model and data do not fit each other, or the data cannot be loaded.
    """
    height, width, _ = predictor.image_shape
    data = dataset
    if not isinstance(dataset, (Dataset, str, type(None))):
        raise InputError(f"`dataset` must be a Dataset or its name, got {type(dataset).__name__}")
    if not isinstance(dataset, Dataset):
        size = {"image_size": (height, width)} if height and width else {}
        data = load_dataset(**data_arguments(predictor, dataset, {**size, **options}))
    if data.evaluation_split not in data.splits:
        raise InputError(f"{data.name}: it has no test or validation images")
    split = as_taken(data.splits[data.evaluation_split], predictor.image_shape)
    _check_fit(predictor, data, split)
    return data, split


def as_taken(split, image_shape):
    """Returns a split whose image files are decoded as a model takes them.

    Args:
        split: A `Split`; of arrays it is returned as it is.
        image_shape: (height, width, channels) that the model takes; None is any size.
    """
    height, width, channels = image_shape
    if not isinstance(split.images, ImageFiles) or not (height and width):
        return split
    return Split(ImageFiles(split.images.sources, (height, width), channels), split.labels)


def data_arguments(predictor, dataset, options):
    """Returns the arguments of `load_dataset` that load what measures a model.

    Args:
        predictor: A `Predictor`.
        dataset: A data set's name; None for the one the model was trained on. A `Dataset` needs
            none: then these are the options.
        options: What was asked for beside the name, a dict.
    """
    if isinstance(dataset, Dataset):
        return options
    data = predictor.card.get("data")
    known = data if isinstance(data, dict) else {}
    trained_on = known.get("dataset")
    known = {name: known[name] for name, kind in _DATA_SETTINGS.items() if _is(known, name, kind)}
    if dataset is None and not isinstance(trained_on, str):
        raise InputError(
            f"{predictor.name}: the file does not say what it was trained on: name --dataset"
        )
    if dataset in (None, trained_on):
        return {"name": trained_on, **known, **options}
    return {"name": dataset, **options}


def _is(settings, name, kind):
    return isinstance(settings.get(name), kind)


def _check_fit(predictor, data, split):
    shape = tuple(split.images.shape[1:])
    fits = all(a in (None, b) for a, b in zip(predictor.image_shape, shape, strict=True))
    if not fits:
        raise InputError(
            f"{predictor.name}: the model takes images of shape {predictor.image_shape}, and "
            f"those of {data.name} are {shape}"
        )
    known = predictor.card.get("class_names")
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


def predict_files(path, images, *, top=3, invert="auto", trust=False, normalize=None):
    """Names what is on image files.

    Args:
        path: What `load` takes.
        images: Paths of images: any size, colour or grey, any format that Pillow reads. Each is
            resized to what the model takes and converted to grey or colour.
        top: How many labels an image, the most probable first.
        invert: "yes", "no", or "auto": light and dark are swapped where the image's border is on
            the other side of mid-grey than that of the images the model was trained on.
        trust: See `load`.
        normalize: See `load`.

    Returns:
        One dict an image: "image" (the path), "inverted" (a bool), "labels" (a list of dicts
        with "label" and "probability").

    Raises:
        InputError: If the model or an image cannot be loaded.
    """
    predictor = load(path, trust=trust, normalize=normalize)
    rows = []
    for image in images:
        pixels = _read_image(image, predictor.image_shape)
        inverted = _is_inverted(pixels, invert, predictor.card.get("background"))
        probabilities = predictor(255 - pixels if inverted else pixels)[0]
        best = np.argsort(-probabilities, kind="stable")[:top]
        labels = [
            {"label": predictor.class_names[i], "probability": float(probabilities[i])}
            for i in best
        ]
        rows.append({"image": printable_path(image), "inverted": inverted, "labels": labels})
    return rows


def _read_image(path, image_shape):
    """Returns an image file as a batch of one, uint8, [1, height, width, channels]."""
    height, width, channels = image_shape
    try:
        own = open_upright(path).size
        return decode_image(path, (height or own[1], width or own[0]), channels)[None]
    except FileNotFoundError:
        raise InputError(f"{printable_path(path)}: no such image file") from None
    except Exception as error:  # Pillow raises many kinds on a damaged file
        raise InputError(f"{printable_path(path)}: cannot be read: {one_line(error)}") from error


def _is_inverted(pixels, invert, background):
    if invert != "auto":
        return invert == "yes"
    return background in ("dark", "light") and background != (
        "dark" if border_level(pixels) < 128 else "light"
    )
