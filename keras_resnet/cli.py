"""`keras-resnet`: parses, calls, prints. No logic, and nothing heavy imported before it is needed.

Exit status: 0 done, 1 a run failed, 2 bad input (of `predict`, also if other images could be
named), 75 another worker was lost, 130 interrupted.
"""

import argparse
import collections
import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

from keras_resnet import __version__
from keras_resnet.exporters.formats import FORMATS
from keras_resnet.exporters.formats import PRECISIONS as EXPORT_PRECISIONS
from keras_resnet.recipes import RECIPES
from keras_resnet.utils.errors import (
    ExportError,
    InputError,
    Interrupted,
    TrainingError,
    WorkerLost,
    one_line,
)
from keras_resnet.utils.quiet import stderr_kept_back

MOST = {int: 1_000_000, float: sys.float_info.max}

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def _positive(kind):
    def parse(text):
        value = kind(text)
        # A whole number beyond any use would be a traceback from some library's depths.
        if not 0 < value <= MOST[kind]:
            raise argparse.ArgumentTypeError(
                f"must be positive and at most {MOST[kind]:g}, got {text}"
            )
        return value

    # argparse names the type in "invalid … value".
    parse.__name__ = kind.__name__
    return parse


def _share(text):
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, got {text}")
    return value


# The tables themselves would bring Keras with them; a name that is no row is answered with all.
_NETWORKS = "resnet18 … resnet152, resnext50_32x4d, …: a row of models.SPECS"
_FORM_OPTIONS = {
    "--variant": {"metavar": "NAME", "help": "d2l, torchvision, v1, v2, keras_v1 or keras_v2"},
    "--stem": {"metavar": "NAME", "help": "imagenet, small or deep"},
}
_NORMALIZE_HELP = (
    "none, imagenet (what PyTorch's published weights expect), inception (keras.applications' V2), "
    "caffe (keras.applications' ResNet50/101/152), 1/255, or 0-255 (scaled inside)"
)
_FOREIGN_OPTION = {
    "--normalize": {
        "metavar": "NAME",
        "help": "how the floats are normalised that another tool's model takes: "
        f"{_NORMALIZE_HELP}; default: it takes images",
    },
}

# option -> arguments of add_argument. What `training.train` takes under the same name.
_DATA_OPTIONS = {
    "--dataset": {
        "metavar": "NAME",
        "help": "fashion_mnist (default), folder:PATH (one sub-folder a class) or tfds:NAME",
    },
    "--data-dir": {"metavar": "DIR", "help": "where the data set lies, if not in a usual place"},
    "--validation-split": {
        "type": _share,
        "metavar": "SHARE",
        "help": "share of the images held out where the set has no test split (default: 0.1; a "
        "set that the model was not trained on is measured whole)",
    },
    "--skip-bad": {
        "action": "store_true",
        "default": None,
        "help": "leave out unreadable images of a folder instead of stopping",
    },
}

# For models of images of any size; others resize the images to their own.
_MEASURING_OPTIONS = {
    **_DATA_OPTIONS,
    "--image-size": {
        "type": _positive(int),
        "metavar": "PIXELS",
        "help": "height and width that a model of any size is measured at (default: each image's "
        "own)",
    },
}

_TRAIN_OPTIONS = {
    "--model": {"metavar": "NAME", "help": f"{_NETWORKS}; default: resnet18"},
    **_DATA_OPTIONS,
    "--recipe": {"choices": tuple(RECIPES), "help": "how to train (default: quick); see below"},
    "--epochs": {
        "type": _positive(int),
        "metavar": "N",
        "help": "instead of the recipe's; with --resume the new total, to continue a finished run",
    },
    "--batch-size": {"type": _positive(int), "metavar": "N", "help": "instead of the recipe's"},
    "--image-size": {
        "type": _positive(int),
        "metavar": "PIXELS",
        "help": "height and width that the network sees, instead of the recipe's",
    },
    "--learning-rate": {
        "type": _positive(float),
        "metavar": "RATE",
        "help": "instead of the recipe's",
    },
    **_FORM_OPTIONS,
    "--init": {
        "metavar": "FILE",
        "help": "fine-tune: start from a checkpoint that `convert` reads, or from a .keras file of "
        "this package, in its variant and stem; a head of other classes is new",
    },
    "--freeze": {
        "metavar": "NAMES",
        "help": "modules that keep the weights of --init, such as stem,stage1 (see `summary`)",
    },
    "--normalize": {
        "metavar": "NAME",
        "help": f"{_NORMALIZE_HELP}; default: that of the .keras file given as --init, else none",
    },
    "--precision": {
        "choices": PRECISIONS,
        "help": "what to compute in; auto (default) takes bfloat16 where the machine has it",
    },
    "--seed": {"type": int, "metavar": "N", "help": "first weights, order of images (default: 0)"},
    "--run-dir": {
        "metavar": "DIR",
        "help": "the run folder (default: runs/MODEL-RECIPE-TIME)",
    },
    "--resume": {
        "nargs": "?",
        "const": True,
        "default": False,
        "choices": ("auto",),
        "help": "go on with the run in --run-dir, from its last finished epoch; with auto, start "
        "it if there is none",
    },
    "--strategy": {
        "metavar": "NAME",
        "default": "auto",
        "help": "none, mirrored (the GPUs of one machine), multiworker (TF_CONFIG or Slurm), or "
        "auto (default), which finds out",
    },
    "--sync-batchnorm": {
        "action": "store_true",
        "default": None,
        "help": "take BatchNormalization's statistics over all replicas",
    },
    "--scale-batch": {
        "action": "store_true",
        "default": None,
        "help": "multiply batch size and learning rate by the number of replicas, with a warm-up",
    },
    "--worker-timeout": {
        "type": _positive(float),
        "metavar": "SECONDS",
        "default": 300.0,
        "help": "how long to wait for the other workers (default: 300)",
    },
}

_LAUNCH_OPTIONS = {
    "-n": {
        "dest": "count",
        "type": _positive(int),
        "required": True,
        "metavar": "N",
        "help": "the number of workers; each gets cores of its own",
    },
    "--restarts": {
        "type": int,
        "metavar": "K",
        "default": 0,
        "help": "how often to start the workers again, from the last finished epoch, when one was "
        "lost (default: 0)",
    },
    "worker_command": {
        "nargs": argparse.REMAINDER,
        "metavar": "-- COMMAND",
        "help": "`train` with its options, or a program with its arguments",
    },
}

_JSON_OPTION = {"--json": {"action": "store_true", "help": "print JSON instead of a table"}}

_MODEL_ARGUMENT = {
    "model": {
        "metavar": "RUN_OR_MODEL",
        "help": "a run folder, a .keras, .tflite or .onnx file, or a SavedModel's folder",
    },
    "--trust": {
        "action": "store_true",
        "help": "load a SavedModel, which is code, and open other files without trying them in "
        "another process first",
    },
    **_FOREIGN_OPTION,
}

_EXPORT_OPTIONS = {
    "model": {"metavar": "RUN_OR_MODEL", "help": "a run folder or a .keras file"},
    "--to": {"nargs": "+", "choices": tuple(FORMATS), "help": "formats (default: all)"},
    "--precision": {
        "nargs": "+",
        "choices": tuple(EXPORT_PRECISIONS),
        "help": "default: all that the formats come in; see below",
    },
    "--out": {
        "metavar": "DIR",
        "help": "the folder to write (default: export/ in the run folder, NAME-export beside "
        "NAME.keras)",
    },
    **_MEASURING_OPTIONS,
    **_FOREIGN_OPTION,
    "--no-preprocessing": {
        "dest": "preprocessing",
        "action": "store_false",
        "help": "files that take the network's floats and give logits, in place of raw images "
        "and probabilities",
    },
    "--force": {
        "action": "store_true",
        "help": "publish what fails its proof, with the failures recorded",
    },
}

_VERIFY_OPTIONS = {
    "folder": {"metavar": "DIR", "help": "what `export` wrote"},
    "--trust": {"action": "store_true", "help": "run a SavedModel, too, which is code"},
    **_DATA_OPTIONS,
}

_BENCHMARK_OPTIONS = {
    "folder": {"metavar": "DIR", "help": "what `export` wrote"},
    "--rounds": {
        "type": _positive(int),
        "metavar": "N",
        "default": 5,
        "help": "turns that each takes (default: 5)",
    },
    "--trust": {"action": "store_true", "help": "run a SavedModel, too, which is code"},
    "--out": {"metavar": "DIR", "help": "where benchmark.json and benchmark.png go (default: DIR)"},
}

_PREDICT_OPTIONS = {
    "images": {"metavar": "IMAGE", "nargs": "+", "help": "an image file"},
    "--top": {
        "type": _positive(int),
        "default": 3,
        "metavar": "K",
        "help": "labels an image (default: 3)",
    },
    "--invert": {
        "choices": ("auto", "yes", "no"),
        "default": "auto",
        "help": "swap light and dark; auto (default) does where the model takes grey images that "
        "are light on dark, as those of Fashion-MNIST, and the image's border is light",
    },
}

_CONVERT_OPTIONS = {
    "source": {
        "metavar": "CHECKPOINT",
        "help": "a safetensors file or one of torch.save, whatever its name ends in (.pth, "
        ".pth.tar, .ckpt, .bin …), or a .h5 or .keras file of keras.applications; code in it is "
        "never run",
    },
    "--model": {"metavar": "NAME", "required": True, "help": _NETWORKS},
    "--out": {"metavar": "FILE", "required": True, "help": "the .keras file to write"},
    "--num-classes": {
        "type": _positive(int),
        "metavar": "N",
        "help": "what the head must have (default: what it has)",
    },
    **_FORM_OPTIONS,
    "--layout": {
        "metavar": "NAME",
        "help": "whose names the tensors have, a row of weights.LAYOUTS (default: found out)",
    },
    "--skip-head": {
        "action": "store_true",
        "help": "leave the checkpoint's head out, for a new, untrained one of --num-classes",
    },
    "--normalize": {
        "metavar": "NAME",
        "help": "make a model of raw images, resized and normalised inside, for `predict` and "
        f"`evaluate`: {_NORMALIZE_HELP}; default: the network alone",
    },
    "--image-size": {
        "type": _positive(int),
        "metavar": "PIXELS",
        "help": "height and width that the network takes (default: any; 224 with --normalize)",
    },
}

_SUMMARY_OPTIONS = {
    "model": {"metavar": "MODEL", "help": f"{_NETWORKS}; or dense_resnet"},
    "--input-shape": {
        "type": _positive(int),
        "nargs": "+",
        "metavar": "N",
        "help": "height, width and channels (default: 224 224 1), or features (default: 12)",
    },
    "--num-classes": {"type": _positive(int), "metavar": "N", "help": "number of outputs"},
    **_FORM_OPTIONS,
}


def _given(args, options):
    """Returns what was given for options, under the names that functions have for them."""
    names = [name.lstrip("-").replace("-", "_") for name in options]
    return {name: getattr(args, name) for name in names}


def _data(args, options=_DATA_OPTIONS):
    """Returns what was given of the data options; the rest is the functions' to choose."""
    return {name: v for name, v in _given(args, options).items() if v is not None}


def _train(args):
    from keras_resnet.evaluation.report import format_run
    from keras_resnet.training.trainer import train

    command = os.environ.get(_COMMAND) or shlex.join(["keras-resnet", *args.words])
    run = train(**_given(args, _TRAIN_OPTIONS), command=command)
    if run.report:  # the chief's
        print(format_run(run.run_dir, run.report))


# The environment variable that tells workers which command line the user typed, for the report.
_COMMAND = "KERAS_RESNET_COMMAND"


def _launch(args):
    from keras_resnet.distribution import launch

    words = args.worker_command[args.worker_command[:1] == ["--"] :]
    words = words[words[:1] == ["keras-resnet"] :]
    if not words:
        raise InputError("`launch` needs a command, got none: keras-resnet launch -n 2 -- train …")
    again = []
    if words[0] == "train":
        more, again = _launch_train(args, _parser().parse_args(words))
        words = [*words, *more]
    if words[0] in _COMMANDS:
        words = [*launch.PROGRAM, *words]
    return launch.launch_workers(
        words,
        args.count,
        restarts=args.restarts,
        restart_command=[*words, *again],
        environment={_COMMAND: shlex.join(["keras-resnet", *args.words])},
    )


def _launch_train(args, options):
    """Returns the options to add to `train`: those of every start, and those of restarts."""
    from keras_resnet.training.run_folder import check_empty, default_run_dir

    if options.strategy in (("none", "mirrored") if args.count > 1 else ("multiworker",)):
        raise InputError(
            f"`launch -n {args.count}` trains under {'multiworker' if args.count > 1 else 'none'}, "
            f"got --strategy {options.strategy}: leave it out"
        )
    if options.resume:
        return [], []
    if options.run_dir is not None:
        check_empty(Path(options.run_dir))  # a restart would resume a run that is in it
        return [], ["--resume", "auto"]
    run_dir = default_run_dir(options.model or "resnet18", options.recipe or "quick")
    return ["--run-dir", str(run_dir)], ["--resume", "auto"]


def _evaluate(args):
    from keras_resnet.evaluation.inference import evaluate_file
    from keras_resnet.evaluation.report import format_evaluation

    options = {"trust": args.trust, "normalize": args.normalize}
    evaluation = evaluate_file(args.model, **options, **_data(args, _MEASURING_OPTIONS))
    print(json.dumps(evaluation.to_dict()) if args.json else format_evaluation(evaluation))


def _predict(args):
    from keras_resnet.evaluation.inference import predict_files

    options = {name: getattr(args, name) for name in ("top", "invert", "trust", "normalize")}
    failures = []
    rows = predict_files(args.model, args.images, on_error=failures.append, **options)
    if args.json:
        print(json.dumps(rows))
    elif rows:
        print(_format_predictions(rows))
    for failure in failures:
        _fail(str(failure), 2)
    return 2 if failures else 0


def _format_predictions(rows):
    from keras_resnet.utils.tables import Column, format_table

    lines = []
    for row in rows:
        first = {"image": row["image"], "inverted": "yes" if row["inverted"] else "no"}
        for label in row["labels"]:
            lines.append({**first, **label})
            first = {"image": "", "inverted": ""}
    columns = ["image", "inverted", "label", Column("probability", spec=".4f")]
    return format_table(lines, columns)


def _convert(args):
    from keras_resnet.utils.tables import format_table
    from keras_resnet.weights import convert

    found = convert(**_given(args, _CONVERT_OPTIONS))
    if args.json:
        print(json.dumps(found))
        return
    found["parameters"] = f"{found['parameters']:,}"
    names = found["ignored"]
    found["ignored"] = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
    rows = [{"found": name.replace("_", " "), "": str(value)} for name, value in found.items()]
    print(format_table(rows, ["found", ""]))


def _say(line):
    # Who has stopped reading still wants the files.
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def _export(args):
    from keras_resnet.exporters.exporter import export
    from keras_resnet.exporters.summary import format_failures, format_manifest

    names = ("to", "precision", "normalize", "preprocessing", "force")
    options = {name: getattr(args, name) for name in names}
    report = None if args.json else _say
    try:
        data = _data(args, _MEASURING_OPTIONS)
        manifest = export(args.model, args.out, report=report, **options, **data)
    except ExportError as error:
        failures = {"failures": [vars(failure) for failure in error.failures]}
        print(json.dumps(failures) if args.json else format_failures(error.failures))
        raise
    print(json.dumps(manifest) if args.json else format_manifest(manifest))


def _verify(args):
    from keras_resnet.exporters.summary import format_verification
    from keras_resnet.exporters.verifier import verify

    found = verify(args.folder, trust=args.trust, **_data(args))
    print(json.dumps(found) if args.json else format_verification(found))
    if not found["passed"]:
        raise ExportError(f"{args.folder}: it is not what was exported")


def _benchmark(args):
    from keras_resnet.evaluation.benchmark import benchmark, format_benchmark

    report = benchmark(args.folder, rounds=args.rounds, out=args.out, trust=args.trust)
    print(json.dumps(report) if args.json else format_benchmark(report))


def _summary(args):
    from keras_resnet.models import build_named, summarize_shapes
    from keras_resnet.utils.tables import Column, format_table

    model, input_shape = build_named(
        args.model, args.input_shape, args.num_classes, args.variant, args.stem
    )
    rows = summarize_shapes(model, (1, *input_shape))
    total = {"module": "total", "parameters": sum(row["parameters"] for row in rows)}
    for row in rows:
        row["output_shape"] = "×".join(str(size) for size in row["output_shape"])
    columns = ["module", Column("output_shape", "output shape"), Column("parameters", spec=",")]
    print(format_table([*rows, {**total, "output_shape": ""}], columns))


Command = collections.namedtuple("Command", "run help description options epilog")

_COMMANDS = {
    "train": Command(
        _train,
        "train a network and write a run folder",
        "Train a network with model.fit and write a run folder.",
        _TRAIN_OPTIONS,
        "\n".join(["recipes:", *(f"  {name}: {row.description}" for name, row in RECIPES.items())]),
    ),
    "launch": Command(
        _launch,
        "start several workers on this machine",
        "Start N workers on this machine, each with a TF_CONFIG: `launch -n 2 -- train --epochs 3`"
        " or\n`launch -n 2 -- python my_train.py`. Restarts add `--resume auto` to the options of "
        "`train`.",
        _LAUNCH_OPTIONS,
        None,
    ),
    "evaluate": Command(
        _evaluate,
        "measure a trained model",
        "Measure a trained model: on the part of its own data set that was held out in training, "
        "or on\nanother set, whole or on its test split.",
        {**_MODEL_ARGUMENT, **_MEASURING_OPTIONS, **_JSON_OPTION},
        None,
    ),
    "predict": Command(
        _predict,
        "name what is on images",
        "Name what is on images of any size, colour or grey. Files that cannot be read are named "
        "on standard\nerror, the others are answered, and the exit status is 2.",
        {**_MODEL_ARGUMENT, **_PREDICT_OPTIONS, **_JSON_OPTION},
        None,
    ),
    "convert": Command(
        _convert,
        "make a model of a published checkpoint",
        "Turn a checkpoint into a .keras file and print what was found in it.",
        {**_CONVERT_OPTIONS, **_JSON_OPTION},
        None,
    ),
    "export": Command(
        _export,
        "write SavedModel, TFLite and ONNX files, proven",
        "Write a model as SavedModel, TFLite and ONNX. Each file is loaded by its own runtime and "
        "compared\nwith the Keras model on all test images; one that fails is not written.",
        {**_EXPORT_OPTIONS, **_JSON_OPTION},
        "\n".join(
            [
                "precisions:",
                *(f"  {name}: {row.description}" for name, row in EXPORT_PRECISIONS.items()),
            ]
        ),
    ),
    "verify": Command(
        _verify,
        "check an export folder again",
        "Check an export folder, anywhere: checksums first, then every file's answers.",
        {**_VERIFY_OPTIONS, **_JSON_OPTION},
        None,
    ),
    "benchmark": Command(
        _benchmark,
        "measure the files of an export folder",
        "Measure latency, throughput, load time, memory and size of each file of an export folder, "
        "beside\nthe Keras model and, where PyTorch is installed, the textbook's network in it.",
        {**_BENCHMARK_OPTIONS, **_JSON_OPTION},
        None,
    ),
    "summary": Command(
        _summary,
        "walk an input's shape through a network",
        "Print each module of a network with its output shape and parameters.",
        _SUMMARY_OPTIONS,
        None,
    ),
}


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-resnet",
        description="Residual networks in Keras 3: train, evaluate, predict, export.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=command.epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for option, arguments in command.options.items():
            subparser.add_argument(option, **arguments)
    return parser


def _import_keras():
    """Imports Keras without the lines about the machine that TensorFlow puts before any answer.

    Most come from C++ before its log is set up, and no setting reaches them (TensorFlow 2.21).
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with stderr_kept_back():
            import keras

            if keras.backend.backend() == "tensorflow":
                import tensorflow as tf

                tf.config.list_physical_devices()  # the first look says what drivers are missing
    except (ImportError, ValueError) as error:
        backend = os.environ.get("KERAS_BACKEND", "not set")
        raise InputError(
            f"Keras cannot be loaded with the environment's KERAS_BACKEND {backend}: "
            f"{one_line(error)}"
        ) from error


# error -> exit status.
_STATUS = {InputError: 2, Interrupted: 130, WorkerLost: 75, TrainingError: 1, ExportError: 1}


def main(arguments=None):
    """Runs the command line.

    Args:
        arguments: What stands behind the command's name; `sys.argv[1:]` by default.

    Returns:
        The exit status.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(words, argparse.Namespace(words=words))
    with contextlib.suppress(AttributeError, ValueError):
        # A terminal without "×" or "–" shows "?" instead of losing the answer.
        sys.stdout.reconfigure(errors="replace")
    try:
        if args.command != "launch":  # its process leaves the memory to the workers
            _import_keras()
        status = _COMMANDS[args.command].run(args) or 0
        sys.stdout.flush()
    except tuple(_STATUS) as error:
        status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
        return _fail(str(error), status)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        if error.filename is None:  # no file's: our own output could not be written
            # Python would try again at the exit.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has gone, as in `… | head`
            return 1
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or one_line(error)}", 2)
    return status


def export_to(format):
    """Runs `keras-resnet export` for a script that exports to one format.

    Args:
        format: A row of `exporting.formats.FORMATS`; the rest comes from `sys.argv`.

    Returns:
        The exit status, and the folder that was written to: --out, or "exported".
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s RUN_OR_MODEL [--out DIR] [options of `keras-resnet export`]"
    )
    parser.add_argument("--out", default="exported", help="default: exported")
    own, _ = parser.parse_known_args()
    # Of an option that is given twice the last counts.
    status = main(["export", "--out", own.out, *sys.argv[1:], "--to", format])
    return status, Path(own.out).expanduser()


def _fail(message, status):
    print(f"keras-resnet: {' '.join(message.splitlines())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
