"""Patches: a convolution of an image's few channels becomes one of many channels and stride 1 over blocks of its pixels."""

from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import (
    Array,
    add_constant,
    attribute,
    attributes_of,
    constant_of,
    is_fused,
    make_node,
    nodes_of,
    producer,
    replace,
    shape_of,
)
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.widen import rounded

FEW = 4  # channels; tensor cores take 8 at least, and most of them would be padding


def by_blocks(weight: Array, block: tuple[int, int], front: tuple[int, int], channels: int) -> Array:
    """Return weight `[K, R, S, C]` as `[K, R', S', channels]` over blocks of pixels.

    w'[k, r, s, (a * block_w + b) * C + c] = w[k, r * block_h + a - front_h, s * block_w + b - front_w, c], 0 outside and behind.
    """
    outputs, *kernel, inputs = weight.shape
    counts = [-(-(front[i] + kernel[i]) // block[i]) for i in (0, 1)]
    behind = [counts[i] * block[i] - front[i] - kernel[i] for i in (0, 1)]
    whole = np.pad(weight, [(0, 0), (front[0], behind[0]), (front[1], behind[1]), (0, 0)])
    apart = whole.reshape(outputs, counts[0], block[0], counts[1], block[1], inputs).transpose(0, 1, 3, 2, 4, 5)
    flat = apart.reshape(outputs, *counts, block[0] * block[1] * inputs)
    return np.pad(flat, [(0, 0)] * 3 + [(0, channels - flat.shape[-1])])


class GatherPatches(Rewrite):
    """Replaces a Conv of at most 4 channels and one group by Patches and a Conv without strides and padding.

    The block is the stride where the kernel covers it and is not dilated, else one pixel. Zeros around the image are Patches' work, and so
    are the change of layout and type: it reads an image where it lies, in any layout.
    """

    def rewrite(self, graph: ir.Graph) -> int:
        """Replace convolution by convolution."""
        count, self._gathered = 0, dict[tuple[int, str], ir.Value]()
        for node in nodes_of(graph):
            if is_fused(node, "Conv") and attribute(node, "groups") == 1 and node.inputs[0] is not None:
                count += self._replaced(graph, node, node.inputs[0])
        return count

    def _replaced(self, graph: ir.Graph, node: ir.Node, x: ir.Value) -> bool:
        weight = constant_of(node.inputs[1])
        if weight is None or weight.shape[-1] > FEW or constant_of(x) is not None:
            return False
        kernel, strides, pads, dilations = (tuple(attribute(node, name)) for name in ("kernel", "strides", "pads", "dilations"))
        covered = dilations == (1, 1) and all(kernel[i] >= strides[i] for i in (0, 1))
        block = strides if covered else (1, 1)
        channels = rounded(block[0] * block[1] * weight.shape[-1])
        # Blocks begin at a multiple of the block before the image; the taps in front of the first one are zero.
        before = tuple(-(-pads[i] // block[i]) * block[i] for i in (0, 1))
        wide = by_blocks(weight, block, (before[0] - pads[0], before[1] - pads[1]), channels)
        left = (1, 1) if covered else strides
        reach = [dilations[i] * (wide.shape[1 + i] - 1) + 1 for i in (0, 1)]
        batch, *sizes, _ = shape_of(node.outputs[0])
        height, width = ((sizes[i] - 1) * left[i] + reach[i] for i in (0, 1))
        described = {"block": list(block), "before": list(before), "height": height, "width": width, "channels": channels}
        gathered = self._gather(graph, node, x, (batch, height, width, channels), described)
        constant = add_constant(graph, wide, f"{node.inputs[1].name}.blocks")  # type: ignore[union-attr]
        attributes = attributes_of(node) | {"kernel": list(wide.shape[1:3]), "strides": list(left), "pads": [0] * 4}
        made = [gathered, constant, *node.inputs[2:]]
        replace(graph, node.outputs[0], make_node(graph, node, "Conv", made, shape_of(node.outputs[0]), attributes, like=node))
        return True

    def _gather(self, graph: ir.Graph, node: ir.Node, x: ir.Value, shape: tuple[int, ...], described: dict[str, Any]) -> ir.Value:
        """Return the Patches of an image, made once for all convolutions that read it alike."""
        copy = producer(x)
        source = copy.inputs[0] if is_fused(copy, "Copy") and copy is not None else x
        assert source is not None
        key = (id(source), str(described))
        if key not in self._gathered:
            self._gathered[key] = make_node(graph, node, "Patches", [source], shape, described, like=node, stem=f"{x.name}.patches")
        return self._gathered[key]

    def ensures(self, model: ir.Model) -> None:
        """Every Patches has channels in multiples of 8."""
        for node in model.graph:
            if is_fused(node, "Patches"):
                assert shape_of(node.outputs[0])[-1] % 8 == 0, f"{node.name} has {shape_of(node.outputs[0])}"
