"""The operators of the fused graph (domain `twofour`): channels-last, with their epilogues; the arithmetic is that of the families."""

import json

import numpy as np

from twofour.errors import InputError
from twofour.oracle import attention as attention_family
from twofour.oracle import conv as conv_family
from twofour.oracle import patches as patches_family
from twofour.oracle import pointwise as pointwise_family
from twofour.oracle import pool as pool_family
from twofour.oracle import reduce as reduce_family
from twofour.oracle.gemm import gemm
from twofour.oracle.operators.common import Array, Attributes, Inputs, Operator, given, needed, wide

ALONG = ("softmax", "layernorm", "rmsnorm")


def run_conv(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Conv: x `[N, H, W, C]`, weight `[K, R, S, C / groups]`, bias `[K]`, residual as the output; pads top, left, bottom, right."""
    y = conv_family.conv(
        needed(inputs, 0),
        needed(inputs, 1),
        strides=attributes["strides"],
        pads=attributes["pads"],
        dilations=attributes["dilations"],
        groups=int(attributes["groups"]),
        bias=given(inputs, 2),
        residual=given(inputs, 3),
        activation=attributes.get("activation", "none"),
    )
    return [y]


def run_linear(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Linear: x `[..., inputs]`, weight `[outputs, inputs]`, bias `[outputs]`, residual as the output."""
    x, weight, residual = needed(inputs, 0), needed(inputs, 1), given(inputs, 3)
    rows = None if residual is None else residual.reshape(-1, weight.shape[0])
    activation = attributes.get("activation", "none")
    y = gemm(x.reshape(-1, x.shape[-1]), weight, sparse=False, activation=activation, bias=given(inputs, 2), residual=rows)
    return [y.reshape(*x.shape[:-1], weight.shape[0])]


def run_pointwise(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Pointwise: the program, as JSON, on inputs that broadcast."""
    arrays = [needed(inputs, i) for i in range(len(inputs))]
    shape = np.broadcast_shapes(*(array.shape for array in arrays))
    return [np.array(np.broadcast_to(pointwise_family.pointwise(arrays, json.loads(attributes["program"])), shape))]


def run_pool(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Pool: x `[N, H, W, C]`; `ceil` holds the rows and columns that only round the size up."""
    windows = [tuple(attributes[name]) for name in ("kernel", "strides", "pads", "dilations")]
    counted, ceil = bool(attributes["count_include_pad"]), tuple(attributes["ceil"])
    return [pool_family.pool(needed(inputs, 0), attributes["kind"], *windows, count_include_pad=counted, ceil=ceil)]  # type: ignore[arg-type]


def run_reduce(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Reduce over axes, kept with size 1 (mean, sum, max, l2), or along them (softmax, layernorm, rmsnorm)."""
    x, kind, axes = wide(needed(inputs, 0)), attributes["kind"], sorted(int(a) % needed(inputs, 0).ndim for a in attributes["axes"])
    beside = list(range(axes[0], axes[0] + len(axes)))
    x = np.moveaxis(x, axes, beside)
    length = int(np.prod([x.shape[a] for a in beside]))
    lines = x.reshape(int(np.prod(x.shape[: axes[0]])), length, -1)
    vectors = [None if v is None else v.reshape(-1) for v in (given(inputs, 1), given(inputs, 2))]
    y = reduce_family.reduce(lines, kind, float(attributes["eps"]), *vectors)
    y = y.reshape(x.shape if kind in ALONG else [1 if a in beside else n for a, n in enumerate(x.shape)])
    return [np.moveaxis(y, beside, axes)]


def run_attention(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Attention: q `[N, tokens, heads, head]`, k and v `[N, keys, heads, head]` -> `[N, tokens, heads, head]`."""
    q, k, v = (np.swapaxes(needed(inputs, i), 1, 2) for i in range(3))
    y = attention_family.attention(q, k, v, float(attributes["scale"]), causal=bool(attributes.get("causal", 0)))
    return [np.swapaxes(y, 1, 2)]


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
    height, width, kind, coordinates, rounding = (attributes[n] for n in ("height", "width", "kind", "coordinates", "nearest_mode"))
    return [pool_family.resize(needed(inputs, 0), height, width, kind, coordinates, rounding, tuple(attributes["scales"]))]


def run_pad(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Pad: a constant around, `pads` begin… end…."""
    x, n = wide(needed(inputs, 0)), needed(inputs, 0).ndim
    pads = attributes["pads"]
    return [np.pad(x, list(zip(pads[:n], pads[n:], strict=True)), constant_values=attributes["value"])]


def run_patches(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Patches: x `[N, H, W, C]` to `[N, height, width, channels]`, a block of pixels a pixel; `before` rows and columns of zeros."""
    height, width, channels = (int(attributes[name]) for name in ("height", "width", "channels"))
    block, before = tuple(attributes["block"]), attributes["before"]
    return [patches_family.patches(needed(inputs, 0), height, width, channels, block, *before)]


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
    "Patches": run_patches,
    "MatMul": lambda inputs, _attributes, _count: [np.asarray(wide(needed(inputs, 0)) @ wide(needed(inputs, 1)))],
}
