"""Low-rank adapters that keep 2:4: the network is trained with W + s · (B A) ⊙ M, so that merging changes no output and keeps the mask.

A plain adapter, W + s · B A, fills the zeros of W; merging it leaves no group 2:4, and pruning it again changes the network it was trained
for. Source: Hu et al. 2021, arXiv 2106.09685 (LoRA).
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from twofour.errors import InputError, VerificationError
from twofour.pattern import count_groups
from twofour.training.masks import derive_masks


class MaskedDelta(nn.Module):
    """The parametrization W → W + scale · (B A) ⊙ M; `a` `[rank, in · kernel]`, `b` `[out, rank]`, fp32, B zero at first."""

    def __init__(self, weight: Tensor, mask: Tensor, rank: int, scale: float) -> None:
        super().__init__()
        columns = math.prod(weight.shape[1:])
        self.a = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.register_buffer("mask", mask.to(weight.device), persistent=False)
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight the layer computes with, in the dtype of `weight`."""
        assert isinstance(self.mask, Tensor)
        delta = (self.scale * (self.b @ self.a)).reshape(weight.shape).masked_fill(~self.mask, 0)
        return weight + delta.to(weight.dtype)


class MaskedLora:
    """The handle of `add_lora`: the adapters by the name of their weight, and how to end them."""

    def __init__(self, model: nn.Module, adapters: dict[str, MaskedDelta], frozen: list[nn.Parameter], order: dict[str, list[str]]) -> None:
        self.model, self.adapters, self._frozen, self._order = model, adapters, frozen, order

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained."""
        for adapter in self.adapters.values():
            yield from adapter.parameters()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the adapters as `<weight>.lora_a` and `.lora_b`, for a safetensors file."""
        state: dict[str, Tensor] = {}
        for name, adapter in self.adapters.items():
            state |= {f"{name}.lora_a": adapter.a.detach().clone(), f"{name}.lora_b": adapter.b.detach().clone()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the adapters of `state_dict`.

        Raises:
            InputError: other names or shapes; nothing is changed.
        """
        own = self.state_dict()
        if state.keys() != own.keys() or any(state[key].shape != value.shape for key, value in own.items()):
            raise InputError(
                f"add_lora: the state holds {sorted(state)[:2]}…, expected {sorted(own)[:2]}… in their shapes; use the same rank"
            )
        for name, adapter in self.adapters.items():
            adapter.a.copy_(state[f"{name}.lora_a"])
            adapter.b.copy_(state[f"{name}.lora_b"])

    def merge(self) -> None:
        """Write the sums into the weights, under the model's own names again: every output stays what it was, to the bit.

        Raises:
            VerificationError: a merged weight is not 2:4 (its frozen weight was changed); the adapters stay.
        """
        for name in self.adapters:
            module, attribute = _holder(self.model, name)
            count = count_groups((getattr(module, attribute).detach() != 0).cpu().numpy())
            if not count.is_24:
                raise VerificationError(
                    f"add_lora: merging {name!r} would leave {count.total - count.obeying} of {count.total} groups not 2:4, expected none; "
                    "the weight under the adapter was changed: load the pruned one again"
                )
        self._end(merged=True)

    def remove(self) -> None:
        """Take the adapters off; the weights are what they were before."""
        self._end(merged=False)

    def _end(self, merged: bool) -> None:
        for name in self.adapters:
            module, attribute = _holder(self.model, name)
            parametrize.remove_parametrizations(module, attribute, leave_parametrized=merged)
            # Optimizers and state dicts go by the order of the parameters; torch puts the weight last.
            for own in self._order[name]:
                module._parameters[own] = module._parameters.pop(own)
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self.adapters, self._frozen = {}, []


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


def add_lora(model: nn.Module, names: Iterable[str] | None = None, *, rank: int = 8, alpha: float = 16.0) -> MaskedLora:
    """Put a low-rank adapter on every 2:4 weight of `model` and return the handle; all else is frozen until it ends.

    W' = W + (alpha / rank) · (B A) ⊙ M, A as in LoRA, B zero, so the network computes at first what it computed before.

    Args:
        names: of 2:4 weights to adapt, all of them by default.

    Raises:
        InputError: no 2:4 weight, a name that is none, a weight shared by two modules, rank below 1.
    """
    if rank < 1:
        raise InputError(f"add_lora: rank {rank} is out of range, expected at least 1")
    masks = derive_masks(model)
    wanted = list(masks) if names is None else list(names)
    for name in wanted:
        if name not in masks:
            raise InputError(f"add_lora: {name!r} is no 2:4 weight of the model, expected a pruned one; call twofour.prune first")
    if not wanted:
        raise InputError("add_lora: no weight of the model is 2:4, expected a pruned model; call twofour.prune first")
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name in wanted:
        if uses[id(model.get_parameter(name))] > 1:
            raise InputError(f"add_lora: weight {name!r} is shared by two modules, so it would be merged twice; leave it out of names")
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    adapters, order = {}, {}
    for name in wanted:
        module, attribute = _holder(model, name)
        order[name] = list(module._parameters)
        adapter = MaskedDelta(model.get_parameter(name), masks[name], rank, alpha / rank)
        # The sum has the weight's shape and dtype by construction; torch's check would compute it once more.
        parametrize.register_parametrization(module, attribute, adapter, unsafe=True)
        adapters[name] = adapter
    return MaskedLora(model, adapters, frozen, order)


@torch.no_grad()
def merge_adapters(model: nn.Module, adapters: Mapping[str, tuple[Tensor, Tensor, float]]) -> None:
    """Add s · B A to the named weights, for adapters trained elsewhere; refused where it would undo 2:4.

    Args:
        adapters: weight name → (A `[rank, in]`, B `[out, rank]`, s).

    Raises:
        InputError: no such weight, or shapes that do not fit.
        VerificationError: a 2:4 weight would not be 2:4 after; the model is left as it was.
    """
    parameters, sparse, merged = dict(model.named_parameters()), derive_masks(model), {}
    for name, (a, b, scale) in adapters.items():
        if name not in parameters or (b.shape[0], a.shape[1]) != (parameters[name].shape[0], parameters[name][0].numel()):
            raise InputError(f"merge_adapters: the adapter {name!r} fits no weight of the model, expected A [rank, in] and B [out, rank]")
        weight = parameters[name]
        merged[name] = weight + (scale * (b.to(weight.device) @ a.to(weight.device))).reshape(weight.shape).to(weight.dtype)
        if name in sparse:
            count = count_groups((merged[name] != 0).cpu().numpy())
            if not count.is_24:
                raise VerificationError(
                    f"merge_adapters: merging the adapter of {name!r} would leave {count.total - count.obeying} of {count.total} groups "
                    "with more than two non-zeros, expected 2:4; train the adapter masked, with twofour.training.add_lora"
                )
    for name, value in merged.items():
        parameters[name].copy_(value)
