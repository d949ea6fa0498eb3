"""Which channel stands at every place of a value, and what a reordering must respect.

Every place along every axis of a parameter or buffer is an *atom*. A value of the network is described by factors: a factor says, for one
axis or a joint set of axes, which atom stands at each place and with which *tag* (a tag tells apart several places that hold the same
atom, as the pixels of a channel do after flattening). Axes without a factor keep their order for ever.

A reordering is a permutation s of atoms. A value described by (atom, tag) then holds, at the place of (a, t), what was at the place of
(s(a), t). That is possible, and every operation computes the same function, when two kinds of promise are kept:

- a *site* (atom, key): s maps the site's elements onto itself and keeps the keys;
- a *tie* (atom, atom, key): s maps every row of the tie to a row of it and keeps the keys.

The rules of the operations write such promises into a ledger; `spaces` derives from the ledger which reorderings keep them all.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# The atom of every place that may not move; its places are told apart by tags.
FIXED = 0


@dataclass(frozen=True)
class Factor:
    """Atoms and tags of the places along `axes` (ascending); both arrays have the shape of these axes."""

    axes: tuple[int, ...]
    atom: Ints
    tag: Ints


@dataclass(frozen=True)
class Value:
    """A tensor of the network: its shape, its factors, and the axes along which all its elements are equal."""

    shape: tuple[int, ...]
    factors: tuple[Factor, ...] = ()
    flat: frozenset[int] = frozenset()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def axis(self, axis: int) -> int:
        """The non-negative form of `axis`."""
        return axis % max(self.ndim, 1)

    def touching(self, axes: Iterable[int]) -> list[Factor]:
        """Factors that describe any of `axes`."""
        wanted = set(axes)
        return [f for f in self.factors if wanted & set(f.axes)]

    def labelled(self) -> set[int]:
        return {a for f in self.factors for a in f.axes}


@dataclass
class Ledger:
    """The promises collected from every capture, each with the operation that asked for it."""

    num_atoms: int = 1
    operation: str = "the start"
    sites: list[tuple[Ints, Ints, str]] = field(default_factory=list)
    ties: list[tuple[Ints, Ints, Ints, str]] = field(default_factory=list)
    frozen: list[tuple[Ints, str]] = field(default_factory=list)
    _seen: set[tuple[bytes, bytes, bytes]] = field(default_factory=set)

    def atoms(self, count: int) -> Ints:
        """New atoms, in order."""
        first = self.num_atoms
        self.num_atoms += count
        return np.arange(first, first + count, dtype=np.int64)

    def site(self, atom: Ints, key: Ints) -> None:
        """Promise that the set of (atom, key) maps onto itself."""
        atom, key = np.ascontiguousarray(atom).ravel(), np.ascontiguousarray(key).ravel()
        mark = (atom.tobytes(), key.tobytes(), b"")
        if mark not in self._seen:
            self._seen.add(mark)
            self.sites.append((atom, key, self.operation))

    def tie(self, left: Ints, right: Ints, key: Ints) -> None:
        """Promise that the set of rows (left, right, key) maps onto itself."""
        left, right, key = (np.ascontiguousarray(a).ravel() for a in (left, right, key))
        mark = (left.tobytes(), right.tobytes(), key.tobytes())
        if mark not in self._seen:
            self._seen.add(mark)
            self.ties.append((left, right, key, self.operation))

    def freeze(self, value: Value, axes: Iterable[int] | None = None) -> None:
        """Promise that every place of the factors on `axes` (all of them by default) stays."""
        for factor in value.factors if axes is None else value.touching(axes):
            self.frozen.append((np.unique(factor.atom), self.operation))

    def register(self, value: Value) -> None:
        """Promise that the value can be reordered at all: each of its factors is a site."""
        for factor in value.factors:
            self.site(factor.atom, factor.tag)


def pair(*keys: Ints) -> Ints:
    """Integers that are equal exactly where all of the broadcast `keys` are."""
    shape = np.broadcast_shapes(*(k.shape for k in keys))
    combined = np.zeros(shape, np.int64)
    for key in keys:
        key = np.broadcast_to(key, shape)
        if not key.size or key.min() == key.max():
            continue
        base = int(key.max()) + 1
        if int(combined.max()) >= (1 << 62) // base:
            combined = np.unique(combined, return_inverse=True)[1].reshape(shape)
        combined = combined * base + key
    if combined.size and int(combined.max()) > (1 << 31):
        combined = np.unique(combined, return_inverse=True)[1].reshape(shape)
    return combined


def place(sizes: Sequence[int], axes: Iterable[int]) -> Ints:
    """The index of every place of a grid of `sizes` along `axes` only, as one integer."""
    chosen = set(axes)
    index = np.zeros((1,) * len(sizes), np.int64)
    for axis, size in enumerate(sizes):
        if axis in chosen:
            steps = np.arange(size, dtype=np.int64).reshape([-1 if k == axis else 1 for k in range(len(sizes))])
            index = index * size + steps
    return np.broadcast_to(index, tuple(sizes))


def without(value: Value, gone: Iterable[Factor]) -> Value:
    dropped = {id(f) for f in gone}
    return replace(value, factors=tuple(f for f in value.factors if id(f) not in dropped))


def simplify(factor: Factor) -> Factor | None:
    """Drop the axes along which the factor says nothing: the same atoms at every step, each step with tags of its own."""
    axes, atom, tag = list(factor.axes), factor.atom, factor.tag
    k = 0
    while k < len(axes):
        if len(axes) > 1 or atom.shape[k] == 1:
            first = np.take(atom, [0], axis=k)
            if (atom == first).all() and _tags_tell(tag, k):
                atom, tag = np.take(atom, 0, axis=k), np.take(tag, 0, axis=k)
                del axes[k]
                continue
        k += 1
    if not axes:
        return None
    if (atom == FIXED).all():
        return None
    return Factor(tuple(axes), atom, tag)


def _tags_tell(tag: Ints, axis: int) -> bool:
    """Whether the tag names the step along `axis`, and all steps tag the other axes alike."""
    steps = np.moveaxis(tag, axis, 0).reshape(tag.shape[axis], -1)
    if steps.shape[0] == 1:
        return True
    if (steps == steps[:, :1]).all():
        return bool(np.unique(steps[:, 0]).size == steps.shape[0])
    pattern = None
    seen: set[int] = set()
    for row in steps:
        values, first, inverse = np.unique(row, return_index=True, return_inverse=True)
        ranks = np.argsort(np.argsort(first))[inverse.ravel()]
        if pattern is None:
            pattern = ranks
        elif not (ranks == pattern).all():
            return False
        own = set(values.tolist())
        if own & seen:
            return False
        seen |= own
    return True


def pin(ledger: Ledger, factor: Factor, axes: Iterable[int]) -> None:
    """Promise that places of the factor keep their index along `axes` (axes of the value)."""
    inner = [factor.axes.index(a) for a in axes if a in factor.axes]
    if inner:
        ledger.site(factor.atom, pair(factor.tag, place(factor.atom.shape, inner)))


def fix_axes(ledger: Ledger, value: Value, axes: Iterable[int]) -> Value:
    """The value with no order along `axes`: factors of only these freeze, joint ones move alike at every step along them."""
    stop = set(axes)
    factors: list[Factor] = []
    for factor in value.factors:
        inside = [k for k, a in enumerate(factor.axes) if a in stop]
        if not inside:
            factors.append(factor)
        elif len(inside) == len(factor.axes):
            ledger.frozen.append((np.unique(factor.atom), ledger.operation))
        else:
            start = tuple(slice(0, 1) if k in inside else slice(None) for k in range(len(factor.axes)))
            atom = np.broadcast_to(factor.atom[start], factor.atom.shape)
            tag = np.broadcast_to(factor.tag[start], factor.atom.shape)
            ledger.tie(atom, factor.atom, pair(tag, factor.tag, place(factor.atom.shape, inside)))
            squeezed = tuple(0 if k in inside else slice(None) for k in range(len(factor.axes)))
            left = tuple(a for a in factor.axes if a not in stop)
            factors.append(Factor(left, factor.atom[squeezed], factor.tag[squeezed]))
    return replace(value, factors=tuple(factors))


def within(ledger: Ledger, value: Value, axes: Iterable[int]) -> None:
    """An operation mixes the places along `axes` in a way that ignores their order: they stay within each step of the other axes."""
    mixed = set(axes)
    for factor in value.touching(mixed):
        pin(ledger, factor, [a for a in factor.axes if a not in mixed])


def reshape(ledger: Ledger, value: Value, shape: Sequence[int]) -> Value:
    """The value seen in row-major order under a new shape; also numbers every place where a described axis merges with another."""
    new = tuple(int(s) for s in shape)
    if new == value.shape:
        return value
    segments = _segments(value.shape, new)
    if segments is None:
        ledger.freeze(value)
        return Value(new)
    flat = frozenset(
        n for old_axes, new_axes in segments if all(o in value.flat or value.shape[o] == 1 for o in old_axes) for n in new_axes
    )
    result = Value(new, (), flat)
    # Segments that one factor spans are reshaped together; factors that meet in a segment cannot both stay.
    segment_of = {o: k for k, (old_axes, _) in enumerate(segments) for o in old_axes}
    taken: set[int] = set()
    factors: list[Factor] = []
    for factor in sorted(value.factors, key=lambda f: -f.atom.size):
        spanned = sorted({segment_of[a] for a in factor.axes})
        if taken & set(spanned):
            ledger.frozen.append((np.unique(factor.atom), ledger.operation))
            continue
        taken |= set(spanned)
        old_axes = [o for k in spanned for o in segments[k][0]]
        new_axes = [n for k in spanned for n in segments[k][1]]
        atom, tag = _spread(factor, old_axes, value.shape)
        sizes = [new[n] for n in new_axes]
        reshaped = simplify(Factor(tuple(new_axes), atom.reshape(sizes), tag.reshape(sizes)))
        if reshaped is not None:
            factors.append(reshaped)
    return replace(result, factors=tuple(factors))


def _spread(factor: Factor, axes: Sequence[int], sizes: Sequence[int]) -> tuple[Ints, Ints]:
    """Atom and tag of a factor over a larger, ascending set of axes; the further axes are numbered in the tag."""
    shape = [sizes[a] for a in axes]
    view = [sizes[a] if a in factor.axes else 1 for a in axes]
    other = [k for k, a in enumerate(axes) if a not in factor.axes]
    atom = np.broadcast_to(factor.atom.reshape(view), shape)
    tag = pair(np.broadcast_to(factor.tag.reshape(view), shape), place(shape, other))
    return np.ascontiguousarray(atom), tag


def _segments(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """Matching runs of axes with equal products, as short as possible; None for empty tensors."""
    if any(s == 0 for s in (*old, *new)):
        return None
    segments: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        olds: list[int] = []
        news: list[int] = []
        left = right = 1
        while True:
            if left == right and (olds or news):
                break
            if left <= right and i < len(old) and (left < right or not olds):
                left *= old[i]
                olds.append(i)
                i += 1
            elif j < len(new):
                right *= new[j]
                news.append(j)
                j += 1
            elif i < len(old):
                left *= old[i]
                olds.append(i)
                i += 1
            else:
                return None
        segments.append((olds, news))
    return segments
