"""Magnitude pruning: keep the two largest of four. Data-free and, after retraining, as good as any other method.

Source: Mishra et al. 2021, arXiv 2104.08378, section 4.
"""

import torch
from torch import Tensor

from twofour.errors import InputError
from twofour.pattern import select

INTEGER_OF_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def magnitude_mask(weight: Tensor, axis: int = 1) -> Tensor:
    """Return the bool mask, True where kept, of the two largest magnitudes of every four along `axis`; same device as `weight`.

    Ties go to the lower index, so the mask is the same on every device and in every dtype that holds the same values.

    Args:
        weight: fp64, fp32, fp16, bf16 or fp8, `[out, in, *kernel]`.
    """
    if not weight.is_floating_point():
        raise InputError(f"weight dtype {weight.dtype} is not a floating format, expected fp32, fp16, bf16 or fp8")
    bits = weight.detach().contiguous().view(INTEGER_OF_SIZE[weight.element_size()])
    if weight.device.type == "cpu":
        return torch.from_numpy(select(bits.numpy(), axis))
    sign_cleared = bits & (0x7F if weight.element_size() == 1 else torch.iinfo(bits.dtype).max)
    groups = sign_cleared.movedim(axis, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, 4)
    a, b, c, d = groups.unbind(-1)
    # The rank of each is the number of those that beat it; an earlier one also wins a tie.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    ranks = (
        (~ab).int() + (~ac).int() + (~ad).int(),
        ab.int() + (~bc).int() + (~bd).int(),
        ac.int() + bc.int() + (~cd).int(),
        ad.int() + bd.int() + cd.int(),
    )
    kept = torch.stack([rank < 2 for rank in ranks], dim=-1)
    return kept.flatten(-2).movedim(-1, axis).contiguous()
