"""`prune_blocks`: a transformer pruned block by block, with one block and one batch of its activations on the device at a time.

Every block is calibrated on what the pruned blocks before it give, so later blocks make up for earlier ones. The model itself is not
touched until every block is done.

Source: the order of Frantar and Alistarh 2023, arXiv 2301.00774, section 4.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twofour.errors import InputError, TwofourError
from twofour.pattern import Pattern
from twofour.pruning.apply import kept_magnitude, refuse_unwritable, survey
from twofour.pruning.block_files import Journal
from twofour.pruning.block_inputs import Batch, capture_inputs, run_block
from twofour.pruning.calibration import device_of, is_out_of_memory, out_of_memory, refusal
from twofour.pruning.decide import Report, chosen, require_calibration
from twofour.pruning.methods import METHODS, Choice
from twofour.pruning.methods.method import Method, find_method
from twofour.pruning.permutation.record import carried_digest
from twofour.pruning.record import LayerRecord, Pruning
from twofour.pruning.sharded import fill_zero
from twofour.pruning.statistics import Part, collecting, refuse_unreached


@dataclass(frozen=True)
class Block:
    """One block: its module and the eligible weights in it, by their names in the model -> in the block."""

    name: str
    module: nn.Module
    weights: dict[str, str]


def prune_blocks(
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    calibration: Iterable[Any],
    *,
    method: str = "sparsegpt",
    device: torch.device | str | None = None,
    blocks: str | None = None,
    pattern: str | Pattern = "2:4",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    resume: str | Path | None = None,
    progress: Report | None = None,
) -> Pruning:
    """Prune the repeated blocks of `model` in place, one after another, and return the record; all else stays dense.

    On `device` lie one block, one batch and the statistics of that block; activations between blocks wait in the model's memory.

    Args:
        example_inputs: positional arguments for one call of the model, first axis the batch.
        calibration: batches, as of `prune`.
        method: as of `prune`; "magnitude" does not look at the data.
        device: where a block is run and its weights are chosen; None takes the model's own.
        blocks: name of the module list that holds the blocks; None takes the one with the most weights.
        resume: a folder that keeps finished blocks; the same call with the same folder goes on after the last one.
        progress: called with what is done (a batch or a block), how many, and of how many if known.

    Raises:
        InputError: as of `prune`; the model has no blocks, they are no plain chain, or `resume` was begun with something else.
            The model is left exactly as it was.
    """
    how = find_method(method, METHODS)
    require_calibration(method, how, calibration)
    if calibration is None:
        raise InputError("prune_blocks: calibration is None, expected batches: blocks are found by running the model; or use prune")
    parsed = Pattern.parse(pattern)
    records, notes = survey(model, example_inputs, pattern=parsed, include=include, exclude=exclude)
    found = find_blocks(model, records, blocks)
    refuse_shared(model, found)
    inside = {name for block in found for name in block.weights}
    records = [r if r.name in inside or not r.eligible else replace(r, eligible=False, reason="outside the blocks") for r in records]
    parameters = dict(model.named_parameters())
    refuse_unwritable(parameters, sorted(inside))
    batches = capture_inputs(model, [block.module for block in found], calibration, len(example_inputs))
    options = {"method": method, "pattern": str(parsed), "weights": sorted(inside)}
    journal = Journal(resume, options, batches) if resume is not None else None
    walk = Walk(how, parsed, usable(device) if device is not None else device_of(model), batches, journal, progress)
    choices: dict[str, Choice] = {}
    for index, block in enumerate(found):
        choices |= walk.step(index, block, last=index + 1 == len(found))
        if progress is not None:
            progress("block", index + 1, len(found))
    layers = [_recorded(record, parameters[record.name], choices.get(record.name)) for record in records]
    notes += [f"{name}: {note}" for name, choice in choices.items() for note in choice.notes]
    with torch.no_grad():
        for name, choice in choices.items():
            write_choice(parameters[name], choice)
    masks = {name: choice.mask.to(parameters[name].device) for name, choice in choices.items()}
    return Pruning(method, tuple(layers), masks, tuple(notes), str(parsed), carried_digest(model))


def usable(device: torch.device | str) -> torch.device:
    """Return the device.

    Raises:
        InputError: torch does not know it, or it is not here.
    """
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    # torch raises AssertionError where it was made without CUDA.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"prune_blocks: device {str(device)!r} cannot be used ({reason}), expected cpu, cuda or cuda:N") from error
    return place


def refuse_shared(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Raise InputError for a weight to prune that several blocks hold: it would be chosen by what only one of them sees."""
    holder: dict[int, str] = {}
    for block in blocks:
        for parameter in {id(p) for p in block.module.parameters()}:
            first = holder.setdefault(parameter, block.name)
            names = [name for other in blocks for name in other.weights if id(model.get_parameter(name)) == parameter]
            if first != block.name and names:
                raise InputError(f"weight {names[0]!r} belongs to {first!r} and {block.name!r}, expected blocks of their own; use prune")


def write_choice(weight: Tensor, choice: Choice) -> None:
    """Write a choice into its weight: new values where it has them, +0 where dropped."""
    if choice.weight is not None:
        weight.copy_(choice.weight)
    fill_zero(weight, ~choice.mask.to(weight.device))


def _recorded(record: LayerRecord, weight: Tensor, choice: Choice | None) -> LayerRecord:
    if choice is None:
        return record
    kept = kept_magnitude(weight.detach(), choice.mask.to(weight.device))
    return replace(record, kept_magnitude=kept, output_error=choice.output_error)


def find_blocks(model: nn.Module, records: Sequence[LayerRecord], name: str | None = None) -> list[Block]:
    """Return the blocks in order: the children of the module list `name`, or of the one whose like children hold the most weights.

    Raises:
        InputError: there is none.
    """
    sizes = {record.name: record.num_weights for record in records if record.eligible}
    lists = {n: m for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential)) and len(m)}
    if name is not None and name not in lists:
        raise InputError(f"blocks {name!r} is no module list of the model, expected one of {sorted(lists)}")
    weight = {
        n: sum(size for w, size in sizes.items() if w.startswith(f"{n}.")) for n, m in lists.items() if len({type(c) for c in m}) == 1
    }
    if name is None:
        name = max(weight, key=lambda n: weight[n], default=None)
        if name is None or not weight[name]:
            raise InputError("the model has no list of like blocks with weights to prune, expected a transformer; use prune")
    blocks = []
    for child, module in lists[name].named_children():
        prefix = f"{name}.{child}"
        blocks.append(Block(prefix, module, {w: w.removeprefix(f"{prefix}.") for w in sizes if w.startswith(f"{prefix}.")}))
    if not any(block.weights for block in blocks):
        raise InputError(f"blocks {name!r} hold no weight to prune, expected a list of like blocks with some; name another")
    return blocks


@dataclass
class Walk:
    """The walk through the blocks: `batches` hold what the next block gets."""

    method: Method
    pattern: Pattern
    device: torch.device
    batches: list[Batch]
    journal: Journal | None
    progress: Report | None

    def step(self, index: int, block: Block, last: bool) -> dict[str, Choice]:
        """Return the choices for one block, by the weights' names in the model, and move the batches behind it."""
        known = self.journal.read(index, block) if self.journal is not None else None
        try:
            working = copy.deepcopy(block.module).to(self.device)
            choices = known if known is not None else self._choose(index, block, working)
            with torch.no_grad():
                for name, choice in choices.items():
                    write_choice(working.get_parameter(block.weights[name]), choice)
            if known is None and self.journal is not None:
                self.journal.write(index, block, choices)
            if not last:
                self._advance(index, working, block.name)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, TwofourError) or not is_out_of_memory(error):
                raise
            raise out_of_memory(self.batches[0].hidden, block.name) from error
        return choices

    def _choose(self, index: int, block: Block, working: nn.Module) -> dict[str, Choice]:
        local = list(block.weights.values())
        parts: Mapping[str, list[Part]] = {name: [] for name in local}
        if self.method.is_calibrated and local:
            with collecting(working, local, self.method.has_hessian) as collector:
                collector.prefix = f"{block.name}."
                names = {local: name for name, local in block.weights.items()}
                collector.wanted = {key: names[name] for key, name in collector.wanted.items()}
                for number, batch in enumerate(self.batches, 1):
                    collector.current = ""
                    self._run(index, working, batch, number, lambda: collector.current or block.name)
                    if self.progress is not None:
                        self.progress(f"{block.name}, calibration batch", number, len(self.batches))
            refuse_unreached(collector)
            parts = {block.weights[name]: collector.parts[key] for key, name in collector.wanted.items()}
        choices = {}
        for name, inner in block.weights.items():
            choice = chosen(working.get_parameter(inner), list(parts[inner]), self.method, self.pattern, name)
            parts[inner].clear()
            weight = None if choice.weight is None else choice.weight.cpu()
            choices[name] = replace(choice, mask=choice.mask.cpu(), weight=weight)
        return choices

    def _advance(self, index: int, working: nn.Module, name: str) -> None:
        with torch.no_grad():
            working.eval()
            for number, batch in enumerate(self.batches, 1):
                batch.hidden = self._run(index, working, batch, number, lambda: name).to(batch.hidden.device)

    def _run(self, index: int, working: nn.Module, batch: Batch, number: int, where: Callable[[], str]) -> Tensor:
        try:
            return run_block(working, index, batch, self.device)
        # A block raises whatever its own code meets on activations it was not made for.
        except Exception as error:
            raise refusal(error, batch.hidden, number, where()) from error
