"""`twofour train`."""

from pathlib import Path

import click

from twofour.cli import options


@click.command()
@options.model_argument
@options.data_option
@options.weights_option
@options.recipe_option
@click.option("--out", type=options.PATH, required=True, help="The checkpoint, .safetensors.")
@click.option("--epochs", type=click.IntRange(1), help="Replaces the recipe's number of epochs.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
def command(model: str, data: str, weights: Path | None, recipe: str | None, out: Path, epochs: int | None, seed: int) -> None:
    """Train MODEL by a recipe and write the checkpoint.

    Weights that are 2:4 stay 2:4: their masks are held through every step.
    """
    import torch
    from rich.console import Console

    from twofour.cli.progress import ProgressDisplay
    from twofour.compress.events import EpochFinished, StageStarted
    from twofour.errors import InputError
    from twofour.sources import load_weights, resolve_model, resolve_task
    from twofour.training import Checkpoint, load_recipe, train

    if not out.absolute().parent.is_dir():
        raise InputError(f"train: folder {str(out.absolute().parent)!r} of --out does not exist; make it first")
    task = resolve_task(data)
    chosen = load_recipe(recipe or data)
    changes = {"seed": chosen.seed + seed, **({"epochs": epochs} if epochs is not None else {})}
    chosen = chosen.model_copy(update=changes)
    torch.manual_seed(chosen.seed)
    module = resolve_model(model).make(task.num_classes)
    pruning = None
    if weights is not None:
        load_weights(module, weights)
        pruning = Checkpoint.pruning_of(weights)
    console = Console()
    with ProgressDisplay(console) as show:
        show(StageStarted(f"train {model}", chosen.epochs))
        variant = "2:4" if pruning is not None else "dense"
        made = train(module, task, chosen, progress=lambda epoch: show(EpochFinished(variant, seed, epoch, chosen.epochs)))
    checkpoint = Checkpoint(made.state, made.metric_name, made.metric, made.history, made.recipe, model, data, pruning)
    checkpoint.save(out)
    console.print(f"{checkpoint}\n{out}", highlight=False, soft_wrap=True)
