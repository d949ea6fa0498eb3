"""`prune`: examine, choose, set to zero, record."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError, nearest
from twofour.pruning.capture import execute
from twofour.pruning.eligibility import examine
from twofour.pruning.magnitude import magnitude_mask
from twofour.pruning.record import Pruning

METHODS: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": magnitude_mask}


def prune(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    method: str = "magnitude",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> Pruning:
    """Prune the eligible weights of `model` to 2:4 in place and return the record.

    Every pruned value becomes exactly +0. The model is left as it was if anything is refused.

    Args:
        example_inputs: positional arguments for one call of the model, first axis the batch.
        include: globs of layers to prune although the default leaves them dense (first convolution, classifier).
        exclude: globs of layers to leave dense.

    Raises:
        InputError: unknown method, a glob that matches nothing, no eligible layer, a weight with NaN or infinity.
    """
    if method not in METHODS:
        raise InputError(f"pruning method {method!r} is unknown, expected one of {sorted(METHODS)}{nearest(method, METHODS)}")
    execution = execute(model, example_inputs)
    records = examine(model, execution, include, exclude)
    if not any(record.eligible for record in records):
        raise InputError(
            f"the model has no layer that can be 2:4: {'; '.join(f'{r.name}: {r.reason}' for r in records[:5]) or 'no weights'}"
        )
    parameters = dict(model.named_parameters())
    masks: dict[str, Tensor] = {}
    layers = []
    for record in records:
        if record.eligible:
            weight = parameters[record.name].detach()
            if not bool(torch.isfinite(weight.float()).all()):
                raise InputError(f"weight {record.name!r} holds NaN or infinity, expected finite values; load a sound checkpoint")
            mask = METHODS[method](weight)
            magnitude = weight.double().abs()
            total = float(magnitude.sum())
            record = replace(record, kept_magnitude=float(magnitude[mask].sum()) / total if total else 1.0)
            masks[record.name] = mask
        layers.append(record)
    with torch.no_grad():
        for name, mask in masks.items():
            parameters[name].masked_fill_(~mask, 0)
    return Pruning(method, tuple(layers), masks, (execution.note,) if execution.note else ())
