"""A Problem and a Config made callable on device addresses."""

import struct
from typing import Any, ClassVar

from twofour.errors import InputError
from twofour.jit import driver
from twofour.kernels.grouped import contract
from twofour.kernels.grouped.contract import LINE_BYTES, SLAB, Config, Launch, Problem
from twofour.kernels.grouped.source import source
from twofour.kernels.loading import PlainStep, divisor
from twofour.kernels.operands import DTYPE_BYTES

# struct GroupedParams of grouped.cuh: two tensor maps, two pointers, then sizes; 64-byte aligned.
_POINTERS = struct.Struct("<128s128s2Q")
_SIZES = struct.Struct("<19i8I")
_PARAMS_BYTES = 384  # of which 380 are filled


def pack_sizes(problem: Problem, config: Config, launch: Launch) -> bytes:
    """Return the parameters behind the pointers."""
    p, c, at = problem, config, launch
    image = [p.inputs, p.height, p.out_height, p.pads[0], p.pads[1], p.strides[1]]
    tile = [c.images, c.columns, at.box_columns, c.strip, at.strips, at.column_tiles, at.items, at.slabs, at.blocks]
    divisors = [n for size in (at.slabs, at.strips, at.column_tiles, c.columns) for n in divisor(size)]
    return _SIZES.pack(*image, *tile, c.stages, at.stage_bytes, at.box_bytes, at.total, *divisors)


def boxes(problem: Problem, config: Config, launch: Launch) -> list[tuple[list[int], list[int], list[int]]]:
    """Return sizes in elements, pitches in bytes and boxes in elements of the tensor maps of X and Y: channels, columns, rows, images."""
    p, c, found = problem, config, []
    for pitch, height, width, box in (
        (p.x_pitch or p.inputs, p.height, p.width, [SLAB, launch.box_columns, p.strides[0], c.images]),
        (p.y_pitch or p.outputs, p.out_height, p.out_width, [SLAB, c.columns, 1, c.images]),
    ):
        step = pitch * DTYPE_BYTES[p.dtype]
        found.append(([p.inputs, width, height, p.batch], [step, width * step, height * width * step], box))
    return found


class Grouped(PlainStep):
    """One grouped convolution on one GPU, prepared; calling it only launches. Safe from several threads."""

    contract: ClassVar[Any] = contract
    source = staticmethod(source)
    problem: Problem
    config: Config
    plan: Launch

    def pack_sizes(self, problem: Problem, launch: Launch) -> bytes:  # type: ignore[override]
        """Return the parameters behind the pointers."""
        return pack_sizes(problem, self.config, launch)

    def __call__(self, x: int, weight: int, d: int, *, bias: int = 0, stream: int = 0) -> None:
        """Launch on device addresses.

        Args:
            x, d: images of the problem's pitches, 16-byte aligned. weight: as `pack_weight` gives it. bias: fp32.

        Raises:
            InputError: an address is missing or misaligned.
        """
        if not (x and weight and d) or (x | weight | d) % 16:
            raise InputError(f"addresses x={x:#x}, weight={weight:#x}, d={d:#x}: expected multiples of 16 bytes")
        if self.problem.epilogue.bias and (not bias or bias % 4):
            raise InputError(f"the epilogue adds bias, whose address is {bias:#x}, expected a multiple of 4 bytes; pass bias=")
        self._launcher.launch((x, weight, d, bias, stream), lambda: self._params(x, weight, d, bias), stream)

    def _params(self, x: int, weight: int, d: int, bias: int) -> bytes:
        """The parameter block `GroupedParams` on these addresses."""
        of_x, of_d = boxes(self.problem, self.config, self.plan)
        dtype = self.problem.dtype
        maps = driver.encode_boxes(x, *of_x, dtype), driver.encode_boxes(d, *of_d, dtype)
        return (_POINTERS.pack(*maps, weight, bias) + self._sizes).ljust(_PARAMS_BYTES, b"\0")


assert LINE_BYTES == SLAB * 2
