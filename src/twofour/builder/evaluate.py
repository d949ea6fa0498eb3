"""A graph run in float64 with the oracle: what every pass is checked against."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import Array, attribute, attributes_of, shape_of
from twofour.errors import InputError, VerificationError
from twofour.oracle.operators import run_operator
from twofour.oracle.operators.common import wide
from twofour.ort import session


def run_fallback(node: ir.Node, inputs: list[Array]) -> list[Array]:
    """Return the outputs of a Fallback node's model, run by ONNX Runtime; floating values come and go in fp32."""
    opened = session(attribute(node, "model").tobytes())
    feeds = {i.name: x.astype(np.float32) if x.dtype == np.float64 else x for i, x in zip(opened.get_inputs(), inputs, strict=True)}
    return [wide(np.asarray(y)) for y in opened.run(None, feeds)]


def random_inputs(model: ir.Model, seed: int = 0) -> dict[str, Array]:
    """Return standard-normal values for every input of the graph (0 or 1 for integers), rounded to fp32."""
    rng = np.random.default_rng(seed)
    values: dict[str, Array] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        assert value.dtype is not None
        kind = value.dtype.numpy()
        normal = np.issubdtype(kind, np.floating) or value.dtype == ir.DataType.BFLOAT16
        x = rng.standard_normal(shape_of(value)).astype(np.float32) if normal else rng.integers(0, 2, shape_of(value)).astype(kind)
        values[str(value.name)] = x
    return values


def evaluate(model: ir.Model, inputs: Mapping[str, Array], *, every: bool = False) -> dict[str, Array]:
    """Return the outputs by name (with `every`, all values), computed in float64; each value's shape is checked against the graph's.

    Args:
        inputs: an array an input of the graph.

    Raises:
        InputError: an input is missing. UnsupportedError: the oracle lacks an operator. VerificationError: a shape is not as recorded.
    """
    known: dict[ir.Value, Array] = {}
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        known[value] = wide(value.const_value.numpy())
    for value in model.graph.inputs:
        if value in known:
            continue
        if value.name not in inputs:
            raise InputError(f"evaluate: input {value.name!r} is missing, got {sorted(inputs)}")
        known[value] = wide(np.asarray(inputs[str(value.name)]))
    last_use = {id(value): node for node in model.graph for value in node.inputs if value is not None}
    outputs = set(model.graph.outputs)
    for node in model.graph:
        _compute(node, known)
        if not every:
            for read in set(node.inputs):
                if read is not None and last_use[id(read)] is node and read not in outputs:
                    known.pop(read, None)
    if every:
        return {str(value.name): array for value, array in known.items()}
    return {str(value.name): known[value] for value in model.graph.outputs}


def _compute(node: ir.Node, known: dict[ir.Value, Array]) -> None:
    arrays: list[Any] = [None if value is None else known[value] for value in node.inputs]
    if node.op_type == "Fallback":
        results = run_fallback(node, arrays)
    else:
        results = run_operator(node.domain, node.op_type, arrays, attributes_of(node), len(node.outputs))
    for value, result in zip(node.outputs, results, strict=False):
        if value.shape is not None and tuple(value.shape) != result.shape:
            raise VerificationError(
                f"evaluate: {node.op_type} {node.name!r} gives {list(result.shape)}, "
                f"the graph records {list(value.shape)} for {value.name!r}"
            )
        known[value] = result


def largest_difference(a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    """Return the largest |a - b| over all outputs, relative to the largest |a| of the output.

    Raises:
        VerificationError: the outputs have other names or shapes.
    """
    if list(a) != list(b):
        raise VerificationError(f"evaluate: the outputs are {list(b)}, expected {list(a)}")
    worst = 0.0
    for name in a:
        if a[name].shape != b[name].shape:
            raise VerificationError(f"evaluate: output {name!r} is {list(b[name].shape)}, expected {list(a[name].shape)}")
        if a[name].size:
            scale = float(np.abs(a[name]).max()) or 1.0
            worst = max(worst, float(np.abs(a[name].astype(np.float64) - b[name].astype(np.float64)).max()) / scale)
    return worst
