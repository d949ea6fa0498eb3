"""The report as one self-contained HTML page, made from the record alone."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from twofour.builder.record import NO_GRAPH, BuildRecord, fallback_cost, why_winner
from twofour.files import write_text
from twofour.report import charts, summary, units
from twofour.report.record import Report

# CSS pixels that a chart is drawn for: the page's full and half width, and a phone's. The style sheet shows the one that fits.
FULL_PX, HALF_PX, PHONE_PX = 1040, 500, 350
# A longer layer table scrolls inside its own frame.
MOST_UNFRAMED_LAYERS = 30
LONGEST_UNBROKEN_NAME = 28

VARIANTS = {
    "dense": ("Dense", "as trained"),
    "2:4 one-shot": ("2:4, one-shot", "pruned, not retrained"),
    "2:4 one-shot, batch-norm re-estimated": ("2:4, one-shot, batch-norm", "pruned, batch-norm statistics measured anew, not retrained"),
    "2:4": ("2:4", "pruned, then retrained with the mask held"),
    "dense + same training": ("Dense + same training", "control: the 2:4 network's retraining, nothing pruned"),
}


def _number(value: float, text: str) -> Markup:
    """Return the text of a number with its exact value beside it, for programs that read the page."""
    return Markup('<data value="{}">{}</data>').format(value, text.replace(" ", "\u00a0"))


def _breakable(name: str) -> Markup:
    """Return a name that may break after each of its parts if it is too long for a line of its column."""
    if len(name) <= LONGEST_UNBROKEN_NAME:
        return Markup("{}").format(name)
    return Markup("").join(part + Markup("<wbr>") if part[-1] in "./" else part for part in re.findall(r"[^./]*[./]|[^./]+", name))


def _optional(show: Callable[[float], str]) -> Callable[[float | None], Markup]:
    def shown(value: float | None) -> Markup:
        return Markup(units.NOT_KNOWN) if value is None else _number(value, show(value))

    return shown


def metric_decimals(report: Report) -> int:
    """Return the digits after the point that the metric is shown with: two in percent, else four significant ones."""
    if report.metric_unit == "%":
        return 2
    largest = max((abs(value) for row in report.accuracy for value in row.values if math.isfinite(value)), default=0.0)
    return max(0, 3 - math.floor(math.log10(largest))) if largest else 2


def metric_filters(report: Report) -> dict[str, Callable[..., Markup]]:
    """Return how numbers are shown beside reports of other metrics: with this report's unit and digits."""
    return _filters(metric_decimals(report), report.metric_unit)


def _filters(decimals: int, metric_unit: str) -> dict[str, Callable[..., Markup]]:
    unit = f" {metric_unit}" if metric_unit else ""
    points = " points" if metric_unit == "%" else unit
    return {
        "breakable": _breakable,
        "count": _optional(lambda value: f"{value:,}"),
        "size": _optional(units.bytes_text),
        "flops": _optional(units.flops_text),
        "share": _optional(units.share_text),
        "change": _optional(lambda value: units.signed(100 * value, 1) + " %"),
        "ms": _optional(units.milliseconds_text),
        "microseconds": _optional(lambda value: f"{units.significant(value)} µs"),
        "plain": _optional(units.significant),
        "times": _optional(lambda value: f"{units.significant(value)}×"),
        "millijoules": _optional(lambda value: f"{units.significant(1e3 * value)} mJ"),
        "seconds": _optional(lambda value: f"{units.fixed(value, 1)} s"),
        "tiny": _optional(lambda value: f"{value:.1e}"),
        "metric": _optional(lambda value: units.fixed(value, decimals) + unit),
        "metric_bare": _optional(lambda value: units.fixed(value, decimals)),
        "metric_change": _optional(lambda value: units.signed(value, decimals) + points),
    }


def ratio_change(dense: float | None, sparse: float | None) -> float | None:
    """Return sparse / dense − 1, None where one is missing or dense is 0."""
    return None if dense is None or sparse is None or dense == 0 else sparse / dense - 1


def of(row: object | None, field: str) -> float | None:
    """Return a field of a row that may be missing."""
    return None if row is None else getattr(row, field)


def flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested table as dotted keys and their values as JSON."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows


def both_widths(draw: Callable[[int, str], str], name: str, width: int = FULL_PX) -> Markup:
    """Return a chart drawn for the page and again for a phone, in frames that the style sheet shows one of."""
    wide, narrow = Markup(draw(width, f"{name}-wide")), Markup(draw(PHONE_PX, f"{name}-narrow"))
    return Markup('<div class="chart wide">{}</div><div class="chart narrow">{}</div>').format(wide, narrow)


def _draw(report: Report) -> dict[str, Markup]:
    """Return the charts that the record has data for, by name."""
    drawn: dict[str, Markup] = {}
    if any(row.epochs for row in report.training):
        one_shot = summary.accuracy_row(report, "2:4 one-shot")
        unit = f", {report.metric_unit}" if report.metric_unit else ""
        for field, axis in (("loss", "training loss"), ("metric", f"{report.metric} on the validation set{unit}")):
            drawn[field] = both_widths(
                lambda width, name, field=field, axis=axis: charts.training_curves(  # type: ignore[misc]
                    report.training, field, axis, width=width, name=name, one_shot=one_shot
                ),
                f"curve-{field}",
                HALF_PX,
            )
    if any(layer.flops for layer in report.layers):
        drawn["flops"] = both_widths(lambda width, name: charts.flops_by_layer(report.layers, width=width, name=name), "flops")
    shares = summary.share_by_operation(report)
    if shares:
        drawn["time"] = both_widths(lambda width, name: charts.share_by_operation(shares, width=width, name=name), "time")
    return drawn


def build_chart(record: BuildRecord, name: str) -> Markup:
    """Return the time of each layer of a build for the page and again for a phone; nothing where nothing was timed."""
    if not any(layer.us is not None for layer in record.layers):
        return Markup("")
    return both_widths(lambda width, name: charts.time_by_layer(record.layers, width=width, name=name), name)


@dataclass(frozen=True)
class Build:
    """A build report as the page shows it."""

    variant: str
    record: BuildRecord
    chart: Markup


def _builds(report: Report) -> list[Build]:
    """Return the build reports of a run, the largest batch first, 2:4 before dense.

    Raises:
        InputError: one is damaged.
    """
    rows = sorted(report.builds, key=lambda row: (row.variant != "2:4", -row.batch))
    found = [(row.variant, BuildRecord.from_json(json.dumps(row.record))) for row in rows]
    return [Build(variant, record, build_chart(record, f"build-{i}")) for i, (variant, record) in enumerate(found)]


def make_environment(reports: Sequence[Report]) -> jinja2.Environment:
    """Return where the templates are, with numbers shown as suits all of the reports."""
    loader = jinja2.PackageLoader("twofour.report", "templates")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    unit = reports[0].metric_unit if len({report.metric_unit for report in reports}) == 1 else ""
    environment.filters.update(_filters(max(map(metric_decimals, reports), default=2), unit))
    environment.globals.update(why_winner=why_winner, fallback_cost=fallback_cost, no_graph=NO_GRAPH, most_unframed=MOST_UNFRAMED_LAYERS)
    return environment


def render(report: Report) -> str:
    """Return the page: one HTML document without links to anything outside it; what the record lacks is left out or said to be missing.

    Every number in the text stands in a `<data>` element whose value is the record's, or a difference, ratio or sum of such.
    """
    return (
        make_environment([report])
        .get_template("report.html.j2")
        .render(
            report=report,
            variants=VARIANTS,
            rows={variant: row for variant in VARIANTS if (row := summary.accuracy_row(report, variant))},
            coverage=summary.coverage(report),
            speeds=summary.speed_pairs(report),
            memories=summary.memory_pairs(report),
            sizes=summary.size_pairs(report),
            profile=summary.profile_pairs(report),
            agreements={row.variant: row for row in report.agreement},
            headline_speed=summary.headline_speed(report),
            headline_size=summary.headline_size(report),
            passed=sum(check.passed for check in report.checks),
            ratio_change=ratio_change,
            of=of,
            recipe=flat(report.recipe),
            charts=_draw(report),
            builds=_builds(report),
            on_gpu=any(row.pass_ms is not None for row in report.speed),
            long_table=len(report.layers) > MOST_UNFRAMED_LAYERS,
            permuted=any(layer.permuted for layer in report.layers),
            seconds=sum(report.stage_seconds.values()),
        )
    )


def write_page(report: Report, path: str | Path) -> None:
    """Write the page of `report` to `path`.

    Raises:
        InputError: the folder does not exist or cannot be written.
    """
    write_text(path, render(report))
