"""A whole engine without a GPU: import, passes, ways, assembly, the plan file, the runtime; steps computed by oracles."""

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from graphs import FOLDER, network, text_model
from oracle_gpu import OracleGpu, Serialised, first_ways

from twofour.builder.assemble import Assembler, forced
from twofour.builder.gpu import record_of
from twofour.builder.gpus import GPUS
from twofour.builder.lower import Front
from twofour.builder.memory import plan_memory
from twofour.builder.record import BuildRecord, LayerRecord
from twofour.builder.specs import spec_of
from twofour.exchange.inspect import parse_onnx_file
from twofour.plan import Plan
from twofour.runtime.backends.cuda import CudaBackend


@pytest.fixture(autouse=True)
def no_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are the oracle's: no library is opened for them."""
    monkeypatch.setattr(CudaBackend, "_handle", lambda self: None)


NETWORKS = sorted(path.name.removesuffix(".onnx.gz") for path in FOLDER.glob("*.onnx.gz"))
ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8}


def assembled(
    path: Path, batches: tuple[int, ...], precision: str, *, force: bool = False, apart: bool = False
) -> tuple[Plan, list[LayerRecord]]:
    model = parse_onnx_file(path)
    inputs = tuple(spec_of(v, "input") for v in model.graph.inputs)
    outputs = tuple(spec_of(v, "output") for v in model.graph.outputs)
    front, assembler, programs = Front(path), Assembler(inputs, outputs, 132), []
    rows: list[LayerRecord] = []
    for batch in batches:
        lowered = front.lower(batch, precision)
        if force:
            lowered = dataclasses.replace(lowered, calls=tuple(forced(call) for call in lowered.calls))
        chosen = first_ways(lowered, apart=apart)
        memory = plan_memory(lowered.buffers())
        programs.append(assembler.program(lowered, memory, chosen, [Serialised() for _ in chosen], [None] * len(chosen)))  # type: ignore[misc]
        rows += record_of("model", lowered, memory, chosen, GPUS["H200"]).layers
        assert memory.peak_bytes <= 1.1 * memory.bound_bytes
    needs = {"cublaslt": "1", "cudnn": "1", "cusparselt": "1"}
    plan = Plan("cuda", "cuda", precision, "auto", inputs, outputs, assembler.payload.tensors, batches, {}, tuple(programs), {}, needs)
    return plan, rows


CASES = [(name, "fp16", False) for name in NETWORKS] + [("resnet", "bf16", False), ("vit", "bf16", False), ("vit", "fp16", True)]


def record_of_batch(path: Path, batch: int, precision: str) -> BuildRecord:
    """The build report of the engine that `assembled` makes."""
    lowered = Front(path).lower(batch, precision)
    return record_of(path.name, lowered, plan_memory(lowered.buffers()), first_ways(lowered), GPUS["H200"])


@pytest.mark.parametrize(("name", "precision", "apart"), CASES)
def test_a_network_through_plan_and_runtime_gives_what_onnx_runtime_gives(name: str, precision: str, apart: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network(name), path)
    plan, rows = assembled(path, (2,), precision, apart=apart)
    in_place = [step for step in plan.programs[0].steps if "in0" in step.operands and step.operands["in0"] == step.operands["d"]]
    assert bool(in_place) == apart
    plan.save(tmp_path / "model.plan")
    gpu = OracleGpu()
    backend = CudaBackend(Plan.load(tmp_path / "model.plan"), gpu=gpu, make=gpu.make)
    shape = tuple(3 if size is None else size for size in plan.inputs[0].shape)
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    y = backend.call([x])
    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    wanted = np.concatenate([session.run(None, {session.get_inputs()[0].name: x[i : i + 1]})[0] for i in range(3)])
    # Every layer rounds its result once; the errors of L layers add as square roots, and a network amplifies some of them.
    layers = sum(bool(row.flops) for row in rows)
    limit = 8 * ROUNDING[precision] * np.sqrt(layers) * np.abs(wanted).max()
    assert np.abs(y - wanted).max() <= limit


def test_a_norm_of_zero_keeps_its_bound_in_half_precision(tmp_path: Path) -> None:
    # Swin V2 divides padded tokens, which are zero, by max(norm, 1e-12): fp16 has no such number.
    body = "n = ReduceL2 <keepdims=1> (x, a) m = Max(n, e) b = Expand(m, s) y = Div(x, b)"
    model = text_model("float[3,2,8] x", body, a=np.array([2]), e=np.float32(1e-12), s=np.array([3, 2, 8]))
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [3, 2, 8]))
    onnx.save(model, tmp_path / "model.onnx")
    plan, _ = assembled(tmp_path / "model.onnx", (3,), "fp16")
    gpu = OracleGpu()
    x = np.random.default_rng(0).standard_normal((3, 2, 8)).astype(np.float32)
    x[1, 1] = 0
    y = CudaBackend(plan, gpu=gpu, make=gpu.make, rebuild=True).call([x])
    wanted = x / np.maximum(np.linalg.norm(x, axis=2, keepdims=True), 1e-12)
    assert np.abs(y - wanted).max() <= 4 * ROUNDING["fp16"]


def test_forced_sparsity_makes_every_eligible_layer_sparse(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network("resnet"), path)
    plan, rows = assembled(path, (1,), "fp16", force=True)
    eligible = [row for row in rows if row.eligible]
    assert eligible
    assert all(row.sparse for row in eligible)
    plan.save(tmp_path / "model.plan")
    gpu = OracleGpu()
    backend = CudaBackend(Plan.load(tmp_path / "model.plan"), gpu=gpu, make=gpu.make)
    shape = tuple(size or 1 for size in plan.inputs[0].shape)
    assert np.isfinite(backend.call([np.zeros(shape, np.float32)])).all()


def test_grouped_convolutions_run_packed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network("resnet"), path)
    plan, rows = assembled(path, (1,), "fp16")
    steps = [step for step in plan.programs[0].steps if step.family == "grouped"]
    assert {step.problem.inputs // step.problem.groups for step in steps} == {8, 16, 32, 64}
    assert {step.problem.strides for step in steps} == {(1, 1), (2, 2)}
    assert sum(row.winner.startswith("twofour grouped ") for row in rows) == len(steps)


def test_equal_weights_of_two_batch_sizes_are_held_once(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(network("resnet"), path)
    one, _ = assembled(path, (1,), "fp16")
    two, _ = assembled(path, (1, 2), "fp16")
    weights = [{n for n in plan.payload if n.startswith(("weight.", "bias."))} for plan in (one, two)]
    assert weights[0] <= weights[1]
    assert len(weights[1]) < 2 * len(weights[0])
