"""Pad folding: a Pad in front of a convolution or pool becomes that layer's own padding."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import Array, attribute, constant_of, is_op, nodes_of, only_use, producer, scalar_of, set_attribute, shape_of
from twofour.builder.passes.infra import Rewrite


class FoldPads(Rewrite):
    """Folds a constant Pad of spatial axes, read by one layer only, into it.

    1. Zeros in front of Conv (its padding is zeros).
    2. Minus infinity, or fp32's lowest number, in front of MaxPool (padding is never the largest).
    3. Zeros in front of an AveragePool that counts padding or has none, and does not round up: it counts padding from then on.

    Zeros in front of MaxPool stay: the largest of an all-negative window and zero is zero.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Fold every Pad whose only reader can take it."""
        count = 0
        for node in nodes_of(graph):
            pad = producer(node.inputs[0]) if node.inputs else None
            if is_op(node, "Conv", "MaxPool", "AveragePool") and is_op(pad, "Pad") and pad is not None:
                count += self._folded(node, pad)
        return count

    def _folded(self, node: ir.Node, pad: ir.Node) -> bool:
        x = pad.inputs[0]
        amounts = spatial_amounts(pad)
        if x is None or amounts is None or only_use(pad.outputs[0]) is not node:
            return False
        if attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", ""):
            return False
        value = scalar_of(pad.inputs[2]) if len(pad.inputs) > 2 and pad.inputs[2] is not None else 0.0
        own = np.array(attribute(node, "pads") or [0] * len(amounts))
        if is_op(node, "MaxPool"):
            fits = value is not None and value <= float(np.finfo(np.float32).min)  # 2
        elif is_op(node, "AveragePool"):
            counts = bool(attribute(node, "count_include_pad", 0)) or not own.any()
            fits = value == 0 and counts and not attribute(node, "ceil_mode", 0)  # 3
        else:
            fits = value == 0  # 1
        if not fits:
            return False
        node.replace_input_with(0, x)
        set_attribute(node, "pads", [int(p) for p in own + amounts])
        if is_op(node, "AveragePool"):
            set_attribute(node, "count_include_pad", 1)
        return True


def spatial_amounts(pad: ir.Node) -> Array | None:
    """Return `[begin…, end…]` of the spatial axes of a constant Pad, None where it pads others, cuts, or is of another mode."""
    amounts, x = constant_of(pad.inputs[1]), pad.inputs[0]
    if amounts is None or x is None or attribute(pad, "mode", "constant") != "constant":
        return None
    rank = len(shape_of(x))
    given = constant_of(pad.inputs[3]) if len(pad.inputs) > 3 and pad.inputs[3] is not None else np.arange(rank)
    if given is None:
        return None
    full = np.zeros((2, rank), np.int64)
    full[:, [int(a) % rank for a in given]] = amounts.reshape(2, -1)
    return None if full[:, :2].any() or (full < 0).any() else full[:, 2:].reshape(-1)
