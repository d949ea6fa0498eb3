"""Rules of the operations that compute: elementwise, products, norms, reductions, pixels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from twofour.pruning.permutation.align import along, combine, elementwise
from twofour.pruning.permutation.labels import Factor, Ledger, Value, fix_axes, reshape, within
from twofour.pruning.permutation.table import axes_of, constant, rule, values_of


# y[i] = f(x[i]): every place is treated alike.
@rule(
    *(
        "relu",
        "relu6",
        "hardtanh",
        "hardswish",
        "hardsigmoid",
        "silu",
        "gelu",
        "sigmoid",
        "tanh",
        "elu",
        "selu",
        "celu",
        "leaky_relu",
        "mish",
    ),
    *("softplus", "log_sigmoid", "exp", "log", "sqrt", "rsqrt", "reciprocal", "abs", "neg", "sin", "cos", "erf", "pow", "square", "clamp"),
    *(
        "clamp_min",
        "clamp_max",
        "floor",
        "round",
        "clone",
        "alias",
        "detach",
        "_to_copy",
        "isnan",
        "logical_not",
        "bitwise_not",
        "threshold",
    ),
    *("sign", "expm1", "log1p", "nan_to_num"),
)
def _unary(ledger: Ledger, *arguments: Any, **options: Any) -> Value:
    return elementwise(ledger, values_of([*arguments, *options.values()]))


# y[i] = x[i] in the format of another value
@rule("type_as")
def _type_as(ledger: Ledger, x: Value, other: Value) -> Value:
    return x


@rule("native_dropout")
def _dropout(ledger: Ledger, x: Value, *rest: Any) -> tuple[Value, Value]:
    y = _drawn(ledger, x)
    return y, y


# y[i] is one with probability x[i]
@rule("bernoulli")
def _bernoulli(ledger: Ledger, x: Value, *rest: Any, **options: Any) -> Value:
    return _drawn(ledger, x)


def _drawn(ledger: Ledger, x: Value) -> Value:
    """A draw from each element: equal elements give unequal draws, in any order as likely, which all that meet the draw must follow."""
    drawn = [a for a in sorted(x.flat) if x.shape[a] > 1]
    fresh = tuple(Factor((a,), ledger.atoms(x.shape[a]), np.zeros(x.shape[a], np.int64)) for a in drawn)
    return replace(x, factors=(*x.factors, *fresh), flat=x.flat - set(drawn))


# y[i] = f(a[i], b[i], ...) with broadcasting: all operands are reordered alike.
@rule(
    *(
        "add",
        "sub",
        "mul",
        "div",
        "rsub",
        "maximum",
        "minimum",
        "where",
        "lerp",
        "addcmul",
        "addcdiv",
        "masked_fill",
        "copy",
        "eq",
        "ne",
        "lt",
    ),
    *("le", "gt", "ge", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "__and__", "floor_divide", "remainder", "atan2"),
)
def _elementwise(ledger: Ledger, *arguments: Any, **options: Any) -> Value:
    return elementwise(ledger, values_of([*arguments, *options.values()]))


# Every element is the same, or will be drawn alike: any order is as good.
@rule("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty", "fill")
def _uniform(ledger: Ledger, *arguments: Any, shape: tuple[int, ...] = (), **options: Any) -> Value:
    return constant(shape)


# y[b, o] = sum_i x[b, i] w[o, i] + bias[o]
@rule("linear")
def _linear(ledger: Ledger, x: Value, weight: Value, bias: Value | None = None) -> Value:
    outer = list(range(x.ndim - 1))
    i, o = x.ndim - 1, x.ndim
    operands: list[tuple[Value, Sequence[int]]] = [(x, [*outer, i]), (weight, [o, i])]
    sizes = {**dict(enumerate(x.shape)), o: weight.shape[0]}
    result = combine(ledger, operands, [*outer, o], sizes)
    return along(ledger, result, -1, bias)


# y[n, g o] = sum_c x[n, g c] * w[g o, c] + bias[g o], at every pixel and kernel place
@rule("conv1d", "conv2d", "conv3d")
def _convolution(ledger: Ledger, x: Value, weight: Value, bias: Value | None = None, *rest: Any, shape: tuple[int, ...] = ()) -> Value:
    return _convolve(ledger, x, weight, bias, int(rest[3]) if len(rest) >= 4 else 1, False, shape)


# y[n, g o] = sum_c x[n, g c] * w[g c, o] + bias[g o]
@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _transposed(ledger: Ledger, x: Value, weight: Value, bias: Value | None = None, *rest: Any, shape: tuple[int, ...] = ()) -> Value:
    return _convolve(ledger, x, weight, bias, int(rest[3]) if len(rest) >= 4 else 1, True, shape)


def _convolve(ledger: Ledger, x: Value, weight: Value, bias: Value | None, groups: int, transposed: bool, shape: tuple[int, ...]) -> Value:
    spatial = weight.ndim - 2
    batched = x.ndim == weight.ndim
    if not batched:
        x = reshape(ledger, x, (1, *x.shape))
    x = fix_axes(ledger, x, range(2, x.ndim))
    weight = fix_axes(ledger, weight, range(2, weight.ndim))
    n, g, c, o = 0, 1, 2, 3
    pixels, kernel = range(4, 4 + spatial), range(4 + spatial, 4 + 2 * spatial)
    x = reshape(ledger, x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    weight = reshape(ledger, weight, (groups, weight.shape[0] // groups, *weight.shape[1:]))
    inside = (g, c, o) if transposed else (g, o, c)
    sizes = {n: x.shape[0], g: groups, c: x.shape[2], o: weight.shape[1 + inside[1:].index(o)]}
    sizes |= dict(zip([*pixels, *kernel], [*x.shape[3:], *weight.shape[3:]], strict=True))
    # Only the channels' letters decide; a pixel of the result is not the pixel of the operand, so both sides' stay outside the result.
    joined = combine(ledger, [(x, [n, g, c, *pixels]), (weight, [*inside, *kernel])], [n, g, o], sizes)
    full = shape if batched else (1, *shape)
    merged = reshape(ledger, joined, (full[0], full[1]))
    result = along(ledger, Value(full, merged.factors, merged.flat), 1, bias)
    return result if batched else reshape(ledger, result, shape)


# y[n, i, j] = sum_k a[n, i, k] b[n, k, j]
@rule("matmul", "bmm", "mm")
def _matmul(ledger: Ledger, a: Value, b: Value, shape: tuple[int, ...] = ()) -> Value:
    if a.ndim < 2 or b.ndim < 2:
        ledger.freeze(a)
        ledger.freeze(b)
        return Value(shape)
    outer = max(a.ndim, b.ndim) - 2
    i, j, k = outer, outer + 1, outer + 2
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    sizes = {**dict(enumerate(batch)), i: a.shape[-2], j: b.shape[-1], k: a.shape[-1]}
    left = [*range(outer - (a.ndim - 2), outer), i, k]
    right = [*range(outer - (b.ndim - 2), outer), k, j]
    return combine(ledger, [(a, left), (b, right)], [*range(outer), i, j], sizes)


# y = c + a b
@rule("addmm", "baddbmm")
def _add_matmul(ledger: Ledger, c: Value, a: Value, b: Value, shape: tuple[int, ...] = (), **scales: Any) -> Value:
    return elementwise(ledger, [_matmul(ledger, a, b, shape), c], shape)


# y[out] = sum of the product of the operands over the letters that `out` lacks
@rule("einsum")
def _einsum(ledger: Ledger, equation: str, operands: Sequence[Value], shape: tuple[int, ...] = (), **options: Any) -> Value:
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    repeated = any(len(set(t)) != len(t) for t in terms)
    if not arrow or "." in equation or repeated:
        for value in operands:
            ledger.freeze(value)
        return Value(shape)
    sizes: dict[int, int] = {}
    for value, term in zip(operands, terms, strict=True):
        for letter, size in zip(term, value.shape, strict=True):
            sizes[ord(letter)] = max(size, sizes.get(ord(letter), 1))
    lettered = [(v, [ord(s) for s in t]) for v, t in zip(operands, terms, strict=True)]
    return combine(ledger, lettered, [ord(s) for s in out], sizes)


# y[b, h, n, e] = sum_m softmax_m(sum_d q[b, h, n, d] k[b, h, m, d] + mask) v[b, h, m, e]; h runs over groups of query heads if k has fewer
@rule("scaled_dot_product_attention")
def _attention(
    ledger: Ledger, q: Value, k: Value, v: Value, mask: Any = None, *rest: Any, shape: tuple[int, ...] = (), **options: Any
) -> Value:
    if q.ndim < 3:
        for value in (q, k, v):
            ledger.freeze(value)
        return Value(shape)
    heads, shared = q.shape[-3], k.shape[-3]
    outer = list(range(q.ndim - 3))
    h, r, n, m, d, e = (len(outer) + s for s in range(6))
    grouped = reshape(ledger, q, (*q.shape[:-3], shared, heads // shared, *q.shape[-2:]))
    sizes = {**dict(enumerate(q.shape[:-3])), h: shared, r: heads // shared, n: q.shape[-2], m: k.shape[-2], d: q.shape[-1], e: v.shape[-1]}
    scores = combine(ledger, [(grouped, [*outer, h, r, n, d]), (k, [*outer, h, m, d])], [*outer, h, r, n, m], sizes)
    scores = fix_axes(ledger, scores, range(scores.ndim))
    if isinstance(mask, Value):
        ledger.freeze(mask)
    scores = replace(scores, flat=frozenset())
    result = combine(ledger, [(scores, [*outer, h, r, n, m]), (v, [*outer, h, m, e])], [*outer, h, r, n, e], sizes)
    return reshape(ledger, result, shape)


# y = (x - mean_c) / std_c * weight_c + bias_c, and running statistics a channel
@rule("_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional", "_native_batch_norm_legit")
def _batch_norm(ledger: Ledger, x: Value, weight: Value | None, bias: Value | None, *rest: Any, results: int = 1) -> tuple[Value, ...]:
    x = fix_axes(ledger, x, [a for a in range(x.ndim) if a != 1])
    y = along(ledger, x, 1, weight, bias, *values_of(rest))
    channel = Value((x.shape[1],), tuple(Factor((0,), f.atom, f.tag) for f in y.factors if f.axes == (1,)))
    return (y, *[channel] * (results - 1))


@rule("instance_norm")
def _instance_norm(
    ledger: Ledger, x: Value, weight: Value | None, bias: Value | None, mean: Value | None, var: Value | None, *rest: Any
) -> Value:
    x = fix_axes(ledger, x, range(2, x.ndim))
    return along(ledger, x, 1, weight, bias, mean, var)


# y = (x - mean) / std over each group of channels and all pixels
@rule("group_norm")
def _group_norm(ledger: Ledger, x: Value, groups: int, weight: Value | None = None, bias: Value | None = None, *rest: Any) -> Value:
    x = fix_axes(ledger, x, range(2, x.ndim))
    split = reshape(ledger, x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    within(ledger, split, range(2, split.ndim))
    return along(ledger, x, 1, weight, bias)


# y = (x - mean) / std over the last axes, or x / rms
@rule("layer_norm", "rms_norm")
def _layer_norm(
    ledger: Ledger, x: Value, normalized: Sequence[int], weight: Value | None = None, bias: Value | None = None, *rest: Any
) -> Value:
    within(ledger, x, range(x.ndim - len(normalized), x.ndim))
    return elementwise(ledger, [x, *values_of([weight, bias])], x.shape)


# y = x scaled by a function of all places along some axes
@rule("softmax", "log_softmax")
def _softmax(ledger: Ledger, x: Value, axis: int, *rest: Any, **options: Any) -> Value:
    within(ledger, x, [x.axis(axis)])
    return x


# y = f(all places along some axes), blind to their order
@rule("mean", "sum", "amax", "amin", "prod", "any", "all", "logsumexp")
def _reduce(ledger: Ledger, x: Value, axes: Any = None, keep: bool = False, shape: tuple[int, ...] = (), **options: Any) -> Value:
    return _reduced(ledger, x, axes_of(x, axes), shape)


@rule("var", "std")
def _spread(ledger: Ledger, x: Value, axes: Any = None, *rest: Any, shape: tuple[int, ...] = (), **options: Any) -> Value:
    return _reduced(ledger, x, axes_of(x, None if isinstance(axes, bool) else axes), shape)


@rule("var_mean")
def _spread_and_mean(ledger: Ledger, x: Value, axes: Any = None, *rest: Any, shape: Any = (), **options: Any) -> tuple[Value, Value]:
    y = _reduced(ledger, x, axes_of(x, None if isinstance(axes, bool) else axes), shape[0])
    return y, y


@rule("linalg_vector_norm")
def _norm(
    ledger: Ledger, x: Value, order: Any = 2, axes: Any = None, keep: bool = False, shape: tuple[int, ...] = (), **options: Any
) -> Value:
    return _reduced(ledger, x, axes_of(x, axes), shape)


# (largest, where): the places themselves are told, so their order stays
@rule("max", "min")
def _extreme(ledger: Ledger, x: Value, axis: Any = None, keep: bool = False, shape: Any = (), results: int = 1) -> Any:
    if isinstance(axis, Value):
        return elementwise(ledger, [x, axis])
    if results == 1:
        return _reduced(ledger, x, list(range(x.ndim)), shape)
    x = fix_axes(ledger, x, [x.axis(axis)])
    y = _reduced(ledger, x, [x.axis(axis)], shape[0])
    return y, y


def _reduced(ledger: Ledger, x: Value, axes: Sequence[int], shape: tuple[int, ...]) -> Value:
    within(ledger, x, axes)
    gone = {x.axis(a) for a in axes}
    keep = len(shape) == x.ndim
    left = [a for a in range(x.ndim) if keep or a not in gone]
    factors = tuple(Factor(tuple(left.index(a) for a in f.axes), f.atom, f.tag) for f in x.factors if not gone & set(f.axes))
    return Value(shape, factors, frozenset(k for k, a in enumerate(left) if a in x.flat or a in gone))


# Pixels are pooled, resized or padded; channels pass.
def _pixels(ledger: Ledger, x: Value, dimensions: int, shape: Any, results: int) -> Any:
    target = shape[0] if results > 1 else shape
    spatial = range(x.ndim - dimensions, x.ndim)
    x = fix_axes(ledger, x, spatial)
    y = Value(target, x.factors, frozenset(a for a in x.flat if a not in spatial))
    return y if results == 1 else (y,) * results


@rule("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "upsample_nearest1d", "upsample_linear1d")
def _pixels_1d(ledger: Ledger, x: Value, *rest: Any, shape: Any = (), results: int = 1, **options: Any) -> Any:
    return _pixels(ledger, x, 1, shape, results)


@rule(
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool2d_with_indices"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
def _pixels_2d(ledger: Ledger, x: Value, *rest: Any, shape: Any = (), results: int = 1, **options: Any) -> Any:
    return _pixels(ledger, x, 2, shape, results)


@rule("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "upsample_nearest3d", "upsample_trilinear3d")
def _pixels_3d(ledger: Ledger, x: Value, *rest: Any, shape: Any = (), results: int = 1, **options: Any) -> Any:
    return _pixels(ledger, x, 3, shape, results)


# y[n, c, r h + i, r w + j] = x[n, (c, i, j), h, w]
@rule("pixel_shuffle")
def _pixel_shuffle(ledger: Ledger, x: Value, r: int, shape: tuple[int, ...] = ()) -> Value:
    x = fix_axes(ledger, x, [x.ndim - 2, x.ndim - 1])
    split = reshape(ledger, x, (*x.shape[:-3], shape[-3], r, r, *x.shape[-2:]))
    split = fix_axes(ledger, split, [split.ndim - 4, split.ndim - 3])
    return Value(shape, split.factors)


# y[n, (c, i, j), h, w] = x[n, c, r h + i, r w + j]
@rule("pixel_unshuffle")
def _pixel_unshuffle(ledger: Ledger, x: Value, r: int, shape: tuple[int, ...] = ()) -> Value:
    x = fix_axes(ledger, x, [x.ndim - 2, x.ndim - 1])
    split = Value((*x.shape[:-2], r, r, *shape[-2:]), x.factors)
    return reshape(ledger, split, shape)


# y[n, (c, k), l] = x[n, c, the k-th pixel of window l]
@rule("im2col")
def _windows(ledger: Ledger, x: Value, kernel: Sequence[int], *rest: Any, shape: tuple[int, ...] = ()) -> Value:
    x = fix_axes(ledger, x, [x.ndim - 2, x.ndim - 1])
    split = Value((*x.shape[:-2], int(np.prod(kernel)), shape[-1]), x.factors)
    return reshape(ledger, split, shape)


# y[n, c, p] = sum of x[n, (c, k), l] over the windows that hold pixel p
@rule("col2im")
def _overlap(ledger: Ledger, x: Value, size: Any, kernel: Sequence[int], *rest: Any, shape: tuple[int, ...] = ()) -> Value:
    x = fix_axes(ledger, x, [x.ndim - 1])
    places = int(np.prod(kernel))
    split = reshape(ledger, x, (*x.shape[:-2], x.shape[-2] // places, places, x.shape[-1]))
    return Value(shape, fix_axes(ledger, split, [split.ndim - 2]).factors)


@rule("prelu")
def _prelu(ledger: Ledger, x: Value, weight: Value) -> Value:
    return x if weight.shape == (1,) else along(ledger, x, 1, weight)
