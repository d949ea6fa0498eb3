"""Reductions and normalisations, in float64."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def reduce(x: Array, kind: str, eps: float = 0.0, scale: Array | None = None, bias: Array | None = None) -> Array:
    """Return `kind` of x `[rows, length, inner]` along `length`.

    mean, sum, max, l2 give `[rows, inner]`; softmax, layernorm and rmsnorm the shape of x, scale and bias being `[length]`.
    """
    x = np.asarray(x, np.float64)
    if kind in ("mean", "sum", "max"):
        return np.asarray(x.mean(1) if kind == "mean" else x.sum(1) if kind == "sum" else x.max(1))
    if kind == "l2":
        return np.asarray(np.sqrt((x * x).sum(1)))
    if kind == "softmax":
        e = np.exp(x - x.max(1, keepdims=True))
        return np.asarray(e / e.sum(1, keepdims=True))
    shift = x.mean(1, keepdims=True) if kind == "layernorm" else 0.0
    y = (x - shift) / np.sqrt(((x - shift) ** 2).mean(1, keepdims=True) + eps)
    for vector, apply in ((scale, np.multiply), (bias, np.add)):
        if vector is not None:
            y = apply(y, np.asarray(vector, np.float64)[None, :, None])
    return np.asarray(y)
