"""Rules of the operations that move elements: views, slices, joins, look-ups."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from twofour.pruning.permutation.align import combine, elementwise
from twofour.pruning.permutation.labels import FIXED, Factor, Ledger, Value, fix_axes, pair, place, reshape
from twofour.pruning.permutation.table import axes_of, constant, rule, values_of


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
    gone = {a for a in axes_of(x, axes) if x.shape[a] == 1}
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
            f = Factor(axes, np.asarray(f.atom.take(0, axis=k)), np.asarray(f.tag.take(0, axis=k)))
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
        sides = [constant([w if a == axis else s for a, s in enumerate(x.shape)]) for w in (before, after) if w > 0]
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
    for i in values_of(indices):
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


# y[n, (g, s), h, w] = x[n, (s, g), h, w]
@rule("channel_shuffle")
def _channel_shuffle(ledger: Ledger, x: Value, groups: int, shape: tuple[int, ...] = ()) -> Value:
    split = reshape(ledger, x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    return reshape(ledger, _transpose(ledger, split, 1, 2), shape)


# y[..., i] = a[..., i] sigmoid(b[..., i]) with x = [a, b]
@rule("glu")
def _glu(ledger: Ledger, x: Value, axis: int = -1) -> Value:
    halves = _split(ledger, x, x.shape[x.axis(axis)] // 2, axis)
    return elementwise(ledger, halves)
