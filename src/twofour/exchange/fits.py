"""Which ONNX nodes have operands that do not fit each other, where shape inference does not look."""

from collections.abc import Callable, Sequence
from math import prod

import onnx_ir as ir

from twofour.exchange.support import number


def sizes(node: ir.Node, index: int) -> tuple[int, ...] | None:
    """Return the static shape of an input, None where it is left out or not known."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.shape is None or not all(isinstance(size, int) for size in value.shape):
        return None
    return tuple(int(size) for size in value.shape)  # type: ignore[arg-type]


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether `shape` repeated gives `target`."""
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(target), strict=False))


def _conv(node: ir.Node) -> str:
    x, weight, bias = (sizes(node, i) for i in range(3))
    if x is None or weight is None:
        return ""
    groups = int(number(node, "group", 1))
    if len(weight) != len(x):
        return f"its weight has {len(weight)} axes, its input {len(x)}"
    if groups < 1 or weight[1] * groups != x[1]:
        return f"its weight is for {groups} groups of {weight[1]} channels, its input has {x[1]}"
    if weight[0] % groups:
        return f"its {weight[0]} outputs are no multiple of its {groups} groups"
    kernel = node.attributes.get("kernel_shape")
    if kernel is not None and tuple(kernel.value) != weight[2:]:  # type: ignore[union-attr]
        return f"kernel_shape is {list(kernel.value)}, its weight's {list(weight[2:])}"  # type: ignore[union-attr]
    return f"its bias has {list(bias)} values, expected {weight[0]}" if bias is not None and not broadcasts(bias, weight[:1]) else ""


def _gemm(node: ir.Node) -> str:
    bias, out = sizes(node, 2), node.outputs[0].shape
    if bias is None or out is None or broadcasts(bias, tuple(out)):  # type: ignore[arg-type]
        return ""
    return f"its bias of shape {list(bias)} cannot be added to {list(out)}"


def _slope(node: ir.Node) -> str:
    x, slope = sizes(node, 0), sizes(node, 1)
    return "" if x is None or slope is None or broadcasts(slope, x) else f"its slope of shape {list(slope)} does not fit {list(x)}"


def _norm_along(node: ir.Node) -> str:
    x = sizes(node, 0)
    if x is None:
        return ""
    axis = int(number(node, "axis", -1))
    for index in range(1, len(node.inputs)):
        vector = sizes(node, index)
        if vector is not None and not broadcasts(vector, x[axis:]):
            return f"its scale or bias of shape {list(vector)} does not fit {list(x[axis:])}"
    return ""


def _norm_of_channels(node: ir.Node) -> str:
    x = sizes(node, 0)
    # Up to opset 20 a GroupNormalization scales groups, later channels.
    allowed = () if x is None or len(x) < 2 else ((x[1],), (int(number(node, "num_groups", x[1])),))
    for index in range(1, len(node.inputs)):
        vector = sizes(node, index)
        if allowed and vector is not None and vector not in allowed:
            return f"its vectors have {list(vector)} values, its input {x[1]} channels"  # type: ignore[index]
    return ""


def _reshape(node: ir.Node) -> str:
    x, out = sizes(node, 0), node.outputs[0].shape
    if x is None or out is None or not all(isinstance(size, int) for size in out) or prod(x) == prod(out):  # type: ignore[arg-type]
        return ""
    return f"{list(x)} cannot become {list(out)}"


CHECKS: dict[str, Callable[[ir.Node], str]] = {
    "Conv": _conv,
    "Gemm": _gemm,
    "PRelu": _slope,
    "Reshape": _reshape,
    "LayerNormalization": _norm_along,
    "RMSNormalization": _norm_along,
    "BatchNormalization": _norm_of_channels,
    "InstanceNormalization": _norm_of_channels,
    "GroupNormalization": _norm_of_channels,
}


def why_ill_formed(node: ir.Node) -> str:
    """Return why a node of a graph with static shapes cannot be computed by anyone, or an empty string."""
    return CHECKS[node.op_type](node) if node.domain in ("", "ai.onnx") and node.op_type in CHECKS else ""
