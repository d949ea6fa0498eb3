"""SparseGPT: prune column by column, and let the columns still to come make up for each error.

With U the upper factor of the damped inverse Hessian (UᵀU = H⁻¹), U_jj² is the diagonal of the inverse over the columns from j on, and
row j of U over U_jj the best compensation by them.

Source: Frantar and Alistarh 2023, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774, section
3 and algorithm 1, with the mask of n:m chosen at the first column of every group of m.
"""

import torch
from torch import Tensor

from twofour.pattern import Pattern
from twofour.pruning.magnitude import pattern_mask
from twofour.pruning.methods.hessian import inverse_factor
from twofour.pruning.methods.method import Choice
from twofour.pruning.statistics import Statistics

# Columns updated one by one before the rest is updated by one product.
BLOCK_COLUMNS = 128


def sparsegpt(matrix: Tensor, statistics: Statistics, pattern: Pattern) -> Choice:
    """Return the mask and the updated matrix `[out, columns]`.

    In a group the values of largest w_j² / U_jj² are kept; a dropped one moves its error w_j / U_jj · U_j,k to every later column k.
    """
    factor, notes = inverse_factor(statistics)
    factor = factor.to(matrix.dtype)
    new, mask = matrix.clone(), torch.ones_like(matrix, dtype=torch.bool)
    columns, step = matrix.shape[1], pattern.m * max(1, BLOCK_COLUMNS // pattern.m)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        errors = torch.zeros_like(new[:, start:stop])
        for j in range(start, stop):
            if (j - start) % pattern.m == 0:
                group = slice(j, j + pattern.m)
                mask[:, group] = pattern_mask((new[:, group] / factor.diagonal()[group]).square(), pattern)
            error = (new[:, j] * ~mask[:, j]) / factor[j, j]
            new[:, j:stop] -= error[:, None] * factor[j, j:stop]
            errors[:, j - start] = error
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    return Choice(mask, new.masked_fill_(~mask, 0), notes)


def sparsegpt_mask(matrix: Tensor, statistics: Statistics, pattern: Pattern) -> Choice:
    """Return the mask of `sparsegpt` without its update: the kept values stay as they are."""
    choice = sparsegpt(matrix, statistics, pattern)
    return Choice(choice.mask, None, choice.notes)
