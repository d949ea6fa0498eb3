"""Fallback: operators that the engine lacks become steps that hold their own small model, run by ONNX Runtime on the CPU."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import DOMAIN, ONNX_DOMAINS, constant_of, fresh_name, nodes_of, replace
from twofour.builder.passes.infra import Rewrite
from twofour.exchange.support import why_unsupported


class Fallbacks(Rewrite):
    """Wraps every node that the engine cannot carry out in a Fallback: `model` (bytes of an ONNX model), `inputs` and `outputs` (names).

    Constants go into the model; everything computed comes and goes in the type the graph gives it.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Wrap node by node."""
        count = 0
        opset = graph.opset_imports.get("", 20)
        for node in nodes_of(graph):
            if node.domain in ONNX_DOMAINS and why_unsupported(node):
                self._wrapped(graph, node, opset)
                count += 1
        return count

    def _wrapped(self, graph: ir.Graph, node: ir.Node, opset: int) -> None:
        given = [value for value in dict.fromkeys(node.inputs) if value is not None and constant_of(value) is None]
        used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        data = self._model(node, given, used, opset)
        outputs = [
            ir.Value(name=fresh_name(graph, f"{value.name}.fallback"), shape=value.shape, type=ir.TensorType(value.dtype)) for value in used
        ]
        attributes = {
            "model": ir.Tensor(np.frombuffer(data, np.uint8)),
            "inputs": [str(value.name) for value in given],
            "outputs": [str(value.name) for value in used],
        }
        wrapper = ir.node("Fallback", given, attributes, domain=DOMAIN, outputs=outputs, name=node.name or node.op_type)
        graph.insert_before(node, wrapper)
        for old, new in zip(used, outputs, strict=True):
            replace(graph, old, new)

    def _model(self, node: ir.Node, given: list[ir.Value], used: list[ir.Value], opset: int) -> bytes:
        """Return a model of the one node as bytes."""
        copies: dict[ir.Value, ir.Value] = {}
        for value in node.inputs:
            if value is not None and value not in copies:
                copies[value] = ir.Value(name=value.name, shape=value.shape, type=ir.TensorType(value.dtype), const_value=value.const_value)
        results = [
            ir.Value(name=value.name, shape=value.shape, type=None if value.dtype is None else ir.TensorType(value.dtype))
            for value in node.outputs
        ]
        inputs = [None if value is None else copies[value] for value in node.inputs]
        inner = ir.Node(node.domain, node.op_type, inputs, list(node.attributes.values()), outputs=results, name=node.name)
        constants = [copy for value, copy in copies.items() if value not in given]
        outputs = [results[list(node.outputs).index(value)] for value in used]
        graph = ir.Graph(
            [copies[value] for value in given], outputs, nodes=[inner], initializers=constants, opset_imports={"": opset}, name="fallback"
        )
        data: bytes = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
        return data
