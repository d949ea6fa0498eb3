"""A Problem and a Config made callable on device addresses."""

import struct

from twofour.errors import InputError
from twofour.jit import driver
from twofour.kernels.loading import divisor, kernel, refuse_other_gpus
from twofour.kernels.pool.contract import AnyProblem, Config, Launch, Problem, default, derive
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


class Pool:
    """One pooling or resizing on one GPU, prepared; calling it only launches. Safe from several threads."""

    def __init__(
        self,
        problem: AnyProblem,
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

    def __call__(self, x: int, d: int, *, stream: int = 0) -> None:
        """Launch on device addresses.

        Raises:
            InputError: an address is missing, or not a multiple of what the problem says.
        """
        if not (x and d) or x % self.problem.align or d % self.problem.out_align:
            raise InputError(f"addresses x={x:#x}, d={d:#x}: expected multiples of {self.problem.align} and {self.problem.out_align} bytes")
        pointers = (x, d)
        self._launcher.launch((*pointers, stream), lambda: _POINTERS.pack(*pointers) + self._sizes, stream)
