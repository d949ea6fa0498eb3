"""`prune`: examine, choose, set to zero, re-estimate batch-norm, record."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from twofour.errors import InputError
from twofour.pattern import Pattern
from twofour.pruning.batch_norm import measured_anew, why_statistics_stay
from twofour.pruning.calibration import reusable, tracked_norms
from twofour.pruning.capture import execute
from twofour.pruning.decide import Calibration, Report, decide, permutation_scores, require_calibration
from twofour.pruning.eligibility import examine
from twofour.pruning.methods import METHODS, Choice
from twofour.pruning.methods.method import Method, find_method
from twofour.pruning.permutation import Permutation, carried, undo
from twofour.pruning.permutation import permute as permute_channels
from twofour.pruning.permutation.record import carried_digest
from twofour.pruning.record import LayerRecord, Pruning
from twofour.pruning.sharded import fill_zero, is_sharded


def prune(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    method: str = "magnitude",
    permute: bool | float = True,
    pattern: str | Pattern = "2:4",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: Iterable[Any] | None = None,
    reestimate: bool | None = None,
    progress: Report | None = None,
) -> Pruning:
    """Prune the eligible weights of `model` in place and return the record.

    Every pruned value becomes exactly +0. The model is left exactly as it was if anything is refused.

    Args:
        example_inputs: positional arguments for one call of the model, first axis the batch.
        method: "magnitude", or one that looks at calibration data: "wanda", "ria", "sparsegpt-mask", "sparsegpt" and "alps" (the last
            two change kept values too). `docs/methods.md` compares them.
        permute: reorder channels first where that is proven harmless (see `permute`); a number is the search's budget in seconds. Only
            for the pattern 2:4. With "wanda" and "ria" the search keeps the most of their score instead of magnitude.
        pattern: "2:4", any "N:M", or "2:4 transposable". Only 2:4 patterns run on Sparse Tensor Cores.
        include: globs of layers to prune although the default leaves them dense (first convolution, classifier).
        exclude: globs of layers to leave dense.
        calibration: batches for the method, and to re-estimate batch-norm statistics on after pruning, no labels used (see
            `reestimate_batchnorm`); a tuple or list gives its first `len(example_inputs)` items to the model. A method that looks at
            data goes through them several times: an iterator is turned into a list.
        reestimate: whether batch-norm statistics are measured anew where calibration is given. None: where the method leaves the kept
            values as they are, so not after "sparsegpt" and "alps", whose new values give what the old statistics describe.
        progress: called with what is done (a batch or a layer), how many, and of how many if known.

    Raises:
        InputError: unknown method or pattern, a glob that matches nothing, no eligible layer, a weight with NaN or infinity, a model on
            the meta device or sharded over processes; calibration that is missing, does not fit the model, holds NaN, never reaches a
            layer, reaches it with too few rows or does not fit in memory.
    """
    ready = prepare(model, example_inputs, method, permute, pattern, include, exclude, calibration, progress)
    with undone_on_failure(model, ready):
        choices = decide(model, ready.names, ready.method, ready.pattern, ready.calibration, progress)
        record = recorded(model, ready, method, choices)
        statistics = norm_batches(model, ready, method, reestimate)
        write(model, choices, statistics, len(example_inputs), ready.notes, used=ready.method.is_calibrated)
    return replace(record, notes=tuple(ready.notes))


@dataclass
class Prepared:
    """A model checked and, if asked for, reordered: what is to be chosen, and how.

    Attributes:
        records: one a weight, pruned or dense with the reason.
        notes: grows while work goes on.
        permutation, earlier: the reordering just made, and the one that the model carried before.
    """

    method: Method
    pattern: Pattern
    records: list[LayerRecord]
    notes: list[str]
    calibration: Calibration | None
    permutation: Permutation | None = None
    earlier: Permutation | None = None

    @property
    def names(self) -> list[str]:
        """The weights to prune."""
        return [record.name for record in self.records if record.eligible]


def prepare(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    method: str,
    permute: bool | float,
    pattern: str | Pattern,
    include: Sequence[str],
    exclude: Sequence[str],
    calibration: Iterable[Any] | None,
    progress: Report | None = None,
) -> Prepared:
    """Check all that can be checked, and reorder the channels. Arguments and errors as of `prune`."""
    refuse_arguments(model, example_inputs)
    how = find_method(method, METHODS)
    require_calibration(method, how, calibration)
    parsed = Pattern.parse(pattern)
    parameters = dict(model.named_parameters())
    records, notes = survey(model, example_inputs, pattern=parsed, include=include, exclude=exclude)
    given = None if calibration is None else Calibration(reusable(calibration), example_inputs)
    ready = Prepared(how, parsed, records, notes, given, earlier=carried(model))
    refuse_unwritable(parameters, ready.names)
    if permute is not False and str(parsed) == "2:4":
        scores = permutation_scores(model, ready.names, how, given, progress)
        seconds = None if permute is True else float(permute)
        targets = dict.fromkeys(ready.names, 1)
        ready.permutation = permute_channels(model, example_inputs, targets=targets, scores=scores, seconds=seconds)
        notes += [f"permutation: {note}" for note in (ready.permutation.reason, *ready.permutation.notes) if note]
    return ready


def norm_batches(model: nn.Module, ready: Prepared, method: str, reestimate: bool | None = None) -> Iterable[Any] | None:
    """Return the batches to re-estimate batch-norm on, None for none; `reestimate` as of `prune`, and what it leaves out is noted."""
    if ready.calibration is None or reestimate is False:
        return None
    reason = why_statistics_stay(method) if reestimate is None else ""
    if not reason:
        return ready.calibration.batches
    if tracked_norms(model):
        ready.notes.append(reason)
    return None


@contextmanager
def undone_on_failure(model: nn.Module, ready: Prepared) -> Iterator[None]:
    """Run the body; if it fails, put every channel back where it was."""
    try:
        yield
    except BaseException:
        if ready.permutation is not None:
            undo(model, ready.permutation, ready.earlier)
        raise


def recorded(model: nn.Module, ready: Prepared, method: str, choices: Mapping[str, Choice]) -> Pruning:
    """Return the record of the choices, before they are written."""
    parameters = dict(model.named_parameters())
    layers = [_decided(r, choices.get(r.name), parameters[r.name], ready.permutation) for r in ready.records]
    ready.notes += [f"{name}: {note}" for name, choice in choices.items() for note in choice.notes]
    masks = {name: choice.mask for name, choice in choices.items()}
    return Pruning(method, tuple(layers), masks, pattern=str(ready.pattern), order=carried_digest(model))


def _decided(record: LayerRecord, choice: Choice | None, weight: Tensor, permutation: Permutation | None) -> LayerRecord:
    if choice is None:
        return record
    kept = kept_magnitude(weight.detach(), choice.mask)
    return replace(record, kept_magnitude=kept, permuted=told(permutation, record.name), output_error=choice.output_error)


def told(permutation: Permutation | None, name: str) -> str:
    """Return the record's sentence about one weight: yes with what it gained, or why not."""
    if permutation is None:
        return ""
    if permutation.reason:
        return f"no: {permutation.reason}"
    layer = next((layer for layer in permutation.layers if layer.name == name), None)
    if layer is None:
        return "no: not reached by the analysis"
    if layer.moved_share:
        return f"yes: {100 * layer.kept_before:.1f} → {100 * layer.kept_after:.1f} % kept"
    return f"no: {layer.reason or 'no better order was found'}"


def survey(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    *,
    pattern: str | Pattern = "2:4",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> tuple[list[LayerRecord], list[str]]:
    """Return one record a weight, pruned or dense with the reason, and notes; the model is not changed. Arguments as of `prune`.

    Raises:
        InputError: no eligible layer, a glob that matches nothing, a model on the meta device or sharded over processes.
    """
    refuse_arguments(model, example_inputs)
    pattern = Pattern.parse(pattern)
    refuse_unreadable(dict(model.named_parameters()))
    execution = execute(model, example_inputs)
    records = [_fitting(record, pattern) for record in examine(model, execution, include, exclude)]
    if not any(record.eligible for record in records):
        raise InputError(
            f"the model has no layer that can be {pattern}: {'; '.join(f'{r.name}: {r.reason}' for r in records[:5]) or 'no weights'}"
        )
    return records, [execution.note] if execution.note else []


def eligible_names(model: nn.Module, example_inputs: tuple[Any, ...], **options: Any) -> tuple[str, ...]:
    """Return the names of the weights that `prune` with the same `pattern`, `include` and `exclude` would prune."""
    return tuple(record.name for record in survey(model, example_inputs, **options)[0] if record.eligible)


def refuse_arguments(model: Any, example_inputs: Any) -> None:
    """Raise InputError unless `model` is a module and `example_inputs` a tuple or list of what its call takes."""
    if not isinstance(model, nn.Module):
        raise InputError(f"prune: model is of {type(model).__name__}, expected a torch.nn.Module to prune; give the network itself")
    if not isinstance(example_inputs, (tuple, list)):
        raise InputError(f"prune: example_inputs is of {type(example_inputs).__name__}, expected a tuple of arguments; give (x,) for one x")


def refuse_unreadable(parameters: Mapping[str, Tensor]) -> None:
    """Raise InputError for parameters without values of their own in this process."""
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise InputError(f"weight {name!r} has no shape yet, expected an initialised model; run it once first")
        if parameter.is_meta:
            raise InputError(f"weight {name!r} is on the meta device, expected values; load the checkpoint first, or use prune_files")
        if is_sharded(parameter):
            raise InputError(f"weight {name!r} is sharded over processes, expected a whole model; prune before fully_shard")


def refuse_unwritable(parameters: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raise InputError for a weight to prune that has no sound values of its own, or that cannot be written in place."""
    at: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        if pointer := parameter.data_ptr():
            at.setdefault(pointer, []).append(name)
    for name in names:
        weight = parameters[name].detach()
        if not is_finite(weight):
            raise InputError(f"weight {name!r} holds NaN or infinity, expected finite values; load a sound checkpoint")
        if weight.is_inference() and not torch.is_inference_mode_enabled():
            raise InputError(f"weight {name!r} was made in inference mode, expected one that can be written; make the model outside of it")
        if any(stride == 0 and size > 1 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
            raise InputError(f"weight {name!r} is expanded, expected memory of its own for every value; replace it by a contiguous clone")
        other = next((other for other in at.get(weight.data_ptr(), ()) if other != name), None)
        if other is not None:
            raise InputError(
                f"weight {name!r} lies in the memory of {other!r}, expected memory of its own; "
                "tie the layers by one parameter, or replace it by a clone"
            )


def _fitting(record: LayerRecord, pattern: Pattern) -> LayerRecord:
    reason = pattern.why_not(record.shape) if record.eligible else ""
    return replace(record, eligible=False, reason=reason) if reason else record


def is_finite(weight: Tensor) -> bool:
    """Whether `weight` holds neither NaN nor infinity."""
    return bool(torch.isfinite(weight if weight.element_size() > 1 else weight.float()).all())


def kept_magnitude(weight: Tensor, mask: Tensor) -> float:
    """Return Σ|w kept| / Σ|w|, summed in float64; 1.0 for a weight of zeros."""
    magnitude = weight.float().abs() if weight.element_size() < 4 else weight.abs()
    total = float(magnitude.sum(dtype=torch.float64))
    return float(magnitude.mul_(mask).sum(dtype=torch.float64)) / total if total else 1.0


def write(
    model: nn.Module,
    choices: Mapping[str, Choice],
    calibration: Iterable[Any] | None,
    num_inputs: int,
    notes: list[str],
    *,
    used: bool = False,
) -> None:
    """Write new values, set the dropped ones to +0 and re-estimate; put the weights back if that fails.

    Without batch-norm to re-estimate no copy is kept, so an interruption in the midst of the writing leaves it half done.

    Args:
        calibration: batches to re-estimate batch-norm on, None for none.
        notes: gets what was re-estimated, or why not.
        used: whether the calibration data served the method, so that nothing is lost where there is no batch-norm.
    """
    if calibration is not None and not tracked_norms(model):
        if not used:
            notes.append("calibration was not used: the model has no batch-norm with running statistics")
        calibration = None
    parameters = dict(model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in choices} if calibration is not None else {}
    try:
        with torch.no_grad():
            for name, choice in choices.items():
                if choice.weight is not None:
                    parameters[name].copy_(choice.weight)
                fill_zero(parameters[name], ~choice.mask)
        if calibration is None:
            return
        _, note = measured_anew(model, calibration, num_inputs)
    except BaseException:
        with torch.no_grad():
            for name, weight in before.items():
                parameters[name].copy_(weight)
        raise
    notes.append(note)
