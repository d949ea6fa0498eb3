"""The compiled inner loops of the search.

For a group of four columns with one taken out, the two largest of the remaining three decide everything: with x >= y the larger two, a
column w in the hole keeps x + max(y, w) of a row. So each column carries `second` (y for the other three of its group, one a row) and
`base` (the sum of x over rows), and any exchange is judged by sums of max(y, w) alone.

All of it is in fixed point: whole numbers add up to the same in any order, so the compiler may vectorise the sums as it likes, and code
just compiled, code from numba's cache and code for another processor find the same order.
"""

# mypy: disable-error-code="untyped-decorator, assignment"

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Fixed = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

LARGEST = 2**31 - 1


def fixed_point(columns: Floats) -> Fixed:
    """Return round(columns · s), s the largest scale at which no sum of four columns leaves int32.

    With R rows and columns of like size, s is 2^29 / (R · mean): an element is off by at most R / 2^30 of the mean, and a sum by less
    than a float32 sum would be.

    Args:
        columns: non-negative and finite, `[columns, rows]`.
    """
    sums = np.sort(columns.sum(axis=1, dtype=np.float64))
    largest = float(sums[-4:].sum())
    # Rounding adds at most half a unit an element.
    room = LARGEST - 2 * columns.shape[1]
    scale = room / largest if largest > 0 else 1.0
    return np.rint(columns * np.float64(scale)).astype(np.int32)


# numba widens sums of int32 to int64, which would halve the vectors; `fixed_point` leaves them room in int32.
@numba.njit(cache=True, inline="always")
def _sum_max(a: Any, b: Any) -> Any:
    total = np.int32(0)
    for r in range(a.shape[0]):
        total = np.int32(total + max(a[r], b[r]))
    return total


@numba.njit(cache=True)
def refresh(columns: Fixed, order: Ints, group: int, second: Fixed, base: Fixed, kept: Fixed) -> None:
    """Recompute `second`, `base` and `kept` for the four columns of a group."""
    for k in range(4):
        column = order[4 * group + k]
        a = columns[order[4 * group + (k + 1) % 4]]
        b = columns[order[4 * group + (k + 2) % 4]]
        c = columns[order[4 * group + (k + 3) % 4]]
        y = second[column]
        total = np.int32(0)
        for r in range(a.shape[0]):
            high, low = max(a[r], b[r]), min(a[r], b[r])
            y[r] = max(low, min(high, c[r]))
            total = np.int32(total + max(high, c[r]))
        base[column] = total
    column = order[4 * group]
    kept[group] = base[column] + _sum_max(second[column], columns[column])


@numba.njit(cache=True)
def refresh_all(columns: Fixed, order: Ints, second: Fixed, base: Fixed, kept: Fixed) -> int:
    """Recompute every group; returns the magnitude kept."""
    total = np.int64(0)
    for group in range(order.shape[0] // 4):
        refresh(columns, order, group, second, base, kept)
        total += kept[group]
    return int(total)


@numba.njit(cache=True)
def hole_values(columns: Fixed, holes: Ints, second: Fixed, base: Fixed, out: Floats) -> None:
    """out[g, t] = magnitude group g keeps when column holes[t] fills the hole that holes[g] leaves; in tiles that stay in cache."""
    count, tile = holes.shape[0], 16
    for first in range(0, count, tile):
        for t in range(count):
            w = columns[holes[t]]
            for g in range(first, min(first + tile, count)):
                out[g, t] = base[holes[g]] + _sum_max(second[holes[g]], w)


@numba.njit(cache=True, inline="always")
def _next(state: Any) -> Any:
    """Source: Marsaglia 2003, Xorshift RNGs, triple 13, 7, 17."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return x


@numba.njit(cache=True)
def swap_gains(columns: Fixed, order: Ints, second: Fixed, base: Fixed, kept: Fixed, state: Any, gains: Any) -> None:
    """Gains of random exchanges of two columns of different groups."""
    n = order.shape[0]
    for k in range(gains.shape[0]):
        p = q = 0
        while p // 4 == q // 4:
            p, q = np.int64(_next(state) % np.uint64(n)), np.int64(_next(state) % np.uint64(n))
        s, t = order[p], order[q]
        gains[k] = base[s] + base[t] - kept[p // 4] - kept[q // 4] + _sum_max(second[s], columns[t]) + _sum_max(second[t], columns[s])


@numba.njit(cache=True)
def anneal(
    columns: Fixed,
    order: Ints,
    best_order: Ints,
    second: Fixed,
    base: Fixed,
    kept: Fixed,
    value: Fixed,
    stamp: Any,
    version: Any,
    state: Any,
    totals: Any,
    steps: int,
    hot: float,
    cold: float,
) -> None:
    """Metropolis exchanges of two columns while the temperature falls from `hot` to `cold`.

    `value[s, t]` remembers the sum of max(second[s], t) and `stamp` for which version of s's group; `totals` holds [current, best].
    """
    n = order.shape[0]
    cooling = (cold / hot) ** (64.0 / max(steps, 1))
    temperature = hot
    low = np.uint64(0xFFFFFFFF)
    for step in range(steps):
        if step % 64 == 0:
            temperature *= cooling
        x = _next(state)
        p = np.int64((x >> np.uint64(32)) * np.uint64(n) >> np.uint64(32))
        q = np.int64((x & low) * np.uint64(n) >> np.uint64(32))
        g, h = p >> 2, q >> 2
        if g == h:
            continue
        s, t = order[p], order[q]
        if stamp[s, t] != version[s]:
            value[s, t] = _sum_max(second[s], columns[t])
            stamp[s, t] = version[s]
        if stamp[t, s] != version[t]:
            value[t, s] = _sum_max(second[t], columns[s])
            stamp[t, s] = version[t]
        gain = base[s] + base[t] - kept[g] - kept[h] + value[s, t] + value[t, s]
        # Beyond twelve temperatures the chance is below 1 in 100,000.
        if gain <= -12 * temperature:
            continue
        if gain > 0 or np.float64(_next(state) >> np.uint64(11)) * 2.0**-53 < np.exp(gain / temperature):
            order[p], order[q] = t, s
            refresh(columns, order, g, second, base, kept)
            refresh(columns, order, h, second, base, kept)
            for k in range(4):
                version[order[4 * g + k]] += 1
                version[order[4 * h + k]] += 1
            totals[0] += gain
            if totals[0] > totals[1]:
                totals[1] = totals[0]
                best_order[:] = order
