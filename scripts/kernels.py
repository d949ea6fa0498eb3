"""Writes the tables in docs/kernels/ from results/nvidia-h200/gemm.json and conv.json: `python scripts/kernels.py`.

Rows whose device sources have changed since are left out.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from pages import filled

from twofour.files import write_text
from twofour.kernels.families import OURS
from twofour.kernels.launchable import sources_digests
from twofour.report.gemm import DTYPES, SHAPES, current_rows
from twofour.timing.gpu import COMPARABLE

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import conv_rows  # noqa: E402

GEMM = ROOT / "results" / "nvidia-h200" / "gemm.json"
CONV = ROOT / "results" / "nvidia-h200" / "conv.json"
NONE = "No measurement of the present kernels is recorded."
# Written down before anything had run, microseconds: of grouped layers at batch 64 by channels, side and stride; of depthwise ones at
# batch 256 by channels, kernel, side and stride.
GROUPED = {(256, 56, 1): 56, (512, 56, 2): 68, (512, 28, 1): 31, (1024, 28, 2): 38, (1024, 14, 1): 18, (2048, 14, 2): 22, (2048, 7, 1): 16}
DEPTHWISE = {
    **{(32, 3, 112, 1): 110, (96, 3, 112, 2): 198, (144, 3, 56, 1): 125, (384, 3, 14, 1): 21, (144, 5, 56, 2): 79, (240, 5, 28, 1): 57},
    **{(672, 5, 14, 1): 40, (128, 7, 56, 1): 126, (256, 7, 28, 1): 62, (512, 7, 14, 1): 32, (1024, 7, 7, 1): 24},
}
Row = dict[str, Any]


def fresh(family: str, batch: int) -> list[Row]:
    """Return the recorded rows of the present kernels."""
    sources = sources_digests()
    rows = conv_rows.read(CONV)["rows"]
    return [row for row in rows if (row["family"], row["batch"]) == (family, batch) and not conv_rows.is_stale(row, sources)]


def us(value: float | None, best: float | None = None) -> str:
    """Microseconds to three digits, those of the fastest bold."""
    if value is None:
        return "–"
    text = f"{value:.1f}" if value < 100 else f"{value:.0f}"
    return f"**{text}**" if value == best else text


def pair(row: Row) -> list[str]:
    """Ours and cuDNN's, the faster one bold."""
    ours, theirs = row["ours_dense_us"], row["cudnn_us"]
    best = min((value for value in (ours, theirs) if value is not None), default=None)
    return [us(ours, best), us(theirs, best)]


def over(row: Row) -> str:
    """How many times the limit ours takes."""
    return "–" if row["ours_dense_us"] is None else f"{row['ours_dense_us'] / row['limit_us']:.2f}"


def config(row: Row, family: str) -> str:
    """The fastest config, its numbers in the order of the contract's `Config`."""
    return "–" if row["config"] is None else row["config"].removeprefix(f"{OURS} {family} ")


def line(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [line(heads), "|---" * len(heads) + "|", *(line(cells) for cells in lines)]


def where(rows: Sequence[Row]) -> str:
    """Where, when and by what command rows were measured."""
    machines = [{**row["machine"], "power_limit_w": f"{row['machine']['power_limit_w']:.0f} W"} for row in rows]
    names = {"driver": "driver", "power_limit_w": "power limit", "cuda": "CUDA", "torch": "torch", "cudnn": "cuDNN"}
    versions = dict.fromkeys(", ".join([m["gpu"], *(f"{text} {m[name]}" for name, text in names.items())]) for m in machines)
    runs = dict.fromkeys(f"{row['date'][:10]}, `{row['command']}`" for row in rows)
    return f"{'; '.join(versions)}; {'; '.join(runs)}; rows: [conv.json](../../{CONV.relative_to(ROOT)})."


def sums(rows: Sequence[Row], *names: str) -> list[str]:
    """Sums by count."""
    return [us(value) for value in conv_rows.sums(rows, *names)]


def grouped_table() -> str:
    """Return grouped layers at batch 64 and 256, ours beside cuDNN's and what was foretold."""
    small, large = (fresh("grouped", batch) for batch in (64, 256))
    beside = {conv_rows.key(row | {"batch": 0}): row for row in large}
    rows = [(row, beside[key]) for row in small if (key := conv_rows.key(row | {"batch": 0})) in beside]
    if not rows:
        return NONE
    heads = ["channels", "pixels", "stride", "group", "layers", "limit", "foretold", "ours, batch 64", "× limit", "cuDNN", "config"]
    heads += ["limit", "ours, batch 256", "× limit", "cuDNN", "config"]
    lines = []
    for row, more in rows:
        (height, width), stride = row["pixels"], row["stride"][0]
        cells = [str(row["in"]), f"{height}×{width}", str(stride), str(row["in"] // row["groups"]), str(row["count"])]
        foretold = GROUPED.get((row["in"], height, stride))
        ours, theirs = pair(row)
        cells += [us(row["limit_us"]), str(foretold or "–"), ours, over(row), theirs, config(row, "grouped")]
        ours, theirs = pair(more)
        lines.append([*cells, us(more["limit_us"]), ours, over(more), theirs, config(more, "grouped")])
    limit, ours, theirs = sums([row for row, _ in rows], "limit_us", "ours_dense_us", "cudnn_us")
    cells = ["all, by count", "", "", "", str(sum(row["count"] for row, _ in rows)), limit, "", ours, "", theirs, ""]
    limit, ours, theirs = sums([row for _, row in rows], "limit_us", "ours_dense_us", "cudnn_us")
    lines.append([*cells, limit, ours, "", theirs, ""])
    return "\n".join([*table(heads, lines), "", where([row for both in rows for row in both])])


def depthwise_table() -> str:
    """Return depthwise layers at batch 256 beside what was foretold, and at batch 1, ours beside cuDNN's and torch's."""
    many, single = (fresh("depthwise", batch) for batch in (256, 1))
    if not many:
        return NONE
    one = {conv_rows.key(row | {"batch": 0}): row for row in single}
    heads = ["network", "layer", "layers", "limit", "foretold", "ours, batch 256", "× limit", "cuDNN", "torch", "config"]
    heads += ["ours, batch 1", "cuDNN", "config"]
    lines = []
    for row in many:
        side, kernel, stride = row["pixels"][0], row["kernel"][0], row["stride"][0]
        name = f"{kernel}×{kernel}{f'/{stride}' * (stride > 1)}, {row['in']} at {side}"
        foretold = DEPTHWISE.get((row["in"], kernel, side, stride))
        ours, theirs = pair(row)
        cells = [row["net"], name, str(row["count"]), us(row["limit_us"]), str(foretold or "–")]
        cells += [ours, over(row), theirs, us(row["torch_us"])]
        small = one.get(conv_rows.key(row | {"batch": 0}))
        more = ["–"] * 3 if small is None else [*pair(small), config(small, "depthwise")]
        lines.append([*cells, config(row, "depthwise"), *more])
    return "\n".join([*table(heads, lines), "", where([*many, *single])])


def depthwise_sums() -> str:
    """Return the depthwise layers of each network by count."""
    heads = ("all depthwise layers, µs", "batch", "limit", "ours", "cuDNN", "torch")
    lines = []
    for batch in (256, 1):
        rows = fresh("depthwise", batch)
        for net in dict.fromkeys(row["net"] for row in rows):
            chosen = [row for row in rows if row["net"] == net]
            lines.append([net, str(batch), *sums(chosen, "limit_us", "ours_dense_us", "cudnn_us", "torch_us")])
    return "\n".join(table(heads, lines)) if lines else NONE


def products() -> list[Row]:
    """Return the recorded products of the present kernels, timed by a protocol like today's; by dtype, in the order of the shapes."""
    recorded = json.loads(GEMM.read_text(encoding="utf-8"))
    rows = [row for row in current_rows(recorded) if not row["stale"] and row.get("protocol") in COMPARABLE]
    order = {name: number for number, name in enumerate(SHAPES)}
    return sorted(rows, key=lambda row: (DTYPES.index(row["dtype"]), order.get(row["name"], len(order)), row["name"]))


def gemm_table() -> str:
    """Return products sustained: TFLOP/s of ours, 2:4 and dense, beside the libraries', and what they are over these."""
    heads = ["tokens × outputs × inputs", "", "dtype", "our 2:4", "cuSPARSELt", "ours over it", "in a burst", "our tile", "MHz"]
    heads += ["our dense", "cuBLASLt", "ours over it"]
    lines = []
    for row in products():
        rate, clock, burst, shaky = row["tflops"], row["clock_mhz"], row["burst_us"], set(row["unstable"])

        def cell(name: str, rate: dict[str, float] = rate, shaky: set[str] = shaky) -> str:
            return f"{rate[name]:,.0f}{'?' * (name in shaky)}" if name in rate else "–"

        def ratio(ours: str, theirs: str, us: dict[str, float]) -> str:
            return f"{us[theirs] / us[ours]:.3f}" if ours in us and theirs in us else "–"

        settled = {name: row[f"{name}_us"] for name in rate}
        tile = row["tactics"]["ours"].rsplit("2:4:")[-1].replace(":", " ")
        cells = [f"{row['tokens']} × {row['out']} × {row['in']}", row["name"], row["dtype"], cell("ours"), cell("cusparselt")]
        cells += [f"**{ratio('ours', 'cusparselt', settled)}**", ratio("ours", "cusparselt", burst), tile, f"{clock['ours']:.0f}"]
        lines.append([*cells, cell("ours_dense"), cell("cublas"), ratio("ours_dense", "cublas", settled)])
    return "\n".join(table(heads, lines)) if lines else NONE


def goals_table() -> str:
    """Return what products are to reach and what they do: geometric means and the worst, of stable and unstable rows alike."""
    rows = products()

    def ratios(dtype: str, keep: Callable[[int], bool], ours: str, theirs: str) -> list[float]:
        own = [row for row in rows if row["dtype"] == dtype and keep(row["tokens"])]
        return [row[f"{theirs}_us"] / row[f"{ours}_us"] for row in own if row[f"{theirs}_us"] and row[f"{ours}_us"]]

    def mean(values: list[float]) -> str:
        return f"{geometric_mean(values):.3f} of {len(values)}; {min(values):.3f}" if values else "–"

    def large(name: str, dtype: str) -> Row | None:
        return next((row for row in rows if (row["name"], row["dtype"]) == (name, dtype)), None)

    lines = []
    for what, floor, keep, ours, theirs in (
        ("2,048 tokens and more over cuSPARSELt; worst", "1.04; 0.93", lambda tokens: tokens >= 2048, "ours", "cusparselt"),
        ("512 tokens over cuSPARSELt; worst", "1.0", lambda tokens: tokens == 512, "ours", "cusparselt"),
        ("our dense form over cuBLASLt, 2,048 tokens and more; worst", "0.95", lambda tokens: tokens >= 2048, "ours_dense", "cublas"),
    ):
        lines.append([what, floor, *(mean(ratios(dtype, keep, ours, theirs)) for dtype in DTYPES)])
    tops = [None if (row := large("8192^3", dtype)) is None else row["tflops"] for dtype in DTYPES]
    cells = ["–" if rate is None else f"{rate['ours']:,.0f} ({rate['cusparselt']:,.0f})" for rate in tops]
    lines.append(["8192³, TFLOP/s (cuSPARSELt's)", "1,030", *cells])
    for name in ("8192^3", "8B.gateup t8192"):
        own = [large(name, dtype) for dtype in DTYPES]
        energy = [None if row is None or not row["joules"] else [row["joules"][c]["pj_a_flop"] for c in ("ours", "cublas")] for row in own]
        cells = ["–" if pair is None else f"{pair[0] / pair[1]:.3f} ({pair[0]:.3f} over {pair[1]:.3f} pJ)" for pair in energy]
        lines.append([f"energy a FLOP, 2:4 over cuBLASLt's dense, {name}", "0.65", *cells])
    return "\n".join(table(["sustained", "goal", *DTYPES], lines)) if rows else NONE


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "gemm.md": {"goals": goals_table, "gemm": gemm_table},
    "grouped.md": {"grouped": grouped_table},
    "depthwise.md": {"depthwise": depthwise_table, "depthwise sums": depthwise_sums},
}


def main() -> None:
    """Write the tables."""
    for name, tables in PAGES.items():
        path = ROOT / "docs" / "kernels" / name
        write_text(path, filled(path.read_text(encoding="utf-8"), tables))


if __name__ == "__main__":
    main()
