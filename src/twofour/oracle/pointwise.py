"""Chains of element-wise operations over strided operands, in float64."""

from collections.abc import Callable, Sequence
from math import erf
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_erf = np.vectorize(erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "min": np.minimum,
    "max": np.maximum,
    "pow": np.power,
    "neg": lambda a: -a,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1.0 / np.sqrt(a),
    "exp": np.exp,
    "log": np.log,
    "erf": _erf,
    "tanh": np.tanh,
    "sigmoid": _sigmoid,
    "relu": lambda a: np.where(a < 0, 0.0, a),
    "leakyrelu": lambda a, alpha: np.where(a < 0, a * alpha, a),
    "prelu": lambda a, slope: np.where(a < 0, a * slope, a),
    "elu": lambda a, alpha: np.where(a < 0, alpha * np.expm1(a), a),
    "gelu": lambda a: 0.5 * a * (1.0 + _erf(a / np.sqrt(2.0))),
    "gelu_tanh": lambda a: 0.5 * a * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (a + 0.044715 * a**3))),
    "silu": lambda a: a * _sigmoid(a),
    "hardswish": lambda a: a * np.clip(a + 3.0, 0.0, 6.0) / 6.0,
    "hardsigmoid": lambda a, alpha, beta: np.clip(a * alpha + beta, 0.0, 1.0),
    "clip": lambda a, low, high: np.minimum(np.maximum(a, low), high),
    "where": lambda condition, a, b: np.where(condition != 0, a, b),
    "equal": lambda a, b: np.equal(a, b) * 1.0,
    "less": lambda a, b: np.less(a, b) * 1.0,
    "greater": lambda a, b: np.greater(a, b) * 1.0,
    "not": lambda a: np.equal(a, 0) * 1.0,
    "and": lambda a, b: np.logical_and(a != 0, b != 0) * 1.0,
    "or": lambda a, b: np.logical_or(a != 0, b != 0) * 1.0,
    "floor": np.floor,
    "ceil": np.ceil,
    "softplus": lambda a: np.logaddexp(0.0, a),
}


def held(x: Array, dtype: str) -> Array:
    """Return float64 `x` as the type `dtype` (fp16, bf16, fp32, int.., uint8, bool) would hold it, in float64."""
    if dtype == "bool":
        return np.asarray(x != 0, np.float64)
    if dtype == "bf16":
        return bf16_values(bf16_bits(x))
    if dtype in ("fp16", "fp32"):
        with np.errstate(over="ignore"):
            return np.asarray(x).astype(np.float16 if dtype == "fp16" else np.float32).astype(np.float64)
    return np.trunc(x)


def bf16_bits(x: Array) -> npt.NDArray[np.uint16]:
    """Return the bfloat16 bits of `x`, rounded to nearest even; NaN becomes a quiet NaN."""
    with np.errstate(over="ignore"):
        single = np.asarray(x, np.float64).astype(np.float32)
    bits = single.view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FFF), rounded)


def bf16_values(bits: npt.NDArray[np.uint16]) -> Array:
    """Return the values of bfloat16 bits, in float64."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def pointwise(inputs: Sequence[Array], program: Sequence[Sequence[Any]]) -> Array:
    """Return the value of a program's last instruction over broadcast `inputs`, in float64; an empty program returns input 0.

    An instruction is `(operation, operand, ...)`; an operand `("in", i)`, `("t", j)`, `("c", number)`; of `cast` the second `("d", dtype)`.
    """
    arrays = [np.asarray(x, np.float64) for x in inputs]
    arrays = list(np.broadcast_arrays(*arrays))
    values: list[Array] = []

    def value(operand: Sequence[Any]) -> Any:
        kind, which = operand
        return arrays[which] if kind == "in" else values[which] if kind == "t" else np.float64(which)

    with np.errstate(all="ignore"):
        for op, *operands in program:
            if op == "cast":
                values.append(held(value(operands[0]), operands[1][1]))
            else:
                values.append(np.asarray(OPERATIONS[op](*map(value, operands)), np.float64))
    return values[-1] if values else arrays[0]
