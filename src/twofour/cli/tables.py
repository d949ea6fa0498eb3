"""Records as terminal tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from twofour.cli.console import add_row, make_table, say
from twofour.exchange import Inspection
from twofour.pruning import Pruning, Sensitivity
from twofour.report import Measurement


def print_pruning(record: Pruning, console: Console) -> None:
    """Print a pruning, a row a layer."""
    table = make_table("layer", "kind", "shape", "2:4", "magnitude kept", "why not")
    for layer in record.layers:
        kept = "" if layer.kept_magnitude is None else f"{100 * layer.kept_magnitude:.1f} %"
        shape = "×".join(map(str, layer.shape))
        add_row(table, layer.name, layer.kind, shape, "yes" if layer.eligible else "no", kept, layer.reason)
    console.print(table)


def print_sensitivity(measured: Sensitivity, console: Console) -> None:
    """Print a sensitivity, a row a layer, the one that costs most first."""
    total = sum(layer.flops or 0 for layer in measured.layers) or 1
    table = make_table("layer", "shape", "share of FLOPs", measured.metric, "lost")
    for layer in measured.ranked:
        share = "" if layer.flops is None else f"{100 * layer.flops / total:.1f} %"
        add_row(table, layer.name, "×".join(map(str, layer.shape)), share, f"{layer.value:.4g}", f"{layer.lost:+.4g}")
    console.print(table)


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print an inspection, a row a weight."""
    table = make_table("weight", "operation", "shape", "eligible", "2:4 groups", "verdict", "why not")
    for w in inspection.weights:
        share = "" if w.groups is None else f"{100 * w.groups.share:.1f} %"
        state = "2:4" if w.is_24 else "NOT 2:4" if w.required else "dense"
        add_row(table, w.name, w.operation, "×".join(map(str, w.shape)), "yes" if w.eligible else "no", share, state, w.reason)
    console.print(table)
    for note in inspection.notes:
        say(console, f"note: {note}")
    say(console, str(inspection))


def print_measurements(rows: Sequence[Measurement], console: Console) -> None:
    """Print measurements, a row a thing and batch size."""
    table = make_table("what", "backend", "batch", "median ms", "p90", "p99", "items/s", "spread", "n", "peak memory")
    for m in rows:
        peak = "" if m.peak_bytes is None else f"{m.peak_bytes / 2**20:.1f} MiB"
        numbers = (f"{m.median_ms:.3f}", f"{m.p90_ms:.3f}", f"{m.p99_ms:.3f}", f"{m.items_per_s:,.0f}", f"{100 * m.spread:.0f} %", str(m.n))
        add_row(table, m.name, m.backend, str(m.batch), *numbers, peak)
    console.print(table)


def print_gemm(rows: Sequence[dict[str, Any]], summaries: dict[str, dict[str, float]], console: Console) -> None:
    """Print rows of `measure gemm` in effective TFLOP/s, then the geometric means over the shapes of each data type."""
    table = make_table("shape", "dtype", "ours 2:4", "ours dense", "cuBLASLt", "cuSPARSELt", "over cuSPARSELt")
    for row in rows:
        flops = 2 * row["tokens"] * row["out"] * row["in"]
        times = [row[f"{name}_us"] for name in ("ours", "ours_dense", "cublas", "cusparselt")]
        cells = ["–" if us is None else f"{flops / us / 1e6:,.0f}" for us in times]
        ratio = "–" if not times[0] or not times[3] else f"{times[3] / times[0]:.2f}"
        add_row(table, row["name"] + (" (stale)" if row["stale"] else ""), row["dtype"], *cells, ratio)
    console.print(table)
    for dtype, values in summaries.items():
        for name, value in values.items():
            say(console, f"{dtype} {name.replace('_', ' ')}: {value:.3f}")
