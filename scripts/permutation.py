"""Writes the tables of docs/permutation.md from results/cpu: `python scripts/permutation.py`."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from pages import filled

from twofour.files import write_text

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "permutation.md"
RESULTS = ROOT / "results" / "cpu"
DRAWN = {"rand": "uniform", "randn": "normal"}


def read(name: str) -> dict[str, Any]:
    """Return a results file."""
    value: dict[str, Any] = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    return value


def spread(values: list[float], digits: int) -> str:
    """Return the smallest and the largest of some values, or one number where they round alike."""
    ends = [f"{end:.{digits}f}" for end in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else "–".join(ends)


def search_table() -> str:
    """Return the efficacy of the search as Markdown: a row a matrix and budget."""
    cases: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in read("permutation.json")["rows"]:
        kind = DRAWN[row["matrix"].rpartition(".")[2]]
        cases[f"{row['rows']} x {row['columns']} {kind}", row["budget_seconds"]].append(row)
    lines = ["| matrix | budget | seeds | efficacy, worst | mean | processor time | wall time |", "|---|---|---|---|---|---|---|"]
    for (matrix, budget), rows in cases.items():
        found = [row["efficacy_percent"] for row in rows]
        cpu, wall = ([row[key] for row in rows] for key in ("cpu_seconds", "seconds"))
        times = f"{spread(cpu, 2)} s | {spread(wall, 2)} s"
        lines.append(f"| {matrix} | {budget:g} s | {len(rows)} | {min(found):.2f} % | {fmean(found):.2f} % | {times} |")
    return "\n".join(lines)


def gains_table() -> str:
    """Return what permutation changes for each network as Markdown: a row an order, with and without re-estimated batch-norm."""
    rows = read("accuracy-permutation.json")["rows"]
    lines = ["| network | order | seeds | magnitude kept | as trained | batch-norm re-estimated |", "|---|---|---|---|---|---|"]
    for net in sorted({row["net"] for row in rows}):
        for order, mark in (("plain", ""), ("permuted", ", permuted")):
            plain, again = (
                [row for row in rows if row["net"] == net and row["variant"] == f"2:4 one-shot{mark}{end}"]
                for end in ("", ", batch-norm re-estimated")
            )
            seeds = str(len(plain)) if mark else "–"
            kept = spread([100 * row["kept_magnitude"] for row in plain], 2)
            told = [_mean([row["value"] for row in found]) for found in (plain, again)]
            lines.append(f"| {net} | {order} | {seeds} | {kept} % | {told[0]} | {told[1]} |")
    return "\n".join(lines)


def oneshot_table() -> str:
    """Return the runs with the full calibration set as Markdown, plain → permuted."""
    plain, permuted = (
        {(row["net"], row["variant"].removesuffix(", permuted")): row["value"] for row in read(name)["rows"]}
        for name in ("accuracy-oneshot.json", "accuracy-oneshot-permuted.json")
    )
    lines = ["| network | dense | as trained | batch-norm re-estimated |", "|---|---|---|---|"]
    for net in dict.fromkeys(net for net, _ in plain):
        cells = [f"{plain[net, v]:.2f} → {permuted[net, v]:.2f} %" for v in ("2:4 one-shot", "2:4 one-shot, batch-norm re-estimated")]
        lines.append(f"| {net} | {plain[net, 'dense']:.2f} % | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def networks_line() -> str:
    """Return the record of the random networks as one sentence."""
    total = read("permutation-networks.json")["total"]
    share = 100 * total["permuted"] / total["networks"]
    return (
        f"Of {total['networks']:,} random networks {share:.1f} % permute something; {len(total['failures'])} changed, and the largest "
        f"difference of any output is {total['worst']:.0e}."
    )


def _mean(values: list[float]) -> str:
    """The mean of some values with their range, or the only one."""
    return f"{fmean(values):.2f} % ({spread(values, 2)})" if len(values) > 1 else f"{values[0]:.2f} %"


TABLES: dict[str, Callable[[], str]] = {"search": search_table, "gains": gains_table, "one-shot": oneshot_table, "networks": networks_line}


def main() -> None:
    """Write the tables."""
    write_text(PAGE, filled(PAGE.read_text(encoding="utf-8"), TABLES))


if __name__ == "__main__":
    main()
