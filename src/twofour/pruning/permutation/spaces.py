"""From a ledger of promises to the channels that may trade places.

A *channel* is a set of atoms that ties force to move together. Every atom gets a signature: the sites it stands in with their keys, the
tie rows it stands in with their columns and keys, and then, in rounds, the signatures of its partners in those rows. Channels whose atoms
all have different signatures, and the same ones, may trade places, each atom going to the one of equal signature. That keeps every
promise: equals stand in the same sites with the same keys, so sites map onto themselves; the image of an atom stands in a row of the same
tie and key with a partner that had, a round earlier, the signature of the image of the partner, and there is only one such atom in the
channel, so rows map onto rows. Channels whose atoms cannot be told apart stay.

Source: the rounds are the colour refinement of Weisfeiler and Leman 1968.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from twofour.pruning.permutation.labels import FIXED, Ints, Ledger

Words = npt.NDArray[np.uint64]

# Rounds of refinement end when nothing is told apart any more, or here: partners at this distance still count.
MOST_ROUNDS = 40


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
    with np.errstate(over="ignore"):
        earlier = _sign_sites(ledger, stay)
        kinds = 0
        for _ in range(MOST_ROUNDS):
            before, signature = earlier, _refine(ledger, earlier)
            found = int(np.unique(signature[:, 0]).size)
            if found == kinds:
                break
            kinds, earlier = found, signature
        orbits = _orbits(before, signature, channel_of, reason_of)
    return Spaces(orbits, channel_of, reason_of)


def _sign_sites(ledger: Ledger, stay: Callable[[Ints, str], None]) -> Words:
    """Signatures by sites alone; atoms that stand twice in a site with one key stay."""
    signature = np.zeros((ledger.num_atoms, 2), np.uint64)
    for number, (atom, key, operation) in enumerate(ledger.sites):
        moving = atom != FIXED
        twice = _duplicates(atom[moving], key[moving])
        if twice.any():
            stay(atom[moving][twice], f"{operation}: holds a channel twice")
        np.add.at(signature, atom, _digest(2 * number, 0, key))
    return signature


def _refine(ledger: Ledger, signature: Words) -> Words:
    """Signatures that also tell the partners in every tie."""
    finer = _mix(signature ^ np.uint64(0x3C6EF372FE94F82B))
    for number, (left, right, key, _) in enumerate(ledger.ties):
        rows = np.unique(np.stack([left, right, key], axis=1), axis=0)
        left, right, key = rows.T
        np.add.at(finer, left, _mix(_digest(2 * number + 1, 1, key) ^ _mix(signature[right])))
        np.add.at(finer, right, _mix(_digest(2 * number + 1, 2, key) ^ _mix(signature[left])))
    return finer


def _told_apart(channel_of: Ints, signature: Words) -> Ints:
    """Channels in which two atoms have one signature."""
    order = np.lexsort((signature[:, 1], signature[:, 0], channel_of))
    channels, signatures = channel_of[order], signature[order]
    same = (channels[1:] == channels[:-1]) & (signatures[1:] == signatures[:-1]).all(axis=1)
    return np.unique(channels[1:][same])


def _orbits(before: Words, signature: Words, channel_of: Ints, reason_of: dict[int, str]) -> list[Orbit]:
    """Orbits by the signatures of the last round; those of the round before must tell the atoms of a channel apart."""
    n = len(channel_of)
    for channel in _told_apart(channel_of, before).tolist():
        reason_of.setdefault(channel, "two places of a channel cannot be told apart")
    # Atoms by channel, and within a channel by signature: the role of an atom is its rank.
    order = np.lexsort((signature[:, 1], signature[:, 0], channel_of))
    sorted_channels = channel_of[order]
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
