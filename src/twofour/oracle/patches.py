"""Blocks of an image's pixels gathered into channels, element by element."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def patches(x: Array, out_height: int, out_width: int, out_channels: int, block: tuple[int, int], top: int = 0, left: int = 0) -> Array:
    """Return y `[batch, out_height, out_width, out_channels]` of x `[batch, height, width, channels]`, float64.

    y[n, i, j, (a * block_w + b) * channels + c] = x[n, i * block_h + a - top, j * block_w + b - left, c], 0 outside and behind.
    """
    batch, height, width, channels = x.shape
    y = np.zeros((batch, out_height, out_width, out_channels))
    for a in range(block[0]):
        for b in range(block[1]):
            first = (a * block[1] + b) * channels
            rows = np.arange(out_height) * block[0] + a - top
            columns = np.arange(out_width) * block[1] + b - left
            i, j = np.flatnonzero((rows >= 0) & (rows < height)), np.flatnonzero((columns >= 0) & (columns < width))
            y[:, i[:, None], j, first : first + channels] = x[:, rows[i][:, None], columns[j]]
    return y
