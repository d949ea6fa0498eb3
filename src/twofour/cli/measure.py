"""`twofour measure`."""

from pathlib import Path

import click

from twofour.cli import options
from twofour.cli.build import sizes


@click.command()
@click.argument("files", nargs=-1, required=True, type=options.PATH)
@click.option("--batch", default="1,32", show_default=True, metavar="N,N,…", help="Batch sizes.")
@click.option(
    "--seconds", type=click.FloatRange(0.05), default=2.0, show_default=True, help="Time for each batch size, all files together."
)
@click.option("--no-memory", is_flag=True, help="Skip the peak memory (a process of its own for each).")
@options.json_option
def command(files: tuple[Path, ...], batch: str, seconds: float, no_memory: bool, as_json: bool) -> None:
    """Latency, throughput and memory of FILES (plans or ONNX), the files of a batch size timed in turn.

    Each is warmed up first; p50, p90 and p99 are over whole batches; spread is (p90 − p10) / median.
    """
    import json

    from rich.console import Console

    from twofour.cli.tables import print_measurements
    from twofour.report import measure

    rows = measure(files, batch=sizes(batch), seconds=seconds, memory=not no_memory)
    if as_json:
        click.echo(json.dumps([row.to_json() for row in rows], indent=1))
    else:
        print_measurements(rows, Console())
