"""What each operator that only looks at its input otherwise does to a view."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import attribute, constant_of, is_op, shape_of
from twofour.builder.strided import Strided, coalesced
from twofour.exchange.support import affine

See = Callable[[ir.Value | None], Strided]
Copy = Callable[[Strided], Strided]
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
VIEWS = (*RESHAPES, "Transpose", "Slice", "Gather", "Split", "Expand", "Tile")


def sliced(view: Strided, copy: Copy, axis: int, start: int, count: int, step: int = 1) -> Strided:
    """Return a slice of a view, copied first where it would cut a joined axis."""
    found = view.sliced(axis, start, count, step)
    if found is None:
        found = copy(view).sliced(axis, start, count, step)
        assert found is not None
    return found


def view_of(node: ir.Node, see: See, copy: Copy, views: dict[ir.Value, Strided]) -> None:
    """Record where the elements of the node's outputs lie; `copy` is called where they cannot stay where they are."""
    x, output = see(node.inputs[0]), node.outputs[0]
    if is_op(node, *RESHAPES):
        views[output] = x.reshaped(shape_of(output)) or _reshaped(copy(x), shape_of(output))
    elif is_op(node, "Transpose"):
        views[output] = x.transposed(attribute(node, "perm") or list(reversed(range(len(x.axes)))))
    elif is_op(node, "Expand", "Tile"):
        views[output] = x.expanded(shape_of(output))
    elif is_op(node, "Split"):
        start, axis = 0, int(attribute(node, "axis", 0)) % len(x.axes)
        for part in node.outputs:
            count = shape_of(part)[axis]
            views[part] = sliced(x, copy, axis, start, count)
            start += count
    elif is_op(node, "Gather"):
        views[output] = _gathered(node, x, copy)
    else:
        views[output] = _cut(node, x, copy)


def _reshaped(view: Strided, shape: tuple[int, ...]) -> Strided:
    found = view.reshaped(shape)
    assert found is not None, "a contiguous value takes any shape"
    return found


def _gathered(node: ir.Node, x: Strided, copy: Copy) -> Strided:
    """Gather of one index or of evenly spaced ones, whose axes take the place of the gathered one."""
    axis, indices = int(attribute(node, "axis", 0)) % len(x.axes), constant_of(node.inputs[1])
    assert indices is not None
    found = affine(indices, x.shape[axis])
    assert found is not None
    first, steps = found
    if len(coalesced(x.axes[axis])) > 1:
        x = copy(x)
    stride = x.axes[axis][0][1] if x.axes[axis] else 0
    new = tuple(() if n == 1 else ((n, step * stride),) for n, step in zip(indices.shape, steps, strict=True))
    return replace(x, offset=x.offset + first * stride, axes=(*x.axes[:axis], *new, *x.axes[axis + 1 :]))


def _cut(node: ir.Node, x: Strided, copy: Copy) -> Strided:
    """Slice along any axes with positive steps."""
    starts, ends = (constant_of(node.inputs[i]) for i in (1, 2))
    axes = constant_of(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
    steps = constant_of(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] is not None else None
    assert starts is not None
    assert ends is not None
    for i, axis in enumerate(range(len(starts)) if axes is None else axes):
        axis = int(axis) % len(x.axes)
        step = 1 if steps is None else int(steps[i])
        kept = range(x.shape[axis])[slice(int(np.clip(starts[i], -(2**31), 2**31)), int(np.clip(ends[i], -(2**31), 2**31)), step)]
        x = sliced(x, copy, axis, kept.start, len(kept), step)
    return x
