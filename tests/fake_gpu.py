"""A GPU made of host memory, for the runtime's bookkeeping: addresses are real, launches run the oracle, a capture records them."""

import ctypes
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from twofour.kernels.families import footprints
from twofour.oracle.pointwise import bf16_bits, bf16_values, pointwise
from twofour.oracle.reduce import reduce

NUMPY = {"fp16": np.float16, "bf16": np.uint16, "fp32": np.float32, "int64": np.int64, "uint8": np.uint8}


class FakeGpu:
    """Counts what is held and launched; a stream runs its work at once, so what a test sees is the order in which it was put."""

    def __init__(self, device: int = 0) -> None:
        self.device, self.num_sms = device, 132
        self.held: dict[int, Any] = {}
        self.handles: set[int] = set()  # streams, and events as negative numbers
        self.log: list[str] = []
        self.ends: list[str] = []  # what was waited for or marked
        self._streams, self._events = 100, 0
        self._capturing: dict[int, list[Callable[[], None]]] = {}
        self._lock, self._thread = threading.Lock(), threading.local()

    @contextmanager
    def use(self) -> Iterator[None]:
        before = getattr(self._thread, "is_current", False)
        self._thread.is_current = True
        try:
            yield
        finally:
            self._thread.is_current = before

    @property
    def is_current(self) -> bool:
        """Whether this thread's work goes to this GPU."""
        return getattr(self._thread, "is_current", False)

    def alloc(self, size: int) -> int:
        memory = ctypes.create_string_buffer(max(size, 16) + 256)
        address = -(-ctypes.addressof(memory) // 256) * 256
        with self._lock:
            self.held[address] = memory
        ctypes.memset(address, 0x7F, max(size, 16))  # what was never written shows up
        return address

    def free(self, address: int) -> None:
        with self._lock:
            del self.held[address]

    def stream(self) -> int:
        assert self.is_current
        with self._lock:
            self._streams += 1
            self.handles.add(self._streams)
            return self._streams

    def free_stream(self, stream: int) -> None:
        assert self.is_current
        self.handles.remove(stream)

    def enqueue(self, what: str, work: Callable[[], None], stream: int) -> None:
        if stream in self._capturing:
            self._capturing[stream].append(work)
        else:
            assert self.is_current, f"{what} while another GPU is current"
            self.log.append(what)
            work()

    def synchronize(self, stream: int) -> None:
        self.ends.append(f"finish {stream}")
        assert stream not in self._capturing, "a capture cannot wait"

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        self.enqueue("copy", lambda: ctypes.memmove(to, source, size) and None, stream)

    upload = download = copy

    def zero(self, address: int, size: int, stream: int) -> None:
        self.enqueue("zero", lambda: ctypes.memset(address, 0, size) and None, stream)

    def event(self) -> int:
        with self._lock:
            self._events += 1
            self.handles.add(-self._events)
            return self._events

    def wait_for(self, event: int) -> None:
        self.ends.append(f"wait for {event}")

    def free_event(self, event: int) -> None:
        self.handles.remove(-event)

    def record(self, event: int, stream: int) -> None:
        self.ends.append(f"record {stream}")

    def wait(self, stream: int, event: int) -> None:
        self.log.append(f"wait on {stream}")

    def elapsed_us(self, begin: int, end: int) -> float:
        return float(end - begin)

    def is_capturing(self, stream: int) -> bool:
        return stream in self._capturing

    def begin_capture(self, stream: int) -> None:
        self._capturing[stream] = []

    def end_capture(self, stream: int) -> list[Callable[[], None]]:
        return self._capturing.pop(stream)

    def abandon_capture(self, stream: int) -> None:
        del self._capturing[stream]

    def launch_graph(self, graph: list[Callable[[], None]], stream: int) -> None:
        assert stream not in self._capturing, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"

        def run() -> None:
            for work in graph:
                work()

        self.enqueue("graph", run, stream)

    def free_graph(self, graph: Any) -> None: ...

    def make(self, family: str, library: str, problem: Any, config: Any = None, algorithm: int | None = None, **_: Any) -> "FakeStep":
        return FakeStep(self, family, library, problem)


def array_at(address: int, dtype: str, elements: int) -> np.ndarray:
    """Memory as an array that can be written."""
    kind = np.dtype(NUMPY[dtype])
    return np.frombuffer((ctypes.c_char * (elements * kind.itemsize)).from_address(address), kind)


def read(array: np.ndarray, dtype: str) -> np.ndarray:
    return bf16_values(array) if dtype == "bf16" else array.astype(np.float64)


class FakeStep:
    """A step computed by the oracle on the operands' addresses."""

    workspace_bytes = 0

    def __init__(self, gpu: FakeGpu, family: str, library: str, problem: Any) -> None:
        self._gpu, self._family, self._problem = gpu, family, problem
        self._touched = footprints(family, library, problem)

    def __call__(self, operands: Mapping[str, int], workspace: int, stream: int) -> None:
        addresses = dict(operands)
        self._gpu.enqueue(self._family, lambda: self._run(addresses), stream)

    def _run(self, addresses: dict[str, int]) -> None:
        p = self._problem
        found = {n: array_at(addresses[n], f.dtype, f.elements) for n, f in self._touched.items()}
        if self._family == "pointwise":
            strided = np.lib.stride_tricks.as_strided
            inputs = []
            for i, o in enumerate(p.inputs):
                values = read(found[f"in{i}"], o.dtype)
                inputs.append(strided(values, p.shape, [s * values.itemsize for s in o.strides]))
            result, out = pointwise(inputs, p.program), found["d"]
            target = strided(out, p.shape, [s * out.itemsize for s in p.out_strides])
            with np.errstate(all="ignore"):  # a trial run before a capture computes on whatever memory holds
                target[...] = bf16_bits(result) if p.out_dtype == "bf16" else result
        else:
            assert self._family == "reduce"
            x = read(found["x"], p.dtype).reshape(p.rows, p.length, p.inner)
            found["d"][...] = reduce(x, p.kind, p.eps).ravel()
