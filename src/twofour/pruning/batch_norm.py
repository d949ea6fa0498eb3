"""Batch-norm after pruning: where its statistics are measured anew, and what the calibration data must reach."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from twofour.errors import InputError
from twofour.pruning.calibration import STATISTICS, tensors_in, tracked_norms
from twofour.pruning.calibration import reestimate_batchnorm as measure_all
from twofour.pruning.record import Pruning

# The methods that change the values they keep, so that each layer gives nearly what the dense one gave.
UPDATING = frozenset({"sparsegpt", "alps"})


def why_statistics_stay(method: str) -> str:
    """Return why batch-norm statistics are better left as they are after `method`; empty where measuring them anew helps."""
    if method not in UPDATING:
        return ""
    return f"batch-norm statistics left as they are: after {method} each layer gives nearly what they describe"


def reestimate_batchnorm(model: nn.Module, batches: Iterable[Any], num_inputs: int = 1) -> int:
    """Replace the running statistics of every batch-norm by the plain average over `batches` and return the number of batches.

    mean = Σ mean_b / B, var = Σ var_b / B, over the B batches that reach it, each normalised by its own statistics. A batch-norm that no
    batch reaches, such as that of a head used in training only, keeps its statistics. Nothing else changes: parameters, momentum and
    training modes stay as they were, dropout is off. If anything fails the old statistics are put back.

    Args:
        batches: tensors; tuples or lists whose first `num_inputs` items are the model's inputs (labels after them are ignored); or
            dicts of keyword arguments. Moved to the model's device.

    Raises:
        InputError: no batch, a batch that cannot be run or is too small for batch statistics, statistics that are not finite, or data
            that reach no batch-norm at all.
    """
    return measured_anew(model, batches, num_inputs)[0]


def measured_anew(model: nn.Module, batches: Iterable[Any], num_inputs: int) -> tuple[int, str]:
    """Re-estimate as `reestimate_batchnorm` does; return the number of batches and the note on what was done."""
    norms = tracked_norms(model)
    before = {name: {s: getattr(norm, s).clone() for s in STATISTICS} for name, norm in norms.items()}
    unreached = dict(norms)

    def watched(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, positional: Any, named: Any) -> None:
            if holds_items([positional, named]):
                unreached.pop(name, None)

        return hook

    handles = [norm.register_forward_pre_hook(watched(name), with_kwargs=True) for name, norm in norms.items()]
    try:
        # A batch without items would count in the average and leave its share of the statistics at their reset.
        count = measure_all(model, (batch for batch in batches if not tensors_in(batch) or holds_items(batch)), num_inputs)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for name, norm in unreached.items():
            for statistic, value in before[name].items():
                getattr(norm, statistic).copy_(value)
    if norms and len(unreached) == len(norms):
        raise InputError(f"calibration never reaches batch-norm {next(iter(norms))!r}, expected batches that use it; give such batches")
    stay = f"; those of {', '.join(map(repr, unreached))} stay, as no batch reaches them" if unreached else ""
    return count, f"batch-norm statistics re-estimated on {count} batches{stay}"


def holds_items(value: Any) -> bool:
    """Whether a tensor in `value` has elements."""
    return any(tensor.numel() for tensor in tensors_in(value))


def settle_norms(model: nn.Module, record: Pruning, batches: Callable[[], Iterable[Any]], num_inputs: int) -> tuple[Pruning, bool]:
    """Re-estimate batch-norm where that helps after the record's method; return the record with a note of it, and whether it was done.

    For a model that is evaluated between pruning and re-estimation; `batches` is called only if they are needed.
    """
    if not tracked_norms(model):
        return record, False
    note = why_statistics_stay(record.method)
    done = not note
    if done:
        note = measured_anew(model, batches(), num_inputs)[1]
    return replace(record, notes=(*record.notes, note)), done
