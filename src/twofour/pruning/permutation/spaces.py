"""From a ledger of promises to the channels that may trade places.

A *channel* is a set of atoms that ties force to move together. Two channels may trade places when they stand in the same sites with the
same keys and in the same columns of the same ties with the same keys. Every permutation of channels among such equals keeps every promise:
sites map onto themselves because equals stand in the same ones; a tie's rows map onto rows because a channel holds at most one row for
each tie and key, so the partner of the image is the image of the partner. Channels that break one of the conditions stay.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from twofour.pruning.permutation.labels import FIXED, Ints, Ledger

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Orbit:
    """Channels that may trade places: `atoms[channel, role]`, channels in the order of their first atom."""

    atoms: Ints

    @property
    def size(self) -> int:
        return len(self.atoms)


@dataclass
class Spaces:
    """All orbits of a model, and why the other atoms stay."""

    orbits: list[Orbit]
    channel_of: Ints
    reason_of: dict[int, str]

    def reason(self, atoms: Ints) -> str | None:
        """Why the channels of `atoms` stay, by the commonest cause; None when some of them move."""
        counts: dict[str, int] = {}
        for channel in self.channel_of[atoms].tolist():
            if channel in self.reason_of:
                counts[self.reason_of[channel]] = counts.get(self.reason_of[channel], 0) + 1
        return max(counts, key=lambda r: counts[r]) if counts else None


def _mix(x: Words) -> Words:
    """Source: Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators, figure 14 (the finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _digest(place: int, column: int, key: Ints) -> Words:
    """128 bits, as two columns, of (place, column, key)."""
    base = np.array([2 * place + 1, 2 * place + 2], np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(column * 0x632BE5AB)
    return _mix(_mix(key.astype(np.uint64)[:, None] + np.uint64(0x51A3)) ^ _mix(base)[None, :])


def _duplicates(*columns: Ints) -> npt.NDArray[np.bool_]:
    """Which rows stand more than once."""
    rows = np.stack(columns, axis=1)
    order = np.lexsort(rows.T[::-1])
    same = (rows[order][1:] == rows[order][:-1]).all(axis=1)
    twice = np.zeros(len(rows), bool)
    twice[order[1:][same]] = True
    twice[order[:-1][same]] = True
    return twice


def derive(ledger: Ledger) -> Spaces:
    """The orbits that keep every promise of the ledger."""
    n = ledger.num_atoms
    if ledger.ties:
        left, right = np.concatenate([t[0] for t in ledger.ties]), np.concatenate([t[1] for t in ledger.ties])
    else:
        left = right = np.zeros(0, np.int64)
    links = coo_matrix((np.ones(len(left), bool), (left, right)), shape=(n, n))
    channel_of = connected_components(links, directed=False)[1].astype(np.int64)
    reason_of: dict[int, str] = {}

    def stay(atoms: Ints, reason: str) -> None:
        for channel in np.unique(channel_of[atoms]).tolist():
            reason_of.setdefault(channel, reason)

    stay(np.array([FIXED]), "a value in a fixed order")
    for atoms, operation in ledger.frozen:
        stay(atoms, operation)
    signature = np.zeros((n, 2), np.uint64)
    with np.errstate(over="ignore"):
        _sign_sites(ledger, signature, stay)
        _sign_ties(ledger, signature, channel_of, stay)
        orbits = _orbits(ledger, signature, channel_of, reason_of)
    return Spaces(orbits, channel_of, reason_of)


def _sign_sites(ledger: Ledger, signature: Words, stay: object) -> None:
    assert callable(stay)
    for number, (atom, key, operation) in enumerate(ledger.sites):
        moving = atom != FIXED
        twice = _duplicates(atom[moving], key[moving])
        if twice.any():
            stay(atom[moving][twice], f"{operation}: holds a channel twice")
        np.add.at(signature, atom, _digest(2 * number, 0, key))


def _sign_ties(ledger: Ledger, signature: Words, channel_of: Ints, stay: object) -> None:
    assert callable(stay)
    for number, (left, right, key, operation) in enumerate(ledger.ties):
        rows = np.unique(np.stack([left, right, key], axis=1), axis=0)
        left, right, key = rows.T
        twice = _duplicates(channel_of[left], key)
        if twice.any():
            stay(left[twice], f"{operation}: ties a channel to another of its own kind")
        np.add.at(signature, left, _digest(2 * number + 1, 1, key))
        np.add.at(signature, right, _digest(2 * number + 1, 2, key))


def _orbits(ledger: Ledger, signature: Words, channel_of: Ints, reason_of: dict[int, str]) -> list[Orbit]:
    n = ledger.num_atoms
    # Atoms by channel, and within a channel by signature: the role of an atom is its rank.
    order = np.lexsort((signature[:, 1], signature[:, 0], channel_of))
    sorted_channels, sorted_signatures = channel_of[order], signature[order]
    same_role = (sorted_channels[1:] == sorted_channels[:-1]) & (sorted_signatures[1:] == sorted_signatures[:-1]).all(axis=1)
    for channel in np.unique(sorted_channels[1:][same_role]).tolist():
        reason_of.setdefault(channel, "two places of a channel cannot be told apart")
    num_channels = int(channel_of.max()) + 1
    of_channel = np.zeros((num_channels, 2), np.uint64)
    np.add.at(of_channel, channel_of, _mix(signature ^ np.uint64(0xA5A5A5A5)))
    starts = np.searchsorted(sorted_channels, np.arange(num_channels + 1))
    first_atom = np.full(num_channels, n, np.int64)
    np.minimum.at(first_atom, channel_of, np.arange(n))
    free = np.ones(num_channels, bool)
    free[list(reason_of)] = False
    candidates = np.flatnonzero(free)
    if not len(candidates):
        return []
    groups = np.unique(of_channel[candidates], axis=0, return_inverse=True)[1].ravel()
    orbits = []
    for members in np.split(candidates[np.argsort(groups, kind="stable")], np.cumsum(np.bincount(groups))[:-1]):
        if len(members) < 2:
            reason_of.setdefault(int(members[0]), "no other channel stands in the same places")
            continue
        members = members[np.argsort(first_atom[members])]
        orbits.append(Orbit(np.stack([order[starts[c] : starts[c + 1]] for c in members]).astype(np.int64)))
    return sorted(orbits, key=lambda o: int(o.atoms.min()))
