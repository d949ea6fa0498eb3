"""What ONNX Runtime computes on the CPU within a GPU engine: it gives the network's outputs, and the build report says what it costs."""

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_gpu import FakeGpu
from graphs import text_model
from oracle_gpu import OracleGpu, Serialised, first_ways
from rich.console import Console

import twofour.builder.gpu as gpu_build
import twofour.builder.tactics.bench as bench_module
from twofour.builder import BuildRecord, build, measure_gain
from twofour.builder.assemble import Assembler
from twofour.builder.gpu import record_of
from twofour.builder.gpus import GPUS
from twofour.builder.lower import Front, Lowered
from twofour.builder.memory import plan_memory
from twofour.builder.record import Timed, fallback_cost
from twofour.builder.specs import spec_of
from twofour.builder.storage import Place
from twofour.builder.tactics.bench import Bench
from twofour.builder.tactics.hosted import LEAST, random_array, time_fallbacks
from twofour.cli.tables import print_build
from twofour.errors import InputError, PlanFormatError, UnsupportedError
from twofour.exchange.inspect import parse_onnx_file
from twofour.kernels.host_part import NUMPY, HostPart
from twofour.plan import Plan
from twofour.report.build_page import render_build
from twofour.runtime.backends.cuda import CudaBackend
from twofour.runtime.backends.cuda.fallback import Fallback

BODY = "a = Softsign(x) b = MatMul(a, w) c = Relu(b) d = Softsign(c) y = Relu(d)"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of two operators that the engine lacks, around a product and an activation."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) / 8
    model = text_model("float[N,64] x", BODY, "float[N,64] y", w=weight)
    made = tmp_path_factory.mktemp("fallback") / "net.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), made)
    return made


def built(path: Path, lowered: Lowered, precision: str) -> Plan:
    model = parse_onnx_file(path)
    inputs = tuple(spec_of(v, "input") for v in model.graph.inputs)
    outputs = tuple(spec_of(v, "output") for v in model.graph.outputs)
    assembler, chosen = Assembler(inputs, outputs, 132), first_ways(lowered)
    program = assembler.program(lowered, plan_memory(lowered.buffers()), chosen, [Serialised() for _ in chosen], [None] * len(chosen))  # type: ignore[misc]
    needs = {"onnxruntime": "1"}
    return Plan("cuda", "cuda", precision, "auto", inputs, outputs, assembler.payload.tensors, (program.batch,), {}, (program,), {}, needs)


@pytest.mark.parametrize(("precision", "rounding"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_an_engine_with_fallbacks_gives_what_onnx_runtime_gives(precision: str, rounding: float, path: Path, tmp_path: Path) -> None:
    built(path, Front(path, fallback=True).lower(4, precision), precision).save(tmp_path / "net.plan")
    gpu = OracleGpu()
    engine = CudaBackend(Plan.load(tmp_path / "net.plan"), gpu=gpu, make=gpu.make)
    x = np.random.default_rng(1).standard_normal((6, 64)).astype(np.float32)
    wanted = onnxruntime.InferenceSession(path.read_bytes()).run(None, {"x": x})[0]
    # Every value that passes between two steps is rounded once: softsign's, the product's and the second softsign's.
    assert np.abs(engine.call([x]) - wanted).max() <= 8 * rounding * np.sqrt(3) * np.abs(wanted).max()
    assert "graph" not in gpu.log


def part_model(body: str, inputs: str = "float[4,8] x", outputs: str = "float[] y", **arrays: Any) -> bytes:
    return text_model(inputs, body, outputs, **arrays).SerializeToString()


def test_a_part_takes_and_gives_what_memory_holds() -> None:
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float16)
    (half,) = HostPart("s", part_model("y = Softsign(x)"), [("x", "fp16")], [("y", "fp16")]).run([x])
    wanted = (x.astype(np.float32) / (1 + np.abs(x.astype(np.float32)))).astype(np.float16)
    assert half.dtype == np.float16
    assert np.abs(half.view(np.int16) - wanted.view(np.int16)).max() <= 1  # ulp
    (bits,) = HostPart("s", part_model("y = Neg(x)"), [("x", "bf16")], [("y", "bf16")]).run([np.full((4, 8), 0x3F80, np.uint16)])
    assert (bits == 0xBF80).all()
    (scalar,) = HostPart("s", part_model("y = ReduceSum <keepdims=0> (x)"), [("x", "fp32")], [("y", "fp32")]).run([x.astype(np.float32)])
    assert scalar.shape == ()


def test_a_part_that_onnx_runtime_refuses_or_fails_in_is_said() -> None:
    with pytest.raises(UnsupportedError, match="ONNX Runtime refuses the fallback 's': "):
        HostPart("s", b"no model", [("x", "fp32")], [("y", "fp32")])
    model = part_model("y = Gather(t, x)", "int64[2] x", t=np.zeros(3, np.float32))
    with pytest.raises(UnsupportedError, match="ONNX Runtime failed in 's': "):
        HostPart("s", model, [("x", "int64")], [("y", "fp32")]).run([np.array([5, 0])])


def test_a_plan_whose_part_is_no_model_is_refused(path: Path) -> None:
    program = built(path, Front(path, fallback=True).lower(1, "fp16"), "fp16").programs[0]
    step = next(step for step in program.steps if step.family == "fallback")
    with pytest.raises(PlanFormatError, match="plan: ONNX Runtime refuses the fallback 'Softsign_0'"):
        Fallback(step, program.values, b"no model", FakeGpu())


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose GPU is host memory; `bench.watch.gpu.log` tells what was copied, and how much."""
    gpu = FakeGpu()
    monkeypatch.setattr(FakeGpu, "is_current", True)  # a stopwatch makes it so

    def said(what: str) -> Callable[[int, int, int, int], None]:
        def copied(to: int, source: int, size: int, stream: int) -> None:
            gpu.copy(to, source, size, stream)
            gpu.log[-1] = f"{what} {size}"

        return copied

    driver = SimpleNamespace(cuMemcpyDtoHAsync=said("to host"), cuMemcpyHtoDAsync=said("to GPU"))
    monkeypatch.setattr(bench_module, "bindings", lambda: driver)
    monkeypatch.setattr(bench_module, "check", lambda result, what: result)
    monkeypatch.setattr(bench_module, "Buffer", lambda size: SimpleNamespace(pointer=gpu.alloc(size)))
    watch = SimpleNamespace(gpu=gpu, stream=gpu.stream(), synchronize=lambda: gpu.log.append("wait"))
    watch.meter = SimpleNamespace(machine=lambda: {"gpu": "NVIDIA H200", "driver": "1", "power_limit_w": 700.0})
    return Bench(watch)  # type: ignore[arg-type]


@pytest.fixture
def lowered(path: Path) -> Lowered:
    return Front(path, fallback=True).lower(4, "fp16")


def record_with(lowered: Lowered, hosted: list[Timed]) -> BuildRecord:
    return record_of("net.onnx", lowered, plan_memory(lowered.buffers()), first_ways(lowered), GPUS["H200"], hosted)


def test_a_fallback_is_timed_as_the_part_and_its_copies(lowered: Lowered, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    copies_s, part_s = 0.002, 0.004
    copies, run = bench.copies, HostPart.run

    def slow_copies(to_host: Sequence[int], to_gpu: Sequence[int]) -> Callable[[], object]:
        copy = copies(to_host, to_gpu)
        return lambda: (time.sleep(copies_s), copy())

    monkeypatch.setattr(HostPart, "run", lambda part, arrays: (time.sleep(part_s), run(part, arrays))[1])
    asked: list[tuple[int, int, str]] = []
    monkeypatch.setattr(bench, "copies", slow_copies)
    hosted = time_fallbacks(lowered, bench, lambda *where: asked.append(where))
    assert [one.winner for one in hosted] == ["onnxruntime"] * 2
    assert asked == [(0, 2, "Softsign_0"), (1, 2, "Softsign_3")]
    for one in hosted:
        copy_us = one.copy_us or 0.0
        assert copy_us >= 1e6 * copies_s
        assert one.times_us["onnxruntime"] - copy_us >= 1e6 * part_s
    # Both take and give [4, 64] in fp32, and each copy is waited for.
    assert bench.watch.gpu.log[:4] == ["to host 1024", "wait", "to GPU 1024", "wait"]  # type: ignore[attr-defined]
    assert bench.watch.gpu.log.count("to host 1024") >= 2 * LEAST  # type: ignore[attr-defined]


def test_the_report_has_the_time_and_share_of_what_the_cpu_computes(lowered: Lowered) -> None:
    hosted = [Timed("onnxruntime", {"onnxruntime": us}, {}, copy_us=us / 4) for us in (12.0, 36.0)]
    record = record_with(lowered, hosted)
    others = len(record.layers) - 2  # a microsecond each
    assert record.total_us == 48 + others
    found = [layer for layer in record.layers if layer.family == "fallback"]
    assert [(layer.us, layer.copy_us, layer.share) for layer in found] == [(us, us / 4, us / record.total_us) for us in (12.0, 36.0)]
    assert [(layer.shape, layer.num_bytes, layer.over_roofline) for layer in found] == [("4×64 → 4×64", 2 * 4 * 64 * 4, None)] * 2
    assert BuildRecord.from_json(json.dumps(record.to_json())) == record
    cost = fallback_cost(record)
    assert (cost.layers, cost.untimed, cost.us, cost.copy_us, cost.share) == (2, 0, 48.0, 12.0, 48 / record.total_us)  # type: ignore[union-attr]
    console = Console(width=500, record=True)
    print_build(record, console)
    text = console.export_text()
    assert re.search(r"Softsign_0 +│ 4×64 → 4×64 +│ – +│ 2.05 kB +│ no +│ onnxruntime +│ 12.0 ", text)
    assert "the engine lacks it: ONNX Runtime on the CPU, 9.0 µs of it copies to the host and back" in text
    assert f"computes 2 layers on the CPU: 48.0 µs, {100 * 48 / record.total_us:.1f} % of all layers' time, 12.0 µs of it copies" in text
    page = render_build(record)
    assert '<data value="48.0">48.0\u00a0µs</data>' in page
    assert "Softsign_3: 36.0 µs, onnxruntime, of it copies 9.00 µs" in page
    assert "var(--control)" in page
    assert "ONNX Runtime on the CPU, copies included" in page


def test_a_report_without_fallbacks_does_not_speak_of_them(lowered: Lowered) -> None:
    record = record_with(lowered, [Timed("onnxruntime", {"onnxruntime": 1.0}, {}, copy_us=0.5)] * 2)
    record = replace(record, layers=tuple(layer for layer in record.layers if layer.family != "fallback"))
    assert fallback_cost(record) is None
    assert "ONNX Runtime" not in render_build(record)


def test_a_part_that_fails_on_random_inputs_says_so(lowered: Lowered, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(part: HostPart, arrays: Any) -> None:
        raise UnsupportedError("ONNX Runtime failed in 'Softsign_0': indices out of range")

    monkeypatch.setattr(HostPart, "run", fail)
    record = record_with(lowered, time_fallbacks(lowered, bench))
    first = record.layers[0]
    assert (first.us, first.share, first.winner) == (None, None, "onnxruntime")
    assert first.left_out == {"onnxruntime": "not timed: on random inputs ONNX Runtime failed in 'Softsign_0': indices out of range"}
    assert "ONNX Runtime computes 2 layers on the CPU (2 not timed): 0.0 µs" in str(fallback_cost(record))
    assert "2</data> not timed)" in render_build(record)


def test_random_inputs_are_what_memory_holds() -> None:
    rng = np.random.default_rng(0)
    for dtype, kind in NUMPY.items():
        array = random_array(Place("x", 0, (3, 4), (4, 1), dtype), rng)
        assert (array.shape, array.dtype) == ((3, 4), np.dtype(kind))
    assert random_array(Place("x", 0, (), (), "fp32"), rng).shape == ()


def test_a_build_and_a_measured_gain_count_the_fallbacks(path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import twofour.report.gpu  # noqa: F401 - what imports the stopwatch must have done so before it is replaced

    monkeypatch.setattr("twofour.timing.gpu.Stopwatch", lambda device: bench.watch)
    monkeypatch.setattr(gpu_build, "require_gpu", lambda device=0: (9, 0))
    monkeypatch.setattr(gpu_build, "num_sms", lambda device: 132)
    monkeypatch.setattr(gpu_build, "choose_all", lambda calls, **asked: first_ways(replace(lowered_of(path), calls=tuple(calls))))
    monkeypatch.setattr(Bench, "prepare", lambda self, way: Serialised())
    monkeypatch.setattr(gpu_build, "_made_on_gpu", lambda lowered, chosen, prepared: [None] * len(chosen))
    plan = build(path, batch=(2, 4), device="cuda", fallback=True)
    assert plan.whole == ""
    assert plan.needs["onnxruntime"] == onnxruntime.__version__
    records = [BuildRecord.from_json(json.dumps(data)) for data in plan.about["builds"]]
    (pair,) = measure_gain(path, batches=(4,), precision="fp16", fallback=True)
    for record in (*records, *pair):
        hosted = [layer for layer in record.layers if layer.family == "fallback"]
        assert len(hosted) == 2
        assert all(0 < (layer.copy_us or 0) < (layer.us or 0) and layer.share for layer in hosted)
        assert sum(layer.share or 0.0 for layer in record.layers) == pytest.approx(1.0)
    dense, sparse = ([layer.us for layer in record.layers if layer.copy_us] for record in pair)
    assert dense == sparse, "the CPU's part is the same in both, and timed once"


def test_a_build_reads_halves_refuses_outputs_of_other_shapes_and_knows_items_that_depend_on_each_other(
    tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import twofour.report.gpu  # noqa: F401 - as above

    monkeypatch.setattr("twofour.timing.gpu.Stopwatch", lambda device: bench.watch)
    monkeypatch.setattr(gpu_build, "require_gpu", lambda device=0: (9, 0))
    monkeypatch.setattr(gpu_build, "num_sms", lambda device: 132)
    monkeypatch.setattr(gpu_build, "choose_all", lambda calls, **asked: first_ways(SimpleNamespace(calls=tuple(calls))))  # type: ignore[arg-type]
    monkeypatch.setattr(Bench, "prepare", lambda self, way: Serialised())
    monkeypatch.setattr(gpu_build, "_made_on_gpu", lambda lowered, chosen, prepared: [None] * len(chosen))
    model = text_model("float[N,8] x", "a = MatMul(x, w) m = ReduceMean(a, axis) y = Sub(a, m)", w=np.eye(8, dtype=np.float32), axis=[0])
    model.graph.output[0].type.CopyFrom(model.graph.input[0].type)
    onnx.save(model, tmp_path / "net.onnx")
    assert (
        build(tmp_path / "net.onnx", batch=4, device="cuda").whole
        == "the network computes an item of a batch from the others too, or from their number"
    )
    half = text_model("float16[N,8] x", "y = MatMul(x, w)", "float16[N,8] y", w=np.eye(8, dtype=np.float16))
    half.graph.output[0].type.CopyFrom(half.graph.input[0].type)
    onnx.save(half, tmp_path / "half.onnx")
    made = build(tmp_path / "half.onnx", batch=4, device="cuda")
    assert (str(made.inputs[0]), str(made.outputs[0]), made.whole) == ("x float32[batch, 8]", "y float32[batch, 8]", "")
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 16
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(InputError, match=r"declares the output y float32\[batch, 16\] and computes \[4, 8\] of a batch of 4"):
        build(tmp_path / "net.onnx", batch=4, device="cuda")


def lowered_of(path: Path) -> Lowered:
    return Front(path, fallback=True).lower(4, "fp16")
