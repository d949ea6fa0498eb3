"""`twofour build`."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from twofour.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from twofour.plan import Plan


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
@click.option("--precision", help="fp32 on the CPU; fp16, the default there, or bf16 on a GPU.")
@click.option("--sparsity", default="auto", show_default=True, help="auto, off or force.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--tactics", default="all", show_default=True, help="GPU: all, or ours for a plan that needs only the driver.")
@click.option("--timing-cache", type=options.PATH, help="GPU: file in which timings are kept and found.")
@click.option(
    "--report", type=options.PATH, help="GPU: the build report as a page; for several batch sizes a page each, named by the size."
)
@click.option("--fallback", is_flag=True, help="GPU: run operators that the engine lacks with ONNX Runtime on the CPU, and time them.")
def command(
    onnx: Path,
    out: Path,
    batch: str,
    precision: str | None,
    sparsity: str,
    device: str,
    tactics: str,
    timing_cache: Path | None,
    fallback: bool,
    report: Path | None,
) -> None:
    """Build a plan from an ONNX file."""
    from twofour.builder import build
    from twofour.cli.console import make_console, say
    from twofour.cli.steps import Steps
    from twofour.errors import InputError
    from twofour.files import refuse_same, require_writable

    written = [path for path in (out, report, timing_cache) if path is not None]
    for path in written:
        refuse_same(path, onnx)
        require_writable(path)
    if len({path.resolve() for path in written}) < len(written):
        raise InputError(f"build: the plan {str(out)!r}, --report and --timing-cache are files of their own, expected different names")
    if report is not None and not device.startswith("cuda"):
        raise InputError("build: --report shows what was timed on a GPU, expected --device cuda; leave it out")
    console = make_console()
    with Steps(console) as show:
        plan = build(
            onnx,
            batch=sizes(batch),
            precision=precision,
            sparsity=sparsity,
            device=device,
            tactics=tactics,
            timing_cache=timing_cache,
            fallback=fallback,
            progress=lambda done, total, layer: show("timing layers", done, total),
        )
    plan.save(out)
    if "builds" in plan.about:
        _tell_builds(plan, console, report)
    say(console, plan, out)
    if "note" in plan.about:
        say(console, plan.about["note"])
    if not plan.about["sparse_kernels"]:
        say(console, f"no sparse kernels: {plan.about['why_no_sparse_kernels']}")


def _tell_builds(plan: "Plan", console: "Console", page: Path | None) -> None:
    """Print the build report of every batch size, and write its page."""
    import json

    from twofour.builder import BuildRecord
    from twofour.cli.tables import print_build
    from twofour.report.build_page import write_build

    records = [BuildRecord.from_json(json.dumps(data)) for data in plan.about["builds"]]
    for record in records:
        print_build(record, console)
        if page is not None:
            write_build(record, page if len(records) == 1 else page.with_stem(f"{page.stem}-{record.batch}"))
