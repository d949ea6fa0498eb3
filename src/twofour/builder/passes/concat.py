"""Concat without copies: what computes a part writes it straight into the whole."""

import onnx_ir as ir

from twofour.builder.graph import attribute, constant_of, is_fused, nodes_of, producer, set_attribute, shape_of
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.materialise import ALIGNED, pitch_of
from twofour.builder.strided import row_major

ANY_PLACE = ("Pointwise", "Copy", "Concat", "Pad")
PITCHED = (*ANY_PLACE, "Conv", "Pool", "Resize", "Reduce")


def takes_pitch(node: ir.Node, index: int) -> bool:
    """Whether a step can read its operand `index` from a slice of the channels of a larger value."""
    if is_fused(node, "Reduce"):
        last = len(shape_of(node.inputs[0])) - 1
        return index == 0 and (last not in attribute(node, "axes") or list(attribute(node, "axes")) == [last])
    if is_fused(node, "Conv"):
        return index in (0, 3)
    return is_fused(node, *PITCHED)


class ConcatInPlace(Rewrite):
    """Marks which inputs of a Concat are written where they will lie (`in_place`), and which Concat lies within another (`within`).

    1. An input that one step computes, that no other Concat holds, and that every reader can read there, is in place. Convolutions and
       pools write and read slices of the channels that are multiples of 8; Pointwise and Copy write anywhere.
    2. A Concat whose inputs are the first inputs of a longer one along the last axis (a dense block) is the beginning of that one's
       value: nothing is copied twice. Its readers must be able to read slices.

    Everything else is copied in. The graph computes the same; lowering follows the marks.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Mark every Concat and return how many marks changed."""
        concats = [node for node in nodes_of(graph) if is_fused(node, "Concat")]
        before = [(attribute(node, "in_place"), attribute(node, "within")) for node in concats]
        placed: set[ir.Value] = set()
        groups: dict[int, list[ir.Node]] = {}
        # From the last to the first: the longest of a dense block comes last, and the others lie within it.
        for number, node in reversed(list(enumerate(concats))):
            longer = next((other for other in concats[number + 1 :] if self._begins(node, other)), None)
            if longer is not None:
                whole = str(attribute(longer, "within") or longer.outputs[0].name)
                set_attribute(node, "within", whole)
                groups[id(longer)].insert(0, node)
                groups[id(node)] = groups[id(longer)]
                continue
            marks = [int(self._fits(node, index, placed)) for index in range(len(node.inputs))]
            placed |= {value for value, mark in zip(node.inputs, marks, strict=True) if mark and value is not None}
            set_attribute(node, "in_place", marks)
            groups[id(node)] = [node]
        for group in {id(group): group for group in groups.values()}.values():
            # What must be copied in is copied by the first Concat that has it; it lies there for the others.
            marks, done = list(attribute(group[-1], "in_place")), 0
            for node in group:
                set_attribute(node, "in_place", [1] * done + marks[done : len(node.inputs)])
                done = len(node.inputs)
        return sum((attribute(node, "in_place"), attribute(node, "within")) != old for node, old in zip(concats, before, strict=True))

    def _begins(self, short: ir.Node, long: ir.Node) -> bool:  # 2
        count = len(short.inputs)
        last = len(shape_of(short.outputs[0])) - 1
        same = count < len(long.inputs) and list(long.inputs[:count]) == list(short.inputs)
        if not same or attribute(short, "axis") != last or attribute(long, "axis") != last:
            return False
        if short.outputs[0].is_graph_output() or long.outputs[0].is_graph_output():
            return False
        sizes = [shape_of(value)[-1] for value in long.inputs if value is not None]
        return all(size % ALIGNED == 0 for size in sizes) and all(takes_pitch(use.node, use.idx) for use in short.outputs[0].uses())

    def _fits(self, node: ir.Node, index: int, placed: set[ir.Value]) -> bool:  # 1
        value, axis = node.inputs[index], int(attribute(node, "axis"))
        maker = producer(value)
        if value is None or maker is None or value in placed or value.is_graph_output() or constant_of(value) is not None:
            return False
        if list(node.inputs).count(value) > 1 or not is_fused(maker, *PITCHED):
            return False
        whole, part = shape_of(node.outputs[0]), shape_of(value)
        offset = sum(shape_of(other)[axis] for other in node.inputs[:index] if other is not None)
        strides = row_major(whole)
        pitch = pitch_of(part, strides)
        aligned = pitch is not None and pitch % ALIGNED == 0 and offset * strides[axis] % ALIGNED == 0
        if not is_fused(maker, *ANY_PLACE) and not (aligned and self._writes_pitch(maker)):
            return False
        readers = [use for use in value.uses() if use.node is not node]
        return not readers or (
            pitch is not None and all(takes_pitch(use.node, use.idx) and self._reads(use.node, aligned) for use in readers)
        )

    def _writes_pitch(self, maker: ir.Node) -> bool:
        """Whether a step can write slices: convolutions, pools, resizing, and norms, whose rows may have a distance."""
        return is_fused(maker, "Conv", "Pool", "Resize") or (
            is_fused(maker, "Reduce") and attribute(maker, "kind") in ("layernorm", "rmsnorm")
        )

    def _reads(self, node: ir.Node, aligned: bool) -> bool:
        return aligned or is_fused(node, *ANY_PLACE)
