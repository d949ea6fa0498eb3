"""A Problem and a Config made callable on device pointers. Needs neither torch nor a compiler once the cubin is cached."""

import struct

from twofour.errors import InputError
from twofour.jit import driver
from twofour.kernels.gemm.contract import Config, Launch, Problem, default, derive, loads_residual, store_chunks
from twofour.kernels.gemm.source import source
from twofour.kernels.loading import divisor, kernel, refuse_other_gpus
from twofour.pattern.pack_sm90 import BLOCK_K

# struct GemmParams of gemm_common_16bit.cuh: two tensor maps, 7 pointers, 13 integers, 5 divisors; 64-byte aligned. The residual's tensor
# map of ResidualGemmParams lies behind it.
_POINTERS = struct.Struct("<128s128s7Q")
_SIZES = struct.Struct("<13i10I")
_PARAMS_BYTES = 448
BOX_OUTPUTS = 64


def pack_sizes(problem: Problem, launch: Launch) -> bytes:
    """Return the integers of `GemmParams`, in its order."""
    work = (launch.tiles - launch.whole_tiles) * launch.k_blocks
    quotient, remainder = divmod(work, launch.split_blocks) if launch.split_blocks else (0, 0)
    last_group = launch.row_tiles % launch.group or launch.group
    numbers = [problem.tokens, problem.outputs, problem.weight_rows, problem.inputs, launch.k_blocks, problem.row_blocks]
    numbers += [launch.row_tiles, launch.token_tiles, launch.group, launch.whole_tiles, launch.split_blocks, quotient, remainder]
    for value in (launch.split_blocks, launch.k_blocks, launch.group * launch.token_tiles, launch.group, last_group):
        numbers += divisor(value)
    return _SIZES.pack(*numbers)


class Gemm:
    """One matrix product on one GPU, prepared; calling it only launches.

    A call costs the CPU a few microseconds: tensor maps are encoded once for the addresses they are on. Safe from several threads; launches
    on two streams at once need two workspaces.
    """

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
        """Compile or fetch the kernel and load it; `config` None takes the modelled default.

        Args:
            cubin: the compiled kernel; None: from the cache or the compiler.
            overlap: a call may start while the kernel before it in the stream drains; its inputs are read only once that one has finished.

        Raises:
            UnsupportedError: GPU `device` is not of compute capability 9.0.
            InputError: `why_not(problem, config)` has a reason.
        """
        refuse_other_gpus(device)
        sms = driver.num_sms(device)
        self.problem, self.device = problem, device
        self.config = default(problem, sms) if config is None else config
        self.plan = derive(problem, self.config, sms)
        handle = kernel(source(problem, self.config), device, self.plan.smem_bytes, cache_folder, cubin)
        self._sizes = pack_sizes(problem, self.plan)
        overlap = overlap and self.config.kernel == "tuned"  # the others do not wait for the grid before them
        self._launcher = driver.Launcher(handle, self.plan.grid, self.plan.threads, self.plan.smem_bytes, overlap=overlap)
        tuned, config = self.config.kernel == "tuned", self.config
        self._x_box = config.tile_tokens if tuned else 64
        self._d_box = config.warpgroup_tokens // store_chunks(config) if tuned and problem.out_dtype != "fp32" else 0
        self._loads_residual = loads_residual(problem, config)
        e = problem.epilogue
        self._wanted = tuple(name for name, on in (("scale", e.scale), ("bias", e.bias), ("residual", e.residual)) if on)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of zeroed device memory a call needs; launches leave its flags zero, so it is zeroed once and used again."""
        return self.plan.workspace_bytes

    def __call__(
        self, x: int, weight: int, d: int, *, scale: int = 0, bias: int = 0, residual: int = 0, workspace: int = 0, stream: int = 0
    ) -> None:
        """Launch `D = epilogue(X . W^T)` on device addresses.

        Args:
            x: `[tokens, inputs]`, d: `[tokens, outputs]`, contiguous and 16-byte aligned. weight: `PackedWeight.data`.
            scale, bias: fp32 `[weight_rows]`. residual: as `d`; it may be `d`.
            workspace: `workspace_bytes` of device memory, not used by another launch at the same time.

        Raises:
            InputError: an address is missing or misaligned.
        """
        if not (x and weight and d) or (d | residual) & 15:
            raise InputError(
                f"addresses x={x:#x}, weight={weight:#x}, d={d:#x}, residual={residual:#x}: expected 16-byte aligned device memory"
            )
        if self._wanted:
            given = {"scale": scale, "bias": bias, "residual": residual}
            for name in self._wanted:
                if not given[name]:
                    raise InputError(f"the epilogue adds {name}, expected its address, got none; pass {name}=")
        if self.plan.workspace_bytes and not workspace:
            raise InputError(f"this schedule needs {self.plan.workspace_bytes} bytes of workspace, got none; allocate it zeroed once")
        self.enqueue(x, weight, d, scale, bias, residual, workspace, stream)

    def enqueue(self, x: int, weight: int, d: int, scale: int, bias: int, residual: int, workspace: int, stream: int) -> None:
        """Launch as a call does, without looking at the addresses: for callers who made sure of them."""
        key = (x, weight, d, scale, bias, residual, workspace, stream)
        self._launcher.launch(key, lambda: self._params(*key[:-1]), stream)

    def _params(self, x: int, weight: int, d: int, scale: int, bias: int, residual: int, workspace: int) -> bytes:
        """The parameter block `GemmParams`, or `ResidualGemmParams`, on these addresses."""
        p = self.problem
        x_map = driver.encode_rows(x, p.tokens, p.inputs, self._x_box, BLOCK_K, p.dtype)
        d_map = driver.encode_rows(d, p.tokens, p.outputs, self._d_box, BOX_OUTPUTS, p.out_dtype) if self._d_box else bytes(128)
        pointers = _POINTERS.pack(x_map, d_map, weight, d, scale, bias, residual, workspace, x)
        params = (pointers + self._sizes).ljust(_PARAMS_BYTES, b"\0")
        if self._loads_residual:
            params += driver.encode_rows(residual, p.tokens, p.outputs, self._d_box, BOX_OUTPUTS, p.out_dtype)
        return params
