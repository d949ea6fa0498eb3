"""How several values meet in one operation: letters name the axes they share, as in an einsum.

Along a letter of the result every operand is read at the same index; a letter that the result lacks is summed over. A reordering of one
operand along a letter must then be the reordering of all operands along it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from twofour.pruning.permutation.labels import Factor, Ints, Ledger, Value, pair, place


@dataclass
class Lettered:
    """A factor of an operand with its axes named; `held` letters keep their index."""

    owner: int
    letters: tuple[int, ...]
    atom: Ints
    tag: Ints
    held: frozenset[int] = frozenset()

    @property
    def free(self) -> frozenset[int]:
        return frozenset(self.letters) - self.held


def combine(ledger: Ledger, operands: Sequence[tuple[Value, Sequence[int]]], out: Sequence[int], sizes: dict[int, int]) -> Value:
    """The result of operands aligned by letters.

    Args:
        operands: each value with one letter an axis; an axis of size 1 under a larger letter is broadcast.
        out: letters of the result; the others are summed over.
        sizes: size of every letter.
    """
    factors: list[Lettered] = []
    varying: list[set[int]] = []  # letters along which an operand differs in a fixed order
    for owner, (value, letters) in enumerate(operands):
        mine: set[int] = set()
        for factor in value.factors:
            names = tuple(letters[a] for a in factor.axes)
            broadcast = [k for k, a in enumerate(factor.axes) if value.shape[a] == 1 and sizes[letters[a]] != 1]
            if broadcast or len(set(names)) != len(names):
                ledger.frozen.append((np.unique(factor.atom), ledger.operation))
                continue
            factors.append(Lettered(owner, names, factor.atom, factor.tag))
            mine |= set(names)
        varying.append({n for a, n in enumerate(letters) if value.shape[a] > 1 and a not in value.flat and n not in mine})
    kept = set(out)
    _hold(ledger, factors, kept)
    principals = [_settle(ledger, group, operands, varying, sizes) for group in _groups(factors)]
    results: list[Factor] = []
    used: set[int] = set()
    for lead in principals:
        if lead is None or not set(lead.letters) <= kept or not lead.free:
            continue
        if used & set(lead.letters):
            ledger.frozen.append((np.unique(lead.atom), ledger.operation))
            continue
        used |= set(lead.letters)
        results.append(_to_axes(lead, out))
    flat = frozenset(k for k, n in enumerate(out) if n not in used and not any(n in v for v in varying) and not _described(factors, n))
    return Value(tuple(sizes[n] for n in out), tuple(results), flat)


def _described(factors: Sequence[Lettered], letter: int) -> bool:
    return any(letter in f.letters for f in factors)


def _hold(ledger: Ledger, factors: list[Lettered], kept: set[int]) -> None:
    """Hold letters until, in every group of overlapping factors, one factor spans the others and no summed letter meets a kept one."""
    changed = True
    while changed:
        changed = False
        for group in _groups(factors):
            free = frozenset().union(*(f.free for f in group))
            stop: frozenset[int] = frozenset()
            beside_summed = frozenset().union(*(f.free & kept for f in group if f.free - kept))
            if beside_summed:
                stop = beside_summed
            elif not any(f.free == free for f in group):
                overlaps = [a.free & b.free for a in group for b in group if a is not b and a.free & b.free and not _nested(a, b)]
                stop = overlaps[0] if overlaps else frozenset()
            for factor in group:
                if factor.free & stop:
                    factor.held |= factor.free & stop
                    inner = [k for k, n in enumerate(factor.letters) if n in factor.held]
                    ledger.site(factor.atom, pair(factor.tag, place(factor.atom.shape, inner)))
                    changed = True
    factors[:] = [f for f in factors if f.free]


def _nested(a: Lettered, b: Lettered) -> bool:
    return a.free <= b.free or b.free <= a.free


def _groups(factors: Sequence[Lettered]) -> list[list[Lettered]]:
    groups: list[list[Lettered]] = []
    for factor in factors:
        touching = [g for g in groups if any(f.free & factor.free for f in g)]
        merged = [f for g in touching for f in g] + [factor]
        groups = [g for g in groups if not any(g is t for t in touching)] + [merged]
    return groups


def _settle(
    ledger: Ledger,
    group: list[Lettered],
    operands: Sequence[tuple[Value, Sequence[int]]],
    varying: Sequence[set[int]],
    sizes: dict[int, int],
) -> Lettered | None:
    """Tie the factors of a group to the one that spans them; None when a fixed operand holds every place."""
    lead = max(group, key=lambda f: (len(f.free), len(f.letters)))
    owners = {lead.owner}
    for other in group:
        if other is lead:
            continue
        owners.add(other.owner)
        letters = sorted(set(lead.letters) | set(other.letters))
        shape = [sizes[n] for n in letters]
        apart = [k for k, n in enumerate(letters) if n in lead.held | other.held or n not in lead.letters or n not in other.letters]
        (a, ta), (b, tb) = _over(lead, letters, sizes), _over(other, letters, sizes)
        if not (np.array_equal(a, b) and np.array_equal(ta, tb)):
            ledger.tie(np.broadcast_to(a, shape), np.broadcast_to(b, shape), pair(ta, tb, place(shape, apart)))
    for letters_fixed in varying:
        fixed = letters_fixed & lead.free
        if fixed == lead.free:
            for factor in group:
                ledger.frozen.append((np.unique(factor.atom), ledger.operation))
            return None
        if fixed:
            inner = [k for k, n in enumerate(lead.letters) if n in fixed]
            ledger.site(lead.atom, pair(lead.tag, place(lead.atom.shape, inner)))
    return lead


def _over(factor: Lettered, letters: Sequence[int], sizes: dict[int, int]) -> tuple[Ints, Ints]:
    """Atom and tag with one axis for each of `letters`, broadcastable to their sizes."""
    order = np.argsort([letters.index(n) for n in factor.letters])
    shape = [sizes[n] if n in factor.letters else 1 for n in letters]
    return factor.atom.transpose(order).reshape(shape), factor.tag.transpose(order).reshape(shape)


def _to_axes(factor: Lettered, out: Sequence[int]) -> Factor:
    axes = [list(out).index(n) for n in factor.letters]
    order = np.argsort(axes)
    return Factor(tuple(sorted(axes)), factor.atom.transpose(order), factor.tag.transpose(order))


def elementwise(ledger: Ledger, operands: Sequence[Value], shape: Sequence[int] | None = None) -> Value:
    """The result of broadcasting operands against each other, aligned from the last axis."""
    target = tuple(shape) if shape is not None else tuple(np.broadcast_shapes(*(v.shape for v in operands)))
    letters = list(range(len(target)))
    sizes = dict(enumerate(target))
    aligned = [(v, letters[len(target) - v.ndim :]) for v in operands]
    result = combine(ledger, aligned, letters, sizes)
    return replace(result, shape=target)


def along(ledger: Ledger, value: Value, axis: int, *vectors: Value | None) -> Value:
    """`value` combined elementwise with one-dimensional parameters along one axis (scales, shifts, running statistics)."""
    letters = list(range(value.ndim))
    operands: list[tuple[Value, Sequence[int]]] = [(value, letters)]
    operands += [(v, [value.axis(axis)]) for v in vectors if v is not None]
    return combine(ledger, operands, letters, dict(enumerate(value.shape)))
