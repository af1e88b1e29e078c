"""The records of a run: config.json, and the metadata in each of its model files."""

import dataclasses

import numpy as np

from keras_resnet import archive, config
from keras_resnet.datasets.images import ImageFiles, border_level, content_marks
from keras_resnet.training import fine_tuning, run_folder
from keras_resnet.utils import environment

MOST_MARKED = 500_000
"""The metadata of a larger data set hold no mark of each training image."""


def begin(settings, source):
    """Returns the content of config.json before the data are loaded.

    Args:
        settings: The run's `TrainConfig`.
        source: The checkpoint to start from, a `weights.sources.Source`; None for none.
    """
    record = {"settings": dataclasses.asdict(settings)}
    return {**record, **({"weights": fine_tuning.record(source)} if source else {})}


def finished_epochs(run_dir):
    """Returns the history in a run's last checkpoint: one dict per finished epoch."""
    path = run_folder.last_checkpoint(run_dir)
    return archive.read_metadata(path).get("history", []) if path.exists() else []


def describe(trainer, num_parameters):
    """Returns the content of config.json once the network is built.

    Args:
        trainer: The `Trainer`.
        num_parameters: The network's numbers of parameters, a dict.
    """
    settings, dataset = trainer.settings, trainer.dataset
    return {
        **begin(settings, trainer.source),
        "model": settings.model,
        **num_parameters,
        "dataset": {
            "name": dataset.name,
            "source": dataset.source,
            "fingerprint": dataset.fingerprint,
            "class_names": list(dataset.class_names),
            "image_shape": list(dataset.image_shape),
            "splits": {name: len(split) for name, split in dataset.splits.items()},
            "evaluation_split": dataset.evaluation_split,
            "selection_split": dataset.selection_split,
            "class_counts": dataset.class_counts().tolist(),
        },
        "recipe": {"name": settings.recipe, **dataclasses.asdict(trainer.recipe)},
        "seed": settings.seed,
        "precision": trainer.precision,
        "precision_reason": trainer.precision_reason,
        "strategy": trainer.decision.name,
        "strategy_reason": trainer.decision.reason,
        "replicas": trainer.decision.num_replicas,
        "command": trainer.command,
        **environment.describe_environment(),
    }


def describe_continued(trainer):
    """Returns the content of config.json of a run that is resumed to another number of epochs."""
    continued = {
        "after_epoch": len(trainer.history),
        "epochs": trainer.recipe.epochs,
        "command": trainer.command,
    }
    return {
        **trainer.record,
        "settings": dataclasses.asdict(trainer.settings),
        "recipe": {"name": trainer.settings.recipe, **dataclasses.asdict(trainer.recipe)},
        "continued": [*trainer.record.get("continued", []), continued],
    }


def model_metadata(trainer):
    """Returns the metadata of each model file of a run."""
    settings, dataset, source = trainer.settings, trainer.dataset, trainer.source
    train = dataset.splits["train"]
    return {
        "model": settings.model,
        "variant": trainer.recipe.variant,
        "stem": trainer.recipe.stem,
        "normalize": settings.normalize,
        "origin": source.origin if source else None,
        "class_names": list(dataset.class_names),
        "background": find_background(train),
        "data": {**config.data_settings(settings), "fingerprint": dataset.fingerprint},
        "trained_on": _mark_images(train),
    }


def find_background(split, sample=1000):
    """Returns "dark" if nearly all images are grey with a dark border, else None.

    `predict` inverts photographs of dark on light for such a model; see
    `inference.predict_files`.

    Args:
        split: The training images, a `Split`.
        sample: Number of images to look at, evenly spaced.
    """
    if split.images.shape[-1] != 1:
        return None
    images = split.images[np.linspace(0, len(split) - 1, min(sample, len(split))).astype(int)]
    levels = [border_level(image[None]) for image in images]
    return "dark" if np.mean(np.less(levels, 64)) >= 0.9 else None


def _mark_images(split):
    """Returns the `content_marks` of the training images' files; "" for images in memory."""
    if not isinstance(split.images, ImageFiles) or len(split) > MOST_MARKED:
        return ""
    return content_marks(split.images)
