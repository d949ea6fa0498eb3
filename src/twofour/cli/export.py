"""`twofour export`."""

from pathlib import Path

import click

from twofour.cli import options


@click.command()
@options.model_argument
@options.data_option
@options.weights_option
@click.option("--out", type=options.PATH, required=True, help="The ONNX file.")
def command(model: str, data: str, weights: Path | None, out: Path) -> None:
    """Write MODEL with its weights as ONNX, checked against torch; a pruned checkpoint must still be 2:4 in the file."""
    from twofour.errors import InputError
    from twofour.exchange import export
    from twofour.files import refuse_same
    from twofour.sources import load_weights, resolve_model, resolve_task
    from twofour.training import Checkpoint

    if weights is None:
        raise InputError("export: no weights given, expected --weights FILE")
    refuse_same(out, weights)
    task = resolve_task(data)
    module = resolve_model(model).make(task.num_classes)
    load_weights(module, weights, spec=model)
    click.echo(str(export(module, task.example_inputs(), out, pruning=Checkpoint.pruning_of(weights))))
