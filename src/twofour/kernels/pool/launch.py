"""A Problem and a Config made callable on device addresses."""

import struct
from typing import Any, ClassVar

from twofour.errors import InputError
from twofour.kernels.loading import PlainStep, divisor
from twofour.kernels.pool import contract
from twofour.kernels.pool.contract import AnyProblem, Launch, Problem
from twofour.kernels.pool.source import source

# struct PoolParams of pool.cuh: two pointers, then sizes.
_POINTERS = struct.Struct("<2Q")
_SIZES = struct.Struct("<3q2d18i6I")


def pack_sizes(problem: AnyProblem, launch: Launch) -> bytes:
    """Return the parameters behind the pointers."""
    p = problem
    pitches = [p.x_pitch or p.channels, p.y_pitch or p.channels]
    sizes = [p.height, p.width, p.out_height, p.out_width, launch.channel_groups, launch.column_groups]
    if isinstance(p, Problem):
        steps: tuple[float, float] = (0.0, 0.0)
        counted = p.pads if p.count_include_pad else (0, 0, 0, 0)
        window = [*p.kernel, *p.strides, *p.dilations, p.pads[0], p.pads[1], *counted]
    else:
        steps, window = p.steps, [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
    divisors = [n for size in (launch.channel_groups, launch.column_groups, p.out_height) for n in divisor(size)]
    return _SIZES.pack(launch.groups, *pitches, *steps, *sizes, *window, *divisors)


class Pool(PlainStep):
    """One pooling or resizing on one GPU, prepared; calling it only launches. Safe from several threads."""

    contract: ClassVar[Any] = contract
    source = staticmethod(source)
    pack_sizes = staticmethod(pack_sizes)
    pointers = _POINTERS
    problem: AnyProblem

    def __call__(self, x: int, d: int, *, stream: int = 0) -> None:
        """Launch on device addresses.

        Raises:
            InputError: an address is missing, or not a multiple of what the problem says.
        """
        if not (x and d) or x % self.problem.align or d % self.problem.out_align:
            raise InputError(f"addresses x={x:#x}, d={d:#x}: expected multiples of {self.problem.align} and {self.problem.out_align} bytes")
        pointers = (x, d)
        self._launch(pointers, stream)
