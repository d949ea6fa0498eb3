"""The masks of a model that is 2:4 already."""

from torch import Tensor, nn

from twofour.pattern import count_groups
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
    model = unwrap_model(model)
    names = {id(p): name for name, p in model.named_parameters()}
    masks: dict[str, Tensor] = {}
    for module in model.modules():
        for attribute, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2 or id(weight) not in names or names[id(weight)] in masks:
                continue
            if not isinstance(module, (*CONVOLUTIONS, nn.Linear, nn.MultiheadAttention)) or why_not(module, attribute, weight):
                continue
            full = whole(weight.detach())
            nonzero = full != 0
            if bool(nonzero.any()) and count_groups(nonzero.cpu().numpy()).is_24:
                masks[names[id(weight)]] = magnitude_mask(full)
    return masks
