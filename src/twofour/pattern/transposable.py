"""Masks that are 2:4 along both axes, so that a weight and its transpose both run sparse (forward and backward pass).

A 4×4 tile has 90 masks with two kept in every row and every column. All are scored, so the choice is the best there is.

Source: Hubara et al. 2021, "Accelerated Sparse Neural Training", arXiv 2102.08124.
"""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.pattern.mask import loops_for

Array = npt.NDArray[Any]

ROW_PAIRS = tuple(itertools.combinations(range(4), 2))


def tile_rows() -> npt.NDArray[np.int64]:
    """Return the 90 tiles as `[90, 4]` indices into `ROW_PAIRS`, one a row, in lexicographic order."""
    tiles = []
    for rows in itertools.product(range(6), repeat=4):
        columns = [column for row in rows for column in ROW_PAIRS[row]]
        if all(columns.count(column) == 2 for column in range(4)):
            tiles.append(rows)
    return np.array(tiles, np.int64)


TILE_ROWS = tile_rows()
TILES = np.zeros((len(TILE_ROWS), 4, 4), np.bool_)  # [90, row, column]
for _tile, _rows in enumerate(TILE_ROWS):
    for _row, _pair in enumerate(_rows):
        TILES[_tile, _row, list(ROW_PAIRS[_pair])] = True


def select_transposable(weight: Array) -> npt.NDArray[np.bool_]:
    """Return the mask, True where kept, with two kept in every four along axis 1 and in every four along axis 0.

    score(tile) = Σ |w kept|, summed in float64 as ((row 0 + row 1) + (row 2 + row 3)); of equal scores the first tile in lexicographic
    order is taken. Sums of fp16 and fp8 values are exact, so the mask is the best; for fp32 and bf16 it is within 1e-15 of the best.

    Args:
        weight: floating `[out, in, *kernel]`, both axes multiples of 4; tiles are taken at each kernel position.

    Raises:
        InputError: an axis is not a multiple of 4.
    """
    if weight.ndim < 2 or weight.shape[0] % 4 or weight.shape[1] % 4:
        raise InputError(f"weight of shape {list(weight.shape)} cannot be transposable 2:4, expected axes 0 and 1 to be multiples of 4")
    if not weight.size:
        return np.zeros(weight.shape, np.bool_)
    inner = int(np.prod(weight.shape[2:]))
    tiled = np.ascontiguousarray(weight).reshape(weight.shape[0] // 4, 4, weight.shape[1] // 4, 4, inner)
    loops = loops_for(weight.size)
    if loops is not None:
        if tiled.dtype not in (np.float32, np.float64):
            tiled = tiled.astype(np.float32)
        chosen = loops.select_tiles(tiled, TILE_ROWS, np.array(ROW_PAIRS, np.int64))
    else:
        chosen = np.stack([_best_tiles(block) for block in tiled])
    kept = TILES[chosen]  # [out/4, in/4, inner, row, column]
    return np.ascontiguousarray(kept.transpose(0, 3, 1, 4, 2)).reshape(weight.shape)


def _best_tiles(block: Array) -> npt.NDArray[np.uint8]:
    # block [4, in/4, 4, inner] -> [in/4, inner]
    magnitude = np.abs(block.astype(np.float64))
    pairs = np.stack([magnitude[:, :, a] + magnitude[:, :, b] for a, b in ROW_PAIRS])  # [6, 4, in/4, inner]
    best = np.full(pairs.shape[2:], -1.0)
    chosen = np.zeros(pairs.shape[2:], np.uint8)
    for tile, (r0, r1, r2, r3) in enumerate(TILE_ROWS):
        score = (pairs[r0, 0] + pairs[r1, 1]) + (pairs[r2, 2] + pairs[r3, 3])
        better = score > best
        best[better] = score[better]
        chosen[better] = tile
    return chosen
