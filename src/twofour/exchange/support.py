"""Which ONNX nodes the engine can carry out, and why not another."""

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# One pass or another turns each of these into steps of the engine; conditions are below.
ALWAYS = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "And", "Or", "Not", "Equal", "Less", "LessOrEqual", "Greater"),
        *("GreaterOrEqual", "PRelu", "Neg", "Abs", "Sqrt", "Reciprocal", "Exp", "Log", "Erf", "Tanh", "Floor", "Ceil", "Sigmoid", "Relu"),
        *("Softplus", "HardSwish", "Mish", "HardSigmoid", "LeakyRelu", "Elu", "Gelu", "Swish", "Cast", "Where", "Clip"),
        *("Identity", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Expand", "Split"),
        *("DepthToSpace", "SpaceToDepth", "MatMul", "GlobalAveragePool", "GlobalMaxPool", "Softmax"),
        *("InstanceNormalization", "GroupNormalization", "LayerNormalization", "RMSNormalization"),
    }
)
NO_OPERATOR = "no such operator"
REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2"})


def constant(node: ir.Node, index: int) -> bool:
    """Whether an input is left out or known before the graph runs."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return value is None or value.is_initializer()


def text(node: ir.Node, name: str, default: str) -> str:
    """Return a string attribute."""
    found = node.attributes.get(name)
    return default if found is None else str(found.value)  # type: ignore[union-attr]


def number(node: ir.Node, name: str, default: float) -> float:
    """Return a numeric attribute."""
    found = node.attributes.get(name)
    return default if found is None else float(found.value)  # type: ignore[union-attr]


def rank(node: ir.Node, index: int = 0) -> int:
    """Return the number of axes of an input."""
    value = node.inputs[index]
    return -1 if value is None or value.shape is None else len(value.shape)


def _conv(node: ir.Node) -> str:
    if not constant(node, 1) or not constant(node, 2):
        return "its weight is computed at run time"
    return "" if rank(node) in (3, 4) else f"{rank(node) - 2}-dimensional convolution"


def _pool(node: ir.Node) -> str:
    if rank(node) not in (3, 4):
        return f"{rank(node) - 2}-dimensional pooling"
    return "column-major storage order" if number(node, "storage_order", 0) else ""


def _resize(node: ir.Node) -> str:
    if text(node, "mode", "nearest") not in ("nearest", "linear"):
        return f"mode {text(node, 'mode', 'nearest')}"
    if rank(node) != 4:
        return f"{rank(node)} axes, expected 4"
    modes = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    coordinates = text(node, "coordinate_transformation_mode", "half_pixel")
    if coordinates not in modes:
        return f"coordinates {coordinates}"
    if number(node, "antialias", 0) or text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return "antialias or a kept aspect ratio"
    shape, out = node.inputs[0].shape, node.outputs[0].shape  # type: ignore[union-attr]
    return "resizes batch or channels" if shape is None or out is None or shape[0] != out[0] or shape[1] != out[1] else ""


def _gather(node: ir.Node) -> str:
    if not constant(node, 1):
        return "its indices are computed at run time"
    value = node.inputs[1]
    assert value is not None
    assert value.const_value is not None
    sizes = node.inputs[0].shape  # type: ignore[union-attr]
    size = None if sizes is None else sizes[int(number(node, "axis", 0))]
    if not isinstance(size, int):
        return "an axis whose size is not known"
    indices = value.const_value.numpy()
    if indices.size and not -size <= indices.min() <= indices.max() < size:
        return f"indices outside its axis of {size}"
    return "" if affine(indices, size) is not None else "indices that are not evenly spaced"


def affine(indices: npt.NDArray[np.integer[Any]], size: int) -> tuple[int, list[int]] | None:
    """Return (first, step an axis of the indices) where they are evenly spaced and do not go backwards, else None.

    Negative indices count from the end of the `size` elements.
    """
    if not indices.size:
        return None
    found = np.where(indices < 0, indices + size, indices).astype(np.int64)
    first = int(found.reshape(-1)[0])
    corner = (0,) * found.ndim
    steps = [int(found[(*corner[:a], 1, *corner[a + 1 :])]) - first if n > 1 else 0 for a, n in enumerate(found.shape)]
    rebuilt = first + sum(np.arange(n).reshape(-1, *[1] * (found.ndim - 1 - a)) * steps[a] for a, n in enumerate(found.shape))
    return (first, steps) if min(steps, default=0) >= 0 and np.array_equal(np.broadcast_to(rebuilt, found.shape), found) else None


def _slice(node: ir.Node) -> str:
    if not all(constant(node, i) for i in range(1, 5)):
        return "its bounds are computed at run time"
    steps = node.inputs[4] if len(node.inputs) > 4 else None
    return "steps backwards" if steps is not None and (steps.const_value.numpy() < 0).any() else ""  # type: ignore[union-attr]


def _pad(node: ir.Node) -> str:
    if text(node, "mode", "constant") != "constant":
        return f"mode {text(node, 'mode', 'constant')}"
    if not all(constant(node, i) for i in range(1, 4)):
        return "its amounts are computed at run time"
    return "negative amounts" if (node.inputs[1].const_value.numpy() < 0).any() else ""  # type: ignore[union-attr]


def _tile(node: ir.Node) -> str:
    if not constant(node, 1):
        return "its repeats are computed at run time"
    shape, out = node.inputs[0].shape, node.outputs[0].shape  # type: ignore[union-attr]
    same = shape is not None and out is not None and all(a in (1, b) for a, b in zip(shape, out, strict=True))
    return "" if same else "repeats of an axis that is not of size 1"


def _gemm(node: ir.Node) -> str:
    return "" if constant(node, 1) and constant(node, 2) and not number(node, "transA", 0) else "its weight is computed at run time"


def _attention(node: ir.Node) -> str:
    if len(node.inputs) > 3 and any(value is not None for value in node.inputs[3:]):
        return "a mask or a cache"
    queries, keys = number(node, "q_num_heads", 0), number(node, "kv_num_heads", 0)
    if rank(node) == 4:
        queries, keys = (float(node.inputs[i].shape[1]) for i in (0, 1))  # type: ignore[union-attr, index, arg-type]
    return "soft capping" if number(node, "softcap", 0) else "" if queries == keys else "grouped queries"


def _einsum(node: ir.Node) -> str:
    terms, _, out = text(node, "equation", "").replace(" ", "").partition("->")
    parts = terms.split(",")
    if len(parts) != 2 or not out or "." in terms:
        return f"equation {terms}->{out}"
    a, b = parts
    simple = all(len(set(part)) == len(part) for part in (a, b, out))
    contracted = set(a) & set(b) - set(out)
    return "" if simple and contracted and set(a) | set(b) == set(out) | contracted else f"equation {terms}->{out}"


def _reduction(node: ir.Node) -> str:
    return "" if constant(node, 1) else "its axes are computed at run time"


def _batch_norm(node: ir.Node) -> str:
    return "statistics of the batch (training_mode)" if number(node, "training_mode", 0) else ""


def _dropout(node: ir.Node) -> str:
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None or (mode.const_value is not None and not np.any(mode.const_value.numpy())):
        return ""
    return "values dropped at random (training_mode)"


CONDITIONS = {
    "BatchNormalization": _batch_norm,
    "Dropout": _dropout,
    "Conv": _conv,
    "MaxPool": _pool,
    "AveragePool": _pool,
    "Resize": _resize,
    "Gather": _gather,
    "Slice": _slice,
    "Pad": _pad,
    "Gemm": _gemm,
    "Tile": _tile,
    "Attention": _attention,
    "Einsum": _einsum,
    **dict.fromkeys(REDUCTIONS, _reduction),
}


def why_unsupported(node: ir.Node) -> str:
    """Return why the engine cannot carry out a node of an imported graph, or an empty string."""
    if node.domain == "twofour":
        return ""
    if node.domain not in ("", "ai.onnx") or (node.op_type not in ALWAYS and node.op_type not in CONDITIONS):
        return NO_OPERATOR
    used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    if node.op_type != "Split" and (len(used) > 1 or (used and used[0] is not node.outputs[0])):
        return "more than its first output is used"
    if any(value.shape is None or not all(isinstance(size, int) for size in value.shape) for value in used):
        return "its output's size is not known before it runs"
    if any(0 in value.shape for value in used if value.shape is not None):
        return "its output is empty"
    return CONDITIONS[node.op_type](node) if node.op_type in CONDITIONS else ""
