"""Batch sizes of `build`, `estimate` and `measure`: what may be given, and what is meant where nothing is."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import plan_samples
import pytest
from click.testing import CliRunner
from graphs import text_model

import twofour
from twofour.builder import gpu, measure_gain
from twofour.cli.group import twofour as command_line
from twofour.errors import InputError, UnsupportedError
from twofour.report.measure import batches_of

FUNCTIONS = ("build", "estimate", "measure")


def model(path: Path, batch: int | str = "N") -> Path:
    """A linear layer on 8 inputs, its batch open by default."""
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    made = text_model(f"float[{batch},8] x", "a = MatMul(x, w) y = Relu(a)", w=weight)
    made.graph.output[0].type.CopyFrom(made.graph.input[0].type)
    onnx.save(made, path)
    return path


def batches_of_function(function: str, path: Path, **options: Any) -> list[int]:
    """The batch sizes that a function worked for."""
    if function == "build":
        return list(twofour.build(path, **options).batches)
    if function == "estimate":
        return [row.batch for row in twofour.estimate(path, gpus=["H200"], **options)]
    return [row.batch for row in twofour.measure(path, seconds=0.05, memory=False, **options)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", [3, np.int64(3), [3], (3,), range(3, 4), np.array([3])])
def test_one_size_is_a_number_or_a_sequence(tmp_path: Path, function: str, batch: Any) -> None:
    assert batches_of_function(function, model(tmp_path / "m.onnx"), batch=batch) == [3]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", ["1,2", "4", b"4", 4.0, [1, "2"], [1.5], [[1]], {"a": 1}])
def test_what_is_no_size_is_one_sentence(tmp_path: Path, function: str, batch: Any) -> None:
    with pytest.raises(InputError) as caught:
        batches_of_function(function, model(tmp_path / "m.onnx"), batch=batch)
    assert str(caught.value) == f"{function}: batch is {batch!r}, expected a whole number such as 32, or several such as [1, 32]"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", [0, -1, [4, 2**31], 99999999999999999999])
def test_a_size_that_no_tensor_has_is_refused(tmp_path: Path, function: str, batch: Any) -> None:
    with pytest.raises(InputError) as caught:
        batches_of_function(function, model(tmp_path / "m.onnx"), batch=batch)
    size = batch[1] if isinstance(batch, list) else batch
    assert str(caught.value) == f"{function}: batch is {size}, expected 1 to 2147483647"


@pytest.mark.parametrize(("function", "usual"), [("build", []), ("estimate", [1, 32]), ("measure", [1, 32])])
def test_the_size_that_a_file_was_exported_for_is_meant_where_none_is_given(tmp_path: Path, function: str, usual: list[int]) -> None:
    assert batches_of_function(function, model(tmp_path / "open.onnx")) == usual
    assert batches_of_function(function, model(tmp_path / "fixed.onnx", 4)) == [4]
    if function != "build":
        with pytest.raises(InputError, match=f"{function}: no batch size is given, expected at least one"):
            batches_of_function(function, model(tmp_path / "fixed.onnx", 4), batch=())


def test_another_size_than_the_exported_one_stays_refused(tmp_path: Path) -> None:
    path = model(tmp_path / "m.onnx", 4)
    said = "exported for batches of 4, batch 1 was asked for; ask for 4, or export it with a dynamic batch"
    for work, options in ((twofour.estimate, {}), (twofour.build, {"device": "cuda"}), (twofour.build, {"device": "cpu"})):
        with pytest.raises(InputError, match=said):
            work(path, batch=[4, 1], **options)
    with pytest.raises(InputError, match="batch 1 was asked for, the plan takes batches of 4 only"):
        twofour.measure(path, batch=1)


@pytest.mark.parametrize(("work", "usual"), [(twofour.build, [1]), (measure_gain, [1, 32])])
@pytest.mark.parametrize("fixed", [True, False])
def test_a_gpu_works_for_that_size_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: Any, usual: list[int], fixed: bool) -> None:
    ready, prepare = [], gpu.prepare
    monkeypatch.setattr(gpu, "prepare", lambda *args: ready.append(prepare(*args)) or ready[0])
    options = {"device": "cuda"} if work is twofour.build else {"precision": "fp16"}
    with (
        patch("twofour.builder.gpu.capability", side_effect=UnsupportedError("no NVIDIA driver was found")),
        pytest.raises(UnsupportedError, match="device 'cuda' times every tactic on the GPU"),
    ):
        work(model(tmp_path / "m.onnx", 4 if fixed else "N"), **options)
    assert [one.batch for one in ready[0].lowered] == ([4] if fixed else usual)


def test_the_commands_mean_that_size_too(tmp_path: Path) -> None:
    path, plan = str(model(tmp_path / "m.onnx", 4)), str(tmp_path / "m.plan")
    built = CliRunner().invoke(command_line, ["build", path, "-o", plan], catch_exceptions=False)
    assert built.exit_code == 0
    for command in (["estimate", path, "--predict", "--gpu", "H200"], ["measure", plan, path, "--seconds", "0.05", "--no-memory"]):
        result = CliRunner().invoke(command_line, [*command, "--json"], catch_exceptions=False)
        assert {row["batch"] for row in json.loads(result.output)} == {4}


@pytest.mark.parametrize(("batch", "meant"), [("4", [4]), ("N", [1, 32])])
def test_an_input_of_one_row_does_not_fix_the_others(tmp_path: Path, batch: str, meant: list[int]) -> None:
    made = text_model(f"float[{batch},8] x, float[1,8] p", "y = Add(x, p)")
    made.graph.output[0].type.CopyFrom(made.graph.input[0].type)
    onnx.save(made, tmp_path / "m.onnx")
    for function in ("estimate", "measure"):
        assert batches_of_function(function, tmp_path / "m.onnx") == meant


def test_plans_are_measured_for_the_sizes_that_all_were_made_for(tmp_path: Path) -> None:
    small, large, other = (plan_samples.plan(batches) for batches in ((1, 4), (4, 8), (8,)))
    fixed, any_size = (twofour.build(model(tmp_path / "m.onnx", batch)) for batch in (4, "N"))
    assert batches_of({"small": small}) == (1, 4)
    assert batches_of({"small": small, "large": large, "fixed": fixed, "any": any_size}) == (4,)
    assert batches_of({"any": any_size}) == (1, 32)
    with pytest.raises(InputError) as caught:
        batches_of({"small": small, "any": any_size, "other": other})
    said = "measure: no batch size is one of every plan's ('small' [1, 4], 'other' [8]), expected one; measure them apart"
    assert str(caught.value) == said
