"""`twofour measure`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from twofour.cli import options
from twofour.cli.build import sizes

if TYPE_CHECKING:
    from twofour.runtime import Engine


@click.command()
@click.argument("files", nargs=-1, required=True, type=options.PATH, metavar="FILES… | gemm")
@click.option("--batch", metavar="N,N,…", help="Batch sizes; by default those that FILES were made for, else 1,32.")
@click.option("--seconds", type=click.FloatRange(0.05), default=2.0, show_default=True, help="Time for each batch size, all files.")
@click.option("--no-memory", is_flag=True, help="Skip the peak memory (a process of its own for each).")
@click.option("--shape", "shapes", multiple=True, metavar="TxOxI", help="gemm: one more tokens x outputs x inputs.")
@click.option("--dtype", "dtypes", multiple=True, type=click.Choice(["bf16", "fp16"]), help="gemm: only these; both by default.")
@click.option("--out", type=options.PATH, help="gemm: the results file; a part that was stopped goes on where it ends.")
@options.json_option
def command(
    files: tuple[Path, ...],
    batch: str | None,
    seconds: float,
    no_memory: bool,
    shapes: tuple[str, ...],
    dtypes: tuple[str, ...],
    out: Path | None,
    as_json: bool,
) -> None:
    """Latency, throughput and memory of FILES (plans or ONNX), the files of a batch size timed in turn.

    Each is warmed up first; p50, p90 and p99 are over whole batches; spread is (p90 − p10) / median.

    GPU plans are timed on their GPU instead, once its clock has settled: time of a pass, latency of single calls, energy an item.

    `twofour measure gemm` times our matrix-product kernels beside cuBLASLt and cuSPARSELt on the GPU, in parts of at most 8 minutes.
    """
    import json

    from twofour.cli.console import make_console
    from twofour.cli.tables import print_gemm, print_measurements
    from twofour.errors import InputError

    console = make_console()
    is_gemm = files == (Path("gemm"),)
    given = {"--batch": batch, "--no-memory": no_memory} if is_gemm else {"--shape": shapes, "--dtype": dtypes, "--out": out}
    for option, value in given.items():
        if value:
            raise InputError(f"measure: {option} is {'not for' if is_gemm else 'only for'} `twofour measure gemm`; leave it out")
    if is_gemm:
        from twofour.report.gemm import DTYPES, current_rows, measure_gemm, summary

        results = measure_gemm(out or Path("results") / "gemm.json", shapes=shapes, dtypes=dtypes or DTYPES, command=options.command_line())
        if as_json:
            click.echo(json.dumps(results, indent=1))
        else:
            print_gemm(current_rows(results), {dtype: summary(results, dtype) for dtype in dtypes or DTYPES}, console)
            if not results["complete"]:
                click.echo("this part is done, rows are missing: call the same command again")
        return
    from twofour.report import measure

    if (engines := _gpu_engines(files)) is not None:
        from twofour.builder.batches import batch_sizes
        from twofour.cli.tables import print_gpu_measurements
        from twofour.report.gpu import measure_gpu
        from twofour.report.measure import batches_of

        asked = batch_sizes(sizes(batch), "measure") or batches_of({name: engine.plan for name, engine in engines.items()})
        found = measure_gpu(engines, batch=asked)
        if as_json:
            click.echo(json.dumps([row.to_json() for row in found], indent=1))
        else:
            print_gpu_measurements(found, console)
        return
    rows = measure(files, batch=sizes(batch), seconds=seconds, memory=not no_memory)
    if as_json:
        click.echo(json.dumps([row.to_json() for row in rows], indent=1))
    else:
        print_measurements(rows, console)


def _gpu_engines(files: tuple[Path, ...]) -> "dict[str, Engine] | None":
    """The engines of files that are all GPU plans, None where none is.

    Raises:
        InputError: some are and some are not.
    """
    from twofour.errors import InputError
    from twofour.plan import Plan
    from twofour.runtime import Engine

    plans = {str(file): Plan.load(file) for file in files if file.suffix != ".onnx" and file.is_file()}
    on_gpu = [name for name, plan in plans.items() if plan.backend == "cuda"]
    if not on_gpu:
        return None
    if len(on_gpu) < len(files):
        raise InputError(f"measure: {on_gpu[0]!r} runs on a GPU and other files on the CPU, expected one kind; measure them apart")
    return {name: Engine(plan) for name, plan in plans.items()}
