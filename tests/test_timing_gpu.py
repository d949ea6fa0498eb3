"""The parts of the GPU protocol that need no GPU: medians, spreads, operand sets, refusals, and what rows become when kernels change."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from twofour.builder.tactics.gemm import Choice, Tactic, _recall, _remember, modelled, tactics, why_not
from twofour.errors import InputError, UnsupportedError
from twofour.kernels.gemm import Config, Epilogue, Problem
from twofour.kernels.gemm.source import sources_digest
from twofour.report import gemm as gemm_report
from twofour.report.gemm import SHAPES, current_rows, measure_gemm, parse_shape, summary, to_do
from twofour.timing.gpu import HEAT_S, MOST_SETTLE_S, PROTOCOL, SAMPLE_S, Figure, Stopwatch, figure, is_settled, refuse_unstable, sets_for

RESULTS = Path(__file__).parent.parent / "results"


def test_a_figure_is_median_and_interquartile_spread() -> None:
    found = figure([10.0, 11.0, 9.0, 10.0, 50.0, 10.0, 10.0, 10.0])
    assert (found.median_us, found.n) == (10.0, 8)
    assert found.spread == pytest.approx(0.1)
    assert "10.0 us ± 10.0 % (n=8" in str(found)


def test_an_unstable_figure_is_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"qkv was unstable: spread \d+\.\d % over 4 samples, expected at most 5 %; measure again"):
        refuse_unstable("qkv", figure([1.0, 2.0, 3.0, 4.0]))
    assert refuse_unstable("qkv", figure([1.0, 1.0, 1.0])).median_us == 1.0


def test_operand_sets_exceed_three_times_the_l2() -> None:
    assert sets_for(10, 100, most=64) * 10 >= 300
    assert sets_for(1000, 100) == 2
    assert sets_for(1, 10**9, most=8) == 8


def test_tactics_are_few_legal_and_include_the_libraries() -> None:
    problem = Problem(512, 6144, 4096)
    found = tactics(problem)
    assert len(found) <= 8
    assert {t.library for t in found} == {"twofour", "cublaslt", "cusparselt"}
    assert all(why_not(problem, t) is None for t in found)
    assert modelled(problem).tactic == found[0]
    assert "modelled, not timed" in str(modelled(problem))


TACTICS = tactics(Problem(100, 40, 64))
TIMED = {"tactic": str(TACTICS[0]), "times_us": {str(TACTICS[0]): 2.0, str(TACTICS[1]): 3.0}, "left_out": {}}


def test_a_choice_comes_back_from_the_cache_of_many_threads(tmp_path: Path) -> None:
    path, choice = tmp_path / "choices" / "a.json", Choice(TACTICS[0], {str(TACTICS[0]): 2.0, str(TACTICS[1]): 3.0}, {})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: _remember(path, choice), range(200)))
    assert _recall(path, TACTICS) == choice
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "text",
    [
        "null",
        "[" * 100_000,
        json.dumps(TIMED | {"times_us": {}}),
        json.dumps(TIMED | {"times_us": {str(TACTICS[1]): 3.0}}),
        json.dumps(TIMED | {"tactic": str(TACTICS[1])}),
        json.dumps(TIMED | {"times_us": {str(TACTICS[0]): float("nan")}}),
        json.dumps(TIMED | {"tactic": "another"}),
    ],
)
def test_a_damaged_choice_is_measured_anew(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert _recall(path, TACTICS) is None
    assert "is measured anew" in caplog.text
    assert "()" not in caplog.text


def test_a_library_that_cannot_fuse_says_so() -> None:
    problem = Problem(512, 6144, 4096, epilogue=Epilogue("gelu"))
    assert why_not(problem, Tactic("cublaslt", False)) == "cublaslt has no epilogue 'gelu', only relu and the tanh form of gelu"
    sizes = "needs inputs and outputs in multiples of 16 and tokens in multiples of 8"
    assert sizes in str(why_not(Problem(3, 16, 32), Tactic("cusparselt", True)))
    assert "got 32, 24 and 8" in str(why_not(Problem(8, 24, 32), Tactic("cusparselt", True)))
    assert (
        why_not(Problem(8, 8, 32, sparse=False), Tactic("twofour", True, Config()))
        == "the weight is dense, a 2:4 tactic needs a 2:4 weight"
    )
    assert {t.library for t in tactics(problem)} == {"twofour"}


def test_a_shape_is_three_integers() -> None:
    assert parse_shape("512x6144x4096")[1] == (512, 6144, 4096)
    with pytest.raises(InputError, match=r"--shape '512x6144' is not three positive integers tokens x outputs x inputs; write it like"):
        parse_shape("512x6144")


@pytest.mark.parametrize("rows", [3, [1], [{"name": "a", "dtype": "bf16"}]])
def test_damaged_results_are_told_before_anything_is_measured(rows: object, tmp_path: Path) -> None:
    path = tmp_path / "gemm.json"
    path.write_text(json.dumps({"schema": 1, "kind": "gemm", "rows": rows}))
    with pytest.raises(
        InputError, match=r"gemm.json: its rows are damaged, expected those written by `twofour measure gemm`; move it away"
    ):
        measure_gemm(path)


def test_results_that_cannot_be_written_are_told_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("twofour.report.gemm.Stopwatch", MagicMock)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"gemm.json' cannot be written: its folder is not writable; choose another"):
        measure_gemm(tmp_path / "new" / "gemm.json")


def test_a_data_type_asked_for_twice_is_measured_once() -> None:
    assert len(to_do(SHAPES, ("bf16", "bf16"), [])) == len(SHAPES)


def test_the_standard_shapes_are_the_23_promised() -> None:
    assert len(SHAPES) == 23


def row(tokens: int, digest: str, ours: float) -> dict[str, object]:
    times = {"ours_us": ours, "cusparselt_us": 10.0, "ours_dense_us": 10.0, "cublas_us": 15.0}
    return {"dtype": "bf16", "tokens": tokens, "sources_digest": digest, "unstable": []} | times


def test_rows_of_changed_kernels_are_stale_and_drop_out_of_the_summary() -> None:
    shaky = row(4096, sources_digest(), 2.0) | {"unstable": ["cusparselt"]}
    results = {"rows": [row(2048, sources_digest(), 8.0), row(8192, "of-another-kernel", 1.0), shaky]}
    assert [r["stale"] for r in current_rows(results)] == [False, True, False]
    assert summary(results)["sparse_over_cusparselt_2048"] == pytest.approx(1.25)


def test_a_resumed_run_measures_what_is_absent_stale_old_or_unstable() -> None:
    wanted = {"few": (16, 8, 8), "good": (2048, 8, 8), "stale": (2048, 8, 8), "old": (2048, 8, 8), "unstable": (2048, 8, 8)}
    good = {"name": "good", "dtype": "bf16", "sources_digest": sources_digest(), "protocol": PROTOCOL, "unstable": []}
    rows = [
        good,
        good | {"name": "stale", "sources_digest": "x"},
        good | {"name": "old", "protocol": 0},
        good | {"name": "unstable", "unstable": ["ours"]},
    ]
    assert to_do(wanted, ["bf16"], rows) == [("stale", "bf16"), ("old", "bf16"), ("unstable", "bf16"), ("few", "bf16")]
    both = to_do(wanted, ["bf16", "fp16"], rows)
    assert ("good", "fp16") in both
    assert both[-2:] == [("few", "bf16"), ("few", "fp16")]


class FakeGraph:
    def __init__(self, name: str) -> None:
        self.name, self.closed = name, False

    def close(self) -> None:
        self.closed = True


class FakeWatch:
    """Times graphs by a table of (burst, sustained) microseconds."""

    def __init__(self, times: dict[str, tuple[float, float]]) -> None:
        self.times, self.graphs, self.settled = times, list[FakeGraph](), list[list[str]]()

    def graph(self, name: str) -> FakeGraph:
        self.graphs.append(FakeGraph(name))
        return self.graphs[-1]

    def burst(self, graphs: list[FakeGraph], rounds: int) -> list[Figure]:
        return [figure([self.times[graph.name][0]]) for graph in graphs]

    def sustained(self, graphs: list[FakeGraph], rounds: int) -> list[Figure]:
        self.settled.append([graph.name for graph in graphs])
        return [figure([self.times[graph.name][1]]) for graph in graphs]


def chosen_of(monkeypatch: pytest.MonkeyPatch, times: dict[str, dict[str, tuple[float, float]]]) -> tuple[dict[str, str], FakeWatch]:
    """Each contender's choice where its tactics take these times; a tactic without a time cannot run."""
    watch = FakeWatch({name: both for own in times.values() for name, both in own.items()})

    def prepared(problem: Problem, tactic: str, *, overlap: bool) -> str:
        if watch.times[tactic] == (0, 0):
            raise UnsupportedError("it cannot run")
        return tactic

    monkeypatch.setattr(gemm_report, "prepare", prepared)
    bench = object.__new__(gemm_report._Bench)
    bench.watch, bench.problem, bench.notes = watch, Problem(2048, 8, 32), {}  # type: ignore[assignment]
    bench.operands = MagicMock(candidate=lambda tactic: tactic)
    monkeypatch.setattr(bench, "_tactics", lambda contender: list(times.get(contender, {})))
    return {contender: name for contender, (name, _) in bench.chosen().items()}, watch  # type: ignore[misc]


def test_the_fastest_sustained_of_those_close_in_a_burst_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"a": (10.0, 15.0), "b": (10.3, 14.0), "c": (10.7, 9.0), "d": (0, 0)}
    found, watch = chosen_of(
        monkeypatch, {"ours": ours, "cublas": {"e": (20.0, 30.0), "f": (20.1, 29.0)}, "cusparselt": {"g": (11.0, 15.0)}}
    )
    assert found == {"ours": "b", "cublas": "f", "cusparselt": "g"}
    assert watch.settled == [["g", "a", "b", "e", "f", "g"]]  # c is 7 % behind; the first does not count
    assert {graph.name for graph in watch.graphs if graph.closed} == {"a", "c", "e"}


def test_nothing_is_compared_sustained_where_a_burst_leaves_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    found, watch = chosen_of(monkeypatch, {"ours": {"a": (10.0, 1.0), "b": (11.0, 0.5)}, "cublas": {"e": (20.0, 1.0)}})
    assert found == {"ours": "a", "cublas": "e"}
    assert watch.settled == []


def test_the_gpu_is_heated_before_the_first_sustained_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = object.__new__(Stopwatch)
    watch.meter = MagicMock(clock_mhz=1000.0, power_w=600.0)
    ran: list[tuple[str, float]] = []
    monkeypatch.setattr(watch, "settle", lambda graph: None)
    monkeypatch.setattr(watch, "keep_busy", lambda graph, seconds: ran.append((graph, seconds)) or [1.0])
    figures = watch.sustained(["a", "b"])  # type: ignore[list-item]
    assert ran == [("b", HEAT_S), *((name, SAMPLE_S) for name in "abba")]
    assert [figure.n for figure in figures] == [2, 2]


def test_work_has_settled_when_three_windows_agree_or_time_is_up() -> None:
    assert not is_settled([10.0, 10.0], 1.0)
    assert not is_settled([10.0, 10.0, 10.0], 0.1)
    assert not is_settled([10.0, 10.0, 10.1], 1.0)
    assert is_settled([12.0, 10.0, 10.0, 10.05], 1.0)
    assert is_settled([12.0], MOST_SETTLE_S)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*/gemm.json")), ids=lambda p: p.parent.name)
def test_recorded_rows_are_whole(path: Path) -> None:
    results = json.loads(path.read_text())
    assert results["kind"] == "gemm"
    assert {"gpu", "driver", "power_limit_w", "cuda", "torch"} <= results["machine"].keys()
    for recorded in current_rows(results):
        for key in ("name", "tokens", "out", "in", "dtype", "ours_us", "ours_dense_us", "cublas_us", "cusparselt_us", "spread", "burst_us"):
            assert key in recorded, (recorded["name"], key)
        assert isinstance(recorded["stale"], bool)
        assert recorded["versions"]["ours"] == recorded["sources_digest"]


@pytest.mark.parametrize(
    "path", sorted(path for name in ("tests", "memcheck", "racecheck") for path in RESULTS.glob(f"*/{name}-*.json")), ids=lambda p: p.stem
)
def test_recorded_gpu_tests_name_what_they_tested(path: Path) -> None:
    results = json.loads(path.read_text())
    assert results["kind"] == "tests"
    assert len(results["sources_digest"]) == 16
    for recorded in results["rows"]:
        assert recorded["passed"] > 0
        assert recorded["failed"] == recorded["error"] == 0
