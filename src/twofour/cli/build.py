"""`twofour build`."""

from pathlib import Path

import click

from twofour.cli import options


def sizes(text: str) -> tuple[int, ...]:
    """Return the batch sizes in `1,32,256`.

    Raises:
        click.BadParameter: not such a list.
    """
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise click.BadParameter(f"--batch {text!r} is no list of sizes, expected something like 1,32") from error


@click.command()
@click.argument("onnx", type=options.PATH)
@click.option("-o", "--out", type=options.PATH, required=True, help="The plan file.")
@click.option("--batch", default="", metavar="N,N,…", help="Batch sizes to tune for; any by default.")
@click.option("--precision", default="fp32", show_default=True, help="fp32, fp16 or bf16.")
@click.option("--sparsity", default="auto", show_default=True, help="auto, off or force.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--tactics", default="all", show_default=True, help="GPU: all, or ours for a plan that needs only the driver.")
@click.option("--timing-cache", type=options.PATH, help="GPU: folder in which timings are kept.")
@click.option("--fallback", is_flag=True, help="GPU: run operators that the engine lacks on the CPU, with ONNX Runtime.")
def command(
    onnx: Path,
    out: Path,
    batch: str,
    precision: str,
    sparsity: str,
    device: str,
    tactics: str,
    timing_cache: Path | None,
    fallback: bool,
) -> None:
    """Build a plan from an ONNX file."""
    from twofour.builder import build
    from twofour.files import refuse_same

    refuse_same(out, onnx)
    plan = build(
        onnx,
        batch=sizes(batch),
        precision=precision,
        sparsity=sparsity,
        device=device,
        tactics=tactics,
        timing_cache=timing_cache,
        fallback=fallback,
    )
    plan.save(out)
    click.echo(f"{plan}\n{out}")
    if not plan.about["sparse_kernels"]:
        click.echo(f"no sparse kernels: {plan.about['why_no_sparse_kernels']}")
