"""Normalization recognition: operators and formulas of layer norm and its kin become one Reduce."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import (
    Array,
    add_constant,
    attribute,
    constant_of,
    is_op,
    make_node,
    nodes_of,
    producer,
    replace,
    scalar_of,
    shape_of,
)
from twofour.builder.passes.infra import Rewrite, forbid
from twofour.builder.passes.matching import added, is_close


class Norms(Rewrite):
    """Replaces normalizations by Reduce nodes.

    1. LayerNormalization, RMSNormalization over the last axes -> Reduce layernorm, rmsnorm with scale and bias.
    2. (x - mean) / sqrt(mean((x - mean)²) + eps), the means over the last axis -> Reduce layernorm; a scale and a bias behind it join it.
    3. x / sqrt(mean(x²) + eps) -> Reduce rmsnorm; a scale behind it joins it.
    4. GroupNormalization, InstanceNormalization -> reshape to groups, Reduce layernorm, reshape back, one multiply and add a channel.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Match operators, then formulas from their division on."""
        count = 0
        for node in nodes_of(graph):
            if is_op(node, "LayerNormalization", "RMSNormalization"):
                count += self._operator(graph, node)
            elif is_op(node, "GroupNormalization", "InstanceNormalization"):
                count += self._grouped(graph, node)
            elif is_op(node, "Div"):
                count += self._formula(graph, node)
        for node in nodes_of(graph):
            if is_op(node, "Mul", "Add"):
                count += self._affine(graph, node)
        return count

    def ensures(self, model: ir.Model) -> None:
        """No operator of the family is left."""
        forbid(model, self.name, "GroupNormalization", "InstanceNormalization")

    def _operator(self, graph: ir.Graph, node: ir.Node) -> bool:  # 1
        x = node.inputs[0]
        assert x is not None
        shape = shape_of(x)
        axes = list(range(attribute(node, "axis", -1) % len(shape), len(shape)))
        kind = "layernorm" if node.op_type == "LayerNormalization" else "rmsnorm"
        vectors = [constant_of(value) for value in node.inputs[1:]]
        if any(array is None for array in vectors):
            return False
        full = [
            None if a is None else add_constant(graph, np.broadcast_to(a, shape[axes[0] :]), f"{node.outputs[0].name}.scale")
            for a in vectors
        ]
        attributes = {"kind": kind, "axes": axes, "eps": float(attribute(node, "epsilon", 1e-5))}
        replace(graph, node.outputs[0], make_node(graph, node, "Reduce", [x, *full], shape, attributes, like=node))
        return True

    def _formula(self, graph: ir.Graph, node: ir.Node) -> bool:  # 2, 3
        numerator, root = node.inputs[0], producer(node.inputs[1])
        if numerator is None or root is None or not is_op(root, "Sqrt") or root.inputs[0] is None:
            return False
        inside = added(root.inputs[0])
        squares = None if inside is None else self._mean_of(inside[1])
        if inside is None or squares is None or self._square_root_of(squares[0]) is not numerator:
            return False
        x, axes, kind = numerator, squares[1], "rmsnorm"
        centred = producer(numerator)
        if is_op(centred, "Sub"):
            assert centred is not None
            mean = None if centred.inputs[1] is None else self._mean_of(centred.inputs[1])
            if mean is not None and mean[0] is centred.inputs[0] and mean[1] == axes and mean[0] is not None:
                x, kind = mean[0], "layernorm"
        shape = shape_of(x)
        if axes != [len(shape) - 1]:
            return False
        attributes = {"kind": kind, "axes": axes, "eps": inside[0]}
        replace(graph, node.outputs[0], make_node(graph, node, "Reduce", [x], shape, attributes, like=node))
        return True

    def _mean_of(self, value: ir.Value) -> tuple[ir.Value, list[int]] | None:
        """Return (x, axes) where `value` is the mean of x with its axes kept."""
        node = producer(value)
        if not is_op(node, "ReduceMean") or not attribute(node, "keepdims", 1):  # type: ignore[arg-type]
            return None
        assert node is not None
        x = node.inputs[0]
        given = constant_of(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
        if x is None or given is None:
            return None
        return x, sorted(int(a) % len(shape_of(x)) for a in given)

    def _square_root_of(self, value: ir.Value) -> ir.Value | None:
        """Return y where `value` is y²."""
        node = producer(value)
        if is_op(node, "Pow") and node is not None and is_close(scalar_of(node.inputs[1]), 2):
            return node.inputs[0]
        if is_op(node, "Mul") and node is not None and node.inputs[0] is node.inputs[1]:
            return node.inputs[0]
        return None

    def _affine(self, graph: ir.Graph, node: ir.Node) -> bool:
        """A scale or bias behind a Reduce of cases 2 and 3 joins it."""
        for value, other in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
            norm, vector = producer(value), constant_of(other)
            if norm is None or norm.domain != "twofour" or norm.op_type != "Reduce" or vector is None or value is None:
                continue
            shape = shape_of(value)
            joins = attribute(norm, "kind") in ("layernorm", "rmsnorm") and len(attribute(norm, "axes")) == 1
            if not joins or len(list(value.uses())) > 1 or value.is_graph_output() or vector.size not in (1, shape[-1]):
                continue
            if vector.size > 1 and vector.shape[-1] != shape[-1]:
                continue
            if self._join(graph, node, norm, np.broadcast_to(vector.reshape(-1), shape[-1:])):
                return True
        return False

    def _join(self, graph: ir.Graph, node: ir.Node, norm: ir.Node, vector: Array) -> bool:
        inputs = list(norm.inputs)
        layer = attribute(norm, "kind") == "layernorm"
        added_one = add_constant(graph, vector, f"{node.outputs[0].name}.vector")
        if is_op(node, "Mul") and len(inputs) == 1:
            inputs = [*inputs, added_one]
        elif is_op(node, "Add") and layer and len(inputs) < 3:
            inputs = [*inputs, *([add_constant(graph, np.ones_like(vector), "one")] if len(inputs) == 1 else []), added_one]
        else:
            return False
        attributes = {"kind": attribute(norm, "kind"), "axes": attribute(norm, "axes"), "eps": attribute(norm, "eps")}
        replace(graph, node.outputs[0], make_node(graph, node, "Reduce", inputs, shape_of(node.outputs[0]), attributes, like=norm))
        return True

    def _grouped(self, graph: ir.Graph, node: ir.Node) -> bool:  # 4
        x, scale, bias = node.inputs[0], constant_of(node.inputs[1]), constant_of(node.inputs[2])
        if x is None or scale is None or bias is None:
            return False
        shape = shape_of(x)
        groups = shape[1] if node.op_type == "InstanceNormalization" else int(attribute(node, "num_groups"))
        scale, bias = (np.repeat(v, shape[1] // v.size) if v.size == groups else v for v in (scale, bias))
        split = (shape[0], groups, int(np.prod(shape[1:])) // groups)
        to = add_constant(graph, np.array(split, np.int64), "shape")
        back = add_constant(graph, np.array(shape, np.int64), "shape")
        apart = make_node(graph, node, "Reshape", [x, to], split, domain="", like=node)
        attributes = {"kind": "layernorm", "axes": [2], "eps": float(attribute(node, "epsilon", 1e-5))}
        normal = make_node(graph, node, "Reduce", [apart], split, attributes, like=node)
        whole = make_node(graph, node, "Reshape", [normal, back], shape, domain="", like=node)
        column = (-1, *[1] * (len(shape) - 2))
        factor, addend = (add_constant(graph, v.reshape(column), f"{node.outputs[0].name}.vector") for v in (scale, bias))
        product = make_node(graph, node, "Mul", [whole, factor], shape, domain="", like=node)
        replace(graph, node.outputs[0], make_node(graph, node, "Add", [product, addend], shape, domain="", like=node))
        return True
