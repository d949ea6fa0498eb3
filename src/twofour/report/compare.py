"""Several runs side by side: what each reached, what was different about it, how much of each layer it kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from twofour.errors import InputError
from twofour.files import write_text
from twofour.report import charts, summary
from twofour.report.page import both_widths, flat, make_environment, metric_filters, of, ratio_change
from twofour.report.record import AccuracyRow, Report
from twofour.report.summary import Coverage


@dataclass(frozen=True)
class Run:
    """One report and the shortest name that tells it from the others."""

    name: str
    report: Report

    @property
    def coverage(self) -> Coverage:
        """How much of the network is 2:4."""
        return summary.coverage(self.report)

    def accuracy(self, variant: str) -> AccuracyRow | None:
        """Return the row of `variant`, None where there is none."""
        return summary.accuracy_row(self.report, variant)

    @property
    def against_control(self) -> float | None:
        """2:4 minus dense with the same training, in the metric's unit; None where one is missing."""
        sparse, control = self.accuracy("2:4"), self.accuracy("dense + same training")
        return None if sparse is None or control is None else sparse.mean - control.mean

    def settings(self) -> dict[str, str]:
        """Return what the run was asked for and where it ran, by a dotted name."""
        report = self.report
        values = {
            "model": report.model,
            "data": report.data,
            "seeds": ", ".join(map(str, report.seeds)),
            "method": report.method,
            **dict(flat(report.recipe, "recipe.")),
            "backend": report.backend,
            "processor": report.environment.cpu,
            "GPU": report.environment.gpu or "none",
            "Python": report.environment.python,
            "twofour": report.twofour,
            **report.environment.libraries,
        }
        return values


def load_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Return the runs in output folders (or `report.json` files), named by the last parts of their paths that tell them apart.

    Raises:
        InputError: a folder is given twice, or holds no readable report.json.
    """
    paths = [Path(folder) for folder in folders]
    files = [path / "report.json" if path.is_dir() else path for path in paths]
    resolved = [file.resolve() for file in files]
    if len(set(resolved)) < len(resolved):
        twice = next(path for path, file in zip(paths, resolved, strict=True) if resolved.count(file) > 1)
        raise InputError(f"report: {str(twice)!r} is given twice, expected each run once")
    parts = [file.parent.parts if file.name == "report.json" else file.parts for file in resolved]
    length = 1
    while len({part[-length:] for part in parts}) < len(parts):
        length += 1
    return [Run("/".join(part[-length:]), Report.load(file)) for part, file in zip(parts, files, strict=True)]


def differences(runs: Sequence[Run]) -> dict[str, list[str | None]]:
    """Return every setting that is not the same in all runs, a value a run, None where a run lacks it."""
    settings = [run.settings() for run in runs]
    names = dict.fromkeys(name for values in settings for name in values)
    rows = {name: [values.get(name) for values in settings] for name in names}
    return {name: values for name, values in rows.items() if any(a != b for a, b in pairwise(values))}


def kept_by_layer(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
    """Return each layer that some run pruned, with the magnitude that every run kept of it, None where it did not prune it."""
    kept = [{layer.name: layer.kept_magnitude for layer in run.report.layers} for run in runs]
    names = dict.fromkeys(layer.name for run in runs for layer in run.report.layers if layer.kept_magnitude is not None)
    return [(name, [values.get(name) for values in kept]) for name in names]


def cautions(runs: Sequence[Run]) -> list[str]:
    """Return the sentences that say which numbers of the runs are not comparable."""
    found = []
    reports = [run.report for run in runs]
    if len({(r.metric, r.data) for r in reports}) > 1:
        found.append("The runs have different data or metrics: their accuracies are not comparable.")
    if len({(r.environment.cpu, r.environment.gpu, r.backend) for r in reports}) > 1:
        found.append("The runs were measured on different machines or backends: their latencies are not comparable.")
    if len({len(r.seeds) for r in reports}) > 1:
        found.append("The runs have different numbers of seeds: a mean over fewer is less certain.")
    return found


def render(runs: Sequence[Run]) -> str:
    """Return the page: one HTML document without links to anything outside it."""
    reports = [run.report for run in runs]
    comparable = len({(r.metric, r.metric_unit) for r in reports}) == 1
    drawn = None
    if comparable and all(run.accuracy("2:4") for run in runs):
        rows = [(run.name, {v: row for v in charts.VARIANT_COLOUR if (row := run.accuracy(v))}) for run in runs]
        unit = f", {reports[0].metric_unit}" if reports[0].metric_unit else ""
        axis = f"{reports[0].metric}{unit}"
        drawn = both_widths(lambda width, name: charts.accuracy_by_run(rows, axis, width=width, name=name), "runs")
    environment = make_environment(reports)
    return environment.get_template("comparison.html.j2").render(
        runs=runs,
        show_of=lambda report: environment.filters if comparable else metric_filters(report),
        differences=differences(runs),
        kept=kept_by_layer(runs),
        cautions=cautions(runs),
        chart=drawn,
        of=of,
        ratio_change=ratio_change,
        headline_speed=summary.headline_speed,
        headline_size=summary.headline_size,
        title=" · ".join(run.name for run in runs),
    )


def write_comparison(runs: Sequence[Run], path: str | Path) -> None:
    """Write the page that compares `runs` to `path`.

    Raises:
        InputError: there are fewer than two runs, or the file cannot be written.
    """
    if len(runs) < 2:
        raise InputError(f"report: {len(runs)} run{'s' if len(runs) != 1 else ''} to compare, expected at least two")
    write_text(path, render(runs))
