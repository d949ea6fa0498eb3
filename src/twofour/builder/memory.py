"""The memory plan: buffers that are not alive at the same time share memory."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

ALIGN_BYTES = 256
ROUNDS = 200


@dataclass(frozen=True)
class Buffer:
    """Memory that is needed from step `first` to step `last`, both included."""

    name: str
    num_bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class MemoryPlan:
    """Where every buffer lies: offsets in bytes, the arena's size, and the most bytes alive at once, which no plan can go below."""

    offsets: dict[str, int]
    peak_bytes: int
    bound_bytes: int

    def __str__(self) -> str:
        over = 100 * (self.peak_bytes / self.bound_bytes - 1) if self.bound_bytes else 0.0
        return f"MemoryPlan({len(self.offsets)} buffers in {self.peak_bytes:,} bytes, {over:.1f} % above the most alive at once)"


def aligned(num_bytes: int) -> int:
    """Return the next multiple of `ALIGN_BYTES`."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES


def lower_bound(buffers: Sequence[Buffer]) -> int:
    """Return the largest sum of aligned sizes alive at one step."""
    changes: dict[int, int] = {}
    for b in buffers:
        changes[b.first] = changes.get(b.first, 0) + aligned(b.num_bytes)
        changes[b.last + 1] = changes.get(b.last + 1, 0) - aligned(b.num_bytes)
    alive = most = 0
    for step in sorted(changes):
        alive += changes[step]
        most = max(most, alive)
    return most


def place(order: Sequence[Buffer]) -> tuple[dict[str, int], int]:
    """Return offsets and peak with every buffer, in this order, in the smallest gap that holds it among those alive with it."""
    placed: list[tuple[int, int, Buffer]] = []  # offset, end
    peak = 0
    for b in order:
        size, end, best, best_gap = aligned(b.num_bytes), 0, -1, -1
        for offset, other_end, other in placed:
            if other.last < b.first or b.last < other.first:
                continue
            gap = offset - end
            if gap >= size and (best < 0 or gap < best_gap):
                best, best_gap = end, gap
            end = max(end, other_end)
        offset = end if best < 0 else best
        placed.append((offset, offset + size, b))
        placed.sort(key=lambda item: item[0])
        peak = max(peak, offset + size)
    return {b.name: offset for offset, _, b in placed}, peak


def plan_memory(buffers: Sequence[Buffer]) -> MemoryPlan:
    """Return offsets for all buffers such that those alive at the same step do not overlap.

    Orders by size, by size × lifetime and by time are tried; then, from the best one on and from a fixed seed, buffers that stick out
    over the lower bound are placed earlier, until none does or `ROUNDS` are over. The same buffers always give the same plan.
    """
    bound = lower_bound(buffers)
    keys: tuple[Callable[[Buffer], tuple[int, ...]], ...] = (
        lambda b: (-b.num_bytes, b.first),
        lambda b: (-b.num_bytes * (b.last - b.first + 1), b.first),
        lambda b: (b.first, -b.num_bytes),
        lambda b: (b.first - b.last, -b.num_bytes),
    )
    tried = [(*place(order), order) for order in (sorted(buffers, key=key) for key in keys)]
    offsets, peak, current = min(tried, key=lambda item: item[1])
    rng = random.Random(0)
    current_offsets = offsets
    for _ in range(ROUNDS):
        if peak == bound:
            break
        # Those that stick out go earlier, where there is still room for them; sometimes another one moves too.
        out = [b for b in current if current_offsets[b.name] + aligned(b.num_bytes) > bound]
        current = [*current]
        for b in [*out, *([rng.choice(current)] if rng.random() < 0.3 else [])]:
            at = current.index(b)
            current.insert(rng.randrange(at + 1), current.pop(at))
        current_offsets, current_peak = place(current)
        if current_peak < peak:
            offsets, peak = current_offsets, current_peak
    return MemoryPlan(offsets, peak, bound)
