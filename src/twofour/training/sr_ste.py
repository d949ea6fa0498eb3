"""SR-STE: training a 2:4 network from scratch, its masks recomputed as the weights move.

The optimizer keeps training dense weights; the network computes with their masked copies, and the gradient of the copies is taken for
that of the dense weights (straight through), plus a pull of the pruned ones towards zero:

    W ← W − lr · (∂L/∂(W ⊙ M) + decay · (1 − M) ⊙ W),   M the mask of W.

Source: Zhou et al. 2021, arXiv 2102.04010, equation 9.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pattern import Pattern
from twofour.pruning.magnitude import pattern_mask
from twofour.pruning.sharded import is_sharded, local
from twofour.training.wrapped import unwrap_model, unwrap_optimizer


class SrSte:
    """The handle of `sr_ste`. Between steps the model holds masked weights under its own names: what is saved, exported or evaluated is
    2:4 at all times. The dense weights live here.

    Attributes:
        dense: the dense weights by name (this process's pieces, where sharded).
        masks: the masks of now, True where kept.
        changed: share of mask elements that differ from the mask before, at the last recomputation.
    """

    def __init__(self, model: nn.Module, optimizer: Any, names: Iterable[str], pattern: Pattern, decay: float, every: int) -> None:
        self.model, self.optimizer = unwrap_model(model), unwrap_optimizer(optimizer)
        self.pattern, self.decay, self.every = pattern, decay, every
        self.num_steps, self.changed = 0, 0.0
        parameters = dict(self.model.named_parameters())
        stepped = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self._weights: dict[str, nn.Parameter] = {}
        for name in names:
            if name not in parameters:
                raise InputError(f"sr_ste: {name!r} is no parameter of the model; give the names that eligible_names returns")
            weight = parameters[name]
            if id(weight) not in stepped:
                raise InputError(f"sr_ste: the optimizer does not train {name!r}, expected one made from this model's parameters")
            reason = pattern.why_not(tuple(weight.shape)) or _why_not_sharded(weight, pattern)
            if reason:
                raise InputError(f"sr_ste: weight {name!r} cannot be {pattern}: {reason}")
            self._weights[name] = weight
        if not self._weights:
            raise InputError("sr_ste: no names given, expected those that eligible_names returns")
        self.dense = {name: local(weight.detach()).clone() for name, weight in self._weights.items()}
        self.masks = {name: pattern_mask(value, pattern) for name, value in self.dense.items()}
        self.apply()
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (args[1] if len(args) > 1 else kwargs.get("closure")) is not None:
            raise InputError("sr_ste: step() was given a closure, expected loss.backward() before it; use an optimizer without a closure")
        # A fused optimizer divides by the scale of a GradScaler inside its step, so the pull is scaled like the gradient.
        scale = getattr(optimizer, "grad_scale", None)
        for name, weight in self._weights.items():
            dense = self.dense[name]
            local(weight.detach()).copy_(dense)
            if weight.grad is not None and self.decay:
                pull = dense.masked_fill(self.masks[name], 0)
                local(weight.grad).add_(pull if scale is None else pull * scale, alpha=self.decay)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.num_steps += 1
        for name, weight in self._weights.items():
            self.dense[name].copy_(local(weight.detach()))
        if self.num_steps % self.every == 0:
            self.recompute()
        self.apply()

    def recompute(self) -> None:
        """Take the masks of the dense weights as they are now."""
        different = total = 0
        for name, dense in self.dense.items():
            mask = pattern_mask(dense, self.pattern)
            different += int(torch.count_nonzero(mask ^ self.masks[name]))
            total += mask.numel()
            self.masks[name] = mask
        self.changed = different / total if total else 0.0

    @torch.no_grad()
    def apply(self) -> None:
        """Write the masked copies of the dense weights into the model."""
        for name, weight in self._weights.items():
            local(weight.detach()).copy_(self.dense[name].masked_fill(~self.masks[name], 0))

    @torch.no_grad()
    def restore(self) -> None:
        """Stop, and leave the dense weights in the model."""
        self.remove()
        for name, weight in self._weights.items():
            local(weight.detach()).copy_(self.dense[name])

    def remove(self) -> None:
        """Stop, and leave the masked weights in the model: `hold` goes on with their masks fixed."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of the dense weights by name, for a safetensors file beside the model's."""
        return {name: value.clone() for name, value in self.dense.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the dense weights of `state_dict`, recompute the masks and write the model.

        Raises:
            InputError: other names or shapes; nothing is changed.
        """
        if state.keys() != self.dense.keys() or any(state[name].shape != value.shape for name, value in self.dense.items()):
            raise InputError(
                f"sr_ste: the state holds {sorted(state)[:3]}…, expected the weights {sorted(self.dense)[:3]}… in their shapes"
            )
        for name, value in state.items():
            self.dense[name].copy_(value)
        self.recompute()
        self.apply()


def _why_not_sharded(weight: Tensor, pattern: Pattern) -> str:
    if not is_sharded(weight):
        return ""
    sharded: Any = weight
    if pattern.transposable or any(placement.is_shard(1) for placement in sharded.placements):
        return "its groups are split between processes, expected shards along axis 0"
    return ""


def sr_ste(
    model: nn.Module, optimizer: Any, names: Iterable[str], *, decay: float = 2e-4, every: int = 1, pattern: str | Pattern = "2:4"
) -> SrSte:
    """Train the weights `names` of `model` sparse from scratch through any loop and return the handle.

    With `decay=0` it is the plain straight-through estimator. Gradient clipping before the step sees the gradient without the pull.

    Args:
        names: of parameters, from `twofour.pruning.eligible_names`.
        decay: the pull of pruned weights towards zero; the paper's 2e-4 suits SGD with a learning rate of 0.1.
        every: steps between two recomputations of the masks.

    Raises:
        InputError: an unknown name, a weight the optimizer does not train or the pattern does not fit, decay or every out of range; in a
            step, a closure.
    """
    if every < 1 or decay < 0:
        raise InputError(f"sr_ste: decay {decay}, every {every} is out of range, expected decay ≥ 0 and every ≥ 1")
    return SrSte(model, optimizer, names, Pattern.parse(pattern), decay, every)
