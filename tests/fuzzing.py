"""Damaged files by the thousand, loaded in this process: started by test_fuzz.py.

    python fuzzing.py KIND FOLDER FIRST LAST

writes a line of JSON for each mutant. A mutant is made from its seed alone.
"""

import io
import json
import os
import random
import sys
import time
import traceback
import zipfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

SHAPE, CLASSES = (8, 8, 1), 3
METADATA = {"class_names": ["a", "b", "c"], "background": "dark"}
MEMORY = 4 * 2**30
"""Bytes of address space that loading may take beyond what the process has before."""

INTERESTING = (0, 1, 2, 7, 127, 128, 255, 256, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -1)
ODD = (None, True, "x", "", [], {}, 0.5, 1e308, -1.5, 10**10, 10**19, -(2**70), *INTERESTING)


# ----------------------------------------------------------------------------------------------
# Bytes
# ----------------------------------------------------------------------------------------------


def _range(content, dice):
    start = dice.randrange(len(content))
    return start, min(len(content), start + 2 ** dice.randrange(12))


def flip(content, dice):
    content = bytearray(content)
    for _ in range(2 ** dice.randrange(5)):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    return bytes(content)


def truncate(content, dice):
    return content[: dice.randrange(len(content))]


def delete(content, dice):
    start, end = _range(content, dice)
    return content[:start] + content[end:]


def insert(content, dice):
    start, end = _range(content, dice)
    return content[:start] + dice.randbytes(end - start) + content[start:]


def splice(content, dice):
    start, end = _range(content, dice)
    to = dice.randrange(len(content))
    return content[:to] + content[start:end] + content[to + end - start :]


def zero(content, dice):
    start, end = _range(content, dice)
    return content[:start] + bytes(end - start) + content[end:]


def repeat(content, dice):
    start, end = _range(content, dice)
    return content[:end] + content[start:end] * dice.randrange(1, 9) + content[end:]


def number(content, dice):
    size, start = dice.choice((1, 2, 4, 8)), dice.randrange(len(content))
    value = (dice.choice(INTERESTING) % 256**size).to_bytes(size, "little")
    return content[:start] + value + content[start + size :]


BYTES = (flip, truncate, delete, insert, splice, zero, repeat, number)


def any_bytes(content, dice):
    """One or two of them."""
    for _ in range(dice.choice((1, 1, 2))):
        content = dice.choice(BYTES)(content or b"\0", dice)
    return content


# ----------------------------------------------------------------------------------------------
# Structures: the file around a change is written anew, with valid checksums
# ----------------------------------------------------------------------------------------------


def leaves(value, path=()):
    """Yields the path of each leaf of a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in children:
        if isinstance(child, (dict, list)):
            yield (*path, key)
            yield from leaves(child, (*path, key))
        else:
            yield (*path, key)


def change_json(text, dice):
    """Changes a few leaves or branches of a JSON text."""
    value = json.loads(text)
    for _ in range(dice.choice((1, 1, 2, 4))):
        paths = list(leaves(value))
        *way, last = dice.choice(paths)
        inside = value
        for key in way:
            inside = inside[key]
        old, what = inside[last], dice.randrange(5)
        if what == 0:
            del inside[last]
        elif what == 1 and isinstance(old, str) and old:
            inside[last] = any_bytes(old.encode(), dice).decode("utf-8", "replace")
        elif what == 2 and isinstance(old, (int, float)) and not isinstance(old, bool):
            inside[last] = old * dice.choice((-1, 2, 10, 1000, 10**6, 10**12))
        else:
            inside[last] = dice.choice(ODD)
        if not list(leaves(value)):
            break
    return json.dumps(value).encode()


def nest(text, dice):
    depth = 10 ** dice.randrange(2, 6)
    return dice.choice((b"[" * depth, b'{"a":' * depth + b"1" + b"}" * depth))


def sealed_tflite(content, dice):
    from keras_resnet.untrusted import checksums

    body = content[: content.index(b"PK\x03\x04")]
    return checksums.seal_tflite(any_bytes(body, dice), METADATA)


def numbers_in_tflite(content, dice):
    """Changes small numbers where a flatbuffer has its tables, so that it stays readable."""
    from keras_resnet.untrusted import checksums

    body = bytearray(content[: content.index(b"PK\x03\x04")])
    for _ in range(2 ** dice.randrange(4)):
        place = 4 * dice.randrange(len(body) // 4)
        body[place] = dice.choice((0, 1, 2, 3, 4, 5, 9, 17, 53, 127, 255))
    return checksums.seal_tflite(bytes(body), METADATA)


def sealed_onnx(content, dice):
    from keras_resnet.untrusted import checksums

    return checksums.seal_onnx(any_bytes(_onnx_body(content), dice), METADATA)


def changed_onnx(content, dice):
    """Changes numbers, names and wiring of the graph."""
    import onnx

    from keras_resnet.untrusted import checksums

    model = onnx.load_model_from_string(_onnx_body(content))
    for _ in range(2 ** dice.randrange(3)):
        dice.choice((_onnx_attribute, _onnx_dims, _onnx_wire, _onnx_operator))(model.graph, dice)
    return checksums.seal_onnx(model.SerializeToString(), METADATA)


def _onnx_body(content):
    return content[: content.index(b"\x0a\x0bclass_names") - 2]


def _onnx_number(dice):
    return dice.choice((*INTERESTING[:13], 2**40, -1, -2, 3, 5, 100, 10**6))


def _onnx_attribute(graph, dice):
    attributes = [each for node in graph.node for each in node.attribute if each.ints or each.i]
    if attributes:
        attribute = dice.choice(attributes)
        if attribute.ints:
            attribute.ints[dice.randrange(len(attribute.ints))] = _onnx_number(dice)
        else:
            attribute.i = _onnx_number(dice)


def _onnx_dims(graph, dice):
    tensor = dice.choice(graph.initializer)
    if tensor.dims and dice.random() < 0.7:
        tensor.dims[dice.randrange(len(tensor.dims))] = _onnx_number(dice)
    elif tensor.raw_data:
        tensor.raw_data = any_bytes(tensor.raw_data, dice)
    else:
        tensor.data_type = dice.randrange(25)


def _onnx_wire(graph, dice):
    node = dice.choice(graph.node)
    names = [name for each in graph.node for name in (*each.input, *each.output)]
    side = dice.choice((node.input, node.output))
    if side:
        side[dice.randrange(len(side))] = dice.choice(names)


def _onnx_operator(graph, dice):
    dice.choice(graph.node).op_type = dice.choice(graph.node).op_type


def rezipped(content, dice, member, change):
    """Changes a member of a ZIP archive; its checksum is right again."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            own = source.read(name)
            target.writestr(name, change(own, dice) if name == member else own)
    return file.getvalue()


def keras_config(content, dice):
    return rezipped(content, dice, "config.json", change_json)


def keras_metadata(content, dice):
    return rezipped(content, dice, "keras_resnet.json", dice.choice((change_json, nest)))


def keras_weights(content, dice):
    return rezipped(content, dice, "model.weights.h5", any_bytes)


# ----------------------------------------------------------------------------------------------
# Kinds
# ----------------------------------------------------------------------------------------------

# kind -> (file, mutators whose damage must be found, mutators after which any answer may be right)
KINDS = {
    "tflite": ("model.tflite", (any_bytes,), (sealed_tflite, numbers_in_tflite)),
    "onnx": ("model.onnx", (any_bytes,), (sealed_onnx, changed_onnx)),
    "keras": (
        "model.keras",
        (any_bytes,),
        (keras_config, keras_config, keras_metadata, keras_weights),
    ),
    "manifest": ("manifest.json", (), (any_bytes, change_json, change_json, change_json, nest)),
}


def mutant(kind, content, seed):
    """Returns a damaged file, and whether its answers must be right nonetheless."""
    dice = random.Random(f"{kind} {seed}")
    _, found, free = KINDS[kind]
    strict = bool(found) and seed % 2 == 0
    return dice.choice(found if strict else free)(content, dice), strict


def outcome(kind, path, content, seed, expected, prober):
    """Returns the outcome for one mutant: "refused", "answer", "wrong" or "error"."""
    from keras_resnet.utils.errors import InputError

    damaged, strict = mutant(kind, content, seed)
    path.write_bytes(damaged)
    try:
        answers = answer(kind, path, prober)
    except InputError as error:
        text = str(error)
        good = str(path.parent) in text and "\n" not in text and len(text) < 1000
        return {"outcome": "refused" if good else "wrong", "why": text}
    except Exception:
        return {"outcome": "error", "why": traceback.format_exc()}
    if kind == "manifest":
        return {"outcome": "answer"}
    if not np.isfinite(answers).all():
        return {"outcome": "wrong", "why": "not finite"}
    if strict and (answers.shape != expected.shape or np.abs(answers - expected).max() > 1e-5):
        return {"outcome": "wrong", "why": f"{answers} for {expected}"}
    return {"outcome": "answer", "same": bool(damaged == content)}


def answer(kind, path, prober):
    """Returns the answers of a file, or the manifest."""
    from keras_resnet.evaluation.inference import load
    from keras_resnet.untrusted.manifest import read_manifest

    if kind == "manifest":
        return read_manifest(path.parent)
    images = np.random.default_rng(0).integers(0, 256, (2, *SHAPE), dtype="uint8")
    return load(path, prober=prober, threads=1)(images)


def limit_memory():
    import resource

    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))


def main(kind, folder, first, last):
    from keras_resnet.runtimes import Prober

    file = KINDS[kind][0]
    content = Path(folder, file).read_bytes()
    path = Path(folder, kind, file)
    path.parent.mkdir(exist_ok=True)
    with Prober(seconds=20) as prober:
        path.write_bytes(content)
        expected = answer(kind, path, prober)
        limit_memory()
        print(json.dumps({"outcome": "answer", "seed": "none"}), flush=True)
        for seed in range(int(first), int(last)):
            start = time.perf_counter()
            found = outcome(kind, path, content, seed, expected, prober)
            found["seconds"] = round(time.perf_counter() - start, 3)
            print(json.dumps({"seed": seed, **found}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
