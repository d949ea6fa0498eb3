"""The ways in which `twofour prune` prunes a model: at once, within a budget, block by block; or one layer at a time to see the cost."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from twofour.cli.asked import Asked
from twofour.cli.console import make_console, say
from twofour.cli.steps import Steps
from twofour.cli.tables import print_pruning, print_sensitivity
from twofour.compress.pipeline import refuse_absent_device
from twofour.errors import TwofourError
from twofour.pruning import Budgeted, Pruning, Sensitivity, prune, prune_blocks, prune_within, sensitivity
from twofour.pruning.batch_norm import settle_norms
from twofour.pruning.calibration import moved, tracked_norms
from twofour.pruning.methods import METHODS
from twofour.pruning.methods.method import find_method
from twofour.report.budget import time_of_budget
from twofour.report.sensitivity import plot_sensitivity
from twofour.sources import Task, load_weights, resolve_model, resolve_task
from twofour.training import Checkpoint, calibration_batches, evaluate, evaluate_loss


def run(name: str, data: str, weights: Path, out: Path, asked: Asked) -> None:
    """Load the model, prune it as asked, write `out` and tell what it costs."""
    find_method(asked.method, METHODS)
    refuse_absent_device(asked.device)
    task = resolve_task(data)
    module = resolve_model(name).make(task.num_classes)
    load_weights(module, weights, spec=name)
    if not asked.by_block:
        module.to(asked.device)
    console = make_console()
    with Steps(console) as show:
        if asked.sensitivity:
            measured = _measure(module, task, out, asked, show)
        elif asked.keep_dense is not None:
            record, told, metric = _within(module, task, out, asked, show)
        else:
            record, told, metric = _at_once(module, task, asked, show)
    if asked.sensitivity:
        plot_sensitivity(measured, out.with_suffix(".svg"))
        _tell_sensitivity(measured, out, console)
        return
    Checkpoint.of(module, task.metric.name, metric, model=name, data=data, pruning=record).save(out)
    print_pruning(record, console)
    say(console, f"{record}\n{task.metric.name}: {told}\n{out}")


def _common(asked: Asked) -> dict[str, Any]:
    return {"pattern": asked.pattern, "include": asked.include, "exclude": asked.exclude}


def _at_once(module: nn.Module, task: Task, asked: Asked, show: Steps) -> tuple[Pruning, str, float]:
    """Return the record, the metric told at each step, and the last of them."""
    told = [f"dense {evaluate(module, task):.2f}"]
    example = _example(task, asked)
    calibrated = METHODS[asked.method].is_calibrated
    batches = _batches(task, asked) if calibrated or asked.by_block else None
    if asked.by_block:
        assert batches is not None
        placed: dict[str, Any] = {"device": asked.device, "resume": asked.resume}
        record = prune_blocks(module, example, batches, method=asked.method, progress=show, **placed, **_common(asked))
    else:
        options = {**_common(asked), "method": asked.method, "permute": asked.permute}
        record = prune(module, example, calibration=batches, reestimate=False, progress=show, **options)
    metric = evaluate(module, task)
    told.append(f"one-shot {record.pattern} {metric:.2f}")
    record, again = settle_norms(module, record, lambda: _batches(task, asked), len(example))
    if again:
        metric = evaluate(module, task)
        told.append(f"with batch-norm re-estimated {metric:.2f}")
    return record, ", ".join(told), metric


def _example(task: Task, asked: Asked) -> tuple[Any, ...]:
    """Return example inputs where the whole model is."""
    return tuple(moved(x, torch.device("cpu" if asked.by_block else asked.device)) for x in task.example_inputs())


def _batches(task: Task, asked: Asked) -> list[Any]:
    """Return the calibration batches that were asked for, of like sizes."""
    count = -(-asked.calibration // asked.batch)
    return list(calibration_batches(task, -(-asked.calibration // count), count))


def _needed(module: nn.Module, task: Task, asked: Asked) -> list[Any] | None:
    """Return calibration batches where the method looks at them or batch-norm can be re-estimated on them."""
    return _batches(task, asked) if METHODS[asked.method].is_calibrated or tracked_norms(module) else None


def _measure(module: nn.Module, task: Task, path: Path, asked: Asked, show: Steps) -> Sensitivity:
    by_loss = asked.by == "loss"
    of: Callable[[nn.Module, Task], float] = evaluate_loss if by_loss else evaluate
    return sensitivity(
        module,
        _example(task, asked),
        lambda model: of(model, task),
        metric="loss" if by_loss else task.metric.name,
        direction="lower" if by_loss else task.metric.direction,
        method=asked.method,
        calibration=_needed(module, task, asked),
        resume=path,
        progress=show,
        **_common(asked),
    )


def _within(module: nn.Module, task: Task, out: Path, asked: Asked, show: Steps) -> tuple[Pruning, str, float]:
    assert asked.budget is not None
    measured = _measure(module, task, out.with_suffix(".sensitivity.json"), asked, show)
    done = prune_within(
        module,
        _example(task, asked),
        lambda model: evaluate(model, task),
        measured,
        asked.budget,
        permute=asked.permute,
        include=asked.include,
        exclude=asked.exclude,
        calibration=_needed(module, task, asked),
        progress=show,
    )
    told = f"dense {done.dense:.2f}, {done.pruning.pattern} {done.value:.2f}\n{done}{_time_told(module, task, done, show)}"
    return done.pruning, told, done.value


def _time_told(module: nn.Module, task: Task, done: Budgeted, show: Steps) -> str:
    """Return the line on what the layers left dense cost in time, or why that is not known; nothing where none was left."""
    if not done.kept_dense:
        return ""
    try:
        told = str(time_of_budget(module, task.example_inputs(), done, progress=lambda n, of, layer: show("timing layers", n, of)))
    except TwofourError as error:
        told = f"not measured, as no plan can be built here: {error}"
    return f"\ntime: {told}"


def _tell_sensitivity(measured: Sensitivity, out: Path, console: Console) -> None:
    print_sensitivity(measured, console)
    say(console, f"{measured}\n{out}\n{out.with_suffix('.svg')}")
