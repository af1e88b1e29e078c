"""Manifests of export folders: the schema, and comparison of files with their entries."""

import copy
import hashlib
import json
import os

import pytest
from manifests import sample

from keras_resnet.untrusted.manifest import MANIFEST, MAX_BYTES, check_listed, digest, read_manifest
from keras_resnet.utils.errors import InputError


def write(folder, manifest):
    text = manifest if isinstance(manifest, (str, bytes)) else json.dumps(manifest)
    content = text if isinstance(text, bytes) else text.encode()
    (folder / MANIFEST).write_bytes(content)
    return folder


def changed(path, value):
    """Returns the sample with one value changed; `...` removes it."""
    manifest = copy.deepcopy(sample())
    *way, last = path
    inside = manifest
    for key in way:
        inside = inside[key]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    return manifest


def test_a_valid_manifest_is_returned_with_unknown_keys(tmp_path):
    manifest = {**sample(), "later": [1]}
    assert read_manifest(write(tmp_path, manifest)) == manifest


def test_keys_of_earlier_versions_are_read_as_those_of_today(tmp_path):
    manifest = sample()
    manifest["data"]["options"] = {"validation_split": None, "seed": 3, "skip_bad": True}
    assert read_manifest(write(tmp_path, manifest)) == manifest
    text = json.dumps(manifest).replace("validation_split", "validation_share")
    text = text.replace('"tolerance"', '"gate"')
    assert "validation_share" in text and "gate" in text
    assert read_manifest(write(tmp_path, text)) == manifest


def paths(value, path=()):
    """Yields the path of every key and of the first element of every array."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from paths(inner, (*path, key))
    elif isinstance(value, list) and value:
        yield from paths(value[0], (*path, 0))


# Objects with any keys.
FREE = {"machine", "tolerance", "tool_versions", "operators", "latency_ms"}
REQUIRED = [path for path in paths(sample()) if not FREE & set(path[:-1])]


@pytest.mark.parametrize("path", REQUIRED, ids=lambda path: ".".join(map(str, path)))
@pytest.mark.parametrize("value", [..., [[1]]], ids=["missing", "wrong"])
def test_every_key_is_required_and_typed(tmp_path, path, value):
    with pytest.raises(InputError, match=f"{tmp_path}.*{path[-1]}"):
        read_manifest(write(tmp_path, changed(path, value)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("manifest_version",), 2),
        (("manifest_version",), True),
        (("created",), "\ud800"),
        (("model", "parameters"), -1),
        (("model", "parameters"), 2**70),
        (("keras", "accuracy"), 1.5),
        (("class_names",), ["a", 5]),
        (("data", "options"), [1]),
        (("data", "options"), {"validation_split": 1.5}),
        (("data", "options"), {"seed": "3"}),
        (("data", "options"), {"skip_bad": 1}),
        (("tool_versions", "numpy"), 5),
        (("reference", "sha256"), "0" * 63),
        (("reference", "sha256"), "G" * 64),
        (("artifacts", 0, "bytes"), True),
        (("artifacts", 0, "input", "shape"), [None, -1]),
        (("artifacts", 0, "operators", "CONV_2D"), 0.5),
        (("artifacts", 0, "latency_ms", "1"), {"median": 1, "p95": None}),
        *(
            (("artifacts", 0, "file"), name)
            for name in ("", ".", "..", "a/b", "/a", "..\\a", "c:a", "a\0b", "a\nb", "x" * 256)
        ),
    ],
)
def test_values_out_of_bounds_are_refused(tmp_path, path, value):
    with pytest.raises(InputError, match="must be") as error:
        read_manifest(write(tmp_path, changed(path, value)))
    assert "\n" not in str(error.value) and str(error.value).isprintable()


TEXT = json.dumps(sample())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "damaged"),
        ("[1]", "must hold a JSON object, got list"),
        (TEXT[:-1], "damaged"),
        (TEXT.replace('"images": 10', '"images": NaN'), "NaN is no JSON number"),
        (TEXT.replace('"agreement": 1.0', '"agreement": 1e999'), "1e999 is no JSON number"),
        (TEXT.replace('"images": 10', '"images": ' + "9" * 5000), "damaged"),
        ('{"manifest_version": 1, ' + TEXT[1:], "one key twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (TEXT.encode("utf-16"), "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b" " * (MAX_BYTES + 1), "this one has more"),
        (
            json.dumps({**sample(), "artifacts": sample()["artifacts"] * 2}),
            "two artifacts under one name",
        ),
    ],
    ids=range(13),
)
def test_damaged_texts_are_refused_in_one_line(tmp_path, text, reason):
    with pytest.raises(InputError, match=reason) as error:
        read_manifest(write(tmp_path, text))
    assert str(error.value).startswith(f"{tmp_path}") and "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.timeout(20)
@pytest.mark.parametrize("make", [lambda path: None, os.mkdir, os.mkfifo])
def test_what_is_no_file_is_refused(tmp_path, make):
    make(tmp_path / MANIFEST)
    with pytest.raises(InputError, match="there is no such manifest"):
        read_manifest(tmp_path)


# ----------------------------------------------------------------------------------------------
# Checksums
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "saved_model"
    (folder / "variables").mkdir(parents=True)
    (folder / "variables" / "a b").write_bytes(b"12345")
    (folder / "saved_model.pb").write_bytes(b"graph")
    return folder


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def test_a_digest_is_the_sha256(tmp_path, tree):
    path = tmp_path / "large"
    content = os.urandom(3 * 2**20 + 5)
    path.write_bytes(content)
    assert digest(path) == (len(content), sha256(content))
    lines = (
        f"saved_model.pb {sha256(b'graph')} 5\n"  #
        f"variables/a b {sha256(b'12345')} 5\n"
    )
    assert digest(tree) == (10, sha256(lines.encode()))


def test_links_in_a_folder_are_refused(tree):
    (tree / "link").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="link: a link or device"):
        digest(tree)


def test_a_missing_file_has_no_digest(tmp_path):
    with pytest.raises(InputError, match="none: cannot be read"):
        digest(tmp_path / "none")


def list_file(path):
    size, sum_ = digest(path)
    listed = {**sample()["artifacts"][0], "file": path.name, "bytes": size, "sha256": sum_}
    write(path.parent, {**sample(), "artifacts": [listed]})


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"other", "sha256"), (b"longer than it was", "bytes must be 5, got 18")],
)
def test_a_listed_file_must_be_the_one_listed(tmp_path, content, reason):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"model")
    list_file(path)
    check_listed(path)
    check_listed(path, b"model")
    with pytest.raises(InputError, match=reason):
        check_listed(path, content)
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"model.tflite: not the file that its {MANIFEST} lists"):
        check_listed(path)
    check_listed(path.with_name("other.tflite"))  # it is not listed


def test_a_listed_folder_must_be_the_one_listed(tree, monkeypatch):
    list_file(tree)
    check_listed(tree)
    (tree / "saved_model.pb").write_bytes(b"Graph")
    monkeypatch.chdir(tree)
    for path in (tree, "."):
        with pytest.raises(InputError, match="sha256"):
            check_listed(path)


def test_manifests_of_others_do_not_matter_and_damaged_ones_do(tmp_path):
    path = tmp_path / "model.tflite"
    check_listed(path)
    write(tmp_path, {"name": "a browser's", "icons": []})
    check_listed(path)
    write(tmp_path, {"manifest_version": 1})
    with pytest.raises(InputError, match="`created` is missing"):
        check_listed(path)
