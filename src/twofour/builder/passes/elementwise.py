"""Element-wise operators of ONNX become Pointwise programs."""

import json
from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from twofour.builder.graph import attribute, make_node, nodes_of, replace, scalar_of, shape_of
from twofour.builder.passes.infra import Rewrite

Reference = list[Any]
SAME = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "And", "Or", "Equal", "Less", "Greater", "Not", "Neg", "Abs", "Sqrt", "Exp", "Log", "Erf", "Tanh"),
        *("Floor", "Ceil", "Sigmoid", "Relu", "Softplus", "HardSwish", "Where", "PRelu"),
    }
)
CAST = {ir.DataType.FLOAT: "fp32", ir.DataType.BOOL: "bool", ir.DataType.INT64: "int64", ir.DataType.INT32: "int32"}
CAST |= {ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8"}
MOST_INPUTS = 6


def chain(name: str, x: list[Reference]) -> list[Any]:
    """Return the steps that fold one operation over all operands."""
    steps: list[Any] = []
    total = x[0]
    for other in x[1:]:
        steps.append([name, total, other])
        total = ["t", len(steps) - 1]
    return steps


def power(x: list[Reference], _node: ir.Node) -> list[Any]:
    """Return x ** y; squares and roots by their own operations."""
    exponent = x[1][1] if x[1][0] == "c" else None
    if exponent == 2.0:
        return [["mul", x[0], x[0]]]
    if exponent == 0.5:
        return [["sqrt", x[0]]]
    return [["pow", x[0], x[1]]]


def clip(x: list[Reference], node: ir.Node) -> list[Any]:
    """Return min(max(x, low), high) with the bounds that are given."""
    low = high = None
    rest = x[1:]
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        low, rest = rest[0], rest[1:]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        high = rest[0]
    if low is not None and high is not None and low[0] == high[0] == "c":
        return [["clip", x[0], low, high]]
    steps: list[Any] = []
    total = x[0]
    for name, bound in (("max", low), ("min", high)):
        if bound is not None:
            steps.append([name, total, bound])
            total = ["t", len(steps) - 1]
    return steps


def parameters(node: ir.Node, **defaults: float) -> list[Reference]:
    """Return attributes as constants."""
    return [["c", float(attribute(node, name, default))] for name, default in defaults.items()]


SPELLED: dict[str, Callable[[list[Reference], ir.Node], list[Any]]] = {
    "Min": lambda x, _: chain("min", x),
    "Max": lambda x, _: chain("max", x),
    "Sum": lambda x, _: chain("add", x),
    "Pow": power,
    "Clip": clip,
    "Reciprocal": lambda x, _: [["div", ["c", 1.0], x[0]]],
    "LessOrEqual": lambda x, _: [["greater", *x], ["not", ["t", 0]]],
    "GreaterOrEqual": lambda x, _: [["less", *x], ["not", ["t", 0]]],
    "LeakyRelu": lambda x, node: [["leakyrelu", x[0], *parameters(node, alpha=0.01)]],
    "Elu": lambda x, node: [["elu", x[0], *parameters(node, alpha=1.0)]],
    "HardSigmoid": lambda x, node: [["hardsigmoid", x[0], *parameters(node, alpha=0.2, beta=0.5)]],
    "Mish": lambda x, _: [["softplus", x[0]], ["tanh", ["t", 0]], ["mul", x[0], ["t", 1]]],
    "Swish": lambda x, node: [["mul", x[0], *parameters(node, alpha=1.0)], ["sigmoid", ["t", 0]], ["mul", x[0], ["t", 1]]],
    "Cast": lambda x, node: [["cast", x[0], ["d", CAST[node.outputs[0].dtype]]]],  # type: ignore[index]
}


class Elementwise(Rewrite):
    """Replaces every element-wise operator by a Pointwise; constants of one element become numbers of the program.

    Operators with more than six inputs (Sum, Min, Max) become a chain.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Replace node by node."""
        count = 0
        for node in nodes_of(graph):
            if node.domain == "" and (node.op_type in SAME or node.op_type in SPELLED):
                self._replaced(graph, node)
                count += 1
        return count

    def _replaced(self, graph: ir.Graph, node: ir.Node) -> None:
        values = [value for value in node.inputs if value is not None]
        while len(values) > MOST_INPUTS:  # Sum, Min and Max only
            part = values[:MOST_INPUTS]
            shape = broadcast([shape_of(value) for value in part])
            steps = SPELLED[node.op_type]([["in", i] for i in range(len(part))], node)
            values = [make_node(graph, node, "Pointwise", part, shape, {"program": json.dumps(steps)}, like=node), *values[MOST_INPUTS:]]
        references, inputs = operands(values)
        if node.op_type in SPELLED:
            steps = SPELLED[node.op_type](references, node)
        else:
            steps = [[node.op_type.lower(), *references]]
        output = node.outputs[0]
        dtype = output.dtype or ir.DataType.FLOAT
        program = {"program": json.dumps(steps)}
        replace(graph, output, make_node(graph, node, "Pointwise", inputs, shape_of(output), program, like=node, dtype=dtype))


def operands(values: list[ir.Value]) -> tuple[list[Reference], list[ir.Value]]:
    """Return how a program refers to `values`, numbers in place, and the inputs it then has (at least one)."""
    references: list[Reference] = []
    inputs: list[ir.Value] = []
    for value in values:
        number = scalar_of(value)
        if number is not None and (len(values) > 1 or value.is_graph_output()):
            references.append(["c", number])
        else:
            references.append(["in", inputs.index(value) if value in inputs else len(inputs)])
            inputs += [] if value in inputs else [value]
    if not inputs:
        inputs, references[0] = [values[0]], ["in", 0]
    return references, inputs


def broadcast(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape to which all shapes broadcast."""
    import numpy as np

    return tuple(int(n) for n in np.broadcast_shapes(*shapes))
