"""Linear fusion: matrix products with a constant weight become Linear, whatever the exporter called them."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import (
    Array,
    add_constant,
    attribute,
    constant_of,
    is_fused,
    is_op,
    make_node,
    nodes_of,
    producer,
    replace,
    shape_of,
)
from twofour.builder.passes.infra import Rewrite, forbid


class Linears(Rewrite):
    """Replaces products with constants by Linear (weight `[outputs, inputs]`), which works on the last axis of any rank.

    1. MatMul(x, W), W of two axes. 2. Gemm(x, W, c) with c one number an output; alpha and beta go into W and c.
    3. MatMul(W, x), W of two axes: transpose x, Linear, transpose back.
    4. Einsum of two operands that is a batched product: transposes around a MatMul.
    5. Linear(Reshape(x)), the Reshape joining leading axes only: Reshape(Linear(x)), so that the axes stay known.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Rewrite in graph order."""
        count = 0
        for node in nodes_of(graph):
            if is_op(node, "Einsum"):
                count += self._einsum(graph, node)
        for node in nodes_of(graph):
            if is_op(node, "MatMul"):
                count += self._matmul(graph, node)
            elif is_op(node, "Gemm"):
                count += self._gemm(graph, node)
        for node in nodes_of(graph):
            if is_fused(node, "Linear"):
                count += self._regrouped(graph, node)
        return count

    def ensures(self, model: ir.Model) -> None:
        """Every Gemm is a Linear."""
        forbid(model, self.name, "Gemm")

    def _matmul(self, graph: ir.Graph, node: ir.Node) -> bool:
        a, b = node.inputs
        assert a is not None
        assert b is not None
        right, left = constant_of(b), constant_of(a)
        if right is not None and right.ndim == 2:  # 1
            weight = add_constant(graph, right.T, f"{b.name}.weight")
            replace(graph, node.outputs[0], make_node(graph, node, "Linear", [a, weight], shape_of(node.outputs[0]), like=node))
            return True
        if left is not None and left.ndim == 2 and len(shape_of(b)) >= 2:  # 3
            weight = add_constant(graph, left, f"{a.name}.weight")
            turned = swapped(graph, node, b)
            product = make_node(graph, node, "Linear", [turned, weight], (*shape_of(turned)[:-1], left.shape[0]), like=node)
            replace(graph, node.outputs[0], swapped(graph, node, product))
            return True
        return False

    def _gemm(self, graph: ir.Graph, node: ir.Node) -> bool:  # 2
        x, weight = node.inputs[0], constant_of(node.inputs[1])
        if x is None or weight is None or attribute(node, "transA", 0):
            return False
        matrix = (weight if attribute(node, "transB", 0) else weight.T) * np.float32(attribute(node, "alpha", 1.0))
        inputs = [x, add_constant(graph, matrix, f"{node.inputs[1].name}.weight")]  # type: ignore[union-attr]
        extra = node.inputs[2] if len(node.inputs) > 2 else None
        constant = constant_of(extra)
        is_bias = (
            constant is not None
            and constant.size in (1, matrix.shape[0])
            and (constant.ndim < 2 or constant.shape[-1] != 1 or constant.size == 1)
        )
        beta = float(attribute(node, "beta", 1.0))
        if constant is not None and is_bias:
            bias: Array = np.broadcast_to(constant.reshape(-1) * np.float32(beta), (matrix.shape[0],))
            inputs.append(add_constant(graph, bias, f"{extra.name}.bias"))  # type: ignore[union-attr]
        product = make_node(graph, node, "Linear", inputs, shape_of(node.outputs[0]), like=node)
        if extra is not None and not is_bias:
            scaled = extra
            if beta != 1.0:
                factor = add_constant(graph, np.array(beta, np.float32), "beta")
                scaled = make_node(graph, node, "Mul", [extra, factor], shape_of(extra), domain="", like=node)
            product = make_node(graph, node, "Add", [product, scaled], shape_of(product), domain="", like=node)
        replace(graph, node.outputs[0], product)
        return True

    def _regrouped(self, graph: ir.Graph, node: ir.Node) -> bool:  # 5
        reshape, weight = producer(node.inputs[0]), constant_of(node.inputs[1])
        if not is_op(reshape, "Reshape") or reshape is None or weight is None or reshape.inputs[0] is None:
            return False
        x = reshape.inputs[0]
        shape, inputs = shape_of(x), weight.shape[1]
        lead = leading(shape, inputs)
        if lead is None or len(shape) <= 2 or (*lead, inputs) == shape_of(node.inputs[0]):  # type: ignore[arg-type]
            return False
        if shape[-1] != inputs:
            x = reshaped(graph, node, x, (*lead, inputs))
        grown = make_node(graph, node, "Linear", [x, *node.inputs[1:]], (*lead, weight.shape[0]), like=node)
        replace(graph, node.outputs[0], reshaped(graph, node, grown, shape_of(node.outputs[0])))
        return True

    def _einsum(self, graph: ir.Graph, node: ir.Node) -> bool:  # 4
        terms, _, out = str(attribute(node, "equation")).replace(" ", "").partition("->")
        parts = terms.split(",")
        a, b = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
        if len(parts) != 2 or a is None or b is None:
            return False
        sizes = dict(zip(parts[0] + parts[1], (*shape_of(a), *shape_of(b)), strict=True))
        contracted = [c for c in parts[0] if c in parts[1] and c not in out]
        shared = [c for c in out if c in parts[0] and c in parts[1]]
        rows, columns = ([c for c in out if c in part and c not in shared] for part in parts)
        if not contracted or set(parts[0]) | set(parts[1]) != {*contracted, *shared, *rows, *columns}:
            return False

        def size(labels: list[str]) -> int:
            return int(np.prod([sizes[c] for c in labels], dtype=np.int64))

        lead = [sizes[c] for c in shared]
        left = permuted(graph, node, a, [parts[0].index(c) for c in (*shared, *rows, *contracted)])
        right = permuted(graph, node, b, [parts[1].index(c) for c in (*shared, *contracted, *columns)])
        left = reshaped(graph, node, left, (*lead, size(rows), size(contracted)))
        right = reshaped(graph, node, right, (*lead, size(contracted), size(columns)))
        product = make_node(graph, node, "MatMul", [left, right], (*lead, size(rows), size(columns)), domain="", like=node)
        order = [*shared, *rows, *columns]
        product = reshaped(graph, node, product, tuple(sizes[c] for c in order))
        replace(graph, node.outputs[0], permuted(graph, node, product, [order.index(c) for c in out]))
        return True


def leading(shape: tuple[int, ...], inputs: int) -> tuple[int, ...] | None:
    """Return the axes in front of those whose product is `inputs`, None where no such split exists."""
    product, axis = 1, len(shape)
    while product < inputs and axis > 0:
        axis -= 1
        product *= shape[axis]
    return shape[:axis] if product == inputs else None


def reshaped(graph: ir.Graph, before: ir.Node, x: ir.Value, shape: tuple[int, ...]) -> ir.Value:
    """Return `x` reshaped in front of `before`, `x` itself where it has the shape."""
    if shape_of(x) == tuple(shape):
        return x
    to = add_constant(graph, np.array(shape, np.int64), "shape")
    dtype = x.dtype or ir.DataType.FLOAT
    return make_node(graph, before, "Reshape", [x, to], shape, domain="", like=before, stem=f"{x.name}.reshape", dtype=dtype)


def permuted(graph: ir.Graph, before: ir.Node, x: ir.Value, perm: list[int]) -> ir.Value:
    """Return `x` transposed in front of `before`, `x` itself where the order stays."""
    if perm == sorted(perm):
        return x
    shape = shape_of(x)
    dtype = x.dtype or ir.DataType.FLOAT
    return make_node(
        graph,
        before,
        "Transpose",
        [x],
        [shape[p] for p in perm],
        {"perm": perm},
        domain="",
        like=before,
        stem=f"{x.name}.transpose",
        dtype=dtype,
    )


def swapped(graph: ir.Graph, before: ir.Node, x: ir.Value) -> ir.Value:
    """Return `x` with its last two axes swapped."""
    rank = len(shape_of(x))
    return permuted(graph, before, x, [*range(rank - 2), rank - 1, rank - 2])
