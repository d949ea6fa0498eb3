"""Wanda: a weight counts as much as what it adds to the output, its magnitude times the norm of its input."""

from torch import Tensor

from twofour.pruning.statistics import Statistics


def wanda_score(matrix: Tensor, statistics: Statistics) -> Tensor:
    """Return S_ij = |W_ij| · ‖X_j‖₂, `[out, columns]`, dtype of `matrix`.

    The norms are divided by their largest first, which changes no comparison and keeps long calibrations from overflowing.

    Source: Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, equation 1.
    """
    return matrix.abs() * relative_norms(statistics).to(matrix.dtype)


def relative_norms(statistics: Statistics) -> Tensor:
    """Return ‖X_j‖₂ / max_j ‖X_j‖₂, float64 `[columns]`; ones where every input is zero."""
    norms = statistics.norms()
    largest = norms.max()
    return norms / largest if bool(largest > 0) else norms.new_ones(norms.shape)
