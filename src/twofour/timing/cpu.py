"""Timing of calls that return when their work is done (CPU backends, whole requests)."""

import gc
import time
from collections.abc import Callable, Mapping

from twofour.timing.record import Timing


def time_interleaved(
    candidates: Mapping[str, Callable[[], object]], *, seconds: float = 2.0, min_samples: int = 30, max_samples: int = 2000
) -> dict[str, Timing]:
    """Return one Timing a candidate, taken in turn (a b c, b c a, …), so that a drift of the machine meets all alike.

    Each candidate first runs for a tenth of the time as a warm-up. Sampling ends after `seconds` in all, with at least `min_samples`
    and at most `max_samples` a candidate. The garbage collector rests meanwhile.
    """
    names = list(candidates)
    for name in names:
        until = time.perf_counter() + seconds / (10 * len(names))
        candidates[name]()
        while time.perf_counter() < until:
            candidates[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        turn = 0
        while turn < max_samples and (turn < min_samples or time.perf_counter() < end):
            for i in range(len(names)):
                name = names[(turn + i) % len(names)]
                start = time.perf_counter()
                candidates[name]()
                samples[name].append(time.perf_counter() - start)
            turn += 1
    finally:
        if was_enabled:
            gc.enable()
    return {name: Timing(name, tuple(taken)) for name, taken in samples.items()}
