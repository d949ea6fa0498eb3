"""Records as terminal tables."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console

from twofour.builder import BuildRecord, Estimate
from twofour.builder.estimate import H200_ERROR, NETWORKS_ERROR
from twofour.builder.record import fallback_cost, why_winner
from twofour.cli.console import add_row, make_table, say
from twofour.exchange import Inspection
from twofour.plan.program import FALLBACK
from twofour.pruning import Pruning, Sensitivity
from twofour.report import Measurement, units
from twofour.report.gpu import GpuMeasurement


def print_pruning(record: Pruning, console: Console) -> None:
    """Print a pruning: a row a layer, then what was noted, such as a damped Hessian."""
    table = make_table("layer", "kind", "shape", "2:4", "magnitude kept", "why not")
    for layer in record.layers:
        kept = "" if layer.kept_magnitude is None else f"{100 * layer.kept_magnitude:.1f} %"
        shape = "×".join(map(str, layer.shape))
        add_row(table, layer.name, layer.kind, shape, "yes" if layer.eligible else "no", kept, layer.reason)
    console.print(table)
    for note in record.notes:
        say(console, f"note: {note}")


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


def print_gpu_measurements(rows: Sequence[GpuMeasurement], console: Console) -> None:
    """Print measurements of GPU plans, a row a plan and batch size."""
    table = make_table("plan", "batch", "ms", "spread", "items/s", "burst ms", "call p50 / p90 / p99 ms", "mJ an item", "clock, power")
    for r in rows:
        energy = units.NOT_KNOWN if r.joules_per_item is None else f"{1e3 * r.joules_per_item:.2f}"
        spread = f"{100 * r.spread:.1f} %" + ("" if r.is_stable else " (unstable)")
        calls = f"{r.p50_ms:.3f} / {r.p90_ms:.3f} / {r.p99_ms:.3f}"
        place = f"{r.clock_mhz:.0f} MHz, {r.power_w:.0f} W"
        add_row(table, r.name, str(r.batch), f"{r.gpu_ms:.3f}", spread, f"{r.items_per_s:,.0f}", f"{r.burst_ms:.3f}", calls, energy, place)
    console.print(table)
    say(
        console,
        "Passes from device memory to device memory, back to back until the clock has settled; energy over 5 s and more.",
    )


def print_estimates(estimates: Sequence[Estimate], console: Console) -> None:
    """Print predictions, a row a GPU and batch size, and how far predictions are from measurements."""
    table = make_table("GPU", "batch", "dense ms", "2:4 ms", "gain", "dense items/s", "2:4 items/s")
    for e in estimates:
        rates = (f"{1e6 * e.batch / e.dense_us:,.0f}", f"{1e6 * e.batch / e.sparse_us:,.0f}")
        add_row(
            table, e.gpu, str(e.batch), f"{e.dense_us / 1e3:.3f}", f"{e.sparse_us / 1e3:.3f}", f"{e.dense_us / e.sparse_us:.2f}×", *rates
        )
    console.print(table)
    say(console, "A prediction from data-sheet rates, not a measurement.")
    dense, sparse, gain = (NETWORKS_ERROR[kind] for kind in ("dense", "2:4", "gain"))
    say(
        console,
        f"On an H200, of {dense.n} whole networks: a dense pass is off by {dense}, a 2:4 one by {sparse}, what 2:4 buys by {gain}.",
    )
    for kind, error in H200_ERROR.items():
        say(console, f"There, of {error.n} matrix products, {kind}: off by {error}. Other GPUs are assumed to reach the same shares.")
    if left_out := [layer.name for layer in estimates[0].layers if layer.family == "fallback"]:
        say(console, f"Not in these times: {', '.join(left_out)}, which ONNX Runtime would compute on the CPU.")


def print_gains(pairs: Sequence[tuple[BuildRecord, BuildRecord]], console: Console) -> None:
    """Print what 2:4 would buy, measured layer by layer: the layers of each batch size, then the sums."""
    for _, sparse in pairs:
        print_build(sparse, console)
    table = make_table("GPU", "batch", "dense ms", "2:4 ms", "gain", "layers that run 2:4")
    for dense, sparse in pairs:
        times = (f"{dense.total_us / 1e3:.3f}", f"{sparse.total_us / 1e3:.3f}", f"{dense.total_us / sparse.total_us:.2f}×")
        count = f"{sum(layer.sparse for layer in sparse.layers)} of {len(sparse.layers)}"
        add_row(table, sparse.gpu, str(sparse.batch), *times, count)
    console.print(table)
    say(console, "Sums of layers timed one by one here, 2:4 in a copy pruned by magnitude; no engine was run, no accuracy is kept.")


def print_estimate_layers(estimate: Estimate, console: Console) -> None:
    """Print one prediction, a row a layer."""
    table = make_table("layer (predicted)", "family", "shape", "FLOPs", "dense µs", "2:4 µs", "bound by", "why not 2:4")
    for layer in estimate.layers:
        sparse = "" if layer.sparse_us is None else f"{layer.sparse_us:.1f}"
        flops = units.flops_text(layer.flops)
        add_row(table, layer.name, layer.family, layer.shape, flops, f"{layer.dense_us:.1f}", sparse, layer.bound, layer.why_not)
    console.print(table)


def print_build(record: BuildRecord, console: Console) -> None:
    """Print a build report, a row a layer, and the memory."""
    table = make_table(
        "layer", "shape", "FLOPs", "bytes", "eligible", "winner", "µs", "share", "over roofline", "candidates µs", "2:4 or why not"
    )
    for layer in record.layers:
        others = [f"{name} {us:.1f}" for name, us in sorted(layer.candidates.items(), key=lambda item: item[1])]
        others += [f"{name}: {reason}" for name, reason in layer.left_out.items()]
        us = units.NOT_KNOWN if layer.us is None else f"{layer.us:.1f}"
        share = "" if layer.share is None else units.share_text(layer.share)
        over = "" if layer.over_roofline is None else f"{layer.over_roofline:.1f}×"
        flops = units.NOT_KNOWN if layer.family == FALLBACK else units.flops_text(layer.flops)
        sizes = (flops, units.bytes_text(layer.num_bytes), "yes" if layer.eligible else "no")
        add_row(table, layer.name, layer.shape, *sizes, layer.winner, us, share, over, "; ".join(others), why_winner(layer))
    console.print(table)
    excess = 100 * (record.peak_bytes / record.bound_bytes - 1) if record.bound_bytes else 0.0
    say(console, str(record), f"memory: {units.bytes_text(record.peak_bytes)}, {excess:.1f} % above the most alive at one step")
    if cost := fallback_cost(record):
        say(console, cost)
