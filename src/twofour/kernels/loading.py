"""From a source to a loaded kernel: an embedded cubin where one is given, else the cache or the compiler."""

import struct
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from twofour.errors import UnsupportedError
from twofour.jit import driver
from twofour.jit.cache import Cache, default_cache
from twofour.jit.source import Source

HOPPER = (9, 0)


def refuse_other_gpus(device: int) -> None:
    """Do nothing if GPU `device` is of compute capability 9.0.

    Raises:
        UnsupportedError: it is another.
    """
    found = driver.capability(device)
    if found != HOPPER:
        raise UnsupportedError(f"GPU {device} has compute capability {found[0]}.{found[1]}, expected 9.0 (Hopper); use the library tactics")


@lru_cache(maxsize=1024)
def kernel(source: Source, device: int, shared_bytes: int, cache_folder: str | None = None, cubin: bytes | None = None) -> int:
    """Return the handle of `source`'s kernel on GPU `device`, from `cubin` where given.

    Raises:
        UnsupportedError: it does not compile or load. MissingExtraError: NVRTC or the driver's bindings are missing.
    """
    if cubin is None:
        cache = default_cache() if cache_folder is None else Cache(Path(cache_folder))
        cubin = cache.get(source).cubin
    return driver.load_kernel(cubin, source.name, device, shared_bytes)


def divisor(value: int) -> tuple[int, int]:
    """Return (multiplier, shift) with `n * multiplier >> shift == n // value` for 0 <= n < 2^31 and value < 2^31.

    With l = ceil(log2 value), multiplier = ceil(2^(31 + l) / value) < 2^32. Source: Granlund and Montgomery 1994, theorem 4.2.
    """
    value = min(max(value, 1), 2**31 - 1)
    bits = (value - 1).bit_length()
    return -(-(1 << 31 + bits) // value), 31 + bits


class PlainStep:
    """What the steps of the plain families share: a Problem and a Config compiled, loaded and ready to launch.

    A family says: `contract`, its module with `default` and `derive`; `source` and `pack_sizes`, its functions; `pointers`, the layout of
    the addresses in front of the sizes. A Launch with `shared_bytes` asks for that much dynamic shared memory.
    """

    contract: ClassVar[Any]
    source: ClassVar[Callable[..., Source]]
    pack_sizes: ClassVar[Callable[..., bytes]]
    pointers: ClassVar[struct.Struct]

    def __init__(
        self,
        problem: Any,
        config: Any = None,
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
        self.config = self.contract.default(problem, sms) if config is None else config
        self.plan = self.contract.derive(problem, self.config, sms)
        shared = getattr(self.plan, "shared_bytes", 0)
        handle = kernel(self.source(problem, self.config, self.plan), device, shared, cache_folder, cubin)
        self._sizes = self.pack_sizes(problem, self.plan)
        self._launcher = driver.Launcher(handle, self.plan.grid, self.plan.threads, shared, overlap=overlap)

    def _launch(self, addresses: tuple[int, ...], stream: int) -> None:
        self._launcher.launch((*addresses, stream), lambda: self.pointers.pack(*addresses) + self._sizes, stream)

    def on(self, operands: Mapping[str, int], stream: int) -> None:
        """Launch on device addresses given by operand name."""
        self(**operands, stream=stream)  # type: ignore[operator]
