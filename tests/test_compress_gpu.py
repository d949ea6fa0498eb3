"""`compress` for a GPU, on one made of host memory: engines, their check against torch, their build report; what falls back to the CPU."""

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from oracle_gpu import OracleGpu
from test_engine_assemble import assembled, record_of_batch
from test_report_gpu import FakeWatch

from twofour.builder import build
from twofour.builder.build import device_of
from twofour.cli.group import twofour as command_line
from twofour.compress import Compression, compress, engines
from twofour.compress.assemble import statement_of
from twofour.compress.checks import agreement_of, check_agreement
from twofour.compress.engines import Built, Target, build_engines, target_of
from twofour.compress.pipeline import found_device
from twofour.errors import InputError, MissingExtraError, UnsupportedError
from twofour.plan import Plan
from twofour.report import measure
from twofour.report.page import render
from twofour.report.record import Agreement
from twofour.runtime import Engine
from twofour.runtime.backends.cuda import CudaBackend
from twofour.sources import Task, resolve_model

# The package's function of this name hides the module.
BUILD = importlib.import_module("twofour.builder.build")
MACHINE = {"gpu": "NVIDIA H200", "driver": "1", "power_limit_w": 700.0}


def gpu_plan(path: Path, *, batches: tuple[int, ...], precision: str, **asked: Any) -> Plan:
    """In place of `build_gpu`: the first way of every layer, as if it had been the fastest."""
    plan, _ = assembled(path, tuple(batches), precision)
    records = [record_of_batch(path, batch, precision) for batch in batches]
    about = {
        "machine": MACHINE,
        "builds": [record.to_json() for record in records],
        "sparse_kernels": any(layer.sparse for record in records for layer in record.layers),
        "why_no_sparse_kernels": "no layer was faster with its zeros left out; the build report says so layer by layer",
    }
    return replace(plan, about=about)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[OracleGpu]:
    """Host memory as GPU 0, a Hopper; returns the GPUs that engines were made on."""
    made: list[OracleGpu] = []

    def backend(plan: Plan, num_threads: int | None, device: int, rebuild: bool) -> CudaBackend:
        made.append(OracleGpu(device))
        return CudaBackend(plan, device, gpu=made[-1], make=made[-1].make)

    monkeypatch.setattr(CudaBackend, "_handle", lambda self: None)
    monkeypatch.setattr("twofour.runtime.engine.make_backend", backend)
    monkeypatch.setattr(BUILD, "build_gpu", gpu_plan)
    monkeypatch.setattr("twofour.report.gpu.Stopwatch", FakeWatch)
    monkeypatch.setattr("twofour.report.gpu.CALLS_S", 0.05)
    monkeypatch.setattr(engines, "capability", lambda number: (9, 0))
    return made


@pytest.fixture
def on_gpu(gpu: list[OracleGpu], monkeypatch: pytest.MonkeyPatch) -> list[OracleGpu]:
    """Trainings on the CPU, since torch has no such GPU, and engines on the one made of host memory."""
    monkeypatch.setattr("twofour.compress.pipeline.target_of", lambda device: Target("cuda:0", "fp16", (1, 32)))
    return gpu


def test_a_run_on_a_gpu_ends_with_its_engines_checked_measured_and_explained(on_gpu: list[OracleGpu], tmp_path: Path) -> None:
    done: Compression = compress("demo", "digits", out=tmp_path / "run", epochs=1, permute=False)
    report = done.report
    assert (report.backend, Plan.load(done.out / "model.plan").precision) == ("cuda", "fp16")
    assert not report.sparse_kernels, "all that is 2:4 in this network are 3x3 convolutions"
    assert report.statement.startswith("This engine ran on NVIDIA H200 in fp16, without sparse kernels: no layer was faster")
    agreements = [check for check in report.checks if check.name.startswith("engine predicts")]
    assert [check.passed for check in agreements] == [True, True]
    assert all(re.search(r"allowed \d\.\de-\d\d in fp16", check.detail) for check in agreements)
    # The run's tolerance is no licence: fp16 rounds to 11 bits, and the outputs are of the order of 10.
    assert all(row.precision == "fp16" and 0 < row.largest_error <= (row.tolerance or 0) < 1 for row in report.agreement)
    assert {(row.variant, row.batch) for row in report.speed} == {("dense", 1), ("2:4", 1), ("dense", 32), ("2:4", 32)}
    assert all(row.backend == "cuda" and row.pass_ms and row.joules_per_item and row.clock_mhz == 1500.0 for row in report.speed)
    assert {(row.variant, row.batch) for row in report.memory} == {(row.variant, row.batch) for row in report.speed}
    assert {(row.variant, row.batch) for row in report.builds} == {("dense", 1), ("2:4", 1), ("dense", 32), ("2:4", 32)}
    assert {row.variant for row in report.profile} == {"dense", "2:4"}
    page = (done.out / "report.html").read_text(encoding="utf-8")
    assert page.count('id="build-table-') == 4
    assert "2:4, batch 32, fp16" in re.sub(r"</?data[^>]*>", "", page)
    assert "energy an item" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert page == render(report)
    shown = CliRunner().invoke(command_line, ["report", str(done.out)], catch_exceptions=False)
    assert not shown.exit_code
    assert not (done.out / "state").exists()


def test_a_run_stopped_after_its_build_keeps_engines_and_target(
    on_gpu: list[OracleGpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **asked: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("twofour.compress.pipeline.measure", stop)
        with pytest.raises(KeyboardInterrupt):
            compress("demo", "digits", out=tmp_path / "run", epochs=1, permute=False)
    monkeypatch.setattr("twofour.compress.pipeline.build_engines", stop)
    done = compress("demo", "digits", out=tmp_path / "run", epochs=1, permute=False, resume=True)
    assert done.report.backend == "cuda"
    assert {row.batch for row in done.report.speed} == {1, 32}


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ((8, 0), "GPU 1 has compute capability 8.0, the GPU engine's kernels need 9.0 (Hopper)"),
        (UnsupportedError("no NVIDIA driver was found"), "no NVIDIA driver was found"),
        (MissingExtraError("cuda.bindings is not installed"), "cuda.bindings is not installed"),
    ],
)
def test_a_gpu_that_cannot_run_the_engine_leaves_it_to_the_cpu_with_a_reason(found: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def capability(number: int) -> tuple[int, int]:
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[no-any-return]

    monkeypatch.setattr(engines, "capability", capability)
    target = target_of("cuda:1")
    assert (target.device, target.precision) == ("cpu", "fp32")
    assert target.why_cpu == f"The engines are the CPU's although the run was on a GPU: {why}"
    assert target_of("cpu") == Target()


def test_a_hopper_gets_engines_in_fp16_for_its_own_number(gpu: list[OracleGpu]) -> None:
    assert target_of("cuda:3") == Target("cuda:3", "fp16", engines.GPU_BATCHES)
    assert (target_of("cuda:3").number, target_of("cuda").device, Target().number) == (3, "cuda:0", 0)
    assert Target.from_json({"device": "cuda:3", "precision": "fp16", "batches": [1, 32, 256], "why_cpu": ""}) == target_of("cuda:3")


def test_a_network_that_the_gpu_engine_lacks_an_operator_for_gets_cpu_engines(
    sparse_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*arguments: Any, **asked: Any) -> Plan:
        raise UnsupportedError("build: the GPU engine lacks Einsum (node e1)")

    monkeypatch.setattr(BUILD, "build_gpu", refuses)
    built = build_engines(Target("cuda:0", "fp16", (1,)), {"dense": sparse_onnx, "2:4": sparse_onnx}, tmp_path / "cache")
    assert {plan.backend for plan in built.plans.values()} == {"onnxruntime"}
    assert statement_of(built).startswith(
        "The engines are the CPU's although the run was on a GPU: build: the GPU engine lacks Einsum (node e1). This engine ran on the CPU."
    )


def test_a_gpu_engine_says_whether_a_sparse_kernel_ran(gpu: list[OracleGpu], sparse_onnx: Path) -> None:
    plan = gpu_plan(sparse_onnx, batches=(1,), precision="fp16")
    plan.about["sparse_kernels"] = True
    built = Built({"2:4": plan}, Target("cuda:0", "fp16", (1,)))
    assert statement_of(built) == "This engine ran on NVIDIA H200 in fp16, with sparse kernels where they were faster."
    plan.about["sparse_kernels"] = False
    assert statement_of(Built({"2:4": plan}, Target("cuda:0", "fp16", (1,)))) == (
        "This engine ran on NVIDIA H200 in fp16, without sparse kernels: no layer was faster with its zeros left out; the build report "
        "says so layer by layer. Any difference between the two columns is noise."
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_agreement_is_judged_by_what_the_precision_rounds(
    precision: str, gpu: list[OracleGpu], pruned_net: Any, digits: Task, sparse_onnx: Path
) -> None:
    model = pruned_net[0].eval()
    engine = Engine(gpu_plan(sparse_onnx, batches=(32,), precision=precision))
    row = agreement_of("2:4", engine, model, digits)
    assert row.tolerance is not None
    assert check_agreement(row).passed, row
    # An engine of other weights is far outside, and so is one output wrong by a tenth of the largest.
    torch.manual_seed(1)
    other = agreement_of("2:4", engine, resolve_model("demo").make(10).eval(), digits)
    assert not check_agreement(other).passed
    with torch.no_grad():
        largest = float(model(digits.example_inputs()[0]).abs().max())

    class OneWrong:
        plan = engine.plan

        def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
            outputs: torch.Tensor = engine(*inputs)
            outputs[0, 0] += 0.5 * largest
            return outputs

    assert not check_agreement(agreement_of("2:4", OneWrong(), model, digits)).passed  # type: ignore[arg-type]


@pytest.mark.parametrize(("error", "passed"), [(0.9, True), (1.1, False), (float("nan"), False), (float("inf"), False)])
def test_an_engine_in_half_precision_passes_within_its_tolerance_only(error: float, passed: bool) -> None:
    row = Agreement(
        variant="2:4",
        engine_metric=90.0,
        torch_metric=90.0,
        differing_predictions=3,
        items=100,
        largest_error=error,
        precision="fp16",
        tolerance=1.0,
    )
    assert check_agreement(row).passed is passed


def test_measure_times_gpu_plans_by_their_protocol_and_refuses_a_mixture(gpu: list[OracleGpu], sparse_onnx: Path) -> None:
    plan = gpu_plan(sparse_onnx, batches=(1,), precision="fp16")
    (row,) = measure({"2:4": plan}, batch=(1,), device=2)
    assert (row.backend, row.pass_ms, row.power_w) == ("cuda", 1.0, 690.0)
    assert row.peak_bytes == sum(a.nbytes for n, a in plan.payload.items() if n.startswith(("weight", "bias", "constant"))) + (
        plan.programs[0].arena_bytes + plan.programs[0].workspace_bytes
    )
    assert gpu[-1].device == 2
    with pytest.raises(InputError, match="'a' runs on a GPU and others on the CPU, expected one kind; measure them apart"):
        measure({"a": plan, "b": build(sparse_onnx)}, batch=(1,))


def test_a_device_is_cpu_or_a_gpu_by_number(sparse_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [device_of(text) for text in ("cpu", "cuda", "cuda:2")] == [("cpu", 0), ("cuda", 0), ("cuda", 2)]
    for text in ("cuda:", "cpu:1", "cuda:x"):
        with pytest.raises(InputError, match=f"build: device '{text}' is unknown, expected cpu, cuda or cuda:N"):
            device_of(text)
    asked: dict[str, Any] = {}
    monkeypatch.setattr(BUILD, "build_gpu", lambda path, **more: asked.update(more))
    build(sparse_onnx, device="cuda:2", precision="fp16")
    assert asked["device"] == 2


@pytest.mark.parametrize("is_available", [False, True])
def test_auto_is_a_gpu_where_torch_sees_one(is_available: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    assert found_device("auto") == ("cuda" if is_available else "cpu")
    assert found_device("cuda:1") == "cuda:1"


def test_without_a_gpu_auto_is_the_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = compress("demo", "digits", out=tmp_path / "run", epochs=1, permute=False, measure_seconds=0.05, device="auto")
    assert done.report.backend == "onnxruntime"
    assert done.report.statement.startswith("This engine ran on the CPU.")
    assert done.report.builds == []
    assert json.loads((done.out / "run.json").read_text())["arguments"]["device"] == "cpu"


@pytest.mark.gpu
def test_on_a_hopper_the_demo_trains_and_runs_there(tmp_path: Path) -> None:
    done = compress("demo", "digits", out=tmp_path / "run", epochs=2, permute=False, device="auto")
    report = done.report
    assert report.backend == "cuda", report.statement
    assert [check.detail for check in report.checks if check.name.startswith("engine predicts") and not check.passed] == []
    assert {(row.variant, row.batch) for row in report.builds} == {(v, b) for v in ("dense", "2:4") for b in engines.GPU_BATCHES}
    assert all(row.pass_ms for row in report.speed)
    assert 'id="build-table-1"' in (done.out / "report.html").read_text(encoding="utf-8")
