"""N:M and transposable masks against trying everything; compiled loops against passes; both without numba and without torch."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from twofour.errors import InputError
from twofour.pattern import Pattern, count_groups, select, select_transposable
from twofour.pattern import mask as mask_module
from twofour.pattern import transposable as transposable_module
from twofour.pattern.mask import select_by_passes
from twofour.pattern.transposable import TILES


@given(
    hnp.arrays(np.float32, (2, 8), elements=st.floats(-4, 4, width=16)),
    st.sampled_from([(1, 2), (1, 4), (2, 4), (3, 4), (2, 8), (4, 8)]),
)
def test_n_of_m_keeps_the_best_subset_and_the_first_of_equals(weight: np.ndarray, nm: tuple[int, int]) -> None:
    n, m = nm
    mask = select(weight, 1, n, m)
    magnitude = np.abs(weight.astype(np.float64))
    for row in range(2):
        for start in range(0, 8, m):
            group = magnitude[row, start : start + m]
            best = max(itertools.combinations(range(m), n), key=lambda kept: group[list(kept)].sum())
            assert tuple(np.flatnonzero(mask[row, start : start + m])) == best
    assert count_groups(np.where(mask, weight, 0), 1, n, m).is_24


# inner 1 takes the word loop, 9 the plane loop, 4:8 the general one; the last shape leaves an odd number of groups to two threads.
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
@pytest.mark.parametrize(
    ("shape", "axis", "n", "m"), [((512, 2052), 1, 2, 4), ((512, 228, 3, 3), 1, 2, 4), ((512, 2056), 1, 4, 8), ((2052, 515), 0, 2, 4)]
)
def test_compiled_loops_choose_what_passes_choose(dtype: type, shape: tuple[int, ...], axis: int, n: int, m: int) -> None:
    rng = np.random.default_rng(0)
    # 16 distinct magnitudes with random signs: most groups hold ties.
    bits = rng.integers(0, 16, shape, dtype=dtype) | (rng.integers(0, 2, shape, dtype=dtype) << dtype(8 * np.dtype(dtype).itemsize - 1))
    assert bits.size >= mask_module.COMPILED_FROM
    assert mask_module.compiled_loops() is not None
    np.testing.assert_array_equal(select(bits, axis, n, m), select_by_passes(bits, axis, n, m))


def test_there_are_ninety_tiles_with_two_in_every_row_and_column() -> None:
    assert TILES.shape == (90, 4, 4)
    assert len({tile.tobytes() for tile in TILES}) == 90
    assert (TILES.sum(axis=1) == 2).all()
    assert (TILES.sum(axis=2) == 2).all()


@given(hnp.arrays(np.float16, (4, 8), elements=st.floats(-4, 4, width=16)))
def test_transposable_is_the_best_of_ninety(weight: np.ndarray) -> None:
    mask = select_transposable(weight)
    magnitude = np.abs(weight.astype(np.float64))
    for start in (0, 4):
        tile, kept = magnitude[:, start : start + 4], mask[:, start : start + 4]
        assert (kept.sum(axis=0) == 2).all()
        assert (kept.sum(axis=1) == 2).all()
        assert (tile * kept).sum() == max((tile * candidate).sum() for candidate in TILES)


@pytest.mark.parametrize("shape", [(1024, 1024), (128, 128, 3, 3), (64, 32, 33, 4, 4)])
def test_transposable_compiled_equals_passes_at_every_kernel_position(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    monkeypatch.setattr(transposable_module, "loops_for", lambda size: mask_module.compiled_loops())
    compiled = select_transposable(weight)
    monkeypatch.setattr(transposable_module, "loops_for", lambda size: None)
    np.testing.assert_array_equal(compiled, select_transposable(weight))
    assert count_groups(np.where(compiled, weight, 0), 0).is_24
    assert count_groups(np.where(compiled, weight, 0), 1).is_24


def test_transposable_of_nothing_is_nothing_and_a_ragged_axis_is_an_error() -> None:
    assert select_transposable(np.zeros((4, 0), np.float32)).shape == (4, 0)
    with pytest.raises(InputError, match=r"shape \[6, 4\] cannot be transposable 2:4, expected axes 0 and 1 to be multiples of 4"):
        select_transposable(np.ones((6, 4), np.float32))


def test_patterns_are_parsed_and_refused_by_name() -> None:
    assert Pattern.parse("4:8") == Pattern(4, 8)
    assert str(Pattern.parse("2:4 transposable")) == "2:4 transposable"
    assert [Pattern.parse(p).is_24 for p in ("2:4", "1:4", "2:4 transposable", "4:8", "3:4")] == [True, True, True, False, False]
    for wrong in ("4:4", "0:4", "two:four", "4:8 transposable", "2:4 "):
        with pytest.raises(InputError, match="expected N:M with 0 < N < M such as '2:4' or '4:8', or '2:4 transposable'"):
            Pattern.parse(wrong)
    assert Pattern(4, 8).why_not((8, 12)) == "12 input channels are not a multiple of 8"
    assert Pattern(transposable=True).why_not((6, 8)) == "6 output channels are not a multiple of 4"
    with pytest.raises(InputError, match="pattern 4:4 keeps 4 of 4, expected 0 < n < m"):
        select(np.ones((4, 4), np.float32), 1, 4, 4)


WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
sys.modules["torch"] = None
import numpy as np
from twofour.pattern import select, select_transposable, mask
weight = np.random.default_rng(0).standard_normal((512, 2048)).astype(np.float32)
assert mask.compiled_loops() is None
assert (select(weight).reshape(-1, 4).sum(axis=1) == 2).all()
assert (select_transposable(weight).reshape(-1, 4).sum(axis=1) == 2).all()
"""


def test_masks_need_neither_numba_nor_torch() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_NUMBA], check=True)


def test_small_weights_do_not_load_the_compiler() -> None:
    code = "import sys, numpy; from twofour.pattern import select; select(numpy.ones((64, 64))); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
