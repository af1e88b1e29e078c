"""Published networks by name, from a hub of our own with repositories of timm and transformers."""

import dataclasses
import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import fuzzing
import hub as hubs
import keras
import numpy as np
import pytest
import references
import safetensors.numpy
import torch
from conftest import check, run_main
from PIL import Image

import keras_resnet
from keras_resnet import InputError, Predictor, Spec, archive, from_pretrained
from keras_resnet.config import TrainConfig
from keras_resnet.evaluation.inference import load, load_data
from keras_resnet.exporters.source import open_export_source
from keras_resnet.models import SPECS, build_resnet18
from keras_resnet.preprocessing import ImagePreprocessing
from keras_resnet.recipes import RECIPES
from keras_resnet.training.fine_tuning import adopt_form, adopt_normalization, find_source
from keras_resnet.weights import convert, published_networks, save_torch_weights
from keras_resnet.weights import hub as client
from keras_resnet.weights.configuration import imagenet_classes, read_configuration
from keras_resnet.weights.sources import open_source

TIMM = "timm/resnet18.a1_in1k"
TIMM_V2 = "timm/resnetv2_18.ra4_e3600_r224_in1k"
TINY = "me/tiny"
BOTTLENECK = "me/bottleneck"
# The folders of `fashion_folder`, sorted.
NAMES = ("Bag", "Sandal", "Sneaker", "Trouser")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
TIMM_PREPROCESSING = {
    "image_size": 224,
    **IMAGENET,
    "reverse_channels": False,
    "resize": "shorter_edge",
    "crop_pct": 0.95,
    "interpolation": "bicubic",
    "antialias": True,
    "resampler": "pillow",
    "rounding": "torchvision",
}


def write_transformers(folder, name, num_channels=3, **options):
    """Writes a repository by transformers' own code; returns the network."""
    transformers = references.import_transformers()
    labels = dict(enumerate(NAMES))
    config = transformers.ResNetConfig(
        **{"num_channels": num_channels, "id2label": labels, "embedding_size": 8, **options}
    )
    network = transformers.ResNetForImageClassification(config).eval()
    references.randomize(network, 0)
    network.save_pretrained(folder / name)
    processor = {"crop_pct": 0.875, "size": 32, "resample": 3, "do_resize": True}
    processor |= {"feature_extractor_type": "ConvNextFeatureExtractor", "do_normalize": True}
    processor |= {"image_mean": IMAGENET["mean"], "image_std": IMAGENET["std"]}
    # The form of microsoft's repositories, which today's transformers reads and no longer writes.
    (folder / name / "preprocessor_config.json").write_text(json.dumps(processor))
    (folder / name / "README.md").write_text("---\nlicense: other\nlicense_name: mine\n---\n")
    return network


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The folder of all repositories, and the networks in PyTorch that they were made of."""
    folder = tmp_path_factory.mktemp("repositories")
    torch.manual_seed(0)
    basic = {"depths": [1, 1], "hidden_sizes": [8, 16], "layer_type": "basic"}
    bottleneck = {"depths": [1, 2], "hidden_sizes": [32, 64], "downsample_in_bottleneck": True}
    return folder, {
        TIMM: hubs.write_timm(folder, TIMM),
        TIMM_V2: hubs.write_timm(folder, TIMM_V2),
        TINY: write_transformers(folder, TINY, **basic),
        BOTTLENECK: write_transformers(folder, BOTTLENECK, **bottleneck),
    }


@pytest.fixture(scope="module")
def server(networks):
    with hubs.serve(networks[0]) as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The hub, for a client with an empty cache."""
    server.requests, server.gated, server.faults, server.status = [], set(), {}, None
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    return server


def cached_weights(tmp_path):
    """Returns the names of all files of more than 20 kB in the cache, whole or not."""
    files = (tmp_path / "home").rglob("*")
    return [path.name for path in files if path.is_file() and path.stat().st_size > 20_000]


def differences(model, network):
    """Returns the largest relative difference of the logits, behind the preprocessing."""
    (ours,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    floats = np.random.default_rng(0).normal(size=(2, *ours.input_shape[1:])).astype("float32")
    channels_first = torch.from_numpy(np.ascontiguousarray(floats.transpose(0, 3, 1, 2)))
    theirs = references.torch_logits(network, channels_first)
    return abs(ours.predict_on_batch(floats) - theirs).max() / abs(theirs).max()


# ----------------------------------------------------------------------------------------------
# The networks
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "normalization"), [(TIMM_V2, HALF), (TINY, IMAGENET), (BOTTLENECK, IMAGENET)]
)
def test_the_logits_are_the_originals(name, normalization, hub, networks):
    model = from_pretrained(name, image_size=32)
    assert model.input.dtype == "uint8" and model.input_shape == (None, None, None, 3)
    layer = model.get_layer("preprocessing")
    assert {key: tuple(getattr(layer, key)) for key in normalization} == normalization
    check(name, differences(model, networks[1][name]), 1e-5)


@pytest.fixture(scope="module")
def photograph():
    """An image of 500×333 pixels with edges and colours."""
    rows, columns = np.mgrid[:333, :500]
    waves = np.sin(rows / 9) * np.cos(columns / 23) + np.sin((rows + columns) ** 2 / 30_000)
    pixels = np.stack([waves, np.roll(waves, 40, 1), (columns // 50 + rows // 37) % 2], axis=-1)
    return Image.fromarray(((pixels - pixels.min()) / np.ptp(pixels) * 255).astype("uint8"))


def check_photograph(name, ours, theirs):
    """Holds the logits for a photograph to the libraries': they may differ by a grey level."""
    check(name, abs(ours - theirs).max() / abs(theirs).max(), 1e-2)
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()


def test_a_photograph_as_timm_prepares_it(hub, networks, photograph):
    timm, network = references.import_timm(), networks[1][TIMM]
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config)
    theirs = references.torch_logits(network, transform(photograph)[None])
    ours = from_pretrained(TIMM).predict_on_batch(np.asarray(photograph)[None])
    check_photograph(TIMM, ours, theirs)


@pytest.mark.parametrize("name", [TINY, BOTTLENECK])
def test_a_photograph_as_transformers_prepares_it(name, hub, networks, photograph):
    processor = references.import_transformers().AutoImageProcessor.from_pretrained(
        networks[0] / name
    )
    images = processor(photograph, return_tensors="pt")["pixel_values"]
    theirs = references.torch_logits(networks[1][name], images)
    ours = from_pretrained(name).predict_on_batch(np.asarray(photograph)[None])
    check_photograph(name, ours, theirs)


def test_the_metadata_is_the_repositorys(hub, tmp_path, capfd):
    model = from_pretrained(TIMM)
    assert capfd.readouterr() == ("", "")  # a bar is for terminals
    predictor = Predictor(model)
    assert predictor.class_names[:3] == ("tench", "goldfish", "great white shark")
    found = predictor.metadata
    assert found["class_ids"][0] == "n01440764" and found["license"] == "apache-2.0"
    assert (found["model"], found["takes_raw_images"]) == ("resnet18", True)
    layer = model.get_layer("preprocessing")
    assert {key: getattr(layer, key) for key in TIMM_PREPROCESSING} == TIMM_PREPROCESSING
    weights = hub.folder / TIMM / "model.safetensors"
    assert found["origin"] == {
        "name": TIMM,
        "revision": hubs.COMMIT,
        "sha256": client.digest(weights)[1],
        "library": "timm",
        "architecture": "resnet18",
        "license": "apache-2.0",
        "url": "https://github.com/huggingface/pytorch-image-models",
    }
    archive.save_model(model, tmp_path / "saved.keras")
    assert load(tmp_path / "saved.keras").metadata == found
    # The manifest of an export has them, too.
    for given in (model, tmp_path / "saved.keras"):
        assert open_export_source(given).record["origin"] == found["origin"]


def test_what_was_downloaded_serves_offline(hub, monkeypatch):
    first = from_pretrained(TINY)
    assert {method for method, _ in hub.requests} == {"HEAD", "GET"}
    # A second time only whether there is a newer revision.
    hub.requests.clear()
    from_pretrained(TINY)
    assert hub.requests == [("HEAD", f"/{TINY}/resolve/main/config.json")]
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = from_pretrained(f"{TINY}@{hubs.COMMIT}")
    offline = from_pretrained(TINY)
    assert hub.requests == []
    for one, two, three in zip(
        *(model.get_weights() for model in (first, again, offline)), strict=True
    ):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_array_equal(one, three)


def test_only_data_files_are_asked_for(hub):
    (hub.folder / TINY / "pytorch_model.bin").write_bytes(b"code")
    (hub.folder / TINY / "modeling.py").write_text("raise SystemExit")
    from_pretrained(TINY)
    asked = {Path(path).name for _, path in hub.requests}
    assert asked == {"config.json", "preprocessor_config.json", "README.md", "model.safetensors"}


def test_a_local_folder_of_a_repository_takes_precedence(hub, networks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(networks[0] / TINY, tmp_path / TINY)
    for given in (TINY, Path(TINY), str(tmp_path / TINY)):
        model = from_pretrained(given)
        check("folder", differences(model, networks[1][TINY]), 1e-5)
        # Without the path, which belongs to this machine.
        assert archive.get_metadata(model)["origin"]["name"] == "tiny"
    monkeypatch.setenv("HOME", str(tmp_path))
    convert(f"~/{TINY}", out=tmp_path / "tiny.keras")
    assert hub.requests == [] and load(TINY).class_names == NAMES
    with pytest.raises(InputError, match=r"^me/tiny: a local folder has no revisions, got 'v1'$"):
        from_pretrained(TINY, revision="v1")
    # Something else in a folder that is there is a path, unless it is marked as a name.
    for function in (from_pretrained, load):
        with pytest.raises(InputError, match=r"^me/bottleneck: the folder me has no .* hf-hub:me"):
            function(BOTTLENECK)
    assert from_pretrained(f"hf-hub:{BOTTLENECK}").name


def test_other_sizes_and_classes(hub):
    model = from_pretrained(TIMM, test_size=True)
    assert model.get_layer("preprocessing").image_size == 288
    assert model.get_layer("preprocessing").crop_pct == 1.0
    model = from_pretrained(TINY, num_classes=3, image_size=48)
    assert (model.output_shape, model.get_layer("preprocessing").image_size) == ((None, 3), 48)
    assert "class_names" not in archive.get_metadata(model)
    with pytest.raises(InputError, match=r"`num_classes` must be a whole number of at least 1"):
        from_pretrained(TINY, num_classes=0)


# ----------------------------------------------------------------------------------------------
# Errors of the hub
# ----------------------------------------------------------------------------------------------

TRUNCATE = {"model.safetensors": lambda content: content[: len(content) // 2]}
FLIP = {"model.safetensors": lambda content: content[:-1] + bytes([content[-1] ^ 1])}
FLIP_JSON = {"config.json": lambda content: content.replace(b"basic", b"bas1c")}

FAILURES = {
    "unknown name": ("me/nothing", {}, r"neither a file or folder here nor a repository of http"),
    "unknown revision": (f"{TINY}@v9", {}, r"has no revision v9$"),
    "gated": (TINY, {"gated": {TINY}}, r"accept them at http://.*/me/tiny, and set HF_TOKEN"),
    "down": (TINY, {"status": 503}, r"answered 503"),
    "truncated": (TINY, {"faults": TRUNCATE}, r"Consistency check failed"),
    "damaged": (TINY, {"faults": FLIP}, r"must have sha256 .* as the hub states, got .*; try ag"),
    "damaged JSON": (TINY, {"faults": FLIP_JSON}, r"config.json must have sha1 .*try again$"),
    "pinned": (f"{TINY}#sha256={'0' * 64}", {}, r"must have sha256 0000.*, got .*; not used$"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_each_failure_is_one_line_and_leaves_nothing(case, hub, tmp_path):
    name, changes, message = FAILURES[case]
    for attribute, value in changes.items():
        setattr(hub, attribute, value)
    with pytest.raises(InputError, match=message) as raised:
        from_pretrained(name)
    assert len(str(raised.value).splitlines()) == 1
    assert str(raised.value).startswith(name.partition("#")[0])
    # The weights of the wrong checksum are whole.
    assert cached_weights(tmp_path) == [] or case == "pinned"
    # When the cause is gone, the same call succeeds, or fails for the name's sake.
    hub.gated, hub.faults, hub.status = set(), {}, None
    if name == TINY:
        assert from_pretrained(name).output_shape == (None, 4)


def test_a_token_opens_a_gated_repository(hub, monkeypatch):
    hub.gated.add(TINY)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    sha256 = client.digest(hub.folder / TINY / "model.safetensors")[1]
    assert from_pretrained(f"{TINY}#sha256={sha256.upper()}").name
    assert from_pretrained(TINY, sha256=sha256, revision=hubs.COMMIT).name


def test_no_network_and_no_hub(hub, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        message = (
            r"^me/tiny: neither a file or folder here nor in the cache, and http.* cannot be "
            r".*; connect once, or name a folder with the repository's files$"
        )
        with pytest.raises(InputError, match=message):
            from_pretrained(TINY)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(InputError, match=r"^me/tiny: .*HF_HUB_OFFLINE forbids"):
            from_pretrained(TINY)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    # A network's portal answers everything with a page.
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.status = 200
    with pytest.raises(InputError, match=r"does not answer as a hub does: check the network"):
        from_pretrained(TINY)


def test_large_files_are_not_downloaded(hub, networks, monkeypatch, tmp_path):
    """The hub sends a branch's newest files, also where an older one is in the cache."""
    repositories = tmp_path / "repositories"
    folder = repositories / TINY
    shutil.copytree(networks[0] / TINY, folder)
    monkeypatch.setattr(hub, "folder", repositories)
    monkeypatch.setattr(client, "MAX_BYTES", 10_000)
    large = json.dumps({"a": "b" * 10_000}).encode()
    (folder / "README.md").write_bytes(large)
    assert read_configuration(client.find_repository(TINY)).license is None
    content = (folder / "preprocessor_config.json").read_bytes()
    (folder / "preprocessor_config.json").write_bytes(large)
    message = r"^me/tiny: {} must have at most 10000 bytes, got 10009: it is not the file"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "other"))
    with pytest.raises(InputError, match=message.format(r"preprocessor_config\.json")):
        client.find_repository(TINY)
    (folder / "preprocessor_config.json").write_bytes(content)
    (folder / "config.json").write_bytes(large)
    with pytest.raises(InputError, match=message.format(r"config\.json")):
        client.find_repository(TINY)
    got = {Path(path).name for method, path in hub.requests if method == "GET"}
    assert got == {"config.json", "preprocessor_config.json"}
    sizes = [path.stat().st_size for path in tmp_path.rglob("blobs/*")]
    assert sizes and max(sizes) < 10_000


FULL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from keras_resnet.weights import hub
try:
    hub.find_repository(sys.argv[1]).fetch_weights()
except ValueError as error:
    print(error)
"""


def test_a_cut_connection_is_resumed(hub):
    cuts = [1000, 2000]

    def cut(content):
        return hubs.Cut(content, cuts.pop()) if cuts else content

    hub.faults["model.safetensors"] = cut
    assert from_pretrained(TINY).output_shape == (None, 4)
    assert cuts == [] and len([path for _, path in hub.requests if path.startswith("/large")]) == 3


@pytest.mark.slow
def test_a_full_disk_is_one_line(hub, tmp_path):
    words = [sys.executable, "-c", FULL_DISK, TINY]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env={**os.environ})
    line = f"{TINY}: model.safetensors cannot be written to the cache {tmp_path}/home/hub: "
    assert done.stdout.startswith(line) and len(done.stdout.splitlines()) == 1, done.stderr
    assert cached_weights(tmp_path) == [] and not [*tmp_path.rglob("*.incomplete")]


# ----------------------------------------------------------------------------------------------
# Configurations
# ----------------------------------------------------------------------------------------------


@pytest.fixture
def edit(networks, tmp_path):
    """Returns a function that copies a repository with changed JSON, and returns its folder."""

    def copy(name, file="config.json", weights=False, **changes):
        folder = tmp_path / "edited"
        shutil.rmtree(folder, ignore_errors=True)
        leave_out = () if weights else ("*.safetensors",)
        shutil.copytree(networks[0] / name, folder, ignore=shutil.ignore_patterns(*leave_out))
        path = folder / file
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))
        return folder

    return copy


def read(folder):
    return read_configuration(client.find_repository(folder))


def test_the_old_flat_form_says_the_same(edit, networks):
    nested = json.loads((networks[0] / TIMM / "config.json").read_text())
    flat = {"architecture": "resnet18", **nested["pretrained_cfg"], "pretrained_cfg": ...}
    flat |= {"model_args": ..., "num_classes": 2, "labels": ["a cat", "a dog"]}
    found = read(edit(TIMM, **flat))
    assert found.class_names == ("a cat", "a dog") and found.class_ids is None
    whole = read(networks[0] / TIMM)
    assert dataclasses.replace(found, num_classes=1000, class_names=None) == dataclasses.replace(
        whole, class_names=None, class_ids=None
    )


def test_what_a_timm_file_leaves_out_is_as_timm_has_it(edit):
    timm = references.import_timm()
    found = read(edit(TIMM, pretrained_cfg={}, model_args=...))
    theirs = timm.data.resolve_data_config(pretrained_cfg={"num_classes": 1000})
    assert theirs == {
        "input_size": (3, found.preprocessing["image_size"], 224),
        "crop_mode": "center",
        **{key: found.preprocessing[key] for key in ("mean", "std", "interpolation", "crop_pct")},
    }
    assert found.class_names is None  # it does not say that it is of ImageNet


def test_names_of_classes(edit, networks):
    ids, names = zip(*imagenet_classes(), strict=True)
    labels = {"label_names": list(ids), "label_descriptions": dict(imagenet_classes())}
    assert read(edit(TIMM, **labels)).class_names == names
    long = {str(index): f"{name}, and more" for index, name in enumerate(names)}
    folder = edit(TINY, id2label=long)
    assert read(folder).class_ids is None
    (folder / "README.md").write_text("---\ndatasets:\n- imagenet-1k\n---\n")
    assert read(folder).class_ids == ids and read(folder).class_names[0] == "tench, and more"
    turned = dict(zip(long, reversed(long.values()), strict=True))
    folder = edit(TINY, id2label=turned)
    (folder / "README.md").write_text("---\ndatasets: [imagenet-1k]\n---\n")
    assert read(folder).class_ids is None
    assert read(edit(TINY, id2label={"0": "LABEL_0", "1": "LABEL_1"})).class_names is None
    assert read(edit(TINY, id2label={"0": "a\n b\x1b[0m"})).class_names == ("a b?[0m",)


PROCESSORS = {
    "ConvNextImageProcessorPil": [
        ({"size": {"shortest_edge": 224}}, ("shorter_edge", 224, 0.875)),
        ({"size": {"shortest_edge": 288}, "crop_pct": 0.95}, ("shorter_edge", 288, 0.95)),
        ({"size": {"shortest_edge": 384}}, ("squash", 384, 1.0)),
        ({}, ("squash", 384, 1.0)),
    ],
    "ViTImageProcessorPil": [({}, ("squash", 224, 1.0))],
    "BitImageProcessorPil": [
        ({}, ("shorter_edge", 224, 1.0)),
        ({"size": {"shortest_edge": 232}}, ("shorter_edge", 224, 224 / 232)),
    ],
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_rules_of_image_processors(name, edit, tmp_path):
    transformers = references.import_transformers()
    for options, expected in PROCESSORS[name]:
        getattr(transformers, name)(**options).save_pretrained(tmp_path / "processor")
        folder = edit(TINY)
        shutil.copy(tmp_path / "processor" / "preprocessor_config.json", folder)
        found = read(folder).preprocessing
        assert (found["resize"], found["image_size"], found["crop_pct"]) == expected
        assert found["antialias"] and found["rounding"] == "transformers"


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Bit", "CLIP"])
@pytest.mark.parametrize(
    "stated",
    [
        {"size": 232},
        {"size": 256, "crop_size": 200},
        {"size": 232, "do_center_crop": False},
        {"size": 232, "do_center_crop": None},
        {"size": {"height": 256, "width": 256}},
    ],
)
def test_the_defaults_of_image_processors(family, stated, edit, photograph):
    """Old files state few keys, and sizes as numbers."""
    transformers = references.import_transformers()
    folder = edit(TINY)
    kind = f"{family}ImageProcessor"
    content = {"image_processor_type": kind, "resample": 3, **stated}
    content |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)
    theirs = theirs(photograph, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    if theirs.shape[0] != theirs.shape[1]:
        with pytest.raises(InputError, match=r"do_center_crop must be true where the edges may"):
            read(folder)
        return
    arguments = read(folder).preprocessing
    layer = ImagePreprocessing(arguments.pop("image_size"), 3, **arguments)
    ours = keras.ops.convert_to_numpy(layer(np.asarray(photograph)[None]))[0]
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).mean() < 1e-3


def test_scales_of_normalization(edit):
    changed = {"do_rescale": False, "image_mean": [51.0] * 3, "image_std": [102.0] * 3}
    found = read(edit(TINY, "preprocessor_config.json", **changed)).preprocessing
    assert found["mean"] == pytest.approx((0.2,) * 3) and found["std"] == pytest.approx((0.4,) * 3)
    found = read(edit(TINY, "preprocessor_config.json", do_normalize=False)).preprocessing
    assert (found["mean"], found["std"]) == ((0.0,) * 3, (1.0,) * 3)
    folder = edit(TINY, weights=True)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match=r"has no preprocessor_config\.json"):
        from_pretrained(folder)


NOT_OURS = [
    (TIMM, {"architecture": "resnet10t"}, r"architecture must be one of resnet18, .*'resnet10t'"),
    (TIMM, {"architecture": "../x"}, r"not one of our networks: architecture must be one of"),
    (TIMM, {"model_args": {"act_layer": "silu"}}, r"model_args must be of .*'act_layer': 'silu'"),
    (TIMM, {"global_pool": "max", "model_args": {}}, r"global_pool must be avg, got 'max'"),
    (TIMM, {"num_classes": -1}, r"`num_classes` must be a whole number from 0 to 100000"),
    (TIMM, {"pretrained_cfg": {"crop_mode": "border"}}, r"crop_mode must be center or squash"),
    (TIMM, {"pretrained_cfg": {"interpolation": "lanczos"}}, r"interpolation must be bilinear or"),
    (TIMM, {"pretrained_cfg": {"input_size": [3, 224, 192]}}, r"images must be square"),
    (TIMM, {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}}, r"at most 4096 pixels"),
    (
        TIMM,
        {"pretrained_cfg": {"std": [0, 1, 1]}},
        r"`pretrained_cfg\.std` must be 1 to 3 channels",
    ),
    (TIMM, {"pretrained_cfg": {"crop_pct": float("nan")}}, r"`pretrained_cfg\.crop_pct` must be"),
    (TIMM, {"label_names": ["one"]}, r"there must be 1000 class names, got 1"),
    (TINY, {"model_type": "vit"}, r"model_type must be resnet, got 'vit'"),
    (TINY, {"hidden_act": "gelu"}, r"hidden_act must be relu, got 'gelu'"),
    (TINY, {"downsample_in_first_stage": True}, r"downsample_in_first_stage must be False"),
    (TINY, {"embedding_size": 16}, r"embedding_size must be 8, got 16"),
    (TINY, {"depths": [10**6, 1]}, r"`depths` must be 1 to 8 stages, each a whole number from 1"),
    (TINY, {"id2label": {"0": "a", "7": "b"}}, r"classes must be numbered 0 … 1"),
    (TINY, {"id2label": {"0": ["a"]}}, r"a class name must be text"),
]


@pytest.mark.parametrize(("name", "changes", "message"), NOT_OURS)
def test_other_networks_are_refused_before_their_weights_are_read(name, changes, message, edit):
    with pytest.raises(InputError, match=message) as raised:
        read(edit(name, **changes))
    assert len(str(raised.value).splitlines()) == 1


DISAGREE = [
    ({"depths": [1, 2]}, r"block 2 of stage 2 must be \(3, 3, 16, 16\), .* has none"),
    ({"depths": [1], "hidden_sizes": [8]}, r"inputs of the head must be 8, .* has 16"),
    ({"hidden_sizes": [8, 65536]}, r"must be \(3, 3, 65536, 65536\), .* has \(3, 3, 16, 16\)"),
    ({"num_channels": 1}, r"channels must be 1, model\.safetensors has 3"),
    ({"id2label": {"0": "a"}}, r"classes must be 1, model\.safetensors has 4"),
]


@pytest.mark.parametrize(("changes", "message"), DISAGREE)
def test_a_configuration_that_its_tensors_contradict(changes, message, edit):
    with pytest.raises(InputError, match=message):
        from_pretrained(edit(TINY, weights=True, **changes))


def test_a_small_file_states_no_large_network(edit):
    folder = edit(TINY, weights=True, hidden_sizes=[8, 4096])
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (kernel,) = (n for n in tensors if "stages.1.layers.0.layer.1.convolution" in n)
    tensors[kernel] = np.zeros((4096, 1, 1, 1), "float32")
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"\(3, 3, 4096, 4096\), .* has \(1, 1, 1, 4096\)"):
        open_source(folder)
    folder = edit(TINY, weights=True)
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    (kernel,) = (name for name in tensors if "classifier" in name and "weight" in name)
    tensors[kernel] = tensors[kernel][:, :1].copy()
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"inputs of the head must be 16, .* has 1"):
        open_source(folder)


hubs.CARDS = {
    "empty": b"",
    "no text": b"---\nlicense: mit\n---\n\xff",
    "too large": b"---\nlicense: mit\n---\n" + b" " * client.MAX_BYTES,
    "without an end": b"---\nlicense: mit\n",
    # A regular expression would read these for hours.
    "blank lines": b"---" + b"\n" * 2**21 + b"x",
    "spaces": b"---\nlicense: x" + b" " * 2**20 + b"x\n---\n",
    "list": b"---\ndatasets:\n- x" + b" " * 2**20 + b"x\n---\n",
}


@pytest.mark.parametrize("case", hubs.CARDS)
def test_a_network_can_be_used_without_its_card(case, edit):
    folder = edit(TINY)
    (folder / "README.md").write_bytes(hubs.CARDS[case])
    found = read(folder)
    assert (found.license, found.num_classes) == (None, 4)


def test_damaged_files(edit, networks):
    folder = edit(TINY)
    for content in (b"{", b"[" * 100_000, b"[]", b"\xff", b" " * (client.MAX_BYTES + 1)):
        (folder / "preprocessor_config.json").write_bytes(content)
        with pytest.raises(InputError, match=r"preprocessor_config\.json") as raised:
            read(folder)
        assert len(str(raised.value).splitlines()) == 1
    folder = edit(TINY)
    with pytest.raises(InputError, match=r"has no model\.safetensors, the only weights"):
        from_pretrained(folder)
    with pytest.raises(InputError, match=r"weights alone do not state their network"):
        alone = folder.parent / "alone" / "model.safetensors"
        alone.parent.mkdir()
        shutil.copy(networks[0] / TINY / "model.safetensors", alone)
        from_pretrained(alone)


def test_weights_beside_their_configuration_are_the_repository(networks):
    """By their path alone they would be fine-tuned on images of another normalization."""
    folder = networks[0] / TINY
    whole, file = open_source(folder), open_source(folder / "model.safetensors")
    assert file.normalization == whole.normalization is not None
    assert file.configuration == whole.configuration


def odd(value, dice):
    """Returns a JSON value with one part replaced by an odd one, or removed."""
    if isinstance(value, dict) and value and dice.random() < 0.9:
        key = dice.choice([*value])
        if dice.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: odd(value[key], dice)}
    if isinstance(value, list) and value and dice.random() < 0.6:
        index = dice.randrange(len(value))
        return [*value[:index], odd(value[index], dice), *value[index + 1 :]]
    return dice.choice(fuzzing.ODD)


@pytest.mark.parametrize(
    ("name", "file"),
    [(TIMM, "config.json"), (TINY, "config.json"), (TINY, "preprocessor_config.json")],
)
def test_odd_values_are_refused_in_one_line_or_change_nothing_else(name, file, edit):
    folder, refused = edit(name), 0
    original = json.loads((folder / file).read_text())
    for seed in range(200):
        content = odd(original, random.Random(seed))
        (folder / file).write_text(json.dumps(content))
        try:
            found = read(folder) if client.is_repository(folder) else None
        except InputError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 700
            continue
        if found and found.preprocessing:
            assert 1 <= found.preprocessing["image_size"] <= 4096
            assert 0 < found.preprocessing["crop_pct"] <= 1
            assert min(found.preprocessing["std"]) > 0
    assert 50 < refused < 200


# ----------------------------------------------------------------------------------------------
# Where weights and models are named
# ----------------------------------------------------------------------------------------------


def test_builders_take_a_name(hub, networks):
    network = build_resnet18(weights=TIMM)
    assert (network.input_shape, network.output_shape) == ((None, 224, 224, 3), (None, 1000))
    source = open_source(TIMM)
    kernel = network.get_layer("stem_conv").get_weights()[0]
    theirs = networks[1][TIMM].conv1.weight.detach().numpy()
    np.testing.assert_array_equal(kernel, theirs.transpose(2, 3, 1, 0))
    assert source.name_normalization() == "imagenet"
    backbone = build_resnet18((64, 64, 1), weights=TIMM, include_top=False, pooling="avg")
    np.testing.assert_allclose(
        backbone.get_layer("stem_conv").get_weights()[0], kernel.sum(2, keepdims=True), rtol=1e-6
    )
    assert build_resnet18((64, 64, 3), 7, weights=TIMM).output_shape == (None, 7)
    with pytest.raises(InputError, match=r"its weights are of resnet18, got the network resnet50"):
        keras_resnet.build_resnet50(weights=TIMM)


def test_files_by_themselves_are_weights_too(tmp_path):
    spec = Spec((1, 1), (8, 16))
    trained = keras_resnet.build_resnet(spec, (32, 32, 3), 5, variant="torchvision")
    path = tmp_path / "weights.safetensors"
    save_torch_weights(trained, path)
    again = keras_resnet.build_resnet(spec, weights=path)
    assert (again.input_shape, again.output_shape) == ((None, None, None, 3), (None, 5))
    np.testing.assert_array_equal(again.get_weights()[0], trained.get_weights()[0])
    sha256 = client.digest(path)[1]
    assert open_source(f"{path}#sha256={sha256}").sha256 == sha256
    with pytest.raises(InputError, match=r"must have sha256 1111"):
        open_source(path, sha256="1" * 64)
    with pytest.raises(InputError, match=r"`sha256` must be 64 hexadecimal digits, got 'abc'"):
        open_source(path, sha256="abc")


def test_predict_by_name(hub, tmp_path):
    Image.effect_noise((60, 40), 60).convert("RGB").save(tmp_path / "noise.png")
    done = run_main("predict", TIMM, tmp_path / "noise.png", "--json", "--top", 1000)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(done.stdout)
    names = {label["label"] for label in row["labels"]}
    assert names == {name for _, name in imagenet_classes()}
    done = run_main("predict", "me/nothing", tmp_path / "noise.png")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("keras-resnet: me/nothing: neither a file or folder here nor")


def test_convert_by_name(hub, networks, tmp_path):
    done = run_main("convert", TINY, "--out", tmp_path / "tiny.keras", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["model"], found["class_names"], found["license"]) == ("tiny", 4, "mine")
    model = archive.load_model(tmp_path / "tiny.keras")
    check("converted", differences(model, networks[1][TINY]), 1e-5)
    metadata = archive.read_metadata(tmp_path / "tiny.keras")
    assert metadata["class_names"] == list(NAMES) and metadata["origin"]["name"] == TINY
    done = run_main(
        *("convert", TINY, "--out", tmp_path / "bare.keras", "--no-preprocessing"),
        *("--image-size", 32),
    )
    assert done.returncode == 0 and "floats, normalised already, 32×32×3" in done.stdout
    found = convert(TINY, out=tmp_path / "other.keras", normalize="inception", image_size=48)
    assert "raw images, resized to 48×48×3 and normalised inside: inception" in found["input"]
    done = run_main("convert", TINY, "--model", "resnet18", "--out", tmp_path / "no.keras")
    assert done.returncode == 2 and "its weights are of tiny, got the network" in done.stderr


def test_evaluate_by_name(hub, fashion_folder):
    done = run_main("evaluate", TINY, "--dataset", f"folder:{fashion_folder}", "--image-size", 28)
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout


def test_folders_of_imagenet_have_its_ids(hub):
    predictor = load(TIMM)
    images = np.zeros((2, 224, 224, 3), "uint8")
    split = keras_resnet.Split(images, np.arange(2))
    ids = tuple(id for id, _ in imagenet_classes())
    data = keras_resnet.Dataset("imagenet", ids, {"test": split}, "a test", "0")
    assert load_data(predictor, data)[1].images.shape == images.shape
    wrong = dataclasses.replace(data, class_names=ids[::-1])
    with pytest.raises(InputError, match=r"the model knows the classes tench, goldfish"):
        load_data(predictor, wrong)


def test_a_run_adopts_depth_form_and_normalization(hub, tiny):
    settings = TrainConfig(weights=TINY)
    source = find_source(settings)
    settings = adopt_normalization(settings, {"weights": TINY}, source)
    assert (settings.model, settings.normalize) == ("tiny", "imagenet")
    assert adopt_form(RECIPES["quick"], source, settings).variant == "torchvision"
    with pytest.raises(InputError, match=r"its weights are of tiny, got the network resnet18"):
        adopt_normalization(TrainConfig(weights=TINY), {"model": "resnet18"}, source)


@pytest.mark.slow
def test_train_from_a_name(hub, fashion_folder, tmp_path):
    words = ["train", "--weights", TINY, "--dataset", f"folder:{fashion_folder}", "--epochs", 1]
    done = run_main(
        *(*words, "--recipe", "quick", "--run-dir", tmp_path / "run"),
        *("--image-size", 28, "--precision", "float32"),
    )
    assert done.returncode == 0, done.stderr
    assert f"weights: {TINY}: Hugging Face transformers" in done.stdout
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["model"], config["weights"]["variant"]) == ("tiny", "torchvision")
    origin = archive.read_metadata(tmp_path / "run" / "model.keras")["origin"]
    assert (origin["name"], origin["license"]) == (TINY, "mine")


@pytest.mark.slow
def test_export_by_name(hub, fashion_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_main(
        *("export", TINY, "--to", "tflite", "--precision", "float32", "--json"),
        *("--dataset", f"folder:{fashion_folder}", "--image-size", 28),
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["source"]["origin"]["license"] == "mine"
    assert manifest["source"]["path"] == TINY and manifest["class_names"] == list(NAMES)
    predictor = load(tmp_path / "tiny-export" / "model-float32.tflite")
    assert predictor.class_names == NAMES and predictor.metadata["license"] == "mine"


def test_benchmark_names_the_export(hub):
    for name in (TINY, f"me/{300 * 'x'}"):
        done = run_main("benchmark", name)
        assert done.returncode == 2 and f"first `keras-resnet export {name}`" in done.stderr
    assert hub.requests == []


# ----------------------------------------------------------------------------------------------
# The data files
# ----------------------------------------------------------------------------------------------


def test_the_classes_of_imagenet():
    torchvision, timm = references.import_torchvision(), references.import_timm()
    ids, names = zip(*imagenet_classes(), strict=True)
    assert list(names) == torchvision.models._meta._IMAGENET_CATEGORIES
    assert list(ids) == timm.data.ImageNetInfo().label_names()
    assert len(set(names)) == 1000


# The networks without a published one have no name.
NAMED = [row for row in published_networks() if row["name"]]


def test_the_published_networks():
    assert {row["model"] for row in published_networks()} == set(SPECS)
    assert len({row["name"] for row in NAMED}) == len(NAMED)
    done = run_main("models", "resnet200")
    assert done.stdout.split()[-7:] == ["resnet200", *6 * "–"]
    done = run_main("models", "resnet18", "--json")
    assert json.loads(done.stdout) == published_networks("resnet18")
    assert run_main("models", "resnet19").returncode == 2


@pytest.mark.parametrize(
    ("command", "given"),
    [
        ("predict {} photo.png", "resnet18.a1_in1k"),  # no owner
        ("train --weights {}", "resnet18.a1in1k"),
        ("export {}", "timm/resnet18.a1in1k"),
    ],
)
def test_a_name_that_resembles_a_published_one(command, given, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = run_main(*command.format(given).split())
    assert done.returncode == 2
    assert done.stderr.endswith("; did you mean timm/resnet18.a1_in1k?\n")


def test_the_configurations_that_timm_publishes(edit):
    timm, folder = references.import_timm(), edit(TIMM)
    for row in NAMED:
        if not row["name"].startswith("timm/"):
            continue
        cfg = timm.get_pretrained_cfg(row["name"].removeprefix("timm/"))
        content = {"architecture": cfg.architecture, "pretrained_cfg": cfg.to_dict()}
        (folder / "config.json").write_text(json.dumps(content))
        found = read(folder)
        assert (found.model, found.variant) == (row["model"], row["variant"])
        assert found.license == row["license"] and len(found.class_ids) == found.num_classes
        at_test = found.test_preprocessing or {}
        sizes = row["pixels"], row["test_pixels"] or row["pixels"]
        size = found.preprocessing["image_size"]
        assert sizes == (size, at_test.get("image_size", size))
        for used, test in ((found.preprocessing, False), (at_test, True)):
            theirs = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict(), use_test_size=test)
            keys = ("mean", "std", "crop_pct", "interpolation") if used else ()
            assert {key: used[key] for key in keys} == {key: theirs[key] for key in keys}


OF_TIMM = {(r["model"], r["variant"]): r["name"] for r in NAMED if r["name"].startswith("timm/")}
OF_TRANSFORMERS = [row["model"] for row in NAMED if row["name"].startswith("microsoft/")]


# In `make test`: one of each form of the tables.
FAST_OF_TIMM = ("resnet18", "resnext50_32x4d", "wide_resnet50_2", "seresnet50", "resnet50d")
EVERY_OF_TIMM = [
    pytest.param(name, marks=() if model in FAST_OF_TIMM else pytest.mark.slow)
    for (model, _), name in OF_TIMM.items()
]


@pytest.mark.parametrize("name", EVERY_OF_TIMM)
def test_every_network_that_timm_publishes(name, tmp_path):
    network = hubs.write_timm(tmp_path, name)
    ours = from_pretrained(tmp_path / name, image_size=96)
    check(name, differences(ours, network), 1e-4)
    keras.backend.clear_session()


@pytest.mark.slow
@pytest.mark.parametrize("model", OF_TRANSFORMERS)
def test_every_network_that_transformers_publishes(model, tmp_path):
    network = references.randomize(references.huggingface_model(model), 0).eval()
    network.save_pretrained(tmp_path / "repository")
    processor = references.import_transformers().ConvNextImageProcessorPil
    processor(size={"shortest_edge": 96}).save_pretrained(tmp_path / "repository")
    ours = from_pretrained(tmp_path / "repository")
    check(model, differences(ours, network), 1e-4)
    keras.backend.clear_session()
