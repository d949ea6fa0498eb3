"""Measurements of real engines."""

import os
from pathlib import Path

import pytest

import twofour
from twofour.errors import InputError, TwofourError
from twofour.runtime.memory import measure_peak_bytes


def test_files_are_measured_side_by_side(sparse_onnx: Path, tmp_path: Path) -> None:
    twofour.build(sparse_onnx).save(tmp_path / "m.plan")
    rows = twofour.measure({"onnx": sparse_onnx, "plan": tmp_path / "m.plan"}, batch=(1, 4), seconds=0.2)
    assert [(r.name, r.batch) for r in rows] == [("onnx", 1), ("plan", 1), ("onnx", 4), ("plan", 4)]
    for row in rows:
        assert row.n >= 30
        assert 0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.items_per_s == pytest.approx(1e3 * row.batch / row.median_ms)
        # The weights alone take 0.7 MB; a child that counted its parent's memory would report hundreds.
        assert row.peak_bytes is not None
        assert 0.7e6 < row.peak_bytes < 100e6


@pytest.mark.parametrize(
    ("things", "batch", "message"),
    [
        ("none.onnx", (1,), "measure: file 'none.onnx' does not exist"),
        ({}, (1,), "no plan or ONNX file is given, expected at least one"),
        ("none.onnx", (), "no batch size is given, expected at least one"),
        (["a.onnx", "a.onnx"], (1,), "two of the files are the same"),
    ],
)
def test_wrong_requests_get_one_sentence(things: object, batch: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        twofour.measure(things, batch=batch)  # type: ignore[arg-type]


def test_a_failing_child_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.plan").write_bytes(b"junk")
    with pytest.raises(TwofourError, match=r"measuring the memory of bad.plan failed: .*damaged"):
        measure_peak_bytes(tmp_path / "bad.plan", 1)


def test_the_child_runs_nothing_from_the_current_folder(sparse_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twofour.build(sparse_onnx).save(tmp_path / "m.plan")
    (tmp_path / "random.py").write_text("raise SystemExit('run from the current folder')")
    monkeypatch.chdir(tmp_path)
    # An empty entry of the import path means the current folder.
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", "") + os.pathsep)
    assert measure_peak_bytes(tmp_path / "m.plan", 1) > 0
