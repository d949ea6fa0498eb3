"""XᵀX made safe to invert, its factor, and the output error it measures."""

import torch
from torch import Tensor

from twofour.errors import InputError
from twofour.pruning.statistics import Statistics, rounding_of

# λ = 1 % of the mean diagonal. Source: Frantar and Alistarh 2023, arXiv 2301.00774, section 4 ("dampening").
DAMPING = 0.01
MOST_DAMPING = 1.0
# Each shrinks what the vector holds of any other eigenvector by the smallest eigenvalue over that one's.
INVERSE_ITERATIONS = 4


def damped(statistics: Statistics, share: float = DAMPING) -> Tensor:
    """Return H = XᵀX + λI, λ = `share` · mean diagonal; the identity where every input is zero. `[columns, columns]`, a copy."""
    assert statistics.hessian is not None
    hessian = statistics.hessian.clone()
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(mean * share if bool(mean > 0) else 1.0)
    return hessian


def cholesky(matrix: Tensor) -> Tensor | None:
    """Return the lower triangular L with LLᵀ = `matrix`, or None where it is not positive definite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    # NOTE: cuSOLVER has left `info` at 0 for matrices that are not positive definite (cupy/cupy#7309), as where only the last pivot is not
    # positive; that pivot has no positive root.
    return None if int(info) or not bool((factor.diagonal() > 0).all()) else factor


def why_singular(statistics: Statistics) -> str:
    """Return why XᵀX has no inverse, or an empty string where nothing is known against it."""
    columns, dead = statistics.squares.numel(), int((statistics.squares == 0).sum())
    if dead:
        return f"{dead} of {columns} inputs are always zero"
    if statistics.rows < columns:
        return f"{statistics.rows} rows for {columns} columns"
    return "some inputs are linear combinations of others to within rounding" if has_dependent_inputs(statistics) else ""


def has_dependent_inputs(statistics: Statistics) -> bool:
    """Whether rounding hides how far the smallest eigenvalue of R, XᵀX scaled to a diagonal of ones, is from zero; no input is all zero.

    Where XᵀX has no Cholesky factor it is not even positive. Where it has one, inverse iteration gives 1/‖R⁻¹v‖, never below that
    eigenvalue, to be held against what rounding does to vᵀRv in the sums and in the factor. Scaled, since rounding errs in proportion to
    the norms of both inputs: a small input is not a repeated one. Undamped, since a pivot of the damped matrix, less λ, is about λ for an
    input that repeats another and for one that differs from it by λ alike. The factor takes at most a sixth of the operations of XᵀX.
    """
    assert statistics.hessian is not None
    hessian = statistics.hessian
    # At most two matrices of the size of H live at once beside it.
    factor = cholesky(hessian)
    if factor is None:
        return True
    scale = hessian.diagonal().sqrt()[:, None]
    vector = torch.randn(len(scale), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu").to(scale)
    length = vector.norm()
    for _ in range(INVERSE_ITERATIONS):
        vector = scale * torch.cholesky_solve(scale * (vector / length), factor)
        length = vector.norm()
    return bool(1 / length <= statistics.rounding + rounding_of(len(scale), hessian.dtype))


def inverse_factor(statistics: Statistics) -> tuple[Tensor, tuple[str, ...]]:
    """Return the upper triangular U with UᵀU = H⁻¹, `[columns, columns]`, and notes; H damped until it can be factored.

    H = A·Aᵀ with A upper triangular is the Cholesky factorisation of H with both axes reversed, and U = A⁻¹.

    Raises:
        InputError: not even a diagonal as large as its own mean makes H positive definite.
    """
    reason, share = why_singular(statistics), DAMPING
    while share <= MOST_DAMPING:
        # At most three matrices of the size of H live at once beside it.
        factor = cholesky(damped(statistics, share).flip(0, 1))
        if factor is not None:
            factor = factor.flip(0, 1)
            identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
            return torch.linalg.solve_triangular(factor, identity, upper=True), damping_note(reason, share)
        reason, share = reason or "its rounding errors outweigh its smallest eigenvalue", 10 * share
    raise InputError("XᵀX cannot be factored even when damped by its mean diagonal, expected finite inputs of like scale; check the data")


def damping_note(reason: str, share: float) -> tuple[str, ...]:
    """Return the sentence that says a singular Hessian was damped, or nothing where it was sound."""
    return (f"Hessian singular ({reason}), damped by {100 * share:g} % of its mean diagonal",) if reason else ()


def output_errors(matrix: Tensor, new: Tensor, statistics: Statistics) -> tuple[float, float]:
    """Return ‖X(Ŵ − W)ᵀ‖² = tr(ΔHΔᵀ) and ‖XWᵀ‖² = tr(WHWᵀ), H undamped, in the precision of H."""
    assert statistics.hessian is not None
    hessian = statistics.hessian
    dense, change = matrix.to(hessian.dtype), (new - matrix).to(hessian.dtype)
    return float(((change @ hessian) * change).sum()), float(((dense @ hessian) * dense).sum())
