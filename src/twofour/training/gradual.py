"""Pruning in small bites during training: the share of pruned groups grows along a schedule, the cheapest groups first."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pattern import Pattern
from twofour.pruning.magnitude import pattern_mask
from twofour.pruning.sharded import is_sharded
from twofour.training.hold import Hold
from twofour.training.wrapped import unwrap_model


def cubic_share(step: int, start: int, stop: int) -> float:
    """Return the share of groups pruned at `step`: 1 − (1 − t)³ with t = (step − start) / (stop − start), 0 before and 1 after.

    Source: Zhu and Gupta 2017, arXiv 1710.01878, equation 1.
    """
    if step >= stop:
        return 1.0
    t = max(0.0, (step - start) / (stop - start))
    return 1.0 - (1.0 - t) ** 3


def partial_mask(weight: Tensor, pattern: Pattern, share: float) -> Tensor:
    """Return the mask that prunes the `share` of groups that lose the least, Σ|w dropped|, and keeps all of the others.

    Of equal losses the first group goes first; groups that obey already lose nothing, so they stay pruned.
    """
    mask = pattern_mask(weight, pattern)
    if share >= 1:
        return mask
    lost = weight.detach().float().abs().masked_fill_(mask, 0)
    grouped = (weight.shape[0], weight.shape[1] // pattern.m, pattern.m, -1)
    losses = lost.reshape(grouped).sum(dim=2)
    count = round(share * losses.numel())
    chosen = torch.zeros(losses.numel(), dtype=torch.bool, device=weight.device)
    chosen[torch.argsort(losses.flatten(), stable=True)[:count]] = True
    return (mask.reshape(grouped) | ~chosen.reshape(losses.shape).unsqueeze(2)).reshape(weight.shape)


class Gradual(Hold):
    """The handle of `gradual`: a `Hold` whose masks grow from nothing to the whole pattern.

    Attributes:
        share: of groups pruned now.
        values: by name, what each pruned weight was when it was pruned, 0 where nothing was.
    """

    def __init__(self, model: nn.Module, optimizer: Any, names: Iterable[str], pattern: Pattern, start: int, stop: int, every: int) -> None:
        self.pattern, self.start, self.stop, self.every = pattern, start, stop, every
        self.share = 0.0
        parameters = dict(unwrap_model(model).named_parameters())
        names = list(names)
        for name in names:
            if name not in parameters:
                raise InputError(f"gradual: {name!r} is no parameter of the model; give the names that eligible_names returns")
            if is_sharded(parameters[name]):
                raise InputError(f"gradual: weight {name!r} is sharded over processes, expected whole weights; use DDP, or prune at once")
        super().__init__(model, optimizer, {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in names})
        self.values = {name: torch.zeros_like(parameters[name]) for name in names}

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._after_step(optimizer, args, kwargs)
        step = self.num_steps
        if self.share < 1 and step >= self.start and ((step - self.start) % self.every == 0 or step >= self.stop):
            self.prune_to(cubic_share(step, self.start, self.stop))

    @torch.no_grad()
    def prune_to(self, share: float) -> None:
        """Prune until `share` of every weight's groups obey; what is pruned goes to `values`."""
        for name, weight in [(name, self.model.get_parameter(name)) for name in self.masks]:
            mask = partial_mask(weight, self.pattern, share)
            dropped = ~mask & self.masks[name]
            self.values[name].copy_(torch.where(dropped, weight, self.values[name]))
            self.set_mask(name, mask & self.masks[name])
        self.share = share

    @torch.no_grad()
    def restore(self) -> None:
        """Stop holding and put every pruned value back as it was when it was pruned."""
        self.remove()
        for name, value in self.values.items():
            weight = self.model.get_parameter(name)
            weight.copy_(torch.where(self.masks[name], weight, value))


def gradual(
    model: nn.Module, optimizer: Any, names: Iterable[str], *, stop: int, start: int = 0, every: int = 100, pattern: str | Pattern = "2:4"
) -> Gradual:
    """Prune the weights `names` bit by bit between the steps `start` and `stop` of `optimizer`, hold them, and return the handle.

    Every `every` steps the share of pruned groups rises to 1 − (1 − t)³; the groups that lose the least magnitude go first, and a
    pruned weight stays pruned. From step `stop` on every group obeys.

    Args:
        names: of parameters, from `twofour.pruning.eligible_names`.

    Raises:
        InputError: a schedule that runs backwards, an unknown name, a weight the pattern does not fit, a transposable pattern.
    """
    pattern = Pattern.parse(pattern)
    if not 0 <= start < stop or every < 1:
        raise InputError(f"gradual: start {start}, stop {stop}, every {every} is no schedule, expected 0 ≤ start < stop and every ≥ 1")
    if pattern.transposable:
        raise InputError("gradual: a transposable pattern has no groups to prune one by one, expected N:M; use sr_ste or prune")
    handle = Gradual(model, optimizer, names, pattern, start, stop, every)
    for name, mask in handle.masks.items():
        reason = pattern.why_not(tuple(mask.shape))
        if reason:
            handle.remove()
            raise InputError(f"gradual: weight {name!r} cannot be {pattern}: {reason}")
    return handle
