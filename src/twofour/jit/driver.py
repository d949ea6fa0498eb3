"""The few CUDA driver calls a launch needs: load a cubin, allow it shared memory, encode a tensor map, launch. Knows no operation.

Setup goes through cuda.bindings; the launch itself through ctypes, because it is on every layer's path (about 1 us instead of 5).
"""

import ctypes
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from twofour.errors import InputError, MissingExtraError, UnsupportedError

KEPT_BLOCKS = 4096  # parameter blocks a kernel remembers, half a kilobyte each
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_int * 16))


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


@cache
def bindings() -> Any:
    """Return `cuda.bindings.driver`, initialised.

    Raises:
        MissingExtraError: cuda.bindings is not installed.
        UnsupportedError: there is no NVIDIA driver or no GPU.
    """
    try:
        from cuda.bindings import driver
    except ImportError as e:
        raise MissingExtraError(f"launching kernels needs cuda.bindings, which is not installed ({e}); pip install 'twofour[cuda]'") from e
    try:
        error = driver.cuInit(0)[0]
    except RuntimeError as e:
        raise UnsupportedError(f"no NVIDIA driver was found ({e}); install one, or run on the CPU backend") from e
    if int(error) != 0:
        raise UnsupportedError(
            f"the NVIDIA driver could not be initialised (CUDA error {int(error)}); check nvidia-smi, or run on the CPU backend"
        )
    return driver


@cache
def _library() -> Any:
    bindings()
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise UnsupportedError(f"no NVIDIA driver was found ({e}); install one, or run on the CPU backend") from e


def check(result: Sequence[Any], what: str) -> Any:
    """Return a driver call's value(s) without its error code.

    Raises:
        UnsupportedError: the call failed; the message names `what` and the error.
    """
    error, *values = result
    if int(error) != 0:
        name = bindings().cuGetErrorName(error)[1]
        raise UnsupportedError(f"{what} failed with {name.decode() if name else int(error)}; check nvidia-smi for a busy or failed GPU")
    return values[0] if len(values) == 1 else values


@cache
def capability(device: int) -> tuple[int, int]:
    """Return the compute capability of GPU `device`."""
    d = bindings()
    major = d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    minor = d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
    handle = check(d.cuDeviceGet(device), f"finding GPU {device}")
    return tuple(int(check(d.cuDeviceGetAttribute(a, handle), f"asking GPU {device}")) for a in (major, minor))  # type: ignore[return-value]


@cache
def num_sms(device: int) -> int:
    """Return the number of multiprocessors of GPU `device`."""
    d = bindings()
    attribute = d.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
    return int(check(d.cuDeviceGetAttribute(attribute, check(d.cuDeviceGet(device), f"finding GPU {device}")), f"asking GPU {device}"))


@cache
def bus_id(device: int) -> str:
    """Return the address of GPU `device` on the PCI bus, `domain:bus:device.function`."""
    d = bindings()
    found = check(d.cuDeviceGetPCIBusId(16, check(d.cuDeviceGet(device), f"finding GPU {device}")), f"asking GPU {device}")
    return bytes(found).split(b"\0")[0].decode()


@cache
def _primary_context(device: int) -> Any:
    """GPU `device`'s primary context, held until the process ends; asked for once, because the driver counts its holders."""
    d = bindings()
    return check(d.cuDevicePrimaryCtxRetain(check(d.cuDeviceGet(device), f"finding GPU {device}")), f"using GPU {device}")


def use_device(device: int) -> Any:
    """Make GPU `device`'s primary context current in this thread, as every CUDA runtime user shares it.

    Returns:
        The context that was current before, which may be none; `None` if it is the same.
    """
    d, context = bindings(), _primary_context(device)
    before = check(d.cuCtxGetCurrent(), "asking for the context")
    if int(before) == int(context):
        return None
    check(d.cuCtxSetCurrent(context), f"using GPU {device}")
    return before


@contextmanager
def on_device(device: int) -> Iterator[None]:
    """Make GPU `device` current for the body; then the caller's is again, on which its next allocations and launches shall be.

    NOTE: while a graph is captured in the driver's usual mode, an allocation, a free or a wait fails in every thread and ends the capture.
    The body may do all three, a destructor above all, which runs when it likes; none of them is recorded.
    """
    d, before = bindings(), use_device(device)
    mode = check(d.cuThreadExchangeStreamCaptureMode(d.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED), "setting the capture mode")
    try:
        yield
    finally:
        check(d.cuThreadExchangeStreamCaptureMode(mode), "setting the capture mode")
        if before is not None:
            check(d.cuCtxSetCurrent(before), "going back to the caller's GPU")


def load_kernel(cubin: bytes, name: str, device: int, shared_bytes: int) -> int:
    """Return the handle of kernel `name` in `cubin`, allowed `shared_bytes` of dynamic shared memory on GPU `device`."""
    d = bindings()
    use_device(device)
    library = check(d.cuLibraryLoadData(cubin, [], [], 0, [], [], 0), f"loading kernel {name}")
    kernel = check(d.cuLibraryGetKernel(library, name.encode()), f"finding kernel {name}")
    attribute = d.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(
        d.cuKernelSetAttribute(attribute, shared_bytes, kernel, check(d.cuDeviceGet(device), "finding the GPU")),
        f"giving {name} shared memory",
    )
    return int(kernel)


def encode_rows(pointer: int, rows: int, columns: int, box_rows: int, box_columns: int, dtype: str) -> bytes:
    """Return the 128-byte tensor map of a contiguous 16-bit `[rows, columns]` matrix, 128-byte swizzled boxes, zeros outside.

    Raises:
        InputError: `pointer` or a row is not 16-byte aligned.
    """
    if pointer % 16 or columns % 8:
        raise InputError(
            f"a matrix lies at address {pointer:#x} with {columns} columns, expected 16-byte aligned rows; copy it to a fresh tensor"
        )
    return encode_boxes(pointer, [columns, rows], [columns * 2], [box_columns, box_rows], dtype, promotion=256)


def encode_boxes(pointer: int, sizes: Sequence[int], pitches: Sequence[int], box: Sequence[int], dtype: str, promotion: int = 128) -> bytes:
    """Return the 128-byte tensor map of a 16-bit tensor, 128-byte swizzled boxes, zeros outside.

    Args:
        sizes: elements, the innermost axis first. pitches: bytes along each axis but the innermost. box: elements. promotion: bytes that
            the L2 fetches at once, 128 or 256.
    """
    d = bindings()
    u64, u32 = d.cuuint64_t, d.cuuint32_t
    kind, promote = d.CUtensorMapDataType, d.CUtensorMapL2promotion
    encoded = check(
        d.cuTensorMapEncodeTiled(
            kind.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 if dtype == "bf16" else kind.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            len(sizes),
            pointer,
            [u64(size) for size in sizes],
            [u64(pitch) for pitch in pitches],
            [u32(size) for size in box],
            [u32(1)] * len(sizes),
            d.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            d.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            promote.CU_TENSOR_MAP_L2_PROMOTION_L2_256B if promotion == 256 else promote.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            d.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        "encoding a tensor map",
    )
    return ctypes.string_at(int(encoded.getPtr()), 128)


class Launcher:
    """One kernel with its grid; each parameter block is built once and launched as often as it comes again. Safe from several threads.

    A network's layers see the same few addresses again and again, and looking up a finished block costs less than writing one.
    """

    def __init__(self, kernel: int, grid: int, threads: int, shared_bytes: int, *, overlap: bool = False) -> None:
        """Prepare; with `overlap` a launch may start while the kernel before it in the stream drains (programmatic dependent launch)."""
        self._kernel = ctypes.c_void_p(kernel)
        self._geometry = (grid, 1, 1), (threads, 1, 1), shared_bytes
        self._attribute = _Attribute(_PROGRAMMATIC_SERIALIZATION, 0)
        self._attribute.value[0] = 1
        self._num_attributes = 1 if overlap else 0
        self._call = _library().cuLaunchKernelEx
        self._blocks: dict[Hashable, tuple[Any, ...]] = {}
        self._adding = threading.Lock()

    def launch(self, key: Hashable, build: Callable[[], bytes], stream: int) -> None:
        """Launch on `stream` with the parameter block of `key`, which `build` makes when it is not remembered; `key` holds the stream.

        Raises:
            UnsupportedError: the driver refused the launch.
        """
        error = self._call(*(self._blocks.get(key) or self._add(key, build(), stream)))
        if error:
            check((bindings().CUresult(error),), "launching the kernel")

    def _add(self, key: Hashable, params: bytes, stream: int) -> tuple[Any, ...]:
        buffer = ctypes.create_string_buffer(params, len(params))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(buffer))
        config = _LaunchConfig(*self._geometry, stream, ctypes.pointer(self._attribute), self._num_attributes)
        # A reference made by byref keeps its object alive; the array of addresses does not keep the buffer.
        arguments.buffer = buffer  # type: ignore[attr-defined]
        block = (ctypes.byref(config), self._kernel, ctypes.byref(arguments), None)
        with self._adding:
            while len(self._blocks) >= KEPT_BLOCKS:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[key] = block
        return block


class Buffer:
    """Device memory, freed with the object."""

    def __init__(self, size: int, *, zeroed: bool = False) -> None:
        """Allocate at least `size` bytes in the current context."""
        d = bindings()
        self._free = d.cuMemFree
        self.pointer = int(check(d.cuMemAlloc(max(size, 16)), f"allocating {size} bytes"))
        if zeroed:
            check(d.cuMemsetD8(self.pointer, 0, max(size, 16)), "zeroing memory")

    def __del__(self) -> None:
        if hasattr(self, "pointer"):
            self._free(self.pointer)
