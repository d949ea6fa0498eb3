"""benchmarks/conv_rows.py: what a row says, how rows join, which are stale; the recorded ones, and the pages' tables."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from script_loader import load_script

from twofour.builder.tactics.bench import Timed
from twofour.builder.tactics.ways import Way
from twofour.errors import InputError
from twofour.kernels import depthwise
from twofour.kernels.conv.contract import Epilogue, Problem
from twofour.kernels.launchable import sources_digests
from twofour.timing.gpu import Figure

ROOT = Path(__file__).parent.parent
RECORDED = ROOT / "results" / "nvidia-h200" / "conv.json"
LAYER = Problem(2, 28, 14, 16, 16, (3, 3), (2, 2), (1, 1, 1, 1), groups=16, epilogue=Epilogue("relu6", bias=True))


@pytest.fixture(scope="module")
def rows() -> ModuleType:
    return load_script("conv_rows", "benchmarks")


def timed() -> list[Timed]:
    """Two configs of ours, and two plans of cuDNN's of which one does not run."""
    ours = [Way("depthwise", "twofour", LAYER, depthwise.Config("walk", 2, 4, rows)) for rows in (0, 1)]
    plans = [Way("conv", "cudnn", LAYER, None, plan) for plan in (0, 1)]
    figures = [Figure(4.256, 0.01234, 7), Figure(3.1, 0.02, 7), Figure(6.0, 0.03, 7)]
    return [*(Timed(way, figure) for way, figure in zip([*ours, plans[0]], figures, strict=True)), Timed(plans[1], None, "no memory")]


def test_a_row_names_the_fastest_of_ours_and_of_theirs(rows: ModuleType) -> None:
    row = rows.row_of("MobileNetV2", 2, "depthwise", LAYER, timed(), {"torch": "absent"})
    assert [row[name] for name in rows.KEY] == ["MobileNetV2", 16, 16, [3, 3], [2, 2], 16, [28, 14], 2, "fp16"]
    assert rows.problem_of(row) == LAYER
    assert (row["ours_dense_us"], row["config"]) == (3.1, "twofour depthwise walk 2 4 1 1")
    assert (row["cudnn_us"], row["cudnn_plan"], row["ours_sparse_us"], row["torch_us"]) == (6.0, "cudnn 0", None, None)
    assert row["spread"] == {"ours": 0.02, "cudnn": 0.03}
    assert row["n"] == {"ours": 7, "cudnn": 7}
    assert row["times_us"] == {"twofour depthwise walk 2 4 0 1": 4.26, "twofour depthwise walk 2 4 1 1": 3.1, "cudnn 0": 6.0}
    assert row["left_out"] == {"torch": "absent", "cudnn 1": "no memory"}
    alone = rows.row_of("MobileNetV2", 2, "depthwise", LAYER, timed()[:1], {})
    assert (alone["cudnn_us"], alone["cudnn_plan"], alone["spread"]["cudnn"]) == (None, None, None)
    assert rows.total_line([row, alone]).endswith("count: limit 0, ours 15"), "of cuDNN one layer is missing"


def test_a_new_row_takes_the_place_of_its_layer_and_others_stay(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "gpu" / "conv.json"
    row = rows.row_of("MobileNetV2", 2, "depthwise", LAYER, timed(), {})
    other = {**row, "net": "ResNeXt-101_32x8d"}
    rows.add(path, {"gpu": "A"}, {"date": "1", "command": "first"}, [row, {**row, "batch": 1}, other])
    rows.add(path, {"gpu": "B"}, {"date": "2", "command": "second"}, [{**row, "ours_dense_us": 1.0}])
    value = json.loads(path.read_text())
    assert {name: value[name] for name in ("schema", "kind", "machine", "date", "command")} == {
        **{"schema": 1, "kind": "conv", "machine": {"gpu": "B"}, "date": "2", "command": "second"}
    }
    found = [(r["net"], r["batch"], r["ours_dense_us"], r["machine"]["gpu"], r["date"], r["command"]) for r in value["rows"]]
    assert found == [
        ("ResNeXt-101_32x8d", 2, 3.1, "A", "1", "first"),
        ("MobileNetV2", 2, 1.0, "B", "2", "second"),
        ("MobileNetV2", 1, 3.1, "A", "1", "first"),
    ]


def test_a_file_of_something_else_is_left_alone(rows: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "conv.json"
    for text, message in (
        ('{"schema": 1, "kind": "gemm"}', "holds 'gemm' results of schema 1, expected 'conv' of 1; move it away"),
        ("[", "is no results file"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            rows.add(path, {}, {}, [])
        assert path.read_text() == text


def test_recorded_rows_are_whole_and_each_layer_stands_once(rows: ModuleType) -> None:
    recorded = rows.read(RECORDED)["rows"]
    wanted = set(rows.row_of("MobileNetV2", 2, "depthwise", LAYER, timed(), {})) | {"machine", "date", "command"}
    for row in recorded:
        assert set(row) == wanted
        ours = {name: us for name, us in row["times_us"].items() if name.startswith(f"twofour {row['family']} ")}
        theirs = {name: us for name, us in row["times_us"].items() if name.startswith("cudnn ")}
        assert (row["ours_dense_us"], row["cudnn_us"]) == (min(ours.values()), min(theirs.values()))
        assert (ours[row["config"]], theirs[row["cudnn_plan"]]) == (row["ours_dense_us"], row["cudnn_us"])
        assert row["limit_us"] < row["ours_dense_us"]
    assert len({rows.key(row) for row in recorded}) == len(recorded)


def test_rows_of_other_kernels_are_stale_and_in_no_table(rows: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = sources_digests()
    row: dict[str, Any] = rows.row_of("MobileNetV2", 2, "depthwise", LAYER, timed(), {})
    assert not rows.is_stale(row, sources)
    assert not rows.is_stale(row, sources | {"grouped": "0" * 16})
    assert rows.is_stale(row, sources | {"depthwise": "0" * 16})
    script = load_script("kernels")
    monkeypatch.setattr(script, "sources_digests", lambda: dict.fromkeys(sources, "0" * 16))
    monkeypatch.setattr("twofour.report.gemm.sources_digest", lambda: "0" * 16)
    assert {table() for tables in script.PAGES.values() for table in tables.values()} == {script.NONE}


def test_the_tables_are_those_of_the_results() -> None:
    script = load_script("kernels")
    for name, tables in script.PAGES.items():
        page = (ROOT / "docs" / "kernels" / name).read_text(encoding="utf-8")
        assert script.filled(page, tables) == page, "run: python scripts/kernels.py"
