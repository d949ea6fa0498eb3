"""One table: ATen operation -> how channel order flows through it.

A rule receives the ledger and the operation's arguments, values in place of tensors, and returns the value of each result. It writes
into the ledger what the operation asks of any reordering. An operation without a rule freezes everything that reaches it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from twofour.pruning.permutation.align import along, combine, elementwise
from twofour.pruning.permutation.labels import FIXED, Factor, Ledger, Value, fix_axes, pair, place, reshape, within

Rule = Callable[..., Any]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Enter a function into the table for each of `names`."""

    def enter(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return enter


def _values(arguments: Sequence[Any]) -> list[Value]:
    return [a for a in arguments if isinstance(a, Value)]


def _axes(value: Value, axes: Any) -> list[int]:
    """Non-negative axes of a reduction; None and [] mean all."""
    if axes is None or (isinstance(axes, list | tuple) and not axes):
        return list(range(value.ndim))
    return [value.axis(a) for a in (axes if isinstance(axes, list | tuple) else [axes])]


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
    *("sign", "expm1", "log1p", "nan_to_num", "bernoulli"),
)
def _unary(ledger: Ledger, x: Value, *rest: Any, **options: Any) -> Value:
    return elementwise(ledger, [x, *_values(rest), *_values(list(options.values()))])


@rule("native_dropout")
def _dropout(ledger: Ledger, x: Value, *rest: Any) -> tuple[Value, Value]:
    return x, x


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
    return elementwise(ledger, _values([*arguments, *options.values()]))


# Every element is the same, or will be drawn alike: any order is as good.
@rule("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty", "fill")
def _uniform(ledger: Ledger, *arguments: Any, shape: tuple[int, ...] = (), **options: Any) -> Value:
    return Value(shape, (), frozenset(range(len(shape))))


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
    y = along(ledger, x, 1, weight, bias, *_values(rest))
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
    return elementwise(ledger, [x, *_values([weight, bias])], x.shape)


# y = x scaled by a function of all places along some axes
@rule("softmax", "log_softmax")
def _softmax(ledger: Ledger, x: Value, axis: int, *rest: Any, **options: Any) -> Value:
    within(ledger, x, [x.axis(axis)])
    return x


# y = f(all places along some axes), blind to their order
@rule("mean", "sum", "amax", "amin", "prod", "any", "all", "logsumexp")
def _reduce(ledger: Ledger, x: Value, axes: Any = None, keep: bool = False, shape: tuple[int, ...] = (), **options: Any) -> Value:
    return _reduced(ledger, x, _axes(x, axes), shape)


@rule("var", "std")
def _spread(ledger: Ledger, x: Value, axes: Any = None, *rest: Any, shape: tuple[int, ...] = (), **options: Any) -> Value:
    return _reduced(ledger, x, _axes(x, None if isinstance(axes, bool) else axes), shape)


@rule("var_mean")
def _spread_and_mean(ledger: Ledger, x: Value, axes: Any = None, *rest: Any, shape: Any = (), **options: Any) -> tuple[Value, Value]:
    y = _reduced(ledger, x, _axes(x, None if isinstance(axes, bool) else axes), shape[0])
    return y, y


@rule("linalg_vector_norm")
def _norm(
    ledger: Ledger, x: Value, order: Any = 2, axes: Any = None, keep: bool = False, shape: tuple[int, ...] = (), **options: Any
) -> Value:
    return _reduced(ledger, x, _axes(x, axes), shape)


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


# y[n, (g, s), h, w] = x[n, (s, g), h, w]
@rule("channel_shuffle")
def _channel_shuffle(ledger: Ledger, x: Value, groups: int, shape: tuple[int, ...] = ()) -> Value:
    split = reshape(ledger, x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    return reshape(ledger, _transpose(ledger, split, 1, 2), shape)


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


# y[..., i] = a[..., i] sigmoid(b[..., i]) with x = [a, b]
@rule("glu")
def _glu(ledger: Ledger, x: Value, axis: int = -1) -> Value:
    halves = _split(ledger, x, x.shape[x.axis(axis)] // 2, axis)
    return elementwise(ledger, halves)


@rule("prelu")
def _prelu(ledger: Ledger, x: Value, weight: Value) -> Value:
    return x if weight.shape == (1,) else along(ledger, x, 1, weight)


# The same elements in another shape.
@rule("view", "_unsafe_view")
def _reshape(ledger: Ledger, x: Value, *rest: Any, shape: tuple[int, ...] = ()) -> Value:
    return reshape(ledger, x, shape)


@rule("permute")
def _permute(ledger: Ledger, x: Value, order: Sequence[int]) -> Value:
    order = [x.axis(a) for a in order]
    factors = []
    for f in x.factors:
        axes = [order.index(a) for a in f.axes]
        by = np.argsort(axes)
        factors.append(Factor(tuple(sorted(axes)), f.atom.transpose(by), f.tag.transpose(by)))
    return Value(tuple(x.shape[a] for a in order), tuple(factors), frozenset(order.index(a) for a in x.flat))


@rule("transpose")
def _transpose(ledger: Ledger, x: Value, a: int, b: int) -> Value:
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return _permute(ledger, x, order)


@rule("t")
def _t(ledger: Ledger, x: Value) -> Value:
    return x if x.ndim < 2 else _transpose(ledger, x, -2, -1)


@rule("unsqueeze")
def _unsqueeze(ledger: Ledger, x: Value, axis: int, shape: tuple[int, ...] = ()) -> Value:
    at = axis % (x.ndim + 1)
    return _moved(x, shape, [a + (a >= at) for a in range(x.ndim)])


@rule("squeeze")
def _squeeze(ledger: Ledger, x: Value, axes: Any = None, shape: tuple[int, ...] = ()) -> Value:
    gone = {a for a in _axes(x, axes) if x.shape[a] == 1}
    x = fix_axes(ledger, x, gone)
    left = [a for a in range(x.ndim) if a not in gone]
    return _moved(x, shape, [left.index(a) if a in left else -1 for a in range(x.ndim)])


def _moved(x: Value, shape: tuple[int, ...], to: Sequence[int]) -> Value:
    """`x` with axis a at `to[a]` of a value of `shape`."""
    factors = tuple(Factor(tuple(to[a] for a in f.axes), f.atom, f.tag) for f in x.factors)
    return Value(shape, factors, frozenset(to[a] for a in x.flat if to[a] >= 0))


# y[i, j] = x[j]: constant along the new axes
@rule("expand")
def _expand(ledger: Ledger, x: Value, size: Sequence[int], shape: tuple[int, ...] = (), **options: Any) -> Value:
    lead = len(shape) - x.ndim
    grown = [a for a in range(x.ndim) if x.shape[a] == 1 and shape[a + lead] != 1]
    x = fix_axes(ledger, x, grown)
    y = _moved(x, shape, [a + lead for a in range(x.ndim)])
    return replace(y, flat=y.flat | frozenset(range(lead)) | frozenset(a + lead for a in grown))


# y = x, several times along an axis
@rule("repeat")
def _repeat(ledger: Ledger, x: Value, times: Sequence[int], shape: tuple[int, ...] = ()) -> Value:
    wide = reshape(ledger, x, (*(1,) * (len(times) - x.ndim), *x.shape))
    for axis, count in enumerate(times):
        if int(count) != 1:
            wide = _cat(ledger, [wide] * int(count), axis)
    return wide


# y = every element of x several times in a row along an axis
@rule("repeat_interleave")
def _repeat_each(ledger: Ledger, x: Value, times: Any, axis: Any = None, shape: tuple[int, ...] = (), **options: Any) -> Value:
    if not isinstance(times, int) or axis is None:
        ledger.freeze(x)
        return Value(shape)
    at = x.axis(axis)
    wide = _expand(
        ledger, _unsqueeze(ledger, x, at + 1, (*x.shape[: at + 1], 1, *x.shape[at + 1 :])), (), _inserted(x.shape, at + 1, times)
    )
    return reshape(ledger, wide, shape)


def _inserted(shape: tuple[int, ...], at: int, size: int) -> tuple[int, ...]:
    return (*shape[:at], size, *shape[at:])


@rule("slice")
def _slice(ledger: Ledger, x: Value, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    return _take(x, x.axis(axis), slice(start, end, step))


@rule("select")
def _select(ledger: Ledger, x: Value, axis: int, index: int) -> Value:
    at = x.axis(axis)
    index = int(index) % x.shape[at]
    y = _take(x, at, slice(index, index + 1))
    shape = tuple(s for a, s in enumerate(y.shape) if a != at)
    factors = []
    for f in y.factors:
        axes = tuple(a - (a > at) for a in f.axes if a != at)
        if at in f.axes:
            k = f.axes.index(at)
            f = Factor(axes, f.atom.take(0, axis=k), f.tag.take(0, axis=k))
            if not axes:
                # A single place is read: it stays.
                ledger.frozen.append((np.unique(f.atom), ledger.operation))
                continue
        factors.append(Factor(axes, f.atom, f.tag))
    return Value(shape, tuple(factors), frozenset(a - (a > at) for a in y.flat if a != at))


def _take(x: Value, axis: int, which: slice) -> Value:
    kept = range(*which.indices(x.shape[axis]))
    shape = tuple(len(kept) if a == axis else s for a, s in enumerate(x.shape))
    factors = []
    for f in x.factors:
        if axis in f.axes:
            where = tuple(which if a == axis else slice(None) for a in f.axes)
            f = Factor(f.axes, f.atom[where], f.tag[where])
        factors.append(f)
    return Value(shape, tuple(factors), x.flat)


@rule("split", "split_with_sizes")
def _split(ledger: Ledger, x: Value, sizes: Any, axis: int = 0, shape: Any = None) -> list[Value]:
    at = x.axis(axis)
    if shape is not None:
        sizes = [s[at] for s in shape]
    elif not isinstance(sizes, list | tuple):
        sizes = [min(sizes, x.shape[at] - k) for k in range(0, x.shape[at], sizes)]
    ends = np.cumsum(sizes)
    return [_take(x, at, slice(int(e) - int(s), int(e))) for s, e in zip(sizes, ends, strict=True)]


@rule("unbind")
def _unbind(ledger: Ledger, x: Value, axis: int = 0) -> list[Value]:
    return [_select(ledger, x, axis, k) for k in range(x.shape[x.axis(axis)])]


@rule("flip")
def _flip(ledger: Ledger, x: Value, axes: Sequence[int]) -> Value:
    return _map_labels(x, lambda labels, inner: np.flip(labels, inner), [x.axis(a) for a in axes])


@rule("roll")
def _roll(ledger: Ledger, x: Value, shifts: Any, axes: Any = ()) -> Value:
    if not axes:
        ledger.freeze(x)
        return Value(x.shape)
    shifts, axes = (list(a) if isinstance(a, list | tuple) else [a] for a in (shifts, axes))
    for shift, axis in zip(shifts, axes, strict=True):
        x = _map_labels(x, lambda labels, inner, by=shift: np.roll(labels, by, inner[0]), [x.axis(axis)])
    return x


def _map_labels(x: Value, change: Callable[..., Any], axes: Sequence[int]) -> Value:
    factors = []
    for f in x.factors:
        inner = [k for k, a in enumerate(f.axes) if a in axes]
        factors.append(Factor(f.axes, change(f.atom, inner), change(f.tag, inner)) if inner else f)
    return replace(x, factors=tuple(factors))


# y = [a, b, ...] along an axis
@rule("cat")
def _cat(ledger: Ledger, parts: Sequence[Value], axis: int = 0) -> Value:
    parts = [p for p in parts if p.shape != (0,)]
    return _assemble(ledger, parts, parts[0].axis(axis))


@rule("stack")
def _stack(ledger: Ledger, parts: Sequence[Value], axis: int = 0) -> Value:
    at = axis % (parts[0].ndim + 1)
    return _assemble(ledger, [_unsqueeze(ledger, p, at, (*p.shape[:at], 1, *p.shape[at:])) for p in parts], at)


# y = x with a part along an axis replaced by another value
@rule("slice_scatter")
def _slice_scatter(ledger: Ledger, x: Value, part: Value, axis: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Value:
    at = x.axis(axis)
    span = range(*slice(start, end, step).indices(x.shape[at]))
    if len(span) == x.shape[at]:
        return part
    if step != 1:
        ledger.freeze(x)
        ledger.freeze(part)
        return Value(x.shape)
    pieces = [_take(x, at, slice(0, span.start)), part, _take(x, at, slice(span.stop, x.shape[at]))]
    return _assemble(ledger, [p for p in pieces if p.shape[at]], at)


@rule("select_scatter")
def _select_scatter(ledger: Ledger, x: Value, part: Value, axis: int, index: int) -> Value:
    at, index = x.axis(axis), int(index) % x.shape[x.axis(axis)]
    wide = _unsqueeze(ledger, part, at, (*part.shape[:at], 1, *part.shape[at:]))
    return _slice_scatter(ledger, x, wide, at, index, index + 1)


# y = x with constants around it
@rule("pad")
def _pad(ledger: Ledger, x: Value, widths: Sequence[int], mode: Any = "constant", *rest: Any) -> Value:
    for k in range(len(widths) // 2):
        axis, before, after = x.ndim - 1 - k, int(widths[2 * k]), int(widths[2 * k + 1])
        if before == after == 0:
            continue
        if before < 0 or after < 0:
            x = _take(x, axis, slice(max(-before, 0), x.shape[axis] - max(-after, 0)))
        if isinstance(mode, str) and mode != "constant":
            x = fix_axes(ledger, x, [axis])
            shape = tuple(s + before + after if a == axis else s for a, s in enumerate(x.shape))
            x = Value(shape, x.factors, x.flat - {axis})
            continue
        sides = [_uniform(ledger, shape=tuple(w if a == axis else s for a, s in enumerate(x.shape))) for w in (before, after) if w > 0]
        parts = [*sides[:1], x, *sides[1:]] if before > 0 else [x, *sides]
        x = _assemble(ledger, parts, axis)
    return x


def _assemble(ledger: Ledger, parts: Sequence[Value], axis: int) -> Value:
    """Values joined along `axis`; constant parts get atoms of their own, parts in a fixed order the fixed one."""
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    joint = {axis}
    grown = True
    while grown:
        more = {a for p in parts for f in p.factors if joint & set(f.axes) for a in f.axes}
        grown = not more <= joint
        joint |= more
    beside = [replace(p, factors=tuple(f for f in p.factors if not joint & set(f.axes))) for p in parts]
    letters = list(range(len(shape)))
    # Along the other axes the parts move alike; along the joint ones each has a letter of its own.
    far = len(shape)
    operands: list[tuple[Value, Sequence[int]]] = []
    sizes = dict(enumerate(shape))
    for p in beside:
        named = [far + a if a in joint else a for a in letters]
        flat = replace(p, shape=tuple(1 if a in joint else s for a, s in enumerate(p.shape)))
        operands.append((flat, named))
    sizes |= {far + a: 1 for a in joint}
    outside = combine(ledger, operands, [a for a in letters if a not in joint], sizes)
    rest = [a for a in letters if a not in joint]
    factors = [Factor(tuple(rest[a] for a in f.axes), f.atom, f.tag) for f in outside.factors]
    flat_axes = {rest[a] for a in outside.flat} | {a for a in joint - {axis} if all(a in p.flat for p in parts)}
    if any(p.touching(joint) for p in parts):
        factors.append(_joined(ledger, parts, axis, sorted(joint)))
    return Value(tuple(shape), tuple(factors), frozenset(flat_axes))


def _joined(ledger: Ledger, parts: Sequence[Value], axis: int, joint: Sequence[int]) -> Factor:
    atoms, tags = [], []
    for number, part in enumerate(parts):
        sizes = [part.shape[a] for a in joint]
        found = sorted(part.touching(joint), key=lambda f: -f.atom.size)
        for extra in found[1:]:
            ledger.frozen.append((np.unique(extra.atom), ledger.operation))
        if found:
            lead = found[0]
            view = [part.shape[a] if a in lead.axes else 1 for a in joint]
            atom = np.broadcast_to(lead.atom.reshape(view), sizes)
            apart = [k for k, a in enumerate(joint) if a not in lead.axes]
            tag = pair(np.broadcast_to(lead.tag.reshape(view), sizes), place(sizes, apart))
        elif axis in part.flat:
            steps = [part.shape[a] if a == axis else 1 for a in joint]
            fresh = ledger.atoms(part.shape[axis])
            atom = np.broadcast_to(fresh.reshape(steps), sizes)
            tag = place(sizes, [k for k, a in enumerate(joint) if a != axis])
        else:
            atom, tag = np.full(sizes, FIXED, np.int64), place(sizes, range(len(sizes)))
        atoms.append(atom)
        tags.append(tag * len(parts) + number)
    at = list(joint).index(axis)
    return Factor(tuple(joint), np.concatenate(atoms, axis=at), np.concatenate(tags, axis=at))


# y[i, c] = weight[index[i], c]
@rule("embedding")
def _embedding(ledger: Ledger, weight: Value, index: Value, *rest: Any) -> Value:
    weight = fix_axes(ledger, weight, [0])
    ledger.freeze(index)
    shape = (*index.shape, weight.shape[1])
    return _moved(Value(weight.shape, weight.factors), shape, [-1, len(shape) - 1])


# y[i, ...] = x[index[i], ...]
@rule("index", "index_select")
def _index(ledger: Ledger, x: Value, *arguments: Any, shape: tuple[int, ...] = ()) -> Value:
    if not isinstance(arguments[0], list | tuple):
        indices: list[Any] = [None] * x.ndim
        indices[x.axis(arguments[0])] = arguments[1]
    else:
        indices = [*arguments[0], *[None] * (x.ndim - len(arguments[0]))]
    for i in _values(indices):
        ledger.freeze(i)
    chosen = [a for a, i in enumerate(indices) if i is not None]
    x = fix_axes(ledger, x, chosen)
    added = len(shape) - (x.ndim - len(chosen))
    adjacent = chosen == list(range(chosen[0], chosen[-1] + 1))
    start = chosen[0] if adjacent else 0
    left = [a for a in range(x.ndim) if a not in chosen]
    at = {a: k + (added if k >= start else 0) for k, a in enumerate(left)}
    return _moved(Value(x.shape, x.factors), shape, [at.get(a, -1) for a in range(x.ndim)])


# y[i, c] = x[index[i, c], c]
@rule("gather")
def _gather(ledger: Ledger, x: Value, axis: int, index: Value, *rest: Any, **options: Any) -> Value:
    at = x.axis(axis)
    if any(a != at and x.shape[a] != index.shape[a] for a in range(x.ndim)):
        ledger.freeze(x)
        ledger.freeze(index)
        return Value(index.shape)
    x = fix_axes(ledger, x, [at])
    letters = list(range(x.ndim))
    sizes = {**dict(enumerate(index.shape)), x.ndim: x.shape[at]}
    return combine(ledger, [(x, [x.ndim if a == at else a for a in letters]), (index, letters)], letters, sizes)


# A window slides along an axis; its places become a new last axis.
@rule("unfold")
def _unfold(ledger: Ledger, x: Value, axis: int, size: int, step: int, shape: tuple[int, ...] = ()) -> Value:
    x = fix_axes(ledger, x, [x.axis(axis)])
    return Value(shape, x.factors, frozenset(a for a in x.flat if a != x.axis(axis)))
