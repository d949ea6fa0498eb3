"""From a source to a loaded kernel: an embedded cubin where one is given, else the cache or the compiler."""

from functools import lru_cache
from pathlib import Path

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
