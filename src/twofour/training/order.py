"""Optimizer state and reordered channels: momentum made before a permutation belongs to other weights after it."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pruning.permutation import carried

# Parameter name -> axis -> the old index of every new place.
Orders = Mapping[str, Mapping[int, Any]]
# The group's key that says which reordering its state follows; it travels with the optimizer's state_dict.
KEY = "twofour_order"


def carried_orders(model: nn.Module) -> Orders:
    """Return the reordering that `model` says it went through, empty if none."""
    permutation = carried(model)
    return permutation.moves if permutation is not None else {}


def digest(orders: Orders) -> str:
    """Return 16 hex digits that identify the reordering."""
    sha = hashlib.sha256()
    for name in sorted(orders):
        for axis in sorted(orders[name]):
            sha.update(f"{name}\0{axis}\0".encode() + np.ascontiguousarray(orders[name][axis], np.int64).tobytes())
    return sha.hexdigest()[:16]


def reordered(model: nn.Module, optimizer: torch.optim.Optimizer, orders: Orders) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return (group, name, parameter) of every reordered parameter that the optimizer steps."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [(g, names[id(p)], p) for g in optimizer.param_groups for p in g["params"] if names.get(id(p)) in orders]


def refuse_older_state(model: nn.Module, optimizer: torch.optim.Optimizer, orders: Orders) -> list[Any]:
    """Mark the optimizer as following `orders`, watch what it loads, and return the hooks' handles.

    Raises:
        InputError: it holds state of a reordered parameter that was not made in, or permuted into, the new order.
    """
    if not orders:
        return []
    mark = digest(orders)

    def check(_: torch.optim.Optimizer | None = None) -> None:
        for group, name, parameter in reordered(model, optimizer, orders):
            if optimizer.state.get(parameter) and group.get(KEY) != mark:
                raise InputError(
                    f"hold: the optimizer's state of {name!r} is older than the reordering of its channels, expected the new order; "
                    "make the optimizer after pruning, call twofour.training.permute_state first, or pass orders={} if it is new after all"
                )

    check()
    for group in optimizer.param_groups:
        group[KEY] = mark
    return [optimizer.register_load_state_dict_post_hook(check)]


@torch.no_grad()
def permute_state(model: nn.Module, optimizer: torch.optim.Optimizer, orders: Orders) -> int:
    """Bring the optimizer's state, made before the channels were reordered, into the new order; return the number of tensors moved.

    new[i] = old[order[i]] along each reordered axis, for every state tensor of the parameter's shape (momentum, moments). Call it once.

    Raises:
        InputError: the state already follows this reordering, or a state tensor has another shape than its parameter.
    """
    mark, count = digest(orders), 0
    pairs = reordered(model, optimizer, orders)
    for group, name, _ in pairs:
        if group.get(KEY) == mark:
            raise InputError(f"permute_state: the state of {name!r} follows this reordering already, expected older state; call it once")
    moved: list[tuple[dict[str, Any], str, Tensor]] = []
    for _, name, parameter in pairs:
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                continue
            if value.shape != parameter.shape:
                raise InputError(
                    f"permute_state: {key!r} of {name!r} has shape {list(value.shape)}, its parameter {list(parameter.shape)}; "
                    "make the optimizer anew"
                )
            for axis, order in orders[name].items():
                value = value.index_select(axis, torch.as_tensor(np.asarray(order), device=value.device))
            moved.append((state, key, value))
    for state, key, value in moved:
        state[key] = value
        count += 1
    for group in optimizer.param_groups:
        group[KEY] = mark
    return count
