"""What all operator files share: their types, and how an operator's function is called."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Inputs = Sequence[Array | None]
Attributes = Mapping[str, Any]
# An operator: (inputs, None where one is left out; attributes as plain Python values and arrays; number of outputs wanted) -> outputs.
Operator = Callable[[Inputs, Attributes, int], list[Array]]


def wide(x: Array) -> Array:
    """Return floating values as float64; integers and booleans as they are."""
    return x.astype(np.float64) if np.issubdtype(x.dtype, np.floating) else x


def given(inputs: Inputs, index: int) -> Array | None:
    """Return an input, None where it is left out."""
    return inputs[index] if index < len(inputs) else None


def needed(inputs: Inputs, index: int) -> Array:
    """Return an input that the operator cannot do without."""
    value = inputs[index]
    assert value is not None, f"input {index} is left out"
    return value


def integers(inputs: Inputs, index: int, attributes: Attributes, name: str) -> list[int] | None:
    """Return a list of integers that newer opsets take as an input and older ones as an attribute; None where neither is given."""
    value = given(inputs, index)
    if value is not None:
        return [int(v) for v in value.reshape(-1)]
    found = attributes.get(name)
    return None if found is None else [int(v) for v in found]
