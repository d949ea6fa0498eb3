"""Layout: image operators work channels-last, with transposes around them that the next pass sinks and cancels."""

from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import add_constant, attribute, constant_of, is_op, make_node, nodes_of, replace, shape_of
from twofour.builder.passes.infra import Rewrite, forbid
from twofour.builder.passes.linear import permuted, reshaped
from twofour.oracle.operators.windows import explicit_pads, output_sizes

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
REDUCTIONS = {"ReduceMean": "mean", "ReduceSum": "sum", "ReduceMax": "max", "ReduceL2": "l2"}


class Layout(Rewrite):
    """Replaces image operators by those of the fused graph, x NHWC and weights `[K, R, S, C / groups]`.

    1. Conv; of one spatial axis: an image of one row.
    2. MaxPool, AveragePool; one window over the whole image, and the global pools: Reduce.
    3. Resize.
    4. ReduceMean, ReduceSum, ReduceMax, ReduceL2: Reduce with its axes kept, then a Reshape where they were not.
    5. Softmax: Reduce along the last axis, transposed there and back if it was another.
    6. DepthToSpace, SpaceToDepth: reshapes and a transpose.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Replace node by node."""
        makers = {"Conv": self._conv, "MaxPool": self._pool, "AveragePool": self._pool, "Resize": self._resize, "Softmax": self._softmax}
        makers |= {"GlobalAveragePool": self._global_pool, "GlobalMaxPool": self._global_pool}
        makers |= {"DepthToSpace": self._blocks, "SpaceToDepth": self._blocks, **dict.fromkeys(REDUCTIONS, self._reduce)}
        count = 0
        for node in nodes_of(graph):
            if is_op(node, *makers):
                replace(graph, node.outputs[0], makers[node.op_type](graph, node))
                count += 1
        return count

    def ensures(self, model: ir.Model) -> None:
        """None of the operators is left."""
        forbid(model, self.name, "Conv", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize", "Softmax", *REDUCTIONS)

    def _image(self, graph: ir.Graph, node: ir.Node) -> tuple[ir.Value, tuple[int, ...], bool]:
        """Return x NHWC, its NCHW shape, and whether it had one spatial axis only."""
        x = node.inputs[0]
        assert x is not None
        shape = shape_of(x)
        line = len(shape) == 3
        if line:
            x, shape = reshaped(graph, node, x, (*shape[:2], 1, shape[2])), (*shape[:2], 1, shape[2])
        return permuted(graph, node, x, TO_LAST), shape, line

    def _windows(
        self, node: ir.Node, shape: tuple[int, ...], kernel: list[int], line: bool
    ) -> tuple[list[int], list[int], list[int], list[int]]:
        """Return kernel, strides, pads and dilations of two spatial axes."""
        n = 1 if line else 2
        strides, dilations = (list(attribute(node, name) or [1] * n) for name in ("strides", "dilations"))
        given = {name: attribute(node, name) for name in ("pads", "auto_pad") if attribute(node, name) is not None}
        pads = explicit_pads(shape[-n:], kernel, strides, dilations, given)
        if line:
            kernel, strides, dilations, pads = [1, *kernel], [1, *strides], [1, *dilations], [0, pads[0], 0, pads[1]]
        return kernel, strides, pads, dilations

    def _back(self, graph: ir.Graph, node: ir.Node, y: ir.Value) -> ir.Value:
        """Return y NHWC as the operator's output: NCHW, one spatial axis where it had one."""
        return reshaped(graph, node, permuted(graph, node, y, TO_FIRST), shape_of(node.outputs[0]))

    def _conv(self, graph: ir.Graph, node: ir.Node) -> ir.Value:  # 1
        x, shape, line = self._image(graph, node)
        weight = constant_of(node.inputs[1])
        assert weight is not None
        weight = weight[:, :, None] if line else weight
        kernel, strides, pads, dilations = self._windows(node, shape, list(weight.shape[3:] if line else weight.shape[2:]), line)
        last = add_constant(graph, np.ascontiguousarray(np.moveaxis(weight, 1, -1)), f"{node.inputs[1].name}.krsc")  # type: ignore[union-attr]
        sizes = output_sizes(shape[2:], kernel, strides, dilations, pads)
        attributes = {"kernel": kernel, "strides": strides, "pads": pads, "dilations": dilations, "groups": attribute(node, "group", 1)}
        y = make_node(graph, node, "Conv", [x, last, *node.inputs[2:]], (shape[0], *sizes, weight.shape[0]), attributes, like=node)
        return self._back(graph, node, y)

    def _pool(self, graph: ir.Graph, node: ir.Node) -> ir.Value:  # 2
        kind = "max" if node.op_type == "MaxPool" else "average"
        x = node.inputs[0]
        assert x is not None
        covers = list(attribute(node, "kernel_shape")) == list(shape_of(x)[2:]) and not any(attribute(node, "pads") or [0])
        if covers and np.prod(shape_of(node.outputs[0])[2:]) == 1 and not any(d > 1 for d in attribute(node, "dilations") or [1]):
            return self._global(graph, node, kind)
        x, shape, line = self._image(graph, node)
        kernel, strides, pads, dilations = self._windows(node, shape, list(attribute(node, "kernel_shape")), line)
        sizes = output_sizes(shape[2:], kernel, strides, dilations, pads, bool(attribute(node, "ceil_mode", 0)))
        reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(sizes, strides, dilations, kernel, strict=True)]
        over = [max(0, reach[i] - shape[2 + i] - pads[i] - pads[2 + i]) for i in range(2)]
        attributes: dict[str, Any] = {
            "kind": kind,
            "kernel": kernel,
            "strides": strides,
            "pads": pads,
            "dilations": dilations,
            "ceil": over,
        }
        attributes["count_include_pad"] = int(attribute(node, "count_include_pad", 0))
        return self._back(graph, node, make_node(graph, node, "Pool", [x], (shape[0], *sizes, shape[1]), attributes, like=node))

    def _global(self, graph: ir.Graph, node: ir.Node, kind: str) -> ir.Value:
        x = node.inputs[0]
        assert x is not None
        shape = shape_of(x)
        attributes = {"kind": "mean" if kind == "average" else "max", "axes": list(range(2, len(shape))), "eps": 0.0}
        return make_node(graph, node, "Reduce", [x], (*shape[:2], *[1] * (len(shape) - 2)), attributes, like=node)

    def _global_pool(self, graph: ir.Graph, node: ir.Node) -> ir.Value:  # 2
        return self._global(graph, node, "max" if node.op_type == "GlobalMaxPool" else "average")

    def _resize(self, graph: ir.Graph, node: ir.Node) -> ir.Value:  # 3
        x, shape, _ = self._image(graph, node)
        height, width = shape_of(node.outputs[0])[2:]
        scales = constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
        axes = list(attribute(node, "axes") or range(4))
        factors = [height / shape[2], width / shape[3]]
        if scales is not None and scales.size:
            factors = [float(scales[axes.index(axis)]) if axis in axes else 1.0 for axis in (2, 3)]
        attributes = {"kind": attribute(node, "mode", "nearest"), "height": height, "width": width, "scales": factors}
        attributes["coordinates"] = attribute(node, "coordinate_transformation_mode", "half_pixel")
        attributes["nearest_mode"] = attribute(node, "nearest_mode", "round_prefer_floor")
        return self._back(graph, node, make_node(graph, node, "Resize", [x], (shape[0], height, width, shape[1]), attributes, like=node))

    def _reduce(self, graph: ir.Graph, node: ir.Node) -> ir.Value:  # 4
        x = node.inputs[0]
        assert x is not None
        shape = shape_of(x)
        given = constant_of(node.inputs[1]) if len(node.inputs) > 1 else attribute(node, "axes")
        if (given is None or not len(given)) and attribute(node, "noop_with_empty_axes", 0):
            return x
        axes = sorted({int(a) % len(shape) for a in given}) if given is not None and len(given) else list(range(len(shape)))
        kept = tuple(1 if a in axes else n for a, n in enumerate(shape))
        attributes = {"kind": REDUCTIONS[node.op_type], "axes": axes, "eps": 0.0}
        return reshaped(graph, node, make_node(graph, node, "Reduce", [x], kept, attributes, like=node), shape_of(node.outputs[0]))

    def _softmax(self, graph: ir.Graph, node: ir.Node) -> ir.Value:  # 5
        x = node.inputs[0]
        assert x is not None
        rank = len(shape_of(x))
        axis = int(attribute(node, "axis", -1)) % rank
        perm = [*(a for a in range(rank) if a != axis), axis]
        turned = permuted(graph, node, x, perm)
        attributes = {"kind": "softmax", "axes": [rank - 1], "eps": 0.0}
        y = make_node(graph, node, "Reduce", [turned], shape_of(turned), attributes, like=node)
        return permuted(graph, node, y, [perm.index(a) for a in range(rank)])

    def _blocks(self, graph: ir.Graph, node: ir.Node) -> ir.Value:  # 6
        x, b = node.inputs[0], int(attribute(node, "blocksize"))
        assert x is not None
        n, c, h, w = shape_of(x)
        if node.op_type == "SpaceToDepth":
            apart = permuted(graph, node, reshaped(graph, node, x, (n, c, h // b, b, w // b, b)), [0, 3, 5, 1, 2, 4])
        elif attribute(node, "mode", "DCR") == "DCR":
            apart = permuted(graph, node, reshaped(graph, node, x, (n, b, b, c // (b * b), h, w)), [0, 3, 4, 1, 5, 2])
        else:
            apart = permuted(graph, node, reshaped(graph, node, x, (n, c // (b * b), b, b, h, w)), [0, 1, 4, 2, 5, 3])
        return reshaped(graph, node, apart, shape_of(node.outputs[0]))
