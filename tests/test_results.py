"""Recorded results: one schema, nothing without its machine and command, stale rows known as stale."""

import json
from pathlib import Path

import pytest

from twofour.kernels.gemm.source import sources_digest
from twofour.report.gemm import current_rows

RESULTS = Path(__file__).parent.parent / "results"
FILES = sorted(RESULTS.rglob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(RESULTS)))
def test_every_file_says_where_when_and_how(path: Path) -> None:
    value = json.loads(path.read_text(encoding="utf-8"))
    assert {"schema", "kind", "machine", "date", "command", "rows"} <= value.keys()
    assert value["rows"]
    assert isinstance(value["machine"], dict)


def test_a_row_of_other_kernels_is_stale() -> None:
    rows = current_rows({"rows": [{"sources_digest": sources_digest()}, {"sources_digest": "0" * 16}]})
    assert [row["stale"] for row in rows] == [False, True]


def test_a_recorded_test_run_has_no_failure() -> None:
    for path in FILES:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["kind"] == "tests":
            assert not [row for row in value["rows"] if row["failed"] or row.get("error") or row.get("errors")], path
