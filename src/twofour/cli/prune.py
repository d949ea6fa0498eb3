"""`twofour prune`."""

from pathlib import Path

import click

from twofour.cli import names, options


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
def command(
    what: str,
    data: str | None,
    weights: Path | None,
    out: Path,
    method: str,
    permute: bool,
    pattern: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> None:
    """Prune weights to 2:4; no retraining.

    MODEL is a name; its --weights are pruned, batch-norm statistics are re-estimated on --data, and the accuracy is told before and
    after. DIR is a folder of safetensors (or one file) of any size: it is pruned tensor by tensor into --out, and goes on where an
    interrupted run stopped.
    """
    from twofour.errors import InputError
    from twofour.files import refuse_same, require_suffix
    from twofour.sources.models import is_model_spec

    if not is_model_spec(what):
        if data is not None or weights is not None:
            raise InputError(f"prune: {what!r} names files, expected a model for --data and --weights; leave them out")
        if out.suffix == ".safetensors":
            raise InputError(f"prune: --out {str(out)!r} is made a folder, expected a folder's name")
        refuse_same(out, what)
        _prune_files(Path(what), out, method, pattern, include, exclude)
    else:
        require_suffix(out, ".safetensors", "prune: --out")
        refuse_same(out, weights)
        _prune_model(what, data, weights, out, method, permute, pattern, include, exclude)


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


def _prune_model(
    name: str,
    data: str | None,
    weights: Path | None,
    out: Path,
    method: str,
    permute: bool,
    pattern: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> None:
    from twofour.cli.console import make_console, say
    from twofour.cli.tables import print_pruning
    from twofour.errors import InputError
    from twofour.pruning import prune, reestimate_batchnorm
    from twofour.pruning.calibration import tracked_norms
    from twofour.sources import load_weights, resolve_model, resolve_task
    from twofour.training import Checkpoint, calibration_batches, evaluate

    if data is None or weights is None:
        missing = "data given, expected --data NAME" if data is None else "weights given, expected --weights FILE with the dense network"
        raise InputError(f"prune: no {missing}; or give a folder of safetensors instead of the model {name!r}")
    task = resolve_task(data)
    module = resolve_model(name).make(task.num_classes)
    load_weights(module, weights, spec=name)
    told = [f"dense {evaluate(module, task):.2f}"]
    record = prune(module, task.example_inputs(), method=method, permute=permute, pattern=pattern, include=include, exclude=exclude)
    metric = evaluate(module, task)
    told.append(f"one-shot {record.pattern} {metric:.2f}")
    if tracked_norms(module):
        reestimate_batchnorm(module, calibration_batches(task), len(task.example_inputs()))
        metric = evaluate(module, task)
        told.append(f"with batch-norm re-estimated {metric:.2f}")
    Checkpoint.of(module, task.metric.name, metric, model=name, data=data, pruning=record).save(out)
    console = make_console()
    print_pruning(record, console)
    say(console, f"{record}\n{task.metric.name}: {', '.join(told)}\n{out}")
