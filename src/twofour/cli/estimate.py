"""`twofour estimate`."""

from pathlib import Path

import click

from twofour.cli import options
from twofour.cli.build import sizes


@click.command()
@click.argument("onnx", type=options.PATH)
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="Only this GPU, layer by layer; all in one table by default.")
@click.option("--batch", metavar="N,N,…", help="Batch sizes; by default the one that ONNX was exported for, else 1,32.")
@click.option("--precision", default="fp16", show_default=True, help="fp16 or bf16.")
@click.option("--fallback", is_flag=True, help="Operators that the engine lacks: timed with ONNX Runtime, left out of predictions.")
@click.option("--predict", is_flag=True, help="Predict also where a GPU is at hand to measure on.")
@click.option("--timing-cache", type=options.PATH, help="File in which a measurement's timings are kept and found.")
@options.json_option
def command(
    onnx: Path,
    gpus: tuple[str, ...],
    batch: str | None,
    precision: str,
    fallback: bool,
    predict: bool,
    timing_cache: Path | None,
    as_json: bool,
) -> None:
    """Say what 2:4 would buy ONNX before anything is retrained.

    Where a Hopper GPU is at hand every layer is timed there, dense and, in a copy pruned by magnitude, 2:4. Elsewhere, with --gpu or with
    --predict, it is predicted from data-sheet rates. One that 2:4 would not help stays dense.
    """
    import json

    from twofour.builder import estimate
    from twofour.cli.console import make_console
    from twofour.cli.tables import print_estimate_layers, print_estimates

    if not gpus and not predict and _has_gpu():
        _measure(onnx, sizes(batch), precision, fallback, timing_cache, as_json)
        return
    predictions = estimate(onnx, gpus=gpus, batch=sizes(batch), precision=precision, fallback=fallback)
    if as_json:
        click.echo(json.dumps([one.to_json() for one in predictions], indent=1))
        return
    console = make_console()
    if gpus:
        for one in predictions:
            print_estimate_layers(one, console)
    print_estimates(predictions, console)


def _has_gpu() -> bool:
    """Whether a GPU that our kernels run on is here."""
    from twofour.builder.gpu import require_gpu
    from twofour.errors import TwofourError
    from twofour.kernels.loading import HOPPER

    try:
        return require_gpu() == HOPPER
    except TwofourError:
        return False


def _measure(onnx: Path, batches: tuple[int, ...] | None, precision: str, fallback: bool, cache: Path | None, as_json: bool) -> None:
    """Time every layer dense and 2:4, and print the sums."""
    import json

    from twofour.builder import measure_gain
    from twofour.cli.console import make_console
    from twofour.cli.steps import Steps
    from twofour.cli.tables import print_gains

    console = make_console()
    with Steps(console) as show:
        pairs = measure_gain(
            onnx,
            batches=batches,
            precision=precision,
            timing_cache=cache,
            fallback=fallback,
            progress=lambda done, total, layer: show("timing layers", done, total),
        )
    if as_json:
        made = [{"kind": "measurement", "dense": dense.to_json(), "2:4": sparse.to_json()} for dense, sparse in pairs]
        click.echo(json.dumps(made, indent=1))
        return
    print_gains(pairs, console)
