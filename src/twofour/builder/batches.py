"""Batch sizes: those that a caller gives, and those that are meant where none are given."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from twofour.errors import InputError
from twofour.exchange.importer import LARGEST_BATCH, fixed_batches

BATCHES = (1, 32)  # predicted and measured for where neither the caller nor the file says which


def batch_sizes(batch: int | Sequence[int] | None, where: str, *, least: int = 1) -> tuple[int, ...]:
    """Return the batch sizes in `batch`: one whole number, or several, at least `least`; nothing where it is None, not given.

    Raises:
        InputError: it is neither, or holds too few, or a size that no axis of a tensor has; `where` names the caller.
    """
    if batch is None:
        return ()
    # NOTE: bytes are a sequence of whole numbers, too.
    given: Iterable[Any] = (batch,) if isinstance(batch, int | np.integer | str | bytes) else batch
    try:
        sizes = tuple(operator.index(size) for size in given)
    except TypeError as error:
        raise InputError(f"{where}: batch is {batch!r}, expected a whole number such as 32, or several such as [1, 32]") from error
    for size in sizes:
        if not 1 <= size <= LARGEST_BATCH:
            raise InputError(f"{where}: batch is {size}, expected 1 to {LARGEST_BATCH}")
    if len(sizes) < least:
        raise InputError(f"{where}: no batch size is given, expected at least one")
    return sizes


def default_batches(model: ir.Model, otherwise: tuple[int, ...]) -> tuple[int, ...]:
    """Return the batch sizes that are meant where none are given: the one that the model was exported for, else `otherwise`."""
    return tuple(size for size in fixed_batches(model)[:1] if size > 0) or otherwise
