"""`twofour inspect`."""

from pathlib import Path

import click

from twofour.cli import options


@click.command()
@click.argument("file", type=options.PATH)
@click.option("--require", is_flag=True, help="Exit with 1 when an eligible layer is not 2:4.")
@options.json_option
@click.pass_context
def command(ctx: click.Context, file: Path, require: bool, as_json: bool) -> None:
    """Say of every weight in FILE (ONNX, safetensors or plan) whether it is 2:4, could be, or cannot and why."""
    import json

    from twofour.cli.console import make_console
    from twofour.cli.tables import print_inspection
    from twofour.exchange import inspect

    inspection = inspect(file)
    if as_json:
        click.echo(json.dumps(inspection.to_json(), indent=1))
    else:
        print_inspection(inspection, make_console())
    if require and not inspection.is_24:
        ctx.exit(1)
