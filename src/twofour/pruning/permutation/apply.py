"""Moves tensors into a new channel order and back."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from twofour.errors import InputError
from twofour.pruning.permutation.analysis import Held
from twofour.pruning.permutation.labels import Ints
from twofour.pruning.permutation.spaces import Orbit

# Tensor name -> for each reordered axis, the old index of every new place.
Moves = dict[str, dict[int, Ints]]


@dataclass(frozen=True)
class Reordering:
    """A permutation of one orbit: the channel that comes to each place."""

    orbit: Orbit
    source: Ints


def atom_order(num_atoms: int, reorderings: Iterable[Reordering]) -> Ints:
    """For every atom, the atom whose content comes to its place."""
    order = np.arange(num_atoms, dtype=np.int64)
    for r in reorderings:
        order[r.orbit.atoms] = r.orbit.atoms[r.source]
    return order


def moves_of(held: Iterable[Held], order: Ints) -> Moves:
    """The reordered axes of every parameter and buffer, under its first name."""
    moves: Moves = {}
    for h in held:
        for axis, atoms in enumerate(h.atoms):
            if atoms.size and (order[atoms] != atoms).any():
                moves.setdefault(h.names[0], {})[axis] = order[atoms] - atoms[0]
    return moves


def moved(tensor: torch.Tensor, axes: Mapping[int, Ints], *, name: str = "tensor", back: bool = False) -> torch.Tensor:
    """A copy of `tensor` in the new order, or with `back` in the old one.

    Raises:
        InputError: the tensor does not have the axes or sizes of the reordering.
    """
    for axis, index in axes.items():
        if tensor.ndim <= axis or tensor.shape[axis] != len(index):
            raise InputError(
                f"{name} has shape {list(tensor.shape)}, expected {len(index)} elements along axis {axis} as in the permutation; "
                "use a checkpoint of the model that was permuted"
            )
        by = torch.from_numpy(np.argsort(index) if back else index).to(tensor.device)
        tensor = tensor.index_select(axis, by)
    return tensor


def apply_(tensors: Mapping[str, torch.Tensor], moves: Moves) -> None:
    """Reorder the named tensors in place; those that are the same object under several names are listed once in `moves`."""
    with torch.no_grad():
        for name, axes in moves.items():
            tensor = tensors[name]
            tensor.data.copy_(moved(tensor.data, axes, name=name))
            if tensor.grad is not None:
                tensor.grad.data.copy_(moved(tensor.grad.data, axes, name=f"the gradient of {name}"))
