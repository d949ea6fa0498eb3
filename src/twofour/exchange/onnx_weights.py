"""Which initializers of an ONNX graph are weights, along which axis they are reduced, and why one cannot run sparse."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

# Operations that pass a weight on unchanged, element by element.
TRANSPARENT = frozenset({"Identity", "Cast", "QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class WeightUse:
    """One initializer as one node reads it.

    Attributes:
        name: the initializer.
        node: the node that multiplies with it, `operation` its kind.
        axis: the initializer's axis along which products are summed; the 2:4 groups run along it.
        why_not: why the sparse units cannot take it, empty when they can.
    """

    name: str
    node: str
    operation: str
    shape: tuple[int, ...]
    axis: int
    why_not: str
    values: npt.NDArray[Any]


def source_of(value: ir.Value | None, axis: int) -> tuple[ir.Value, int] | None:
    """Follow `value` back through casts, Q/DQ and transposes to an initializer; return it and the axis there, or None.

    A negative axis counts from the end.
    """
    while value is not None:
        if value.const_value is not None and value.is_initializer():
            return value, axis
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Transpose":
            perm = node.attributes.get_ints("perm", None)
            # Without perm the axes are reversed; a negative axis counts from the end, as in Python.
            axis = perm[axis] if perm is not None else -1 - axis
        elif node.op_type == "Constant" and value.const_value is not None:
            return value, axis
        elif node.op_type not in TRANSPARENT:
            return None
        value = node.inputs[0]
    return None


def candidates(node: ir.Node) -> list[tuple[int, int]]:
    """Return (input index, reduction axis of that input) of the operands that may be weights; a negative axis counts from the end."""
    if node.op_type == "Conv":
        return [(1, 1)]
    if node.op_type == "ConvTranspose":
        return [(1, 0)]
    if node.op_type == "Gemm":
        trans_a, trans_b = node.attributes.get_int("transA", 0), node.attributes.get_int("transB", 0)
        return [(0, 0 if trans_a else 1), (1, 1 if trans_b else 0)]
    if node.op_type == "MatMul":
        return [(0, -1), (1, -2)]
    return []


def reason_against(node: ir.Node, values: npt.NDArray[Any], axis: int) -> str:
    """Return why this use of a weight cannot run sparse, or an empty string."""
    if node.op_type == "ConvTranspose":
        return "transposed convolution"
    groups = node.attributes.get_int("group", 1) if node.op_type == "Conv" else 1
    if groups > 1:
        return "depthwise convolution" if values.shape[1] == 1 else f"grouped convolution ({groups} groups)"
    if values.shape[axis] % 4:
        return f"{values.shape[axis]} input channels are not a multiple of 4"
    return ""


def weights_of(model: ir.Model) -> list[WeightUse]:
    """Return every use of a floating or 8-bit initializer as an operand of a convolution or matrix product, in graph order."""
    uses = []
    for node in model.graph.all_nodes():
        if node.domain not in ("", "ai.onnx"):
            continue
        for index, axis in candidates(node):
            operand = node.inputs[index] if index < len(node.inputs) else None
            if operand is None:
                continue
            found = source_of(operand, axis)
            if found is None:
                continue
            value, own_axis = found
            assert value.const_value is not None
            values = value.const_value.numpy()
            if values.ndim < 2:
                continue
            own_axis %= values.ndim
            is_number = np.issubdtype(values.dtype, np.floating) or values.dtype.itemsize <= 2
            if is_number:
                uses.append(
                    WeightUse(
                        str(value.name),
                        node.name or f"{node.op_type}",
                        node.op_type,
                        tuple(values.shape),
                        own_axis,
                        reason_against(node, values, own_axis),
                        values,
                    )
                )
    return uses
