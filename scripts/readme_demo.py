"""Writes the demo's table in README.md from a report: `python scripts/readme_demo.py [runs/demo/report.json]`.

With a report it first records its accuracy in results/cpu/accuracy-demo.json; without one it writes the table from what is recorded there.
"""

import json
import sys
from pathlib import Path
from statistics import fmean, stdev

from twofour.files import write_text
from twofour.report import Report

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "cpu" / "accuracy-demo.json"
BEGIN, END = "<!-- demo table -->", "<!-- /demo table -->"


def record(report: Report) -> None:
    """Keep the accuracy of a run, a row a seed and variant, with where it was measured."""
    rows = [
        {"net": report.model, "data": report.data, "seed": seed, "variant": row.variant, "metric": report.metric, "value": value}
        for row in report.accuracy
        for seed, value in zip(report.seeds, row.values, strict=True)
    ]
    value = {
        "schema": 1,
        "kind": "accuracy",
        "machine": report.environment.model_dump(),
        "date": report.created,
        "command": report.command,
        "rows": rows,
    }
    write_text(RESULTS, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def table() -> str:
    """Return the Markdown table of the recorded run."""
    recorded = json.loads(RESULTS.read_text(encoding="utf-8"))
    by_variant: dict[str, list[float]] = {}
    for row in recorded["rows"]:
        by_variant.setdefault(row["variant"], []).append(row["value"])
    lines = ["| | accuracy on 360 held-out digits, % |", "|---|---|"]
    for variant, values in by_variant.items():
        spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(f"| {variant} | {fmean(values):.2f}{spread} |")
    machine = recorded["machine"]
    seeds = len(next(iter(by_variant.values())))
    where = f"{machine['cpu']}, {machine['cores']} cores, torch {machine['libraries']['torch']}, Python {machine['python']}"
    lines += ["", f"Mean ± standard deviation over {seeds} seeds; {where}; {recorded['date'][:10]}."]
    return "\n".join(lines)


def filled(readme: str) -> str:
    """Return the README's text with the table between its markers."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Record a report if one is given, then write the table."""
    if len(sys.argv) > 1:
        record(Report.load(sys.argv[1]))
    path = ROOT / "README.md"
    write_text(path, filled(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
