"""The matrix product with its epilogue, in float64."""

from collections.abc import Callable
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError, nearest

Array = npt.NDArray[np.float64]

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "none": lambda y: y,
    "relu": lambda y: np.where(y < 0, 0.0, y),
    "relu6": lambda y: np.clip(y, 0.0, 6.0),
    "gelu": lambda y: 0.5 * y * (1.0 + np.vectorize(erf, otypes=[np.float64])(y / np.sqrt(2.0))),
    "gelu_tanh": lambda y: 0.5 * y * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (y + 0.044715 * y**3))),
    "silu": lambda y: y / (1.0 + np.exp(-y)),
    "hardswish": lambda y: y * np.clip(y + 3.0, 0.0, 6.0) / 6.0,
}


def product(x: npt.NDArray[Any], weight: npt.NDArray[Any], *, sparse: bool) -> Array:
    """Return `x . weight^T`; with `sparse`, zeros of the weight are skipped as the tensor cores skip them.

    An infinity or NaN of x at a skipped position does not reach the result, where a dense product gives NaN. Of a group of four with fewer
    than two non-zeros the lowest zero positions are multiplied, because the hardware always multiplies two.

    Args:
        x: `[tokens, inputs]`. weight: `[rows, inputs]`, inputs a multiple of 4 if `sparse`.
    """
    x64, w64 = x.astype(np.float64), weight.astype(np.float64)
    if not sparse:
        return np.asarray(x64 @ w64.T)
    kept = multiplied(w64)
    out = np.empty((x64.shape[0], w64.shape[0]))
    for row in range(w64.shape[0]):
        out[:, row] = x64[:, kept[row]] @ w64[row, kept[row]]
    return out


def multiplied(weight: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which two of every four weights along the last axis are multiplied: the non-zeros, then the lowest positions."""
    kept = weight != 0
    groups = kept.reshape(*kept.shape[:-1], -1, 4)
    for position in range(4):
        missing = groups.sum(-1) < 2
        groups[..., position] |= missing
    return np.asarray(groups.reshape(kept.shape))


def gemm(
    x: npt.NDArray[Any],
    weight: npt.NDArray[Any],
    *,
    sparse: bool = True,
    activation: str = "none",
    scale: npt.NDArray[Any] | None = None,
    bias: npt.NDArray[Any] | None = None,
    residual: npt.NDArray[Any] | None = None,
    gated: bool = False,
) -> Array:
    """Return `activation(x . weight^T * scale + bias + residual)`; gated: `activation(gate) * up`, gates the first half of the rows.

    Args:
        x: `[tokens, inputs]`. weight: `[rows, inputs]`. scale, bias: `[rows]`. residual: `[tokens, rows]`, not with `gated`.

    Raises:
        InputError: the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}{nearest(activation, ACTIVATIONS)}")
    y = product(x, weight, sparse=sparse)
    if scale is not None:
        y = y * scale.astype(np.float64)
    if bias is not None:
        y = y + bias.astype(np.float64)
    if residual is not None:
        y = y + residual.astype(np.float64)
    act = ACTIVATIONS[activation]
    if not gated:
        return np.asarray(act(y))
    half = y.shape[1] // 2
    return np.asarray(act(y[:, :half]) * y[:, half:])
