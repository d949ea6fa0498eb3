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

import psutil
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from twofour.pruning.permutation.apply import Moves, apply_, moved
from twofour.pruning.permutation.capture import Inputs, quiet, set_mode

LIMIT = 1e-9
_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


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


class OneFormat(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside the block every floating computation has one format, whatever casts the model asks for, and dropout keeps everything."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in _FLOATING:
            kwargs["dtype"] = self.dtype
        name = func._schema.name
        if name == "aten::native_dropout":
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        if name == "aten::bernoulli_":
            return args[0].fill_(1.0)
        if func._schema.is_mutable:
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._cast, (args, kwargs))
        return pytree.tree_map_only(torch.Tensor, self._cast, func(*args, **kwargs))

    def _cast(self, t: torch.Tensor) -> torch.Tensor:
        return t.to(self.dtype) if t.dtype in _FLOATING and t.dtype != self.dtype else t


@contextlib.contextmanager
def one_format(dtype: torch.dtype = torch.float64) -> Iterator[None]:
    """Run a block in one floating format, gradients off."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.no_grad(), OneFormat(dtype):
            yield
    finally:
        torch.set_default_dtype(default)


def widened(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A copy in one floating format, gradients off."""
    twin = copy.deepcopy(model)
    twin.requires_grad_(False)
    return twin.to(dtype)


def fits(model: nn.Module) -> bool:
    """Whether a float64 copy and what it computes fit beside the model: four times its elements in float64, by what is free now."""
    elements = sum(t.numel() for t in tensors_of(model).values())
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    free = min((torch.cuda.mem_get_info(d)[0] for d in devices), default=psutil.virtual_memory().available)
    return 4 * 8 * elements <= free


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
                fresh = b.double().cpu().nan_to_num(nan=1.0) * uniform(b)
                if (b >= 0).logical_not().any():
                    fresh += 0.1 * normal(b)
            large = b.abs() > 50  # masks
            b.copy_(torch.where(large, b, fresh.to(b)))


def run(model: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """All tensors of the result, in order, in one floating format; the random state is the same for every call."""
    with one_format(dtype), torch.random.fork_rng(devices=[]):
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


def prove(
    model: nn.Module, inputs: Inputs, moves: Moves, *, mode: str = "train", operations: int = 1, wide: bool | None = None
) -> list[Check]:
    """Compare the network with its reordered self; `model` itself is not touched.

    Args:
        mode: how training is run, `train` or `leaves` (containers in evaluation).
        operations: of the captured graph; bounds the rounding of a float32 comparison.
        wide: float64 if True, float32 if False; None takes float64 where it fits in memory.
    """
    dtype = torch.float64 if (fits(model) if wide is None else wide) else torch.float32
    # A capture of the leaves does not see what containers do in training, so that the whole is run as well.
    modes = dict.fromkeys((mode, "train"))
    twin = widened(model, dtype)
    cast = inputs.map(lambda t: t.detach().to(dtype) if t.is_floating_point() else t)
    first = max(inputs.batch or 2, 2)
    sized = [cast.resized(first), cast.resized(first + 1)]
    checks: list[Check] = []
    with quiet(twin):
        for network in ("as it is", "redrawn"):
            set_mode(twin, "eval")
            if network == "redrawn":
                redraw(twin)
            original = [outcome(twin, s, dtype) for s in sized]
            limits = [limit_of(twin, s, before, dtype, operations) for s, before in zip(sized, original, strict=True)]
            # Batch statistics of a fresh network are ill-conditioned: training is judged where every value is of order one.
            judged = modes if network == "redrawn" and dtype == torch.float64 else ()
            trained = {m: _train(twin, sized[0], m) for m in judged}
            apply_(tensors_of(twin), moves)
            for before, s, limit in zip(original, sized, limits, strict=True):
                # Where a redrawn network gives no number at all, nothing has been compared.
                empty = network == "redrawn" and not any(bool(torch.isfinite(t).any()) for t in before)
                error = math.inf if empty else difference(before, outcome(twin, s, dtype, moves=moves))
                checks.append(Check(network, "eval", s.batch or 0, error, limit, str(dtype).removeprefix("torch.")))
            for m, seen in trained.items():
                if seen is not None:
                    error = difference(seen, outcome(twin, sized[0], dtype, m, moves))
                    checks.append(Check(network, m, first, error, LIMIT, "float64"))
    return checks


def limit_of(model: nn.Module, inputs: Inputs, outputs: list[torch.Tensor], dtype: torch.dtype, operations: int) -> float:
    """The largest difference that is rounding: 1e-9 in float64.

    In float32 every one of L operations rounds by one part in 2^24, as a change of the inputs by so much would, and independent roundings
    add as square roots: 8 sqrt(L) times the response to a relative change of the inputs by 2^-23, or 2^-23 if the response is smaller.
    """
    if dtype == torch.float64:
        return LIMIT
    generator = torch.Generator().manual_seed(0)

    def nudged(t: torch.Tensor) -> torch.Tensor:
        if not t.is_floating_point():
            return t
        return t * (1 + 2.0**-23 * torch.randint(-1, 2, t.shape, generator=generator).to(t))

    response = difference(outputs, outcome(model, inputs.map(nudged), dtype))
    return 8 * math.sqrt(max(operations, 1)) * max(response, 2.0**-23)


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by each of its names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def outcome(
    twin: nn.Module, inputs: Inputs, dtype: torch.dtype = torch.float64, mode: str = "eval", moves: Moves | None = None
) -> list[torch.Tensor]:
    """Outputs, and floating buffers in the order before `moves`, of one run; the buffers are put back, the mode is evaluation again."""
    kept = {name: b.clone() for name, b in twin.named_buffers()}
    set_mode(twin, mode)
    try:
        outputs = run(twin, inputs, dtype)
        written = dict(twin.named_buffers())
        buffers = [moved(b, (moves or {}).get(name, {}), back=True).clone() for name, b in written.items() if b.is_floating_point()]
        return [*outputs, *buffers]
    finally:
        with torch.no_grad():
            for name, b in twin.named_buffers():
                if not any(step == 0 and size > 1 for step, size in zip(b.stride(), b.shape, strict=True)):
                    b.copy_(kept[name])
        set_mode(twin, "eval")


def _train(twin: nn.Module, inputs: Inputs, mode: str) -> list[torch.Tensor] | None:
    """The outcome in training, None where training cannot run on these inputs."""
    try:
        return outcome(twin, inputs, torch.float64, mode)
    except Exception:  # noqa: BLE001 - the model's own code refuses; there is no training to compare
        return None
