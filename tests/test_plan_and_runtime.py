"""A plan survives its file, a damaged one is refused in one sentence, an engine runs without torch."""

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import text_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_import_walls import BLOCKER

import twofour
from twofour.errors import InputError, PlanFormatError, TwofourError, UnsupportedError
from twofour.plan import Plan


@pytest.fixture(scope="module")
def plan(sparse_onnx: Path) -> Plan:
    return twofour.build(sparse_onnx, batch=(1, 32))


@pytest.fixture(scope="module")
def plan_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plan") / "model.plan"
    plan.save(path)
    return path


def test_a_plan_survives_its_file(plan: Plan, plan_file: Path) -> None:
    again = Plan.load(plan_file)
    assert (again.inputs, again.outputs, again.batches, again.about) == (plan.inputs, plan.outputs, (1, 32), plan.about)
    assert np.array_equal(again.payload["onnx"], plan.payload["onnx"])
    again.save(plan_file.with_name("again.plan"))
    assert plan_file.with_name("again.plan").read_bytes() == plan_file.read_bytes()


def test_a_plan_says_that_it_has_no_sparse_kernels(plan: Plan) -> None:
    assert plan.about["sparse_kernels"] is False
    assert plan.about["weights_24"] == 8


def rewritten(plan_file: Path, folder: Path, change: Any) -> Path:
    """The plan with its header changed by `change(header)`."""
    from safetensors import safe_open

    with safe_open(plan_file, "np") as file:
        metadata = dict(file.metadata())
    header = json.loads(metadata["twofour.plan"])
    header = change(header) or header
    path = folder / "changed.plan"
    save_file(load_file(plan_file), path, {"twofour.plan": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(schema=99), r"has schema 99, this version reads 1; build it again"),
        (lambda h: h.update(backend="abacus"), r"asks for the backend 'abacus', this version has \['onnxruntime'"),
        (lambda h: h.pop("inputs"), "its description cannot be read"),
        (lambda h: h["inputs"][0].update(shape=[None, -3]), "its description cannot be read"),
        (lambda h: h["inputs"][0].update(dtype="object_"), "its description cannot be read"),
        (lambda h: [1], "its description cannot be read"),
        (lambda h: h.update(device="moon"), r"asks for the device 'moon', this version has \['cpu', 'cuda'\]"),
        (lambda h: h.update(precision="fp3"), r"asks for the precision 'fp3'"),
        (lambda h: h.update(batches=[True]), "its description cannot be read"),
    ],
)
def test_a_damaged_description_is_one_sentence(plan_file: Path, tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(PlanFormatError, match=message) as caught:
        Plan.load(rewritten(plan_file, tmp_path, change))
    assert "\n" not in str(caught.value)


def test_files_that_are_no_plan(tmp_path: Path, plan_file: Path) -> None:
    with pytest.raises(PlanFormatError, match="does not exist"):
        Plan.load(tmp_path / "none.plan")
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "weights.plan")
    with pytest.raises(PlanFormatError, match="is a safetensors file but no plan; make one with twofour build"):
        Plan.load(tmp_path / "weights.plan")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch" * 8)
    with pytest.raises(PlanFormatError, match=r"is damaged, or was never one: .*; make one with twofour build"):
        Plan.load(tmp_path / "model.onnx")
    header = json.dumps({"w": {"dtype": "\x1b[2J", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "escape.plan").write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(PlanFormatError, match=r"is damaged, .*\?\[2J") as caught:
        Plan.load(tmp_path / "escape.plan")
    assert str(caught.value).isprintable(), "a terminal would obey it"
    (tmp_path / "cut.plan").write_bytes(plan_file.read_bytes()[:100])
    with pytest.raises(PlanFormatError, match="is damaged"):
        Plan.load(tmp_path / "cut.plan")
    (tmp_path / "huge.plan").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(PlanFormatError, match="is damaged"):
        Plan.load(tmp_path / "huge.plan")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2500), st.integers(0, 255)), min_size=1, max_size=6))
def test_a_mutated_plan_loads_or_is_refused_but_never_crashes(plan_file: Path, tmp_path: Path, edits: list[tuple[int, int]]) -> None:
    data = bytearray(plan_file.read_bytes())
    for position, value in edits:
        data[position] = value
    path = tmp_path / "mutated.plan"
    path.write_bytes(data)
    refused: list[str] = []
    try:
        assert Plan.load(path).backend == "onnxruntime"
    except PlanFormatError as error:
        refused.append(str(error))
    assert all("\n" not in sentence for sentence in refused)


def test_a_plan_with_a_broken_model_inside_is_refused(plan: Plan) -> None:
    from dataclasses import replace

    with pytest.raises(PlanFormatError, match="ONNX Runtime refuses the model inside"):
        twofour.load(replace(plan, payload={"onnx": plan.payload["onnx"][:1000]}))


def test_the_output_comes_in_the_kind_of_the_input(plan: Plan) -> None:
    engine = twofour.load(plan)
    x = np.random.default_rng(0).standard_normal((3, 1, 8, 8)).astype(np.float32)
    ours = engine(x)
    assert isinstance(ours, np.ndarray)
    as_torch = engine(torch.from_numpy(x))
    assert isinstance(as_torch, torch.Tensor)
    assert np.array_equal(as_torch.numpy(), ours)

    class Foreign:
        def __dlpack__(self, **kwargs: Any) -> Any:
            return x.__dlpack__(**kwargs)

        def __dlpack_device__(self) -> Any:
            return x.__dlpack_device__()

    assert np.array_equal(engine(Foreign()), ours)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), r"0 inputs given, expected 1: x float32\[batch, 1, 8, 8\]"),
        ((np.zeros((2, 1, 8, 8)),), r"input 'x' is float64\[2, 1, 8, 8\], expected x float32\[batch, 1, 8, 8\]"),
        ((np.zeros((2, 1, 9, 8), np.float32),), r"input 'x' is float32\[2, 1, 9, 8\], expected"),
        ((np.zeros((0, 1, 8, 8), np.float32),), "the batch is empty, expected at least one item"),
        ((torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16),), r"input 'x' is bfloat16\[2, 1, 8, 8\] in torch.strided, expected x float32"),
        ((torch.zeros(2, 1, 8, 8).to_sparse(),), r"input 'x' is float32\[2, 1, 8, 8\] in torch.sparse_coo, expected .* in torch.strided"),
        (([1, 2],), "input 'x' is a list, expected a NumPy array, a torch tensor or a DLPack object"),
    ],
)
def test_wrong_inputs_get_one_sentence(plan: Plan, inputs: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        twofour.load(plan)(*inputs)


def test_one_engine_serves_several_threads(plan: Plan) -> None:
    engine = twofour.load(plan, num_threads=1)
    inputs = [engine.random_inputs(1 + i % 3, seed=i)[0] for i in range(12)]
    expected = [engine(x) for x in inputs]
    wrong: list[int] = []

    def work(offset: int) -> None:
        for i in range(offset, 12, 4):
            for _ in range(10):
                if not np.array_equal(engine(inputs[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_profile_covers_every_convolution(plan: Plan) -> None:
    engine = twofour.load(plan)
    rows = engine.profile(*engine.random_inputs(4), num_runs=3)
    assert sum(operation == "Conv" for _, operation, _ in rows) == 9
    assert all(microseconds >= 0 for _, _, microseconds in rows)


def test_an_engine_runs_without_torch_and_onnx(plan_file: Path) -> None:
    code = BLOCKER + f"import twofour; e = twofour.load({str(plan_file)!r}); assert e(*e.random_inputs(5)).shape == (5, 10)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"precision": "fp61"}, InputError, r"precision 'fp61' is unknown, expected one of .*did you mean 'fp16'\?"),
        ({"precision": "fp16"}, UnsupportedError, "precision 'fp16' is not available on the CPU backend; use fp32"),
        ({"sparsity": "force"}, UnsupportedError, "needs a GPU with Sparse Tensor Cores"),
        ({"sparsity": "yes"}, InputError, "sparsity 'yes' is unknown"),
        ({"device": "tpu"}, InputError, "device 'tpu' is unknown"),
    ],
)
def test_build_refuses_in_one_sentence(sparse_onnx: Path, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        twofour.build(sparse_onnx, **options)


def test_one_input_of_two_is_named_so(tmp_path: Path) -> None:
    made = text_model("float[N,8] x, float[N,8] z", "y = Add(x, z)")
    made.graph.output[0].type.CopyFrom(made.graph.input[0].type)
    onnx.save(made, tmp_path / "m.onnx")
    with pytest.raises(InputError, match=r"engine: 1 input given, expected 2: x float32\[batch, 8\], z"):
        twofour.load(twofour.build(tmp_path / "m.onnx"))(np.zeros((1, 8), np.float32))


def test_a_fixed_batch_and_a_dynamic_inner_axis(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    def model(shape: list[int | str]) -> Path:
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", info[:1], info[1:])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
        return tmp_path / "m.onnx"

    fixed = twofour.load(twofour.build(model([2, 3])))
    assert fixed(np.full((2, 3), -1, np.float32)).tolist() == [[0.0] * 3] * 2
    with pytest.raises(InputError, match=r"expected x float32\[2, 3\]"):
        fixed(np.zeros((1, 3), np.float32))
    with pytest.raises(UnsupportedError, match=r"input 'x' has the dynamic axis 1 \(width\); only the batch"):
        twofour.build(model(["batch", "width"]))


@pytest.mark.parametrize(
    ("inputs", "body", "message"),
    [
        ("float[0,8] x", "y = Relu(x)", r"build: input 'x' is empty, its shape is \[0, 8\]; export the model with real sizes"),
        ("string[N,8] x", "y = Identity(x)", r"build: x object\[batch, 8\] is of a type that a plan cannot hold, expected one of \['bool'"),
        ("bfloat16[N,8] x", "y = Identity(x)", r"build: x bfloat16\[batch, 8\] is of a type that a plan cannot hold"),
    ],
)
def test_what_a_plan_cannot_describe_is_not_built(inputs: str, body: str, message: str, tmp_path: Path) -> None:
    made = text_model(inputs, body)
    made.graph.output[0].type.CopyFrom(made.graph.input[0].type)
    onnx.save(made, tmp_path / "m.onnx")
    with pytest.raises(TwofourError, match=message):
        twofour.build(tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "change", [lambda h: h["inputs"][0].update(name="z"), lambda h: h["outputs"][0].update(shape=[None, 9]), lambda h: h.update(inputs=[])]
)
def test_a_plan_that_describes_another_model_than_it_holds_is_refused(plan_file: Path, tmp_path: Path, change: Any) -> None:
    with pytest.raises(PlanFormatError, match=r"it describes the (in|out)puts .*, the model inside has .*; build it again"):
        twofour.load(rewritten(plan_file, tmp_path, change))


def test_a_model_that_onnx_runtime_refuses_is_not_built(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], domain="foo.bar")], "g", info[:1], info[1:])
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("foo.bar", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match=r"ONNX Runtime refuses '.*m.onnx'"):
        twofour.build(tmp_path / "m.onnx")


def test_a_fixed_batch_is_never_measured_as_another(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 8]) for n in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", info[:1], info[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    with pytest.raises(InputError, match="batch 32 was asked for, the plan takes batches of 1 only"):
        twofour.measure(tmp_path / "m.onnx", batch=[32], seconds=0.05, memory=False)
