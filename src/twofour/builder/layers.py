"""One node of the fused graph -> the Problems of its steps, with the places their operands lie in."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import Array, attribute, is_fused, shape_of
from twofour.builder.passes.materialise import pitch_of
from twofour.builder.passes.programs import program_of
from twofour.builder.storage import DTYPES, Place, Storage, part
from twofour.errors import InputError
from twofour.kernels.attention import contract as attention
from twofour.kernels.conv import contract as conv
from twofour.kernels.gemm import contract as gemm
from twofour.kernels.matmul import contract as matmul
from twofour.kernels.patches import contract as patches
from twofour.kernels.pointwise import contract as pointwise
from twofour.kernels.pool import contract as pool
from twofour.kernels.reduce import contract as reduce
from twofour.plan.program import Fallback

# node, family, problem, operands, why no 2:4 kernel could compute it
Call = tuple[ir.Node, str, Any, dict[str, str], str]


def pitch(place: Place, least: int) -> int | None:
    """Return the elements from item to item of the last axis, None where they follow each other."""
    if 0 in place.shape:
        raise InputError(f"an image of {list(place.shape)} pixels and channels is empty; use a larger image")
    found = pitch_of(place.shape, place.strides)
    assert found is not None, f"{place} has no single pitch"
    return None if found == least else found


def tupled(value: Any) -> Any:
    """Return nested lists as tuples."""
    return tuple(tupled(item) for item in value) if isinstance(value, list) else value


def image_of(place: Place) -> tuple[int, int, int, int]:
    """Return batch, height, width and channels of an image."""
    batch, height, width, channels = place.shape
    return batch, height, width, channels


class Emitter:
    """Collects calls, the places they name, and constants that the graph does not hold."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self.calls: list[Call] = []
        self.places: dict[str, Place] = {}
        self.constants: dict[str, Array] = {}

    def emit(self, node: ir.Node) -> None:
        """Append the steps of a node."""
        makers: dict[str, Callable[[ir.Node], None]] = {
            "Conv": self._conv,
            "Linear": self._linear,
            "Pointwise": self._pointwise,
            "Copy": self._copy,
            "Concat": self._concat,
            "Pad": self._pad,
            "Patches": self._patches,
            "Pool": self._pool,
            "Reduce": self._reduce,
            "Resize": self._resize,
            "Attention": self._attention,
            "MatMul": self._matmul,
            "Fallback": self._fallback,
        }
        makers[node.op_type](node)

    def _name(self, value: ir.Value) -> str:
        """Return the name of a value's place, recorded."""
        name = str(value.name)
        self.places[name] = self.storage.place(value)
        return name

    def _part(self, name: str, place: Place) -> str:
        """Return the name of a place that is part of a value, recorded."""
        self.places[name] = place
        return name

    def _append(self, node: ir.Node, family: str, problem: Any, operands: dict[str, str], why_no_kernel: str = "") -> None:
        self.calls.append((node, family, problem, operands, why_no_kernel))

    def _operands(self, node: ir.Node, *names: str) -> dict[str, str]:
        """Return the node's inputs by operand name, left-out ones and weights (which calls hold themselves) apart, and `d`."""
        found = {}
        for index, name in enumerate(names):
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None and name not in ("weight", "bias"):
                found[name] = self._name(value)
        found["d"] = self._name(node.outputs[0])
        return found

    def _has(self, node: ir.Node, index: int) -> bool:
        return len(node.inputs) > index and node.inputs[index] is not None

    def _conv(self, node: ir.Node) -> None:
        operands = self._operands(node, "x", "weight", "bias", "residual")
        x, y = self.places[operands["x"]], self.places[operands["d"]]
        kernels, kh, kw, _ = shape_of(node.inputs[1])
        groups = int(attribute(node, "groups"))
        residual = self.places[operands["residual"]] if "residual" in operands else None
        problem = conv.Problem(
            *image_of(x),
            outputs=kernels,
            kernel=(kh, kw),
            strides=tuple(attribute(node, "strides")),
            pads=tuple(attribute(node, "pads")),
            dilations=tuple(attribute(node, "dilations")),
            groups=groups,
            dtype=x.dtype,
            epilogue=conv.Epilogue(attribute(node, "activation", "none"), self._has(node, 2), residual is not None),
            x_pitch=pitch(x, x.shape[-1]),
            y_pitch=pitch(y, y.shape[-1]),
            residual_pitch=None if residual is None else pitch(residual, residual.shape[-1]),
        )
        why = ""
        image = node.inputs[0].producer()
        if is_fused(image, "Patches") and shape_of(image.inputs[0])[-1] % 4:
            why = f"an image of {shape_of(image.inputs[0])[-1]} channels has no groups of four"
        elif groups > 1:
            why = "depthwise convolution" if x.shape[-1] == groups else f"grouped convolution ({groups} groups)"
        elif conv.as_gemm(problem) is None:
            why = f"no 2:4 kernel here computes a {kh}×{kw} convolution{self._why_no_gemm(problem)}"
        self._append(node, "conv", problem, operands, why)

    def _why_no_gemm(self, p: conv.Problem) -> str:
        """Return what keeps a 1×1 convolution from being a matrix product, empty for larger kernels."""
        if p.kernel != (1, 1):
            return ""
        if p.strides != (1, 1):
            return f" of stride {p.strides[0]}"
        if p.epilogue.activation not in gemm.ACTIVATIONS:
            return f" with {p.epilogue.activation}"
        if p.x_pitch or p.y_pitch or p.residual_pitch:
            return " on a slice of channels"
        return " with padding" if any(p.pads) else f" of {p.inputs} to {p.outputs} channels"

    def _linear(self, node: ir.Node) -> None:
        operands = self._operands(node, "x", "weight", "bias", "residual")
        x, d = self.places[operands["x"]], self.places[operands["d"]]
        outputs, inputs = shape_of(node.inputs[1])
        residual = [self.places[operands["residual"]]] if "residual" in operands else []
        for place in (x, d, *residual):
            assert place.is_contiguous, f"{place} of {node.name} is a slice"
        epilogue = gemm.Epilogue(attribute(node, "activation", "none"), bias=self._has(node, 2), residual="residual" in operands)
        problem = gemm.Problem(prod(x.shape[:-1]), outputs, inputs, x.dtype, d.dtype, False, epilogue)
        self._append(node, "gemm", problem, operands)

    def _strides(self, place: Place, shape: Sequence[int]) -> tuple[int, ...]:
        """Return a place's strides broadcast to `shape`: 0 where it repeats."""
        missing = len(shape) - len(place.shape)
        sizes, strides = (1,) * missing + place.shape, (0,) * missing + place.strides
        return tuple(0 if n == 1 else s for n, s in zip(sizes, strides, strict=True))

    def _pointwise(self, node: ir.Node) -> None:
        names = [self._name(value) for value in node.inputs]
        out = self._name(node.outputs[0])
        self._program(node, names, out, tupled(program_of(node)))

    def _program(self, node: ir.Node, names: list[str], out: str, program: Any = ()) -> None:
        """Append a pointwise step on named places."""
        d = self.places[out]
        inputs = tuple(pointwise.Operand(p.dtype, self._strides(p, d.shape), p.align) for p in (self.places[name] for name in names))
        problem = pointwise.Problem(d.shape, inputs, d.dtype, d.strides, program, d.align)
        self._append(node, "pointwise", problem, {**{f"in{i}": name for i, name in enumerate(names)}, "d": out})

    def _copy(self, node: ir.Node) -> None:
        self._program(node, [self._name(node.inputs[0])], self._name(node.outputs[0]))

    def _concat(self, node: ir.Node) -> None:
        whole, axis = self.storage.place(node.outputs[0]), int(attribute(node, "axis"))
        self._name(node.outputs[0])
        first = 0
        for index, (value, in_place) in enumerate(zip(node.inputs, attribute(node, "in_place"), strict=True)):
            count = shape_of(value)[axis]
            if not in_place:
                target = self._part(f"{node.outputs[0].name}.part{index}", part(whole, axis, first, count))
                self._program(node, [self._name(value)], target)
            first += count

    def _pad(self, node: ir.Node) -> None:
        pads, out = list(attribute(node, "pads")), self.storage.place(node.outputs[0])
        rank, source = len(out.shape), self.storage.place(node.inputs[0])
        inside = out
        for axis in range(rank):
            inside = part(inside, axis, pads[axis], source.shape[axis])
        borders = [(axis, 0, pads[axis]) for axis in range(rank) if pads[axis]]
        borders += [(axis, out.shape[axis] - pads[rank + axis], pads[rank + axis]) for axis in range(rank) if pads[rank + axis]]
        value = float(attribute(node, "value"))
        name = f"constant {value} {out.dtype}"
        kind = next(known for known, text in DTYPES.items() if text == out.dtype)
        self.constants[name] = np.array([value]).astype(kind.numpy())
        self.places[name] = Place(name, 0, (1,), (1,), out.dtype)
        base = str(node.outputs[0].name)
        # One border is filled alone; several are filled with everything between them, in one step.
        filled = part(out, *borders[0]) if len(borders) == 1 else out
        self._program(node, [name], self._part(f"{base}.border", filled))
        self._program(node, [self._name(node.inputs[0])], self._part(f"{base}.inside", inside))
        self._name(node.outputs[0])

    def _patches(self, node: ir.Node) -> None:
        operands = self._operands(node, "x")
        x, d = self.places[operands["x"]], self.places[operands["d"]]
        _, out_height, out_width, out_channels = image_of(d)
        problem = patches.Problem(
            *image_of(x),
            out_height=out_height,
            out_width=out_width,
            out_channels=out_channels,
            x_strides=tupled(list(x.strides)),
            block=tuple(attribute(node, "block")),
            top=int(attribute(node, "before")[0]),
            left=int(attribute(node, "before")[1]),
            dtype=x.dtype,
            out_dtype=d.dtype,
            align=x.align,
        )
        self._append(node, "patches", problem, operands)

    def _pool(self, node: ir.Node) -> None:
        operands = self._operands(node, "x")
        x, d = self.places[operands["x"]], self.places[operands["d"]]
        problem = pool.Problem(
            *image_of(x),
            kind=attribute(node, "kind"),
            kernel=tuple(attribute(node, "kernel")),
            strides=tuple(attribute(node, "strides")),
            pads=tuple(attribute(node, "pads")),
            dilations=tuple(attribute(node, "dilations")),
            count_include_pad=bool(attribute(node, "count_include_pad")),
            ceil=tuple(attribute(node, "ceil")),
            dtype=x.dtype,
            x_pitch=pitch(x, x.shape[-1]),
            y_pitch=pitch(d, d.shape[-1]),
            align=x.align,
            out_align=d.align,
        )
        self._append(node, "pool", problem, operands)

    def _resize(self, node: ir.Node) -> None:
        operands = self._operands(node, "x")
        x, d = self.places[operands["x"]], self.places[operands["d"]]
        problem = pool.ResizeProblem(
            *image_of(x),
            out_height=int(attribute(node, "height")),
            out_width=int(attribute(node, "width")),
            kind=attribute(node, "kind"),
            coordinate=attribute(node, "coordinates"),
            rounding=attribute(node, "nearest_mode"),
            scales=tuple(attribute(node, "scales")),
            dtype=x.dtype,
            x_pitch=pitch(x, x.shape[-1]),
            y_pitch=pitch(d, d.shape[-1]),
            align=x.align,
            out_align=d.align,
        )
        self._append(node, "resize", problem, operands)

    def _reduce(self, node: ir.Node) -> None:
        operands = self._operands(node, "x", "scale", "shift")
        if "shift" in operands:
            operands["bias"] = operands.pop("shift")
        x, d = self.places[operands["x"]], self.places[operands["d"]]
        axes, kind = [int(a) for a in attribute(node, "axes")], attribute(node, "kind")
        rows, length = prod(x.shape[: axes[0]]), prod(x.shape[a] for a in axes)
        inner = prod(x.shape[axes[-1] + 1 :])
        line = inner if inner > 1 else length
        along = kind in ("softmax", "layernorm", "rmsnorm")
        problem = reduce.Problem(
            rows,
            length,
            kind,
            eps=float(attribute(node, "eps")),
            dtype=x.dtype,
            out_dtype=d.dtype,
            inner=inner,
            scale="scale" in operands,
            bias="bias" in operands,
            x_pitch=self._line_pitch(x, axes, line),
            y_pitch=self._line_pitch(d, axes, line) if along else None,
            align=x.align,
            out_align=d.align,
        )
        self._append(node, "reduce", problem, operands)

    def _line_pitch(self, place: Place, axes: list[int], line: int) -> int | None:
        """Return the elements from line to line, None where they follow each other."""
        return None if place.is_contiguous else pitch(place, line)

    def _attention(self, node: ir.Node) -> None:
        operands = self._operands(node, "q", "k", "v")
        q, k = self.places[operands["q"]], self.places[operands["k"]]

        def strides(name: str) -> tuple[int, int, int, int] | None:
            image, token, head, feature = self.places[operands[name]].strides
            return None if self.places[operands[name]].is_contiguous else (image, head, token, feature or 1)

        problem = attention.Problem(
            batch=q.shape[0],
            heads=q.shape[2],
            tokens=q.shape[1],
            keys=k.shape[1],
            head=q.shape[3],
            scale=float(attribute(node, "scale")),
            causal=bool(attribute(node, "causal")),
            dtype=q.dtype,
            q_strides=strides("q"),
            k_strides=strides("k"),
            v_strides=strides("v"),
            o_strides=strides("d"),
        )
        self._append(node, "attention", problem, operands)

    def _matmul(self, node: ir.Node) -> None:
        operands = self._operands(node, "a", "b")
        a, b, d = (self.places[operands[name]] for name in ("a", "b", "d"))

        def strides(place: Place) -> tuple[int, int, int] | None:
            if place.is_contiguous and place.shape[0] == d.shape[0]:
                return None
            batch, row, column = place.strides
            return 0 if place.shape[0] == 1 else batch, row or place.shape[2] * (column or 1), column or (1 if row != 1 else place.shape[1])

        problem = matmul.Problem(
            batch=d.shape[0],
            rows=d.shape[1],
            columns=d.shape[2],
            depth=a.shape[2],
            dtype=a.dtype,
            a_strides=strides(a),
            b_strides=strides(b),
            d_strides=strides(d),
        )
        self._append(node, "matmul", problem, operands)

    def _fallback(self, node: ir.Node) -> None:
        operands = {f"in{i}": self._name(value) for i, value in enumerate(node.inputs)}
        operands |= {f"d{i}": self._name(value) for i, value in enumerate(node.outputs)}
        problem = Fallback(tuple(attribute(node, "inputs")), tuple(attribute(node, "outputs")))
        self.constants[f"{node.outputs[0].name}.model"] = attribute(node, "model")
        self._append(node, "fallback", problem, operands)
