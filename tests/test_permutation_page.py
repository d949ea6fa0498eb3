"""docs/permutation.md and the table of architectures show what the results hold, and the results hold what was promised."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_loader import load_script

from twofour.pruning.permutation import coverage

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "permutation.md").read_text(encoding="utf-8")


def recorded(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((ROOT / "results" / "cpu" / name).read_text(encoding="utf-8"))
    return value


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("permutation")


def test_the_tables_are_those_of_the_results(script: ModuleType) -> None:
    assert script.filled(PAGE, script.TABLES) == PAGE, "run: python scripts/permutation.py"


def test_the_table_of_architectures_is_that_of_the_results() -> None:
    rows = [coverage.Row(**row) for row in recorded("permutation-architectures.json")["rows"]]
    page = (ROOT / "docs" / "permutation-architectures.md").read_text(encoding="utf-8")
    assert page == "# What is permuted in each architecture\n\n" + coverage.table(rows)


def test_the_recorded_search_reaches_its_floors() -> None:
    floors = {(64, 0.2): 37.0, (64, 2.0): 38.3, (2048, 60.0): 12.0}
    for (columns, budget), floor in floors.items():
        rows = [r for r in recorded("permutation.json")["rows"] if r["columns"] == columns and r["budget_seconds"] == budget]
        assert len({row["seed"] for row in rows}) == 10
        assert min(row["efficacy_percent"] for row in rows) >= floor
        # One core's own time: the wall time also counts what else the machine did.
        assert max(row["cpu_seconds"] for row in rows) <= budget


def test_the_recorded_random_networks_are_unchanged() -> None:
    total = recorded("permutation-networks.json")["total"]
    assert total["networks"] >= 20_000
    assert total["failures"] == []
    assert total["worst"] <= 1e-9
    assert total["permuted"] >= 0.6 * total["networks"]


def test_the_recorded_architectures_cover_what_was_promised() -> None:
    rows = {row["name"]: row for row in recorded("permutation-architectures.json")["rows"]}
    assert rows.keys() == set(coverage.architectures())
    assert not [name for name, row in rows.items() if row["failure"] or max(row["error"], row["applied_error"]) > 1e-9]
    images = [row for name, row in rows.items() if not name.startswith("transformers:")]
    assert len(images) >= 60
    assert sum(row["permuted"] > 0 for row in images) >= 45
    assert len(rows) - len(images) >= 8
    names = ["torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:vit_b_16", "transformers:bert", "transformers:llama"]
    for name in names:
        assert rows[name]["permuted"] >= 0.9 * rows[name]["eligible"]
    # Whatever is not permuted has its reason.
    assert all(sum(row["refusals"].values()) == row["eligible"] - row["permuted"] for row in rows.values())
