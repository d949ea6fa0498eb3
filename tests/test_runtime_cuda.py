"""The GPU backend's bookkeeping on a GPU made of host memory: segments, graphs, buffers, batches, threads, DLPack."""

import ctypes
import dataclasses
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_gpu import FakeGpu
from plan_samples import CHANNELS, SIDE, expected, plan, program

from twofour.errors import InputError, PlanFormatError, UnsupportedError
from twofour.jit.driver import _primary_context
from twofour.plan import Plan, ValueSpec
from twofour.runtime.backends.cuda import CudaBackend
from twofour.runtime.backends.cuda.batches import Chunk, chunks
from twofour.runtime.backends.cuda.context import Memory, segments
from twofour.runtime.backends.cuda.dlpack import CUDA, Borrowed, DeviceArray, offer
from twofour.runtime.backends.cuda.gpu import Gpu
from twofour.runtime.backends.cuda.inputs import stream_of

RNG = np.random.default_rng(0)


def images(batch: int) -> np.ndarray:
    return RNG.standard_normal((batch, CHANNELS, SIDE, SIDE)).astype(np.float32)


def backend(source: Plan | None = None, **options: Any) -> CudaBackend:
    gpu = FakeGpu()
    return CudaBackend(source or plan(), gpu=gpu, make=gpu.make, **options)


class OnFakeGpu:
    """A producer whose memory is on the fake GPU: what cupy or jax would hand over."""

    def __init__(self, array: np.ndarray, device: int = 0, strides: tuple[int, ...] | None = None, offset: int = 0) -> None:
        self.shape = array.shape
        self._memory = ctypes.create_string_buffer(array.nbytes + 512)
        self.address = -(-ctypes.addressof(self._memory) // 256) * 256 + offset
        ctypes.memmove(self.address, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        self.device, self.dtype, self.streams, self.strides = device, str(array.dtype), [], strides

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.device

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        self.streams.append(stream)
        return offer(self.address, self.dtype, self.shape, self.device, self)


@pytest.mark.parametrize("copy_out", [True, False])
@pytest.mark.parametrize("items", [1, 2, 3, 4, 5, 9, 11])
def test_any_number_of_items_gives_each_its_own_result(items: int, copy_out: bool) -> None:
    engine, x = backend(plan(copy_out=copy_out)), images(items)
    for _ in range(2):
        y = engine.call([x])
        assert isinstance(y, np.ndarray)
        assert np.array_equal(y, expected(x).astype(np.float32))


def test_chunks_take_the_largest_batch_then_the_smallest_that_holds_the_rest() -> None:
    assert chunks(70, [1, 8, 32]) == [Chunk(0, 32, 32), Chunk(32, 32, 32), Chunk(64, 6, 8)]
    assert chunks(32, [1, 8, 32]) == [Chunk(0, 32, 32)]
    assert chunks(9, [1, 8, 32]) == [Chunk(0, 9, 32)]
    with pytest.raises(InputError, match=r"0 items and the batch sizes .*, expected at least one of both"):
        chunks(0, [1])


def test_steps_at_the_callers_memory_stay_out_of_the_graph() -> None:
    s = segments(program(4))
    assert (s.graph_begin, s.graph_end, s.static_inputs, s.static_outputs) == (1, 3, frozenset(), frozenset())
    s = segments(program(4, copy_out=False))
    assert (s.graph_begin, s.graph_end, s.static_outputs) == (1, 4, frozenset({0}))


def test_a_graph_is_captured_once_a_batch_and_replayed() -> None:
    engine = backend()
    x = OnFakeGpu(images(4))
    engine.call([x])
    before = len(engine.gpu.log)
    engine.call([x])
    # Neither input nor output is copied: both steps at the ends take the caller's addresses.
    assert engine.gpu.log[before:] == ["pointwise", "graph", "pointwise"]


def test_misaligned_and_padded_inputs_go_through_a_buffer() -> None:
    engine, array = backend(), images(4)
    y = engine.call([OnFakeGpu(array, offset=4)])
    assert np.array_equal(y.numpy(), expected(array).astype(np.float32))
    assert "copy" in engine.gpu.log


def test_dlpack_in_and_out_with_the_stream_passed_on() -> None:
    engine, array = backend(), images(4)
    x = OnFakeGpu(array)
    y = engine.call([x], 7)
    assert x.streams == [7]
    engine.call([x], 0)
    assert x.streams == [7, 1]  # the protocol writes stream 0 as 1
    assert isinstance(y, DeviceArray)
    assert y.__dlpack_device__() == (CUDA, 0)
    borrowed = Borrowed(y, 1)
    assert (borrowed.shape, borrowed.dtype, borrowed.address, borrowed.is_contiguous) == ((4, CHANNELS), "float32", y.address, True)
    assert np.array_equal(np.asarray(y), expected(array).astype(np.float32))
    assert repr(y) == "DeviceArray(float32[4, 8] on GPU 0)"


def test_device_memory_goes_back_with_the_last_holder() -> None:
    engine = backend()
    x = OnFakeGpu(images(4))
    y = engine.call([x])
    held = len(engine.gpu.held)
    borrowed = Borrowed(y, 1)
    del y
    gc.collect()
    assert len(engine.gpu.held) == held
    borrowed.release()
    gc.collect()
    assert len(engine.gpu.held) == held - 1
    # A capsule that nobody consumed owns its array as well.
    capsule = engine.call([x]).__dlpack__()
    assert len(engine.gpu.held) == held
    del capsule
    gc.collect()
    assert len(engine.gpu.held) == held - 1


def test_host_tensors_of_torch_come_back_as_such() -> None:
    x = images(3)
    y = backend().call([torch.from_numpy(x)])
    assert isinstance(y, torch.Tensor)
    assert np.array_equal(y.numpy(), expected(x).astype(np.float32))


def test_two_streams_of_one_thread_are_put_in_order() -> None:
    engine, x = backend(), OnFakeGpu(images(4))
    engine.call([x], 1)
    engine.call([x], 1)
    assert engine.gpu.log.count("wait on 1") == 1
    engine.call([x], 8)
    engine.call([x], 8)  # which may be another stream by now
    assert engine.gpu.log.count("wait on 8") == 2
    own = engine.context().stream
    engine.call([images(4)])
    engine.call([images(4)])
    assert engine.gpu.log.count(f"wait on {own}") == 1


def test_a_callers_capture_is_not_crossed_by_a_wait() -> None:
    engine, array = backend(), images(4)
    x = OnFakeGpu(array)
    engine.call([x], 7)
    engine.gpu.begin_capture(9)
    context = engine.context()
    context.order(9)
    context.mark(9)
    engine.gpu.end_capture(9)
    assert "wait on 9" not in engine.gpu.log
    # After it, another stream still waits for the last call outside the capture.
    engine.call([x], 8)
    assert "wait on 8" in engine.gpu.log


def test_inside_a_callers_capture_the_steps_are_put_one_by_one() -> None:
    engine = backend()
    one_pass = engine.passes(4)
    engine.gpu.begin_capture(9)
    with pytest.raises(InputError, match="batch 4 is recorded before its first run; run it once in this thread, then record"):
        one_pass(9)
    engine.gpu.abandon_capture(9)
    one_pass(7)
    engine.gpu.begin_capture(9)
    one_pass(9)
    assert len(engine.gpu.end_capture(9)) == len(program(4).steps)


def test_threads_have_contexts_of_their_own_and_agree() -> None:
    engine, inputs = backend(), [images(n) for n in (1, 2, 4, 7)]
    wanted = [expected(x).astype(np.float32) for x in inputs]
    wrong: list[int] = []

    def work(shift: int) -> None:
        for turn in range(20):
            i = (turn + shift) % len(inputs)
            if not np.array_equal(engine.call([inputs[i]]), wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    del threads, thread
    gc.collect()
    # The threads are gone and their contexts with them: only the weights are left.
    assert len(engine.gpu.held) == 1
    assert not engine.gpu.handles


def test_an_engine_goes_once_its_last_pass_is_done() -> None:
    engine = backend()
    gpu, one_pass = engine.gpu, engine.passes(4)
    engine.profile([images(4)], 2)
    engine.call([OnFakeGpu(images(4))], 7)
    del engine
    gc.collect()
    one_pass(8)  # its weights are still there
    gpu.ends.clear()
    freed = gpu.free
    gpu.free = lambda address: (gpu.ends.append("free"), freed(address))
    del one_pass
    gc.collect()
    assert gpu.ends[0].startswith("wait for")
    assert set(gpu.ends[1:]) == {"free"}
    assert (gpu.held, gpu.handles) == ({}, set())


def test_memory_does_not_grow_with_changing_batches() -> None:
    engine = backend()
    for items in (1, 2, 3, 4, 5, 6, 7, 8, 9):
        engine.call([images(items)])
    held, size = len(engine.gpu.held), engine.num_bytes
    for _ in range(5):
        for items in (9, 1, 3, 8, 2, 5):
            engine.call([images(items)])
    gc.collect()
    assert (len(engine.gpu.held), engine.num_bytes) == (held, size)


def test_a_profile_has_a_row_a_step() -> None:
    rows = backend().profile([images(4)], 3)
    assert {name for name, _, _ in rows} == {"turn", "scale", "mean", "out"}
    with pytest.raises(InputError, match=r"batch 3 was asked for, the plan was built for \[1, 4\]"):
        backend().profile([images(3)], 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: [], "0 inputs given, expected 1"),
        (lambda: [images(4).astype(np.float64)], r"input 'x' is float64\[4, 8, 4, 4\], expected x float32\[batch, 8, 4, 4\]"),
        (lambda: [images(4)[:, :4]], r"input 'x' is float32\[4, 4, 4, 4\]"),
        (lambda: [images(4)[:0]], "the batch is empty"),
        (lambda: ["x"], "is a str, expected a NumPy array, a torch tensor or a DLPack object"),
        (lambda: [OnFakeGpu(images(4), device=1)], "is on GPU 1, expected GPU 0"),
    ],
)
def test_wrong_inputs_are_one_sentence(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        backend().call(make())


def test_one_input_of_two_is_named_so() -> None:
    two = dataclasses.replace(plan(), inputs=plan().inputs * 2)
    with pytest.raises(InputError, match="1 input given, expected 2: x"):
        backend(two).call([images(4)])


def test_an_output_of_the_whole_batch_is_not_computed_from_parts() -> None:
    source = plan()
    whole = dataclasses.replace(source, outputs=(dataclasses.replace(source.outputs[0], shape=(4, CHANNELS)),))
    engine = backend(whole)
    assert engine.call([images(4)]).shape == (4, CHANNELS)
    for items in (3, 5):
        with pytest.raises(InputError, match=f"batch {items} was given, and output 'y' is of the whole batch, expected one of "):
            engine.call([images(items)])


def test_streams_of_all_kinds() -> None:
    class Torch:
        cuda_stream = 5

    class Protocol:
        def __cuda_stream__(self) -> tuple[int, int]:
            return 0, 6

    assert [stream_of(s) for s in (4, Torch(), Protocol())] == [4, 5, 6]
    with pytest.raises(InputError, match="stream is a str, expected an address, a torch stream or an object with __cuda_stream__"):
        stream_of("default")


def test_kernels_of_other_sources_are_refused_unless_rebuilt() -> None:
    source = plan()
    source.kernels["reduce"] = "0" * 16
    with pytest.raises(PlanFormatError, match=r"its reduce kernels are of sources 0000000000000000, .*load it with rebuild=True"):
        backend(source)
    x = images(4)
    assert np.array_equal(backend(source, rebuild=True).call([x]), expected(x).astype(np.float32))


def test_a_step_that_needs_more_scratch_than_the_plan_has_is_refused() -> None:
    gpu = FakeGpu()

    def make(*arguments: Any, **options: Any) -> Any:
        made = gpu.make(*arguments, **options)
        made.workspace_bytes = 4096
        return made

    with pytest.raises(PlanFormatError, match="step 'turn' needs 4096 bytes of workspace here, batch 4 has 0; build the plan again"):
        CudaBackend(plan(), gpu=gpu, make=make).call([images(4)])


@pytest.mark.parametrize("installed", ["800", "810"])
def test_a_weight_that_another_cusparselt_compressed_is_refused(installed: str) -> None:
    gpu, source = FakeGpu(), plan((4,))
    steps = tuple(dataclasses.replace(step, library="cusparselt") for step in source.programs[0].steps)
    source = dataclasses.replace(source, programs=(dataclasses.replace(source.programs[0], steps=steps),), needs={"cusparselt": "800"})

    def make(*arguments: Any, **options: Any) -> Any:
        made = gpu.make(*arguments, **options)
        made.call = SimpleNamespace(version=installed)
        return made

    x, engine = images(4), CudaBackend(source, gpu=gpu, make=make)
    if installed == "800":
        assert np.array_equal(engine.call([x]), expected(x).astype(np.float32))
        return
    with pytest.raises(PlanFormatError, match="step 'turn' was compressed by cuSPARSELt 800, installed is 810; build the plan again"):
        engine.call([x])


class FakeDriver:
    """Contexts of GPUs as the driver keeps them: that of GPU n is 10 + n, 0 is none. Some other thread captures a graph."""

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED=2)

    def __init__(self, current: int) -> None:
        self.current, self.mode, self.retained = current, 0, 0

    def cuDeviceGet(self, device: int) -> tuple[int, int]:
        return 0, device

    def cuDevicePrimaryCtxRetain(self, handle: int) -> tuple[int, int]:
        self.retained += 1
        return 0, 10 + handle

    def cuThreadExchangeStreamCaptureMode(self, mode: int) -> tuple[int, int]:
        before, self.mode = self.mode, mode
        return 0, before

    def cuCtxGetCurrent(self) -> tuple[int, int]:
        return 0, self.current

    def cuCtxSetCurrent(self, context: int) -> tuple[int]:
        self.current = context
        return (0,)

    def cuMemAlloc(self, size: int) -> tuple[int, int]:
        assert self.mode == 2, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        return 0, 1000 * self.current

    def cuMemFree(self, address: int) -> tuple[int]:
        assert (address, self.mode) == (1000 * self.current, 2)
        self.freed = address
        return (0,)


@pytest.mark.parametrize("before", [0, 10, 11])
def test_the_callers_gpu_is_current_again_afterwards(monkeypatch: pytest.MonkeyPatch, before: int) -> None:
    driver = FakeDriver(before)
    for place in ("twofour.jit.driver", "twofour.runtime.backends.cuda.gpu"):
        monkeypatch.setattr(f"{place}.bindings", lambda: driver)
    monkeypatch.setattr("twofour.jit.driver._primary_context", cache(_primary_context.__wrapped__))
    monkeypatch.setattr("twofour.jit.driver.num_sms", lambda device: 132)
    gpu = Gpu(1)
    memory = Memory(gpu, 100)
    assert (memory.address, driver.current) == (11_000, before)
    with gpu.use():
        assert driver.current == 11
    assert driver.current == before
    del memory
    gc.collect()
    assert (driver.freed, driver.current, driver.mode, driver.retained) == (11_000, before, 0, 1)


def test_work_outside_a_call_is_put_on_the_engines_gpu() -> None:
    engine, x = backend(), images(4)
    engine.passes(4)(7)
    assert len(engine.profile([x], 1)) == 4
    y = engine.call([OnFakeGpu(x)])
    assert np.array_equal(y.numpy(), expected(x).astype(np.float32))
    assert not engine.gpu.is_current


class OnTorchsGpu(torch.Tensor):
    """A torch tensor whose host memory plays that of GPU 0; it tells on which of torch's streams it is copied and used."""

    is_cuda = True  # type: ignore[assignment]
    device = torch.device("cpu", 0)  # type: ignore[assignment]

    def contiguous(self) -> torch.Tensor:  # type: ignore[override]
        if not self.is_contiguous():
            TOLD.append(("copied", torch.cuda.current_stream(0).cuda_stream))
        return super().contiguous()


OnTorchsGpu.__module__ = "torch"
TOLD: list[tuple[str, int]] = []
KEPT: list[int] = []  # what the allocator may not reuse at once


@pytest.fixture
def torchs_streams(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Torch's current streams, the innermost last, with 5 the current one at first; `TOLD` and `KEPT` are empty."""
    entered = [SimpleNamespace(cuda_stream=5)]

    @contextmanager
    def entering(stream: Any) -> Iterator[None]:
        entered.append(stream)
        yield
        entered.pop()

    def empty(*args: Any, **options: Any) -> torch.Tensor:
        TOLD.append(("made", entered[-1].cuda_stream))
        return made(*args, **options).as_subclass(OnTorchsGpu)

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        TOLD.append((f"used {tensor.ndim}", stream.cuda_stream))
        KEPT.append(tensor.data_ptr())

    made = torch.empty
    TOLD.clear()
    KEPT.clear()
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: entered[-1])
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda at, device: SimpleNamespace(cuda_stream=at or 99))
    monkeypatch.setattr(torch.cuda, "stream", entering)
    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    return entered


@pytest.mark.parametrize("stream", [0, 7])
def test_torch_copies_and_allocates_in_the_order_of_the_stream_that_is_given(stream: int, torchs_streams: list[Any]) -> None:
    array = images(4)
    x = torch.from_numpy(np.ascontiguousarray(array.transpose(0, 2, 3, 1))).as_subclass(OnTorchsGpu).permute(0, 3, 1, 2)
    y = backend().call([x], stream)
    assert np.array_equal(y.numpy(), expected(array).astype(np.float32))
    assert [("copied", stream), ("made", stream), ("used 4", stream), ("used 2", 5)] == TOLD
    assert [x.data_ptr(), y.data_ptr()] == KEPT  # the copy is of the stream that reads it, the original is not
    TOLD.clear()
    backend().call([x])
    assert TOLD == [("copied", 5), ("made", 5)]
    assert len(torchs_streams) == 1


def two_inputs() -> Plan:
    """The plan with a second input, which no step reads."""
    return dataclasses.replace(plan(), inputs=(*plan().inputs, ValueSpec("z", "float32", (None, 2))))


def test_a_call_with_host_memory_or_borrowed_memory_among_its_inputs_waits(torchs_streams: list[Any]) -> None:
    engine, array, z = backend(two_inputs()), images(4), np.ones((4, 2), np.float32)
    x = torch.from_numpy(array).as_subclass(OnTorchsGpu)
    for second in (z, OnFakeGpu(z), torch.from_numpy(z)):
        engine.gpu.ends.clear()
        y = engine.call([x, second])
        assert engine.gpu.ends[-1] == "finish 5"
        assert np.array_equal(y.numpy(), expected(array).astype(np.float32))
    engine.gpu.ends.clear()
    engine.call([x, torch.from_numpy(z).as_subclass(OnTorchsGpu)])
    assert "finish 5" not in engine.gpu.ends


def test_a_torch_tensor_that_comes_second_is_read_in_the_order_of_its_stream(torchs_streams: list[Any]) -> None:
    engine, array = backend(two_inputs()), images(4)
    y = engine.call([array, torch.ones(4, 2).as_subclass(OnTorchsGpu)])
    assert np.array_equal(y, expected(array).astype(np.float32))
    assert engine.gpu.ends[-2:] == ["record 5", "finish 5"]


def test_after_a_call_that_failed_another_stream_still_waits() -> None:
    engine, x = backend(), OnFakeGpu(images(4))
    engine.call([x], 7)
    engine.gpu.ends.clear()

    def fail(graph: Any, stream: int) -> None:
        raise UnsupportedError("launching a graph failed")

    engine.gpu.launch_graph = fail
    with pytest.raises(UnsupportedError, match="launching a graph failed"):
        engine.call([x], 7)
    assert engine.gpu.ends == ["record 7"]


def test_freed_memory_is_freed_once() -> None:
    gpu = FakeGpu()
    memory = Memory(gpu, 100)
    del memory
    gc.collect()
    assert gpu.held == {}
