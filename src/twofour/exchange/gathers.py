"""Gathers with known indices, rewritten as evenly spaced ones, which the engine computes as views.

torch exports an average pool whose bins do not divide the image (VGG or AlexNet at 256 × 256) as a GatherND of every bin's pixels. Networks
with blurred pooling pad by reflection, which gathers too.
"""

from bisect import bisect_left
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from twofour.exchange.support import affine, constant, number, text

MOST_REPEATED = 4096  # pixels that repeat the edge
MOST_PIECES = 64  # an axis gathered in more pieces is left as it is: every piece is a copy
Indices = npt.NDArray[np.integer[Any]]
Spread = Indices | tuple[int, list[Any]]


def spread_gathers(model: ir.Model) -> bool:
    """Rewrite what is known to be the same, in place, and return whether anything was.

    1. GatherND whose k-th coordinate follows its own axes of the indices, in their order: one Gather an axis of the data.
    2. Gather with uneven indices: a Concat of Gathers with even ones, up to `MOST_PIECES`.
    3. Pad with the image's own pixels (`reflect`, `edge`, `wrap`): a Gather an axis, as in 2.
    """
    found = False
    for node in list(model.graph):
        if node.op_type not in ("Gather", "GatherND", "Pad") or node.domain not in ("", "ai.onnx"):
            continue
        data, value = node.inputs[:2]
        known = all(constant(node, i) for i in range(1, 4))
        if value is None or data is None or data.shape is None or not known or not all(isinstance(size, int) for size in data.shape):
            continue
        assert value.const_value is not None
        indices, sizes = value.const_value.numpy(), [int(size) for size in data.shape]  # type: ignore[call-overload]
        rewrite = {"Gather": _pieces, "GatherND": _nested, "Pad": _padded}[node.op_type]
        found = rewrite(node, indices, sizes) or found
    return found


def _nested(node: ir.Node, indices: Indices, sizes: list[int]) -> bool:  # 1
    if number(node, "batch_dims", 0):
        return False
    parts = separated(indices)
    if parts is None:
        return False
    return _put(node, {axis: _even(part, sizes[axis]) for axis, part in enumerate(parts)})


def _pieces(node: ir.Node, indices: Indices, sizes: list[int]) -> bool:  # 2
    axis = int(number(node, "axis", 0)) % len(sizes)
    spread = _even(indices, sizes[axis])
    return isinstance(spread, tuple) and _put(node, {axis: spread})


def _padded(node: ir.Node, amounts: Indices, sizes: list[int]) -> bool:  # 3
    mode = text(node, "mode", "constant")
    if mode not in ("reflect", "edge", "wrap") or (amounts < 0).any():
        return False
    named = node.inputs[3] if len(node.inputs) > 3 else None
    axes = range(len(sizes)) if named is None or named.const_value is None else named.const_value.numpy().tolist()
    spreads: dict[int, Spread | None] = {}
    for axis, begin, end in zip(axes, amounts[: len(axes)], amounts[len(axes) :], strict=True):
        size = sizes[axis]
        if max(begin, end) > (MOST_REPEATED if mode == "edge" else size - (mode == "reflect")):
            return False
        if begin or end:
            spreads[axis % len(sizes)] = _even(np.pad(np.arange(size), (begin, end), mode=mode), size)  # type: ignore[call-overload]
    return bool(spreads) and _put(node, spreads)


def separated(indices: Indices) -> list[Indices] | None:
    """Return the indices of each axis of a GatherND where `indices[i…, j…, …] = (a[i…], b[j…], …)`, else None.

    Args:
        indices: `[…, coordinates]`.
    """
    shape, found, begin = indices.shape[:-1], [], 0
    for k in range(indices.shape[-1]):
        coordinate = indices[..., k]
        follows = [axis for axis, size in enumerate(shape) if (coordinate != coordinate.take([0], axis)).any() and size]
        end = len(shape) if k == indices.shape[-1] - 1 else max(follows, default=begin - 1) + 1
        if follows and (follows[0] < begin or follows[-1] >= end):
            return None
        corner = tuple(slice(None) if begin <= axis < end else 0 for axis in range(len(shape)))
        found.append(coordinate[corner])
        begin = end
    return found


def _even(indices: Indices, size: int, axis: int = 0) -> Spread | None:
    """Return the indices if they are evenly spaced, else a tree of parts that are: (axis to join along, parts); None if there is none."""
    if affine(indices, size) is not None:
        return indices
    if axis == indices.ndim or not indices.size:
        return None
    parts: list[Spread] = []
    begin = 0
    while begin < indices.shape[axis]:
        # What starts an even run is even itself, so its end can be searched by halves.
        ends = range(begin + 2, indices.shape[axis] + 1)
        end = begin + 1 + bisect_left(ends, True, key=lambda end: affine(indices.take(range(begin, end), axis), size) is None)
        part = _even(indices.take(range(begin, end), axis), size, axis + 1)
        if part is None or len(parts) == MOST_PIECES:
            return None
        parts.append(part)
        begin = end
    return parts[0] if len(parts) == 1 else (axis, parts)


def _leaves(spread: Spread) -> int:
    return sum(map(_leaves, spread[1])) if isinstance(spread, tuple) else 1


def _gathered(node: ir.Node, source: ir.Value | None, axis: int, spread: Spread, name: str) -> list[ir.Node]:
    """Return nodes that gather along an axis, the last of which has the result."""
    if isinstance(spread, tuple):
        join, parts = spread
        made = [_gathered(node, source, axis, part, f"{name}.{i}") for i, part in enumerate(parts)]
        joined = _node("Concat", [nodes[-1].outputs[0] for nodes in made], axis + join, node, name)
        return [*(one for nodes in made for one in nodes), joined]
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    tensor = ir.Tensor(spread.astype(np.int64), name=f"{name}.indices")
    value = ir.Value(name=tensor.name, shape=ir.Shape(spread.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return [_node("Gather", [source, value], axis, node, name)]


def _node(kind: str, inputs: list[ir.Value | None] | list[ir.Value], axis: int, like: ir.Node, name: str) -> ir.Node:
    output = ir.Value(name=name, type=like.outputs[0].type)
    return ir.node(kind, inputs, {"axis": axis}, outputs=[output], name=like.name)


def _put(node: ir.Node, spreads: dict[int, Spread | None]) -> bool:
    """Put gathers along each axis in the node's place, and return whether that can be done."""
    even = {axis: spread for axis, spread in spreads.items() if spread is not None and _leaves(spread) <= MOST_PIECES}
    if len(even) < len(spreads):
        return False
    made: list[ir.Node] = []
    source = node.inputs[0]
    # The last axis first, so that the numbers of those before it stay.
    for axis, spread in sorted(even.items(), reverse=True):
        made += _gathered(node, source, axis, spread, f"{node.outputs[0].name}.axis{axis}")
        source = made[-1].outputs[0]
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, node.outputs, made[-1].outputs)
    return True
