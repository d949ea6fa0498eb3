"""`twofour run`."""

from pathlib import Path

import click

from twofour.cli import options


@click.command()
@click.argument("plan", type=options.PATH)
@click.option("--input", "input_path", type=options.PATH, required=True, help="A .npy file, or a .npz with one array an input by name.")
@click.option("--output", "output_path", type=options.PATH, required=True, help="The outputs, .npz by name.")
@options.threads_option
def command(plan: Path, input_path: Path, output_path: Path, threads: int | None) -> None:
    """Run PLAN once on inputs from a file."""
    from twofour.cli.arrays import read_inputs, write_outputs
    from twofour.files import refuse_same
    from twofour.runtime import load

    refuse_same(output_path, plan, input_path)
    engine = load(plan, num_threads=threads)
    outputs = engine(*read_inputs(input_path, [spec.name for spec in engine.plan.inputs]))
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {spec.name: value for spec, value in zip(engine.plan.outputs, values, strict=True)}
    write_outputs(output_path, named)
    for name, value in named.items():
        click.echo(f"{name}: {value.dtype}{list(value.shape)}")
    click.echo(str(output_path))
