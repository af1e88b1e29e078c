"""Photographs without labels."""

import warnings

import numpy as np
import pytest
from PIL import Image

from keras_resnet import InputError
from keras_resnet.datasets.photos import load_photos

NAMES = ("cat", "dog")


@pytest.fixture
def folder(tmp_path):
    for name, size in (("b.PNG", (6, 4)), ("deep/a.jpg", (3, 9)), ("c.bmp", (5, 5))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", size, "red").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no photograph")
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "deep" / ".thumbnails").mkdir()
    (tmp_path / "deep" / ".thumbnails" / "a.png").write_bytes(b"")
    return tmp_path


def sizes(data):
    images = data.splits["validation"].images
    return [images[index].shape for index in range(len(images))]


def test_a_folder_is_searched_and_each_image_keeps_its_size(folder):
    data = load_photos(folder, NAMES)
    assert sizes(data) == [(4, 6, 3), (5, 5, 3), (9, 3, 3)]
    assert not data.is_labelled and data.class_names == NAMES
    assert data.source.startswith("3 photographs in ")


def test_a_large_photograph_is_refused_without_a_warning(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"a\.jpg: cannot be read: 3×9 pixels$"):
            load_photos(folder / "deep", NAMES)


def test_files_and_folders_can_be_named_together_and_twice(folder):
    paths = [folder / "deep", folder / "c.bmp", folder / "deep" / "a.jpg"]
    assert sizes(load_photos(paths, NAMES)) == [(5, 5, 3), (9, 3, 3)]


def test_one_size_and_grey_are_possible(folder):
    data = load_photos(folder, NAMES, image_size=(8, 8), channels=1)
    assert data.splits["train"].images[np.arange(3)].shape == (3, 8, 8, 1)


def test_the_fingerprint_is_that_of_the_contents(folder):
    before = load_photos(folder, NAMES).fingerprint
    (folder / "c.bmp").rename(folder / "d.bmp")
    assert load_photos(folder, NAMES).fingerprint == before
    Image.new("RGB", (5, 5), "blue").save(folder / "d.bmp")
    assert load_photos(folder, NAMES).fingerprint != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.png", None, "missing.png: no such image file"),
        (f"{'x' * 300}.png", None, "cannot be read: .*name too long"),
        ("broken.png", b"no image", "broken.png: cannot be read: not an image"),
        ("empty", "folder", "empty: holds no photographs"),
    ],
)
def test_bad_paths_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_photos([path], NAMES)
    assert "\n" not in str(caught.value)
