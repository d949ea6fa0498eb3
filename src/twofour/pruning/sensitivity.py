"""How much each layer costs when only that layer is pruned, and how few layers must stay dense to keep a metric within a budget."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from twofour.errors import InputError
from twofour.files import write_text
from twofour.pattern import Pattern
from twofour.pruning.apply import norm_batches, prepare, recorded, undone_on_failure, write
from twofour.pruning.block_files import digest_of
from twofour.pruning.calibration import STATISTICS, tensors_in, tracked_norms
from twofour.pruning.decide import Report, decide
from twofour.pruning.methods import Choice
from twofour.pruning.record import LayerRecord, Pruning

SCHEMA = 1
Direction = Literal["higher", "lower"]
Evaluate = Callable[[nn.Module], float]


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer pruned alone.

    Attributes:
        name: of its weight.
        shape: `[out, in, *kernel]`.
        flops: for one item of the example inputs, None where unknown.
        value: the metric with only this layer pruned.
        lost: how much worse that is than the dense network, in the metric's unit; negative where it is better.
    """

    name: str
    shape: tuple[int, ...]
    flops: int | None
    value: float
    lost: float


@dataclass(frozen=True)
class Sensitivity:
    """The metric of the dense network and with each layer pruned alone, in the order of the model."""

    metric: str
    direction: Direction
    dense: float
    method: str
    pattern: str
    layers: tuple[LayerSensitivity, ...]

    @property
    def ranked(self) -> tuple[LayerSensitivity, ...]:
        """The layers, the one that costs most first."""
        return tuple(sorted(self.layers, key=lambda layer: -layer.lost))

    def __str__(self) -> str:
        worst = self.ranked[0]
        return (
            f"Sensitivity({self.method} {self.pattern}, {self.metric} {self.dense:.4g} dense: {len(self.layers)} layers one at a time, "
            f"worst {worst.name} at {worst.value:.4g})"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Sensitivity":
        """Return the record that `to_json` wrote.

        Raises:
            InputError: it is not such a record.
        """
        try:
            layers = tuple(LayerSensitivity(**{**layer, "shape": tuple(layer["shape"])}) for layer in value["layers"])
            return cls(value["metric"], value["direction"], value["dense"], value["method"], value["pattern"], layers)
        except (TypeError, KeyError) as error:
            raise InputError(f"sensitivity record is damaged ({error}); delete it and measure again") from error


@contextmanager
def tried(model: nn.Module, choices: Mapping[str, Choice], calibration: Iterable[Any] | None, num_inputs: int) -> Iterator[None]:
    """Run the body with the choices written and batch-norm re-estimated, then put everything back."""
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name].detach().clone() for name in choices}
    norms = [(norm, {s: getattr(norm, s).clone() for s in STATISTICS}) for norm in tracked_norms(model).values()]
    try:
        write(model, choices, calibration, num_inputs, [], used=True)
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
            for norm, statistics in norms:
                for name, value in statistics.items():
                    getattr(norm, name).copy_(value)


def sensitivity(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    evaluate: Evaluate,
    *,
    metric: str = "accuracy",
    direction: Direction = "higher",
    method: str = "magnitude",
    pattern: str | Pattern = "2:4",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    resume: str | Path | None = None,
    progress: Report | None = None,
) -> Sensitivity:
    """Return what `evaluate` gives with each eligible layer pruned alone; the model is as it was afterwards.

    Args:
        evaluate: takes the model, returns the metric; it must not change the model.
        direction: whether more of the metric is better.
        method, pattern, include, exclude: as of `prune`. Channels keep their order.
        calibration: batches for the method, and to re-estimate batch-norm on before every evaluation where `prune` would; None leaves
            the statistics.
        resume: a JSON file that gets the record; layers that it holds already are not measured again.
        progress: called with what is done, how many, and of how many if known.

    Raises:
        InputError: as of `prune`; `resume` holds something else; the metric is not finite.
    """
    ready = prepare(model, example_inputs, method, False, pattern, include, exclude, calibration, progress)
    choices = decide(model, ready.names, ready.method, ready.pattern, ready.calibration, progress)
    batches = None if ready.calibration is None else ready.calibration.batches
    again = norm_batches(model, ready, method)
    about = {"metric": metric, "direction": direction, "method": method, "pattern": str(ready.pattern)}
    state = {"state": digest_of([*model.state_dict().values()]), "calibration": _calibration_digest(batches)}
    done = _begun(Path(resume), about, state) if resume is not None else None
    dense = done.dense if done is not None else _finite(evaluate(model), metric, "of the dense network")
    known = {layer.name: layer for layer in done.layers} if done is not None else {}
    layers: list[LayerSensitivity] = []
    for record in ready.records:
        if not record.eligible:
            continue
        layer = known.get(record.name)
        if layer is None:
            with tried(model, {record.name: choices[record.name]}, again, len(example_inputs)):
                value = _finite(evaluate(model), metric, f"with only {record.name!r} pruned")
            layer = LayerSensitivity(record.name, record.shape, record.flops, value, (dense - value) * (1 if direction == "higher" else -1))
        layers.append(layer)
        result = Sensitivity(metric, direction, dense, method, str(ready.pattern), tuple(layers))
        if resume is not None:
            write_text(resume, json.dumps({"schema": SCHEMA, **state, **result.to_json()}, indent=1) + "\n")
        if progress is not None:
            progress("layer pruned alone", len(layers), len(choices))
    return result


def _finite(value: Any, metric: str, when: str) -> float:
    """Return `value`, a number or a tensor of one; what is not finite could be neither ranked nor drawn.

    Raises:
        InputError: it is no number, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = type(value).__name__
        raise InputError(f"sensitivity: {metric} {when} is of {kind}, expected a number; have the evaluation return one") from error
    if not math.isfinite(number):
        raise InputError(f"sensitivity: {metric} {when} is {number}, expected a finite number; check the evaluation, or exclude the layer")
    return number


def _calibration_digest(batches: Iterable[Any] | None) -> str | None:
    """Return a digest of the first calibration batch and the number of batches where it is known; None without calibration."""
    if batches is None:
        return None
    first = next(iter(batches), None)
    count = len(batches) if isinstance(batches, Sized) else -1
    return digest_of([*tensors_in(first), torch.tensor(count)])


def _begun(path: Path, about: dict[str, str], state: dict[str, str | None]) -> Sensitivity | None:
    """Return the record in a file, None where there is no file.

    Raises:
        InputError: it is damaged, or of another network or other options.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        found = Sensitivity.from_json(value)
        differs = [name for name in state if value[name] != state[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"sensitivity file {str(path)!r} is damaged; delete it and measure again") from error
    for name, wanted in about.items():
        if getattr(found, name) != wanted:
            raise InputError(f"sensitivity file {str(path)!r} has {name} {getattr(found, name)!r}, expected {wanted!r}; name another file")
    if differs:
        other = "weights" if "state" in differs else "calibration data"
        raise InputError(f"sensitivity file {str(path)!r} is of other {other}; delete it or name another file")
    return found


@dataclass(frozen=True)
class Budgeted:
    """A pruning within a budget.

    Attributes:
        pruning: the record; the layers left dense say why.
        dense, value: the metric of the dense network and of the pruned one.
        kept_dense: the weights left dense for the budget, the costliest first.
        flops_share_all: share of the network's FLOPs in pruned layers had none been left dense.
    """

    pruning: Pruning
    dense: float
    value: float
    kept_dense: tuple[str, ...]
    flops_share_all: float

    def __str__(self) -> str:
        now, before = 100 * self.pruning.share_of_flops, 100 * self.flops_share_all
        return (
            f"Budgeted({len(self.kept_dense)} of {len(self.kept_dense) + len(self.pruning.pruned)} layers stay dense: {now:.1f} instead of "
            f"{before:.1f} % of FLOPs are {self.pruning.pattern}; metric {self.dense:.2f} → {self.value:.2f})"
        )


def prune_within(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    evaluate: Evaluate,
    measured: Sensitivity,
    budget: float,
    *,
    permute: bool | float = True,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    progress: Report | None = None,
) -> Budgeted:
    """Prune `model` in place by the method and pattern of `measured`, with the costliest layers left dense until no more than `budget`
    of the metric is lost; how many is found by halving, and the result is what was evaluated.

    Args:
        measured: the layers' costs one at a time, of the same layers.
        budget: in the metric's unit, 0 or more.
        permute, include, exclude, calibration, progress: as of `prune`.

    Raises:
        InputError: as of `prune`; a negative budget, a sensitivity of other layers, or no layer that the budget lets be pruned.
    """
    if not budget >= 0:
        raise InputError(f"budget {budget} is negative, expected 0 or more in the unit of the metric")
    ready = prepare(model, example_inputs, measured.method, permute, measured.pattern, include, exclude, calibration, progress)
    with undone_on_failure(model, ready):
        ranked = [layer.name for layer in measured.ranked]
        if set(ranked) != set(ready.names):
            other = sorted(set(ranked) ^ set(ready.names))[0]
            raise InputError(
                f"the sensitivity is of other layers (first: {other!r}), expected those to prune; measure it with these options"
            )
        choices = decide(model, ready.names, ready.method, ready.pattern, ready.calibration, progress)
        again = norm_batches(model, ready, measured.method)
        sign = 1 if measured.direction == "higher" else -1
        values: dict[int, float] = {}

        def fits(count: int) -> bool:
            """Whether leaving the `count` costliest layers dense is enough."""
            some = {name: choices[name] for name in ranked[count:]}
            with tried(model, some, again, len(example_inputs)):
                values[count] = float(evaluate(model))
            if progress is not None:
                progress("pruning tried", len(values), None)
            return sign * (measured.dense - values[count]) <= budget

        count = _fewest(fits, len(ranked))
        if count == len(ranked):
            raise InputError(
                f"no layer can be pruned within a budget of {budget:g} {measured.metric}; give a larger budget, "
                "a method that updates weights, or retrain"
            )
        every = Pruning(measured.method, tuple(ready.records)).share_of_flops
        ready.records = [_left(record, measured, ranked[:count]) for record in ready.records]
        some = {name: choices[name] for name in ranked[count:]}
        record = recorded(model, ready, measured.method, some)
        write(model, some, again, len(example_inputs), ready.notes, used=ready.method.is_calibrated)
    pruning = replace(record, notes=tuple(ready.notes))
    return Budgeted(pruning, measured.dense, values[count], tuple(ranked[:count]), every)


def _fewest(fits: Callable[[int], bool], most: int) -> int:
    """Return the fewest for which `fits`, by halving; `most` where none below it does."""
    if fits(0):
        return 0
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _left(record: LayerRecord, measured: Sensitivity, names: Sequence[str]) -> LayerRecord:
    if record.name not in names:
        return record
    lost = next(layer.lost for layer in measured.layers if layer.name == record.name)
    return replace(record, eligible=False, reason=f"kept dense for the budget: pruned alone it costs {lost:.2f} {measured.metric}")
