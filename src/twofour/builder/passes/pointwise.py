"""Pointwise fusion: chains of element-wise steps become one, which reads and writes memory once."""

import json

import onnx_ir as ir

from twofour.builder.graph import elements, is_fused, make_node, nodes_of, only_use, producer, replace, set_attribute, shape_of
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.programs import inlined, program_of
from twofour.builder.strided import row_major
from twofour.kernels.pointwise.contract import MAX_INPUTS, MAX_STEPS

MOST_REPEATED = 2  # steps that may be computed again for every element they are spread over


class FusePointwise(Rewrite):
    """Joins a Pointwise with one that alone reads it.

    1. Of the same shape: any program, as long as inputs and instructions fit.
    2. Of a smaller shape that is spread over the reader's: up to `MOST_REPEATED` instructions, computed again where they are used (the
       gate of a squeeze-excite block).
    3. A reshape between the two is moved in front of the first, where all its inputs have the shape of its output and lie without gaps.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Fuse until nothing changes."""
        total = 0
        while True:
            count = sum(self._moved(graph, node) for node in nodes_of(graph) if is_fused(node, "View"))
            count += sum(self._joined(graph, node) for node in nodes_of(graph) if is_fused(node, "Pointwise"))
            total += count
            if not count:
                return total

    def _joined(self, graph: ir.Graph, node: ir.Node) -> bool:  # 1, 2
        for index, value in enumerate(node.inputs):
            before = producer(value)
            if value is None or before is None or not is_fused(before, "Pointwise") or only_use(value) is not node:
                continue
            inner, outer = program_of(before), program_of(node)
            if shape_of(value) != shape_of(node.outputs[0]) and len(inner) > MOST_REPEATED:
                continue
            steps, inputs = inlined(outer, list(node.inputs), index, inner, list(before.inputs))  # type: ignore[arg-type]
            if len(inputs) > MAX_INPUTS or len(steps) > MAX_STEPS or before.outputs[0].dtype != ir.DataType.FLOAT:
                continue
            node.resize_inputs(len(inputs))
            for i, source in enumerate(inputs):
                node.replace_input_with(i, source)
            set_attribute(node, "program", json.dumps(steps))
            graph.remove(before, safe=True)
            return True
        return False

    def _moved(self, graph: ir.Graph, view: ir.Node) -> bool:  # 3
        value = view.inputs[0]
        before = producer(value)
        if value is None or before is None or not is_fused(before, "Pointwise") or only_use(value) is not view:
            return False
        shape = shape_of(view.outputs[0])
        attributes = view.attributes
        same = elements(value) == elements(view.outputs[0]) and attributes.get_int("offset") == 0
        if not same or tuple(attributes.get_ints("strides") or ()) != row_major(shape) or not only_pointwise(view.outputs[0]):
            return False
        if any(source is None or shape_of(source) != shape_of(value) or is_strided(source) for source in before.inputs):
            return False
        seen = []
        for source in before.inputs:
            assert source is not None
            copied = {"shape": list(shape), "strides": list(row_major(shape)), "offset": 0}
            seen.append(
                make_node(graph, view, "View", [source], shape, copied, like=before, stem=f"{source.name}.view", dtype=source.dtype)
            )  # type: ignore[arg-type]
        program = {"program": json.dumps(program_of(before))}
        new = make_node(graph, view, "Pointwise", seen, shape, program, like=before, dtype=value.dtype or ir.DataType.FLOAT)
        replace(graph, view.outputs[0], new)
        graph.remove([view, before], safe=True)
        return True


def is_strided(value: ir.Value) -> bool:
    """Whether a value is a view whose elements do not follow each other."""
    node = producer(value)
    return is_fused(node, "View") and node is not None and tuple(node.attributes.get_ints("strides") or ()) != row_major(shape_of(value))


def only_pointwise(value: ir.Value) -> bool:
    """Whether all readers of a value are Pointwise."""
    return not value.is_graph_output() and all(is_fused(use.node, "Pointwise") for use in value.uses())
