"""Which weights of every group are kept, two of four above all, and whether a weight already obeys.

Magnitudes are compared as the integers of their bit patterns with the sign cleared. For IEEE formats and the two fp8 formats that order
is the order of the absolute values, so the choice is exact in every dtype and bit-equal on every device: no sum is ever rounded.
"""

import logging
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError

Array = npt.NDArray[Any]
log = logging.getLogger(__name__)

# Below this many elements NumPy is done before the compiled loops are loaded; once they are, they pay from fewer on.
COMPILED_FROM = 1 << 20
LOADED_FROM = 1 << 16


@dataclass(frozen=True)
class GroupCount:
    """How many groups along the reduction axis hold at most n non-zeros."""

    obeying: int
    total: int

    @property
    def share(self) -> float:
        """Obeying groups over all groups, 1.0 for an empty weight."""
        return self.obeying / self.total if self.total else 1.0

    @property
    def is_24(self) -> bool:
        """Whether every group obeys."""
        return self.obeying == self.total


@cache
def compiled_loops() -> ModuleType | None:
    """Return the compiled loops, or None where numba is absent, switched off or finds no place for its cache."""
    try:
        import numba

        from twofour.pattern import mask_numba
    except (ImportError, RuntimeError) as error:
        log.info("masks are chosen by NumPy, about ten times slower, because numba cannot be used: %s", error)
        return None
    return None if numba.config.DISABLE_JIT else mask_numba


def loops_for(size: int) -> ModuleType | None:
    """Return the compiled loops if they are the faster way for `size` elements."""
    wanted = size >= COMPILED_FROM or (size >= LOADED_FROM and compiled_loops.cache_info().currsize > 0)
    return compiled_loops() if wanted else None


def magnitude_bits(weight: Array) -> Array:
    """Return unsigned integers, same shape as `weight`, ordered as the absolute values."""
    bits = unsigned_bits(weight)
    magnitudes: Array = bits & bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    return magnitudes


def unsigned_bits(weight: Array) -> Array:
    """Return the elements of `weight` as unsigned integers, C-contiguous; a view where `weight` is contiguous."""
    size = weight.dtype.itemsize
    if size not in (1, 2, 4, 8):
        raise InputError(f"weight dtype {weight.dtype} has {size} bytes an element, expected a floating format of 1, 2, 4 or 8")
    return np.ascontiguousarray(weight).view(np.dtype(f"u{size}"))


def grouped(weight: Array, axis: int, m: int = 4) -> Array:
    """Return `weight` with `axis` last and split: `[..., groups, m]`."""
    if weight.ndim <= axis or weight.shape[axis] % m:
        raise InputError(f"weight of shape {list(weight.shape)} has no axis {axis} of a multiple of {m} elements to group")
    moved = np.moveaxis(weight, axis, -1)
    return moved.reshape(*moved.shape[:-1], moved.shape[-1] // m, m)


def select(weight: Array, axis: int = 1, n: int = 2, m: int = 4) -> npt.NDArray[np.bool_]:
    """Return the mask that keeps the `n` largest magnitudes of every `m` consecutive weights along `axis`.

    Of equal magnitudes the lower index is kept, so the sum of kept magnitudes is the largest possible and the mask is unique.

    Args:
        weight: any floating dtype (or its bits as integers), `[out, in, *kernel]`; `axis` a multiple of `m` long.

    Source: Mishra et al. 2021, arXiv 2104.08378, section 3.1 (2:4); Zhou et al. 2021, arXiv 2102.04010, section 3 (N:M).
    """
    if not 0 < n < m:
        raise InputError(f"pattern {n}:{m} keeps {n} of {m}, expected 0 < n < m")
    if weight.ndim <= axis or weight.shape[axis] % m:
        raise InputError(f"weight of shape {list(weight.shape)} has no axis {axis} of a multiple of {m} elements to group")
    loops = loops_for(weight.size)
    if loops is None:
        return select_by_passes(weight, axis, n, m)
    inner = int(np.prod(weight.shape[axis + 1 :]))
    groups = unsigned_bits(weight).reshape(-1, m, inner)
    kept: npt.NDArray[np.bool_] = loops.select_groups(groups, n).reshape(weight.shape)
    return kept


def select_by_passes(weight: Array, axis: int = 1, n: int = 2, m: int = 4) -> npt.NDArray[np.bool_]:
    """Return what `select` returns, by NumPy alone: the rank of each weight is the number of those in its group that beat it."""
    groups = grouped(magnitude_bits(weight), axis, m)
    rank = np.zeros(groups.shape, np.uint8 if m <= 256 else np.uint32)
    for i in range(m):
        for j in range(m):
            if i != j:
                beats = groups[..., j] >= groups[..., i] if j < i else groups[..., j] > groups[..., i]
                rank[..., i] += beats
    kept = (rank < n).reshape(np.moveaxis(weight, axis, -1).shape)
    return np.ascontiguousarray(np.moveaxis(kept, -1, axis))


def count_groups(weight: Array, axis: int = 1, n: int = 2, m: int = 4) -> GroupCount:
    """Return how many groups of `m` along `axis` have at most `n` non-zeros (-0 counts as zero)."""
    nonzeros = np.count_nonzero(grouped(weight, axis, m), axis=-1)
    return GroupCount(int(np.count_nonzero(nonzeros <= n)), int(nonzeros.size))
