"""`twofour compress`."""

import re
from pathlib import Path

import click

from twofour.cli import options


@click.command()
@options.model_argument
@options.data_option
@options.weights_option
@options.recipe_option
@click.option("--out", type=options.PATH, help="Output folder; by default runs/MODEL-DATA.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier run in the output folder.")
@click.option("--epochs", type=click.IntRange(1), help="Replaces the recipe's number of epochs.")
@click.option("--seed", type=click.IntRange(0, 2**31), default=0, show_default=True, help="First seed.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Number of seeds; files come from the first.")
@options.method_option
@options.permute_option
@options.include_option
@options.exclude_option
def command(
    model: str,
    data: str,
    weights: Path | None,
    recipe: str | None,
    out: Path | None,
    overwrite: bool,
    epochs: int | None,
    seed: int,
    seeds: int,
    method: str,
    permute: bool,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> None:
    """Dense network in; 2:4 network, engine and report out.

    MODEL and --data are names (`demo`, `digits`). Trains the dense network unless --weights brings it, prunes it to 2:4, repeats the
    training with the mask held, checks, exports, builds, measures and reports, dense beside sparse.
    """
    from twofour.cli.console import make_console, say
    from twofour.cli.progress import ProgressDisplay
    from twofour.compress import compress
    from twofour.report.terminal import print_summary

    console = make_console()
    folder = out or Path("runs") / re.sub(r"[^\w.-]+", "_", f"{model}-{data}")
    with ProgressDisplay(console) as listener:
        done = compress(
            model,
            data,
            out=folder,
            weights=weights,
            recipe=recipe,
            epochs=epochs,
            seed=seed,
            seeds=seeds,
            method=method,
            permute=permute,
            include=include,
            exclude=exclude,
            overwrite=overwrite,
            command=options.command_line(),
            listener=listener,
        )
    print_summary(done.report, console)
    say(console, f"Report: {done.out / 'report.html'}")
