"""What ONNX Runtime computes on the CPU within a GPU engine: it gives the network's outputs, and the build report says what it costs."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_gpu import FakeGpu
from graphs import text_model
from oracle_gpu import OracleGpu, Serialised, first_ways

from twofour.builder.assemble import Assembler
from twofour.builder.lower import Front, Lowered
from twofour.builder.memory import plan_memory
from twofour.builder.specs import spec_of
from twofour.errors import PlanFormatError, UnsupportedError
from twofour.exchange.inspect import parse_onnx_file
from twofour.kernels.host_part import HostPart
from twofour.plan import Plan
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
