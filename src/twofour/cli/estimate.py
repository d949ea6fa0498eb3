"""`twofour estimate`."""

from pathlib import Path

import click

from twofour.cli import options
from twofour.cli.build import sizes


@click.command()
@click.argument("onnx", type=options.PATH)
@click.option("--gpu", "gpus", multiple=True, metavar="NAME", help="Only this GPU, layer by layer; all in one table by default.")
@click.option("--batch", default="1,32", show_default=True, metavar="N,N,…", help="Batch sizes.")
@click.option("--precision", default="fp16", show_default=True, help="fp16 or bf16.")
@click.option("--fallback", is_flag=True, help="Leave operators that the engine lacks out of the sum.")
@options.json_option
def command(onnx: Path, gpus: tuple[str, ...], batch: str, precision: str, fallback: bool, as_json: bool) -> None:
    """Predict what 2:4 would buy ONNX before anything is retrained, from data-sheet rates; nothing is measured.

    Every layer that a 2:4 kernel could compute is taken as if it were pruned; one that 2:4 would not help stays dense.
    """
    import json

    from twofour.builder import estimate
    from twofour.cli.console import make_console
    from twofour.cli.tables import print_estimate_layers, print_estimates

    predictions = estimate(onnx, gpus=gpus, batch=sizes(batch), precision=precision, fallback=fallback)
    if as_json:
        click.echo(json.dumps([one.to_json() for one in predictions], indent=1))
        return
    console = make_console()
    if gpus:
        for one in predictions:
            print_estimate_layers(one, console)
    print_estimates(predictions, console)
