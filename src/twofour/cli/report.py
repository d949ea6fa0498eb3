"""`twofour report`."""

from pathlib import Path

import click

from twofour.cli import options


@click.command()
@click.argument("runs", nargs=-1, required=True, type=options.PATH, metavar="DIR… | PLAN")
@click.option(
    "--out",
    type=options.PATH,
    help="The page: by default DIR/report.html, comparison.html for several runs, PLAN's name with .html; of a plan for several batch "
    "sizes a page each, named by the size.",
)
@options.json_option
def command(runs: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """Make the report page of the run in DIR again from its report.json; of several, compare them on one page.

    Of a PLAN that was built for a GPU, make the page of its build report: for every layer what was timed, what won and why. --json prints
    what the page shows, a record a batch size.
    """
    from twofour.cli.console import make_console, say
    from twofour.errors import InputError
    from twofour.files import refuse_same, require_suffix
    from twofour.report.compare import load_runs, write_comparison
    from twofour.report.page import write_page
    from twofour.report.terminal import print_comparison, print_summary

    if out is not None:
        require_suffix(out, ".html", "report: --out")
    plans = [run for run in runs if _is_plan(run)]
    if plans:
        if len(runs) > 1:
            raise InputError(f"report: {str(plans[0])!r} is a plan, expected it alone; plans are not compared")
        _report_plan(plans[0], out, as_json)
        return
    if as_json:
        raise InputError("report: --json prints the build report of a plan, expected a plan; the record of a run is its report.json")
    found = load_runs(runs)
    console = make_console()
    if len(found) == 1:
        path = out or (runs[0] if runs[0].is_dir() else runs[0].parent) / "report.html"
        refuse_same(path, *runs)
        write_page(found[0].report, path)
        print_summary(found[0].report, console)
    else:
        path = out or Path("comparison.html")
        write_comparison(found, path)
        print_comparison(found, console)
    say(console, str(path))


def _is_plan(path: Path) -> bool:
    """Whether a path names a plan rather than a run: a run is a folder or its report.json."""
    return not path.is_dir() and (path.suffix == ".plan" or (path.suffix != ".json" and path.is_file()))


def _report_plan(path: Path, out: Path | None, as_json: bool) -> None:
    """Write the pages of a plan's build reports and print them.

    Raises:
        InputError: it is no plan, or nothing was timed for it.
    """
    import json

    from twofour.builder import records_of
    from twofour.cli.console import make_console, say
    from twofour.cli.tables import print_build
    from twofour.errors import InputError
    from twofour.files import refuse_same, require_writable
    from twofour.plan import Plan
    from twofour.report.build_page import page_names, write_build

    plan = Plan.load(path)
    try:
        records = records_of(plan.about)
    except InputError as error:
        raise InputError(f"report: plan {str(path)!r}: {error}") from error
    if not records:
        raise InputError(
            f"report: plan {str(path)!r} was built for {plan.device!r} and has no build report, expected one that twofour build timed "
            "on a GPU (--device cuda)"
        )
    pages = page_names(records, out or path.with_suffix(".html"))
    for page in pages:
        refuse_same(page, path)
        require_writable(page)
    for record, page in zip(records, pages, strict=True):
        write_build(record, page)
    if as_json:
        click.echo(json.dumps([record.to_json() for record in records], indent=1))
        return
    console = make_console()
    for record in records:
        print_build(record, console)
    say(console, *pages)
