"""What recognition shares: a tree of multiplications taken apart, scalars gathered."""

import numpy as np
import onnx_ir as ir

from twofour.builder.graph import is_op, only_use, producer, scalar_of

CLOSE = 1e-4  # exporters write constants such as sqrt(2) in fp32, some rounded to five digits


def is_close(value: float | None, wanted: float) -> bool:
    """Whether a recognised constant is the wanted one."""
    return value is not None and bool(np.isclose(value, wanted, rtol=CLOSE, atol=1e-7))


def factors(value: ir.Value, top: bool = True) -> tuple[float, list[ir.Value]]:
    """Return (scalar, values) whose product `value` is, through Mul and Div by scalars; inner products only if nothing else reads them."""
    node = producer(value)
    if node is None or not is_op(node, "Mul", "Div") or (not top and only_use(value) is None):
        return 1.0, [value]
    a, b = node.inputs
    assert a is not None
    assert b is not None
    if is_op(node, "Div"):
        divisor = scalar_of(b)
        if not divisor:
            return 1.0, [value]
        scale, values = factors(a, False)
        return scale / divisor, values
    scale, values = 1.0, []
    for side in (a, b):
        number = scalar_of(side)
        if number is not None:
            scale *= number
            continue
        inner, found = factors(side, False)
        scale, values = scale * inner, values + found
    return scale, values


def added(value: ir.Value) -> tuple[float, ir.Value] | None:
    """Return (c, x) where `value` is x + c with a scalar c, else None."""
    node = producer(value)
    if not is_op(node, "Add"):
        return None
    assert node is not None
    a, b = node.inputs
    for constant, other in ((a, b), (b, a)):
        number = scalar_of(constant)
        if number is not None and other is not None:
            return number, other
    return None


def scaled(value: ir.Value) -> tuple[float, ir.Value]:
    """Return (c, x) where `value` is c x; (1, value) where no scalar multiplies it."""
    scale, values = factors(value)
    return (scale, values[0]) if len(values) == 1 else (1.0, value)
