"""Fixtures that more than one test module uses."""

import pytest

from keras_resnet.datasets import fashion_mnist


@pytest.fixture(scope="session")
def idx_folder():
    """Debian's folder with the four real Fashion-MNIST files."""
    if not fashion_mnist.DEBIAN_FOLDER.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    return fashion_mnist.DEBIAN_FOLDER
