"""Which two of every four weights are kept, and whether a weight already is 2:4.

Magnitudes are compared as the integers of their bit patterns with the sign cleared. For IEEE formats and the two fp8 formats that order
is the order of the absolute values, so the choice is exact in every dtype and bit-equal on every device: no sum is ever rounded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class GroupCount:
    """How many groups of four along the reduction axis hold at most two non-zeros."""

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


def magnitude_bits(weight: Array) -> Array:
    """Return unsigned integers, same shape as `weight`, ordered as the absolute values."""
    size = weight.dtype.itemsize
    if size not in (1, 2, 4, 8):
        raise InputError(f"weight dtype {weight.dtype} has {size} bytes an element, expected a floating format of 1, 2, 4 or 8")
    unsigned = np.dtype(f"u{size}")
    bits: Array = np.ascontiguousarray(weight).view(unsigned) & unsigned.type(2 ** (8 * size - 1) - 1)
    return bits


def grouped(weight: Array, axis: int) -> Array:
    """Return `weight` with `axis` last and split: `[..., groups, 4]`."""
    if weight.ndim <= axis or weight.shape[axis] % 4:
        raise InputError(f"weight of shape {list(weight.shape)} has no axis {axis} of a multiple of 4 elements to group")
    moved = np.moveaxis(weight, axis, -1)
    return moved.reshape(*moved.shape[:-1], moved.shape[-1] // 4, 4)


def select(weight: Array, axis: int = 1) -> npt.NDArray[np.bool_]:
    """Return the mask that keeps the two largest magnitudes of every four consecutive weights along `axis`.

    Of equal magnitudes the lower index is kept, so the sum of kept magnitudes is the largest of the six patterns and the mask is unique.

    Args:
        weight: any floating dtype, `[out, in, *kernel]`; `axis` a multiple of 4 long.

    Source: Mishra et al. 2021, arXiv 2104.08378, section 3.1.
    """
    groups = grouped(magnitude_bits(weight), axis)
    rank = np.zeros(groups.shape, np.uint8)
    for i in range(4):
        for j in range(4):
            if i != j:
                beats = groups[..., j] >= groups[..., i] if j < i else groups[..., j] > groups[..., i]
                rank[..., i] += beats
    kept = (rank < 2).reshape(np.moveaxis(weight, axis, -1).shape)
    return np.ascontiguousarray(np.moveaxis(kept, -1, axis))


def count_groups(weight: Array, axis: int = 1) -> GroupCount:
    """Return how many groups of four along `axis` have at most two non-zeros (-0 counts as zero)."""
    nonzeros = np.count_nonzero(grouped(weight, axis), axis=-1)
    return GroupCount(int(np.count_nonzero(nonzeros <= 2)), int(nonzeros.size))
