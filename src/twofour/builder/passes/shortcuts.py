"""Shortcuts: two 1×1 convolutions whose sum is all that is read become one over the channels of both inputs."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import (
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
from twofour.builder.passes.folding import bias_of
from twofour.builder.passes.infra import Rewrite
from twofour.builder.strided import row_major
from twofour.pattern import count_groups

STEP = 8  # channels of a slice that library kernels read and write


def is_pointwise_conv(node: ir.Node | None) -> bool:
    """Whether a node is a 1×1 Conv of one group without padding."""
    if node is None or not is_fused(node, "Conv") or attribute(node, "groups") != 1 or any(attribute(node, "pads")):
        return False
    weight = constant_of(node.inputs[1])
    return list(attribute(node, "kernel")) == [1, 1] and weight is not None and weight.shape[-1] % STEP == 0 and bias_of(node) is not None


def _is_grouped(node: ir.Node | None) -> bool:
    return node is not None and is_fused(node, "Conv") and attribute(node, "groups") > 1


class MergeShortcuts(Rewrite):
    """Replaces activation(W a + b + (V c + d)) by activation([W V] [a; c] + (b + d)), where V c + d is read there alone.

    The sum of a residual block and its projected shortcut is then never written and read again at the block's width, which is wider than
    what is copied in its place: of a strided convolution's input, the pixels it reads. Both weights must be 2:4 or neither, so that no
    layer loses its zeros. An input that a grouped convolution makes stays apart: writing a slice of a wider image, cuDNN's lost its fast
    kernels (3.4 ms for what takes 0.1 ms).
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Merge in graph order."""
        count = 0
        for node in nodes_of(graph):
            other = producer(node.inputs[3]) if is_pointwise_conv(node) and len(node.inputs) > 3 and node.inputs[3] is not None else None
            if other is not None and is_pointwise_conv(other) and self._may(node, other):
                self._merge(graph, node, other)
                count += 1
        return count

    def _may(self, node: ir.Node, other: ir.Node) -> bool:
        if attribute(other, "activation", "none") != "none" or only_use(other.outputs[0]) is not node:
            return False
        if len(other.inputs) > 3 and other.inputs[3] is not None:
            return False
        weights = [constant_of(layer.inputs[1]) for layer in (node, other)]
        first, second = (count_groups(w, w.ndim - 1).is_24 for w in weights if w is not None)
        strided = [layer for layer in (node, other) if list(attribute(layer, "strides")) != [1, 1]]
        copied = sum(shape_of(layer.inputs[0])[-1] for layer in strided)
        # A slice of a slice is left alone.
        plain = all(not is_fused(producer(layer.inputs[0]), "View") for layer in strided)
        if any(_is_grouped(producer(layer.inputs[0])) for layer in (node, other)):
            return False
        return first == second and plain and copied <= shape_of(node.outputs[0])[-1]

    def _merge(self, graph: ir.Graph, node: ir.Node, other: ir.Node) -> None:
        layers = (node, other)
        parts = [self._read_pixels(graph, node, layer) for layer in layers]
        shape = (*shape_of(node.outputs[0])[:-1], sum(shape_of(part)[-1] for part in parts))
        both = make_node(graph, node, "Concat", parts, shape, {"axis": 3, "in_place": [0, 0], "within": ""}, like=node)
        weight = np.concatenate([constant_of(layer.inputs[1]) for layer in layers], axis=-1)  # type: ignore[misc]
        first, second = (bias_of(layer) for layer in layers)
        assert first is not None
        assert second is not None
        stem = str(node.inputs[1].name)  # type: ignore[union-attr]
        made = [both, add_constant(graph, weight, f"{stem}.both"), add_constant(graph, first + second, f"{stem}.both_bias")]
        attributes = attributes_of(node) | {"strides": [1, 1]}
        replace(graph, node.outputs[0], make_node(graph, node, "Conv", made, shape_of(node.outputs[0]), attributes, like=node))

    def _read_pixels(self, graph: ir.Graph, at: ir.Node, layer: ir.Node) -> ir.Value:
        """Return the pixels that a 1×1 convolution reads: its input, or a view of every s-th row and column."""
        x = layer.inputs[0]
        assert x is not None
        strides = list(attribute(layer, "strides"))
        if strides == [1, 1]:
            return x
        batch, row, column, channel = row_major(shape_of(x))
        shape = (*shape_of(layer.outputs[0])[:-1], shape_of(x)[-1])
        view = {"shape": list(shape), "strides": [batch, row * strides[0], column * strides[1], channel], "offset": 0}
        return make_node(graph, at, "View", [x], shape, view, like=layer, stem=f"{x.name}.pixels")
