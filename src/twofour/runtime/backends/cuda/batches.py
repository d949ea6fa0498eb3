"""Which of the plan's batch sizes run a given number of items."""

from collections.abc import Sequence
from dataclasses import dataclass

from twofour.errors import InputError


@dataclass(frozen=True)
class Chunk:
    """`count` items from item `first` on, run as a batch of `batch` (the rest of it padding)."""

    first: int
    count: int
    batch: int


def chunks(items: int, batches: Sequence[int]) -> list[Chunk]:
    """Return how `items` are run: in chunks of the largest batch, the rest in the smallest that holds it.

    Raises:
        InputError: there are no items, or the plan has no batch size.
    """
    if items < 1 or not batches:
        raise InputError(f"engine: {items} items and the batch sizes {list(batches)}, expected at least one of both")
    most, found, first = max(batches), [], 0
    while items - first > most:
        found.append(Chunk(first, most, most))
        first += most
    rest = items - first
    found.append(Chunk(first, rest, min(b for b in batches if b >= rest)))
    return found
