"""Hold pruned weights at zero through any training loop, with the optimizer's own hooks."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pattern import count_groups
from twofour.pruning import Pruning
from twofour.pruning.capture import CONVOLUTIONS
from twofour.pruning.eligibility import why_not
from twofour.pruning.magnitude import magnitude_mask


def derive_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of the weights that are 2:4 already, by parameter name; a weight of zeros only is not counted as pruned."""
    names = {id(p): name for name, p in model.named_parameters()}
    masks: dict[str, Tensor] = {}
    for module in model.modules():
        for attribute, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2 or id(weight) not in names or names[id(weight)] in masks:
                continue
            if not isinstance(module, (*CONVOLUTIONS, nn.Linear, nn.MultiheadAttention)) or why_not(module, attribute, weight):
                continue
            nonzero = weight.detach() != 0
            if bool(nonzero.any()) and count_groups(nonzero.cpu().numpy()).is_24:
                masks[names[id(weight)]] = magnitude_mask(weight)
    return masks


class Hold:
    """The handle of `hold`: keeps the masks, counts the steps, lets go on `remove()` or at the end of a `with` block."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.masks = dict(masks)
        self.num_steps = 0
        self._dropped: list[tuple[nn.Parameter, Tensor]] = []
        for name, mask in self.masks.items():
            if name not in parameters:
                raise InputError(f"hold: the mask {name!r} belongs to no parameter of the model; prune this model, not a copy of another")
            weight = parameters[name]
            if weight.shape != mask.shape:
                raise InputError(
                    f"hold: mask {name!r} has shape {list(mask.shape)}, its weight {list(weight.shape)}; prune the model again"
                )
            self._dropped.append((weight, ~mask.to(weight.device)))
        trained = [weight for weight, _ in self._dropped if weight.requires_grad]
        if trained and not any(id(weight) in held for weight in trained):
            raise InputError(
                "hold: the optimizer trains none of the pruned weights, expected an optimizer made from this model's parameters"
            )
        self.apply()
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.num_steps += 1
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Set every pruned weight to exactly +0. Selected, not multiplied: NaN · 0 would stay NaN."""
        for weight, dropped in self._dropped:
            if dropped.device != weight.device:
                dropped = dropped.to(weight.device)
            weight.masked_fill_(dropped, 0)

    def remove(self) -> None:
        """Stop holding; the weights keep their values."""
        self._handle.remove()

    def __enter__(self) -> "Hold":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()


def hold(model: nn.Module, optimizer: torch.optim.Optimizer, pruning: Pruning | None = None) -> Hold:
    """Keep the pruned weights of `model` exactly zero after every step of `optimizer` and return the handle.

    Works with any optimizer derived from `torch.optim.Optimizer`, `GradScaler`, gradient accumulation and DDP, because it uses the
    optimizer's public `register_step_post_hook`. Without `pruning` the masks are those of the weights that are 2:4 now.

    Raises:
        InputError: no weight is 2:4, or the optimizer trains none of them.
    """
    masks = pruning.masks if pruning is not None and pruning.masks else derive_masks(model)
    if not masks:
        raise InputError("hold: no weight of the model is 2:4, expected a pruned model; call twofour.prune first")
    return Hold(model, optimizer, masks)
