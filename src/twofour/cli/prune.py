"""`twofour prune`."""

from pathlib import Path

import click

from twofour.cli import options


@click.command()
@options.model_argument
@options.data_option
@options.weights_option
@click.option("--out", type=options.PATH, required=True, help="The pruned checkpoint, .safetensors.")
@options.method_option
@options.include_option
@options.exclude_option
def command(
    model: str, data: str, weights: Path | None, out: Path, method: str, include: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    """Prune the weights of MODEL to 2:4 and write the checkpoint; no retraining."""
    from rich.console import Console

    from twofour.cli.tables import print_pruning
    from twofour.errors import InputError
    from twofour.pruning import prune
    from twofour.sources import load_weights, resolve_model, resolve_task
    from twofour.training import Checkpoint, evaluate

    if weights is None:
        raise InputError("prune: no weights given, expected --weights FILE with the trained dense network")
    task = resolve_task(data)
    module = resolve_model(model).make(task.num_classes)
    load_weights(module, weights)
    dense = evaluate(module, task)
    record = prune(module, task.example_inputs(), method=method, include=include, exclude=exclude)
    metric = evaluate(module, task)
    Checkpoint.of(module, task.metric.name, metric, model=model, data=data, pruning=record).save(out)
    console = Console()
    print_pruning(record, console)
    console.print(f"{record}\n{task.metric.name}: dense {dense:.2f}, one-shot 2:4 {metric:.2f}\n{out}", highlight=False, soft_wrap=True)
