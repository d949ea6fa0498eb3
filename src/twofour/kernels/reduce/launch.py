"""A Problem and a Config made callable on device addresses."""

import struct
from typing import Any, ClassVar

from twofour.errors import InputError
from twofour.kernels.loading import PlainStep, divisor
from twofour.kernels.reduce import contract
from twofour.kernels.reduce.contract import Launch, Problem
from twofour.kernels.reduce.source import source

# struct ReduceParams of reduce.cuh: four pointers, then sizes; 8-byte aligned.
_POINTERS = struct.Struct("<4Q")
_SIZES = struct.Struct("<3q3i2f2I4x")


def pack_sizes(problem: Problem, launch: Launch) -> bytes:
    """Return the parameters behind the pointers."""
    p = problem
    x_pitch = p.x_pitch or (p.inner if p.inner > 1 else p.length)
    blocks = max(1, launch.column_blocks)
    return _SIZES.pack(p.rows, x_pitch, p.y_pitch or p.out_length, p.length, p.inner, blocks, p.eps, 1.0 / p.length, *divisor(blocks))


class Reduce(PlainStep):
    """One reduction or normalisation on one GPU, prepared; calling it only launches. Safe from several threads."""

    contract: ClassVar[Any] = contract
    source = staticmethod(source)
    pack_sizes = staticmethod(pack_sizes)
    pointers = _POINTERS
    problem: Problem

    def __call__(self, x: int, d: int, *, scale: int = 0, bias: int = 0, stream: int = 0) -> None:
        """Launch on device addresses; `scale` and `bias` are fp32 `[length]`.

        Raises:
            InputError: an address is missing, or not a multiple of what the problem says.
        """
        p = self.problem
        if not (x and d) or x % p.align or d % p.out_align or (p.scale and not scale) or (p.bias and not bias):
            raise InputError(
                f"addresses x={x:#x}, d={d:#x}, scale={scale:#x}, bias={bias:#x}: expected multiples of {p.align} and {p.out_align} "
                "bytes, and each vector that the problem uses"
            )
        pointers = (x, d, scale, bias)
        self._launch(pointers, stream)
