"""Attention recognition: softmax(scale q k^T) v, as exporters spell it out, becomes one Attention."""

from math import sqrt

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import add_constant, attribute, is_op, make_node, nodes_of, only_use, producer, replace, scalar_of, shape_of
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.linear import permuted, reshaped
from twofour.kernels.attention.contract import Problem
from twofour.kernels.attention.cudnn import why_not


class Attentions(Rewrite):
    """Replaces MatMul, Softmax, MatMul by Attention on `[batch, tokens, heads, head]`.

    1. MatMul(Softmax(MatMul(q, k^T)), v) with operands of three or four axes. A scalar that multiplies or divides q, k^T, or the
       product becomes the scale; dynamo writes the square root of the scale on both q and k^T.
    2. The operator Attention of opset 23 without mask or cache, in its 4-D and 3-D forms.

    A mask or bias between product and softmax, a second reader of the scores, or heads that no library computes in one step keep the
    parts as they are; the operator becomes them.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Match from the second product on."""
        count = 0
        for node in nodes_of(graph):
            if is_op(node, "MatMul"):
                count += self._formula(graph, node)
            elif is_op(node, "Attention"):
                count += self._operator(graph, node)
        return count

    def _formula(self, graph: ir.Graph, node: ir.Node) -> bool:  # 1
        weights, v = node.inputs
        softmax = producer(weights)
        if weights is None or v is None or not is_op(softmax, "Softmax") or softmax is None or only_use(weights) is not node:
            return False
        scores = softmax.inputs[0]
        rank = len(shape_of(weights))
        if scores is None or rank not in (3, 4) or attribute(softmax, "axis", -1) not in (-1, rank - 1) or only_use(scores) is not softmax:
            return False
        scale, product = unscaled(scores)
        first = producer(product)
        if first is None or not is_op(first, "MatMul") or only_use(product) is None:
            return False
        (q_scale, q), (k_scale, k) = (unscaled(value) for value in first.inputs)  # type: ignore[arg-type]
        scale *= q_scale * k_scale
        shapes = [shape_of(value) for value in (q, k, v)]
        if scale <= 0 or any(len(shape) != rank or shape[:-2] != shapes[0][:-2] for shape in shapes):
            return False
        if shapes[2][-1] != shapes[0][-1] or not in_one_step(shapes[0][-1]):
            return False
        turned = [0, 1, 3, 2] if rank == 4 else [0, 2, 1]
        out = self._make(graph, node, q, permuted(graph, node, k, turned), v, scale, causal=False)
        replace(graph, node.outputs[0], out)
        return True

    def _operator(self, graph: ir.Graph, node: ir.Node) -> bool:  # 2
        q, k, v = (value for value in node.inputs[:3])
        if q is None or k is None or v is None or any(value is not None for value in node.inputs[3:]):
            return False
        flat = len(shape_of(q)) == 3
        if flat:
            heads = int(attribute(node, "q_num_heads"))
            q, k, v = (
                permuted(graph, node, reshaped(graph, node, x, (*shape_of(x)[:2], heads, shape_of(x)[2] // heads)), [0, 2, 1, 3])
                for x in (q, k, v)
            )
        if shape_of(k)[1] != shape_of(q)[1] or shape_of(v)[-1] != shape_of(q)[-1] or attribute(node, "softcap", 0.0):
            return False
        scale = attribute(node, "scale") or 1 / sqrt(shape_of(q)[-1])
        make = self._make if in_one_step(shape_of(q)[-1]) else self._spelled
        out = make(graph, node, q, k, v, float(scale), causal=bool(attribute(node, "is_causal", 0)))
        if flat:
            out = reshaped(graph, node, permuted(graph, node, out, [0, 2, 1, 3]), shape_of(node.outputs[0]))
        replace(graph, node.outputs[0], out)
        return True

    def _make(self, graph: ir.Graph, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value, scale: float, *, causal: bool) -> ir.Value:
        """Return Attention of q, k, v `[(batch,) heads, tokens, head]` in the same order of axes."""
        flat = len(shape_of(q)) == 3
        if flat:
            q, k, v = (reshaped(graph, node, x, (shape_of(x)[0], 1, *shape_of(x)[1:])) for x in (q, k, v))
        q, k, v = (permuted(graph, node, x, [0, 2, 1, 3]) for x in (q, k, v))
        out = make_node(graph, node, "Attention", [q, k, v], shape_of(q), {"scale": scale, "causal": int(causal)}, like=node)
        out = permuted(graph, node, out, [0, 2, 1, 3])
        return reshaped(graph, node, out, (shape_of(out)[0], *shape_of(out)[2:])) if flat else out

    def _spelled(self, graph: ir.Graph, node: ir.Node, q: ir.Value, k: ir.Value, v: ir.Value, scale: float, *, causal: bool) -> ir.Value:
        """Return attention of q, k, v `[batch, heads, tokens, head]` by its parts."""

        def step(kind: str, inputs: list[ir.Value | None], shape: tuple[int, ...]) -> ir.Value:
            return make_node(graph, node, kind, inputs, shape, {"axis": -1} if kind == "Softmax" else {}, domain="", like=node)

        shape = (*shape_of(q)[:3], shape_of(k)[2])
        # The scale comes first: unscaled scores may be too large for fp16.
        q = step("Mul", [q, add_constant(graph, np.array(scale, np.float32), "scale")], shape_of(q))
        scores = step("MatMul", [q, permuted(graph, node, k, [0, 1, 3, 2])], shape)
        if causal:
            later = np.triu(np.full(shape[2:], -np.inf, np.float32), 1)
            scores = step("Add", [scores, add_constant(graph, later, "later")], shape)
        return step("MatMul", [step("Softmax", [scores], shape), v], shape_of(q))


def in_one_step(head: int) -> bool:
    """Whether a library computes attention of heads of that many features."""
    return why_not(Problem(1, 1, 1, 1, head, 1.0)) is None


def unscaled(value: ir.Value) -> tuple[float, ir.Value]:
    """Return (c, x) where `value` is c x by a Mul or Div with a scalar that only its reader sees, else (1, value)."""
    node = producer(value)
    if node is None or not is_op(node, "Mul", "Div") or only_use(value) is None:
        return 1.0, value
    a, b = node.inputs
    number = scalar_of(b)
    if number and a is not None:
        return (1 / number if is_op(node, "Div") else number), a
    number = scalar_of(a) if is_op(node, "Mul") else None
    return (number, b) if number and b is not None else (1.0, value)
