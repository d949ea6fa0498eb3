"""Channel widening: kernels of 16-bit types want channels in multiples of 8; missing ones are zeros that change nothing."""

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
    set_attribute,
    shape_of,
)
from twofour.builder.passes.concat import takes_pitch
from twofour.builder.passes.infra import Rewrite
from twofour.builder.strided import Strided, row_major

STEP = 8


def rounded(size: int) -> int:
    """Return the next multiple of `STEP`."""
    return -(-size // STEP) * STEP


class WidenChannels(Rewrite):
    """Gives Linear, and Conv of one group, inputs and outputs in multiples of 8; the new rows and columns of the weight are zero.

    1. Outputs: weight and bias get zero rows, so the new channels hold activation(0) = 0. A Linear that alone reads them takes them as
       they are; every other reader sees the old channels as a view.
    2. Inputs: zero columns, and the input is padded by a Pad step; one that copies anyway (an image from NCHW) pads as it copies.

    A layer with sigmoid as its activation keeps its outputs: sigmoid(0) is not 0 (its view would hide it, but a reader that takes the new
    channels as they are would not).
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Widen in graph order: a layer's outputs before the inputs of those behind it."""
        count, self._padded = 0, dict[tuple[int, int], ir.Value]()
        for node in nodes_of(graph):
            if is_fused(node, "Linear") or (is_fused(node, "Conv") and attribute(node, "groups") == 1):
                count += self._widened(graph, node)
        return count

    def ensures(self, model: ir.Model) -> None:
        """No Linear has a ragged size."""
        for node in model.graph:
            if is_fused(node, "Linear"):
                rows, columns = shape_of(node.inputs[1])  # type: ignore[arg-type]
                assert rows % STEP == 0, f"{node.name} has {rows} outputs"
                assert columns % STEP == 0, f"{node.name} has {columns} inputs"

    def _widened(self, graph: ir.Graph, node: ir.Node) -> bool:
        weight = constant_of(node.inputs[1])
        assert weight is not None
        outputs, inputs = weight.shape[0], weight.shape[-1]
        more_rows, more_columns = rounded(outputs) - outputs, rounded(inputs) - inputs
        if not more_rows and not more_columns:
            return False
        x = node.inputs[0]
        assert x is not None
        wide = np.pad(weight, [(0, more_rows), *[(0, 0)] * (weight.ndim - 2), (0, more_columns)])
        bias = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        stem = str(node.inputs[1].name)  # type: ignore[union-attr]
        made: list[ir.Value | None] = [self._input(graph, node, x, more_columns), add_constant(graph, wide, f"{stem}.wide")]
        made.append(None if bias is None else add_constant(graph, np.pad(bias, (0, more_rows)), f"{stem}.wide_bias"))
        if len(node.inputs) > 3 and node.inputs[3] is not None:
            made.append(padded(graph, node, node.inputs[3], more_rows))
        shape = shape_of(node.outputs[0])
        grown = (*shape[:-1], rounded(outputs))
        output = node.outputs[0]
        new = make_node(
            graph, node, node.op_type, made, grown, attributes_of(node), like=node, stem=f"{output.name}.wide" if more_rows else ""
        )
        self._hand_over(graph, node, output, new, grown)
        return True

    def _input(self, graph: ir.Graph, node: ir.Node, x: ir.Value, more: int) -> ir.Value:  # 2
        if not more:
            return x
        copy = producer(x)
        if is_fused(copy, "Copy") and copy is not None and only_use(x) is node and copy.inputs[0] is not None:
            return padded(graph, node, copy.inputs[0], more)
        view, source = copy, None if copy is None else copy.inputs[0]
        inputs = shape_of(x)[-1]
        if is_fused(view, "View") and view is not None and source is not None and shape_of(source) == (*shape_of(x)[:-1], inputs + more):
            narrowed = attribute(view, "offset") == 0 and tuple(attribute(view, "strides"))[-1] == 1
            layer = source.producer()
            # The view of a layer widened before: its new channels are zero.
            if narrowed and is_fused(layer, "Linear", "Conv") and layer is not None and attribute(layer, "activation", "none") != "sigmoid":
                return source
        if (id(x), more) not in self._padded:
            self._padded[id(x), more] = padded(graph, node, x, more)
        return self._padded[id(x), more]

    def _hand_over(self, graph: ir.Graph, node: ir.Node, output: ir.Value, new: ir.Value, grown: tuple[int, ...]) -> None:  # 1
        shape = shape_of(output)
        if shape == grown:
            replace(graph, output, new)
            return
        attributes = {"shape": list(shape), "strides": list(row_major(grown)), "offset": 0}
        narrow = make_node(graph, node, "View", [new], shape, attributes, like=node, stem=f"{output.name}.narrow")
        dense: ir.Value | None = None
        for use in list(output.uses()):
            if (
                takes_pitch(use.node, use.idx)
                or (is_fused(use.node, "Linear") and use.idx == 0)
                or self._composed(use.node, new, grown, shape)
            ):
                continue
            dense = dense or make_node(graph, node, "Copy", [narrow], shape, like=node, stem=f"{output.name}.dense")
            use.node.replace_input_with(use.idx, dense)
        replace(graph, output, narrow)

    def _composed(self, view: ir.Node, new: ir.Value, grown: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Let a View that only reshapes the old channels look at the widened value; return whether it could."""
        if not is_fused(view, "View") or attribute(view, "offset"):
            return False
        target = shape_of(view.outputs[0])
        if tuple(attribute(view, "strides")) != row_major(target) or np.prod(target) != np.prod(shape):
            return False
        old = Strided(new, 0, tuple(() if n == 1 else ((n, s),) for n, s in zip(shape, row_major(grown), strict=True)))
        reshaped = old.reshaped(target)
        flat = None if reshaped is None else reshaped.flat()
        readable = all(takes_pitch(use.node, use.idx) for use in view.outputs[0].uses())
        if flat is None or not readable:
            return False
        view.replace_input_with(0, new)
        set_attribute(view, "strides", list(flat[1]))
        return True


def padded(graph: ir.Graph, before: ir.Node, x: ir.Value, more: int) -> ir.Value:
    """Return `x` with zeros behind its last axis; a constant is padded at once."""
    if not more:
        return x
    shape = shape_of(x)
    array: Array | None = constant_of(x)
    if array is not None:
        return add_constant(graph, np.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, more)]), f"{x.name}.wide")
    attributes = {"pads": [0] * (2 * len(shape) - 1) + [more], "value": 0.0}
    return make_node(graph, before, "Pad", [x], (*shape[:-1], shape[-1] + more), attributes, like=before, stem=f"{x.name}.pad")
