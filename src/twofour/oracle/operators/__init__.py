"""Every operator that import meets (ONNX) or the passes make (domain `twofour`), as slow and obvious float64 NumPy."""

from twofour.errors import UnsupportedError
from twofour.oracle.operators.common import Array, Attributes, Inputs, Operator
from twofour.oracle.operators.elementwise import ELEMENTWISE
from twofour.oracle.operators.fused import FUSED
from twofour.oracle.operators.products import PRODUCTS
from twofour.oracle.operators.reductions import REDUCTIONS
from twofour.oracle.operators.views import VIEWS
from twofour.oracle.operators.windows import WINDOWS

ONNX: dict[str, Operator] = {**ELEMENTWISE, **WINDOWS, **REDUCTIONS, **VIEWS, **PRODUCTS}
DOMAINS: dict[str, dict[str, Operator]] = {"": ONNX, "ai.onnx": ONNX, "twofour": FUSED}

__all__ = ["DOMAINS", "FUSED", "ONNX", "has_operator", "run_operator"]


def has_operator(domain: str, kind: str) -> bool:
    """Whether the oracle can compute the operator."""
    return kind in DOMAINS.get(domain, {})


def run_operator(domain: str, kind: str, inputs: Inputs, attributes: Attributes, outputs: int = 1) -> list[Array]:
    """Return the outputs of one operator; floating values are float64, integers and booleans keep their type.

    Args:
        inputs: None where an input is left out. attributes: plain Python values and arrays.

    Raises:
        UnsupportedError: the operator is not one of the oracle's. InputError: a form of it is not.
    """
    if not has_operator(domain, kind):
        raise UnsupportedError(f"oracle: operator {domain + '.' if domain else ''}{kind} has no float64 version")
    return DOMAINS[domain][kind](inputs, attributes, outputs)
