"""What a method is and what it gives back."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from twofour.errors import InputError, nearest
from twofour.pattern import Pattern
from twofour.pruning.magnitude import pattern_mask
from twofour.pruning.methods.hessian import output_errors
from twofour.pruning.statistics import Part, Statistics, flatten, unflatten


@dataclass(frozen=True)
class Choice:
    """What a method decided about one weight.

    Attributes:
        mask: bool, True where kept, of the weight's shape.
        weight: the new values, +0 where dropped; None where the kept values stay as they are.
        notes: what the user should know, such as a damped Hessian.
        output_error: ‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖² over the calibration data; None where XᵀX was not needed.
    """

    mask: Tensor
    weight: Tensor | None = None
    notes: tuple[str, ...] = ()
    output_error: float | None = None


@dataclass(frozen=True)
class Method:
    """Either a score, of which the pattern keeps the largest, or a function that chooses by XᵀX; neither: the magnitude.

    Attributes:
        score: (matrix, statistics) -> non-negative importance of every value, `[out, columns]`; needs the squares of the inputs.
        choose: (matrix, statistics, pattern) -> choice; needs XᵀX.
    """

    score: Callable[[Tensor, Statistics], Tensor] | None = None
    choose: Callable[[Tensor, Statistics, Pattern], Choice] | None = None

    @property
    def is_calibrated(self) -> bool:
        """Whether it looks at data."""
        return self.score is not None or self.choose is not None

    @property
    def has_hessian(self) -> bool:
        """Whether it needs XᵀX."""
        return self.choose is not None


def find_method(name: str, methods: dict[str, Method]) -> Method:
    """Return the method called `name`.

    Raises:
        InputError: there is none.
    """
    if name not in methods:
        raise InputError(f"pruning method {name!r} is unknown, expected one of {sorted(methods)}{nearest(name, methods)}")
    return methods[name]


def matrix_of(weight: Tensor) -> Tensor:
    """Return the weight as `[out, columns]` in the precision of the computation: float64 stays, the rest is float32."""
    return flatten(weight.detach() if weight.dtype == torch.float64 else weight.detach().float())


def scores_of(weight: Tensor, parts: list[Part], method: Method) -> Tensor:
    """Return the scores of a weight `[out, in, *kernel]`, of its shape."""
    assert method.score is not None
    matrix = matrix_of(weight)
    scores = [method.score(matrix[p.start : p.stop], p.statistics) for p in sorted(parts, key=lambda p: p.start)]
    return unflatten(torch.cat(scores), weight.shape)


def choose(weight: Tensor, parts: list[Part], method: Method, pattern: Pattern) -> Choice:
    """Return what `method` decides about a weight `[out, in, *kernel]`; the weight is not changed.

    Raises:
        InputError: the new values do not fit the weight's format.
    """
    if not method.is_calibrated:
        return Choice(pattern_mask(weight.detach(), pattern))
    if method.choose is None:
        return Choice(pattern_mask(scores_of(weight, parts, method), pattern))
    matrix, parts = matrix_of(weight), sorted(parts, key=lambda p: p.start)
    choices = [method.choose(matrix[p.start : p.stop], p.statistics, pattern) for p in parts]
    mask = torch.cat([c.mask for c in choices])
    new = matrix * mask if choices[0].weight is None else torch.cat([c.weight for c in choices if c.weight is not None])
    new = new.to(weight.dtype)
    if not bool(torch.isfinite(new).all()):
        raise InputError(f"the new values do not fit {weight.dtype}, expected finite ones; use a method without update such as 'wanda'")
    pairs = [output_errors(matrix[p.start : p.stop], new[p.start : p.stop].to(matrix.dtype), p.statistics) for p in parts]
    error, total = (sum(values) for values in zip(*pairs, strict=True))
    notes = tuple(dict.fromkeys(note for c in choices for note in c.notes))
    updated = None if choices[0].weight is None else unflatten(new, weight.shape)
    return Choice(unflatten(mask, weight.shape), updated, notes, error / total if total > 0 else 0.0)
