"""Scale folding: constants that multiply or are added to a layer's output channels go into its weight and bias."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import (
    Array,
    add_constant,
    constant_of,
    is_fused,
    is_op,
    make_node,
    nodes_of,
    only_use,
    producer,
    replace,
    shape_of,
)
from twofour.builder.passes.folding import bias_of, fold_scale
from twofour.builder.passes.infra import Rewrite


class FoldScales(Rewrite):
    """Folds constants of one number an output channel (or one for all) into the Conv or Linear before them, if only they read it.

    1. Mul, Div: w' = s w, b' = s b.
    2. Add, Sub: b' = b + t.

    Zeros of the weight stay zeros. Where an output channel's weights would lose digits, a Mul by powers of two stays, and what is added
    behind it.
    """

    def __init__(self, precision: str) -> None:
        """Take the precision that weights will be rounded to."""
        self.precision = precision

    def rewrite(self, graph: ir.Graph) -> int:
        """Fold in graph order, so that a multiply and an add behind it both fold."""
        return sum(self._folded(graph, node) for node in nodes_of(graph))

    def _folded(self, graph: ir.Graph, node: ir.Node) -> bool:
        if not is_op(node, "Mul", "Div", "Add", "Sub"):
            return False
        for index in (0, 1):
            value, other = node.inputs[index], node.inputs[1 - index]
            layer, constant = producer(value), constant_of(other)
            if value is None or layer is None or constant is None or (index == 1 and node.op_type in ("Div", "Sub")):
                continue
            channels = self._an_output_channel(layer, constant, len(shape_of(value)))
            plain = len(layer.inputs) < 4 and layer.attributes.get("activation") is None
            if channels is None or not plain or only_use(value) is not node or shape_of(value) != shape_of(node.outputs[0]):
                continue
            if bias_of(layer) is None:
                continue
            one, zero = np.ones_like(channels), np.zeros_like(channels)
            factor = channels if node.op_type == "Mul" else 1 / channels if node.op_type == "Div" else one
            addend = channels if node.op_type == "Add" else -channels if node.op_type == "Sub" else zero
            rest = fold_scale(graph, layer, node.outputs[0], factor, addend, self.precision)
            if rest is not None and np.array_equal(rest, factor):
                return False
            replace(graph, node.outputs[0], value if rest is None else self._product(graph, node, layer, value, rest))
            graph.remove(node, safe=True)
            return True
        return False

    def _product(self, graph: ir.Graph, node: ir.Node, layer: ir.Node, value: ir.Value, factor: Array) -> ir.Value:
        """Return the layer's output times one number an output channel."""
        column = factor.reshape(-1, *[1] * (len(shape_of(value)) - 2)) if is_op(layer, "Conv") else factor
        constant = add_constant(graph, column, f"{node.outputs[0].name}.scale")
        return make_node(graph, node, "Mul", [value, constant], shape_of(value), domain="", like=node)

    def _an_output_channel(self, layer: ir.Node, constant: Array, rank: int) -> Array | None:
        """Return one fp64 number an output channel, None where the constant varies along another axis."""
        weight = constant_of(layer.inputs[1]) if is_op(layer, "Conv") or is_fused(layer, "Linear") else None
        if weight is None or constant.ndim > rank or not np.issubdtype(constant.dtype, np.floating):
            return None
        axis = 1 if is_op(layer, "Conv") else rank - 1
        padded = constant.reshape((1,) * (rank - constant.ndim) + constant.shape)
        if any(size != 1 for i, size in enumerate(padded.shape) if i != axis):
            return None
        return np.broadcast_to(padded.reshape(-1), (weight.shape[0],)).astype(np.float64)
