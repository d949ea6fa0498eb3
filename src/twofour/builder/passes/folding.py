"""What folding a scale and a shift into a layer does to its weight and bias."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import Array, add_constant, attribute, constant_of, is_fused, is_op
from twofour.builder.passes.precision import ROUNDING, SMALLEST, TYPES, lost


def bias_of(node: ir.Node) -> Array | None:
    """Return the bias of a Conv or Linear with a constant weight, zeros where it has none, None where it is computed."""
    weight = constant_of(node.inputs[1])
    if weight is None:
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(weight.shape[0])
    bias = constant_of(node.inputs[2])
    return None if bias is None else bias.astype(np.float64)


def fold_scale(graph: ir.Graph, node: ir.Node, value: ir.Value, factor: Array, addend: Array, precision: str) -> Array | None:
    """Fold `factor x + addend`, which is `value`, into the Conv or Linear that makes x, as far as the precision holds its weights.

    Returns None where that is whole. Else, an output channel each, the powers of two that x must still be multiplied by before `addend` is
    added; x then has weights of norm 1/2 to 1, so that it fits the precision if its inputs do. Where x is so already nothing is changed.
    """
    if keeps_digits(node, value, factor, addend, precision):
        fold_into(graph, node, factor, addend)
        return None
    sizes = np.linalg.norm(rows_of(node) * factor[:, None], axis=1)
    rest: Array = np.where(sizes > 0, np.exp2(np.frexp(sizes)[1]), 1.0)
    if np.any(rest != factor):
        fold_into(graph, node, factor / rest, np.zeros_like(rest))
    return rest


def rows_of(node: ir.Node) -> Array:
    """Return the weight of a Conv or Linear as `[outputs, …]` in fp64."""
    weight = constant_of(node.inputs[1])
    assert weight is not None
    return weight.reshape(weight.shape[0], -1).astype(np.float64)


def keeps_digits(node: ir.Node, value: ir.Value, factor: Array, addend: Array, precision: str) -> bool:
    """Whether folding into a Conv or Linear costs no channel of `value`, the folded output, digits by weights too small for the precision.

    With u the precision's rounding and s its smallest normal number, what a row v = factor w loses below s changes its output, for inputs
    of size 1, by about e = |v - rounded(v)|. That costs no digits where e is at most

    1. u |v|: rounding numbers from s on costs no more; or u |b'|, a part in 1 / u of the output;
    2. factor |w - rounded(w)|: unfolded, w loses as much;
    3. where products mix the channels on every way to an output: u times the root mean square of all rows' |v|, for rounding their
       neighbours costs as much; or u s, for rounding the output around zero does.
    """
    rows, bias = rows_of(node), bias_of(node)
    assert bias is not None
    dtype = TYPES[precision]
    folded = rows * factor[:, None]
    loss, sizes = lost(folded, dtype), np.linalg.norm(folded, axis=1)
    costly = loss > ROUNDING[dtype] * np.maximum(sizes, np.abs(factor * bias + addend))  # 1
    if np.any(costly):
        costly &= loss > np.abs(factor) * lost(rows, dtype)  # 2
    if np.any(costly) and are_mixed(value):
        costly &= loss > ROUNDING[dtype] * max(np.sqrt(np.mean(sizes**2)), SMALLEST[dtype])  # 3
    return not np.any(costly)


def are_mixed(value: ir.Value) -> bool:
    """Whether every way from a value to an output of the graph leads through a product with a weight, depthwise and grouped ones apart."""
    seen, pending = {value}, [value]
    while pending:
        found = pending.pop()
        if found.is_graph_output():
            return False
        for use in found.uses():
            if use.idx != 0 or not mixes(use.node):
                pending += [output for output in use.node.outputs if output not in seen]
                seen |= set(use.node.outputs)
    return True


def mixes(node: ir.Node) -> bool:
    """Whether a node sums over all channels of its first input."""
    if is_op(node, "MatMul", "Gemm"):
        return constant_of(node.inputs[1]) is not None
    return is_fused(node, "Linear") or (
        (is_op(node, "Conv") and attribute(node, "group", 1) == 1) or (is_fused(node, "Conv") and attribute(node, "groups") == 1)
    )


def fold_into(graph: ir.Graph, node: ir.Node, factor: Array, addend: Array) -> None:
    """Give a Conv or Linear the weight `factor w` and the bias `factor b + addend`, an output channel each."""
    weight, bias = constant_of(node.inputs[1]), bias_of(node)
    assert weight is not None
    assert bias is not None
    stem = str(node.inputs[1].name)  # type: ignore[union-attr]
    scaled = weight.astype(np.float64) * factor.reshape(-1, *[1] * (weight.ndim - 1))
    if np.any(factor != 1):
        node.replace_input_with(1, add_constant(graph, scaled, f"{stem}.folded"))
    shift = add_constant(graph, factor * bias + addend, f"{stem}.bias")
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    node.replace_input_with(2, shift)
