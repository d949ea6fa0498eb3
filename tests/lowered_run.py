"""Lowered layers run by the families' float64 oracles on real memory: offsets, strides and shared buffers are what the engine will see."""

from math import prod
from typing import Any

import numpy as np

from twofour.builder.lower import LayerCall, Lowered
from twofour.builder.memory import plan_memory
from twofour.builder.storage import Place
from twofour.kernels import families
from twofour.oracle.attention import attention
from twofour.oracle.conv import conv
from twofour.oracle.gemm import gemm
from twofour.oracle.patches import patches
from twofour.oracle.pointwise import pointwise
from twofour.oracle.pool import pool, resize
from twofour.oracle.reduce import reduce

Array = np.ndarray[Any, Any]


class Memory:
    """One array for all activations, eight bytes an element, laid out by the memory plan; what nobody has written is NaN."""

    def __init__(self, lowered: Lowered, inputs: dict[str, Array]) -> None:
        self.lowered = lowered
        buffers = lowered.buffers()
        plan = plan_memory(buffers)
        self.offsets = plan.offsets
        # The plan counts bytes of 16-bit elements; here an element has as many float64 as its bytes, so that overlaps stay overlaps.
        self.arena = np.full(plan.peak_bytes, np.nan)
        self.outside = {name: x.astype(np.float64).reshape(-1) for name, x in inputs.items()}
        self.outside |= {name: np.asarray(x).astype(np.float64).reshape(-1) for name, x in lowered.constants.items()}
        for name in lowered.outputs:
            place = next(p for p in lowered.places.values() if p.root == name)
            self.outside[name] = np.full(place.offset + place.elements, np.nan)

    def view(self, name: str, shape: Any = None, strides: Any = None) -> Array:
        """A place as an array that can be read and written; with the shape and strides a Problem says, from the place's address on."""
        place: Place = self.lowered.places[name]
        shape, strides = (place.shape, place.strides) if shape is None else (shape, strides)
        step = 1
        if place.root in self.offsets:
            step = 4 if place.dtype == "fp32" else 8 if place.dtype == "int64" else 2 if place.dtype in ("fp16", "bf16") else 1
            base = self.arena[self.offsets[place.root] + place.offset * step :]
        else:
            base = self.outside[place.root][place.offset :]
        return np.lib.stride_tricks.as_strided(base, shape, [s * step * 8 for s in strides], writeable=True)


def packed(shape: tuple[int, ...], pitch: int | None = None) -> list[int]:
    """Strides of an array whose last axis is packed and whose items are `pitch` apart."""
    line = shape[-1] if pitch is None else pitch
    return [line * prod(shape[i + 1 : -1]) for i in range(len(shape) - 1)] + [1]


def run_call(call: LayerCall, memory: Memory) -> None:
    """Compute one call from its Problem alone."""
    p, o = call.problem, call.operands
    if call.family == "pointwise":
        arrays = [memory.view(o[f"in{i}"], p.shape, operand.strides) for i, operand in enumerate(p.inputs)]
        memory.view(o["d"], p.shape, p.out_strides)[...] = pointwise(arrays, p.program)
    elif call.family == "conv":
        x = memory.view(o["x"], s := (p.batch, p.height, p.width, p.inputs), packed(s, p.x_pitch))
        out = (p.batch, p.out_height, p.out_width, p.outputs)
        residual = memory.view(o["residual"], out, packed(out, p.residual_pitch)) if p.epilogue.residual else None
        windows = {"strides": p.strides, "pads": p.pads, "dilations": p.dilations, "groups": p.groups}
        y = conv(x, call.weight, **windows, bias=call.bias, residual=residual, activation=p.epilogue.activation)
        memory.view(o["d"], out, packed(out, p.y_pitch))[...] = y
    elif call.family == "gemm":
        x = memory.view(o["x"], (p.tokens, p.inputs), (p.inputs, 1))
        out = (p.tokens, p.outputs)
        residual = memory.view(o["residual"], out, packed(out)) if p.epilogue.residual else None
        memory.view(o["d"], out, packed(out))[...] = gemm(
            x, call.weight, sparse=False, activation=p.epilogue.activation, bias=call.bias, residual=residual
        )
    elif call.family in ("pool", "resize"):
        x = memory.view(o["x"], s := (p.batch, p.height, p.width, p.channels), packed(s, p.x_pitch))
        out = (p.batch, p.out_height, p.out_width, p.channels)
        if call.family == "pool":
            y = pool(x, p.kind, p.kernel, p.strides, p.pads, p.dilations, count_include_pad=p.count_include_pad, ceil=p.ceil)
        else:
            y = resize(x, p.out_height, p.out_width, p.kind, p.coordinate, p.rounding, p.scales)
        memory.view(o["d"], out, packed(out, p.y_pitch))[...] = y
    elif call.family == "patches":
        x = memory.view(o["x"], (p.batch, p.height, p.width, p.channels), p.x_strides)
        out = (p.batch, p.out_height, p.out_width, p.out_channels)
        memory.view(o["d"], out, packed(out))[...] = patches(x, *out[1:], p.block, p.top, p.left)
    elif call.family == "reduce":
        line = p.inner if p.inner > 1 else p.length
        pitch = p.x_pitch or line
        strides = (pitch * p.length, pitch, 1) if p.inner > 1 else (pitch, 1, 1)
        x = memory.view(o["x"], (p.rows, p.length, p.inner), strides)
        vectors = [memory.view(o[name]).reshape(-1) if getattr(p, name) else None for name in ("scale", "bias")]
        y = reduce(x, p.kind, p.eps, *vectors)
        out = (p.rows, p.out_length)
        memory.view(o["d"], out, packed(out, p.y_pitch))[...] = y.reshape(out)
    elif call.family == "attention":
        q, k, v = (memory.view(o[name], p.shape(name), p.strides(name)) for name in "qkv")
        memory.view(o["d"], p.shape("o"), p.strides("o"))[...] = attention(q, k, v, p.scale, causal=p.causal)
    elif call.family == "matmul":
        a, b = (memory.view(o[name], p.shape(name), p.strides(name)) for name in "ab")
        memory.view(o["d"], p.shape("d"), p.strides("d"))[...] = p.scale * (a @ b)
    else:
        raise AssertionError(f"family {call.family}")


def run_lowered(lowered: Lowered, inputs: dict[str, Array]) -> dict[str, Array]:
    """The outputs by name."""
    memory = Memory(lowered, inputs)
    for call in lowered.calls:
        run_call(call, memory)
    return {name: np.array(memory.view(name)) for name in lowered.output_values}


def check_footprints(lowered: Lowered) -> None:
    """Every operand of every call lies inside its memory by the family's own account."""
    sizes = {b.name: b.num_bytes for b in lowered.buffers()}
    for call in lowered.calls:
        if call.family in ("fallback",):
            continue
        for name, touched in families.footprints(call.family, "twofour" if call.family != "conv" else "cudnn", call.problem).items():
            if name in ("weight", "bias") and call.family in ("gemm", "conv"):
                continue
            place = lowered.places[call.operands[name]]
            assert place.dtype == touched.dtype, (call.name, name, place, touched)
            item = {"fp16": 2, "bf16": 2, "fp32": 4, "int64": 8}.get(place.dtype, 1)
            if place.root in sizes:
                assert (place.offset + touched.elements) * item <= sizes[place.root], (call.name, name)
            assert place.offset * item % touched.align == 0, (call.name, name)
