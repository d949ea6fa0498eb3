"""Shared by the tests of nn: pruned layers, and the limit that rounding sets."""

import numpy as np
import torch
from torch import nn

from twofour.oracle import gemm
from twofour.pattern import select


def pruned_linear(inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16, bias: bool = True, seed: int = 0) -> nn.Linear:
    """A linear layer whose weight is pruned to the two largest of four along the inputs; a last partial group keeps what it has."""
    torch.manual_seed(seed)
    linear = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        whole = inputs // 4 * 4
        mask = torch.from_numpy(select(linear.weight[:, :whole].numpy())) if whole else torch.ones(outputs, 0, dtype=torch.bool)
        linear.weight[:, :whole].masked_fill_(~mask, 0)
        if inputs - whole > 2:
            linear.weight[:, -1] = 0
    return linear.to(dtype).requires_grad_(False)


def within_rounding(found: torch.Tensor, x: torch.Tensor, linear: nn.Linear) -> bool:
    """|found - s| <= eps |s| + (inputs + 8) 2^-22 (|x| . |W|^T + |b|), s from the float64 oracle.

    One rounding of the output, and fp32 sums in any order, whose terms tensor cores may cut instead of round.
    """
    flat = x.detach().reshape(-1, linear.in_features).double().numpy()
    weight = linear.weight.detach().double().numpy()
    bias = np.zeros(linear.out_features) if linear.bias is None else linear.bias.detach().double().numpy()
    exact = gemm(flat, weight, sparse=False, bias=bias)
    size = gemm(np.abs(flat), np.abs(weight), sparse=False, bias=np.abs(bias))
    info = torch.finfo(found.dtype)
    limit = info.eps * np.abs(exact) + (linear.in_features + 8) * 2.0**-22 * size + info.smallest_normal
    return bool((np.abs(found.detach().double().numpy().reshape(exact.shape) - exact) <= limit).all())
