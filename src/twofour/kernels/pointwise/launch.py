"""A Problem and a Config made callable on device addresses."""

import struct
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from twofour.errors import InputError
from twofour.kernels.loading import PlainStep, divisor
from twofour.kernels.pointwise import contract
from twofour.kernels.pointwise.contract import MAX_AXES, MAX_INPUTS, Config, Launch, Problem, collapse
from twofour.kernels.pointwise.source import source

# struct PointwiseParams of pointwise.cuh: pointers, then sizes.
_POINTERS = struct.Struct(f"<{MAX_INPUTS + 1}Q")
_SIZES = struct.Struct(f"<q{(MAX_INPUTS + 1) * MAX_AXES}q{MAX_AXES}q2q{2 * MAX_AXES}I")


def pack_sizes(problem: Problem, launch: Launch) -> bytes:
    """Return the parameters behind the pointers."""
    rank, found = len(launch.shape), collapse(problem)
    rows = [*launch.strides[:-1], *[(0,) * rank] * (MAX_INPUTS - len(problem.inputs)), launch.strides[-1]]
    pad = (0,) * (MAX_AXES - rank)
    strides = [s for row in rows for s in (*row, *pad)]
    shape = (*launch.shape, *(1,) * (MAX_AXES - rank))
    divisors = [n for size in shape for n in divisor(size)]
    return _SIZES.pack(launch.groups, *strides, *shape, found.shape[launch.turn_axis], found.shape[-1], *divisors)


class Pointwise(PlainStep):
    """One element-wise computation on one GPU, prepared; calling it only launches. Safe from several threads."""

    contract: ClassVar[Any] = contract
    source = staticmethod(source)
    pack_sizes = staticmethod(pack_sizes)
    pointers = _POINTERS
    problem: Problem

    def __init__(self, problem: Problem, config: Config | None = None, **options: Any) -> None:
        """Compile or fetch the kernel and load it, as `PlainStep`."""
        super().__init__(problem, config, **options)
        self._aligns = tuple(o.align for o in problem.inputs)
        self._rest = (0,) * (MAX_INPUTS - len(problem.inputs))

    def __call__(self, inputs: Sequence[int], d: int, *, stream: int = 0) -> None:
        """Launch on device addresses: one an input, then the output's.

        Raises:
            InputError: an address is missing, or not a multiple of what the problem says.
        """
        aligned = len(inputs) == len(self._aligns) and all(x and x % a == 0 for x, a in zip(inputs, self._aligns, strict=True))
        if not aligned or not d or d % self.problem.out_align:
            raise InputError(
                f"addresses {[hex(x) for x in inputs]} and d={d:#x}: expected {len(self._aligns)} inputs at multiples of "
                f"{list(self._aligns)} bytes and an output at a multiple of {self.problem.out_align}"
            )
        pointers = (*inputs, *self._rest, d)
        self._launch(pointers, stream)

    def on(self, operands: Mapping[str, int], stream: int) -> None:
        """Launch on device addresses given by operand name: `in0` and so on, `d`."""
        self([operands[f"in{i}"] for i in range(len(self._aligns))], operands["d"], stream=stream)
