"""What folding a scale and a shift into a layer does to its weight and bias."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import Array, add_constant, constant_of


def bias_of(node: ir.Node) -> Array | None:
    """Return the bias of a Conv or Linear with a constant weight, zeros where it has none, None where it is computed."""
    weight = constant_of(node.inputs[1])
    if weight is None:
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return np.zeros(weight.shape[0])
    bias = constant_of(node.inputs[2])
    return None if bias is None else bias.astype(np.float64)


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
