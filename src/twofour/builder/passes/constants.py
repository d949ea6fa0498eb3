"""Constant folding: what does not depend on an input is computed once, by the oracle."""

from math import prod

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import Array, add_constant, attributes_of, constant_of, is_op, nodes_of, replace
from twofour.builder.passes.infra import Rewrite
from twofour.errors import InputError
from twofour.oracle.operators import has_operator, run_operator

# A folded value larger than this, and much larger than what it is made of, would only swell the plan (a mask spread over a batch, say).
MOST_BYTES = 64 << 20
TAKES_REPEATED = ("Concat", "Add", "Sub", "Mul", "Div")


class FoldConstants(Rewrite):
    """Replaces nodes by initializers.

    1. Shape and Size of a value whose shape is static.
    2. Any node whose inputs are all initializers, if the oracle has it; floating results are rounded to fp32 once.

    An Expand that only `TAKES_REPEATED` read stays: repeating costs nothing there, and a copy for every batch size would swell the
    plan. So does any other result of more than `MOST_BYTES` that is much larger than what it is made of.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Fold in graph order, so that chains fold in one call."""
        return sum(self._folded(graph, node) for node in nodes_of(graph))

    def _folded(self, graph: ir.Graph, node: ir.Node) -> bool:
        results = static_shape(node)  # 1
        if results is None:
            results = computed(node)  # 2
        if results is None:
            return False
        for value, array in zip(node.outputs, results, strict=False):
            if value.uses() or value.is_graph_output():
                assert value.name is not None
                replace(graph, value, add_constant(graph, array, f"{value.name}.folded"))
        graph.remove(node, safe=True)
        return True


def static_shape(node: ir.Node) -> list[Array] | None:
    """Return the result of Shape or Size of a value with a static shape, else None."""
    if not is_op(node, "Shape", "Size") or any(value.is_graph_output() for value in node.outputs):
        return None
    source = node.inputs[0]
    if source is None or source.shape is None:
        return None
    if node.op_type == "Shape":
        attributes = attributes_of(node)
        shape = list(source.shape)[attributes.get("start", 0) : attributes.get("end")]
        return [np.array(shape, np.int64)] if all(isinstance(size, int) for size in shape) else None
    if not all(isinstance(size, int) for size in source.shape):
        return None
    return [np.array(np.prod([int(s) for s in source.shape], dtype=np.int64))]  # type: ignore[arg-type]


def computed(node: ir.Node) -> list[Array] | None:
    """Return the outputs of a node whose inputs are all initializers, None where it has others or the oracle cannot compute it."""
    if not has_operator(node.domain, node.op_type) or any(value.is_graph_output() for value in node.outputs):
        return None
    if is_op(node, "Expand") and all(is_op(use.node, *TAKES_REPEATED) for use in node.outputs[0].uses()):
        return None
    arrays = [constant_of(value) for value in node.inputs]
    if any(array is None and value is not None for array, value in zip(arrays, node.inputs, strict=True)):
        return None
    most = max(MOST_BYTES, 4 * sum(array.nbytes for array in arrays if array is not None))
    # A few bytes of a file may ask for terabytes.
    shapes = [value.shape for value in node.outputs if value.shape is not None and all(isinstance(size, int) for size in value.shape)]
    if any(prod(int(size) for size in shape) > most for shape in shapes):  # type: ignore[arg-type]
        return None
    try:
        results = run_operator(node.domain, node.op_type, arrays, attributes_of(node), len(node.outputs))
    except (InputError, MemoryError):
        return None
    if sum(result.nbytes for result in results) > most:
        return None
    return results


def fold(model: ir.Model) -> bool:
    """Fold the constants of `model` in place; return whether anything changed."""
    return bool(FoldConstants()(model).modified)
