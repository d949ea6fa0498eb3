"""The console of every sub-command."""

import os

from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 160


def make_console() -> Console:
    """Return a console for standard output; where that is no terminal and COLUMNS is not set, lines are wide enough for any table."""
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


def say(console: Console, *lines: object) -> None:
    """Print lines as they are: no markup, no wrapping, so that a path stays a path."""
    for line in lines:
        console.print(Text(str(line)), soft_wrap=True)


def make_table(*columns: str) -> Table:
    """Return a table whose cells fold instead of being cut off."""
    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    """Add a row of plain text: square brackets in a name are not markup."""
    table.add_row(*(Text(str(cell)) for cell in cells))
