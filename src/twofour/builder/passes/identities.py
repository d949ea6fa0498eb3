"""Identities: an output that shows an input, a constant or another output is written by a step of its own."""

import onnx_ir as ir

from twofour.builder.graph import is_op, make_node, nodes_of, replace, shape_of
from twofour.builder.passes.infra import Rewrite, forbid


class Identities(Rewrite):
    """Makes a Copy of every Identity that is left; the others went as dead code."""

    def rewrite(self, graph: ir.Graph) -> int:
        """Copy where nothing computes the output."""
        count = 0
        for node in nodes_of(graph):
            source = node.inputs[0] if node.inputs else None
            if source is None or not is_op(node, "Identity"):
                continue
            old = node.outputs[0]
            new = make_node(graph, node, "Copy", [source], shape_of(source), like=node, dtype=source.dtype or ir.DataType.FLOAT)
            replace(graph, old, new)
            graph.remove(node, safe=True)
            count += 1
        return count

    def ensures(self, model: ir.Model) -> None:
        """No Identity is left."""
        forbid(model, self.name, "Identity")
