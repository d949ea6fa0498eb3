"""Element-by-element operators of ONNX and the activations behind them, in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np

from twofour.oracle.gemm import ACTIVATIONS
from twofour.oracle.operators.common import Array, Attributes, Inputs, Operator, given, needed, wide

# ONNX's type numbers of the floating types; all of them are float64 here.
FLOATING_TYPES = frozenset({1, 10, 11, 16})
INTEGER_TYPES: dict[int, Any] = {2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64, 9: np.bool_, 12: np.uint32}
INTEGER_TYPES[13] = np.uint64


def sigmoid(x: Array) -> Array:
    """Return `1 / (1 + exp(-x))` without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def erf(x: Array) -> Array:
    """Return the error function."""
    from math import erf as scalar_erf

    return np.asarray(np.vectorize(scalar_erf, otypes=[np.float64])(x) if x.size else x)


def clip(x: Array, low: Array | float | None, high: Array | float | None) -> Array:
    """Return `min(max(x, low), high)`, in this order; None leaves a side open. NaN stays NaN."""
    y = x if low is None else np.maximum(x, low)
    return y if high is None else np.minimum(y, high)


def hardsigmoid(x: Array, alpha: float, beta: float) -> Array:
    """Return `clip(alpha x + beta, 0, 1)`."""
    return clip(alpha * x + beta, 0.0, 1.0)


def elu(x: Array, alpha: float) -> Array:
    """Return `x` where positive, else `alpha (exp(x) - 1)`."""
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def divide(a: Array, b: Array) -> Array:
    """Return `a / b`; integers are truncated towards zero, as in C."""
    if np.issubdtype(a.dtype, np.integer):
        return np.where((a < 0) != (b < 0), -(np.abs(a) // np.abs(b)), np.abs(a) // np.abs(b)).astype(a.dtype)
    return np.asarray(a / b)


def power(a: Array, b: Array) -> Array:
    """Return `a ** b` in the type of `a`."""
    return np.asarray(np.power(a, b)).astype(a.dtype)


def one(function: Callable[[Array], Array]) -> Operator:
    """Return the operator of a function of one array."""
    return lambda inputs, _attributes, _count: [np.asarray(function(wide(needed(inputs, 0))))]


def two(function: Callable[[Array, Array], Array]) -> Operator:
    """Return the operator of a function of two arrays that broadcast."""
    return lambda inputs, _attributes, _count: [np.asarray(function(wide(needed(inputs, 0)), wide(needed(inputs, 1))))]


def several(function: Callable[[Array, Array], Array]) -> Operator:
    """Return the operator that folds a function of two arrays over all its inputs."""

    def run(inputs: Inputs, _attributes: Attributes, _count: int) -> list[Array]:
        total = wide(needed(inputs, 0))
        for index in range(1, len(inputs)):
            total = function(total, wide(needed(inputs, index)))
        return [np.asarray(total)]

    return run


def run_clip(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Clip: the bounds are scalars, each may be left out."""
    low, high = given(inputs, 1), given(inputs, 2)
    x = wide(needed(inputs, 0))
    return [clip(x, attributes.get("min") if low is None else wide(low), attributes.get("max") if high is None else wide(high))]


def run_cast(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Cast and CastLike: a floating target means float64, so no value is rounded; integers are truncated."""
    x = needed(inputs, 0)
    if "to" not in attributes:
        like = needed(inputs, 1)
        return [wide(x.astype(like.dtype))]
    to = int(attributes["to"])
    return [x.astype(np.float64) if to in FLOATING_TYPES else x.astype(INTEGER_TYPES[to])]


def run_gelu(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Gelu in its erf or tanh form."""
    return [np.asarray(ACTIVATIONS["gelu_tanh" if attributes.get("approximate") == "tanh" else "gelu"](wide(needed(inputs, 0))))]


def run_mod(inputs: Inputs, attributes: Attributes, _count: int) -> list[Array]:
    """Mod: with the sign of the divisor, or as C's fmod."""
    a, b = wide(needed(inputs, 0)), wide(needed(inputs, 1))
    return [np.asarray(np.fmod(a, b) if attributes.get("fmod", 0) else np.mod(a, b))]


def parametric(function: Callable[..., Array], **defaults: float) -> Operator:
    """Return the operator of a function of one array and of attributes with their ONNX defaults."""
    return lambda inputs, attributes, _count: [
        np.asarray(function(wide(needed(inputs, 0)), **{name: attributes.get(name, value) for name, value in defaults.items()}))
    ]


ELEMENTWISE: dict[str, Operator] = {
    "Add": two(np.add),
    "Sub": two(np.subtract),
    "Mul": two(np.multiply),
    "Div": two(divide),
    "Pow": two(power),
    "Mod": run_mod,
    "Min": several(np.minimum),
    "Max": several(np.maximum),
    "Sum": several(np.add),
    "And": two(np.logical_and),
    "Or": two(np.logical_or),
    "Equal": two(np.equal),
    "Less": two(np.less),
    "LessOrEqual": two(np.less_equal),
    "Greater": two(np.greater),
    "GreaterOrEqual": two(np.greater_equal),
    "PRelu": two(lambda x, slope: np.where(x < 0, slope * x, x)),
    "Not": one(np.logical_not),
    "Neg": one(np.negative),
    "Abs": one(np.abs),
    "Sqrt": one(np.sqrt),
    "Reciprocal": one(lambda x: 1 / x),
    "Exp": one(np.exp),
    "Log": one(np.log),
    "Erf": one(erf),
    "Tanh": one(np.tanh),
    "Sin": one(np.sin),
    "Cos": one(np.cos),
    "Floor": one(np.floor),
    "Ceil": one(np.ceil),
    "Round": one(np.round),
    "Sign": one(np.sign),
    "IsNaN": one(np.isnan),
    "Sigmoid": one(sigmoid),
    "Relu": one(ACTIVATIONS["relu"]),
    "Softplus": one(lambda x: np.logaddexp(0.0, x)),
    "Softsign": one(lambda x: x / (1 + np.abs(x))),
    "HardSwish": one(ACTIVATIONS["hardswish"]),
    "Mish": one(lambda x: x * np.tanh(np.logaddexp(0.0, x))),
    "HardSigmoid": parametric(hardsigmoid, alpha=0.2, beta=0.5),
    "LeakyRelu": parametric(lambda x, alpha: np.where(x < 0, alpha * x, x), alpha=0.01),
    "Elu": parametric(elu, alpha=1.0),
    "Celu": parametric(lambda x, alpha: np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(np.minimum(x, 0) / alpha)), alpha=1.0),
    "Selu": parametric(lambda x, alpha, gamma: gamma * elu(x, alpha), alpha=1.67326319217681884765625, gamma=1.05070102214813232421875),
    "Swish": parametric(lambda x, alpha: x * sigmoid(alpha * x), alpha=1.0),
    "Gelu": run_gelu,
    "Clip": run_clip,
    "Cast": run_cast,
    "CastLike": run_cast,
    "Where": lambda inputs, _attributes, _count: [np.where(needed(inputs, 0), wide(needed(inputs, 1)), wide(needed(inputs, 2)))],
}
