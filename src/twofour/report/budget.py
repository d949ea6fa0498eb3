"""What layers left dense for a budget cost in time: the network as it is beside the same with those layers 2:4, both built here."""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from twofour.builder import build, records_of
from twofour.builder.gpu import require_gpu
from twofour.exchange import export
from twofour.pattern import Pattern
from twofour.pruning import Budgeted
from twofour.pruning.magnitude import pattern_mask

BATCH = 32


@dataclass(frozen=True)
class BudgetTime:
    """Sums of the times of all layers, each in its fastest way, in microseconds: as pruned, and with no layer left dense for the budget."""

    gpu: str
    batch: int
    precision: str
    us: float
    all_us: float

    def __str__(self) -> str:
        share = 100 * (self.us / self.all_us - 1) if self.all_us else 0.0
        return (
            f"{self.us / 1e3:.3f} ms instead of {self.all_us / 1e3:.3f} ms with none of them dense ({share:+.1f} %; {self.gpu}, "
            f"batch {self.batch}, {self.precision}, layers timed one by one)"
        )


def time_of_budget(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    done: Budgeted,
    *,
    batch: int = BATCH,
    precision: str = "fp16",
    progress: Callable[[int, int, str], None] | None = None,
) -> BudgetTime:
    """Return what the layers left dense in `model` cost in time on this machine's GPU; the model is not changed.

    Zeros decide which kernels can run, not the values beside them: in the copy with every layer 2:4 the masks are those of magnitude. A
    layer that is the same in both is timed once.

    Raises:
        UnsupportedError: no GPU, or a network that cannot be exported or built.
    """
    require_gpu()
    whole = copy.deepcopy(model).cpu()
    inputs = tuple(x.cpu() for x in example_inputs)
    records = []
    with tempfile.TemporaryDirectory() as folder:
        path, cache = Path(folder) / "model.onnx", Path(folder) / "timings.json"
        for dense in (done.kept_dense, ()):
            if not dense:
                prune_all(whole, done)
            export(whole, inputs, path)
            plan = build(path, batch=(batch,), precision=precision, device="cuda", timing_cache=cache, progress=progress)
            records.append(records_of(plan.about)[0])
    now, every = records
    return BudgetTime(now.gpu, batch, precision, now.total_us, every.total_us)


def prune_all(model: nn.Module, done: Budgeted) -> None:
    """Prune in place, by magnitude, the weights that were left dense for the budget."""
    pattern = Pattern.parse(done.pruning.pattern)
    with torch.no_grad():
        for name in done.kept_dense:
            weight = model.get_parameter(name)
            weight.masked_fill_(~pattern_mask(weight, pattern), 0)
