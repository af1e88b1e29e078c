"""Trains under Ray Train: `python launchers/ray_train.py --run-dir DIR [options] [NAME=VALUE …]`.

Each NAME=VALUE is an argument of `keras_resnet.train`, such as epochs=3 or dataset=folder:/images.
"""

import argparse
import ast
import logging
import os
import shutil
import tempfile
from pathlib import Path

import ray
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from ray.train.tensorflow import TensorflowTrainer


def parse():
    """Parses the command line."""
    parser = argparse.ArgumentParser(description="Trains under Ray Train, one worker per machine.")
    parser.add_argument("--run-dir", required=True, help="a folder that all machines share")
    parser.add_argument("--workers", type=int, default=2, help="default: 2")
    parser.add_argument("--cpus", type=int, default=1, help="of each worker (default: 1)")
    parser.add_argument("--gpus", type=int, default=0, help="of each worker (default: 0)")
    parser.add_argument("--restarts", type=int, default=3, help="when one is lost (default: 3)")
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="for keras_resnet.train")
    return parser.parse_args()


def read_setting(text):
    """Returns name and value of "epochs=3"; a value that is not a Python literal is a string."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SystemExit(f"ray_train.py: a setting must be NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return name, value


def train_worker(config):
    """Trains as one of Ray's workers, which have a TF_CONFIG."""
    # Ray selects Keras 2. Both variables must be set before Keras or TensorFlow is imported.
    os.environ.pop("TF_USE_LEGACY_KERAS", None)
    os.environ["KERAS_BACKEND"] = "tensorflow"
    # TensorFlow would count the machine's processors, not those that Ray has assigned.
    os.environ["TF_NUM_INTRAOP_THREADS"] = str(config["cpus"])
    os.environ["TF_NUM_INTEROP_THREADS"] = "2"
    logging.getLogger("tensorflow").setLevel(logging.WARNING)
    import keras_resnet

    # Ray starts all workers again when one is lost, with this same call.
    run = keras_resnet.train(strategy="multiworker", resume="auto", **config["settings"])
    with tempfile.TemporaryDirectory() as folder:
        # Ray does not pass metrics without a checkpoint to the driver.
        checkpoint = None
        if run.report:  # the chief's
            shutil.copy(run.run_dir / "model.keras", folder)
            checkpoint = Checkpoint.from_directory(folder)
        ray.train.report(run.history[-1], checkpoint=checkpoint)


def main():
    """Trains, and prints the metrics of the last epoch."""
    args = parse()
    # Without it Ray's workers print each line twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    run_dir = Path(args.run_dir).expanduser().resolve()
    settings = {**dict(map(read_setting, args.settings)), "run_dir": str(run_dir)}
    resources = {"CPU": args.cpus, **({"GPU": args.gpus} if args.gpus else {})}
    trainer = TensorflowTrainer(
        train_worker,
        train_loop_config={"settings": settings, "cpus": args.cpus},
        scaling_config=ScalingConfig(
            num_workers=args.workers, use_gpu=args.gpus > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=run_dir.name,
            storage_path=str(run_dir.with_name(f"{run_dir.name}-ray")),
            failure_config=FailureConfig(max_failures=args.restarts),
        ),
    )
    result = trainer.fit()
    print(f"last epoch: {result.metrics}")
    print(f"model: {result.checkpoint.path}/model.keras")


if __name__ == "__main__":
    main()
