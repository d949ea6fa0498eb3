"""A Problem and a Config made callable on device addresses."""

import struct
from collections.abc import Sequence

from twofour.errors import InputError
from twofour.jit import driver
from twofour.kernels.loading import divisor, kernel, refuse_other_gpus
from twofour.kernels.pointwise.contract import MAX_AXES, MAX_INPUTS, Config, Launch, Problem, collapse, default, derive
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


class Pointwise:
    """One element-wise computation on one GPU, prepared; calling it only launches. Safe from several threads."""

    def __init__(
        self,
        problem: Problem,
        config: Config | None = None,
        *,
        device: int = 0,
        overlap: bool = False,
        cache_folder: str | None = None,
        cubin: bytes | None = None,
    ) -> None:
        """Compile or fetch the kernel and load it; `config` None takes the default.

        Raises:
            UnsupportedError: GPU `device` is not of compute capability 9.0. InputError: `why_not(problem, config)` has a reason.
        """
        refuse_other_gpus(device)
        sms = driver.num_sms(device)
        self.problem, self.device = problem, device
        self.config = default(problem, sms) if config is None else config
        self.plan = derive(problem, self.config, sms)
        handle = kernel(source(problem, self.config, self.plan), device, 0, cache_folder, cubin)
        self._sizes = pack_sizes(problem, self.plan)
        self._launcher = driver.Launcher(handle, self.plan.grid, self.plan.threads, 0, overlap=overlap)
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
        self._launcher.launch((*pointers, stream), lambda: _POINTERS.pack(*pointers) + self._sizes, stream)
