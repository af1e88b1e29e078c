import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from keras_resnet.datasets import load_dataset
from keras_resnet.datasets.images import ImageFiles
from keras_resnet.datasets.photos import load_photos
from keras_resnet.utils.errors import InputError

COLOURS = {"bag": (250, 0, 0), "coat": (0, 250, 0), "ärmel": (0, 0, 250)}


@pytest.fixture
def folder(tmp_path):
    """Three classes of 10 images, 8×6, each nearly the colour of its class."""
    root = tmp_path / "pictures"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(10):
            shade = tuple(max(value - i, 0) for value in colour)
            Image.new("RGB", (8, 6), shade).save(root / name / f"{i}.png")
    return root


def load(folder, **options):
    return load_dataset(f"folder:{folder}", **options)


def error_of(folder, **options):
    with pytest.raises(InputError) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_classes_splits_and_pixels(folder):
    (folder / ".cache").mkdir()
    (folder / "bag" / ".DS_Store").write_bytes(b"hidden")
    (folder / "README.txt").write_text("beside the classes")
    dataset = load(folder, validation_split=0.2)
    assert dataset.class_names == ("bag", "coat", "ärmel")
    assert dataset.name == f"folder:{folder}"
    assert dataset.source == f"image folder {folder}: 30 images, 3 classes"
    assert dataset.evaluation_split == "validation"
    assert dataset.image_shape == (6, 8, 3)
    assert {name: len(split) for name, split in dataset.splits.items()} == {
        "train": 24,
        "validation": 6,
    }
    for split in dataset.splits.values():
        assert isinstance(split.images, ImageFiles)
        images, labels = next(split.batches(batch_size=100))
        # The brightest channel of an image tells its class.
        np.testing.assert_array_equal(images[:, 0, 0].argmax(axis=1), labels)
        assert labels.dtype == np.int64


def test_validation_images_are_a_function_of_the_seed(folder):
    def chosen(**options):
        return [path.name for path in load(folder, **options).splits["validation"].images.sources]

    assert chosen() == chosen()
    assert chosen(validation_split=0.5, seed=1) != chosen(validation_split=0.5)
    parts = load(folder).splits
    assert not set(parts["train"].images.sources) & set(parts["validation"].images.sources)


def test_fingerprint_is_of_names_and_contents(folder, tmp_path):
    before = load(folder).fingerprint
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    assert load(moved, seed=3, image_size=4, channels=1).fingerprint == before
    (moved / "bag" / "0.png").rename(moved / "bag" / "renamed.png")
    renamed = load(moved).fingerprint
    assert renamed != before
    Image.new("RGB", (8, 6), "white").save(moved / "bag" / "renamed.png")
    assert load(moved).fingerprint not in {before, renamed}


def test_grey_images_have_one_channel(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i, mode in enumerate(("L", "1", "LA", "I;16")):
            Image.new(mode, (4, 4)).save(tmp_path / name / f"{i}.png")
    assert load(tmp_path).image_shape == (4, 4, 1)
    assert load(tmp_path, channels=3).image_shape == (4, 4, 3)
    Image.new("RGB", (4, 4)).save(tmp_path / "a" / "colour.png")
    assert load(tmp_path).image_shape == (4, 4, 3)
    assert load(tmp_path, channels=1).image_shape == (4, 4, 1)


def test_sizes_that_differ_need_one(folder):
    Image.new("RGB", (20, 10)).save(folder / "coat" / "other.bmp")
    message = error_of(folder)
    assert "2 sizes" in message
    assert "0.png is 8×6" in message
    assert "other.bmp is 20×10" in message
    assert "--image-size" in message
    dataset = load(folder, image_size=(5, 7))
    assert dataset.image_shape == (5, 7, 3)
    assert dataset.splits["train"].images[np.arange(3)].shape == (3, 5, 7, 3)


@pytest.mark.parametrize(
    ("image_size", "shape"),
    [(None, (6, 8, 3)), (8, (6, 8, 3)), (7, (7, 7, 3)), ((6, 8), (6, 8, 3)), ((5, 8), (5, 8, 3))],
)
def test_images_of_one_size_are_only_made_smaller(folder, image_size, shape):
    assert load(folder, image_size=image_size).image_shape == shape


def png_header(width, height):
    def chunk(kind, data):
        sum_ = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", sum_)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def spoil(folder):
    """Adds one unreadable file of each kind; returns their names and the reasons given."""
    Image.effect_noise((90, 90), 50).save(folder / "bag" / "cut.jpg")
    whole = (folder / "bag" / "cut.jpg").read_bytes()
    (folder / "bag" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "bag" / "empty.png").touch()
    (folder / "bag" / "0001").write_text("cut short")
    # Between Pillow's limit, where it only warns, and twice the limit, where it refuses.
    (folder / "coat" / "large.png").write_bytes(png_header(10_000, 10_000))
    (folder / "coat" / "bomb.png").write_bytes(png_header(60_000, 60_000))
    (folder / "coat" / "link.png").symlink_to("nowhere.png")
    Image.new("LAB", (8, 6)).save(folder / "coat" / "lab.tif")
    os.mkfifo(folder / "coat" / "pipe.png")
    return {
        "bag/cut.jpg": "runcated",
        "bag/empty.png": "not an image",
        "bag/0001": "not an image",
        "coat/large.png": "10000×10000 pixels",
        "coat/bomb.png": "3600000000 pixels",
        "coat/link.png": "not a regular file",
        "coat/lab.tif": "mode LAB",
        "coat/pipe.png": "not a regular file",
    }


@pytest.mark.filterwarnings("error")
def test_unreadable_files_are_all_named(folder):
    spoiled = spoil(folder)
    message = error_of(folder)
    assert f"{len(spoiled)} files that cannot be read" in message
    assert "--skip-bad" in message
    for name, reason in spoiled.items():
        assert name in message
        assert reason in message.partition(name)[2].partition(")")[0]


def test_photographs_that_pillow_does_not_read_stop_the_run(folder):
    (folder / "bag" / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    message = error_of(folder)
    assert "1 file that cannot be read as an image: bag/IMG_1.HEIC (not an image)" in message


def test_files_beside_the_images_are_left_out(folder):
    clean = load(folder)
    (folder / "bag" / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")
    (folder / "coat" / "notes.txt").write_text("about the images")
    dataset = load(folder)
    (remark,) = set(dataset.remarks) - set(clean.remarks)
    assert (
        remark.startswith("files beside the images are not used: 2") and "bag/Thumbs.db" in remark
    )
    assert dataset.fingerprint == clean.fingerprint and dataset.source == clean.source
    # An image by its content counts, whatever its suffix.
    first = next((folder / "bag").glob("*.png"))
    first.rename(first.with_suffix(".txt"))
    assert sum(map(len, load(folder).splits.values())) == 30
    # In a CSV each file was meant.
    (folder / "list.csv").write_text("file,label\nbag/Thumbs.db,a\ncoat/notes.txt,b\n")
    with pytest.raises(InputError, match="2 files that cannot be read"):
        load(folder / "list.csv")


def test_unreadable_files_can_be_skipped(folder):
    clean = load(folder)
    spoiled = spoil(folder)
    dataset = load(folder, skip_bad=True)
    assert f"30 images, 3 classes, skipped {len(spoiled)} files" in dataset.source
    assert all(name in dataset.source for name in spoiled)
    assert dataset.fingerprint == clean.fingerprint
    assert sum(map(len, dataset.splits.values())) == 30


def test_ten_unreadable_files_are_listed(folder):
    for i in range(13):
        (folder / "bag" / f"note{i:02}.png").write_text("no")
    message = error_of(folder)
    assert "13 files that cannot be read" in message
    assert "note09.png" in message
    assert "note10.png" not in message
    assert "and 3 more" in message


def test_a_class_that_skipping_leaves_too_small(folder):
    for i in range(1, 10):
        (folder / "coat" / f"{i}.png").write_bytes(b"spoiled")
    message = error_of(folder, skip_bad=True)
    assert "class coat: needs at least 2 readable images, one to train and one to" in message
    assert "found 1" in message


def test_missing_and_empty_folders(tmp_path):
    assert "nowhere: the folder cannot be read: No such file" in error_of(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "Not a directory" in error_of(tmp_path / "file")
    assert "at least 2, found 0" in error_of(tmp_path)
    (tmp_path / "one").mkdir()
    assert "at least 2, found 1" in error_of(tmp_path)
    (tmp_path / "two").mkdir()
    assert "one: the class folder is empty" in error_of(tmp_path)


def make_splits(root, names, classes=("bag", "coat"), count=4):
    """Writes `count` images of each class into each of the folders `names` of `root`."""
    for number, name in enumerate(names):
        for label, class_name in enumerate(classes):
            folder = root / name / class_name
            folder.mkdir(parents=True)
            for i in range(count):
                colour = (200 * label, 50 * number, i)
                Image.new("RGB", (8, 6), colour).save(folder / f"{i}.png")
    return root


def sizes(dataset):
    return {name: len(split) for name, split in dataset.splits.items()}


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_split_folders_are_splits(tmp_path, name):
    root = make_splits(tmp_path, ["train", name, "test"])
    dataset = load(root)
    assert sizes(dataset) == {"train": 8, "validation": 8, "test": 8}
    assert (dataset.selection_split, dataset.evaluation_split) == ("validation", "test")
    assert dataset.class_names == ("bag", "coat")
    assert "24 images (train 8, validation 8, test 8), 2 classes" in dataset.source
    assert not dataset.remarks
    for split, folder in {"train": "train", "validation": name, "test": "test"}.items():
        images = dataset.splits[split].images
        assert {path.parts[-3] for path in images.sources} == {folder}
        np.testing.assert_array_equal(images[:][:, 0, 0, 0] // 200, dataset.splits[split].labels)


def test_without_a_validation_folder_training_images_are_held_out(tmp_path):
    root = make_splits(tmp_path, ["training_set", "Testing"])
    dataset = load(root, validation_split=0.25)
    assert sizes(dataset) == {"train": 6, "validation": 2, "test": 8}
    held = dataset.splits["validation"].images.sources
    assert {path.parts[-3] for path in held} == {"training_set"}
    # A set that is not trained on: its test images are measured.
    assert sizes(load(root, validation_split=None)) == {"train": 8, "test": 8}
    shutil.rmtree(root / "Testing")
    assert sizes(load(root)) == {"train": 6, "validation": 2}
    assert sizes(load(root, validation_split=None)) == {"train": 8, "validation": 8}


def test_without_a_test_folder_validation_is_the_evaluation(tmp_path):
    dataset = load(make_splits(tmp_path, ["train", "val"]))
    assert sizes(dataset) == {"train": 8, "validation": 8}
    assert dataset.selection_split == dataset.evaluation_split == "validation"


def test_classes_must_be_those_of_the_training_images(tmp_path):
    root = make_splits(tmp_path, ["train", "val"])
    (root / "val" / "coat").rename(root / "val" / "Coat")
    message = error_of(root)
    assert "val: the class folders must be among those of train, found also Coat" in message
    shutil.rmtree(root / "val" / "Coat")
    dataset = load(root)
    assert dataset.splits["validation"].labels.tolist() == [0] * 4
    assert dataset.remarks == ("val has no images of coat",)


def test_a_folder_in_a_class_is_refused(tmp_path):
    message = error_of(make_splits(tmp_path, ["first", "second"]))
    assert (
        "bag: a class folder must hold images only, found a folder; if first is a part" in message
    )
    assert "name the parts train, val and test" in message


def test_what_is_not_used_is_said(tmp_path):
    root = make_splits(tmp_path, ["train"])
    (root / "test").mkdir()
    Image.new("RGB", (8, 6)).save(root / "test" / "unlabelled.png")
    (root / "annotations").mkdir()
    (root / "__MACOSX").mkdir()
    dataset = load(root)
    assert set(dataset.splits) == {"train", "validation"}
    assert dataset.remarks == (
        "test is not used: it has no class folders, so no labels",
        "beside train, not used: annotations",
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["val", "test"], "holds test and val, and train must be there"),
        (["train", "val", "valid"], "may hold the validation images, found val and valid"),
    ],
)
def test_splits_that_are_missing_or_double(tmp_path, names, message):
    assert message in error_of(make_splits(tmp_path, names))


def test_a_class_may_have_the_name_of_a_split(tmp_path):
    root = make_splits(tmp_path, [""], classes=("bus", "train"))
    assert load(root).class_names == ("bus", "train")
    # A folder of images and nothing else is neither.
    shutil.rmtree(root / "bus")
    assert "train must be there with one sub-folder for each class; or list" in error_of(root)


def test_copies_between_splits_and_classes_are_said(tmp_path):
    root = make_splits(tmp_path, ["train", "val"])
    for place in ("val/bag/copy.png", "val/bag/again.png", "train/coat/copy.png"):
        shutil.copyfile(root / "train" / "bag" / "0.png", root / place)
    mixed, copies = load(root).remarks
    assert mixed.startswith("1 images are in several classes") and "in bag and coat" in mixed
    assert copies.startswith("2 of the 10 validation images are copies of training images")


def test_links_to_folders_and_files_are_followed(folder, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "bag").symlink_to(folder / "bag")
    (linked / "coat").mkdir()
    for path in (folder / "coat").iterdir():
        (linked / "coat" / path.name).symlink_to(path)
    (tmp_path / "alias").symlink_to(linked)
    dataset = load(tmp_path / "alias")
    assert sizes(dataset) == {"train": 18, "validation": 2}
    assert dataset.class_names == ("bag", "coat")


@pytest.mark.parametrize(
    "head", ["", "file,label\n", "\ufeffID;Image;Class\n", "label\tfilename\n"]
)
def test_a_csv_of_file_and_label(folder, tmp_path, head):
    (tmp_path / "all").mkdir()
    rows = []
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.rename(tmp_path / "all" / f"{number}.png")
        cells = [f"all/{number}.png", path.parent.name]
        if ";" in head:
            cells = [str(number), *cells]
        rows.append(
            (";" if ";" in head else "," if "\t" not in head else "\t").join(
                cells[::-1] if "\t" in head else cells
            )
        )
    (tmp_path / "labels.csv").write_text(head + "\n".join(rows) + "\n\n", encoding="utf-8")
    shutil.rmtree(folder)
    for path in (tmp_path, tmp_path / "labels.csv"):
        dataset = load(path, validation_split=0.2)
        assert dataset.class_names == ("bag", "coat", "ärmel")
        assert sizes(dataset) == {"train": 24, "validation": 6}
        split = dataset.splits["train"]
        np.testing.assert_array_equal(split.images[:][:, 0, 0].argmax(axis=1), split.labels)


def test_a_csv_for_each_split(folder):
    (folder / "train.csv").write_text("bag/0.png,bag\ncoat/0.png,coat\nbag/1.png,bag\n")
    (folder / "val.csv").write_text("bag/2.png,bag\n")
    (folder / "test.csv").write_text("coat/2.png,coat\n")
    shutil.rmtree(folder / "ärmel")
    # Class folders come first; here they are none, since one is gone.
    for name in ("bag", "coat"):
        (folder / name).rename(folder / f".{name}")
    for path in folder.glob("*.csv"):
        path.write_text("".join(f".{line}\n" for line in path.read_text().splitlines()))
    dataset = load(folder)
    assert sizes(dataset) == {"train": 3, "validation": 1, "test": 1}
    before = dataset.fingerprint
    (folder / "val.csv").write_text(".bag/2.png,coat\n")
    assert load(folder).fingerprint != before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.png,x\nb.png,y\na.png,x\n", "line 3: a.png is listed already: "),
        ("a.png,x\n./a.png,y\n", "line 2: ./a.png is listed already"),
        ("a.png,x\nb.png\n", "line 2: must have a file and a label, got b.png"),
        ("a.png,x,1\nb.png,y,2\n", "a CSV of 3 columns needs a header with file and label"),
        ("a.png,x\nb.png,x\n", "must list images of at least 2 labels, found 1"),
        ("a.png,x\nb.png,y\u202e\n", "line 2: a class name must be printable"),
        ("a.png,x\nc.png,y\n", "c.png (no such file)"),
        ("", "must list images of at least 2 labels, found 0"),
    ],
)
def test_a_csv_with_mistakes(tmp_path, text, message):
    for name in ("a", "b"):
        Image.new("RGB", (8, 6)).save(tmp_path / f"{name}.png")
    (tmp_path / "labels.csv").write_text(text)
    assert message in error_of(tmp_path)


def test_several_csvs_must_be_chosen_from(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.csv").touch()
    assert "holds 2 CSV files; name the one" in error_of(tmp_path)


def test_proportions_are_kept_and_images_not_enlarged(folder):
    dataset = load(folder, image_size=4, resize="shorter_edge")
    assert dataset.image_shape == (4, 4, 3)
    # At most the median shorter edge, 6.
    assert load(folder, image_size=100, resize="shorter_edge").image_shape == (6, 6, 3)


@pytest.mark.parametrize("name", [300 * "a", 300 * "a" + ".csv"])
def test_a_name_that_is_too_long(tmp_path, name):
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        load_dataset(f"folder:{tmp_path / name}")
    with pytest.raises(InputError, match="cannot be read"):
        load_photos(tmp_path / name, ["a", "b"])


def test_names_that_are_not_utf8(folder):
    name = os.fsdecode(b"caf\xe9.png")
    (folder / "bag" / name).write_text("no")
    assert "caf\ufffd.png" in error_of(folder)
    (folder / os.fsdecode(b"caf\xe9")).mkdir()
    assert "must be printable UTF-8" in error_of(folder)


@pytest.mark.parametrize(
    "options",
    [{"channels": 2}, {"image_size": 0}, {"validation_split": 0}, {"validation_split": 1}],
)
def test_bad_options(folder, options):
    assert next(iter(options)) in error_of(folder, **options)


@pytest.mark.parametrize(
    "name", ["نیم\u200cفاصله", "全角\u3000空白", "👩\u200d🌾", "नमस्ते", "\U0001fae8"]
)
def test_class_names_of_every_script(folder, name):
    (folder / "bag").rename(folder / name)
    assert name in load(folder).class_names


@pytest.mark.parametrize(
    "name", ["a\nb", "a\x1b[31m", "a\x85b", "a\u2028b", "a\u202eb", "a\u2066b"]
)
def test_control_characters_in_class_names_are_refused(folder, name):
    (folder / "bag").rename(folder / name)
    assert "must be printable UTF-8" in error_of(folder)


def test_a_folder_that_is_not_trained_on_is_whole(folder):
    for path in list((folder / "coat").iterdir())[1:]:
        path.unlink()
    for path in (folder / "bag").iterdir():
        path.unlink()
    dataset = load(folder, validation_split=None)
    assert dataset.class_names == ("bag", "coat", "ärmel")
    assert dataset.evaluation_split == "validation"
    for split in dataset.splits.values():
        assert split.labels.tolist() == [1] + 10 * [2]
    for name in ("coat", "ärmel"):
        for path in (folder / name).iterdir():
            path.unlink()
    assert "hold no readable image" in error_of(folder, validation_split=None)


def test_images_can_keep_their_own_sizes(folder):
    assert load(folder, image_size=(None, None)).image_shape == (6, 8, 3)
    Image.new("RGB", (20, 10)).save(folder / "coat" / "other.bmp")
    assert load(folder, image_size=(None, None)).image_shape == (None, None, 3)
    assert load(folder, image_size=(None, 4)).image_shape == (None, 4, 3)


def test_floats_that_cannot_be_scaled_are_named_when_the_folder_is_read(folder):
    Image.fromarray(np.float32([[-1, 1]])).save(folder / "coat" / "normal.tiff")
    message = error_of(folder)
    assert "coat/normal.tiff (floats from -1 to 1: must lie in 0…1" in message
    assert len(load(folder, skip_bad=True).splits["train"]) == 27
