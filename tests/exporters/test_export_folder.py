"""The export folder: whole or not there, whatever happens to the process that writes it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import command

import keras_resnet
from keras_resnet import archive
from keras_resnet.evaluation.inference import load
from keras_resnet.exporters import folder as folders
from keras_resnet.untrusted.manifest import MANIFEST, read_manifest
from keras_resnet.utils.errors import InputError

pytestmark = pytest.mark.thorough

FIRST, SECOND = "model-float32.onnx", "model-int8.onnx"


def export(run, folder, precision="float32", **options):
    return keras_resnet.export(run, folder, to=["onnx"], precision=[precision], **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def listed(folder):
    return [row["file"] for row in read_manifest(folder)["artifacts"]]


@pytest.fixture(scope="module")
def exported(trained_run, tmp_path_factory):
    """An export of one file; not to be changed."""
    folder = tmp_path_factory.mktemp("exported") / "export"
    export(trained_run, folder)
    return folder


@pytest.fixture
def target(exported, tmp_path):
    """A copy of it, alone in its folder."""
    return Path(shutil.copytree(exported, tmp_path / "parent" / "export"))


@pytest.fixture(scope="module")
def other_model(trained_run, tmp_path_factory):
    """A model of the same data with other weights."""
    predictor = load(trained_run)
    predictor.model.layers[-1].weights[-1].assign_add([0.1, 0, 0, 0])
    path = tmp_path_factory.mktemp("other") / "other.keras"
    archive.save_model(predictor.model, path, predictor.metadata)
    return path


# ----------------------------------------------------------------------------------------------
# Target folders
# ----------------------------------------------------------------------------------------------


def make_file(path):
    path.write_text("mine")


def make_foreign(path):
    path.mkdir()
    (path / "thesis.txt").write_text("mine")


def make_web_app(path):
    path.mkdir()
    (path / MANIFEST).write_text('{"name": "a web app"}')


def make_other_version(path):
    path.mkdir()
    (path / MANIFEST).write_text('{"manifest_version": 2}')


REFUSED = {
    "a file": (make_file, "there is a file of that name: choose another --out"),
    "foreign files": (make_foreign, "a new folder, an empty one or that of an earlier export"),
    "a manifest of others": (make_web_app, "damaged: .* choose another --out, or remove"),
    "a manifest of later": (make_other_version, "must be the number 1.* choose another --out"),
    "a link to a file": (
        lambda path: (make_file(path.with_name("there")), path.symlink_to("there")),
        "there is a file of that name",
    ),
    "a link to foreign files": (
        lambda path: (make_foreign(path.with_name("there")), path.symlink_to("there")),
        "a new folder, an empty one or",
    ),
    "a link to itself": (lambda path: path.symlink_to(path), "a link to itself"),
    "below a file": (lambda path: make_file(path.parent / "file"), "cannot be written"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_target_that_is_not_an_exports_is_refused_and_left_alone(case, trained_run, tmp_path):
    make, message = REFUSED[case]
    make(tmp_path / "out")
    before = names(tmp_path)
    out = tmp_path / "file" / "out" if case == "below a file" else tmp_path / "out"
    with pytest.raises(InputError, match=message) as caught:
        export(trained_run, out)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("~nobody-of-that-name/export", "there is no such home folder"),
        ("nul\0byte", "cannot be written"),
        ("x" * 300, "cannot be written"),
        ("/proc", "a disk's own folder cannot be replaced"),
        ("/", "a disk's own folder cannot be replaced"),
    ],
)
def test_impossible_targets_are_one_line(out, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        folders.check_target(out)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["missing", "empty", "earlier", "deep"])
def test_new_empty_and_earlier_folders_are_taken(kind, tmp_path, exported):
    folder = tmp_path / ("a/b/out" if kind == "deep" else "out")
    if kind == "empty":
        folder.mkdir()
    elif kind == "earlier":
        shutil.copytree(exported, folder)
    assert folders.check_target(folder) == folder.resolve()
    assert folder.parent.is_dir()


@pytest.mark.parametrize("out", ["./a folder/out put/", "größe/…"])
def test_relative_paths_and_odd_names(out, trained_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export(trained_run, out)
    assert keras_resnet.verify(out)["passed"]
    assert names(Path(out).resolve().parent) == [Path(out).name]


@pytest.mark.parametrize("there", ["missing", "empty", "earlier"])
def test_a_link_stays_a_link_to_the_folder_that_is_written(there, trained_run, exported, tmp_path):
    real, link = tmp_path / "disk" / "real", tmp_path / "link"
    real.parent.mkdir()
    if there == "empty":
        real.mkdir()
    elif there == "earlier":
        shutil.copytree(exported, real)
    link.symlink_to(real)
    export(trained_run, link, "int8")
    assert link.is_symlink() and not real.is_symlink()
    assert keras_resnet.verify(link)["passed"]
    assert listed(real) == ([FIRST] if there == "earlier" else []) + [SECOND]
    assert names(tmp_path) == ["disk", "link"] and names(real.parent) == ["real"]


def test_without_a_folder_it_goes_into_the_run_or_beside_the_file(trained_run, tmp_path):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    shutil.copy(run / "model.keras", tmp_path / "mine.keras")
    export(run, None)
    export(tmp_path / "mine.keras", None)
    assert keras_resnet.verify(run / "export")["passed"]
    assert keras_resnet.verify(tmp_path / "mine-export")["passed"]


# ----------------------------------------------------------------------------------------------
# Earlier exports
# ----------------------------------------------------------------------------------------------


def test_a_second_export_adds_and_keeps(trained_run, target):
    before = read_manifest(target)["artifacts"]
    manifest = export(trained_run, target, "int8")
    assert [row["file"] for row in manifest["artifacts"]] == [FIRST, SECOND]
    assert manifest["artifacts"][:1] == before
    with np.load(target / "reference.npz") as arrays:
        assert {f"answers/{FIRST}", f"answers/{SECOND}"} <= {*arrays}
    assert keras_resnet.verify(target)["passed"]
    assert names(target) == sorted([FIRST, SECOND, MANIFEST, "reference.npz", "labels.txt"])
    assert names(target.parent) == ["export"]


def test_the_same_again_replaces_it(trained_run, target):
    created = read_manifest(target)["artifacts"][0]["latency_ms"]
    manifest = export(trained_run, target)
    assert listed(target) == [FIRST]
    assert manifest["artifacts"][0]["latency_ms"] != created


def test_another_model_replaces_all(other_model, target):
    export(other_model, target, "int8")
    assert listed(target) == [SECOND] and not (target / FIRST).exists()
    assert keras_resnet.verify(target)["passed"]


def overwrite(path):
    path.write_bytes(b"no file of ours")


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        *((FIRST, Path.unlink), ("reference.npz", overwrite)),
        pytest.param(FIRST, overwrite, marks=pytest.mark.slow),
        pytest.param("reference.npz", Path.unlink, marks=pytest.mark.slow),
    ],
)
def test_an_artifact_that_was_changed_is_not_kept(file, damage, trained_run, target):
    damage(target / file)
    export(trained_run, target, "int8")
    assert listed(target) == [SECOND]
    assert keras_resnet.verify(target)["passed"]


def add_foreign(folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "mine" / "deep").mkdir(parents=True)
    (folder / "mine" / "deep" / "data.bin").write_bytes(b"\0\1")
    (folder / ".hidden").write_text("mine")
    (folder / "link").symlink_to("mine")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "mine" / "up").symlink_to("../notes.txt")


@pytest.mark.parametrize("which", ["trained_run", "other_model"])
def test_foreign_files_survive(which, request, target):
    add_foreign(target)
    export(request.getfixturevalue(which), target, "int8")
    assert (target / "notes.txt").read_text() == (target / "mine" / "up").read_text() == "mine"
    assert (target / "mine" / "deep" / "data.bin").read_bytes() == b"\0\1"
    assert (target / ".hidden").read_text() == "mine"
    assert os.readlink(target / "link") == "mine"
    assert os.readlink(target / "dangling") == "nowhere"
    assert keras_resnet.verify(target)["passed"]


def test_an_export_that_fails_leaves_the_earlier_one(trained_run, target, tmp_path):
    add_foreign(target)
    before = {name: (target / name).stat().st_ino for name in names(target) if name != "dangling"}
    with pytest.raises(InputError):
        export(trained_run, target, "int8", dataset=f"folder:{tmp_path}")
    after = {name: (target / name).stat().st_ino for name in names(target) if name != "dangling"}
    assert after == before and names(target.parent) == ["export"]


# ----------------------------------------------------------------------------------------------
# The parts
# ----------------------------------------------------------------------------------------------


def test_a_workspace_is_empty_beside_the_folder_and_gone_afterwards(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(KeyError), folders.workspace(folder) as work:
        assert work.parent == tmp_path and names(work) == [] and work != folder
        (work / "half").write_text("written")
        raise KeyError
    assert names(tmp_path) == []


def test_one_export_at_a_time(tmp_path):
    folder = tmp_path / "out"
    with folders.workspace(folder) as work:
        (work / "mine").touch()
        with pytest.raises(InputError, match="out: another export"), folders.workspace(folder):
            pass
        with folders.workspace(tmp_path / "other") as other:  # not in the way of others
            folders.publish(other, tmp_path / "other")
        assert names(work) == ["mine"]
        folders.publish(work, folder)
    assert names(folder) == ["mine"] and names(tmp_path) == ["other", "out"]


def test_carried_over_files_are_links_where_the_disk_can(tmp_path):
    earlier, work = tmp_path / "earlier", tmp_path / "work"
    (earlier / "saved_model").mkdir(parents=True)
    work.mkdir()
    for name in ("model.onnx", "saved_model/saved_model.pb"):
        (earlier / name).write_text(name)
    folders.carry_over(earlier, work, ["model.onnx", "saved_model"])
    for name in ("model.onnx", "saved_model/saved_model.pb"):
        assert (earlier / name).samefile(work / name)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second disk")
def test_and_copies_where_it_cannot(tmp_path):
    import tempfile

    (tmp_path / "saved_model").mkdir()
    (tmp_path / "saved_model" / "saved_model.pb").write_text("content")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as work:
        folders.carry_over(tmp_path, Path(work), ["saved_model"])
        assert (Path(work) / "saved_model" / "saved_model.pb").read_text() == "content"


# ----------------------------------------------------------------------------------------------
# Killed
# ----------------------------------------------------------------------------------------------

# Ends itself at the n-th thing that it does to the file system.
PUBLISH = """
import os, signal, sys
folder, most = sys.argv[1], int(sys.argv[2])
sys.argv[0] = "keras-resnet"  # so that Keras is not imported
from pathlib import Path
from keras_resnet.exporters import folder as folders
seen = 0
def trap(event, arguments):
    global seen
    if event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "shutil.rmtree"):
        seen += 1
        if seen == most:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(trap)
folder = folders.check_target(folder)
with folders.workspace(folder) as work:
    (work / "content").write_text("new")
    (work / "a").mkdir()
    (work / "a" / "b").write_text("new")
    if folder.exists():
        folders.carry_over(folder, work, ["kept"])
    folders.publish(work, folder)
"""


def make_earlier(folder, exported):
    (folder / "a").mkdir(parents=True)
    for name in ("content", "a/b", "kept"):
        (folder / name).write_text("old")
    shutil.copy(exported / MANIFEST, folder)


@pytest.mark.parametrize("earlier", [False, True])
def test_killed_at_any_step_the_folder_is_the_old_or_the_new(earlier, exported, tmp_path):
    folder, seen, steps = tmp_path / "out", set(), 0
    status = None
    while status != 0:
        shutil.rmtree(folder, ignore_errors=True)
        if earlier:
            make_earlier(folder, exported)
        steps += 1
        arguments = [sys.executable, "-c", PUBLISH, folder, str(steps)]
        status = subprocess.run(arguments, timeout=60).returncode
        assert status in (0, -signal.SIGKILL)
        # As the next export finds it.
        with folders.workspace(folder):
            found = {
                name: (folder / name).read_text()
                for name in ("content", "a/b", "kept")
                if (folder / name).exists()
            }
        seen.add(json.dumps(found))
        old = dict.fromkeys(("content", "a/b", "kept"), "old") if earlier else {}
        new = {"content": "new", "a/b": "new", **({"kept": "old"} if earlier else {})}
        assert found in (old, new), f"killed at step {steps}"
        assert names(tmp_path) == (["out"] if found else [])
    assert len(seen) == 2 and steps > (8 if earlier else 3)


def start_export(run, out, precision):
    words = command("export", run, "--to", "onnx", "--precision", precision, "--out", out)
    return subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


@contextlib.contextmanager
def ended(process):
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(path, process):
    """Waits until a process has written `path`."""
    until = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < until
        time.sleep(0.0005)


# A file in the workspace while the model runs and is converted, while the artifact is verified, and
# just before the folder is renamed.
MOMENTS = {"converting": "", "verifying": SECOND, "publishing": MANIFEST}
LAST_MOMENT, *OTHERS = reversed(MOMENTS)
SOME_SLOW = [LAST_MOMENT, *(pytest.param(moment, marks=pytest.mark.slow) for moment in OTHERS)]


@pytest.mark.slow
@pytest.mark.parametrize("moment", [LAST_MOMENT, *OTHERS])
def test_a_killed_first_export_leaves_nothing_under_its_name(moment, trained_run, tmp_path):
    out = tmp_path / "out"
    with ended(start_export(trained_run, out, "int8")) as process:
        wait_for(tmp_path / ".out.partial" / MOMENTS[moment], process)
    if out.exists():  # killed after the only rename: then it is whole
        assert moment == "publishing" and keras_resnet.verify(out)["passed"]
    else:
        assert names(tmp_path) == [".out.partial"]
        with pytest.raises(InputError, match="no such manifest"):
            keras_resnet.verify(out)
    export(trained_run, out)
    assert keras_resnet.verify(out)["passed"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("moment", SOME_SLOW)
def test_a_killed_second_export_leaves_the_first_whole(moment, trained_run, target):
    with ended(start_export(trained_run, target, "int8")) as process:
        wait_for(target.parent / ".export.partial" / MOMENTS[moment], process)
    if not target.exists():  # between the two renames; else the old one or the new one
        assert moment == "publishing"
        assert keras_resnet.verify(target.parent / ".export.before")["passed"]
    else:
        assert keras_resnet.verify(target)["passed"]
        assert FIRST in listed(target)
    export(trained_run, target, "float16")
    assert keras_resnet.verify(target)["passed"]
    assert {FIRST, "model-float16.onnx"} <= {*listed(target)}
    assert names(target.parent) == ["export"]


@pytest.mark.slow
def test_of_two_exports_at_the_same_time_the_second_is_refused(trained_run, target):
    with ended(start_export(trained_run, target, "int8")) as process:
        wait_for(target.parent / ".export.partial" / SECOND, process)
        os.kill(process.pid, signal.SIGSTOP)  # so that it cannot be done before the other
        with pytest.raises(InputError, match="another export is writing to it"):
            export(trained_run, target, "float16")
        os.kill(process.pid, signal.SIGCONT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert listed(target) == [FIRST, SECOND] and keras_resnet.verify(target)["passed"]
    assert names(target.parent) == ["export"]
