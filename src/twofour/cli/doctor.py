"""`twofour doctor`."""

import click


@click.command()
def command() -> None:
    """Say what is installed, which GPU there is, which backends work, and the pip line for what is missing."""
    from twofour.cli.console import add_row, make_console, make_table, say
    from twofour.report.environment import OPTIONAL, backends, environment, version_of

    console = make_console()
    here = environment()
    say(console, f"Python {here.python} on {here.platform}")
    memory = f"{here.memory_bytes / 2**30:.1f} GiB"
    say(console, f"CPU: {here.cpu}, {here.cores} cores, {memory}; GPU: {here.gpu or 'none found'}")
    table = make_table("package", "version", "for", "to install")
    for name, version in here.libraries.items():
        add_row(table, name, version, "base", "")
    for name, (purpose, line) in OPTIONAL.items():
        found = version_of(name)
        add_row(table, name, found or "–", purpose, "" if found else line)
    console.print(table)
    for backend in backends():
        say(console, f"backend {backend.name}: {'works' if backend.works else 'does not work'} ({backend.detail})")
