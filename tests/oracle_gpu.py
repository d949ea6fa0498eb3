"""A GPU made of host memory that computes every family by its oracle, so that a whole engine runs where there is no GPU."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from fake_gpu import FakeGpu, FakeStep, array_at, read
from grouped_emulation import unpack_weight as unpack_grouped
from numpy.lib.stride_tricks import as_strided

from twofour.builder.lower import LayerCall, Lowered
from twofour.builder.tactics.chosen import Chosen
from twofour.builder.tactics.ways import Way, ways_of
from twofour.kernels.depthwise import unpack_weight as unpack_depthwise
from twofour.kernels.families import OURS
from twofour.oracle.attention import attention
from twofour.oracle.conv import conv
from twofour.oracle.gemm import gemm
from twofour.oracle.patches import patches
from twofour.oracle.pointwise import bf16_bits
from twofour.oracle.pool import pool, resize
from twofour.oracle.reduce import reduce
from twofour.pattern.pack_sm90 import PackedWeight, unpack


def viewed(flat: np.ndarray, shape: Sequence[int], strides: Sequence[int]) -> np.ndarray:
    """`flat` seen with strides in elements."""
    return as_strided(flat, shape, [s * flat.itemsize for s in strides])


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values in the form that memory holds."""
    with np.errstate(over="ignore"):
        return bf16_bits(values) if dtype == "bf16" else values.astype({"fp16": np.float16, "fp32": np.float32}[dtype])


class OracleStep(FakeStep):
    """A step of any family."""

    def __init__(self, gpu: FakeGpu, family: str, library: str, problem: Any) -> None:
        super().__init__(gpu, family, library, problem)
        self._library = library

    def _run(self, addresses: dict[str, int]) -> None:
        with np.errstate(all="ignore"):  # a trial run before a capture computes on whatever memory holds
            if self._family == "pointwise":
                super()._run(addresses)
            else:
                found = {n: array_at(addresses[n], f.dtype, f.elements) for n, f in self._touched.items()}
                getattr(self, f"_{self._family}")(self._problem, found)

    def _values(self, found: dict[str, np.ndarray], name: str) -> np.ndarray:
        return read(found[name], self._touched[name].dtype)

    def _gemm(self, p: Any, found: dict[str, np.ndarray]) -> None:
        if self._library == OURS:
            size = p.row_blocks * p.k_blocks
            data = found["weight"].view(np.int16).reshape(p.row_blocks, p.k_blocks, found["weight"].nbytes // 2 // size)
            weight = read(unpack(PackedWeight(data, p.weight_rows, p.inputs, p.dtype, p.sparse)).view(np.uint16), p.dtype)
            if p.dtype == "fp16":
                weight = unpack(PackedWeight(data, p.weight_rows, p.inputs, p.dtype, p.sparse)).view(np.float16).astype(np.float64)
        else:
            weight = self._values(found, "weight").reshape(p.weight_rows, p.inputs)
        x = self._values(found, "x").reshape(p.tokens, p.inputs)
        residual = self._values(found, "residual").reshape(p.tokens, p.outputs) if p.epilogue.residual else None
        bias = self._values(found, "bias") if p.epilogue.bias else None
        y = gemm(x, weight, sparse=p.sparse, activation=p.epilogue.activation, bias=bias, residual=residual)
        found["d"][...] = rounded(y, p.out_dtype).ravel()

    def _grouped(self, p: Any, found: dict[str, np.ndarray]) -> None:
        self._conv(p, {**found, "weight": unpack_grouped(p, found["weight"])})

    def _depthwise(self, p: Any, found: dict[str, np.ndarray]) -> None:
        self._conv(p, {**found, "weight": unpack_depthwise(p, found["weight"]).ravel()})

    def _conv(self, p: Any, found: dict[str, np.ndarray]) -> None:
        def image(name: str, height: int, width: int, channels: int, pitch: int | None) -> np.ndarray:
            step = pitch or channels
            shape, strides = (p.batch, height, width, channels), (height * width * step, width * step, step, 1)
            return viewed(read(found[name], p.dtype), shape, strides)

        residual = image("residual", p.out_height, p.out_width, p.outputs, p.residual_pitch) if p.epilogue.residual else None
        y = conv(
            image("x", p.height, p.width, p.inputs, p.x_pitch),
            read(found["weight"], p.dtype).reshape(p.outputs, *p.kernel, p.inputs // p.groups),
            strides=p.strides,
            pads=p.pads,
            dilations=p.dilations,
            groups=p.groups,
            bias=self._values(found, "bias") if p.epilogue.bias else None,
            residual=residual,
            activation=p.epilogue.activation,
        )
        step = p.y_pitch or p.outputs
        target = viewed(found["d"], y.shape, (p.out_height * p.out_width * step, p.out_width * step, step, 1))
        target[...] = rounded(y, p.dtype)

    def _image(self, p: Any, flat: np.ndarray) -> np.ndarray:
        step = p.x_pitch or p.channels
        return viewed(flat, (p.batch, p.height, p.width, p.channels), (p.height * p.width * step, p.width * step, step, 1))

    def _pooled(self, p: Any, y: np.ndarray, found: dict[str, np.ndarray]) -> None:
        step = p.y_pitch or p.channels
        target = viewed(found["d"], y.shape, (y.shape[1] * y.shape[2] * step, y.shape[2] * step, step, 1))
        target[...] = rounded(y, p.dtype)

    def _pool(self, p: Any, found: dict[str, np.ndarray]) -> None:
        x = self._image(p, self._values(found, "x"))
        self._pooled(
            p, pool(x, p.kind, p.kernel, p.strides, p.pads, p.dilations, count_include_pad=p.count_include_pad, ceil=p.ceil), found
        )

    def _resize(self, p: Any, found: dict[str, np.ndarray]) -> None:
        x = self._image(p, self._values(found, "x"))
        self._pooled(p, resize(x, p.out_height, p.out_width, p.kind, p.coordinate, p.rounding, p.scales), found)

    def _patches(self, p: Any, found: dict[str, np.ndarray]) -> None:
        x = viewed(self._values(found, "x"), (p.batch, p.height, p.width, p.channels), p.x_strides)
        y = patches(x, p.out_height, p.out_width, p.out_channels, p.block, p.top, p.left)
        found["d"][...] = rounded(y, p.out_dtype).ravel()

    def _reduce(self, p: Any, found: dict[str, np.ndarray]) -> None:
        line = p.inner if p.inner > 1 else p.length
        lines = p.rows * (p.length if p.inner > 1 else 1)
        x = viewed(self._values(found, "x"), (lines, line), (p.x_pitch or line, 1)).reshape(p.rows, p.length, p.inner)
        extra = {name: self._values(found, name) for name in ("scale", "bias") if name in found}
        y = rounded(reduce(x, p.kind, p.eps, **extra), p.out_dtype)
        if p.is_normalisation:
            viewed(found["d"], (p.rows, p.length), (p.y_pitch or p.length, 1))[...] = y.reshape(p.rows, p.length)
        else:
            found["d"][...] = y.ravel()

    def _attention(self, p: Any, found: dict[str, np.ndarray]) -> None:
        def heads(name: str, count: int) -> np.ndarray:
            return viewed(self._values(found, name), (p.batch, p.heads, count, p.head), p.strides(name))

        y = attention(heads("q", p.tokens), heads("k", p.keys), heads("v", p.keys), p.scale, causal=p.causal)
        viewed(found["d"], y.shape, p.strides("o"))[...] = rounded(y, p.dtype)

    def _matmul(self, p: Any, found: dict[str, np.ndarray]) -> None:
        a, b = (viewed(self._values(found, name), p.shape(name), p.strides(name)) for name in "ab")
        viewed(found["d"], p.shape("d"), p.strides("d"))[...] = rounded(p.scale * (a @ b), p.dtype)


class OracleGpu(FakeGpu):
    """`FakeGpu` with every family."""

    def make(self, family: str, library: str, problem: Any, config: Any = None, algorithm: int | None = None, **_: Any) -> FakeStep:
        return OracleStep(self, family, library, problem)


class Serialised:
    """In place of a prepared way: needs no workspace, and its cuDNN plan is a few bytes."""

    workspace_bytes = 0

    def __init__(self) -> None:
        self.call = self

    def serialized(self) -> bytes:
        return b"plan"


def first_ways(lowered: Lowered, *, sparsity: str = "auto", apart: bool = False) -> list[Chosen]:
    """For every call the first way listed, as if it had been the fastest; sparse ones of ours where there are any.

    With `apart`, the first whose activation is a step of its own, where there is one.
    """
    found = []
    for call in lowered.calls:
        if call.family != "fallback":
            way = pick(call, sparsity, apart)
            found.append(Chosen(way, {str(way): 1.0}))
    return found


def pick(call: LayerCall, sparsity: str, apart: bool) -> Way:
    ways, _ = ways_of(call, sparsity=sparsity)
    ways = [way for way in ways if apart and way.after is not None] or ways
    return ways[0] if ways else Way(call.family, "cudnn", call.problem, None, 0)
