"""Scaled dot-product attention, in float64."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def attention(q: Array, k: Array, v: Array, scale: float, *, causal: bool = False) -> Array:
    """Return `softmax(scale q . k^T) . v`, `[batch, heads, tokens, head]`; causal: token t sees keys 0 .. t."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    scores = scale * (q @ k.swapaxes(-1, -2))
    if causal:
        scores = np.where(np.tri(scores.shape[-2], scores.shape[-1], dtype=bool), scores, -np.inf)
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return np.asarray((e / e.sum(-1, keepdims=True)) @ v)
