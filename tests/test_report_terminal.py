"""The table at the end of a run."""

import io
from statistics import fmean, stdev

import pytest
from report_sample import sample
from rich.console import Console

from twofour.report.record import Report
from twofour.report.terminal import print_summary


def printed(report: Report, **options: object) -> str:
    out = io.StringIO()
    print_summary(report, Console(file=out, width=100, **options))  # type: ignore[arg-type]
    return out.getvalue()


def test_dense_stands_beside_sparse() -> None:
    text = printed(sample())

    def accuracy(variant: str) -> list[str]:
        row, dense = sample().accuracy_of(variant), sample().accuracy_of("dense")
        difference = f"{fmean(row.values) - fmean(dense.values):+.2f}".replace("-", "−")
        return [f"{fmean(row.values):.2f} ± {stdev(row.values):.2f} %"] + ([difference] if variant != "dense" else [])

    rows = {
        "accuracy, dense  ": accuracy("dense"),
        "accuracy, 2:4 one-shot  ": accuracy("2:4 one-shot"),
        "accuracy, 2:4 one-shot, batch-norm  ": accuracy("2:4 one-shot, batch-norm re-estimated"),
        "accuracy, 2:4 after retraining": accuracy("2:4"),
        "accuracy, dense + same training": accuracy("dense + same training"),
        "latency p50, batch 1": ["0.254 ms", "0.256 ms", "+0.9 %"],
        "latency p99, batch 64": ["14.0 ms", "13.9 ms", "−0.7 %"],
        "size of the .onnx file": ["598 kB", "602 kB", "+0.6 %"],
        "peak memory, batch 64": ["31.5 MB", "31.5 MB", "+0.2 %"],
    }
    for label, expected in rows.items():
        line = next(line for line in text.splitlines() if label in line)
        found = [part.strip() for part in line.replace(label, "").split("  ") if part.strip()]
        assert found == expected
    assert "4 of 7 layers are 2:4, 98.6 % of FLOPs. 5 of 5 checks passed." in text
    assert sample().statement in " ".join(text.split())


def test_a_failed_check_is_named() -> None:
    text = printed(sample(failing=True))
    assert "4 of 5 checks passed." in text
    assert "failed: sparse.onnx against torch: largest error 0.31 at image 17, allowed 1.9e-05" in text


def test_one_seed_has_no_spread() -> None:
    text = printed(sample(seeds=1))
    assert "±" not in next(line for line in text.splitlines() if "accuracy, 2:4 after" in line)
    assert "1 seed," in text


def test_what_was_not_measured_has_no_row() -> None:
    text = printed(sample().model_copy(update={"speed": [], "memory": [], "sizes": [], "accuracy": [], "layers": []}))
    assert "latency" not in text
    assert "peak memory" not in text
    assert "0 of 0 layers" in text


def test_names_are_not_markup() -> None:
    text = printed(sample().model_copy(update={"model": "[red]m[/red]", "metric": "[bold]f1", "statement": "[link]s"}))
    for name in ("[red]m[/red]", "[bold]f1", "[link]s"):
        assert name in text


def test_colour_only_where_the_terminal_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" not in printed(sample())
    assert "\x1b[32m" in printed(sample(), force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "32m" not in printed(sample(), force_terminal=True, color_system="standard")
