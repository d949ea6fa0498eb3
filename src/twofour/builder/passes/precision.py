"""Precision: activations become fp16 or bf16; what comes from and goes to the user stays fp32."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import Array, constant_of, elements, is_fused, make_node, nodes_of, only_use, replace, shape_of
from twofour.builder.passes.infra import Rewrite
from twofour.builder.passes.programs import program_of
from twofour.errors import InputError

TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
SMALLEST = {ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}  # numbers with all their digits
ROUNDING = {ir.DataType.FLOAT16: 2.0**-11, ir.DataType.BFLOAT16: 2.0**-8}  # the most that it changes one of them by, relative to it
CONVERTS = ("Pointwise", "Copy", "Pad", "Patches", "Concat", "View")
WRITES_FP32 = ("Pointwise", "Copy", "Reduce")
SMALL = 4096  # constants up to this many elements cost nothing in fp32


class Precision(Rewrite):
    """Chooses the type of every floating value.

    1. What a step computes: the 16-bit type; sums, norms and programs are fp32 inside the kernels.
    2. Inputs of the graph, and what a Fallback takes and gives, stay fp32: Pointwise, Copy, Pad and Patches read them so; for any other
       reader a Copy converts.
    3. Outputs of the graph stay fp32: Pointwise, Copy, Reduce, Linear write them so; behind any other step a Copy converts.
    4. Constants: weights, biases, scales and anything small stay fp32 (packing rounds the weights); a large constant that an element-wise
       step reads, and every operand of a Concat, MatMul or Attention, becomes the 16-bit type; the former not where it is so small as a
       whole that it would lose digits.
    5. What a program with a constant too small for the 16-bit type computes, for programs alone, stays fp32: max(norm, 1e-12) would be 0
       in fp16, and x / 0 no number.
    """

    def __init__(self, precision: str) -> None:
        """Take `fp16` or `bf16`.

        Raises:
            InputError: another name.
        """
        if precision not in TYPES:
            raise InputError(f"precision {precision!r} is unknown here, expected one of {list(TYPES)}")
        self.dtype = TYPES[precision]

    def rewrite(self, graph: ir.Graph) -> int:
        """Convert inputs, then constants and steps, then outputs."""
        if any(value.dtype == self.dtype for node in graph for value in node.outputs):
            return 0  # the types are chosen already
        count = sum(self._input(graph, value) for value in list(graph.inputs) if value.dtype == ir.DataType.FLOAT)
        for node in nodes_of(graph):
            if is_fused(node, "Fallback"):
                count += self._fallback(graph, node)
                continue
            count += self._constants(graph, node)
            for value in node.outputs:
                stays = (is_fused(node, "View") and self._is_single(node.inputs[0])) or self._is_delicate(node)
                if value.dtype == ir.DataType.FLOAT and not stays:
                    value.dtype = self.dtype
                    count += 1
        return count + sum(self._output(graph, value) for value in list(graph.outputs))

    def _is_user_value(self, value: ir.Value | None) -> bool:
        """Whether a value is an input of the graph, a Fallback's fp32 output, or a view of one."""
        node = None if value is None else value.producer()
        if is_fused(node, "View") and node is not None:
            return self._is_user_value(node.inputs[0])
        return value is not None and ((node is None and not value.is_initializer()) or is_fused(node, "Fallback"))

    def _is_single(self, value: ir.Value | None) -> bool:
        """Whether what a View shows stays fp32."""
        node = None if value is None else value.producer()
        if is_fused(node, "View") and node is not None:
            return self._is_single(node.inputs[0])
        return self._is_user_value(value) or (node is not None and self._is_delicate(node))

    def _is_delicate(self, node: ir.Node) -> bool:  # 5
        if not is_fused(node, "Pointwise") or not any(too_small(step, self.dtype) for step in program_of(node)):
            return False
        value = node.outputs[0]
        return not value.is_graph_output() and all(is_fused(reader, "Pointwise", "Copy") for reader in self._readers(value))

    def _input(self, graph: ir.Graph, value: ir.Value) -> bool:  # 2
        readers = [node for node in self._readers(value) if not is_fused(node, "Fallback")]
        first = next((use.node for use in value.uses()), None)
        if first is None or all(is_fused(node, *CONVERTS) for node in readers):
            return False
        node = value.producer()
        converted = make_copy(graph, value, next(iter(graph)) if node is None else node, behind=node is not None)
        converted.dtype = self.dtype
        for use in list(value.uses()):
            if use.node is not converted.producer() and not is_fused(use.node, "Fallback"):
                use.node.replace_input_with(use.idx, converted)
        return True

    def _fallback(self, graph: ir.Graph, node: ir.Node) -> int:
        """ONNX Runtime takes and gives fp32."""
        count = sum(self._input(graph, value) for value in node.outputs if value.dtype == ir.DataType.FLOAT)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == self.dtype:
                single = make_copy(graph, value, node)
                node.replace_input_with(index, single)
                count += 1
        return count

    def _readers(self, value: ir.Value) -> list[ir.Node]:
        """Return the steps that read a value, through views."""
        found = []
        for use in value.uses():
            found += self._readers(use.node.outputs[0]) if is_fused(use.node, "View") else [use.node]
        return found

    def _constants(self, graph: ir.Graph, node: ir.Node) -> int:  # 4
        count = 0
        for index, value in enumerate(node.inputs):
            array = constant_of(value)
            if value is None or array is None or value.dtype != ir.DataType.FLOAT:
                continue
            always = is_fused(node, "Concat", "MatMul", "Attention", "View", "Pad")
            large = is_fused(node, "Pointwise", "Copy") and elements(value) > SMALL
            if always or (large and self._holds(array)):
                node.replace_input_with(index, self._converted(graph, value))
                count += 1
        return count

    def _holds(self, array: Array) -> bool:
        """Whether small numbers cost an array as a whole no more than rounding does."""
        flat = array.reshape(-1).astype(np.float64)
        return bool(lost(flat, self.dtype) <= ROUNDING[self.dtype] * np.linalg.norm(flat))

    def _converted(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        """Return the 16-bit version of a constant, made once."""
        name = f"{value.name}.{self.dtype.name.lower()}"
        if name not in graph.initializers:
            assert value.const_value is not None
            tensor = ir.Tensor(value.const_value.numpy().astype(self.dtype.numpy()), name=name)
            made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self.dtype), const_value=tensor)
            graph.register_initializer(made)
        return graph.initializers[name]

    def _output(self, graph: ir.Graph, value: ir.Value) -> bool:  # 3
        node = value.producer()
        if node is None or value.dtype != self.dtype:
            return False
        source = node.inputs[0]
        layer = source.producer() if is_fused(node, "View") and source is not None else node
        if (
            not value.uses()
            and self._writes_fp32(layer)
            and (layer is node or (only_use(source) is node and elements(source) == elements(value)))
        ):  # type: ignore[arg-type]
            value.dtype = layer.outputs[0].dtype = ir.DataType.FLOAT  # type: ignore[union-attr]
            return True
        output = make_copy(graph, value, node, behind=True)
        replace(graph, value, output)
        output.producer().replace_input_with(0, value)
        return True

    def _writes_fp32(self, node: ir.Node | None) -> bool:
        plain = is_fused(node, "Linear") and node is not None and (len(node.inputs) < 4 or node.inputs[3] is None)
        return plain or is_fused(node, *WRITES_FP32)


def too_small(step: Sequence[Any], dtype: ir.DataType) -> bool:
    """Whether an instruction has a constant other than 0 that `dtype` cannot hold with all its digits."""
    return any(kind == "c" and 0 < abs(number) < SMALLEST[dtype] for kind, number in step[1:])


def lost(array: Array, dtype: ir.DataType) -> Array:
    """Return the root of the sum of squares, along the last axis, of what rounding to `dtype` changes numbers below the smallest normal by.

    They are rounded to multiples of 2 ROUNDING SMALLEST; larger ones change by at most ROUNDING times themselves, which is not counted.
    """
    step = 2 * ROUNDING[dtype] * SMALLEST[dtype]
    small = np.where(np.abs(array) < SMALLEST[dtype], array, 0)
    found: Array = np.linalg.norm(small - step * np.rint(small / step), axis=-1)
    return found


def make_copy(graph: ir.Graph, value: ir.Value, at: ir.Node, *, behind: bool = False) -> ir.Value:
    """Return an fp32 copy of a value, made in front of a step or behind it."""
    made = make_node(graph, at, "Copy", [value], shape_of(value), like=at, stem=f"{value.name}.converted")
    if behind:
        copy = made.producer()
        graph.remove(copy)
        graph.insert_after(at, copy)
    return made
