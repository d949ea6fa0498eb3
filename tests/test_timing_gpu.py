"""The parts of the GPU protocol that need no GPU: medians, spreads, operand sets, refusals, and what rows become when kernels change."""

import json
from pathlib import Path

import pytest

from twofour.builder.tactics.gemm import Tactic, modelled, tactics, why_not
from twofour.errors import InputError, UnsupportedError
from twofour.kernels.gemm import Config, Epilogue, Problem
from twofour.kernels.gemm.source import sources_digest
from twofour.report.gemm import SHAPES, current_rows, parse_shape, summary
from twofour.timing.gpu import figure, refuse_unstable, sets_for

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


def test_a_library_that_cannot_fuse_says_so() -> None:
    problem = Problem(512, 6144, 4096, epilogue=Epilogue("gelu"))
    assert why_not(problem, Tactic("cublaslt", False)) == "cublaslt is called for plain products only, this one has an epilogue"
    assert "needs inputs in multiples of 16 and tokens in multiples of 8" in str(why_not(Problem(3, 8, 32), Tactic("cusparselt", True)))
    assert (
        why_not(Problem(8, 8, 32, sparse=False), Tactic("twofour", True, Config()))
        == "the weight is dense, a 2:4 tactic needs a 2:4 weight"
    )
    assert {t.library for t in tactics(problem)} == {"twofour"}


def test_a_shape_is_three_integers() -> None:
    assert parse_shape("512x6144x4096")[1] == (512, 6144, 4096)
    with pytest.raises(InputError, match=r"--shape '512x6144' is not three positive integers tokens x outputs x inputs; write it like"):
        parse_shape("512x6144")


def test_the_standard_shapes_are_the_23_promised() -> None:
    assert len(SHAPES) == 23


def row(tokens: int, digest: str, ours: float) -> dict[str, object]:
    times = {"ours_us": ours, "cusparselt_us": 10.0, "ours_dense_us": 10.0, "cublas_us": 15.0}
    return {"dtype": "bf16", "tokens": tokens, "sources_digest": digest} | times


def test_rows_of_changed_kernels_are_stale_and_drop_out_of_the_summary() -> None:
    results = {"rows": [row(2048, sources_digest(), 8.0), row(8192, "of-another-kernel", 1.0)]}
    assert [r["stale"] for r in current_rows(results)] == [False, True]
    assert summary(results)["sparse_over_cusparselt_2048"] == pytest.approx(1.25)


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
