"""The choice of N in M as compiled loops, for weights too large for passes of NumPy over memory.

Every loop releases the GIL and is split over plain threads: no thread pool of a compiler's runtime is started, so it is safe to call from
several threads and after a fork. Compiled code is cached beside this file, or in the user's cache folder where that is read-only.

This module imports numba; `mask.py` imports it on first need and does without when it is absent.
"""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Loop = TypeVar("Loop", bound=Callable[..., None])
# A thread is worth its start above this many elements.
ELEMENTS_PER_THREAD = 1 << 20


def jit(loop: Loop) -> Loop:
    """Return the loop compiled on first call for each kind of arguments."""
    compiled: Loop = numba.njit(cache=True, nogil=True)(loop)
    return compiled


@jit
def two_of_four_rows(bits: Array, words: Array, start: int, stop: int, magnitude: int) -> None:
    # bits [groups, 4] unsigned, words [groups] uint32: byte i of a word is the mask of element i
    for g in range(start, stop):
        a, b, c, d = bits[g, 0] & magnitude, bits[g, 1] & magnitude, bits[g, 2] & magnitude, bits[g, 3] & magnitude
        ab, ac, ad = np.uint32(a >= b), np.uint32(a >= c), np.uint32(a >= d)
        bc, bd, cd = np.uint32(b >= c), np.uint32(b >= d), np.uint32(c >= d)
        keep_a = np.uint32(ab + ac + ad >= 2)
        keep_b = np.uint32(bc + bd + 1 >= 2 + ab)
        keep_c = np.uint32(cd >= ac + bc)
        keep_d = np.uint32(ad + bd + cd <= 1)
        words[g] = keep_a | keep_b << np.uint32(8) | keep_c << np.uint32(16) | keep_d << np.uint32(24)


@jit
def two_of_four_planes(bits: Array, kept: Array, start: int, stop: int, magnitude: int) -> None:
    # bits, kept [groups, 4, inner]
    for g in range(start, stop):
        for s in range(bits.shape[2]):
            a, b, c, d = bits[g, 0, s] & magnitude, bits[g, 1, s] & magnitude, bits[g, 2, s] & magnitude, bits[g, 3, s] & magnitude
            ab, ac, ad = np.uint8(a >= b), np.uint8(a >= c), np.uint8(a >= d)
            bc, bd, cd = np.uint8(b >= c), np.uint8(b >= d), np.uint8(c >= d)
            kept[g, 0, s] = ab + ac + ad >= 2
            kept[g, 1, s] = bc + bd + 1 >= 2 + ab
            kept[g, 2, s] = cd >= ac + bc
            kept[g, 3, s] = ad + bd + cd <= 1


@jit
def n_of_m(bits: Array, kept: Array, start: int, stop: int, magnitude: int, n: int) -> None:
    # bits, kept [groups, m, inner]
    m = bits.shape[1]
    for g in range(start, stop):
        for s in range(bits.shape[2]):
            for i in range(m):
                own = bits[g, i, s] & magnitude
                beaten_by = 0
                for j in range(m):
                    other = bits[g, j, s] & magnitude
                    beaten_by += (other >= own) if j < i else (other > own)
                kept[g, i, s] = beaten_by < n


def in_threads(loop: Callable[[int, int], Any], count: int, elements: int) -> None:
    """Run `loop(start, stop)` over `count` items, split over the cores this process may use; `elements` is the work in all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = max(1, min(cores, elements // ELEMENTS_PER_THREAD))
    if threads == 1:
        loop(0, count)
        return
    bounds = [count * t // threads for t in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(loop, start, stop) for start, stop in itertools.pairwise(bounds)]:
            done.result()


def select_groups(bits: Array, n: int) -> npt.NDArray[np.bool_]:
    """Return the mask of the `n` largest of each group, ties to the lower index; `bits` `[groups, m, inner]`, unsigned, C-contiguous."""
    count, m, inner = bits.shape
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    kept = np.empty(bits.shape, np.bool_)
    if (n, m) == (2, 4) and inner == 1:
        flat, words = bits.reshape(count, 4), kept.reshape(-1).view(np.uint32)
        in_threads(lambda start, stop: two_of_four_rows(flat, words, start, stop, magnitude), count, bits.size)
    elif (n, m) == (2, 4):
        in_threads(lambda start, stop: two_of_four_planes(bits, kept, start, stop, magnitude), count, bits.size)
    else:
        in_threads(lambda start, stop: n_of_m(bits, kept, start, stop, magnitude, n), count, bits.size)
    return kept


@jit
def best_tiles(tiled: Array, rows: Array, pairs: Array, chosen: Array, start: int, stop: int) -> None:
    # tiled [out/4, 4, in/4, 4, inner], rows [90, 4], pairs [6, 2], chosen [out/4, in/4, inner]
    sums = np.empty((4, 6), np.float64)
    for o in range(start, stop):
        for i in range(tiled.shape[2]):
            for s in range(tiled.shape[4]):
                for r in range(4):
                    for p in range(6):
                        sums[r, p] = abs(np.float64(tiled[o, r, i, pairs[p, 0], s])) + abs(np.float64(tiled[o, r, i, pairs[p, 1], s]))
                best, best_tile = -1.0, 0
                for t in range(rows.shape[0]):
                    score = (sums[0, rows[t, 0]] + sums[1, rows[t, 1]]) + (sums[2, rows[t, 2]] + sums[3, rows[t, 3]])
                    if score > best:
                        best, best_tile = score, t
                chosen[o, i, s] = best_tile


def select_tiles(tiled: Array, rows: Array, pairs: Array) -> npt.NDArray[np.uint8]:
    """Return the index of the best tile, `[out/4, in/4, inner]`; `tiled` float32 or float64 `[out/4, 4, in/4, 4, inner]`."""
    chosen = np.empty((tiled.shape[0], tiled.shape[2], tiled.shape[4]), np.uint8)
    in_threads(lambda start, stop: best_tiles(tiled, rows, pairs, chosen, start, stop), len(tiled), 90 * tiled.size)
    return chosen
