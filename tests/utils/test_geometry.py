import pytest

from keras_resnet.utils.errors import InputError
from keras_resnet.utils.geometry import find_crop_pct, resized_length


def test_every_pair_of_lengths_has_a_crop_pct():
    """The float that is their quotient gives another length in some cases."""
    pairs = [(size, length) for size in range(1, 600, 7) for length in range(size, 2 * size, 3)]
    quotients = [resized_length(size, size / length) == length for size, length in pairs]
    assert False in quotients
    for size, length in pairs:
        crop_pct = find_crop_pct(size, length)
        assert crop_pct <= 1
        assert resized_length(size, crop_pct) == length
    with pytest.raises(InputError, match=r"`resize_size` must be at least .* 224, got 200"):
        find_crop_pct(224, 200)
