"""`twofour doctor`."""

import click


@click.command()
def command() -> None:
    """Say what is installed, which GPU there is, which backends work, and the pip line for what is missing."""
    from rich.console import Console
    from rich.table import Table

    from twofour.report.environment import OPTIONAL, backends, environment, version_of

    console = Console()
    here = environment()
    console.print(f"Python {here.python} on {here.platform}", highlight=False)
    console.print(
        f"CPU: {here.cpu}, {here.cores} cores, {here.memory_bytes / 2**30:.1f} GiB; GPU: {here.gpu or 'none found'}", highlight=False
    )
    table = Table("package", "version", "for", "to install")
    for name, version in here.libraries.items():
        table.add_row(name, version, "base", "")
    for name, (purpose, line) in OPTIONAL.items():
        found = version_of(name)
        table.add_row(name, found or "–", purpose, "" if found else line)
    console.print(table)
    for backend in backends():
        console.print(f"backend {backend.name}: {'works' if backend.works else 'missing'} ({backend.detail})", highlight=False)
