"""The report as one table at the end of a run, dense beside 2:4."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twofour.report import summary, units
from twofour.report.compare import Run, cautions
from twofour.report.page import metric_decimals
from twofour.report.record import AccuracyRow, Report

# How the table names a variant where the record's name alone could be misread.
LABELS = {"2:4": "2:4 after retraining"}


def _accuracy_text(row: AccuracyRow | None, decimals: int, unit: str) -> str:
    if row is None:
        return units.NOT_KNOWN
    spread = f" ± {units.fixed(row.spread, decimals)}" if len(row.values) > 1 else ""
    return f"{units.fixed(row.mean, decimals)}{spread}{unit}"


def _change_text(dense: float, sparse: float) -> str:
    return f"{units.signed(100 * (sparse / dense - 1), 1)} %" if dense else ""


def _add(table: Table, *cells: str) -> None:
    """Add a row of plain text: square brackets in a name are not markup."""
    table.add_row(*(Text(cell) for cell in cells))


def _accuracy_rows(table: Table, report: Report) -> None:
    decimals = metric_decimals(report)
    unit = f" {report.metric_unit}" if report.metric_unit else ""
    rows = {row.variant: row for row in report.accuracy if row.values}

    base = rows.get("dense")
    for variant, row in rows.items():
        text = _accuracy_text(row, decimals, unit)
        change = units.signed(row.mean - base.mean, decimals) if base is not None and row is not base else ""
        columns = ("", text) if variant.startswith("2:4") else (text, "")
        _add(table, f"{report.metric}, {LABELS.get(variant, variant)}", *columns, change)


def _measured_rows(table: Table, report: Report) -> None:
    for speed in summary.speed_pairs(report):
        if speed.dense and speed.sparse:
            for name in ("p50", "p99"):
                dense_ms, sparse_ms = getattr(speed.dense, f"{name}_ms"), getattr(speed.sparse, f"{name}_ms")
                label = f"latency {name}, batch {speed.dense.batch}"
                _add(table, label, units.milliseconds_text(dense_ms), units.milliseconds_text(sparse_ms), _change_text(dense_ms, sparse_ms))
            if speed.dense.pass_ms and speed.sparse.pass_ms:
                dense_ms, sparse_ms = speed.dense.pass_ms, speed.sparse.pass_ms
                label = f"GPU time of a pass, batch {speed.dense.batch}"
                _add(table, label, units.milliseconds_text(dense_ms), units.milliseconds_text(sparse_ms), _change_text(dense_ms, sparse_ms))
            if speed.dense.joules_per_item and speed.sparse.joules_per_item:
                dense_mj, sparse_mj = 1e3 * speed.dense.joules_per_item, 1e3 * speed.sparse.joules_per_item
                texts = [f"{units.significant(value)} mJ" for value in (dense_mj, sparse_mj)]
                _add(table, f"energy an item, batch {speed.dense.batch}", *texts, _change_text(dense_mj, sparse_mj))
    for size in summary.size_pairs(report):
        if size.dense and size.sparse:
            dense, sparse = size.dense.bytes, size.sparse.bytes
            _add(table, f"size of the {size.label} file", units.bytes_text(dense), units.bytes_text(sparse), _change_text(dense, sparse))
    for memory in summary.memory_pairs(report):
        if memory.dense and memory.sparse:
            dense, sparse = memory.dense.peak_bytes, memory.sparse.peak_bytes
            label = f"peak memory, batch {memory.dense.batch}"
            _add(table, label, units.bytes_text(dense), units.bytes_text(sparse), _change_text(dense, sparse))


def _outcome(report: Report) -> Text:
    """Return the lines below the table: how much is 2:4, the checks, the statement."""
    covered = summary.coverage(report)
    share = "" if covered.share_of_flops is None else f", {units.share_text(covered.share_of_flops)} of FLOPs"
    text = Text(f"{covered.num_sparse} of {covered.num_layers} layers are 2:4{share}. ")
    failed = [check for check in report.checks if not check.passed]
    text.append(f"{len(report.checks) - len(failed)} of {len(report.checks)} checks passed.", style="bold red" if failed else "green")
    for check in failed:
        text.append(f"\nfailed: {check.name}: {check.detail}", style="red")
    return text.append(f"\n{report.statement}", style="bold")


def print_summary(report: Report, console: Console) -> None:
    """Write the table and what may be concluded from it to `console`; colour is the console's decision (NO_COLOR, not a terminal)."""
    seeds = f"{len(report.seeds)} seed{'s' if len(report.seeds) != 1 else ''}"
    title = Text(f"{report.model} on {report.data}, {seeds}, {report.backend}")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("dense", justify="right", no_wrap=True)
    table.add_column("2:4", justify="right", no_wrap=True, style="green")
    table.add_column("against dense", justify="right", no_wrap=True, style="dim")
    _accuracy_rows(table, report)
    table.add_section()
    _measured_rows(table, report)
    console.print(table)
    console.print(_outcome(report))


def print_comparison(runs: Sequence[Run], console: Console) -> None:
    """Write one row a run, and what of them is not comparable, to `console`."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    for name in ("dense", "2:4", "against control", "FLOPs in 2:4", "kept", "checks"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        report, covered = run.report, run.coverage
        decimals, unit = metric_decimals(report), f" {report.metric_unit}" if report.metric_unit else ""
        _add(
            table,
            run.name,
            _accuracy_text(run.accuracy("dense"), decimals, unit),
            _accuracy_text(run.accuracy("2:4"), decimals, unit),
            units.NOT_KNOWN if run.against_control is None else units.signed(run.against_control, decimals),
            units.NOT_KNOWN if covered.share_of_flops is None else units.share_text(covered.share_of_flops),
            units.NOT_KNOWN if covered.kept_magnitude is None else units.share_text(covered.kept_magnitude),
            f"{sum(check.passed for check in report.checks)} of {len(report.checks)}",
        )
    console.print(table)
    for caution in cautions(runs):
        console.print(Text(caution, style="bold"))
