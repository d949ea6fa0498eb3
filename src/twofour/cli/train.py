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
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
def command(model: str, data: str, weights: Path | None, recipe: str | None, out: Path, epochs: int | None, seed: int) -> None:
    """Train MODEL by a recipe and write the checkpoint.

    Weights that are 2:4 stay 2:4: their masks are held through every step.
    """
    import torch

    from twofour.cli.console import make_console, say
    from twofour.cli.progress import ProgressDisplay
    from twofour.compress.events import EpochFinished, StageStarted
    from twofour.errors import InputError
    from twofour.files import refuse_same, require_suffix
    from twofour.sources import load_weights, resolve_model, resolve_task
    from twofour.training import Checkpoint, derive_masks, load_recipe, recorded_masks, train

    require_suffix(out, ".safetensors", "train: --out")
    refuse_same(out, weights)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"train: --out {str(out)!r} is a folder or lies in none; name a file in a folder that exists")
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
    masks = recorded_masks(module, pruning) if pruning is not None else None
    console = make_console()
    with ProgressDisplay(console) as show:
        show(StageStarted(f"train {model}", chosen.epochs))
        variant = pruning.pattern if pruning is not None else "2:4" if derive_masks(module) else "dense"
        made = train(module, task, chosen, masks=masks, progress=lambda epoch: show(EpochFinished(variant, seed, epoch, chosen.epochs)))
    checkpoint = Checkpoint(made.state, made.metric_name, made.metric, made.history, made.recipe, model, data, pruning)
    checkpoint.save(out)
    say(console, f"{checkpoint}\n{out}")
