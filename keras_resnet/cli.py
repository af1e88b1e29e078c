"""`keras-resnet`: parses the command line, calls the package, prints. Keras is imported late.

Exit status: 0 success, 1 a run or an export failed, 2 bad input (for `predict`, also one bad image
among others), 75 another worker was lost, 130 interrupted.
"""

import argparse
import collections
import contextlib
import json
import os
import shlex
import sys
from pathlib import Path

from keras_resnet import __version__, config
from keras_resnet.config import positive
from keras_resnet.exporters.formats import PRECISIONS as EXPORT_PRECISIONS
from keras_resnet.exporters.formats import WEB
from keras_resnet.formats import EXPORTED
from keras_resnet.recipes import RECIPES
from keras_resnet.utils.errors import (
    ExportError,
    InputError,
    Interrupted,
    TrainingError,
    WorkerLost,
    one_line,
)
from keras_resnet.utils.progress import suppress_stderr

_NORMALIZATIONS = "none, imagenet, inception, caffe, 1/255 or 0-255; see `train --help`"
_FOREIGN_OPTION = {
    "--normalize": {
        "metavar": "NAME",
        "help": "normalization of the images, for a model of another tool that takes floats: "
        f"{_NORMALIZATIONS}; default: the model takes uint8 images",
    },
}

# Without --seed, which selects the held-out images: a model's metadata records its seed.
_DATA_OPTIONS = config.options(config.DataConfig, leave_out=("seed",))

# --image-size is for models that take any size; others resize the images.
_EVALUATION_OPTIONS = {
    **_DATA_OPTIONS,
    "--image-size": {
        "type": positive(int),
        "metavar": "PIXELS",
        "help": "height and width of the images for a model that takes any size (default: each "
        "image's own)",
    },
}

# Arguments of `train` that are not settings of the run; `train` has their defaults.
_PROCESS_OPTIONS = {
    "--run-dir": {"metavar": "DIR", "help": "the run folder (default: runs/MODEL-RECIPE-TIME)"},
    "--resume": {
        "nargs": "?",
        "const": True,
        "choices": ("auto",),
        "help": "resume the run in --run-dir from its last finished epoch; auto starts a run if "
        "there is none",
    },
    "--strategy": {
        "metavar": "NAME",
        "help": "none, mirrored (the GPUs of one machine), multiworker (the workers of TF_CONFIG), "
        "or auto (default): chosen by TF_CONFIG and the number of GPUs",
    },
    "--worker-timeout": {
        "type": positive(float),
        "metavar": "SECONDS",
        "help": f"how long to wait for the other workers (default: {config.WORKER_TIMEOUT:g})",
    },
}

_TRAIN_OPTIONS = {**config.options(config.TrainConfig), **_PROCESS_OPTIONS}

_LAUNCH_OPTIONS = {
    "-n": {
        "dest": "count",
        "type": positive(int),
        "required": True,
        "metavar": "N",
        "help": "number of workers; each has its own cores",
    },
    "--restarts": {
        "type": int,
        "metavar": "K",
        "default": 0,
        "help": "how many times to restart all workers, from the last finished epoch, after one "
        "was lost (default: 0)",
    },
    "worker_command": {
        "nargs": argparse.REMAINDER,
        "metavar": "-- COMMAND",
        "help": "`train` with its options, or a program with its arguments",
    },
}

_JSON_OPTION = {"--json": {"action": "store_true", "help": "print JSON instead of a table"}}

_NAME = ", such as timm/resnet18.a1_in1k; see `models`"
_NAMED = f"fashion_mnist (installed), or a published network's name{_NAME}"

_MODEL_ARGUMENT = {
    "model": {
        "metavar": "RUN_OR_MODEL",
        "help": f"a run folder, a .keras, .tflite or .onnx file, a SavedModel's folder, {_NAMED}",
    },
    "--trust": {
        "action": "store_true",
        "help": "load a SavedModel, which can run code, and open other files without a first test "
        "in another process",
    },
    **_FOREIGN_OPTION,
}

_EXPORT_OPTIONS = {
    "model": {
        "metavar": "RUN_OR_MODEL",
        "help": f"a run folder, a .keras file, {_NAMED}",
    },
    "--to": {
        "nargs": "+",
        "choices": (*EXPORTED, WEB),
        "help": f"formats (default: all); or {WEB}, a page that runs the network in a browser",
    },
    "--precision": {
        "nargs": "+",
        "choices": tuple(EXPORT_PRECISIONS),
        "help": "precisions, listed below (default: all of each format)",
    },
    "--out": {
        "metavar": "DIR",
        "help": "the folder to write (default: export/ in the run folder, NAME-export beside "
        f"NAME.keras; {WEB}/ and NAME-{WEB} for the page)",
    },
    **_EVALUATION_OPTIONS,
    "--photos": {
        "metavar": "PATH",
        "nargs": "+",
        "help": "photographs without labels, files or folders, instead of a data set: the files "
        "are verified and calibrated on them, and no accuracy is measured",
    },
    "--input-size": {
        "type": positive(int),
        "nargs": 2,
        "metavar": ("HEIGHT", "WIDTH"),
        "help": "write files that take images which the caller has resized and cropped to this "
        "size, for hardware that needs one (default: the files resize images themselves)",
    },
    **_FOREIGN_OPTION,
    "--no-preprocessing": {
        "dest": "preprocessing",
        "action": "store_false",
        "help": "export the network alone, from floats to logits, instead of raw images to "
        "probabilities",
    },
    "--force": {
        "action": "store_true",
        "help": "publish files that fail their verification, too, with the failures recorded",
    },
    "--runtime": {
        "metavar": "DIR",
        "help": f"with --to {WEB}: a folder with the npm packages of the runtimes (default: npm "
        "installs them into a cache)",
    },
}

_VERIFY_OPTIONS = {
    "folder": {"metavar": "DIR", "help": "an export folder"},
    "--trust": {"action": "store_true", "help": "run SavedModels, too, which are code"},
    **_DATA_OPTIONS,
}

_BENCHMARK_OPTIONS = {
    "folder": {"metavar": "DIR", "help": "an export folder"},
    "--rounds": {
        "type": positive(int),
        "metavar": "N",
        "default": 5,
        "help": "rounds; each round measures every file (default: 5)",
    },
    "--trust": {"action": "store_true", "help": "run SavedModels, too, which are code"},
    "--out": {"metavar": "DIR", "help": "folder of the results (default: the export folder)"},
}

_PREDICT_OPTIONS = {
    "images": {
        "metavar": "IMAGE",
        "nargs": "+",
        "help": "an image file, or a folder that is searched for images",
    },
    "--top": {
        "type": positive(int),
        "default": 3,
        "metavar": "K",
        "help": "labels per image (default: 3)",
    },
    "--invert": {
        "choices": ("auto", "yes", "no"),
        "default": "auto",
        "help": "swap light and dark; auto (default) does so if the model was trained on grey "
        "images that are light on dark, such as Fashion-MNIST, and the image's border is light",
    },
}

_CONVERT_OPTIONS = {
    "source": {
        "metavar": "CHECKPOINT",
        "help": "a safetensors file or a file of torch.save with any suffix (.pth, .pth.tar, "
        ".ckpt, .bin …), or a .h5 or .keras file of keras.applications; its code is never run; or "
        f"a published network's name or folder{_NAME}",
    },
    "--model": {
        "metavar": "NAME",
        "help": "a row of models.SPECS, such as resnet18; a published network states its own",
    },
    "--out": {"metavar": "FILE", "required": True, "help": "the .keras file to write"},
    "--num-classes": {
        "type": positive(int),
        "metavar": "N",
        "help": "number of classes that the head must have (default: any)",
    },
    **config.options(config.TrainConfig, "variant", "stem"),
    "--layout": {
        "metavar": "NAME",
        "help": "layout of the tensors' names, a row of weights.LAYOUTS (default: detected)",
    },
    "--skip-head": {
        "action": "store_true",
        "help": "replace the checkpoint's head by a new, untrained one with --num-classes outputs",
    },
    "--normalize": {
        "metavar": "NAME",
        "help": "include resizing and this normalization, so that the model takes raw images, for "
        f"`predict` and `evaluate`: {_NORMALIZATIONS}; default: the published one, or the network "
        "alone",
    },
    "--no-preprocessing": {
        "dest": "preprocessing",
        "action": "store_false",
        "help": "leave out the published preprocessing: a network of floats",
    },
    "--image-size": {
        "type": positive(int),
        "metavar": "PIXELS",
        "help": "height and width of the network's input (default: the published one; else any, "
        "or 224 with --normalize)",
    },
    "--test-size": {
        "action": "store_true",
        "help": "take images of the size, and with the crop, at which the publisher measured the "
        "accuracy",
    },
}

_MODELS_OPTIONS = {
    "model": {
        "metavar": "MODEL",
        "nargs": "?",
        "help": "a row of models.SPECS, such as resnet18 (default: all)",
    }
}

_SUMMARY_OPTIONS = {
    "model": {
        "metavar": "MODEL",
        "help": "a row of models.SPECS, such as resnet18; or dense_resnet",
    },
    "--input-shape": {
        "type": positive(int),
        "nargs": "+",
        "metavar": "N",
        "help": "height, width and channels (default: 224 224 1), or features (default: 12)",
    },
    "--num-classes": {"type": positive(int), "metavar": "N", "help": "number of outputs"},
    **config.options(config.TrainConfig, "variant", "stem"),
}


def _given(args, options):
    """Returns the values of the options that were given, under the names of Python arguments."""
    names = [name.lstrip("-").replace("-", "_") for name in options]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _train(args):
    from keras_resnet.evaluation.report import format_run
    from keras_resnet.training.trainer import train

    command = os.environ.get(_COMMAND) or shlex.join(["keras-resnet", *args.words])
    run = train(**_given(args, _TRAIN_OPTIONS), command=command)
    if run.report:  # the chief's
        print(format_run(run.run_dir, run.report))


# The environment variable that passes the user's command line to workers, for the report.
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
    settings = config.TrainConfig(**_given(options, ("--model", "--dataset", "--recipe")))
    run_dir = default_run_dir(settings.model, settings.recipe)
    return ["--run-dir", str(run_dir)], ["--resume", "auto"]


def _evaluate(args):
    from keras_resnet.evaluation.inference import evaluate_file
    from keras_resnet.evaluation.report import format_evaluation

    options = {"trust": args.trust, "normalize": args.normalize}
    evaluation = evaluate_file(args.model, **options, **_given(args, _EVALUATION_OPTIONS))
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

    names = [name for name in _CONVERT_OPTIONS if name != "--no-preprocessing"]
    found = convert(**_given(args, names), preprocessing=args.preprocessing)
    if args.json:
        print(json.dumps(found))
        return
    found["parameters"] = f"{found['parameters']:,}"
    names = found["ignored"]
    found["ignored"] = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if names[5:] else "")
    shown = {name: value for name, value in found.items() if value not in (None, "")}
    rows = [{"found": name.replace("_", " "), "": str(value)} for name, value in shown.items()]
    print(format_table(rows, ["found", ""]))


def _models(args):
    from keras_resnet.utils.tables import Column, format_table
    from keras_resnet.weights import published_networks

    rows = published_networks(args.model)
    if args.json:
        print(json.dumps(rows))
        return
    for row in rows:
        for top1, pixels in (("top1", "pixels"), ("test_top1", "test_pixels")):
            if row[top1] is not None:
                row[top1] = f"{row[top1]:.1f} at {row[pixels]}"
    columns = [
        *("model", "variant", "name", Column("top1", "top-1, %")),
        Column("test_top1", "at --test-size"),
        Column("megabytes", "MB", ".1f"),
        Column("license", "licence"),
    ]
    print(format_table(rows, columns))


def _say(line):
    # A closed stdout must not abort the export.
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def _export(args):
    from keras_resnet.exporters.summary import format_failures

    if args.runtime is not None and args.to != [WEB]:
        raise InputError(f"--runtime is for --to {WEB} alone: leave it out")
    try:
        (_export_page if WEB in (args.to or ()) else _export_files)(args)
    except ExportError as error:
        failures = {"failures": [vars(failure) for failure in error.failures]}
        print(json.dumps(failures) if args.json else format_failures(error.failures))
        raise


def _export_files(args):
    from keras_resnet.exporters.exporter import export
    from keras_resnet.exporters.summary import format_manifest

    names = ("to", "precision", "photos", "normalize", "preprocessing", "input_size", "force")
    options = {name: getattr(args, name) for name in names}
    report = None if args.json else _say
    data = _given(args, _EVALUATION_OPTIONS)
    manifest = export(args.model, args.out, report=report, **options, **data)
    print(json.dumps(manifest) if args.json else format_manifest(manifest))


def _export_page(args):
    from keras_resnet.exporters.web import export_web

    to, precision = " ".join(args.to), " ".join(args.precision or ())
    # Rules, and whether they are broken.
    rules = {
        f"writes a folder of its own kind: name it alone, got {to}": " " in to,
        f"writes files of one --precision: name one, got {precision}": " " in precision,
        "takes photographs of any size: leave --input-size out": args.input_size is not None,
        "takes images: leave --no-preprocessing out": not args.preprocessing,
    }
    for rule, is_broken in rules.items():
        if is_broken:
            raise InputError(f"--to {WEB} {rule}")
    names = ("runtime", "photos", "normalize", "force")
    options = {name: getattr(args, name) for name in names}
    if precision:
        options["precision"] = precision
    report = None if args.json else _say
    data = _given(args, _EVALUATION_OPTIONS)
    metadata = export_web(args.model, args.out, report=report, **options, **data)
    if args.json:
        print(json.dumps(metadata))


def _verify(args):
    from keras_resnet.exporters.summary import format_verification
    from keras_resnet.exporters.verify_folder import FORCED, NOT_RUN, SOUND, verify

    found = verify(args.folder, trust=args.trust, **_given(args, _DATA_OPTIONS))
    print(json.dumps(found) if args.json else format_verification(found))
    if not found["passed"]:
        cause = "differ from the exported ones"
        if {file["verdict"] for file in found["files"]} <= {FORCED, NOT_RUN, SOUND}:
            cause = "are unchanged, but failed at their export, which --force published"
        raise ExportError(f"{args.folder}: the files {cause}")


def _benchmark(args):
    from keras_resnet.evaluation.benchmark.results import format_benchmark
    from keras_resnet.evaluation.benchmark.run import benchmark
    from keras_resnet.weights.hub import parse_name

    if not os.path.isdir(args.folder) and parse_name(args.folder):
        raise InputError(
            f"{args.folder}: `benchmark` measures the files of an export: first `keras-resnet "
            f"export {args.folder}`"
        )
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


Command = collections.namedtuple(
    "Command", "run help description options examples epilog", defaults=[""]
)

_COMMANDS = {
    "train": Command(
        _train,
        "train a network and write a run folder",
        "Train a network with model.fit and write a run folder.",
        _TRAIN_OPTIONS,
        [
            "train",
            "train --recipe d2l --run-dir runs/d2l",
            "train --dataset folder:photos --weights timm/resnet18.a1_in1k",
            "train --resume --run-dir runs/d2l",
        ],
        "\n".join(["recipes:", *(f"  {name}: {row.description}" for name, row in RECIPES.items())]),
    ),
    "launch": Command(
        _launch,
        "start several workers on this machine",
        "Start N workers on this machine, each with a TF_CONFIG: `launch -n 2 -- train --epochs 3`"
        " or\n`launch -n 2 -- python my_train.py`. Restarts add `--resume auto` to the options of "
        "`train`.",
        _LAUNCH_OPTIONS,
        [
            "launch -n 2 -- train --recipe quick",
            "launch -n 2 --restarts 3 -- python my_train.py",
        ],
    ),
    "evaluate": Command(
        _evaluate,
        "evaluate a trained model",
        "Evaluate a trained model on the held-out part of its training set, or on another data "
        "set: its test\nsplit, or the whole set if it has none.",
        {**_MODEL_ARGUMENT, **_EVALUATION_OPTIONS, **_JSON_OPTION},
        [
            "evaluate runs/demo",
            "evaluate runs/demo/export/model-int8.tflite --dataset fashion_mnist",
        ],
    ),
    "predict": Command(
        _predict,
        "classify images",
        "Classify images of any size, in colour or grey. Files that cannot be read are reported on "
        "standard\nerror, the others are classified, and the exit status is 2.",
        {**_MODEL_ARGUMENT, **_PREDICT_OPTIONS, **_JSON_OPTION},
        [
            "predict fashion_mnist shoe.jpg",
            "predict runs/photos photos/cat --top 3 --json",
        ],
    ),
    "convert": Command(
        _convert,
        "convert a published checkpoint to a .keras file",
        "Convert a checkpoint to a .keras file and print the network and the layout found in it.",
        {**_CONVERT_OPTIONS, **_JSON_OPTION},
        [
            "convert timm/resnet18.a1_in1k --out resnet18.keras",
            "convert resnet50.pth --model resnet50 --normalize imagenet --out resnet50.keras",
        ],
    ),
    "models": Command(
        _models,
        "list published networks by name",
        "List the networks that are known to be published, by the names that `export`, `predict`,"
        "\n`evaluate`, `convert` and `train --weights` take. The accuracies are their publishers': "
        "top-1 of\nImageNet-1k's validation images, of the size behind it. – is not known.",
        {**_MODELS_OPTIONS, **_JSON_OPTION},
        [
            "models",
            "models resnet50",
        ],
    ),
    "export": Command(
        _export,
        "export to SavedModel, TFLite and ONNX, with verification",
        "Export a model to SavedModel, TFLite and ONNX. Each file is run by its own runtime and "
        "compared\nwith the Keras model on all test images; if one file fails, nothing is written.",
        {**_EXPORT_OPTIONS, **_JSON_OPTION},
        [
            "export runs/demo",
            "export timm/resnet18.a1_in1k --photos holiday/",
            "export timm/resnet18.a1_in1k --photos holiday/ --input-size 224 224 --to tflite",
            "export fashion_mnist --to web --out page",
        ],
        "\n".join(
            [
                "precisions:",
                *(f"  {name}: {row.description}" for name, row in EXPORT_PRECISIONS.items()),
            ]
        ),
    ),
    "verify": Command(
        _verify,
        "verify an export folder again",
        "Verify an export folder on any machine: checksums first, then each file's predictions.",
        {**_VERIFY_OPTIONS, **_JSON_OPTION},
        [
            "verify runs/demo/export",
            "verify runs/demo/export --dataset fashion_mnist --trust",
        ],
    ),
    "benchmark": Command(
        _benchmark,
        "benchmark the files of an export folder",
        "Measure latency, throughput, load time, memory and size of each file of an export folder, "
        "of\nthe Keras model and, where PyTorch is installed, of the same network in PyTorch.",
        {**_BENCHMARK_OPTIONS, **_JSON_OPTION},
        [
            "benchmark runs/demo/export",
            "benchmark runs/demo/export --trust --rounds 9",
        ],
    ),
    "summary": Command(
        _summary,
        "print a network's modules, shapes and parameters",
        "Print each module of a network with its output shape and number of parameters.",
        _SUMMARY_OPTIONS,
        [
            "summary resnet18 --input-shape 224 224 1",
            "summary resnext50_32x4d --variant torchvision --num-classes 1000",
        ],
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
        examples = ["examples:", *(f"  keras-resnet {each}" for each in command.examples)]
        subparser = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog="\n".join([*examples, "", command.epilog]),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for option, arguments in command.options.items():
            subparser.add_argument(option, **arguments)
    return parser


def _import_keras():
    """Imports Keras without TensorFlow's log lines about the machine.

    Most are written by C++ before its log is set up; no option turns them off (TensorFlow 2.21).
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with suppress_stderr():
            import keras

            if keras.backend.backend() == "tensorflow":
                import tensorflow as tf

                tf.config.list_physical_devices()  # the first call logs missing drivers
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
        arguments: The words after the program's name; `sys.argv[1:]` by default.

    Returns:
        The exit status.
    """
    words = sys.argv[1:] if arguments is None else list(arguments)
    args = _parser().parse_args(words, argparse.Namespace(words=words))
    with contextlib.suppress(AttributeError, ValueError):
        # A terminal without "×" or "–" shows "?" in place of a traceback.
        sys.stdout.reconfigure(errors="replace")
    try:
        if args.command != "launch":  # does not use Keras; saves its memory for the workers
            _import_keras()
        status = _COMMANDS[args.command].run(args) or 0
        sys.stdout.flush()
    except tuple(_STATUS) as error:
        status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
        return _fail(str(error), status)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except OSError as error:
        if error.filename is None:  # stdout could not be written to
            # Python would try again at exit.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has closed the pipe, as `head` does
            return 1
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or one_line(error)}", 2)
    return status


def export_to(format):
    """Runs `keras-resnet export` for a script that exports to one format.

    Args:
        format: A row of `formats.EXPORTED`; the rest comes from `sys.argv`.

    Returns:
        The exit status, and the folder that was written to: --out, or "exported".
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s RUN_OR_MODEL [--out DIR] [options of `keras-resnet export`]"
    )
    parser.add_argument("--out", default="exported", help="default: exported")
    own, _ = parser.parse_known_args()
    # argparse takes the last value of an option that is given twice.
    status = main(["export", "--out", own.out, *sys.argv[1:], "--to", format])
    return status, Path(own.out).expanduser()


def _fail(message, status):
    print(f"keras-resnet: {' '.join(message.splitlines())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
