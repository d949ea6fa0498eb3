"""Which weights the sparse units can take, and for every other one the reason why not."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.utils import parametrize

from twofour.errors import InputError, nearest
from twofour.pruning.capture import CONVOLUTIONS, Execution, computed_from
from twofour.pruning.record import LayerRecord

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def is_hooked(module: nn.Module, attribute: str) -> bool:
    """Whether a hook of the older `weight_norm`, `spectral_norm` or `prune` computes another attribute from this parameter."""
    stem, _, last = attribute.rpartition("_")
    return last in ("g", "v", "orig") and computed_from(module, stem) in (f"{stem}_v", f"{stem}_orig")


def why_not(module: nn.Module, attribute: str, weight: Tensor) -> str:
    """Return why the hardware cannot run this weight sparse, or an empty string.

    The pattern runs along the input channels: axis 1 of `[out, in, *kernel]`, at each kernel position.

    Source: TensorRT Developer Guide, "Structured sparsity".
    """
    if isinstance(module, parametrize.ParametrizationList) or is_hooked(module, attribute):
        return "its weight is computed by a parametrisation; remove the parametrisation first"
    if isinstance(module, TRANSPOSED):
        return "transposed convolution"
    if isinstance(module, EMBEDDINGS):
        return "embedding: rows are looked up, not multiplied"
    if isinstance(module, RECURRENT):
        return "recurrent layer"
    if isinstance(module, CONVOLUTIONS):
        if module.groups > 1:
            return "depthwise convolution" if module.groups == module.in_channels else f"grouped convolution ({module.groups} groups)"
    elif not isinstance(module, nn.Linear) and not (isinstance(module, nn.MultiheadAttention) and attribute in PROJECTIONS):
        return f"weight of {type(module).__name__}, not of a convolution, linear or attention projection"
    if weight.numel() == 0:
        return "no elements"
    if not weight.is_floating_point():
        return f"dtype {weight.dtype} is not a floating format"
    if weight.shape[1] % 4:
        return f"{weight.shape[1]} input channels are not a multiple of 4"
    return ""


def matching(patterns: Sequence[str], names: Iterable[str], option: str) -> set[str]:
    """Return the names matched by any glob; a layer's name matches its weight too.

    Raises:
        InputError: a pattern matches nothing.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {n for n in names if fnmatchcase(n, pattern) or fnmatchcase(n.rpartition(".")[0], pattern)}
        if not hits:
            raise InputError(f"{option} {pattern!r} matches no layer of the model{nearest(pattern, [n.rpartition('.')[0] for n in names])}")
        found |= hits
    return found


def examine(model: nn.Module, execution: Execution, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> tuple[LayerRecord, ...]:
    """Return one record a weight of two or more axes, in the order of the model's parameters.

    By default the first convolution and the classifiers stay dense; `include` takes them in, `exclude` leaves more out and wins.

    Raises:
        InputError: a pattern of `include` or `exclude` matches no layer.
    """
    holders: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter is not None and parameter.ndim >= 2:
                holders.setdefault(id(parameter), []).append((module, attribute, f"{module_name}.{attribute}".lstrip(".")))
    names = [uses[0][2] for uses in holders.values()]
    included, excluded = matching(include, names, "include"), matching(exclude, names, "exclude")
    convolutions = {uses[0][2] for uses in holders.values() if isinstance(uses[0][0], CONVOLUTIONS)}
    first = next((name for name in execution.order if name in convolutions), None)
    records = []
    for uses in holders.values():
        name, weight = uses[0][2], uses[0][0].get_parameter(uses[0][1])
        reasons = [r for module, attribute, _ in uses if (r := why_not(module, attribute, weight))]
        reason = reasons[0] if reasons else ""
        if reason and len(uses) > 1:
            reason = f"shared with another layer: {reason}"
        if not reason and name in excluded:
            reason = "excluded"
        if not reason and name not in included:
            if name == first:
                reason = "first convolution (by default; --include takes it in)"
            elif name in execution.classifiers:
                reason = "classifier: the last linear before an output (by default; --include takes it in)"
        records.append(LayerRecord(name, type(uses[0][0]).__name__, tuple(weight.shape), execution.flops.get(name), not reason, reason))
    return tuple(records)
