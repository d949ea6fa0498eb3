"""From view arithmetic back to the graph: the View and Copy nodes that give a step its operands."""

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import add_constant, constant_of, make_node, shape_of
from twofour.builder.strided import Strided, coalesced, is_whole, row_major, size_of

ALIGNED = 8  # elements of 16 bits that library kernels want slices and pitches to be multiples of


def same_place(shape: Sequence[int], strides: Sequence[int], other: Sequence[int]) -> bool:
    """Whether two strides address alike, axes of size 1 aside."""
    return all(n == 1 or a == b for n, a, b in zip(shape, strides, other, strict=True))


class Materialiser:
    """Makes the nodes; equal views are made once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def view(self, before: ir.Node, view: Strided, shape: Sequence[int], strides: Sequence[int]) -> ir.Value:
        """Return a value that shows `shape`, `strides` of the view's root: the root, a View of it, or a new constant."""
        shape, strides = tuple(shape), tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=True))
        root = view.root
        full = view.offset == 0 and prod(shape) == prod(shape_of(root)) and same_place(shape, strides, row_major(shape))
        if full and shape == shape_of(root):
            return root
        key = (id(root), view.offset, shape, strides)
        if key in self._made:
            return self._made[key]
        array = constant_of(root)
        if array is not None and not any(n > 1 and s == 0 for n, s in zip(shape, strides, strict=True)):
            flat = np.ascontiguousarray(array).reshape(-1)[view.offset :]
            seen = np.lib.stride_tricks.as_strided(flat, shape, [s * flat.itemsize for s in strides])
            made = add_constant(self.graph, np.array(seen), f"{root.name}.view")
        else:
            recorded = row_major(shape) if full else strides
            attributes = {"shape": list(shape), "strides": list(recorded), "offset": view.offset}
            dtype = root.dtype or ir.DataType.FLOAT
            made = make_node(self.graph, before, "View", [root], shape, attributes, like=before, stem=f"{root.name}.view", dtype=dtype)
        self._made[key] = made
        return made

    def copy(self, before: ir.Node, view: Strided) -> ir.Value:
        """Return a new contiguous value with the view's shape and elements."""
        factors = [coalesced(axis) for axis in view.axes]
        spread = [factor for axis in factors for factor in (axis or ((1, 0),))]
        source = self.view(before, view, [n for n, _ in spread], [s for _, s in spread])
        if constant_of(source) is not None:
            return self.view(before, Strided.whole(source), view.shape, row_major(view.shape))
        key = ("copy", id(source))
        if key not in self._made:
            dtype = view.root.dtype or ir.DataType.FLOAT
            stem = f"{view.root.name}.copy"
            self._made[key] = make_node(self.graph, before, "Copy", [source], shape_of(source), like=before, stem=stem, dtype=dtype)
        return self.view(before, Strided.whole(self._made[key]), view.shape, row_major(view.shape))

    def contiguous(self, before: ir.Node, view: Strided) -> ir.Value:
        """Return a value whose elements lie in the view's logical order without gaps: the root or a part of it where they do already."""
        flat = view.flat()
        if flat is not None and same_place(*flat, row_major(flat[0])):
            return self.view(before, view, *flat)
        return self.copy(before, view)

    def pitched(self, before: ir.Node, view: Strided, multiple: int = 1) -> ir.Value:
        """Return a value whose last axis lies without gaps and whose items have one distance: as it is, or a copy.

        That is what the channels of a slice of an image are. Where it begins and the distance are multiples of `multiple` elements.
        """
        flat = view.flat()
        pitch = None if flat is None else pitch_of(*flat)
        if flat is not None and pitch is not None and not is_whole(view) and view.offset % multiple == 0 and pitch % multiple == 0:
            return self.view(before, view, *flat)
        return self.contiguous(before, view)


def pitch_of(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """Return the elements from item to item along all axes but the last, None where the distances differ or the last has gaps."""
    if not shape or (shape[-1] > 1 and strides[-1] != 1):
        return None
    pitch = next(
        (s // prod(shape[i + 1 : -1]) for i, (n, s) in reversed(list(enumerate(zip(shape[:-1], strides[:-1], strict=True)))) if n > 1),
        shape[-1],
    )
    wanted = [pitch * prod(shape[i + 1 : -1]) for i in range(len(shape) - 1)]
    return pitch if pitch >= shape[-1] and same_place(shape[:-1], strides[:-1], wanted) else None


def repeated(view: Strided) -> bool:
    """Whether the view shows an element more than once."""
    return any(stride == 0 for axis in view.axes for _, stride in axis)


def total(view: Strided) -> int:
    """Return the number of elements that the view shows."""
    return prod(size_of(axis) for axis in view.axes)
