"""RIA: a weight counts relative to its row and to its column, times the root of its input's norm.

Its channel permutation keeps the most of this score under the pattern. Here the search and the proof of `permute` do it, given these
scores in place of magnitudes: what the paper calls channel reallocation and linear sum assignment, applied only where the network
provably stays the same.
"""

import torch
from torch import Tensor

from twofour.pruning.methods.wanda import relative_norms
from twofour.pruning.statistics import Statistics

ACTIVATION_POWER = 0.5


def ria_score(matrix: Tensor, statistics: Statistics) -> Tensor:
    """Return S_ij = (|W_ij| / Σ_k |W_kj| + |W_ij| / Σ_k |W_ik|) · ‖X_j‖₂^½, `[out, columns]`, dtype of `matrix`.

    Source: Zhang et al. 2024, "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models", ICLR 2024,
    section 3.2, with the power a = 0.5 of its experiments.
    """
    magnitude = matrix.abs()
    tiny = torch.finfo(matrix.dtype).tiny
    by_column, by_row = magnitude.sum(0, keepdim=True).clamp_min(tiny), magnitude.sum(1, keepdim=True).clamp_min(tiny)
    return (magnitude / by_column + magnitude / by_row) * relative_norms(statistics).pow(ACTIVATION_POWER).to(matrix.dtype)
