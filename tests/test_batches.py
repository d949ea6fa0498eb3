"""Batch sizes of `build`, `estimate` and `measure`: what may be given."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import text_model

import twofour
from twofour.errors import InputError

FUNCTIONS = ("build", "estimate", "measure")


def model(path: Path, batch: int | str = "N") -> Path:
    """A linear layer on 8 inputs, its batch open by default."""
    weight = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    made = text_model(f"float[{batch},8] x", "a = MatMul(x, w) y = Relu(a)", w=weight)
    made.graph.output[0].type.CopyFrom(made.graph.input[0].type)
    onnx.save(made, path)
    return path


def batches_of(function: str, path: Path, **options: Any) -> list[int]:
    """The batch sizes that a function worked for."""
    if function == "build":
        return list(twofour.build(path, **options).batches)
    if function == "estimate":
        return [row.batch for row in twofour.estimate(path, gpus=["H200"], **options)]
    return [row.batch for row in twofour.measure(path, seconds=0.05, memory=False, **options)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", [3, np.int64(3), [3], (3,), range(3, 4), np.array([3])])
def test_one_size_is_a_number_or_a_sequence(tmp_path: Path, function: str, batch: Any) -> None:
    assert batches_of(function, model(tmp_path / "m.onnx"), batch=batch) == [3]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", ["1,2", "4", b"4", 4.0, [1, "2"], [1.5], [[1]], {"a": 1}])
def test_what_is_no_size_is_one_sentence(tmp_path: Path, function: str, batch: Any) -> None:
    with pytest.raises(InputError) as caught:
        batches_of(function, model(tmp_path / "m.onnx"), batch=batch)
    assert str(caught.value) == f"{function}: batch is {batch!r}, expected a whole number such as 32, or several such as [1, 32]"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("batch", [0, -1, [4, 2**31], 99999999999999999999])
def test_a_size_that_no_tensor_has_is_refused(tmp_path: Path, function: str, batch: Any) -> None:
    with pytest.raises(InputError) as caught:
        batches_of(function, model(tmp_path / "m.onnx"), batch=batch)
    size = batch[1] if isinstance(batch, list) else batch
    assert str(caught.value) == f"{function}: batch is {size}, expected 1 to 2147483647"
