"""Which values of every weight are kept and which change: statistics in rounds that fit in memory, then the method, layer by layer.

Nothing is written to the model: every statistic is of the dense network, and a failure leaves nothing to undo.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError
from twofour.pattern import Pattern
from twofour.pruning.calibration import is_out_of_memory, shapes_of
from twofour.pruning.methods.method import Choice, Method, choose, scores_of
from twofour.pruning.statistics import FLOAT64_UP_TO, Part, gather

# XᵀX of as many layers as fit in this are summed in one pass over the calibration data.
ROUND_BYTES = 2 << 30

# (what is done, how many, of how many or None).
Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Calibration:
    """Batches that can be gone through again, and the example inputs that say what the model takes."""

    batches: Iterable[Any]
    example_inputs: tuple[Any, ...]

    @property
    def length(self) -> int | None:
        """Number of batches where it is known beforehand."""
        return len(self.batches) if isinstance(self.batches, Sized) else None


def require_calibration(name: str, method: Method, calibration: Iterable[Any] | None) -> None:
    """Raise InputError for a method that looks at data without any, and for calibration that is no series of batches."""
    if calibration is not None and (isinstance(calibration, (Mapping, str, bytes)) or not is_iterable(calibration)):
        kind = type(calibration).__name__
        raise InputError(f"calibration is of {kind}, expected batches to go through; give a list of batches, [batch] for one")
    if method.is_calibrated and calibration is None:
        raise InputError(f"pruning method {name!r} looks at data, expected calibration batches; give calibration=, or use 'magnitude'")


def is_iterable(value: object) -> bool:
    """Whether a `for` can go through `value`, by its kind alone: a data set may have items and no iterator."""
    return hasattr(type(value), "__iter__") or hasattr(type(value), "__getitem__")


def columns_of(weight: Tensor) -> int:
    """Return the number of columns of `flatten(weight)`."""
    return weight.numel() // weight.shape[0]


def hessian_bytes(columns: int) -> int:
    """Return the size of XᵀX."""
    return columns * columns * (8 if columns <= FLOAT64_UP_TO else 4)


def rounds_of(sizes: dict[str, int], limit: int = ROUND_BYTES) -> list[list[str]]:
    """Return the names in rounds, in order, each of at most `limit` bytes or of one name."""
    rounds: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not rounds or filled + size > limit:
            rounds.append([])
            filled = 0
        rounds[-1].append(name)
        filled += size
    return rounds


def _statistics(
    model: nn.Module, names: Sequence[str], method: Method, calibration: Calibration, progress: Report | None
) -> dict[str, list[Part]]:
    def report(done: int) -> None:
        if progress is not None:
            progress("calibration batch", done, calibration.length)

    inputs = calibration.example_inputs
    return gather(
        model, names, calibration.batches, len(inputs), hessian=method.has_hessian, expected=shapes_of(list(inputs)), progress=report
    )


def permutation_scores(
    model: nn.Module, names: Sequence[str], method: Method, calibration: Calibration | None, progress: Report | None = None
) -> dict[str, Tensor] | None:
    """Return what the permutation search should keep the most of: the scores of a method that has them, else None for magnitudes."""
    if method.score is None or calibration is None:
        return None
    parameters = dict(model.named_parameters())
    parts = _statistics(model, names, method, calibration, progress)
    return {name: scores_of(parameters[name], parts[name], method) for name in names}


def decide(
    model: nn.Module,
    names: Sequence[str],
    method: Method,
    pattern: Pattern,
    calibration: Calibration | None,
    progress: Report | None = None,
) -> dict[str, Choice]:
    """Return the method's choice for each of the weights `names`; the model is not changed.

    Raises:
        InputError: as of `gather`, or no memory to choose.
    """
    parameters = dict(model.named_parameters())
    if method.has_hessian:
        rounds = rounds_of({name: hessian_bytes(columns_of(parameters[name])) for name in names})
    else:
        rounds = [list(names)]
    choices: dict[str, Choice] = {}
    for some in rounds:
        parts = {name: list[Part]() for name in some}
        if method.is_calibrated:
            assert calibration is not None
            parts = _statistics(model, some, method, calibration, progress)
        for name in some:
            choices[name] = chosen(parameters[name], parts.pop(name), method, pattern, name)
            if progress is not None:
                progress("layer", len(choices), len(names))
    return choices


def chosen(weight: Tensor, parts: list[Part], method: Method, pattern: Pattern, name: str) -> Choice:
    """Return `choose`'s result; running out of memory, and what else data can bring about, names the layer.

    Raises:
        InputError: as of `choose`, XᵀX that cannot be decomposed, or no memory.
    """
    try:
        # Under the caller's autocast the products would be of half precision.
        with torch.autocast(weight.device.type, enabled=False):
            return choose(weight, parts, method, pattern)
    except InputError as error:
        raise InputError(f"layer {name!r}: {error}") from error
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"layer {name!r}: XᵀX cannot be decomposed ({reason}), expected finite inputs of like scale; check the data, or use 'wanda'"
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"no memory to choose what layer {name!r} keeps ({columns_of(weight)} inputs); "
            "use method 'wanda', which needs no matrix of the inputs, or exclude it"
        ) from error
