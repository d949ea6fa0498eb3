"""What goes into and comes out of a graph, as a plan says it."""

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir

from twofour.errors import InputError, UnsupportedError
from twofour.plan import ValueSpec
from twofour.plan.record import printable


def spec_of(value: ir.Value, where: str) -> ValueSpec:
    """Return the spec of a graph input or output: a symbolic first axis is the batch."""
    if value.dtype is None or value.shape is None:
        raise InputError(f"build: {where} {value.name!r} has no type or shape; run ONNX shape inference on the model first")
    shape: list[int | None] = []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            shape.append(size)
        elif axis == 0:
            shape.append(None)
        else:
            raise UnsupportedError(
                f"build: {where} {value.name!r} has the dynamic axis {axis} ({printable(str(size))}); "
                "only the batch (axis 0) may be dynamic"
            )
    if 0 in shape:
        raise InputError(f"build: {where} {value.name!r} is empty, its shape is {shape}; export the model with real sizes")
    return ValueSpec(str(value.name), str(value.dtype.numpy()), tuple(shape))


def in_fp32(spec: ValueSpec) -> ValueSpec:
    """Return the spec as the GPU engine has it: import makes every floating value fp32, whatever the file holds."""
    return replace(spec, dtype="float32") if spec.dtype in ("float16", "bfloat16", "float64") else spec


def refuse_other_shapes(outputs: Sequence[ValueSpec], computed: Sequence[tuple[int, ...]], batch: int) -> None:
    """Do nothing if a network gives outputs of the shapes that its file declares.

    Raises:
        InputError: it does not; the caller would read what was never written.
    """
    for spec, shape in zip(outputs, computed, strict=True):
        if tuple(batch if size is None else size for size in spec.shape) != shape:
            raise InputError(
                f"build: the model declares the output {printable(str(spec))} and computes {list(shape)} of a batch of {batch}; "
                "correct the declared shape, or export it again"
            )
