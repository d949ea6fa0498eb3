"""`permute`: analyse, search, prove, then reorder."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from twofour.errors import InputError
from twofour.pruning.capture import Execution, last_linears
from twofour.pruning.eligibility import examine
from twofour.pruning.permutation.analysis import Analysis, SizeUnknown, analyse
from twofour.pruning.permutation.apply import Reordering, apply_, atom_order, moved, moves_of
from twofour.pruning.permutation.capture import Capture, Inputs, capture, sentence
from twofour.pruning.permutation.labels import Ints
from twofour.pruning.permutation.locate import culprits, first_wrong
from twofour.pruning.permutation.problems import Problem, columns_of, kept_by, kept_magnitude, problem_of, source_of, views_of
from twofour.pruning.permutation.proof import Check, prove, tensors_of
from twofour.pruning.permutation.record import LayerOrder, Permutation, carry, names_and_shapes
from twofour.pruning.permutation.resume import Progress
from twofour.pruning.permutation.search import schedule, search
from twofour.pruning.permutation.spaces import Spaces, derive

# Without a budget the fixed schedules run, cut to this many seconds by the cost model.
DEFAULT_SECONDS = 80.0


def permute(
    model: nn.Module,
    example_inputs: Any,
    *,
    seed: int = 0,
    seconds: float | None = None,
    device: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    targets: Mapping[str, int] | None = None,
    scores: Mapping[str, torch.Tensor] | None = None,
    resume: str | Path | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Permutation:
    """Reorder channels in place so that 2:4 keeps more magnitude; the model computes the same function, or is left as it is.

    Args:
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments; the first axis is the batch.
        seed: of the search; the same seed gives the same order.
        seconds: budget of the search; the schedule follows from it and the sizes, and the clock cuts only a late one.
        device: torch device of the search; None takes the model's GPU, or the CPU.
        include, exclude: globs of layers, as in `prune`.
        targets: weights that count -> their reduction axis; None takes those that `prune` would prune.
        scores: weights -> importance of each value, of the weight's shape, to be kept in place of its magnitude; "kept" in the record
            is then of these. What may move, and its proof, do not depend on them.
        resume: a file that keeps finished searches; a second call with it goes on where the first one ended.
        progress: called with what is searched and the share done, in 0-1.

    Raises:
        InputError: `example_inputs` is of no usable kind, a glob or target matches nothing, or a score has another shape.
    """
    inputs = Inputs.of(example_inputs)
    captures, reason = capture(model, inputs)
    if reason:
        return Permutation(reason=reason, seed=seed)
    if targets is None:
        targets = default_targets(model, captures[0], include, exclude)
    try:
        analysis = analyse(model, captures)
    except SizeUnknown as error:
        return Permutation(reason=str(error), seed=seed)
    unknown = set(targets) - set(analysis.by_name)
    if unknown:
        raise InputError(f"targets name {sorted(unknown)[0]!r}, expected names of the model's parameters")
    spaces = derive(analysis.ledger)
    tensors = _judged(analysis, scores or {})
    problems = _problems(spaces, analysis, targets, tensors)
    found, complete = _search(problems, tensors, analysis, seed, seconds, _device(model, device), resume, progress)
    record = Permutation(seed=seed, complete=complete, notes=sorted({c.note for c in captures if c.note}))
    mode = "leaves" if any(c.mode == "leaves" for c in captures) else "train"
    try:
        order, record.checks = _proven(model, inputs, captures, analysis, found, mode, record.notes)
    except Exception as error:  # noqa: BLE001 - the model's own code runs there, in another format; the reason is reported
        return Permutation(reason=f"the proof cannot run: {sentence(error)}", seed=seed)
    record.moves = moves_of(analysis.held, order)
    record.names, record.shapes = names_and_shapes(model, record.moves)
    record.layers = _layers(analysis, spaces, targets, tensors, record)
    apply_(tensors_of(model), record.moves)
    carry(model, record)
    return record


def _judged(analysis: Analysis, scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every held tensor by its first name, or the scores that stand for it."""
    tensors = {h.names[0]: h.tensor for h in analysis.held}
    for name, score in scores.items():
        weight = analysis.by_name[name].tensor if name in analysis.by_name else None
        if weight is None or weight.shape != score.shape:
            wanted = "a parameter's name" if weight is None else f"{list(weight.shape)}"
            raise InputError(f"scores of {name!r} have shape {list(score.shape)}, expected {wanted}; give one score a value of the weight")
        tensors[analysis.by_name[name].names[0]] = score
    return tensors


def default_targets(model: nn.Module, captured: Capture, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> dict[str, int]:
    """The weights `prune` would prune, each with its reduction axis."""
    parameter_of = dict(captured.program.graph_signature.inputs_to_parameters)
    order: list[str] = []
    for node in captured.program.graph.nodes:
        if node.op == "call_function":
            order += [parameter_of[a.name] for a in node.args if isinstance(a, fx.Node) and a.name in parameter_of]
    execution = Execution(tuple(dict.fromkeys(order)), {}, last_linears(captured.program))
    return {r.name: 1 for r in examine(model, execution, include, exclude) if r.eligible and r.shape[1] % 4 == 0}


def _device(model: nn.Module, device: Any) -> Any:
    if device is not None:
        return None if torch.device(device).type == "cpu" else torch.device(device)
    used = {p.device for p in model.parameters() if p.device.type == "cuda"}
    return min(used, key=str) if used else None


def _problems(spaces: Spaces, analysis: Analysis, targets: Mapping[str, int], tensors: Mapping[str, torch.Tensor]) -> list[Problem]:
    views = views_of(spaces.orbits, analysis.held, targets)
    made = [problem_of(orbit, seen, tensors) for orbit, seen in zip(spaces.orbits, views, strict=True) if seen]
    return [p for p in made if p is not None]


def _search(
    problems: Sequence[Problem],
    tensors: Mapping[str, torch.Tensor],
    analysis: Analysis,
    seed: int,
    seconds: float | None,
    device: Any,
    resume: str | Path | None,
    progress: Callable[[str, float], None] | None,
) -> tuple[list[Reordering], bool]:
    """A reordering for every problem where the search found one that keeps more, and whether all schedules ran to their end."""
    rows = [sum(tensors[v.name].numel() // tensors[v.name].shape[v.axis] for v in p.views) for p in problems]
    costs = [schedule(len(p.slots), r, None).seconds for p, r in zip(problems, rows, strict=True)]
    total = sum(costs) or 1.0
    budget = min(total, DEFAULT_SECONDS) if seconds is None else seconds
    store = Progress(resume)
    found: list[Reordering] = []
    complete = True
    spent = 0.0
    for problem, cost in zip(problems, costs, strict=True):
        columns = columns_of(problem, tensors)
        share = budget * cost / total
        mark = hashlib.sha256(columns.tobytes() + repr((seed, share, problem.slots.tobytes())).encode()).hexdigest()
        order = store.get(mark)
        if order is None:
            label = problem.views[0].name + (f" and {len(problem.views) - 1} more" if len(problem.views) > 1 else "")
            before = spent / total

            def report(part: float, label: str = label, before: float = before, cost: float = cost) -> None:
                if progress is not None:
                    progress(label, before + part * cost / total)

            result = search(columns, seed=seed, seconds=share, cut=seconds is not None, device=device, progress=report)
            report(1.0)  # also where the clock cut it
            order = result.order
            complete = complete and result.complete
            if result.complete:
                store.put(mark, order)
        spent += cost
        reordering = Reordering(problem.orbit, source_of(problem, order))
        if (order != np.arange(len(order))).any() and (problem.exact or _gains(reordering, problem, analysis, tensors)):
            found.append(reordering)
    return found, complete


def _gains(reordering: Reordering, problem: Problem, analysis: Analysis, tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all weights that read the channels together keep more, judged on their full values."""
    moves = moves_of(analysis.held, atom_order(analysis.ledger.num_atoms, [reordering]))
    return kept_by(tensors, problem.touched, moves) > kept_by(tensors, problem.touched, {})


def _proven(
    model: nn.Module,
    inputs: Inputs,
    captures: Sequence[Capture],
    analysis: Analysis,
    found: Sequence[Reordering],
    mode: str,
    notes: list[str],
) -> tuple[Ints, list[Check]]:
    """The order that passes the proof and its checks; reorderings that fail are left out and their operation is noted."""
    count = analysis.ledger.num_atoms
    operations = sum(node.op == "call_function" for node in captures[0].program.graph.nodes)

    def check(some: Iterable[Reordering]) -> list[Check]:
        moves = moves_of(analysis.held, atom_order(count, some))
        return prove(model, inputs, moves, mode=mode, operations=operations) if moves else []

    checks = check(found)
    if all(c.passed for c in checks):
        return atom_order(count, found), checks
    wrong = culprits(found, lambda some: all(c.passed for c in check(some)))
    if any(c.mode == "eval" and not c.passed for c in checks):
        operation = first_wrong(model, inputs, captures, analysis, atom_order(count, wrong or found))
    else:
        operation = "an operation that runs in training only"
    worst = max(c.error for c in checks)
    left = [r for r in found if not any(r is w for w in wrong)]
    notes.append(f"the proof failed (error {worst:.1e}) at {operation}; {len(found) - len(left)} of {len(found)} reorderings were left out")
    again = check(left)
    if wrong and all(c.passed for c in again):
        return atom_order(count, left), again
    notes.append("the rest does not pass the proof either; every channel keeps its place")
    return atom_order(count, []), checks


def _layers(
    analysis: Analysis, spaces: Spaces, targets: Mapping[str, int], tensors: Mapping[str, torch.Tensor], record: Permutation
) -> list[LayerOrder]:
    free = np.zeros(analysis.ledger.num_atoms, bool)
    for orbit in spaces.orbits:
        free[orbit.atoms] = True
    layers = []
    for name, axis in targets.items():
        held = analysis.by_name[name]
        weight = tensors[held.names[0]]
        index = record.moves.get(held.names[0], {}).get(axis)
        before, total = kept_magnitude(weight, axis)
        after, _ = kept_magnitude(moved(weight.detach(), record.moves.get(held.names[0], {})), axis)
        atoms = held.atoms[axis]
        share = float(free[atoms].mean()) if atoms.size else 0.0
        stopped = atoms[~free[atoms]]
        reason = (spaces.reason(stopped) or "no other channel stands in the same places") if stopped.size else ""
        moved_share = 0.0 if index is None else float((index != np.arange(len(index))).mean())
        kept = (before / total, after / total) if total else (1.0, 1.0)
        layers.append(LayerOrder(name, axis, weight.numel(), share, moved_share, *kept, reason))
    return layers
