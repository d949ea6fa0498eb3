"""`pytest --record FILE` keeps the outcome of a run in results/: machine, versions, counts, and the digests of the kernels it ran."""

import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

from twofour.files import write_text
from twofour.kernels.launchable import sources_digests
from twofour.report.environment import environment

OUTCOMES = ("passed", "failed", "error", "skipped", "xfailed", "xpassed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, help="write the outcome as JSON to this file")
    parser.addoption("--under", default="", help="the command that this run is a child of, such as a memory checker, for the record")


def rows_of(reporter: Any) -> list[dict[str, Any]]:
    """One row a test file: how many tests ended how, and seconds."""
    rows: dict[str, dict[str, Any]] = {}
    for outcome in OUTCOMES:
        for report in reporter.stats.get(outcome, []):
            row = rows.setdefault(report.nodeid.split("::")[0], {**dict.fromkeys(OUTCOMES, 0), "seconds": 0.0})
            row[outcome] += 1
            row["seconds"] = round(row["seconds"] + report.duration, 3)
    return [{"file": file, **row} for file, row in sorted(rows.items())]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    path: Path | None = session.config.getoption("--record")
    if path is None or hasattr(session.config, "workerinput"):
        return
    here = environment()
    machine = {"gpu": here.gpu, "cpu": here.cpu, "cores": here.cores, "python": platform.python_version(), "libraries": here.libraries}
    value = {
        "schema": 1,
        "kind": "tests",
        "machine": machine,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join([*session.config.getoption("--under").split(), "pytest", *[a for a in sys.argv[1:] if not a.startswith("/")]]),
        "sources_digest": sources_digests()["gemm"],
        "sources_digests": sources_digests(),
        "rows": rows_of(session.config.pluginmanager.get_plugin("terminalreporter")),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")
