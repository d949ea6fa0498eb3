"""The choice of two in four: equal to trying all six patterns, exact in every dtype, blind to layout."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from twofour.errors import InputError
from twofour.pattern import count_groups, select

PATTERNS = list(itertools.combinations(range(4), 2))


def best_of_six(group: np.ndarray) -> set[int]:
    magnitudes = np.abs(group.astype(np.float64))
    # max() keeps the first of equals, and PATTERNS runs from the lower indices up.
    return set(max(PATTERNS, key=lambda p: magnitudes[list(p)].sum()))


@given(hnp.arrays(np.float32, (3, 8), elements=st.floats(-4, 4, width=16)))
def test_select_keeps_the_best_of_the_six_patterns(weight: np.ndarray) -> None:
    mask = select(weight)
    for row, mask_row in zip(weight, mask, strict=True):
        for g in range(2):
            kept = set(np.flatnonzero(mask_row[4 * g : 4 * g + 4]))
            assert kept == best_of_six(row[4 * g : 4 * g + 4])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(8, 16), (8, 16, 3), (4, 8, 3, 3), (2, 4, 2, 2, 2)])
def test_groups_run_along_the_input_channels_at_each_kernel_position(dtype: type, shape: tuple[int, ...]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    mask = select(weight)
    assert mask.shape == shape
    sums = mask.reshape(shape[0], shape[1] // 4, 4, *shape[2:]).sum(axis=2)
    assert (sums == 2).all()
    assert count_groups(np.where(mask, weight, 0)).is_24


def test_ties_keep_the_lower_index_and_zero_equals_minus_zero() -> None:
    weight = np.array([[1.0, -1.0, 1.0, 1.0, -0.0, 0.0, 0.0, 5.0]], np.float32)
    assert select(weight).tolist() == [[True, True, False, False, True, False, False, True]]


def test_count_groups_counts_violations() -> None:
    weight = np.array([[1, 2, 3, 0, 1, 0, 0, 2.0]], np.float32)
    count = count_groups(weight)
    assert (count.obeying, count.total, count.is_24) == (1, 2, False)


def test_an_axis_that_is_not_a_multiple_of_four_is_an_error() -> None:
    with pytest.raises(InputError, match=r"shape \[2, 6\] has no axis 1 of a multiple of 4"):
        select(np.ones((2, 6), np.float32))
