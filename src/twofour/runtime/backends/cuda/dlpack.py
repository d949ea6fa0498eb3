"""The DLPack protocol without a library: a producer's capsule is read, our arrays are offered. Source: dlpack.h 1.0, DLManagedTensor."""

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError

CPU, CUDA, CUDA_HOST = 1, 2, 3  # DLDeviceType
LEGACY_STREAM = 1  # how the protocol writes stream 0


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_api = ctypes.pythonapi
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_set_name = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_SetName", _api))
_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(("PyCapsule_New", _api))
# For the capsule's destructor, which must not take a reference to what is being destroyed.
_raw_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_IsValid", _api))
_raw_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(("PyCapsule_GetPointer", _api))
_FRESH, _USED = b"dltensor", b"used_dltensor"

_KIND = {"b": 6, "i": 0, "u": 1, "f": 2}  # NumPy kind -> DLDataTypeCode
_NAME = {(2, 16): "float16", (2, 32): "float32", (2, 64): "float64", (4, 16): "bfloat16", (6, 8): "bool"}
_NAME |= {(code, bits): f"{kind}int{bits}" for code, kind in ((0, ""), (1, "u")) for bits in (8, 16, 32, 64)}


class Borrowed:
    """A producer's array, held until `release` or until this object goes: address, dtype name, shape, whether rows follow each other."""

    def __init__(self, value: Any, stream: int | None) -> None:
        """Ask `value` for its memory, ready for work on `stream` (None: host memory).

        Raises:
            InputError: it gives no DLPack capsule.
        """
        if stream is None:
            capsule = value.__dlpack__()
        else:
            capsule = value.__dlpack__(stream=stream or LEGACY_STREAM)
        if not _is_valid(capsule, _FRESH):
            raise InputError(f"a {type(value).__name__} gave no DLPack tensor, expected a capsule named 'dltensor'; pass a tensor or array")
        self._managed: Any = ctypes.cast(_get_pointer(capsule, _FRESH), ctypes.POINTER(_Managed))
        _set_name(capsule, _USED)
        t = self._managed.contents.tensor
        self.address = (t.data or 0) + t.byte_offset
        self.device_type, self.device = int(t.device_type), int(t.device_id)
        self.shape = tuple(t.shape[i] for i in range(t.ndim))
        self.dtype = _NAME.get((t.code, t.bits), f"code {t.code} of {t.bits} bits") if t.lanes == 1 else "a vector type"
        self.is_contiguous = not t.strides or _is_contiguous(self.shape, tuple(t.strides[i] for i in range(t.ndim)))

    def release(self) -> None:
        """Tell the producer that its memory is no longer needed."""
        managed, self._managed = getattr(self, "_managed", None), None
        if managed is not None and managed.contents.deleter:
            _DELETER(managed.contents.deleter)(ctypes.addressof(managed.contents))

    def __del__(self) -> None:
        self.release()


def _is_contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


_offered: dict[int, Any] = {}


def _forget(address: int | None) -> None:
    _offered.pop(address or 0, None)


def _destroy(capsule: int | None) -> None:
    # A capsule that nobody consumed still owns its tensor.
    if _raw_is_valid(capsule, _FRESH):
        _offered.pop(_raw_get_pointer(capsule, _FRESH) or 0, None)


def offer(address: int, dtype: str, shape: tuple[int, ...], device: int, owner: object) -> Any:
    """Return a DLPack capsule of contiguous memory on GPU `device`; `owner` is kept until the consumer lets go."""
    kind = np.dtype(dtype)
    sizes = (ctypes.c_int64 * max(1, len(shape)))(*shape)
    tensor = _Tensor(address, CUDA, device, len(shape), _KIND[kind.kind], kind.itemsize * 8, 1, sizes, None, 0)
    managed = _Managed(tensor, None, ctypes.cast(_FORGET, ctypes.c_void_p))
    place = ctypes.addressof(managed)
    _offered[place] = (managed, sizes, owner)
    return _new_capsule(place, _FRESH, ctypes.cast(_DESTROY, ctypes.c_void_p))


_FORGET, _DESTROY = _DELETER(_forget), _DELETER(_destroy)


class DeviceArray:
    """A contiguous array on a GPU, offered through DLPack: `torch.from_dlpack`, `cupy.from_dlpack` and others take it without a copy.

    Its memory goes back when the last holder lets go.
    """

    def __init__(self, gpu: Any, memory: Any, dtype: str, shape: tuple[int, ...]) -> None:
        """Describe `memory`, an object with an `address` that is kept; all work that writes it has finished."""
        self._gpu, self._memory = gpu, memory
        self.address = int(memory.address)
        self.dtype, self.shape = np.dtype(dtype), shape

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype}{list(self.shape)} on GPU {self._gpu.device})"

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the device as DLPack writes it."""
        return CUDA, self._gpu.device

    def __dlpack__(self, *, stream: int | None = None, **_: Any) -> Any:
        """Return a capsule; its memory is ready for work on any stream."""
        return offer(self.address, str(self.dtype), self.shape, self._gpu.device, self)

    def numpy(self) -> npt.NDArray[Any]:
        """Return a copy in host memory."""
        host = np.empty(self.shape, self.dtype)
        with self._gpu.use():
            self._gpu.download(host.ctypes.data, self.address, host.nbytes, 0)
            self._gpu.synchronize(0)
        return host

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        host = self.numpy()
        return host if dtype is None else host.astype(dtype)
