"""Pointwise programs: single-assignment lists of operations on broadcast inputs, in float64.

A program is a sequence of `(operation, operand, …)`; an operand is `("in", i)`, `("t", j)` (the result of step j) or `("c", number)`.
The last step is the result; an empty program copies its input.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from twofour.errors import InputError, nearest
from twofour.oracle.gemm import ACTIVATIONS
from twofour.oracle.operators.common import Array, wide
from twofour.oracle.operators.elementwise import clip, elu, erf, hardsigmoid, sigmoid

Step = Sequence[Any]


def cast(x: Any, dtype: str) -> Any:
    """Return the value as an integer or boolean type holds it; floating types keep it, so that nothing is rounded."""
    return np.asarray(x) != 0 if dtype == "bool" else np.trunc(x) if "int" in dtype else x


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.true_divide,
    "min": np.minimum,
    "max": np.maximum,
    "pow": np.power,
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "exp": np.exp,
    "log": np.log,
    "erf": lambda x: erf(np.asarray(x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: sigmoid(np.asarray(x)),
    "relu": ACTIVATIONS["relu"],
    "gelu": ACTIVATIONS["gelu"],
    "gelu_tanh": ACTIVATIONS["gelu_tanh"],
    "silu": ACTIVATIONS["silu"],
    "hardswish": ACTIVATIONS["hardswish"],
    "leakyrelu": lambda x, alpha: np.where(x < 0, alpha * x, x),
    "prelu": lambda x, slope: np.where(x < 0, slope * x, x),
    "elu": elu,
    "hardsigmoid": lambda x, alpha, beta: hardsigmoid(x, alpha, beta),
    "clip": clip,
    "where": lambda c, a, b: np.where(np.asarray(c) != 0, a, b),
    "equal": np.equal,
    "less": np.less,
    "greater": np.greater,
    "not": lambda x: np.asarray(x) == 0,
    "and": np.logical_and,
    "or": np.logical_or,
    "cast": cast,
    "floor": np.floor,
    "ceil": np.ceil,
    "softplus": lambda x: np.logaddexp(0.0, x),
}


def run_program(program: Sequence[Step], inputs: Sequence[Array]) -> Array:
    """Return the last result of `program` on inputs that broadcast to one shape.

    Raises:
        InputError: an operation is unknown.
    """
    values = [wide(np.asarray(x)) for x in inputs]
    shape = np.broadcast_shapes(*(x.shape for x in values))
    results: list[Any] = []

    def operand(reference: Sequence[Any]) -> Any:
        kind, value = reference
        return values[value] if kind == "in" else results[value] if kind == "t" else value if kind == "d" else float(value)

    for step in program:
        if step[0] not in FUNCTIONS:
            raise InputError(
                f"pointwise operation {step[0]!r} is unknown, expected one of {sorted(FUNCTIONS)}{nearest(step[0], FUNCTIONS)}"
            )
        results.append(FUNCTIONS[step[0]](*(operand(reference) for reference in step[1:])))
    return np.array(np.broadcast_to(results[-1] if results else values[0], shape))
