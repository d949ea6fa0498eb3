"""From orbits to matrices: for each set of channels that may trade places, all weights that read them, as columns to be grouped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from twofour.pruning.permutation.analysis import Held
from twofour.pruning.permutation.apply import Moves, moved
from twofour.pruning.permutation.kernels import Floats
from twofour.pruning.permutation.labels import Ints
from twofour.pruning.permutation.spaces import Orbit

# Above this many elements every k-th row is judged instead of all.
MOST_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class View:
    """One weight seen from an orbit: the place along the reduction axis that each channel takes, in one role."""

    name: str
    axis: int
    places: Ints


@dataclass(frozen=True)
class Problem:
    """Channels of an orbit in the order of their groups of four, and the views whose groups they form.

    Attributes:
        slots: channel numbers of the orbit, four to a group.
        views: the weights judged in the search.
        exact: whether the search judges all that changes; otherwise the result is compared afterwards.
    """

    orbit: Orbit
    slots: Ints
    views: tuple[View, ...]
    touched: tuple[tuple[str, int], ...]
    exact: bool


def views_of(orbits: Sequence[Orbit], held: Sequence[Held], targets: Mapping[str, int]) -> list[list[View]]:
    """For every orbit, the views of the weights in `targets` (name -> reduction axis)."""
    size = 1 + max((int(a.max()) for h in held for a in h.atoms if a.size), default=0)
    size = max(size, 1 + max((int(o.atoms.max()) for o in orbits), default=0))
    orbit_of, channel_of, role_of = (np.full(size, -1, np.int64) for _ in range(3))
    for number, orbit in enumerate(orbits):
        orbit_of[orbit.atoms] = number
        channel_of[orbit.atoms] = np.arange(orbit.size)[:, None]
        role_of[orbit.atoms] = np.arange(orbit.atoms.shape[1])[None]
    views: list[list[View]] = [[] for _ in orbits]
    for h in held:
        name = next((n for n in h.names if n in targets), None)
        if name is None:
            continue
        atoms = h.atoms[targets[name]]
        if not atoms.size:
            continue
        for number in np.unique(orbit_of[atoms]).tolist():
            if number < 0:
                continue
            places = np.flatnonzero(orbit_of[atoms] == number)
            for role in np.unique(role_of[atoms[places]]).tolist():
                of_role = places[role_of[atoms[places]] == role]
                by_channel = np.empty(orbits[number].size, np.int64)
                by_channel[channel_of[atoms[of_role]]] = of_role
                views[number].append(View(h.names[0], targets[name], by_channel))
    return views


def _groups(view: View) -> Ints:
    """For each channel the first channel of its group of four, -1 where the group holds places of others."""
    group = view.places // 4
    order = np.argsort(view.places)
    labels = np.full(len(group), -1, np.int64)
    _, starts, counts = np.unique(group[order], return_index=True, return_counts=True)
    for start in starts[counts == 4].tolist():
        members = order[start : start + 4]
        labels[members] = members.min()
    return labels


def problem_of(orbit: Orbit, views: Sequence[View], tensors: Mapping[str, torch.Tensor]) -> Problem | None:
    """The search problem of an orbit, or None where no weight that counts has whole groups in it."""
    patterns: dict[bytes, list[View]] = {}
    for view in views:
        patterns.setdefault(_groups(view).tobytes(), []).append(view)
    usable = {p: v for p, v in patterns.items() if (np.frombuffer(p, np.int64) >= 0).sum() >= 8}
    if not usable:
        return None
    chosen = max(usable, key=lambda p: sum(tensors[v.name].numel() for v in usable[p]))
    labels = np.frombuffer(chosen, np.int64)
    lead = usable[chosen][0]
    inside = np.flatnonzero(labels >= 0)
    slots = inside[np.argsort(lead.places[inside])]
    touched = tuple(dict.fromkeys((v.name, v.axis) for v in views))
    exact = len(patterns) == 1 and len(inside) == orbit.size and _elements(usable[chosen], len(slots), tensors) <= MOST_ELEMENTS
    return Problem(orbit, slots, tuple(usable[chosen]), touched, exact)


def _elements(views: Sequence[View], slots: int, tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(tensors[v.name].numel() // tensors[v.name].shape[v.axis] for v in views) * slots


def columns_of(problem: Problem, tensors: Mapping[str, torch.Tensor]) -> Floats:
    """Magnitudes of all views, float32 `[slots, rows]`."""
    stride = max(1, -(-_elements(problem.views, len(problem.slots), tensors) // MOST_ELEMENTS))
    parts = []
    for view in problem.views:
        tensor = tensors[view.name].detach()
        flat = tensor.movedim(view.axis, 0).reshape(tensor.shape[view.axis], -1)
        by = torch.from_numpy(view.places[problem.slots]).to(tensor.device)
        parts.append(flat[by][:, ::stride].abs().float().cpu())
    columns: Floats = torch.cat(parts, 1).contiguous().numpy()
    return columns


def source_of(problem: Problem, order: Ints) -> Ints:
    """The permutation of the whole orbit that the order of a problem's slots stands for."""
    source = np.arange(problem.orbit.size, dtype=np.int64)
    source[problem.slots] = problem.slots[order]
    return source


def kept_magnitude(weight: torch.Tensor, axis: int) -> tuple[float, float]:
    """Sum of the two largest magnitudes of every four along `axis`, and of all magnitudes, in float64."""
    magnitude = weight.detach().abs().movedim(axis, -1)
    magnitude = (magnitude if magnitude.dtype == torch.float64 else magnitude.float()).reshape(-1, 4)
    a, b, c, d = magnitude.unbind(1)
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    other, small = torch.maximum(c, d), torch.minimum(c, d)
    first = torch.maximum(high, other)
    second = torch.maximum(torch.minimum(high, other), torch.maximum(low, small))
    kept = first.sum(dtype=torch.float64) + second.sum(dtype=torch.float64)
    return float(kept), float(magnitude.sum(dtype=torch.float64))


def kept_by(tensors: Mapping[str, torch.Tensor], touched: Sequence[tuple[str, int]], moves: Moves) -> float:
    """Magnitude the touched weights keep after `moves`."""
    return sum(kept_magnitude(moved(tensors[name].detach(), moves.get(name, {})), axis)[0] for name, axis in touched)
