"""The names that an exported graph gives to the weights of a pruning record.

The exporter keeps one name of a weight that several layers share, and makes up names for weights that it transposes or computes.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from torch import nn

from twofour.exchange.onnx_weights import weights_of
from twofour.pruning import Pruning
from twofour.pruning.capture import computed_weights

# Roundings between two computations of a parametrised weight, in ulp of its largest value: a norm summed in two orders, and a division.
COMPUTED_ULP = 64

Array = npt.NDArray[Any]


def with_aliases(pruning: Pruning, model: nn.Module, graph: ir.Model) -> Pruning:
    """Return the record with each layer left dense also under the other names that its weight has in `graph`.

    A weight is known by its names in `model`, else by its values: equal to a dense parameter's or to their transpose, and for the weight
    of a parametrisation equal within rounding.
    """
    name_of = {other: names[0] for names in _names_of_parameters(model) for other in names}
    dense = {layer.name for layer in pruning.layers if not layer.eligible}
    known = {layer.name for layer in pruning.layers}
    values = {name: p.detach().cpu().numpy() for name, p in model.named_parameters() if name in dense and p.is_floating_point()}
    computed = {source: weight.cpu().numpy() for source, weight in computed_weights(model).items() if source in dense}
    aliases: dict[str, list[str]] = {}
    for use in weights_of(graph):
        if use.name in known:
            continue
        name = name_of.get(use.name)
        if name is None:
            name = next((n for n, v in values.items() if _is_same(use.values, v)), None)
        if name is None:
            name = next((n for n, v in computed.items() if _is_same(use.values, v, COMPUTED_ULP)), None)
        if name in dense and use.name not in aliases.setdefault(name, []):
            aliases[name].append(use.name)
    return replace(pruning, layers=tuple(replace(layer, aliases=tuple(aliases.get(layer.name, ()))) for layer in pruning.layers))


def _names_of_parameters(model: nn.Module) -> list[list[str]]:
    """Every name of each parameter, the one of `named_parameters()` first."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _is_same(found: Array, expected: Array, ulp: int = 0) -> bool:
    return any(found.shape == e.shape and _is_close(found, e, ulp) for e in (expected, expected.T))


def _is_close(found: Array, expected: Array, ulp: int) -> bool:
    if not ulp or not expected.size:
        return np.array_equal(found, expected)
    tolerance = ulp * float(np.finfo(np.float32).eps) * float(np.abs(expected).max())
    return float(np.abs(found - expected).max()) <= tolerance
