"""A published network with its preprocessing inside: raw images to logits."""

from keras_resnet import archive
from keras_resnet.models import build_resnet
from keras_resnet.preprocessing import with_preprocessing
from keras_resnet.utils.errors import InputError, check_count
from keras_resnet.weights.sources import open_source


def from_pretrained(
    name, *, num_classes=None, image_size=None, test_size=False, revision=None, sha256=None
):
    """Builds a published network with its weights, and its preprocessing inside.

    Depth, variant, stem, channels, classes and preprocessing come from the repository's JSON files.
    Only safetensors are read; no code of a repository is run. The files are downloaded once, by
    `huggingface_hub`, whose environment variables are valid here: HF_HOME, HF_ENDPOINT,
    HF_HUB_OFFLINE, HF_TOKEN.

    Args:
        name: The name of a repository of timm or transformers on the Hugging Face Hub, such as
            "timm/resnet18.a1_in1k" or "microsoft/resnet-18", with "@REVISION" or
            "#sha256=…" behind it if wanted; or a local folder of such a repository.
        num_classes: The number of classes for a new, random head; by default the network's own
            head is loaded.
        image_size: Height and width that the network sees, instead of those of its training.
        test_size: Whether the network sees the images at the size and with the crop at which its
            publisher measured its accuracy, where these differ from those of its training (timm's
            `test_input_size`).
        revision: A branch, a tag or a commit, instead of one in the name.
        sha256: The checksum (hex) that the weights must have.

    Returns:
        A Keras model: raw images, uint8, (batch, height, width, channels), to logits, (batch,
        classes). `Predictor(model)` and `export(model, …)` find its class names, its preprocessing,
        its licence and its source; `archive.save_model(model, path)` saves them with it.

    Raises:
        InputError: If there is no such repository, it cannot be downloaded, or its network is none
            of ours; one line.

    Example:
        >>> from_pretrained("missing/folder/resnet18")
        Traceback (most recent call last):
        ...
        keras_resnet.utils.errors.InputError: missing/folder/resnet18: no such checkpoint file
    """
    source = open_source(name, revision=revision, sha256=sha256)
    if source.configuration is None:
        raise InputError(
            f"{source.path}: weights alone do not state their network: name the folder of their "
            "repository, with config.json, or name the network, `convert … --model NAME`"
        )
    return build_pretrained(
        source, num_classes=num_classes, image_size=image_size, test_size=test_size
    )


def build_pretrained(source, *, num_classes=None, image_size=None, test_size=False):
    """Builds the network of a `Source` of a repository; see `from_pretrained`."""
    stated, own = source.configuration, source.checkpoint.num_classes
    if num_classes is not None:
        check_count("num_classes", num_classes)
    if own is None and num_classes is None:
        raise InputError(
            f"{source.path}: the network has no head: `num_classes` gives it a new one, untrained"
        )
    preprocessing = choose_preprocessing(source, image_size, test_size)
    size, channels = preprocessing["image_size"], stated.channels
    new_head = num_classes not in (None, own)
    network = build_resnet(
        stated.spec,
        (size, size, channels),
        num_classes or own,
        variant=source.checkpoint.variant,
        stem=source.checkpoint.stem,
        name=stated.model,
    )
    source.load_into(network, skip_head=new_head)
    model = add_preprocessing(network, preprocessing)
    archive.attach_metadata(model, describe(source, preprocessing, new_head))
    return model


def choose_preprocessing(source, image_size=None, test_size=False):
    """Returns the arguments of `with_preprocessing` for a `Source` of a repository.

    Raises:
        InputError: If the repository states none.
    """
    stated = source.configuration
    if stated.preprocessing is None:
        raise InputError(
            f"{source.path}: has no preprocessor_config.json, so that its preprocessing is not "
            "known: `convert … --normalize NAME` adds one"
        )
    chosen = (test_size and stated.test_preprocessing) or stated.preprocessing
    if image_size is not None:
        check_count("image_size", image_size)
        chosen = {**chosen, "image_size": image_size}
    return chosen


def add_preprocessing(network, preprocessing):
    """Puts the published preprocessing before a network.

    Args:
        network: A Keras model of (batch, image_size, image_size, channels), floats.
        preprocessing: The result of `choose_preprocessing`.

    Returns:
        A Keras model of raw images of any size, uint8.
    """
    return with_preprocessing(network, (None, None, network.input_shape[-1]), **preprocessing)


def describe(source, preprocessing=None, new_head=False):
    """Returns the metadata of a network of a repository, a dict that JSON can hold.

    Args:
        source: Its `Source`.
        preprocessing: The preprocessing inside the model; None for the network alone.
        new_head: Whether the head is another one than the published one.
    """
    stated = source.configuration
    metadata = {
        "model": stated.model,
        "variant": source.checkpoint.variant,
        "stem": source.checkpoint.stem,
        "takes_raw_images": preprocessing is not None,
        "license": stated.license,
        "origin": source.origin,
    }
    if not new_head:
        for key in ("class_names", "class_ids"):
            if names := getattr(stated, key):
                metadata[key] = list(names)
    return metadata
