"""The table of rules and what they share.

A rule receives the ledger and the operation's arguments, values in place of tensors, and returns the value of each result. It writes
into the ledger what the operation asks of any reordering. It may ask for `shape`, the shapes of the results, and `results`, their number.
An operation without a rule freezes everything that reaches it.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from twofour.pruning.permutation.labels import Value

Rule = Callable[..., Any]
Entered = TypeVar("Entered", bound=Rule)
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Entered], Entered]:
    """Enter a function into the table for each of `names`."""

    def enter(function: Entered) -> Entered:
        for name in names:
            RULES[f"aten.{name}"] = function
        return function

    return enter


def values_of(arguments: Sequence[Any]) -> list[Value]:
    return [a for a in arguments if isinstance(a, Value)]


def axes_of(value: Value, axes: Any) -> list[int]:
    """Non-negative axes of a reduction; None and [] mean all."""
    if axes is None or (isinstance(axes, list | tuple) and not axes):
        return list(range(value.ndim))
    return [value.axis(a) for a in (axes if isinstance(axes, list | tuple) else [axes])]


def constant(shape: Sequence[int]) -> Value:
    """A value whose elements are all equal."""
    return Value(tuple(shape), (), frozenset(range(len(shape))))
