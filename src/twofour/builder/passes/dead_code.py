"""Dead code: what no output needs, and what changes nothing."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import attribute, constant_of, is_op, make_identity, nodes_of, replace, shape_of
from twofour.builder.passes.infra import Rewrite

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Slice", "Concat", "Tile", "Pad", "AveragePool", "MaxPool", "Resize")


class DeadCode(Rewrite):
    """Removes nodes without effect; those nobody reads go with every pass.

    1. Identity; Dropout, which does nothing at run time. Where an output shows an input or another output, an Identity stays.
    2. A cast between floating types: the graph is fp32, precision is chosen later.
    3. A view or copy whose output has its input's shape (a one-tensor Concat, an empty Pad, a Slice of everything).
    4. A Transpose that keeps the order.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Let readers of a node without effect read its input."""
        count = 0
        for node in nodes_of(graph):
            source = node.inputs[0] if node.inputs else None
            if source is None or not self._does_nothing(node, source):
                continue
            if node.outputs[0].is_graph_output() and (source.producer() is None or source.is_graph_output()):
                if is_op(node, "Dropout"):
                    replace(graph, node.outputs[0], make_identity(graph, node.outputs[0], source))
                    graph.remove(node, safe=True)
                    count += 1
                continue
            replace(graph, node.outputs[0], source)
            graph.remove(node, safe=True)
            count += 1
        return count

    def _does_nothing(self, node: ir.Node, source: ir.Value) -> bool:
        if is_op(node, "Identity"):  # 1
            return True
        if is_op(node, "Dropout"):  # 1
            return not (len(node.outputs) > 1 and (node.outputs[1].uses() or node.outputs[1].is_graph_output()))
        if is_op(node, "Cast"):  # 2
            return bool(source.dtype == node.outputs[0].dtype)
        if source.shape is None or node.outputs[0].shape is None:
            return False
        if is_op(node, *VIEWS) and shape_of(source) == shape_of(node.outputs[0]):  # 3
            return self._keeps_values(node)
        if is_op(node, "Transpose"):  # 4
            perm = attribute(node, "perm") or list(reversed(range(len(shape_of(source)))))
            return list(perm) == sorted(perm)
        return False

    def _keeps_values(self, node: ir.Node) -> bool:
        if is_op(node, "AveragePool", "MaxPool"):
            return all(k == 1 for k in attribute(node, "kernel_shape")) and not any(attribute(node, "pads") or [0])
        if is_op(node, "Slice"):
            steps = constant_of(node.inputs[4] if len(node.inputs) > 4 else None)
            return steps is None or bool(np.all(steps > 0))
        if is_op(node, "Pad"):
            amounts = constant_of(node.inputs[1])
            return amounts is not None and not amounts.any()
        if is_op(node, "Concat"):
            return len(node.inputs) == 1
        if is_op(node, "Resize"):
            return len(node.inputs) < 3 or attribute(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"
        return True
