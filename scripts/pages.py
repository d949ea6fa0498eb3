"""Tables in a page: what the scripts that write them share."""

import re
from collections.abc import Callable, Mapping


def filled(page: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Return the page's text with each table, by name, between its markers `<!-- name table -->` and `<!-- /name table -->`."""
    for name, make in tables.items():
        table = make()
        pattern = rf"(<!-- {name} table -->\n).*?(<!-- /{name} table -->)"
        page, count = re.subn(pattern, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", page, flags=re.DOTALL)
        assert count == 1, f"the page has {count} places for the {name} table"
    return page
