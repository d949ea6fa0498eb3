"""Every kind of kernel compiles without a GPU, with nothing spilled and no serialised wgmma in ptxas' report."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from twofour.jit.compiler import Compiled, compile_source
from twofour.kernels.gemm import Config, Epilogue, Problem, why_not
from twofour.kernels.gemm.contract import ACTIVATIONS, TILE_TOKENS, most_stages, most_tokens, shared_by_rows
from twofour.kernels.gemm.source import source

Case = tuple[Problem, Config]


def case(rows: int, tokens: int, **kw: object) -> Case:
    problem = Problem(128, 128, 128, **kw)  # type: ignore[arg-type]
    return problem, Config("tuned", rows, tokens, most_stages(problem, rows, tokens))


def covering() -> list[Case]:
    """Every sparse tile; the dense tiles the model prefers; every epilogue at its widest tile; the other dtypes; the ladder.

    Of tiles shared by rows the widest, without an epilogue and with the costliest.
    """
    cases = [case(256, t) for t in TILE_TOKENS if t <= 192] + [case(128, t) for t in (128, 192, 256)]
    cases += [case(256, t, sparse=False) for t in (64, 104, 128, 176, 184, 192)] + [case(128, 256, sparse=False)]
    for activation in ACTIVATIONS:
        for epilogue in (
            Epilogue(activation, scale=True, bias=True, residual=True),
            Epilogue(activation, scale=True, bias=True, gated=True),
        ):
            cases.append(case(256, most_tokens(epilogue), epilogue=epilogue))
    for rows, tokens in ((256, 104), (256, 128), (128, 160)):
        problem = Problem(128, 128, 128, dtype="fp16", out_dtype="fp16")
        cases.append((problem, Config("tuned", rows, tokens, most_stages(problem, rows, tokens, 2), buffers=2)))
    residual = Epilogue("gelu", scale=True, bias=True, residual=True)
    cases += [case(256, most_tokens(residual, "fp32"), out_dtype="fp32", epilogue=residual)]
    cases += [case(128, t, sparse=s, epilogue=replace(residual, activation="relu")) for t, s in ((256, True), (128, False))]
    cases += [case(256, 192, dtype="fp16", out_dtype=out) for out in ("fp16", "fp32")]
    cases += [case(256, 184, dtype="fp16", out_dtype="fp32", epilogue=Epilogue("gelu", scale=True, bias=True))]
    by_rows = [Problem(128, 128, 128), Problem(128, 128, 128, epilogue=residual), Problem(128, 128, 128, sparse=False)]
    by_rows += [Problem(128, 128, 128, dtype="fp16", out_dtype="fp32", epilogue=residual)]
    cases += [(problem, shared_by_rows(problem, 256)) for problem in by_rows]
    cases += [(Problem(128, 128, 128, sparse=sparse), Config(kernel)) for kernel in ("pipelined", "naive") for sparse in (True, False)]
    return cases


def build(one: Case) -> Compiled:
    return compile_source(source(*one))


def test_the_covering_set_compiles_clean() -> None:
    cases = covering()
    assert [why_not(*one) for one in cases] == [None] * len(cases)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        complaints = [(one, built.complaints) for one, built in zip(cases, pool.map(build, cases), strict=True) if built.complaints]
    assert not complaints, complaints


def test_a_serialised_wgmma_and_a_spill_are_complaints() -> None:
    clean = "ptxas . 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    report = "ptxas info : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized\n"
    report += "ptxas . 8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads\n" + clean
    assert len(Compiled(b"", report).complaints) == 2


def test_shapes_are_not_in_the_text() -> None:
    config = Config(tile_tokens=128)
    assert source(Problem(1, 8, 32), config) == source(Problem(999, 1024, 640), config)
    assert source(Problem(1, 8, 32), config) != source(Problem(1, 8, 32, dtype="fp16"), config)
