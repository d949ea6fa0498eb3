"""Keeps what `twofour compress` and `make demo` reported on a GPU: `python evidence/main_job.py results/GPU/main-job.json REPORT…`.

REPORT is a report.json; of a model and data already in the file the new report takes the place. A row holds the command, the machine, the
checks and the accuracy, so that it can be seen that the whole job ran, and on what. Speeds are left out: these runs share their GPU.
"""

import argparse
import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from twofour.files import write_text
from twofour.report import Report


def row_of(report: Report) -> dict[str, Any]:
    """Return a report as one row."""
    return {
        "net": report.model,
        "data": report.data,
        "date": report.created,
        "command": report.command,
        "machine": report.environment.model_dump(exclude={"platform"}),
        "backend": report.backend,
        "sparse_kernels": report.sparse_kernels,
        "statement": report.statement,
        "seeds": report.seeds,
        "metric": report.metric,
        "accuracy": {one.variant: round(fmean(one.values), 4) for one in report.accuracy},
        "checks": {check.name: check.passed for check in report.checks},
    }


def main() -> None:
    """Add the reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT")
    a = parser.parse_args()
    earlier = json.loads(a.out.read_text(encoding="utf-8"))["rows"] if a.out.exists() else []
    rows = {(row["net"], row["data"]): row for row in (*earlier, *(row_of(Report.load(path)) for path in a.reports))}
    last = max(rows.values(), key=lambda row: str(row["date"]))
    head = {"schema": 1, "kind": "main-job", "machine": {"gpu": last["machine"]["gpu"]}, "date": last["date"]}
    text = {**head, "command": f"python evidence/main_job.py {a.out.name} REPORT…", "rows": list(rows.values())}
    write_text(a.out, json.dumps(text, indent=1, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{len(rows)} reports in {a.out}\n")


if __name__ == "__main__":
    main()
