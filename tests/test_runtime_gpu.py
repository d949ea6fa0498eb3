"""The GPU backend on a GPU: kinds of input and output, streams, threads, batches, embedded kernels, no torch (`pytest -m gpu`)."""

import dataclasses
import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from plan_samples import CHANNELS, SIDE, expected, plan
from test_import_walls import BLOCKER

import twofour
from twofour.errors import InputError
from twofour.jit.cache import default_cache
from twofour.jit.driver import num_sms
from twofour.kernels.launchable import kernel_source
from twofour.plan import Plan
from twofour.plan.record import cubin_name

pytestmark = pytest.mark.gpu


def images(batch: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(batch, CHANNELS, SIDE, SIDE, device="cuda", generator=g)


def check(y: object, x: torch.Tensor) -> None:
    wanted = expected(x.cpu().numpy())
    found = y.cpu().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)
    # Sixteen fp32 additions of fp16 values, then one division.
    assert np.abs(found - wanted).max() <= 20 * 2.0**-24 * np.abs(wanted).max()


def embedded() -> Plan:
    """The sample with its compiled kernels inside."""
    source, payload, programs = plan(), dict(plan().payload), []
    for program in source.programs:
        steps = []
        for step in program.steps:
            cubin = default_cache().get(kernel_source(step.family, step.problem, step.config, num_sms(0))).cubin
            payload[cubin_name(cubin)] = np.frombuffer(cubin, np.uint8)
            steps.append(dataclasses.replace(step, parts={"cubin": cubin_name(cubin)}))
        programs.append(dataclasses.replace(program, steps=tuple(steps)))
    return dataclasses.replace(source, programs=tuple(programs), payload=payload)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "sample.plan"
    embedded().save(path)
    return path


@pytest.mark.parametrize("copy_out", [True, False])
@pytest.mark.parametrize("items", [1, 2, 3, 4, 5, 9])
def test_any_number_of_items_of_any_kind(items: int, copy_out: bool) -> None:
    engine, x = twofour.load(plan(copy_out=copy_out)), images(items)
    for _ in range(3):
        y = engine(x)
        assert isinstance(y, torch.Tensor)
        assert y.device == x.device
        check(y, x)
        check(engine(x.cpu().numpy()), x)
        host = engine(x.cpu())
        assert host.device.type == "cpu"
        check(host, x)


def test_dlpack_comes_back_as_dlpack() -> None:
    class Producer:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __dlpack__(self, *, stream: int | None = None) -> object:
            return self.tensor.__dlpack__(stream=stream)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.tensor.__dlpack_device__()  # type: ignore[return-value]

    engine, x = twofour.load(plan()), images(4)
    y = engine(Producer(x))
    assert type(y).__name__ == "DeviceArray"
    check(torch.from_dlpack(y), x)
    check(y, x)


def test_torchs_current_stream_and_explicit_ones() -> None:
    engine, streams = twofour.load(plan()), [torch.cuda.Stream() for _ in range(2)]
    for turn in range(20):
        stream, x = streams[turn % 2], None
        with torch.cuda.stream(stream):
            # The input is still being made on this stream when the engine is called.
            x = images(4, turn)
            for _ in range(20):
                x = x + 1 - 1
            y = engine(x)
        stream.synchronize()
        check(y, x)
    x = images(4)
    torch.cuda.synchronize()
    y = engine(x, stream=streams[0])
    streams[0].synchronize()
    check(y, x)


def test_a_copy_that_torch_makes_is_on_the_stream_that_is_given() -> None:
    engine, stream = twofour.load(plan()), torch.cuda.Stream()
    engine(images(4))
    turned = images(4, 1).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    wanted = turned.contiguous()
    torch.cuda.synchronize()
    # What is current has much to do; the stream that is given does not wait for it.
    torch.cuda._sleep(200_000_000)
    y = engine(turned, stream=stream)
    stream.synchronize()
    with torch.cuda.stream(stream):
        y = y.clone()
    torch.cuda.synchronize()
    check(y, wanted)


def test_threads_agree_and_memory_comes_back() -> None:
    engine, inputs = twofour.load(plan()), [images(n, n) for n in (1, 2, 4, 7)]
    wanted, wrong = [engine(x) for x in inputs], []

    def work(shift: int) -> None:
        for turn in range(200):
            i = (turn + shift) % len(inputs)
            with torch.cuda.stream(streams[shift]):
                y = engine(inputs[i])
            streams[shift].synchronize()
            if not torch.equal(y, wanted[i]):
                wrong.append((shift, turn))

    streams = [torch.cuda.Stream() for _ in range(8)]
    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    del threads, thread
    gc.collect()
    free = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        extra = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in extra:
            thread.start()
        for thread in extra:
            thread.join()
        del extra, thread
        gc.collect()
    assert torch.cuda.mem_get_info()[0] >= free - (64 << 20)


@pytest.mark.parametrize("items", [4, 3])  # three are filled up to four, in buffers that are made during the capture
def test_inside_a_callers_graph(items: int) -> None:
    engine, x = twofour.load(plan()), images(items)
    engine(images(4))  # the engine's own graph is made before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = engine(x)
    x.copy_(images(items, 1))
    graph.replay()
    torch.cuda.synchronize()
    check(y, x)


def test_engines_are_called_and_go_while_another_graph_is_captured() -> None:
    """By default a capture of torch forbids every thread to allocate, free and wait, and one that does ends the capture."""
    engines, x, host = [twofour.load(plan()) for _ in range(3)], images(4), images(4, 1).cpu().numpy()
    for engine in engines:
        engine(x)
    found, other, graph = [], torch.zeros(8, device="cuda"), torch.cuda.CUDAGraph()

    def work() -> None:
        engines.pop()
        gc.collect()
        found.append(engines[0](host))  # makes this thread's context and captures a graph of its own

    del engine
    thread = threading.Thread(target=work)
    gc.collect()  # what other tests left is not asked about
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        other += 1
        thread.start()
        thread.join()
        del engines[1:]
        gc.collect()
    graph.replay()
    torch.cuda.synchronize()
    assert other.tolist() == [1] * 8
    check(found[0], torch.from_numpy(host))


def test_torch_goes_on_in_a_fresh_thread_after_a_call() -> None:
    engine, host, found = twofour.load(plan()), images(4).cpu().numpy(), []

    def work() -> None:
        y = engine(host)  # no context was current before, and none is after
        x = torch.from_numpy(host).cuda()
        found.extend([y, engine(x), float(torch.ones(3, device="cuda").sum())])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    y, on_gpu, three = found
    check(y, torch.from_numpy(host))
    check(on_gpu, torch.from_numpy(host))
    assert three == 3


def test_embedded_kernels_run_without_torch_and_without_a_compiler(file: Path, tmp_path: Path) -> None:
    blocker = BLOCKER.replace('{"torch", "onnx", "onnx_ir", "onnxscript"}', '{"torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime"}')
    code = blocker + (
        f"import numpy as np, twofour\ne = twofour.load({str(file)!r})\n"
        f"x = np.random.default_rng(0).standard_normal((4, {CHANNELS}, {SIDE}, {SIDE})).astype(np.float32)\n"
        f"np.savez({str(tmp_path / 'out.npz')!r}, x=x, y=e(x))\n"
    )
    environment = {"TWOFOUR_NO_COMPILE": "1", "TWOFOUR_CACHE_DIR": str(tmp_path / "empty")}
    import os

    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **environment})
    with np.load(tmp_path / "out.npz") as held:
        check(held["y"], torch.from_numpy(held["x"]))


def test_rebuilding_gives_the_same_to_the_bit(file: Path) -> None:
    x = images(4)
    assert torch.equal(twofour.load(file)(x), twofour.load(file, rebuild=True)(x))


def test_a_profile_of_a_gpu_plan() -> None:
    rows = twofour.load(plan()).profile(images(4), num_runs=5)
    assert {name for name, _, _ in rows} == {"turn", "scale", "mean", "out"}
    assert all(0 < us < 1e4 for _, _, us in rows)


def test_a_tensor_of_another_kind_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"input 'x' is float16\[4, 8, 4, 4\], expected x float32\[batch, 8, 4, 4\]"):
        twofour.load(plan())(images(4).half())
