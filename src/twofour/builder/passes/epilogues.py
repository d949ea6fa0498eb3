"""Epilogue fusion: activation and residual behind a convolution or linear layer are computed where its sums are still in registers."""

import json

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import (
    Array,
    add_constant,
    attribute,
    attributes_of,
    constant_of,
    is_fused,
    make_node,
    nodes_of,
    only_use,
    producer,
    replace,
    shape_of,
)
from twofour.builder.passes.folding import bias_of, fold_scale
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.programs import is_sum_of_two, program_of, unary_of
from twofour.builder.strided import row_major
from twofour.kernels.conv import contract as conv
from twofour.kernels.gemm import contract as gemm

ACTIVATIONS = {"Conv": conv.ACTIVATIONS, "Linear": gemm.ACTIVATIONS}


def is_packed(value: ir.Value) -> bool:
    """Whether a value's elements follow each other in its own order: computed ones do, views may not."""
    node = producer(value)
    return not is_fused(node, "View") or tuple(attribute(node, "strides")) == row_major(shape_of(value))


class Epilogues(Rewrite):
    """Fuses a Pointwise behind a Conv or Linear that only it reads: y = activation(sums + bias + residual).

    0. A constant, one number a channel, that multiplies or is added: into weight and bias (a scale that a transpose had hidden before);
       where weights would lose digits, powers of two stay a Pointwise.
    1. A sum with a value of the same shape that lies without gaps or repeats becomes the residual; of two layers the later one takes it,
       so that the other is done.
    2. An activation that the family's kernels have. After it nothing more is fused: the epilogue's order is fixed.
    """

    def __init__(self, precision: str) -> None:
        """Take the precision that weights will be rounded to."""
        self.precision = precision

    def rewrite(self, graph: ir.Graph) -> int:
        """Fuse in graph order, so that sum and activation behind it both fuse."""
        count = 0
        places = {id(node): index for index, node in enumerate(graph)}
        for node in nodes_of(graph):
            if is_fused(node, "Pointwise") and node.graph is graph:
                fused = self._constant(graph, node) or self._residual(graph, node, places) or self._activation(graph, node)
                if fused is not None:
                    places[id(fused)] = places[id(node)]
                    count += 1
        return count

    def _open(self, value: ir.Value | None, reader: ir.Node) -> ir.Node | None:
        """Return the layer that computes `value` for `reader` alone and has no activation yet."""
        layer = producer(value)
        if value is None or layer is None or not is_fused(layer, "Conv", "Linear") or only_use(value) is not reader:
            return None
        return layer if attribute(layer, "activation", "none") == "none" else None

    def _constant(self, graph: ir.Graph, node: ir.Node) -> ir.Node | None:  # 0
        steps = program_of(node)
        if len(steps) != 1 or steps[0][0] not in ("mul", "add") or len(node.inputs) > 2:
            return None
        for index, value in enumerate(node.inputs):
            layer = self._open(value, node)
            a, b = steps[0][1:]
            other = b if a == ["in", index] else a if b == ["in", index] else None
            if layer is None or other is None or len(layer.inputs) > 3 or bias_of(layer) is None:
                continue
            number = np.array([other[1]]) if other[0] == "c" else constant_of(node.inputs[1 - index]) if len(node.inputs) == 2 else None
            outputs = shape_of(layer.inputs[1])[0]
            if number is None or number.size not in (1, outputs) or (number.size > 1 and number.shape[-1] != outputs):
                continue
            vector = np.broadcast_to(number.reshape(-1).astype(np.float64), (outputs,))
            product = steps[0][0] == "mul"
            factor, addend = (vector, np.zeros(outputs)) if product else (np.ones(outputs), vector)
            rest = fold_scale(graph, layer, node.outputs[0], factor, addend, self.precision)
            if rest is not None:
                return None if np.array_equal(rest, factor) else self._product(graph, node, value, rest)  # type: ignore[arg-type]
            residual = layer.inputs[3] if len(layer.inputs) > 3 else None
            return self._fused(graph, node, layer, residual, "none")
        return None

    def _product(self, graph: ir.Graph, node: ir.Node, value: ir.Value, factor: Array) -> ir.Node:
        """Return what multiplies a layer's output by one number a channel, in the place of `node`."""
        inputs = [value, add_constant(graph, factor, f"{node.outputs[0].name}.scale")]
        program = {"program": json.dumps([["mul", ["in", 0], ["in", 1]]])}
        new = make_node(graph, node, "Pointwise", inputs, shape_of(node.outputs[0]), program, like=node)
        replace(graph, node.outputs[0], new)
        graph.remove(node, safe=True)
        made = new.producer()
        assert made is not None
        return made

    def _residual(self, graph: ir.Graph, node: ir.Node, places: dict[int, int]) -> ir.Node | None:  # 1
        if not is_sum_of_two(node) or node.inputs[0] is node.inputs[1]:
            return None
        shapes = [shape_of(value) for value in node.inputs if value is not None]
        if shapes[0] != shapes[1]:
            return None
        found = []
        for index in (0, 1):
            layer = self._open(node.inputs[index], node)
            if layer is not None and len(layer.inputs) < 4 and is_packed(node.inputs[1 - index]):
                found.append((places[id(layer)], layer, node.inputs[1 - index]))
        if not found:
            return None
        _, layer, other = max(found, key=lambda item: item[0])
        return self._fused(graph, node, layer, other, "none")

    def _activation(self, graph: ir.Graph, node: ir.Node) -> ir.Node | None:  # 2
        kind, layer = unary_of(node), self._open(node.inputs[0], node)
        if layer is None or kind not in ACTIVATIONS[layer.op_type]:
            return None
        residual = layer.inputs[3] if len(layer.inputs) > 3 else None
        return self._fused(graph, node, layer, residual, kind)

    def _fused(self, graph: ir.Graph, node: ir.Node, layer: ir.Node, residual: ir.Value | None, activation: str) -> ir.Node:
        bias = layer.inputs[2] if len(layer.inputs) > 2 else None
        inputs = [*layer.inputs[:2], bias, *([] if residual is None else [residual])]
        attributes = {**attributes_of(layer), "activation": activation}
        new = make_node(
            graph, node, layer.op_type, inputs, shape_of(node.outputs[0]), attributes, like=layer, stem=str(node.outputs[0].name)
        )
        replace(graph, node.outputs[0], new)
        graph.remove([node, layer], safe=True)
        made = new.producer()
        assert made is not None
        return made
