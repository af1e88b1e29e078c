import os
import subprocess
import sys

import pytest
from PIL import Image

from keras_resnet.datasets import load_dataset
from keras_resnet.utils.errors import InputError


@pytest.mark.parametrize(
    "name",
    ["imagenet", "", "folder", "folder:", "tfds:", "fashion_mnist:", "fashion_mnist:x", "x:y"],
)
def test_the_error_for_unknown_names_lists_the_three_forms(name):
    with pytest.raises(InputError) as caught:
        load_dataset(name)
    assert str(caught.value) == (
        f"a data set is named fashion_mnist, folder:PATH or tfds:NAME, got {name!r}"
    )


def test_a_path_may_hold_colons(tmp_path):
    for name in "ab":
        (tmp_path / "x:y" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (3, 3)).save(tmp_path / "x:y" / name / f"{i}.png")
    assert load_dataset(f"folder:{tmp_path}/x:y").class_names == ("a", "b")


def test_idx_files_and_folders_are_read_without_tensorflow(idx_folder, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(2):
            Image.new("L", (3, 3)).save(tmp_path / name / f"{i}.png")
    code = f"""
import sys
from keras_resnet.datasets import load_dataset
load_dataset(data_dir={str(idx_folder)!r})
load_dataset("folder:{tmp_path}").splits["train"].images[[0, 1]]
print([name for name in ("tensorflow", "tensorflow_datasets") if name in sys.modules])
"""
    # With the TensorFlow backend importing Keras is enough to import TensorFlow.
    environment = {**os.environ, "KERAS_BACKEND": "torch", "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert answer.stdout == "[]\n"
