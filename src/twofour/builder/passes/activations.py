"""Activation recognition: formulas that exporters spell out become one operation."""

import json
from math import pi, sqrt

import onnx_ir as ir

from twofour.builder.graph import attribute, is_op, make_node, nodes_of, producer, replace, scalar_of, shape_of
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.matching import added, factors, is_close, scaled


class Activations(Rewrite):
    """Replaces a formula by a Pointwise of one step.

    1. gelu: 0.5 x (1 + erf(x / sqrt 2)), in any order of its factors; the operator Gelu.
    2. gelu_tanh: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³))); the operator Gelu with approximate="tanh".
    3. silu: x sigmoid(x); Swish with alpha 1.
    4. hardswish: x clip(x + 3, 0, 6) / 6; x hardsigmoid(x) with alpha 1/6 and beta 1/2; the operator HardSwish.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Match every node as the root of a formula."""
        count = 0
        for node in nodes_of(graph):
            found = self._operator(node) or self._formula(node)
            if found is not None:
                kind, x = found
                attributes = {"program": json.dumps([[kind, ["in", 0]]])}
                new = make_node(graph, node, "Pointwise", [x], shape_of(node.outputs[0]), attributes, like=node)
                replace(graph, node.outputs[0], new)
                count += 1
        return count

    def _operator(self, node: ir.Node) -> tuple[str, ir.Value] | None:
        kind = None
        if is_op(node, "Gelu"):
            kind = "gelu_tanh" if attribute(node, "approximate", "none") == "tanh" else "gelu"
        elif is_op(node, "HardSwish"):
            kind = "hardswish"
        elif is_op(node, "Swish") and is_close(attribute(node, "alpha", 1.0), 1.0):
            kind = "silu"
        return None if kind is None or node.inputs[0] is None else (kind, node.inputs[0])

    def _formula(self, node: ir.Node) -> tuple[str, ir.Value] | None:
        if not is_op(node, "Mul", "Div"):
            return None
        scale, values = factors(node.outputs[0])
        if len(values) != 2:
            return None
        for x, other in ((values[0], values[1]), (values[1], values[0])):
            kind = self._gate(x, other, scale)
            if kind is not None:
                return kind, x
        return None

    def _gate(self, x: ir.Value, other: ir.Value, scale: float) -> str | None:
        node = producer(other)
        if node is None:
            return None
        if is_op(node, "Sigmoid") and node.inputs[0] is x and is_close(scale, 1):  # 3
            return "silu"
        if is_op(node, "HardSigmoid") and node.inputs[0] is x and is_close(scale, 1):  # 4
            usual = is_close(attribute(node, "alpha", 0.2), 1 / 6) and is_close(attribute(node, "beta", 0.5), 0.5)
            return "hardswish" if usual else None
        if is_op(node, "Clip") and is_close(scale, 1 / 6):  # 4
            low, high = (scalar_of(node.inputs[i]) if i < len(node.inputs) else None for i in (1, 2))
            shifted = None if node.inputs[0] is None else added(node.inputs[0])
            matches = is_close(low, 0) and is_close(high, 6) and shifted is not None and shifted[1] is x and is_close(shifted[0], 3)
            return "hardswish" if matches else None
        one = added(other)
        if one is None or not is_close(one[0], 1) or not is_close(scale, 0.5):
            return None
        inner = producer(one[1])
        if inner is None or inner.inputs[0] is None:
            return None
        factor, argument = scaled(inner.inputs[0])
        if is_op(inner, "Erf") and argument is x and is_close(factor, 1 / sqrt(2)):  # 1
            return "gelu"
        if is_op(inner, "Tanh") and is_close(factor, sqrt(2 / pi)) and self._cubic(argument, x):  # 2
            return "gelu_tanh"
        return None

    def _cubic(self, value: ir.Value, x: ir.Value) -> bool:
        """Whether `value` is x + 0.044715 x³."""
        node = producer(value)
        if not is_op(node, "Add"):
            return False
        assert node is not None
        a, b = node.inputs
        for first, second in ((a, b), (b, a)):
            if first is x and second is not None:
                scale, values = factors(second)
                if is_close(scale, 0.044715):
                    cube = producer(values[0]) if len(values) == 1 else None
                    is_power = is_op(cube, "Pow") and cube is not None and cube.inputs[0] is x and is_close(scalar_of(cube.inputs[1]), 3)
                    return bool(is_power or (len(values) == 3 and all(v is x for v in values)))
        return False
