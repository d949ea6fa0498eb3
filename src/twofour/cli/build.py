"""`twofour build`."""

from pathlib import Path

import click

from twofour.cli import options


def sizes(text: str | None) -> tuple[int, ...] | None:
    """Return the batch sizes in `1,32,256`; None where none are given.

    Raises:
        click.BadParameter: not such a list.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise click.BadParameter(f"--batch {text!r} is no list of sizes, expected something like 1,32") from error


@click.command()
@click.argument("onnx", type=options.PATH)
@click.option("-o", "--out", type=options.PATH, required=True, help="The plan file.")
@click.option(
    "--batch",
    metavar="N,N,…",
    help="Batch sizes to tune for; by default the one that ONNX was exported for, else any on the CPU, 1 on a GPU.",
)
@click.option("--precision", help="fp32 on the CPU; fp16, the default there, or bf16 on a GPU.")
@click.option("--sparsity", default="auto", show_default=True, help="auto, off or force.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda or cuda:N.")
@click.option("--tactics", default="all", show_default=True, help="GPU: all, or ours for a plan that needs only the driver.")
@click.option("--timing-cache", type=options.PATH, help="GPU: file in which timings are kept and found.")
@click.option(
    "--report", type=options.PATH, help="GPU: the build report as a page; for several batch sizes a page each, named by the size."
)
@click.option("--fallback", is_flag=True, help="GPU: run operators that the engine lacks with ONNX Runtime on the CPU, and time them.")
@options.json_option
def command(
    onnx: Path,
    out: Path,
    batch: str | None,
    precision: str | None,
    sparsity: str,
    device: str,
    tactics: str,
    timing_cache: Path | None,
    fallback: bool,
    report: Path | None,
    as_json: bool,
) -> None:
    """Build a plan from an ONNX file.

    For a GPU it prints the build report of every batch size, layer by layer: what was timed, what won and why. The plan keeps it:
    `twofour report PLAN` shows it again.
    """
    import json

    from twofour.builder import build, records_of
    from twofour.cli.console import make_console, say
    from twofour.cli.steps import Steps
    from twofour.cli.tables import print_build
    from twofour.errors import InputError
    from twofour.files import refuse_same, require_writable
    from twofour.report.build_page import page_names, write_build

    written = [path for path in (out, report, timing_cache) if path is not None]
    for path in written:
        refuse_same(path, onnx)
        require_writable(path)
    if len({path.resolve() for path in written}) < len(written):
        raise InputError(f"build: the plan {str(out)!r}, --report and --timing-cache are files of their own, expected different names")
    for option, given in (("--report", report is not None), ("--json", as_json)):
        if given and not device.startswith("cuda"):
            raise InputError(f"build: {option} shows what was timed on a GPU, expected --device cuda; leave it out")
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
    records = records_of(plan.about)
    pages = [] if report is None else page_names(records, report)
    for record, page in zip(records if pages else (), pages, strict=True):
        write_build(record, page)
    if as_json:
        click.echo(json.dumps([record.to_json() for record in records], indent=1))
        # That the accuracy is gone is said whoever reads the rest.
        if "note" in plan.about:
            click.echo(plan.about["note"], err=True)
        return
    for record in records:
        print_build(record, console)
    say(console, plan, out, *pages)
    if "note" in plan.about:
        say(console, plan.about["note"])
    if plan.whole:
        say(console, f"only batches of {list(plan.batches)}: {plan.whole}")
    if not plan.about["sparse_kernels"]:
        say(console, f"no sparse kernels: {plan.about['why_no_sparse_kernels']}")
