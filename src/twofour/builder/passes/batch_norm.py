"""Batch-norm folding: a norm with fixed statistics is one multiply and add a channel, which the layer before it absorbs."""

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
    only_use,
    producer,
    replace,
    shape_of,
)
from twofour.builder.passes.folding import bias_of, fold_scale
from twofour.builder.passes.infra import Rewrite, forbid


class BatchNorms(Rewrite):
    """Removes BatchNormalization: y = x s + t with s = scale / sqrt(variance + eps), t = bias - mean s.

    1. Behind a convolution read only by it: w' = s w, b' = s b + t. Zeros of w stay zeros, so a 2:4 weight stays 2:4.
    2. Anywhere else, and what 1 leaves so that weights keep their digits: Mul and Add with `[C, 1, …]` constants, which other passes fuse.
    """

    def __init__(self, precision: str) -> None:
        """Take the precision that weights will be rounded to."""
        self.precision = precision

    def rewrite(self, graph: ir.Graph) -> int:
        """Fold or spell out every norm whose statistics are constants."""
        count = 0
        for node in nodes_of(graph):
            if is_op(node, "BatchNormalization"):
                arrays = [constant_of(value) for value in node.inputs[1:5]]
                if all(array is not None for array in arrays):
                    self._remove(graph, node, *[a.astype(np.float64) for a in arrays if a is not None])
                    count += 1
        return count

    def ensures(self, model: ir.Model) -> None:
        """No batch norm is left."""
        forbid(model, self.name, "BatchNormalization")

    def _remove(self, graph: ir.Graph, node: ir.Node, scale: Array, bias: Array, mean: Array, variance: Array) -> None:
        factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        addend = bias - mean * factor
        x, before = node.inputs[0], producer(node.inputs[0])
        assert x is not None
        weight = constant_of(before.inputs[1]) if is_op(before, "Conv") and before is not None else None
        if before is not None and weight is not None and only_use(x) is node and bias_of(before) is not None:
            rest = fold_scale(graph, before, node.outputs[0], factor, addend, self.precision)  # 1
            if rest is None:
                replace(graph, node.outputs[0], before.outputs[0])
                return
            factor = rest
        column = (-1, *[1] * (len(shape_of(x)) - 2))
        stem = str(node.outputs[0].name)
        constants = [add_constant(graph, v.reshape(column), f"{stem}.{name}") for v, name in ((factor, "scale"), (addend, "shift"))]
        product = make_node(graph, node, "Mul", [x, constants[0]], shape_of(x), domain="", like=node)
        replace(graph, node.outputs[0], make_node(graph, node, "Add", [product, constants[1]], shape_of(x), domain="", like=node))  # 2
