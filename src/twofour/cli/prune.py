"""`twofour prune`."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from twofour.cli import names, options
from twofour.cli.asked import Asked


@click.command()
@click.argument("what", metavar="MODEL|DIR", shell_complete=names.complete_model)
@click.option("--data", help="Data set by name, for MODEL.", shell_complete=names.complete_data)
@options.weights_option
@click.option("--out", type=options.PATH, required=True, help="The pruned checkpoint (.safetensors), or for DIR a folder.")
@options.method_option
@options.permute_option
@click.option("--pattern", default="2:4", show_default=True, help="2:4, any N:M, or '2:4 transposable'.")
@options.include_option
@options.exclude_option
@click.option("--sensitivity", is_flag=True, help="Measure each layer pruned alone instead; --out gets the record (.json), .svg the plot.")
@click.option("--by", type=click.Choice(["metric", "loss"]), default="metric", show_default=True, help="What --sensitivity measures.")
@click.option("--keep-dense", type=click.Choice(["auto"]), help="Leave the costliest layers dense until --budget is met.")
@click.option("--budget", type=click.FloatRange(0), help="How much of the metric may be lost, in its unit, for --keep-dense auto.")
@click.option("--by-block", is_flag=True, help="Prune a transformer one block at a time, each on what the pruned ones before it give.")
@click.option(
    "--calibration", type=click.IntRange(1), default=2048, show_default=True, help="Training items that methods and batch-norm look at."
)
@click.option("--batch", type=click.IntRange(1), default=256, show_default=True, help="How many of them at once.")
@click.option(
    "--device", default="cpu", show_default=True, help="Where to prune: cpu, cuda or cuda:N; with --by-block, one block at a time."
)
@click.option("--resume", type=options.PATH, help="Folder that keeps finished blocks, for --by-block.")
def command(what: str, data: str | None, weights: Path | None, out: Path, **how: Any) -> None:
    """Prune weights to 2:4; no retraining.

    MODEL is a name; its --weights are pruned, batch-norm statistics are re-estimated on --data (not after sparsegpt and alps, which
    change the kept weights), and the accuracy is told before and after. DIR is a folder of safetensors (or one file) of any size: it is
    pruned tensor by tensor into --out, and goes on where an interrupted run stopped.
    """
    from twofour.errors import InputError
    from twofour.files import refuse_same, require_suffix, require_writable
    from twofour.sources.models import is_model_spec, names_source

    asked = Asked(**how)
    asked.refuse_contradictions()
    if not is_model_spec(what):
        if data is not None or weights is not None:
            raise InputError(f"prune: {what!r} names files, expected a model for --data and --weights; leave them out")
        if asked.sensitivity or asked.keep_dense or asked.by_block:
            raise InputError("prune: --sensitivity, --keep-dense and --by-block run the network, expected MODEL with --data and --weights")
        if asked.permute and click.get_current_context().get_parameter_source("permute") is ParameterSource.COMMANDLINE:
            raise InputError("prune: --permute needs the network, expected MODEL with --data and --weights; leave it out for files")
        if Path(what).is_file() and Path(what).suffix not in (".safetensors", ".json"):
            raise InputError(f"prune: {what!r} is no safetensors file, expected one, a folder of them, or MODEL with --data and --weights")
        if out.suffix == ".safetensors":
            raise InputError(f"prune: --out {str(out)!r} is made a folder, expected a folder's name")
        refuse_same(out, what)
        _prune_files(Path(what), out, asked.method, asked.pattern, asked.include, asked.exclude)
        return
    if data is None and weights is None and not names_source(what):
        raise InputError(f"prune: {what!r} does not exist, expected a folder with safetensors files, one such file or a model's name")
    require_suffix(out, ".json" if asked.sensitivity else ".safetensors", "prune: --out")
    refuse_same(out, weights)
    require_writable(out)
    if data is None or weights is None:
        missing = "data given, expected --data NAME" if data is None else "weights given, expected --weights FILE with the dense network"
        raise InputError(f"prune: no {missing}; or give a folder of safetensors instead of the model {what!r}")
    from twofour.cli.prune_model import run

    run(what, data, weights, out, asked)


def _prune_files(source: Path, out: Path, method: str, pattern: str, include: tuple[str, ...], exclude: tuple[str, ...]) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from twofour.cli.console import make_console, say
    from twofour.cli.tables import print_pruning
    from twofour.errors import InputError
    from twofour.pruning import prune_files

    if method != "magnitude":
        raise InputError(f"prune: method {method!r} needs the network, expected magnitude for files; give MODEL with --weights")
    console = make_console()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("prune", total=None)

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        record = prune_files(source, out, pattern=pattern, include=include, exclude=exclude, progress=show)
    print_pruning(record, console)
    say(console, f"{record}\n{out}")
