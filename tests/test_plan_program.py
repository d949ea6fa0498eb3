"""A GPU plan survives its file; each kind of damage is refused in one sentence; thousands of random ones do nothing else."""

import copy
import dataclasses
import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twofour.errors import InputError, PlanFormatError
from twofour.kernels import attention, conv, families, gemm, matmul, patches, pool, reduce
from twofour.kernels.records import from_plain, to_plain
from twofour.plan import Plan
from twofour.plan.program import Value
from twofour.plan.record import KEY, cubin_name

sys.path.insert(0, str(Path(__file__).parent / "attacks"))
import plan_mutations
from plan_mutations import CHOSEN, attack, damage, peak_of_loading, places, with_header
from plan_samples import CHANNELS, plan, program


@pytest.fixture
def file(tmp_path: Path) -> Path:
    plan().save(tmp_path / "p.plan")
    return tmp_path / "p.plan"


def changed(file: Path, change: Any) -> Path:
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][KEY])
    change(header)
    file.write_bytes(with_header(data, header))
    return file


def test_the_page_states_the_limit_of_the_workspace() -> None:
    page = (Path(__file__).parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")
    assert f"the workspace has at most {families.WORKSPACE_CAP >> 30} GiB" in page
    assert families.WORKSPACE_CAP % (1 << 30) == 0


def test_a_gpu_plan_survives_its_file_to_the_byte(file: Path) -> None:
    again = Plan.load(file)
    assert again.programs == plan().programs
    assert (again.kernels, again.needs) == (plan().kernels, {})
    again.save(file.with_name("again.plan"))
    assert file.with_name("again.plan").read_bytes() == file.read_bytes()


PROBLEMS = [
    ("gemm", gemm.Problem(7, 64, 128, epilogue=gemm.Epilogue("relu", bias=True))),
    ("matmul", matmul.Problem(12, 197, 64, 197, scale=0.125, b_strides=(0, 1, 197))),
    ("conv", conv.Problem(2, 56, 56, 64, 128, (3, 3), (2, 2), (1, 1, 1, 1), epilogue=conv.Epilogue("relu6", bias=True))),
    ("depthwise", conv.Problem(2, 56, 56, 64, 64, (3, 3), (2, 2), (1, 1, 1, 1), groups=64, epilogue=conv.Epilogue("relu6", bias=True))),
    ("attention", attention.Problem(2, 12, 197, 197, 64, 0.125)),
    ("pool", pool.Problem(2, 112, 112, 64, "max", (3, 3), (2, 2), (1, 1, 1, 1))),
    ("resize", pool.ResizeProblem(2, 33, 33, 21, 129, 129, scales=(3.9, 3.9))),
    ("patches", patches.Problem(2, 224, 224, 3, 115, 115, 16, (150528, 224, 1, 50176), (2, 2), 4, 4)),
    ("grouped", conv.Problem(2, 14, 14, 128, 128, (3, 3), pads=(1, 1, 1, 1), groups=4, epilogue=conv.Epilogue("relu", bias=True))),
    ("reduce", reduce.Problem(3, 49, "mean", inner=2048)),
    ("pointwise", program(4).steps[1].problem),
]


@pytest.mark.parametrize(("family", "problem"), PROBLEMS, ids=[f for f, _ in PROBLEMS])
def test_problems_survive_json(family: str, problem: Any) -> None:
    assert families.read_problem(family, json.loads(json.dumps(to_plain(problem))), "p") == problem
    with pytest.raises(InputError, match=r"p has unknown fields \['surprise'\]"):
        families.read_problem(family, {**to_plain(problem), "surprise": 1}, "p")
    for field in dataclasses.fields(problem):
        with pytest.raises(InputError, match="p"):
            families.read_problem(family, {**to_plain(problem), field.name: {"a": []}}, "p")


def test_records_are_checked_field_by_field() -> None:
    good = {"dtype": "fp16", "shape": [2], "strides": [1], "where": "arena"}
    assert from_plain(Value, good, "v") == Value("fp16", (2,), (1,), "arena")
    for change, message in (
        ({"shape": 3}, "v.shape is 3, expected a list"),
        ({"shape": [True]}, "v.shape is True, expected int"),
        ({"offset": 1.5}, "v.offset is 1.5, expected int"),
        ({"dtype": None}, "v.dtype is None, expected str"),
    ):
        with pytest.raises(InputError, match=message):
            from_plain(Value, {**good, **change}, "v")
    with pytest.raises(InputError, match=r"lacks \['where'\]"):
        from_plain(Value, {k: v for k, v in good.items() if k != "where"}, "v")
    with pytest.raises(InputError, match="v is 3, expected an object"):
        from_plain(Value, 3, "v")


DAMAGES = [
    (lambda h: h["programs"][0].update(arena_bytes=2**39), "arena_bytes is 549755813888, its values end at"),
    (lambda h: h["programs"][0].update(arena_bytes=2**50), "arena_bytes is .*, expected a whole number from 0 to"),
    (lambda h: h["programs"][0].update(workspace_bytes=2**40), "workspace_bytes is .*, expected a whole number"),
    (lambda h: h["programs"][0].update(batch=0), "batch is 0, expected a whole number from 1"),
    (lambda h: h["programs"][0].update(batch=2), "input is float32|expected|disagree|are for batches"),
    (lambda h: h.update(programs=[]), r"programs are for batches \[\]"),
    (lambda h: h.update(programs=3), "programs is no list"),
    (lambda h: h["programs"][1]["values"]["active"].update(offset=2**30), "ends at byte .*, the arena has"),
    (lambda h: h["programs"][1]["values"]["active"].update(offset=1), "offset 1 is no multiple of an element"),
    (lambda h: h["programs"][1]["values"]["active"].update(offset=2), "lies at byte 2, the launch needs multiples of 16"),
    (lambda h: h["programs"][1]["values"]["nhwc"].update(dtype="fp64"), "dtype 'fp64' or place 'arena' is unknown"),
    (lambda h: h["programs"][1]["values"]["nhwc"].update(dtype="bf16"), "operand d is bf16 of 512 elements, the problem needs fp16"),
    (
        lambda h: h["programs"][1]["values"]["nhwc"].update(shape=[4, 16, 4]),
        "operand d is fp16 of .* elements, the problem needs fp16 of 512",
    ),
    (lambda h: h["programs"][1]["values"]["nhwc"].update(where="moon"), "place 'moon' is unknown"),
    (lambda h: h["programs"][1]["values"]["nhwc"].update(shape=[4, 16]), "2 sizes and 3 strides"),
    (lambda h: h["programs"][1]["values"]["nhwc"].update(index=0), "the place 'arena' needs an offset only"),
    (lambda h: h["programs"][1]["values"]["bias"].update(tensor="none"), "of the tensor 'none', which has None"),
    (lambda h: h["programs"][1]["values"]["bias"].update(shape=[9]), "needs 36 bytes of the tensor 'bias', which has 32"),
    (lambda h: h["programs"][1]["values"]["x"].update(index=1), "index is 1, expected a whole number from 0 to 0"),
    (lambda h: h["programs"][1]["values"]["x"].update(shape=[4, 8, 4, 5], strides=[160, 20, 5, 1]), "the plan's input is float32"),
    (lambda h: h["programs"][1]["steps"][0]["operands"].update(d="x"), "operand d is fp32"),
    (lambda h: h["programs"][1]["steps"][2]["operands"].update(d="bias"), "operand d is fp32 of 8 elements"),
    (lambda h: h["programs"][0]["steps"][2]["operands"].update(d="bias"), "operand d would be written, but lies in the weights"),
    (lambda h: h["programs"][1]["steps"][0]["operands"].update(e="x"), "operands are .*, expected"),
    (lambda h: h["programs"][1]["steps"][0]["operands"].update(in0="gone"), "is the value 'gone', which is not listed"),
    (lambda h: h["programs"][1]["steps"][0].update(family="abacus"), "family 'abacus' is not one of gemm"),
    (lambda h: h["programs"][1]["steps"][0].update(library="cudnn"), "cudnn cannot compute it: library 'cudnn' is not one of twofour"),
    (lambda h: h["programs"][1]["steps"][0].update(library="\x1b[2J\u202e"), r"step 0: \?\[2J\? cannot compute it"),
    (lambda h: h["programs"][1]["steps"][0].update(config=None), "our kernels need a config"),
    (lambda h: h["programs"][1]["steps"][0]["config"].update(vector=16), "vector 16 and repeat"),
    (lambda h: h["programs"][1]["steps"][0].update(algorithm=-1), "algorithm is -1"),
    (lambda h: h["programs"][1]["steps"][0].update(parts={"cubin": "none"}), "its cubin is the tensor 'none', which the plan lacks"),
    (lambda h: h["programs"][1]["steps"][0].update(parts={"cubin": "bias"}), "the compiled kernel 'bias' has another digest"),
    (lambda h: h["programs"][1]["steps"][0].update(parts={"graph": "bias"}), r"parts are \['graph'\], twofour takes \['cubin'\]"),
    (lambda h: h["programs"][1]["steps"][0].pop("name"), "is no object with"),
    (lambda h: h["programs"][1]["steps"][1]["problem"]["program"].append(["boom", ["in", 0]]), "operation 'boom' is unknown"),
    (lambda h: h["programs"][1]["steps"][1]["problem"]["program"].append(["relu", ["t", 3]]), r"expected \('in', i below 2\)"),
    (lambda h: h["programs"][1]["steps"][1]["problem"].update(out_strides=[1, 1, 1]), "write a place twice"),
    (lambda h: h["programs"][1]["steps"][1]["problem"].update(shape=[2**31 - 1] * 3, out_strides=[2**40] * 3), "expected at most"),
    (lambda h: h["programs"][0]["steps"].clear(), "program of batch 1: no step writes output 0"),
    (lambda h: h["programs"][1]["steps"].pop(), "program of batch 4: no step writes output 0"),
    (lambda h: h.update(kernels=[1]), "kernels is no object of strings"),
    (lambda h: h.update(whole=3), "whole is no string"),
    (lambda h: h.update(device="cpu"), "the backend 'cuda' does not run fp16 on the device 'cpu'"),
    (lambda h: h.update(precision="fp32"), "does not run fp32"),
    (lambda h: h.pop("programs"), "its description cannot be read"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_each_damage_is_one_sentence(file: Path, change: Any, message: str) -> None:
    with pytest.raises(PlanFormatError, match=message) as caught:
        Plan.load(changed(file, change))
    assert str(caught.value).isprintable(), "a terminal would obey it"


def test_a_kernel_inside_is_known_by_its_digest(tmp_path: Path) -> None:
    source, cubin = plan(), np.frombuffer(b"\x7fELF something", np.uint8)
    name = cubin_name(cubin.tobytes())
    programs = tuple(
        dataclasses.replace(p, steps=(dataclasses.replace(p.steps[0], parts={"cubin": name}), *p.steps[1:])) for p in source.programs
    )
    good = dataclasses.replace(source, programs=programs, payload={**source.payload, name: cubin})
    good.save(tmp_path / "p.plan")
    assert Plan.load(tmp_path / "p.plan").programs == programs
    dataclasses.replace(good, payload={**source.payload, name: cubin[::-1].copy()}).save(tmp_path / "p.plan")
    with pytest.raises(PlanFormatError, match="has another digest than its name says"):
        Plan.load(tmp_path / "p.plan")


def test_a_library_step_must_be_in_needs(file: Path) -> None:
    problem = matmul.Problem(1, CHANNELS, CHANNELS, 16)
    value = {"dtype": "fp16", "shape": [1, 8, 16], "strides": [128, 16, 1], "where": "arena", "offset": 0}

    def add(header: Any) -> None:
        for p in header["programs"]:
            p["values"]["a"] = value
            p["steps"].append(
                {"name": "m", "family": "matmul", "library": "cublaslt", "problem": to_plain(problem), "config": None, "algorithm": 0,
                 "operands": {"a": "a", "b": "a", "d": "a"}, "parts": {}}
            )  # fmt: skip

    with pytest.raises(PlanFormatError, match=r"needs lacks the libraries \['cublaslt'\] that steps use"):
        Plan.load(changed(file, add))


def test_thousands_of_damaged_plans_load_or_are_refused(tmp_path: Path) -> None:
    loaded, refused = attack(1500, 0, tmp_path)
    assert loaded + refused == 1500
    assert loaded > 10
    assert refused > 750


def test_an_interruption_is_no_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(path: Path) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan_mutations, "load", interrupted)
    monkeypatch.setattr(plan_mutations.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        attack(1, 0, tmp_path)
    assert capsys.readouterr().err == ""
    assert not list(tmp_path.glob("crash-*"))


def test_a_damage_leaves_what_the_next_ones_choose_from() -> None:
    before, whole, rng = json.dumps(CHOSEN), {"a": {"b": [1]}}, random.Random(0)
    for _ in range(3000):
        json.dumps(damage(copy.deepcopy(whole), places(whole), rng))
    assert json.dumps(CHOSEN) == before


def test_a_description_that_claims_terabytes_allocates_none(file: Path) -> None:
    size = file.stat().st_size

    def claim(header: Any) -> None:
        header["programs"][1]["arena_bytes"] = 2**39
        header["programs"][1]["values"]["active"].update(shape=[2**31 - 1, 16, 8], offset=2**38)

    # The parser's own objects are a few times the text; nothing follows the sizes that the text names.
    assert peak_of_loading(changed(file, claim)) < 40 * size


def test_inspecting_a_gpu_plan_says_where_to_look(file: Path) -> None:
    import twofour

    with pytest.raises(InputError, match="is for the backend 'cuda', whose weights are packed; inspect the model it was made from"):
        twofour.inspect(file)
