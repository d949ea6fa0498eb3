"""What callers pass: torch tensors, NumPy arrays, anything with DLPack, checked against the plan; torch is never imported here."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.plan import ValueSpec
from twofour.runtime.backends.cuda.dlpack import CUDA, Borrowed
from twofour.runtime.host import host_array

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Given:
    """One input as it was passed: device address (None: host memory), NumPy form of host memory, shape, and what must stay alive."""

    address: int | None
    host: Array | None
    shape: tuple[int, ...]
    alive: Any


def is_torch(value: Any) -> bool:
    """Return whether `value` is a torch tensor, without importing torch."""
    return type(value).__module__.split(".")[0] == "torch" and hasattr(value, "data_ptr")


def stream_of(stream: Any) -> int:
    """Return the address of a stream given as an integer, a torch stream, or anything with `__cuda_stream__`.

    Raises:
        InputError: it is none.
    """
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if hasattr(stream, "cuda_stream"):
        return int(stream.cuda_stream)
    raise InputError(f"engine: stream is a {type(stream).__name__}, expected an address, a torch stream or an object with __cuda_stream__")


def check(spec: ValueSpec, dtype: str, shape: tuple[int, ...]) -> None:
    """Do nothing if an input is what the plan says.

    Raises:
        InputError: it is not.
    """
    fits = len(shape) == len(spec.shape) and all(want in (None, got) for want, got in zip(spec.shape, shape, strict=True))
    if dtype != spec.dtype or not fits:
        raise InputError(f"engine: input {spec.name!r} is {dtype}{list(shape)}, expected {spec}")


def given(value: Any, spec: ValueSpec, device: int, stream: int) -> Given:
    """Return an input's memory, ready for work on `stream`.

    Raises:
        InputError: wrong kind, dtype, shape, device, or gaps that only its producer can close.
    """
    if is_torch(value):
        if value.is_cuda:
            return _of_torch(value, spec, device)
        value = host_array(value, spec)
    if not isinstance(value, np.ndarray):
        if not hasattr(value, "__dlpack__"):
            raise InputError(
                f"engine: input {spec.name!r} is a {type(value).__name__}, expected a NumPy array, a torch tensor or a DLPack object"
            )
        if value.__dlpack_device__()[0] == CUDA:
            return _of_dlpack(Borrowed(value, stream), spec, device)
        value = np.from_dlpack(value)
    array = np.ascontiguousarray(value)
    check(spec, str(array.dtype), array.shape)
    return Given(None, array, array.shape, array)


def _of_torch(value: Any, spec: ValueSpec, device: int) -> Given:
    if value.device.index != device:
        raise InputError(f"engine: input {spec.name!r} is on GPU {value.device.index}, expected GPU {device}; move it there")
    check(spec, str(value.dtype).removeprefix("torch."), tuple(value.shape))
    tensor = value.detach().contiguous()
    return Given(int(tensor.data_ptr()), None, tuple(tensor.shape), tensor)


def _of_dlpack(borrowed: Borrowed, spec: ValueSpec, device: int) -> Given:
    if borrowed.device != device:
        raise InputError(f"engine: input {spec.name!r} is on GPU {borrowed.device}, expected GPU {device}; move it there")
    if not borrowed.is_contiguous:
        raise InputError(f"engine: input {spec.name!r} has gaps between its rows, expected a contiguous array; copy it first")
    check(spec, borrowed.dtype, borrowed.shape)
    return Given(borrowed.address, None, borrowed.shape, borrowed)
