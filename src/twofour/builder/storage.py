"""Where every value of a fused graph lies: its own memory, a part of a Concat's, or a view of another value's."""

from dataclasses import dataclass
from math import gcd

import onnx_ir as ir

from twofour.builder.graph import attribute, is_fused, producer, shape_of
from twofour.builder.strided import row_major
from twofour.errors import UnsupportedError
from twofour.kernels.operands import DTYPE_BYTES

DTYPES = {ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16", ir.DataType.FLOAT: "fp32", ir.DataType.INT64: "int64"}
DTYPES |= {ir.DataType.INT32: "int32", ir.DataType.INT8: "int8", ir.DataType.UINT8: "uint8", ir.DataType.BOOL: "bool"}


@dataclass(frozen=True)
class Place:
    """A value's place: memory `root`, `offset` and `strides` in elements of `dtype`."""

    root: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """Elements from the first to behind the last one."""
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    @property
    def align(self) -> int:
        """Bytes, at most 16, that the address is a multiple of; memory begins at multiples of 256."""
        return gcd(self.offset * DTYPE_BYTES[self.dtype], 16) if self.offset else 16

    @property
    def is_contiguous(self) -> bool:
        """Whether elements follow each other in row-major order."""
        return all(n == 1 or s == w for n, s, w in zip(self.shape, self.strides, row_major(self.shape), strict=True))


def dtype_of(value: ir.Value) -> str:
    """Return a value's element type by the engine's name.

    Raises:
        UnsupportedError: the engine has no such type.
    """
    if value.dtype not in DTYPES:
        raise UnsupportedError(f"value {value.name!r} is {value.dtype}, the engine computes with {', '.join(DTYPES.values())}")
    return DTYPES[value.dtype]


class Storage:
    """The places of a graph's values, by the marks of the pass `ConcatInPlace`."""

    def __init__(self, graph: ir.Graph) -> None:
        """Read the marks; places are worked out when asked for."""
        self._places: dict[ir.Value, Place] = {}
        self._inside: dict[ir.Value, tuple[ir.Value, int, int]] = {}  # part -> (whole, axis, first index)
        self._within: dict[ir.Value, ir.Value] = {}
        named = {str(node.outputs[0].name): node.outputs[0] for node in graph if is_fused(node, "Concat")}
        for node in graph:
            if not is_fused(node, "Concat"):
                continue
            if attribute(node, "within"):
                self._within[node.outputs[0]] = named[str(attribute(node, "within"))]
            first, axis = 0, int(attribute(node, "axis"))
            for value, mark in zip(node.inputs, attribute(node, "in_place"), strict=True):
                if mark and value not in self._inside:
                    self._inside[value] = (node.outputs[0], axis, first)
                first += shape_of(value)[axis]

    def place(self, value: ir.Value) -> Place:
        """Return where a value lies."""
        if value not in self._places:
            self._places[value] = self._found(value)
        return self._places[value]

    def _found(self, value: ir.Value) -> Place:
        shape, dtype, node = shape_of(value), dtype_of(value), producer(value)
        if value in self._within:
            whole = self.place(self._within[value])
            return Place(whole.root, whole.offset, shape, whole.strides, dtype)
        if value in self._inside:
            whole_value, axis, first = self._inside[value]
            whole = self.place(whole_value)
            return Place(whole.root, whole.offset + first * whole.strides[axis], shape, whole.strides, dtype)
        if is_fused(node, "View"):
            base = self.place(node.inputs[0])
            assert base.is_contiguous, f"{value.name} is a view of {node.inputs[0].name}, which lies within a Concat"
            strides = tuple(int(s) for s in attribute(node, "strides"))
            return Place(base.root, base.offset + int(attribute(node, "offset")), shape, strides, dtype)
        return Place(str(value.name), 0, shape, row_major(shape), dtype)


def part(place: Place, axis: int, first: int, count: int) -> Place:
    """Return `count` elements of an axis from `first` on."""
    shape = (*place.shape[:axis], count, *place.shape[axis + 1 :])
    return Place(place.root, place.offset + first * place.strides[axis], shape, place.strides, place.dtype)
