"""Batch sizes as a caller gives them."""

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from twofour.errors import InputError
from twofour.exchange.importer import LARGEST_BATCH


def batch_sizes(batch: int | Sequence[int], where: str) -> tuple[int, ...]:
    """Return the batch sizes in `batch`: one whole number, or several.

    Raises:
        InputError: it is neither, or a size that no axis of a tensor has; `where` names the caller.
    """
    # NOTE: bytes are a sequence of whole numbers, too.
    given: Iterable[Any] = (batch,) if isinstance(batch, int | np.integer | str | bytes) else batch
    try:
        sizes = tuple(operator.index(size) for size in given)
    except TypeError as error:
        raise InputError(f"{where}: batch is {batch!r}, expected a whole number such as 32, or several such as [1, 32]") from error
    for size in sizes:
        if not 1 <= size <= LARGEST_BATCH:
            raise InputError(f"{where}: batch is {size}, expected 1 to {LARGEST_BATCH}")
    return sizes
