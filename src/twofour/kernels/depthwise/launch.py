"""A Problem and a Config made callable on device addresses."""

import struct
from typing import Any, ClassVar

from twofour.errors import InputError
from twofour.kernels.depthwise import contract
from twofour.kernels.depthwise.contract import Launch, Problem
from twofour.kernels.depthwise.source import source
from twofour.kernels.loading import PlainStep, divisor

# struct DepthwiseParams of depthwise.cuh: five pointers, then sizes.
_POINTERS = struct.Struct("<5Q")
_SIZES = struct.Struct("<4q12i6I")


def pack_sizes(problem: Problem, launch: Launch) -> bytes:
    """Return the parameters behind the pointers."""
    p = problem
    pitches = [p.x_pitch or p.inputs, p.y_pitch or p.outputs, p.residual_pitch or p.outputs]
    sizes = [p.height, p.width, p.out_height, p.out_width, p.outputs, p.pads[0], p.pads[1], launch.rows]
    parts = [launch.channel_groups, launch.strips, launch.chunks]
    return _SIZES.pack(launch.groups, *pitches, *sizes, *parts, p.batch, *(n for part in parts for n in divisor(part)))


class Depthwise(PlainStep):
    """One depthwise convolution on one GPU, prepared; calling it only launches. Safe from several threads."""

    contract: ClassVar[Any] = contract
    source = staticmethod(source)
    pack_sizes = staticmethod(pack_sizes)
    pointers = _POINTERS
    problem: Problem

    def __call__(self, x: int, weight: int, d: int, *, bias: int = 0, residual: int = 0, stream: int = 0) -> None:
        """Launch on device addresses: multiples of 16 bytes.

        Raises:
            InputError: an address is missing or no such multiple.
        """
        e = self.problem.epilogue
        needed = (x, weight, d) + (bias,) * e.bias + (residual,) * e.residual
        if not all(needed) or any(address % 16 for address in needed):
            raise InputError(
                f"addresses x={x:#x}, weight={weight:#x}, d={d:#x}, bias={bias:#x}, residual={residual:#x}: "
                "expected multiples of 16 bytes for everything the problem uses"
            )
        self._launch((x, weight, bias, residual, d), stream)
