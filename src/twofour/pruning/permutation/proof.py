"""Shows, in numbers, that a reordered network computes what it computed before.

The network runs in float64 at two batch sizes before and after, once with its own parameters and once with all of them redrawn at order
one: a fresh network hides wrong orders behind zeros, ones and equal statistics. Training mode is run as well, with the updates of buffers.
"""

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from twofour.pruning.permutation.apply import Moves, apply_, moved
from twofour.pruning.permutation.capture import Inputs, quiet, set_mode

LIMIT = 1e-9
_NARROW = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Check:
    """One comparison: largest difference of any output over its largest magnitude, and the limit it was held to."""

    network: str  # "as it is" or "redrawn"
    mode: str
    batch: int
    error: float
    limit: float
    dtype: str

    @property
    def passed(self) -> bool:
        return self.error <= self.limit


class Wide(TorchDispatchMode):
    """Inside the block every floating computation is float64, casts to narrower formats included, and dropout keeps everything."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _NARROW:
            kwargs["dtype"] = torch.float64
        name = func._schema.name
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "aten::bernoulli_":
            return args[0].fill_(1.0)
        if not func._schema.is_mutable:
            args, kwargs = pytree.tree_map_only(torch.Tensor, _widen, (args, kwargs))
        result = func(*args, **kwargs)
        return result if func._schema.is_mutable else pytree.tree_map_only(torch.Tensor, _widen, result)


def _widen(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.dtype in _NARROW else t


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """Run a block in float64 whatever formats the model names."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), Wide():
            yield
    finally:
        torch.set_default_dtype(default)


def widened(model: nn.Module) -> nn.Module:
    """A float64 copy, gradients off."""
    twin = copy.deepcopy(model)
    twin.requires_grad_(False)
    return twin.double()


def redraw(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter and floating buffer values of order one, in place: weights scaled by their fan-in, scales in 0.5-2."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.shape, dtype=torch.float64).uniform_(0.5, 2.0, generator=generator)

    def normal(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(t.shape, dtype=torch.float64).normal_(generator=generator)

    with torch.no_grad():
        for name, p in model.named_parameters():
            if sum(s > 1 for s in p.shape) >= 2:
                fan_in = max(p[0].numel(), 1) if p.shape[0] > 1 else p.shape[-1]
                fresh = normal(p) * math.sqrt(1.5 / fan_in)
            elif "bias" in name.rsplit(".", 1)[-1]:
                fresh = 0.5 * normal(p)
            else:
                fresh = uniform(p)
            p.copy_(fresh)
        for name, b in model.named_buffers():
            if not b.is_floating_point() or any(step == 0 and size > 1 for step, size in zip(b.stride(), b.shape, strict=True)):
                continue
            if name.endswith("running_mean"):
                fresh = 0.5 * normal(b)
            elif name.endswith("running_var"):
                fresh = uniform(b)
            else:
                fresh = b.double().cpu() * uniform(b)
                if (b >= 0).logical_not().any():
                    fresh += 0.1 * normal(b)
            large = ~torch.isfinite(b) | (b.abs() > 50)  # masks
            b.copy_(torch.where(large, b, fresh.to(b)))


def run(model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """All tensors of the result, in order, in float64 where floating; the random state is the same for every call."""
    with wide(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = model(*inputs.args, **inputs.kwargs)
    return [t.detach().clone() for t in pytree.tree_leaves(_plain(result)) if isinstance(t, torch.Tensor)]


def _plain(result: Any) -> Any:
    """Mappings and dataclasses as tuples, so that all their tensors are seen."""
    if isinstance(result, Mapping):
        return tuple(_plain(v) for v in result.values())
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return tuple(_plain(getattr(result, f.name)) for f in dataclasses.fields(result))
    return tuple(_plain(v) for v in result) if isinstance(result, list | tuple) else result


def difference(before: list[torch.Tensor], after: list[torch.Tensor]) -> float:
    """Largest relative difference: max |a - b| / max |a| over each output."""
    if len(before) != len(after):
        return math.inf
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        if a.shape != b.shape:
            return math.inf
        if not a.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(a, b) else math.inf)
            continue
        equal_ends = torch.equal(torch.isfinite(a), torch.isfinite(b)) and torch.equal(a.isnan(), b.isnan())
        if not equal_ends:
            return math.inf
        finite = torch.isfinite(a)
        if finite.any():
            scale = float(a[finite].abs().max())
            gap = float((a[finite] - b[finite]).abs().max())
            worst = max(worst, gap / scale if scale else (math.inf if gap else 0.0))
    return worst


def prove(model: nn.Module, inputs: Inputs, moves: Moves, *, mode: str = "train") -> list[Check]:
    """Compare the network with its reordered self; `model` itself is not touched.

    Args:
        mode: how training is run, `train` or `leaves` (containers in evaluation).
    """
    twin = widened(model)
    double = inputs.map(lambda t: t.detach().double() if t.is_floating_point() else t)
    first = max(inputs.batch or 2, 2)
    sized = [double.resized(first), double.resized(first + 1)]
    checks: list[Check] = []
    with quiet(twin):
        for network in ("as it is", "redrawn"):
            set_mode(twin, "eval")
            if network == "redrawn":
                redraw(twin)
            original = [run(twin, s) for s in sized]
            # Batch statistics of a fresh network are ill-conditioned: training is judged where every value is of order one.
            trained = _train(twin, sized[0], mode, None) if network == "redrawn" else None
            apply_(tensors_of(twin), moves)
            for before, s in zip(original, sized, strict=True):
                checks.append(Check(network, "eval", s.batch or 0, difference(before, run(twin, s)), LIMIT, "float64"))
            if trained is not None:
                error = difference(trained, _train(twin, sized[0], mode, moves) or [])
                checks.append(Check(network, mode, first, error, LIMIT, "float64"))
    return checks


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _train(twin: nn.Module, inputs: Inputs, mode: str, moves: Moves | None) -> list[torch.Tensor] | None:
    """Outputs and buffers, in the old order, of one run in training mode; the buffers are put back. None where training cannot run."""
    kept = {name: b.clone() for name, b in twin.named_buffers()}
    set_mode(twin, mode)
    try:
        outputs = run(twin, inputs)
        written = dict(twin.named_buffers())
        buffers = [moved(b, (moves or {}).get(name, {}), back=True).clone() for name, b in written.items() if b.is_floating_point()]
        return [*outputs, *buffers]
    except (RuntimeError, ValueError, NotImplementedError):
        if moves is None:
            return None
        raise
    finally:
        with torch.no_grad():
            for name, b in twin.named_buffers():
                if not any(step == 0 and size > 1 for step, size in zip(b.stride(), b.shape, strict=True)):
                    b.copy_(kept[name])
        set_mode(twin, "eval")
