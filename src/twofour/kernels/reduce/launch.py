"""A Problem and a Config made callable on device addresses."""

import struct

from twofour.errors import InputError
from twofour.jit import driver
from twofour.kernels.loading import divisor, kernel, refuse_other_gpus
from twofour.kernels.reduce.contract import Config, Launch, Problem, default, derive
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


class Reduce:
    """One reduction or normalisation on one GPU, prepared; calling it only launches. Safe from several threads."""

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
        self._launcher.launch((*pointers, stream), lambda: _POINTERS.pack(*pointers) + self._sizes, stream)
