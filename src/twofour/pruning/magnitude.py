"""Magnitude pruning: keep the largest of every group. Data-free and, after retraining, as good as any other method.

Source: Mishra et al. 2021, arXiv 2104.08378, section 4.
"""

import torch
from torch import Tensor

from twofour.errors import InputError
from twofour.pattern import Pattern, select
from twofour.pattern.transposable import TILE_ROWS, TILES, select_transposable

# Formats with a sign bit and an order of magnitudes equal to the order of their bits.
BITS_OF = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float8_e4m3fn: torch.uint8,
    torch.float8_e5m2: torch.uint8,
    torch.float8_e4m3fnuz: torch.uint8,
    torch.float8_e5m2fnuz: torch.uint8,
}
# An integer wide enough for 4 · magnitude + 3.
KEY_OF = {torch.uint8: torch.int16, torch.int16: torch.int32, torch.int32: torch.int64}


def magnitude_mask(weight: Tensor, axis: int = 1, n: int = 2, m: int = 4) -> Tensor:
    """Return the bool mask, True where kept, of the `n` largest magnitudes of every `m` along `axis`; same device as `weight`.

    Ties go to the lower index, so the mask is the same on every device and in every dtype that holds the same values.

    Args:
        weight: fp64, fp32, fp16, bf16 or fp8, `[out, in, *kernel]`.
    """
    if weight.dtype not in BITS_OF:
        raise InputError(f"weight dtype {weight.dtype} is not a floating format, expected fp64, fp32, fp16, bf16 or fp8")
    bits = weight.detach().contiguous().view(BITS_OF[weight.dtype])
    if weight.device.type == "cpu":
        return torch.from_numpy(select(bits.numpy(), axis, n, m))
    if weight.ndim <= axis or weight.shape[axis] % m:
        raise InputError(f"weight of shape {list(weight.shape)} has no axis {axis} of a multiple of {m} elements to group")
    groups = bits.reshape(*weight.shape[:axis], weight.shape[axis] // m, m, -1)
    if (n, m) == (2, 4) and bits.dtype in KEY_OF:
        return two_largest(groups).reshape(weight.shape)
    return n_largest(groups, n).reshape(weight.shape)


def two_largest(groups: Tensor) -> Tensor:
    """Return the mask of the two largest of four in ten passes, for devices that run one kernel a pass; `groups` `[..., 4, inner]`.

    key = 4 · magnitude + (3 − index) makes all four different, so a weight is kept when its key reaches the second largest:
    max(min(max(a, b), max(c, d)), max(min(a, b), min(c, d))).
    """
    sign_cleared = groups & (0x7F if groups.dtype == torch.uint8 else torch.iinfo(groups.dtype).max)
    tie_break = torch.tensor([3, 2, 1, 0], dtype=KEY_OF[groups.dtype], device=groups.device).view(4, 1)
    keys = torch.add(tie_break, sign_cleared, alpha=4)
    a, b, c, d = keys.unbind(-2)
    second = torch.maximum(torch.minimum(torch.maximum(a, b), torch.maximum(c, d)), torch.maximum(torch.minimum(a, b), torch.minimum(c, d)))
    return keys >= second.unsqueeze(-2)


def n_largest(groups: Tensor, n: int) -> Tensor:
    """Return the mask of the `n` largest of each group by counting those that beat it; `groups` `[..., m, inner]`."""
    sign_cleared = groups & (0x7F if groups.dtype == torch.uint8 else torch.iinfo(groups.dtype).max)
    elements = sign_cleared.unbind(-2)
    kept = []
    for i, element in enumerate(elements):
        beaten_by = torch.zeros(element.shape, dtype=torch.uint8, device=groups.device)
        for j, other in enumerate(elements):
            if i != j:
                beaten_by += other >= element if j < i else other > element
        kept.append(beaten_by < n)
    return torch.stack(kept, dim=-2)


def transposable_mask(weight: Tensor) -> Tensor:
    """Return the bool mask with two kept in every four along both axes, the best of the 90 for each 4×4 tile; same device as `weight`.

    The scores are summed in the order of `pattern.select_transposable`, so the masks are equal on every device.
    """
    weight = weight.detach()
    if weight.device.type == "cpu":
        return torch.from_numpy(select_transposable((weight if weight.dtype == torch.float64 else weight.float()).numpy()))
    if weight.ndim < 2 or weight.shape[0] % 4 or weight.shape[1] % 4:
        raise InputError(f"weight of shape {list(weight.shape)} cannot be transposable 2:4, expected axes 0 and 1 to be multiples of 4")
    rows, columns = weight.shape[0] // 4, weight.shape[1] // 4
    magnitude = weight.double().abs().reshape(rows, 4, columns, 4, -1).permute(1, 3, 0, 2, 4).contiguous()  # [4, 4, out/4, in/4, inner]
    pairs = torch.stack([magnitude[:, a] + magnitude[:, b] for a in range(4) for b in range(a + 1, 4)])  # [6, 4, out/4, in/4, inner]
    best = torch.full_like(pairs[0, 0], -1.0)
    chosen = torch.zeros(best.shape, dtype=torch.long, device=weight.device)
    for tile, (r0, r1, r2, r3) in enumerate(TILE_ROWS.tolist()):
        score = (pairs[r0, 0] + pairs[r1, 1]) + (pairs[r2, 2] + pairs[r3, 3])
        chosen = torch.where(score > best, tile, chosen)
        best = torch.maximum(score, best)
    kept = torch.from_numpy(TILES).to(weight.device)[chosen]  # [out/4, in/4, inner, row, column]
    return kept.permute(0, 3, 1, 4, 2).reshape(weight.shape)


def pattern_mask(weight: Tensor, pattern: Pattern) -> Tensor:
    """Return the mask of largest kept magnitude that obeys `pattern`, True where kept; same device as `weight`."""
    return transposable_mask(weight) if pattern.transposable else magnitude_mask(weight, 1, pattern.n, pattern.m)
