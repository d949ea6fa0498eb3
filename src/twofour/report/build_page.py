"""The build report as one self-contained HTML page: where the time goes, and for every layer what was tried and why it runs as it does."""

from collections.abc import Sequence
from pathlib import Path

from twofour.builder.record import BuildRecord
from twofour.files import write_text
from twofour.report.page import build_chart, make_environment


def render_build(record: BuildRecord) -> str:
    """Return the page of one build: one HTML document without links to anything outside it."""
    excess = record.peak_bytes / record.bound_bytes - 1 if record.bound_bytes else 0.0
    return (
        make_environment([])
        .get_template("build.html.j2")
        .render(record=record, chart=build_chart(record, "build"), excess=excess, sparse=sum(layer.sparse for layer in record.layers))
    )


def write_build(record: BuildRecord, path: str | Path) -> None:
    """Write the page of `record` to `path`.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    write_text(path, render_build(record))


def page_names(records: Sequence[BuildRecord], path: Path) -> list[Path]:
    """Return the pages of a plan's build reports: `path`, or for several batch sizes one each, named by the size."""
    return [path if len(records) == 1 else path.with_stem(f"{path.stem}-{record.batch}") for record in records]
