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
@options.resume_option
@click.option("--epochs", type=click.IntRange(1, 2**31), help="Replaces the recipe's number of epochs.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True)
@options.device_option
@options.workers_option
@options.skip_bad_option
def command(
    model: str,
    data: str,
    weights: Path | None,
    recipe: str | None,
    out: Path,
    resume: bool,
    epochs: int | None,
    seed: int,
    device: str,
    workers: int | None,
    skip_bad: bool,
) -> None:
    """Train MODEL by a recipe and write the checkpoint.

    Weights that are 2:4 stay 2:4: their masks are held through every step. After each epoch the state is kept beside --out, as
    OUT.training, until the training is done; a training that was stopped goes on with --resume.
    """
    import torch

    from twofour.cli.console import make_console, say
    from twofour.cli.progress import ProgressDisplay
    from twofour.compress.events import EpochFinished, EpochsRestored, StageStarted, StepsDone
    from twofour.compress.pipeline import refuse_absent_device
    from twofour.errors import InputError
    from twofour.files import refuse_same, require_suffix
    from twofour.sources import load_weights, resolve_model, resolve_task
    from twofour.training import Checkpoint, derive_masks, load_recipe, recorded_masks, train
    from twofour.training.state import epochs_done

    require_suffix(out, ".safetensors", "train: --out")
    refuse_same(out, weights)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(f"train: --out {str(out)!r} is a folder or lies in none; name a file in a folder that exists")
    state = out.with_name(f"{out.name}.training")
    if state.exists() and not resume:
        raise InputError(f"train: {str(state)!r} is the state of a training that was stopped; go on with --resume, or remove it")
    refuse_absent_device(device)
    source = resolve_model(model)
    task = resolve_task(data, workers=workers, skip_bad=skip_bad)
    chosen = load_recipe(data if recipe is None else recipe)
    changes = {"seed": chosen.seed + seed, **({"epochs": epochs} if epochs is not None else {})}
    chosen = chosen.model_copy(update=changes)
    torch.manual_seed(chosen.seed)
    module = source.make(task.num_classes)
    pruning = None
    if weights is not None:
        load_weights(module, weights, spec=model)
        pruning = Checkpoint.pruning_of(weights)
    task.refuse_unfit(module)
    masks = recorded_masks(module, pruning) if pruning is not None else None
    console = make_console()
    for note in task.notes:
        say(console, note)
    variant = pruning.pattern if pruning is not None else "2:4" if derive_masks(module) else "dense"
    with ProgressDisplay(console) as show:
        show(StageStarted(f"train {model}", chosen.epochs))
        if done := epochs_done(state):
            show(EpochsRestored(variant, seed, done, chosen.epochs))
        made = train(
            module.to(device),
            task,
            chosen,
            masks=masks,
            progress=lambda epoch: show(EpochFinished(variant, seed, epoch, chosen.epochs)),
            steps=lambda step: show(StepsDone(variant, seed, step, chosen.epochs)),
            state=state,
        )
    checkpoint = Checkpoint(made.state, made.metric_name, made.metric, made.history, made.recipe, model, data, pruning)
    checkpoint.save(out)
    state.unlink(missing_ok=True)
    say(console, f"{checkpoint}\n{out}")
