"""The operators of the fused graph (domain `twofour`): channels-last, with their epilogues, in float64."""

import json

import numpy as np

from twofour.errors import InputError
from twofour.oracle.gemm import ACTIVATIONS
from twofour.oracle.operators.common import Array, Attributes, Inputs, Operator, given, needed, wide
from twofour.oracle.operators.elementwise import clip
from twofour.oracle.operators.products import attention
from twofour.oracle.operators.programs import run_program
from twofour.oracle.operators.reductions import normalized, softmax
from twofour.oracle.operators.windows import convolution, pool, resize_matrix


def finished(y: Array, bias: Array | None, residual: Array | None, activation: str) -> Array:
    """Return `activation(y + bias + residual)`, the bias along the last axis."""
    y = y if bias is None else y + wide(bias)
    y = y if residual is None else y + wide(residual)
    return clip(y, 0.0, 6.0) if activation == "relu6" else np.asarray(ACTIVATIONS[activation](y))


def run_conv(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Conv: x `[N, H, W, C]`, weight `[K, R, S, C / groups]`, bias `[K]`, residual as the output; pads top, left, bottom, right."""
    x, weight = np.moveaxis(needed(inputs, 0), -1, 1), np.moveaxis(needed(inputs, 1), -1, 1)
    strides, pads, dilations = attributes["strides"], attributes["pads"], attributes["dilations"]
    y = np.moveaxis(convolution(x, weight, None, strides, pads, dilations, int(attributes["groups"])), 1, -1)
    return [finished(y, given(inputs, 2), given(inputs, 3), attributes.get("activation", "none"))]


def run_linear(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Linear: x `[..., inputs]`, weight `[outputs, inputs]`, bias `[outputs]`, residual as the output."""
    y = wide(needed(inputs, 0)) @ wide(needed(inputs, 1)).T
    return [finished(y, given(inputs, 2), given(inputs, 3), attributes.get("activation", "none"))]


def run_pointwise(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Pointwise: the program, as JSON, on inputs that broadcast."""
    return [run_program(json.loads(attributes["program"]), [needed(inputs, i) for i in range(len(inputs))])]


def run_pool(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Pool: x `[N, H, W, C]`; a mean divides by the elements inside the image, or by all with `count_include_pad`."""
    x = np.moveaxis(needed(inputs, 0), -1, 1)
    kernel, strides, pads, dilations = (attributes[name] for name in ("kernel", "strides", "pads", "dilations"))
    counted = bool(attributes["count_include_pad"])
    y = pool(x, attributes["kind"], kernel, strides, pads, dilations, count_pads=counted, round_up=any(attributes["ceil"]))
    return [np.moveaxis(y, 1, -1)]


def run_reduce(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Reduce over neighbouring axes, kept with size 1 (mean, sum, max, l2), or along the last axis (softmax, layernorm, rmsnorm)."""
    x, kind, axes = wide(needed(inputs, 0)), attributes["kind"], tuple(attributes["axes"])
    if kind in ("layernorm", "rmsnorm"):
        y, scale, bias = normalized(x, axes, attributes["eps"], centred=kind == "layernorm"), given(inputs, 1), given(inputs, 2)
        y = y if scale is None else y * wide(scale)
        return [y if bias is None else y + wide(bias)]
    if kind == "softmax":
        return [softmax(x, axes[0])]
    if kind == "l2":
        return [np.sqrt((x * x).sum(axis=axes, keepdims=True))]
    functions = {"mean": np.mean, "sum": np.sum, "max": np.max}
    if kind not in functions:
        raise InputError(f"oracle: Reduce has the kind {kind!r}, expected mean, sum, max, l2, softmax, layernorm or rmsnorm")
    return [np.asarray(functions[kind](x, axis=axes, keepdims=True))]  # type: ignore[operator]


def run_attention(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Attention: q `[N, tokens, heads, head]`, k and v `[N, keys, heads, head]` -> `[N, tokens, heads, head]`."""
    q, k, v = (np.swapaxes(needed(inputs, i), 1, 2) for i in range(3))
    return [np.swapaxes(attention(q, k, v, attributes["scale"], causal=bool(attributes.get("causal", 0))), 1, 2)]


def run_view(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """View: the elements `offset + sum index · stride` of the input's storage."""
    x = np.ascontiguousarray(needed(inputs, 0)).reshape(-1)
    shape, strides, offset = attributes["shape"], attributes["strides"], int(attributes["offset"])
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 not in shape and not 0 <= last < x.size:
        raise InputError(f"oracle: a View reaches element {last} of a value that has {x.size}")
    return [np.array(np.lib.stride_tricks.as_strided(x[offset:], shape, [stride * x.itemsize for stride in strides]))]


def run_resize(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Resize: x `[N, H, W, C]` to `[N, height, width, C]`, nearest or linear."""
    x = wide(needed(inputs, 0))
    for axis, size, scale in zip((1, 2), (attributes["height"], attributes["width"]), attributes["scales"], strict=True):
        matrix = resize_matrix(x.shape[axis], size, scale, attributes["kind"], attributes["coordinates"], attributes["nearest_mode"])
        x = np.moveaxis(np.tensordot(matrix, x, axes=(1, axis)), 0, axis)
    return [x]


def run_pad(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Pad: a constant around, `pads` begin… end…."""
    x, n = wide(needed(inputs, 0)), needed(inputs, 0).ndim
    pads = attributes["pads"]
    return [np.pad(x, list(zip(pads[:n], pads[n:], strict=True)), constant_values=attributes["value"])]


FUSED: dict[str, Operator] = {
    "Conv": run_conv,
    "Linear": run_linear,
    "Pointwise": run_pointwise,
    "Pool": run_pool,
    "Reduce": run_reduce,
    "Attention": run_attention,
    "View": run_view,
    "Copy": lambda inputs, _attributes, _count: [np.array(needed(inputs, 0))],
    "Concat": lambda inputs, attributes, _count: [
        np.concatenate([wide(needed(inputs, i)) for i in range(len(inputs))], axis=int(attributes["axis"]))
    ],
    "Resize": run_resize,
    "Pad": run_pad,
    "MatMul": lambda inputs, _attributes, _count: [np.asarray(wide(needed(inputs, 0)) @ wide(needed(inputs, 1)))],
}
