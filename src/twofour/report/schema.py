"""The field tables of `docs/report.md`, made from the record's models; `python -m twofour.report.schema docs/report.md` rewrites them."""

import argparse
import sys
import types
from pathlib import Path
from typing import Literal, Union, get_args, get_origin

from pydantic import BaseModel

from twofour.errors import InputError
from twofour.report import record

BEGIN, END = "<!-- fields: written by python -m twofour.report.schema -->", "<!-- end of fields -->"


PLAIN: dict[object, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", object: "any"}


def _words(annotation: object) -> str:
    """Return a field's type in JSON's words; a record is a link to its table, a choice lists its values."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is list:
        return f"list of {_words(parts[0])}"
    if origin is dict:
        return f"object of {_words(parts[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    return PLAIN[annotation]


def models() -> list[type[BaseModel]]:
    """Return the record's models: the report, then its rows in the order of their definition."""
    rows = [
        value
        for name, value in vars(record).items()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.__module__ == record.__name__ and not name.startswith("_")
    ]
    return [record.Report, *(row for row in rows if row is not record.Report)]


def field_tables() -> str:
    """Return one Markdown section a model: its sentence, then a row a field with its type and meaning."""
    lines: list[str] = []
    for model in models():
        lines += [f"### {model.__name__}", "", (model.__doc__ or "").strip(), "", "| field | type | meaning |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            meaning = (field.description or "").rstrip(".").replace("|", "\\|")
            lines.append(f"| `{name}` | {_words(field.annotation)} | {meaning} |")
        lines.append("")
    return "\n".join(lines)


def updated(text: str) -> str:
    """Return the document with everything between its two markers replaced by the field tables.

    Raises:
        InputError: the document lacks a marker.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise InputError(f"the document has no {BEGIN if not begin else END!r} line; add it where the field tables should stand")
    return f"{before}{BEGIN}\n\n{field_tables()}\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    """Rewrite the field tables of the given document; without one, write them to standard output."""
    parser = argparse.ArgumentParser(prog="python -m twofour.report.schema", description=__doc__)
    parser.add_argument("document", nargs="?", type=Path, help="Markdown file whose field tables are rewritten")
    document: Path | None = parser.parse_args(arguments).document
    if document is None:
        sys.stdout.write(field_tables())
        return 0
    document.write_text(updated(document.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
