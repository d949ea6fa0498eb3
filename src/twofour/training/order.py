"""Optimizer state, averages and reordered channels: what was made before a permutation belongs to other weights after it."""

import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pruning.permutation import Permutation, carried
from twofour.pruning.permutation.apply import moved
from twofour.pruning.permutation.proof import tensors_of
from twofour.pruning.permutation.record import ORDER_KEY, carry, digest, names_and_shapes
from twofour.pruning.sharded import is_sharded, local
from twofour.training.wrapped import averaged_module, unwrap_model

log = logging.getLogger(__name__)

# Parameter name -> axis -> the old index of every new place.
Orders = Mapping[str, Mapping[int, Any]]


def carried_orders(model: nn.Module) -> Orders:
    """Return the reordering that `model` says it went through, empty if none."""
    permutation = carried(model)
    return permutation.moves if permutation is not None else {}


def reordered(model: nn.Module, optimizer: torch.optim.Optimizer, orders: Container[str]) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Return (group, name, parameter) of every reordered parameter that the optimizer steps."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [(g, names[id(p)], p) for g in optimizer.param_groups for p in g["params"] if names.get(id(p)) in orders]


def is_initial(state: Mapping[str, Any]) -> bool:
    """Whether an optimizer's state of one parameter is none, or says the same about every element and was not stepped.

    Some optimizers (Adagrad) fill their state as they are made; one value everywhere means the same in every order.
    """
    step = state.get("step")
    if step is not None and float(step):
        return False
    return all(_is_constant(value, step is not None) for value in state.values() if isinstance(value, Tensor))


def _is_constant(value: Tensor, never_stepped: bool) -> bool:
    # NOTE: one process sees its own piece only; without a step count the pieces could differ, and the processes must decide alike.
    if is_sharded(value) and not never_stepped:
        return False
    piece = local(value.detach()).flatten()
    return bool((piece == piece[:1]).all())


def refuse_older_state(model: nn.Module, optimizer: torch.optim.Optimizer, orders: Orders, recorded: str = "") -> list[Any]:
    """Mark the optimizer as following a reordering, watch what it loads, and return the hooks' handles.

    Args:
        orders: the reordering; empty where it is not known.
        recorded: its digest, of a pruning record, for where `orders` is empty: state of any parameter of the model is asked for the mark.

    Raises:
        InputError: it holds state of a reordered parameter that was not made in, or permuted into, the new order.
    """
    mark = digest(orders) if orders else recorded
    if not mark:
        return []
    names: Container[str] = orders or {name for name, _ in model.named_parameters()}

    def check(_: torch.optim.Optimizer | None = None) -> None:
        for group, name, parameter in reordered(model, optimizer, names):
            if group.get(ORDER_KEY) != mark and not is_initial(optimizer.state.get(parameter, {})):
                raise InputError(
                    f"hold: the optimizer's state of {name!r} is older than the reordering of its channels, expected the new order; "
                    "make the optimizer after pruning, call twofour.training.permute_state first, or pass orders={} if it is new after all"
                )

    check()
    for group in optimizer.param_groups:
        group[ORDER_KEY] = mark
    return [optimizer.register_load_state_dict_post_hook(check)]


@torch.no_grad()
def permute_state(model: nn.Module, optimizer: torch.optim.Optimizer, orders: Orders) -> int:
    """Bring the optimizer's state, made before the channels were reordered, into the new order; return the number of tensors moved.

    new[i] = old[order[i]] along each reordered axis, for every state tensor of the parameter's shape (momentum, moments). Call it once.

    Raises:
        InputError: the state already follows this or another reordering, or a state tensor has another shape than its parameter.
    """
    mark, count = digest(orders), 0
    pairs = reordered(model, optimizer, orders)
    for group, name, _ in pairs:
        if group.get(ORDER_KEY) == mark:
            raise InputError(f"permute_state: the state of {name!r} follows this reordering already, expected older state; call it once")
        if group.get(ORDER_KEY) is not None:
            raise InputError(
                f"permute_state: the state of {name!r} follows an earlier reordering, expected state from before all of them; "
                "make the optimizer anew, or reorder once"
            )
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
        group[ORDER_KEY] = mark
    return count


def accept_averages(model: nn.Module, averages: Sequence[nn.Module], orders: Orders) -> None:
    """Do nothing if every average stands in the order of `model`: it carries the same reordering, or is the model's exact copy.

    A copy that carries nothing (made by `load_state_dict`) carries the reordering from now on, so that it is known once it has moved on.

    Raises:
        InputError: an average carries no reordering, or another.
    """
    if not orders:
        return
    known = {digest(orders), digest(carried_orders(model))}
    copies = []
    for average in averages:
        own = carried_orders(average)
        if own and digest(own) in known:
            continue
        if own or not _equal(model, average, orders):
            raise InputError(
                f"hold: ema carries {'another' if own else 'no'} reordering of channels and the model was reordered "
                f"(first: {next(iter(orders))!r}), expected an average in the model's order; copy it from the model after pruning, "
                "call twofour.training.permute_average(model, ema) first if it was begun before, or pass orders={} if it follows after all"
            )
        copies.append(average)
    for average in copies:
        _carry(average, orders)


@torch.no_grad()
def permute_average(model: nn.Module, average: nn.Module, orders: Orders | None = None) -> int:
    """Bring an average of `model`, begun before its channels were reordered, into the new order; return the number of tensors moved.

    new[i] = old[order[i]] along each reordered axis of every weight and buffer; the average computes what it computed before, and carries
    the reordering, by which `hold` knows it.

    Args:
        average: `AveragedModel` or any module with the model's names.
        orders: the reordering, by default the one that `model` carries.

    Raises:
        InputError: the model carries no reordering, the average carries one already, or is of another model. Nothing is changed then.
    """
    model = unwrap_model(model)
    orders = carried_orders(model) if orders is None else orders
    if not orders:
        raise InputError("permute_average: the model carries no reordering of its channels, expected the model that was reordered")
    module = averaged_module(average, orders)
    if carried(module) is not None:
        raise InputError("permute_average: the average carries a reordering already, expected an older one; call it once")
    tensors = tensors_of(module)
    missing = [name for name in orders if name not in tensors]
    if missing:
        raise InputError(f"permute_average: the average has no tensor {missing[0]!r}, expected an average of this model")
    new = {name: moved(tensors[name].detach(), _arrays(axes), name=name) for name, axes in orders.items()}
    for name, value in new.items():
        tensors[name].detach().copy_(value)
    _carry(module, orders)
    log.info("permute_average: %d tensors of the average follow the model's new channel order", len(new))
    return len(new)


def _arrays(axes: Mapping[int, Any]) -> dict[int, Any]:
    return {axis: np.asarray(order, np.int64) for axis, order in axes.items()}


def _carry(average: nn.Module, orders: Orders) -> None:
    moves = {name: _arrays(axes) for name, axes in orders.items()}
    names, shapes = names_and_shapes(average, moves)
    carry(average, Permutation(moves=moves, names=names, shapes=shapes))


def _equal(model: nn.Module, average: nn.Module, orders: Orders) -> bool:
    """Whether every reordered tensor of the average is the model's, bit by bit."""
    ours, theirs = tensors_of(model), tensors_of(average)
    pairs = [(ours.get(name), theirs.get(name)) for name in orders]
    return all(
        a is not None and b is not None and a.shape == b.shape and torch.equal(local(b.detach()), local(a.detach()).to(local(b.detach())))
        for a, b in pairs
    )
