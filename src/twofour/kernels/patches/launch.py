"""A Problem and a Config made callable on device addresses."""

import struct
from typing import Any, ClassVar

from twofour.errors import InputError
from twofour.kernels.loading import PlainStep, divisor
from twofour.kernels.patches import contract
from twofour.kernels.patches.contract import Launch, Problem
from twofour.kernels.patches.source import source

# struct PatchesParams of patches.cuh: two pointers, then sizes.
_POINTERS = struct.Struct("<2Q")
_SIZES = struct.Struct("<5q6i4I")


def pack_sizes(problem: Problem, launch: Launch) -> bytes:
    """Return the parameters behind the pointers."""
    p = problem
    sizes = [p.height, p.width, p.out_height, p.out_width, p.top, p.left]
    return _SIZES.pack(launch.groups, *p.x_strides, *sizes, *divisor(p.out_width), *divisor(p.out_height))


class Patches(PlainStep):
    """One gathering of blocks on one GPU, prepared; calling it only launches. Safe from several threads."""

    contract: ClassVar[Any] = contract
    source = staticmethod(source)
    pack_sizes = staticmethod(pack_sizes)
    pointers = _POINTERS
    problem: Problem

    def __call__(self, x: int, d: int, *, stream: int = 0) -> None:
        """Launch on device addresses.

        Raises:
            InputError: an address is missing, or not a multiple of what the problem says.
        """
        if not (x and d) or x % self.problem.align or d % 16:
            raise InputError(f"addresses x={x:#x}, d={d:#x}: expected multiples of {self.problem.align} and 16 bytes")
        self._launch((x, d), stream)
