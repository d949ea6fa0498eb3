"""The build report as one self-contained HTML page: where the time goes, and for every layer what was tried and why it runs as it does."""

from pathlib import Path

import jinja2
from markupsafe import Markup

from twofour.builder.record import BuildRecord, why_winner
from twofour.files import write_text
from twofour.report import charts, units
from twofour.report.page import FULL_PX, MOST_UNFRAMED_LAYERS, PHONE_PX


def _chart(record: BuildRecord) -> Markup:
    """Return the chart for the page and again for a phone; nothing where nothing was timed."""
    if not any(layer.us is not None for layer in record.layers):
        return Markup("")
    wide = Markup(charts.time_by_layer(record.layers, width=FULL_PX, name="build-wide"))
    narrow = Markup(charts.time_by_layer(record.layers, width=PHONE_PX, name="build-narrow"))
    return Markup('<div class="chart wide">{}</div><div class="chart narrow">{}</div>').format(wide, narrow)


def render_build(record: BuildRecord) -> str:
    """Return the page of one build: one HTML document without links to anything outside it."""
    loader = jinja2.PackageLoader("twofour.report", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    excess = record.peak_bytes / record.bound_bytes - 1 if record.bound_bytes else 0.0
    return environment.get_template("build.html.j2").render(
        record=record,
        chart=_chart(record),
        why=why_winner,
        units=units,
        excess=excess,
        sparse=sum(layer.sparse for layer in record.layers),
        long_table=len(record.layers) > MOST_UNFRAMED_LAYERS,
    )


def write_build(record: BuildRecord, path: str | Path) -> None:
    """Write the page of `record` to `path`.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    write_text(path, render_build(record))
