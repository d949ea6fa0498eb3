"""The convolution of NHWC images with its epilogue, in float64."""

from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.oracle.pointwise import OPERATIONS

Array = npt.NDArray[Any]


def conv(
    x: Array,
    weight: Array,
    *,
    strides: tuple[int, int] = (1, 1),
    pads: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilations: tuple[int, int] = (1, 1),
    groups: int = 1,
    bias: Array | None = None,
    residual: Array | None = None,
    activation: str = "none",
) -> Array:
    """Return `activation(conv(x, weight) + bias + residual)`.

    Args:
        x: `[batch, height, width, inputs]`. weight: `[outputs, kh, kw, inputs / groups]`. bias: `[outputs]`. residual: as the output.
    """
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    top, left, bottom, right = pads
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    outputs, kernel_height, kernel_width, depth = weight.shape
    out_height = (padded.shape[1] - dilations[0] * (kernel_height - 1) - 1) // strides[0] + 1
    out_width = (padded.shape[2] - dilations[1] * (kernel_width - 1) - 1) // strides[1] + 1
    y = np.zeros((x.shape[0], out_height, out_width, outputs))
    share = outputs // groups
    for r in range(kernel_height):
        for s in range(kernel_width):
            rows = slice(r * dilations[0], r * dilations[0] + (out_height - 1) * strides[0] + 1, strides[0])
            columns = slice(s * dilations[1], s * dilations[1] + (out_width - 1) * strides[1] + 1, strides[1])
            for g in range(groups):
                window = padded[:, rows, columns, g * depth : (g + 1) * depth]
                y[..., g * share : (g + 1) * share] += window @ weight[g * share : (g + 1) * share, r, s].T
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    if residual is not None:
        y = y + np.asarray(residual, np.float64)
    if activation == "relu6":
        return np.asarray(np.clip(y, 0.0, 6.0))
    return y if activation == "none" else np.asarray(OPERATIONS[activation](y))
