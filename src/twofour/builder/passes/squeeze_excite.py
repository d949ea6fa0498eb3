"""Squeeze-excite: on images of one pixel a convolution is a Linear, so the two inner layers of a gate are small products."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import add_constant, attribute, constant_of, is_op, make_node, nodes_of, replace, shape_of
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.linear import reshaped


class SqueezeExcite(Rewrite):
    """Replaces a 1×1 convolution (one group, no padding) of 1×1 images by Reshape, Linear, Reshape.

    That is what follows the global pool of a squeeze-excite gate, and the classifier of networks that end in a convolution. The gate's
    sigmoid and multiply are element-wise and fuse with each other later.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Replace every such convolution."""
        count = 0
        for node in nodes_of(graph):
            if is_op(node, "Conv"):
                count += self._replaced(graph, node)
        return count

    def _replaced(self, graph: ir.Graph, node: ir.Node) -> bool:
        x, weight = node.inputs[0], constant_of(node.inputs[1])
        if x is None or weight is None or weight.ndim != 4 or weight.shape[2:] != (1, 1) or shape_of(x)[2:] != (1, 1):
            return False
        if attribute(node, "group", 1) != 1 or any(attribute(node, "pads") or [0]) or shape_of(node.outputs[0])[2:] != (1, 1):
            return False
        rows = add_constant(graph, np.ascontiguousarray(weight[:, :, 0, 0]), f"{node.inputs[1].name}.matrix")  # type: ignore[union-attr]
        flat = reshaped(graph, node, x, shape_of(x)[:2])
        product = make_node(graph, node, "Linear", [flat, rows, *node.inputs[2:]], (shape_of(x)[0], weight.shape[0]), like=node)
        replace(graph, node.outputs[0], reshaped(graph, node, product, shape_of(node.outputs[0])))
        return True
