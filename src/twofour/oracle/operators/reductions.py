"""Reductions, softmax and normalizations of ONNX, in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np

from twofour.oracle.operators.common import Array, Attributes, Inputs, Operator, given, integers, needed, wide


def reduced(function: Callable[..., Any]) -> Operator:
    """Return the Reduce operator of a NumPy reduction: axes as input or attribute, all of them by default."""

    def run(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
        x, axes = wide(needed(inputs, 0)), integers(inputs, 1, attributes, "axes")
        if not axes and attributes.get("noop_with_empty_axes", 0):
            return [x]
        return [np.asarray(function(x, axis=tuple(axes) if axes else None, keepdims=bool(attributes.get("keepdims", 1))))]

    return run


def softmax(x: Array, axis: int) -> Array:
    """Return `exp(x) / sum exp(x)` along an axis."""
    e = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(e / e.sum(axis=axis, keepdims=True))


def logsumexp(x: Array, axis: Any, keepdims: bool) -> Array:
    """Return `log sum exp(x)`."""
    top = x.max(axis=axis, keepdims=True)
    y = np.log(np.exp(x - top).sum(axis=axis, keepdims=True)) + top
    return np.asarray(y if keepdims else np.squeeze(y, axis=axis))


def normalized(x: Array, axes: tuple[int, ...], eps: float, *, centred: bool = True) -> Array:
    """Return `(x - mean) / sqrt(variance + eps)` over `axes`; not centred: `x / sqrt(mean of x² + eps)`."""
    y = x - x.mean(axis=axes, keepdims=True) if centred else x
    return np.asarray(y / np.sqrt((y * y).mean(axis=axes, keepdims=True) + eps))


def run_layer_norm(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """LayerNormalization and RMSNormalization (first output) over the axes from `axis` on."""
    x, scale, bias = wide(needed(inputs, 0)), needed(inputs, 1), given(inputs, 2)
    axes = tuple(range(int(attributes.get("axis", -1)) % x.ndim, x.ndim))
    y = normalized(x, axes, attributes.get("epsilon", 1e-5)) * wide(scale)
    return [y if bias is None else y + wide(bias)]


def run_rms_norm(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """RMSNormalization."""
    x = wide(needed(inputs, 0))
    axes = tuple(range(int(attributes.get("axis", -1)) % x.ndim, x.ndim))
    return [normalized(x, axes, attributes.get("epsilon", 1e-5), centred=False) * wide(needed(inputs, 1))]


def per_channel(values: Array, ndim: int) -> Array:
    """Return `[C]` shaped to broadcast over `[N, C, *spatial]`."""
    return wide(values).reshape(1, -1, *[1] * (ndim - 2))


def run_batch_norm(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """BatchNormalization with given statistics."""
    x = wide(needed(inputs, 0))
    scale, bias, mean, variance = (per_channel(needed(inputs, i), x.ndim) for i in range(1, 5))
    return [(x - mean) / np.sqrt(variance + attributes.get("epsilon", 1e-5)) * scale + bias]


def run_instance_norm(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """InstanceNormalization."""
    x = wide(needed(inputs, 0))
    y = normalized(x, tuple(range(2, x.ndim)), attributes.get("epsilon", 1e-5))
    return [y * per_channel(needed(inputs, 1), x.ndim) + per_channel(needed(inputs, 2), x.ndim)]


def run_group_norm(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """GroupNormalization; opset 18 gives one scale a group, opset 21 one a channel."""
    x, groups = wide(needed(inputs, 0)), int(attributes["num_groups"])
    split = x.reshape(x.shape[0], groups, -1)
    y = normalized(split, (2,), attributes.get("epsilon", 1e-5)).reshape(x.shape)
    repeats = [x.shape[1] // v.size if v.size == groups else 1 for v in (needed(inputs, 1), needed(inputs, 2))]
    scale, bias = (np.repeat(needed(inputs, i + 1), repeats[i]) for i in range(2))
    return [y * per_channel(scale, x.ndim) + per_channel(bias, x.ndim)]


def run_lp_norm(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """LpNormalization with p 1 or 2."""
    x, axis = wide(needed(inputs, 0)), int(attributes.get("axis", -1))
    size = np.abs(x).sum(axis=axis, keepdims=True) if attributes.get("p", 2) == 1 else np.sqrt((x * x).sum(axis=axis, keepdims=True))
    return [np.divide(x, size, out=np.zeros_like(x), where=size != 0)]


def run_arg(function: Callable[..., Any]) -> Operator:
    """Return ArgMax or ArgMin."""

    def run(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
        x, axis = needed(inputs, 0), int(attributes.get("axis", 0))
        if attributes.get("select_last_index", 0):
            found = x.shape[axis] - 1 - function(np.flip(x, axis), axis=axis)
        else:
            found = function(x, axis=axis)
        return [np.expand_dims(found, axis) if attributes.get("keepdims", 1) else np.asarray(found)]

    return run


def run_topk(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """TopK: values and indices, sorted."""
    x, k, axis = wide(needed(inputs, 0)), int(needed(inputs, 1).reshape(-1)[0]), int(attributes.get("axis", -1))
    order = np.argsort(-x if attributes.get("largest", 1) else x, axis=axis, kind="stable").take(range(k), axis=axis)
    return [np.take_along_axis(x, order, axis), order]


def run_cumsum(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """CumSum, also exclusive or from the end."""
    x, axis = wide(needed(inputs, 0)), int(needed(inputs, 1).reshape(-1)[0])
    x = np.flip(x, axis) if attributes.get("reverse", 0) else x
    y = np.cumsum(x, axis=axis) - (x if attributes.get("exclusive", 0) else 0)
    return [np.flip(y, axis) if attributes.get("reverse", 0) else y]


REDUCTIONS: dict[str, Operator] = {
    "ReduceMean": reduced(np.mean),
    "ReduceSum": reduced(np.sum),
    "ReduceMax": reduced(np.max),
    "ReduceMin": reduced(np.min),
    "ReduceProd": reduced(np.prod),
    "ReduceSumSquare": reduced(lambda x, axis, keepdims: np.sum(x * x, axis=axis, keepdims=keepdims)),
    "ReduceL1": reduced(lambda x, axis, keepdims: np.sum(np.abs(x), axis=axis, keepdims=keepdims)),
    "ReduceL2": reduced(lambda x, axis, keepdims: np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims))),
    "ReduceLogSumExp": reduced(logsumexp),
    "Softmax": lambda inputs, attributes, _count: [softmax(wide(needed(inputs, 0)), int(attributes.get("axis", -1)))],
    "LogSoftmax": lambda inputs, attributes, _count: [np.log(softmax(wide(needed(inputs, 0)), int(attributes.get("axis", -1))))],
    "LayerNormalization": run_layer_norm,
    "RMSNormalization": run_rms_norm,
    "BatchNormalization": run_batch_norm,
    "InstanceNormalization": run_instance_norm,
    "GroupNormalization": run_group_norm,
    "LpNormalization": run_lp_norm,
    "ArgMax": run_arg(np.argmax),
    "ArgMin": run_arg(np.argmin),
    "TopK": run_topk,
    "CumSum": run_cumsum,
}
