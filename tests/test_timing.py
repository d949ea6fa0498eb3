"""The protocol: interleaved, bounded, honest percentiles."""

import time

import pytest

from twofour.timing import Timing, time_interleaved


def test_candidates_take_turns_and_each_gets_the_same_number() -> None:
    order: list[str] = []
    timings = time_interleaved({name: lambda name=name: order.append(name) for name in "abc"}, seconds=0.01, min_samples=30, max_samples=30)
    taken = order[-90:]
    assert all(sorted(taken[i : i + 3]) == ["a", "b", "c"] for i in range(0, 90, 3))
    # Each goes first in a third of the turns.
    assert all(taken[::3].count(name) == 10 for name in "abc")
    assert {t.num_samples for t in timings.values()} == {30}


def test_a_slower_candidate_measures_slower() -> None:
    timings = time_interleaved({"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}, seconds=0.2)
    assert timings["slow"].median > 2 * timings["fast"].median
    assert timings["slow"].median >= 0.004


def test_percentiles_and_spread_of_known_samples() -> None:
    timing = Timing("x", tuple(float(i) for i in range(1, 102)))
    assert timing.median == 51
    assert timing.percentile(90) == 91
    assert timing.spread == pytest.approx(80 / 51)
    assert "n 101" in str(timing)
