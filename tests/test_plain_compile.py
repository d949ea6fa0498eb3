"""Every form of the pointwise, pooling and reduction kernels compiles without a GPU, with nothing spilled."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from twofour.jit.compiler import Compiled, compile_source
from twofour.kernels import patches, pointwise, pool, reduce
from twofour.kernels.launchable import kernel_source
from twofour.kernels.pointwise.contract import ARITY, DTYPES, MAX_INPUTS
from twofour.kernels.pool.contract import COORDINATES, ROUNDINGS
from twofour.kernels.reduce.contract import KINDS, NORMALISATIONS, REDUCTIONS

Case = tuple[str, Any, Any]
Operand = pointwise.Operand


def every_operation() -> tuple[Any, ...]:
    """A program that uses each operation once, each on the value before."""
    program = []
    for number, (op, arity) in enumerate(ARITY.items()):
        last = ("t", number - 1) if number else ("in", 0)
        program.append((op, last, ("d", "bf16")) if op == "cast" else (op, last, *(("in", 1), ("c", 0.5))[: arity - 1]))
    return tuple(program)


def pointwise_cases() -> list[Case]:
    """Every type in and out, every operation fast and exact, every width and repeat, raw copies, broadcasts, turns, 64-bit offsets."""
    row, one = (32, 1), Operand("fp16", (32, 1))
    cases: list[tuple[pointwise.Problem, pointwise.Config]] = []
    for dtype in DTYPES:
        for problem in (
            pointwise.copy((4, 32), row, dtype, row),
            pointwise.copy((4, 32), row, dtype, row, "fp16"),
            pointwise.copy((4, 32), row, "fp32", row, dtype),
        ):
            cases.append((problem, pointwise.default(problem)))
        turned = pointwise.copy((4, 64, 32), (2048, 1, 64), dtype, (2048, 32, 1))
        cases.append((turned, pointwise.Config("tiled", 1, 1)))
    mixed = pointwise.Problem(
        (4, 64, 32),
        (Operand("fp16", (2048, 1, 64)), Operand("int64", (2048, 1, 64)), Operand("bf16", (2048, 32, 1)), Operand("fp32", (0, 0, 1))),
        "bf16",
        (2048, 32, 1),
        (("add", ("in", 0), ("in", 1)), ("mul", ("t", 0), ("in", 2)), ("add", ("t", 1), ("in", 3))),
    )
    cases.append((mixed, pointwise.Config("tiled", 1, 1)))
    for out in ("fp16", "fp32"):
        problem = pointwise.Problem((4, 32), (one, one), out, row, every_operation())
        cases += [(problem, pointwise.Config(vector=v)) for v in (1, 8)]
    six = pointwise.Problem((4, 32), (one,) * MAX_INPUTS, "fp16", row, (("add", ("in", 0), ("in", 5)),))
    cases += [(six, pointwise.Config("vector", v, r)) for v in (2, 4, 8) for r in (1, 2, 4)]
    far = pointwise.copy((2, 2**20, 2**12), (2**33, 2**13, 1), "fp16", (2**32, 2**12, 1))
    cases += [(far, c) for c in pointwise.candidates(far)]
    eight = pointwise.copy((2,) * 8, tuple(3**i for i in range(8)), "fp16", tuple(2**i for i in range(8)))
    cases.append((eight, pointwise.default(eight)))
    return [("pointwise", p, c) for p, c in cases]


def pool_cases() -> list[Case]:
    """Unrolled and long windows, both kinds, all widths and types; all coordinates and roundings of a resize."""
    cases: list[Case] = []
    for dtype, kind, kernel in (
        ("fp16", "max", (3, 3)),
        ("fp16", "average", (5, 5)),
        ("fp16", "max", (13, 13)),
        ("bf16", "average", (7, 7)),
        ("fp32", "max", (3, 3)),
    ):
        problem = pool.Problem(2, 28, 28, 64, kind, kernel, (2, 2), dtype=dtype)
        cases += [("pool", problem, pool.Config(v, c)) for v, c in ((8, 1), (8, 2), (1, 1))]
    for coordinate in COORDINATES:
        problem = pool.ResizeProblem(2, 28, 28, 64, 56, 56, "linear", coordinate)
        cases.append(("resize", problem, pool.default(problem)))
    for rounding in ROUNDINGS:
        problem = pool.ResizeProblem(2, 28, 28, 64, 56, 56, "nearest", "asymmetric", rounding, dtype="fp32")
        cases.append(("resize", problem, pool.default(problem)))
    return cases


def patches_cases() -> list[Case]:
    """The blocks of real first layers, both widths, all types, both layouts, indices of 64 bits."""
    nchw, nhwc = (150528, 224, 1, 50176), (150528, 672, 3, 1)
    cases: list[Case] = []
    for block, channels in (((2, 2), 16), ((1, 1), 8), ((4, 4), 48), ((16, 16), 768), ((14, 14), 592), ((1, 2), 8)):
        for dtype, out, strides in (("fp32", "fp16", nchw), ("bf16", "bf16", nhwc)):
            problem = patches.Problem(2, 224, 224, 3, 16, 16, channels, strides, block, dtype=dtype, out_dtype=out)
            cases += [("patches", problem, config) for config in patches.candidates(problem)]
    large = patches.Problem(2**15, 224, 224, 3, 112, 112, 16, nchw, (2, 2))
    cases += [("patches", large, config) for config in patches.candidates(large)]
    return cases


def reduce_cases() -> list[Case]:
    """Every kind over rows kept by a warp, kept by a block, read again, and of odd length; every reduction over columns."""
    cases: list[Case] = []
    for kind in KINDS:
        for length in (768, 65536 * 8, 197) if kind in NORMALISATIONS else (768,):
            problem = reduce.Problem(64, length, kind, 1e-5)
            cases.append(("reduce", problem, reduce.default(problem)))
    for dtype, out in (("bf16", "fp32"), ("fp32", "bf16")):
        norm = reduce.Problem(64, 768, "layernorm", 1e-5, dtype, out, scale=True, bias=True)
        cases.append(("reduce", norm, reduce.default(norm)))
    longest = reduce.Problem(64, 16384, "layernorm", 1e-5, scale=True, bias=True)
    cases += [("reduce", longest, c) for c in reduce.candidates(longest)]
    for kind in REDUCTIONS:
        for inner, dtype in ((2048, "fp16"), (24, "fp32"), (7, "bf16")):
            problem = reduce.Problem(64, 49, kind, dtype=dtype, out_dtype=dtype, inner=inner)
            cases.append(("reduce", problem, reduce.default(problem)))
    return cases


def build(case: Case) -> Compiled:
    return compile_source(kernel_source(*case, 132))


def test_the_covering_sets_compile_clean() -> None:
    cases = pointwise_cases() + pool_cases() + reduce_cases() + patches_cases()
    with ProcessPoolExecutor(2, get_context("spawn")) as workers:
        complaints = [(case, built.complaints) for case, built in zip(cases, workers.map(build, cases), strict=True) if built.complaints]
    assert not complaints, complaints


def test_sizes_are_not_in_the_text() -> None:
    def texts(*cases: Case) -> int:
        return len({kernel_source(*case, 132).text for case in cases})

    small, large = (pointwise.copy((n, 32), (64, 1), "fp16", (32, 1)) for n in (4, 4000))
    assert texts(("pointwise", small, pointwise.Config()), ("pointwise", large, pointwise.Config())) == 1
    windows = [pool.Problem(n, 28, 30, 8 * n, "max", (3, 3)) for n in (1, 9)]
    assert texts(*(("pool", p, pool.Config()) for p in windows)) == 1
    rows = [reduce.Problem(n, 760 - 8 * n, "softmax") for n in (1, 9)]
    assert texts(*(("reduce", p, reduce.Config()) for p in rows)) == 1
