"""Weight reconstruction by alternating directions, as in ALPS: the mask and the values that give the layer's output back best.

min ‖XWᵀ − XŴᵀ‖² + λ‖W − Ŵ‖², W of the pattern, is split into a W that minimises and a D that obeys the pattern; a multiplier V and a
rising penalty ρ draw them together until the support of D stands still. Conjugate gradients then solve for the values on that support.

Source: Meng et al. 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models", arXiv 2406.07831,
sections 3.2 (ADMM and the steps of ρ) and 3.3 (conjugate gradients on the support).
"""

import torch
from torch import Tensor

from twofour.pattern import Pattern
from twofour.pruning.magnitude import pattern_mask
from twofour.pruning.methods.hessian import DAMPING, damped, damping_note, why_singular
from twofour.pruning.methods.method import Choice
from twofour.pruning.statistics import Statistics

MOST_ITERATIONS = 300
FIRST_PENALTY = 0.1
# Every third iteration: if the support changed by at least this share of what is kept, ρ grows by this factor; unchanged ends it.
CHECK_EVERY = 3
PENALTY_STEPS = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
CONJUGATE_STEPS = 30


def alps(matrix: Tensor, statistics: Statistics, pattern: Pattern) -> Choice:
    """Return the mask and the reconstructed matrix `[out, columns]`.

    Columns are scaled so that the damped H has a diagonal of ones; then, with G = WH,
    W ← (G − V + ρD)(H + ρI)⁻¹,  D ← P(W + V/ρ),  V ← V + ρ(W − D), P keeping the largest squares of every group.
    """
    notes = damping_note(why_singular(statistics), DAMPING)
    hessian = damped(statistics)
    scale = hessian.diagonal().sqrt()
    hessian = (hessian / scale).div_(scale[:, None])
    values, vectors = (part.to(matrix.dtype) for part in torch.linalg.eigh(hessian))
    hessian, scale = hessian.to(matrix.dtype), scale.to(matrix.dtype)
    dense = matrix * scale
    target = dense @ hessian
    mask, start = support(dense, target, values.clamp_min(0), vectors, pattern)
    solved = solve_on(mask, start, target, hessian)
    return Choice(mask, (solved / scale).masked_fill_(~mask, 0), notes)


def support(dense: Tensor, target: Tensor, values: Tensor, vectors: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Return the mask the iteration ends with and D; `dense` and `target` = dense·H `[out, columns]`, H = vectors·diag(values)·vectorsᵀ."""
    penalty = FIRST_PENALTY
    obeying, multiplier = dense, torch.zeros_like(dense)
    kept = before = torch.zeros_like(dense, dtype=torch.bool)
    for iteration in range(1, MOST_ITERATIONS + 1):
        free = ((target - multiplier + penalty * obeying) @ vectors).div_(values + penalty) @ vectors.T
        pulled = free + multiplier / penalty
        kept = pattern_mask(pulled.square(), pattern)
        obeying = pulled * kept
        multiplier = multiplier + penalty * (free - obeying)
        if iteration % CHECK_EVERY == 0:
            changed = int((kept ^ before).sum()) if iteration > CHECK_EVERY else kept.numel()
            if not changed:
                break
            penalty *= next(factor for share, factor in PENALTY_STEPS if changed >= share * int(kept.sum()))
            before = kept
    return kept, obeying


def solve_on(mask: Tensor, start: Tensor, target: Tensor, hessian: Tensor) -> Tensor:
    """Return, for every row, the values on its support that minimise the error, by conjugate gradients from `start`; H has ones on
    its diagonal, so it is its own Jacobi preconditioner. All `[out, columns]`."""
    solved = start.clone()
    residual = (target - solved @ hessian) * mask
    direction, squared = residual.clone(), residual.square().sum(1, keepdim=True)
    first = squared.clone()
    tiny = torch.finfo(solved.dtype).tiny
    for _ in range(CONJUGATE_STEPS):
        if bool((squared <= torch.finfo(solved.dtype).eps ** 2 * first).all()):
            break
        product = (direction @ hessian) * mask
        step = squared / (direction * product).sum(1, keepdim=True).clamp_min(tiny)
        solved += step * direction
        residual -= step * product
        following = residual.square().sum(1, keepdim=True)
        direction = residual + following / squared.clamp_min(tiny) * direction
        squared = following
    return solved
