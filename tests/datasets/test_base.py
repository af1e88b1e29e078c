import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_resnet.datasets.base import stratified_split
from keras_resnet.utils.errors import InputError


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=80).filter(
        lambda labels: max(np.bincount(labels)) > 1
    ),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_parts_are_disjoint_whole_and_stratified(labels, share, seed):
    train, validation = stratified_split(labels, share, seed)
    assert sorted([*train, *validation]) == list(range(len(labels)))
    assert (np.diff(train) > 0).all()
    assert (np.diff(validation) > 0).all()
    labels = np.array(labels)
    for label, count in enumerate(np.bincount(labels)):
        taken = (labels[validation] == label).sum()
        if count == 1:
            assert taken == 0
        elif count:
            assert 1 <= taken <= count - 1
            assert abs(taken - share * count) <= 1
    again = stratified_split(labels, share, seed)
    np.testing.assert_array_equal(again[1], validation)


def test_the_seed_chooses():
    labels = np.repeat([0, 1], 50)
    first, second = (stratified_split(labels, 0.2, seed)[1] for seed in (0, 1))
    assert first.tolist() != second.tolist()


def test_a_class_is_drawn_by_itself():
    before = stratified_split([0] * 30 + [1] * 30, 0.2, 0)[1]
    after = stratified_split([0] * 30 + [1] * 47, 0.2, 0)[1]
    assert before[before < 30].tolist() == after[after < 30].tolist()


@pytest.mark.parametrize("share", [0, 1, -0.5, float("nan")])
def test_fraction_out_of_range(share):
    with pytest.raises(InputError, match=f"above 0 and below 1, got {share}"):
        stratified_split([0, 0, 1, 1], share, 0)


def test_no_class_has_two_images():
    with pytest.raises(InputError, match="at least 2 images"):
        stratified_split([0, 1, 2], 0.5, 0)


def test_a_set_that_is_not_trained_on_is_whole():
    for part in stratified_split([0, 1, 1], None, 0):
        assert part.tolist() == [0, 1, 2]
