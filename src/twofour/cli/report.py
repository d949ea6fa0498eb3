"""`twofour report`."""

from pathlib import Path

import click

from twofour.cli import options


@click.command()
@click.argument("runs", nargs=-1, required=True, type=options.PATH, metavar="DIR…")
@click.option("--out", type=options.PATH, help="The page: by default DIR/report.html, or comparison.html for several runs.")
def command(runs: tuple[Path, ...], out: Path | None) -> None:
    """Make the report page of the run in DIR again from its report.json; of several, compare them on one page."""
    from twofour.cli.console import make_console, say
    from twofour.files import refuse_same, require_suffix
    from twofour.report.compare import load_runs, write_comparison
    from twofour.report.page import write_page
    from twofour.report.terminal import print_comparison, print_summary

    if out is not None:
        require_suffix(out, ".html", "report: --out")
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
