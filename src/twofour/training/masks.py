"""The masks of a model that is 2:4 already."""

from collections.abc import Iterator

from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pattern import count_groups
from twofour.pruning import Pruning
from twofour.pruning.capture import CONVOLUTIONS
from twofour.pruning.eligibility import why_not
from twofour.pruning.magnitude import magnitude_mask
from twofour.pruning.sharded import whole
from twofour.training.wrapped import unwrap_model


def derive_masks(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks of the weights that are 2:4 already, by parameter name; a weight of zeros only is not counted as pruned.

    A group with fewer than two non-zeros gets its mask filled up at the lower indices. The mask of a weight that is sharded over
    processes is that of the whole weight, gathered; every process must call this at the same place.
    """
    masks: dict[str, Tensor] = {}
    for name, full in _candidates(model):
        nonzero = full != 0
        if bool(nonzero.any()) and count_groups(nonzero.cpu().numpy()).is_24:
            masks[name] = magnitude_mask(full)
    return masks


def count_dense_groups(model: nn.Module) -> tuple[int, int]:
    """Return how many groups of the weights that could be 2:4 are not, and how many there are; gathered as by `derive_masks`."""
    counts = [count_groups((full != 0).cpu().numpy()) for _, full in _candidates(model)]
    total = sum(count.total for count in counts)
    return total - sum(count.obeying for count in counts), total


def _candidates(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give the name and the whole of each weight that could be 2:4, tied ones once."""
    model = unwrap_model(model)
    names = {id(p): name for name, p in model.named_parameters()}
    given: set[str] = set()
    for module in model.modules():
        for attribute, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2 or id(weight) not in names or names[id(weight)] in given:
                continue
            if not isinstance(module, (*CONVOLUTIONS, nn.Linear, nn.MultiheadAttention)) or why_not(module, attribute, weight):
                continue
            given.add(names[id(weight)])
            yield names[id(weight)], whole(weight.detach())


def recorded_masks(model: nn.Module, pruning: Pruning) -> dict[str, Tensor]:
    """Return the masks of the layers that a pruning record names, read off the zeros of the weights.

    Raises:
        InputError: the record names a weight the model has not, or one that does not hold its pattern.
    """
    parameters = dict(model.named_parameters())
    masks = {}
    for layer in pruning.pruned:
        if layer.name not in parameters:
            raise InputError(f"the pruning record names {layer.name!r}, which is no parameter of the model; use the record's own weights")
        weight = parameters[layer.name].detach()
        kept = weight != 0
        if pruning.pattern == "2:4":
            if not count_groups(kept.cpu().numpy()).is_24:
                raise InputError(f"weight {layer.name!r} is recorded as 2:4 and is not; prune the network again")
            kept = magnitude_mask(weight)
        masks[layer.name] = kept
    return masks
