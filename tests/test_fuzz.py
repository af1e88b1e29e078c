"""Thousands of damaged files: each is refused in one line, or its answers are right.

Half of the damage is done to a whole file, so that its checksums find it. The other half gets new
checksums, so that it reaches the parsers. See fuzzing.py.
"""

import json
import shutil
import subprocess
import sys
import threading

import fuzzing
import pytest
import tiny_exports
from manifests import sample

from keras_resnet.models import Spec

pytestmark = pytest.mark.thorough

SECONDS_A_MUTANT = 60

# In `make test`; thousands more are slow. A .keras file takes 80 ms, the others 20.
MUTANTS = {"tflite": 1000, "onnx": 1000, "keras": 250, "manifest": 1000}


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder with one whole file of each kind."""
    folder = tmp_path_factory.mktemp("originals")
    model = tiny_exports.build(Spec((1,), (4,)), fuzzing.SHAPE, fuzzing.CLASSES)
    tiny_exports.write(folder, model, fuzzing.METADATA)
    (folder / "manifest.json").write_text(json.dumps(sample()))
    return folder


def lines_of(process, seconds):
    """Yields a process's lines; ends it if one takes too long."""
    while True:
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if not line:
            return
        yield line


def check_mutants(kind, folder, first, last):
    """Loads mutants in a process of their own and checks the outcome of each."""
    # In a folder of its own: a manifest beside them would be taken for theirs.
    (folder / kind).mkdir(parents=True)
    words = [sys.executable, "-W", "ignore", fuzzing.__file__, kind, folder, first, last]
    with (
        open(folder / kind / "errors.txt", "w+") as errors,
        subprocess.Popen(map(str, words), stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        rows = [json.loads(line) for line in lines_of(process, SECONDS_A_MUTANT)]
        status = process.wait()
        errors.seek(0)
        said = errors.read()[-2000:]
    bad = [row for row in rows if row["outcome"] in ("wrong", "error")]
    assert not bad, f"{len(bad)} {kind} mutants, the first: {bad[0]}"
    done = [row["seed"] for row in rows[1:]]
    assert done == list(range(first, last)), (
        f"{kind} mutant {first + len(done)} ended the process: status {status}: {said}"
    )
    return rows[1:]


@pytest.mark.parametrize("kind", fuzzing.KINDS)
def test_damaged_files_do_no_harm(originals, tmp_path, kind):
    shutil.copy(originals / fuzzing.KINDS[kind][0], tmp_path)
    rows = check_mutants(kind, tmp_path, 0, MUTANTS[kind])
    # Neither harmless damage nor mere noise would be a good test.
    outcomes = {
        outcome: sum(row["outcome"] == outcome for row in rows) for outcome in ("refused", "answer")
    }
    assert outcomes["refused"] > len(rows) / 2 and outcomes["answer"] > len(rows) / 100, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzzing.KINDS)
def test_many_more_damaged_files_do_no_harm(originals, tmp_path, kind):
    shutil.copy(originals / fuzzing.KINDS[kind][0], tmp_path)
    check_mutants(kind, tmp_path, MUTANTS[kind], 6000)


@pytest.mark.parametrize("kind", fuzzing.KINDS)
def test_a_mutant_is_made_from_its_seed_alone(originals, kind):
    content = (originals / fuzzing.KINDS[kind][0]).read_bytes()
    made = [fuzzing.mutant(kind, content, seed)[0] for seed in range(20)]
    assert made == [fuzzing.mutant(kind, content, seed)[0] for seed in range(20)]
    assert sum(each != content for each in made) > 15
