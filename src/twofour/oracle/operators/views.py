"""Operators of ONNX that move values without computing: reshaping, transposing, slicing, joining, gathering, padding."""

import numpy as np

from twofour.errors import InputError
from twofour.oracle.operators.common import Array, Attributes, Inputs, Operator, given, integers, needed, wide


def run_reshape(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Reshape: 0 keeps a size unless `allowzero`, -1 is what is left."""
    x, wanted = needed(inputs, 0), [int(v) for v in needed(inputs, 1)]
    if not attributes.get("allowzero", 0):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return [x.reshape(wanted)]


def run_flatten(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Flatten to two axes before and from `axis`."""
    x = needed(inputs, 0)
    axis = int(attributes.get("axis", 1))
    axis = axis + x.ndim if axis < 0 else axis
    return [x.reshape(int(np.prod(x.shape[:axis], dtype=np.int64)), -1)]


def run_transpose(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Transpose; without `perm` the axes are reversed."""
    x = needed(inputs, 0)
    return [x.transpose(attributes.get("perm") or tuple(reversed(range(x.ndim))))]


def run_squeeze(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Squeeze the given axes, or all of size 1."""
    axes = integers(inputs, 1, attributes, "axes")
    return [np.squeeze(needed(inputs, 0), None if axes is None else tuple(axes))]


def run_unsqueeze(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Unsqueeze at the given axes of the output."""
    axes = integers(inputs, 1, attributes, "axes")
    assert axes is not None
    return [np.expand_dims(needed(inputs, 0), tuple(axes))]


def run_slice(inputs: Inputs, _attributes: Attributes, _count: int) -> list[Array]:
    """Slice; starts and ends beyond the axis are clamped as NumPy does."""
    x, starts, ends = needed(inputs, 0), needed(inputs, 1), needed(inputs, 2)
    axes = [int(a) for a in given_or_range(given(inputs, 3), len(starts))]
    steps = given(inputs, 4)
    index = [slice(None)] * x.ndim
    for i, axis in enumerate(axes):
        step, end = 1 if steps is None else int(steps[i]), int(ends[i])
        # Walking backwards, an end before the first element cannot be written as a negative number, which would count from the end.
        stop = None if step < 0 and end < -x.shape[axis] else end
        index[axis] = slice(int(starts[i]), stop, step)
    return [x[tuple(index)]]


def given_or_range(axes: Array | None, count: int) -> list[int]:
    """Return the axes, the first `count` where they are left out."""
    return list(range(count)) if axes is None else [int(a) for a in axes]


def run_split(inputs: Inputs, attributes: Attributes, count: int) -> list[Array]:
    """Split by sizes, or into equal parts of which the last may be smaller."""
    x, axis = needed(inputs, 0), int(attributes.get("axis", 0))
    sizes = integers(inputs, 1, attributes, "split")
    if sizes is None:
        parts = int(attributes.get("num_outputs", count))
        chunk = -(-x.shape[axis] // parts)
        sizes = [min(chunk, x.shape[axis] - i * chunk) for i in range(parts)]
    return [np.asarray(part) for part in np.split(x, np.cumsum(sizes)[:-1].tolist(), axis=axis)]


def run_concat(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Concat."""
    return [np.concatenate([needed(inputs, i) for i in range(len(inputs))], axis=int(attributes["axis"]))]


def run_expand(inputs: Inputs, _attributes: Attributes, _count: int) -> list[Array]:
    """Expand: broadcast in both directions."""
    x, shape = needed(inputs, 0), tuple(int(s) for s in needed(inputs, 1))
    return [np.broadcast_to(x, np.broadcast_shapes(x.shape, shape))]


def run_gather(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Gather along an axis; negative indices count from the end."""
    return [np.take(needed(inputs, 0), needed(inputs, 1), axis=int(attributes.get("axis", 0)))]


def run_gather_elements(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """GatherElements."""
    return [np.take_along_axis(needed(inputs, 0), needed(inputs, 1), axis=int(attributes.get("axis", 0)))]


def run_gather_nd(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """GatherND without batch dimensions."""
    if attributes.get("batch_dims", 0):
        raise InputError("oracle: GatherND with batch dimensions is not computed here")
    return [needed(inputs, 0)[tuple(np.moveaxis(needed(inputs, 1), -1, 0))]]


def run_scatter_nd(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """ScatterND without a reduction."""
    if attributes.get("reduction", "none") != "none":
        raise InputError(f"oracle: ScatterND with the reduction {attributes['reduction']!r} is not computed here")
    out = np.array(needed(inputs, 0))
    out[tuple(np.moveaxis(needed(inputs, 1), -1, 0))] = needed(inputs, 2)
    return [out]


def run_pad(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Pad with a constant, by reflection, by the edge or around; negative amounts cut."""
    x, amounts = needed(inputs, 0), [int(p) for p in needed(inputs, 1)]
    axes = [a % x.ndim for a in given_or_range(given(inputs, 3), x.ndim)]
    margin = [(0, 0)] * x.ndim
    for i, axis in enumerate(axes):
        margin[axis] = (amounts[i], amounts[len(axes) + i])
    cut = tuple(slice(max(0, -b), x.shape[i] - max(0, -e)) for i, (b, e) in enumerate(margin))
    margin = [(max(0, b), max(0, e)) for b, e in margin]
    mode = str(attributes.get("mode", "constant"))
    if mode == "constant":
        value = given(inputs, 2)
        return [np.pad(x[cut], margin, constant_values=0 if value is None else value.reshape(-1)[0])]
    return [np.pad(x[cut], margin, mode=mode)]  # type: ignore[call-overload]


def run_tile(inputs: Inputs, _attributes: Attributes, _count: int) -> list[Array]:
    """Tile."""
    return [np.tile(needed(inputs, 0), [int(r) for r in needed(inputs, 1)])]


def run_shape(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Shape, or a part of it."""
    return [np.array(needed(inputs, 0).shape[attributes.get("start", 0) : attributes.get("end")], np.int64)]


def run_constant_of_shape(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """ConstantOfShape."""
    value = attributes.get("value")
    filled = np.zeros(1, np.float64) if value is None else wide(np.asarray(value))
    return [np.full([int(s) for s in needed(inputs, 0)], filled.reshape(-1)[0])]


def run_range(inputs: Inputs, _attributes: Attributes, _count: int) -> list[Array]:
    """Range."""
    start, limit, step = (wide(needed(inputs, i)).reshape(-1)[0] for i in range(3))
    return [np.arange(start, limit, step)]


def run_trilu(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Trilu: the upper or lower triangle."""
    x, offset = needed(inputs, 0), given(inputs, 1)
    k = 0 if offset is None else int(offset.reshape(-1)[0])
    return [np.triu(x, k) if attributes.get("upper", 1) else np.tril(x, k)]


def run_constant(_inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Constant in its numeric forms."""
    for name in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        if name in attributes:
            return [wide(np.asarray(attributes[name]))]
    raise InputError("oracle: a Constant holds no number")


def run_one_hot(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """OneHot."""
    indices, depth, values = needed(inputs, 0).astype(np.int64), int(needed(inputs, 1).reshape(-1)[0]), wide(needed(inputs, 2))
    hot = (indices[..., None] % depth) == np.arange(depth)
    return [np.moveaxis(np.where(hot, values[1], values[0]), -1, int(attributes.get("axis", -1)))]


VIEWS: dict[str, Operator] = {
    "Identity": lambda inputs, _attributes, _count: [needed(inputs, 0)],
    "Dropout": lambda inputs, _attributes, _count: [needed(inputs, 0)],
    "Reshape": run_reshape,
    "Flatten": run_flatten,
    "Transpose": run_transpose,
    "Squeeze": run_squeeze,
    "Unsqueeze": run_unsqueeze,
    "Slice": run_slice,
    "Split": run_split,
    "Concat": run_concat,
    "Expand": run_expand,
    "Gather": run_gather,
    "GatherElements": run_gather_elements,
    "GatherND": run_gather_nd,
    "ScatterND": run_scatter_nd,
    "Pad": run_pad,
    "Tile": run_tile,
    "Shape": run_shape,
    "Size": lambda inputs, _attributes, _count: [np.array(needed(inputs, 0).size, np.int64)],
    "ConstantOfShape": run_constant_of_shape,
    "Range": run_range,
    "Trilu": run_trilu,
    "Constant": run_constant,
    "OneHot": run_one_hot,
}
