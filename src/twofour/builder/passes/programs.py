"""Pointwise programs as data: read, written, joined."""

import json
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from twofour.builder.graph import attribute, is_fused

Steps = list[list[Any]]


def program_of(node: ir.Node) -> Steps:
    """Return the steps of a Pointwise."""
    steps: Steps = json.loads(attribute(node, "program"))
    return steps


def unary_of(node: ir.Node | None) -> str:
    """Return the operation of a Pointwise that is one step on one input, `relu6` for a clip to 0…6; else an empty string."""
    if node is None or not is_fused(node, "Pointwise") or len(node.inputs) != 1:
        return ""
    steps = program_of(node)
    if len(steps) != 1:
        return ""
    kind, *operands = steps[0]
    if kind == "clip" and operands == [["in", 0], ["c", 0.0], ["c", 6.0]]:
        return "relu6"
    return str(kind) if operands == [["in", 0]] else ""


def is_sum_of_two(node: ir.Node) -> bool:
    """Whether a Pointwise adds its two inputs and does nothing else."""
    return len(node.inputs) == 2 and program_of(node) in ([["add", ["in", 0], ["in", 1]]], [["add", ["in", 1], ["in", 0]]])


def inlined(
    outer: Steps, outer_inputs: Sequence[ir.Value], index: int, inner: Steps, inner_inputs: Sequence[ir.Value]
) -> tuple[Steps, list[ir.Value]]:
    """Return the program and inputs of `outer` with its input `index` computed by `inner`."""
    inputs = [value for i, value in enumerate(outer_inputs) if i != index]
    for value in inner_inputs:
        if value not in inputs:
            inputs.append(value)

    def moved(operand: list[Any], own: Sequence[ir.Value], shift: int) -> list[Any]:
        kind, value = operand
        if kind == "in":
            return ["in", inputs.index(own[value])]
        return ["t", value + shift] if kind == "t" else operand

    steps: Steps = [[step[0], *(moved(operand, inner_inputs, 0) for operand in step[1:])] for step in inner]
    result = ["t", len(inner) - 1] if inner else ["in", inputs.index(inner_inputs[0])]
    for step in outer:
        operands = [result if operand == ["in", index] else moved(operand, outer_inputs, len(inner)) for operand in step[1:]]
        steps.append([step[0], *operands])
    return steps, inputs
