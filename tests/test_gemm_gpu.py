"""The matrix-product kernels on a Hopper GPU: ladder, tails, extremes, epilogues, repeatability, streams, libraries (`pytest -m gpu`).

Tolerance everywhere: twice the largest error of torch's product of the same dtype on the same inputs, plus the rounding of the output.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from twofour.builder.tactics.gemm import Tactic, choose, prepare
from twofour.errors import InputError
from twofour.kernels.gemm import Config, Epilogue, Problem, candidates
from twofour.kernels.gemm.contract import ACTIVATIONS, fitting_stages, most_stages, shared_by_rows
from twofour.kernels.gemm.launch import Gemm
from twofour.oracle import gemm as oracle
from twofour.pattern import select
from twofour.pattern.pack_sm90 import pack

pytestmark = pytest.mark.gpu
DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ACT: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
}


def tuned(problem: Problem, rows: int, tokens: int, split: bool = False, buffers: int = 1) -> Config:
    return Config("tuned", rows, tokens, most_stages(problem, rows, tokens, buffers), split, buffers)


def by_rows(problem: Problem, tokens: int, split: bool = False, buffers: int | None = None) -> Config:
    config = dataclasses.replace(shared_by_rows(problem, tokens), split=split)
    if buffers is not None:
        config = dataclasses.replace(config, buffers=buffers)
        config = dataclasses.replace(config, stages=fitting_stages(problem, config))
    return config


def prune(weight: torch.Tensor) -> torch.Tensor:
    groups = weight.view(-1, 4)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    return torch.where(keep, groups, 0).view(weight.shape)


@dataclasses.dataclass
class Case:
    """Random operands of a problem, its output poisoned, one row of poison behind it."""

    problem: Problem
    x: torch.Tensor
    weight: torch.Tensor
    extra: dict[str, torch.Tensor]
    d: torch.Tensor

    @staticmethod
    def draw(problem: Problem, seed: int = 0) -> "Case":
        g = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(problem.tokens, problem.inputs, device="cuda", generator=g).to(DTYPE[problem.dtype])
        weight = torch.randn(problem.weight_rows, problem.inputs, device="cuda", generator=g) * 0.05
        weight = (prune(weight) if problem.sparse else weight).to(DTYPE[problem.dtype])
        extra, e, out = {}, problem.epilogue, DTYPE[problem.out_dtype]
        if e.scale:
            extra["scale"] = torch.rand(problem.weight_rows, device="cuda", generator=g) + 0.5
        if e.bias:
            extra["bias"] = torch.randn(problem.weight_rows, device="cuda", generator=g)
        if e.residual:
            extra["residual"] = torch.randn(problem.tokens, problem.outputs, device="cuda", generator=g).to(out)
        d = torch.full((problem.tokens + 1, problem.outputs), float("nan"), device="cuda", dtype=out)
        return Case(problem, x, weight, extra, d)

    def epilogue(self, y: torch.Tensor) -> torch.Tensor:
        p = self.problem
        for name, apply in (("scale", torch.mul), ("bias", torch.add), ("residual", torch.add)):
            if name in self.extra:
                y = apply(y, self.extra[name].to(y.dtype))
        act = ACT[p.epilogue.activation]
        return act(y[:, : p.outputs]) * y[:, p.outputs :] if p.epilogue.gated else act(y)

    def run(self, config: Config, workspace: torch.Tensor | None = None, stream: int | None = None) -> torch.Tensor:
        p = self.problem
        kernel = Gemm(p, config)
        packed = pack(self.weight, dtype=p.dtype, sparse=p.sparse, gated=p.epilogue.gated)
        if workspace is None:
            workspace = torch.zeros(max(16, kernel.workspace_bytes), dtype=torch.uint8, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream if stream is None else stream
        pointers = {name: t.data_ptr() for name, t in self.extra.items()}
        kernel(self.x.data_ptr(), packed.data.data_ptr(), self.d.data_ptr(), workspace=workspace.data_ptr(), stream=stream, **pointers)
        torch.cuda.synchronize()
        assert torch.isnan(self.d[-1]).all(), "the kernel wrote behind the output"
        return self.d[:-1]

    def check(self, config: Config) -> None:
        found = self.run(config).double()
        exact = self.epilogue(self.x.double() @ self.weight.double().T)
        torchs = self.epilogue((self.x @ self.weight.T).float()).to(DTYPE[self.problem.out_dtype]).double()
        tolerance = 2 * (torchs - exact).abs().max() + torch.finfo(DTYPE[self.problem.out_dtype]).eps * exact.abs()
        wrong = ~((found - exact).abs() <= tolerance)
        if wrong.any():
            t, o = (int(i) for i in wrong.nonzero()[0])
            raise AssertionError(
                f"{self.problem} {config}: {int(wrong.sum())} wrong, first at [{t}, {o}]: got {found[t, o]}, expected {exact[t, o]}"
            )


@pytest.mark.parametrize(
    "config",
    [
        Config("naive"),
        Config("pipelined"),
        Config("tuned", 256, 64, 4),
        Config("tuned", 128, 128, 4),
        Config("tuned", 128, 128, 4, by_rows=True),
        Config("tuned", 128, 256, 4, buffers=3, by_rows=True),
    ],
)
def test_one_hot_weights_pick_one_input_each(config: Config) -> None:
    # Row r holds a single one at input c(r): D[t, r] must be X[t, c(r)], to the bit. Wrong metadata, swizzle or row order picks another.
    problem = Problem(70, 256, 128)
    case = Case.draw(problem)
    picks = torch.randperm(256, generator=torch.Generator().manual_seed(1)) % 128
    case.weight = F.one_hot(picks, 128).to(torch.bfloat16).cuda()
    assert torch.equal(case.run(config), case.x[:, picks.cuda()])


LADDER = [(1, 8, 32), (63, 40, 96), (129, 264, 8), (77, 136, 1024), (513, 520, 2048)]


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("shape", LADDER)
def test_every_step_of_the_ladder_is_the_oracle(shape: tuple[int, int, int], sparse: bool) -> None:
    problem = Problem(*shape, sparse=sparse)
    configs = [Config("naive"), Config("pipelined"), *candidates(problem, limit=8)]
    for config in configs:
        Case.draw(problem, seed=shape[0]).check(config)


def test_the_numpy_oracle_agrees_on_a_small_product() -> None:
    problem = Problem(33, 72, 160, dtype="fp16", out_dtype="fp32", epilogue=Epilogue("silu", scale=True, bias=True, gated=True))
    case = Case.draw(problem)
    found = case.run(tuned(problem, 256, 64)).cpu().numpy()
    extra = {name: t.cpu().numpy() for name, t in case.extra.items()}
    expected = oracle(case.x.cpu().numpy(), case.weight.cpu().numpy(), activation="silu", gated=True, **extra)
    # 160 fp32 additions of products: each rounds by at most 2^-24 of the running sum.
    bound = (
        160 * 2.0**-24 * (np.abs(case.x.cpu().numpy()).astype(np.float64) @ np.abs(case.weight.cpu().numpy()).astype(np.float64).T).max()
    )
    assert np.abs(found - expected).max() <= 16 * bound


@pytest.mark.parametrize(
    ("rows", "tile", "buffers"), [(256, 64, 1), (256, 104, 1), (256, 104, 2), (256, 176, 1), (128, 256, 1), (128, 160, 2)]
)
def test_all_token_tails(rows: int, tile: int, buffers: int) -> None:
    for tokens in [*range(1, 300, 1 if tile == 64 else 7), 300]:
        problem = Problem(tokens, 136, 192)
        Case.draw(problem, seed=tokens).check(tuned(problem, rows, tile, buffers=buffers))


@pytest.mark.parametrize(("tile", "buffers"), [(128, 4), (176, 2), (208, 1), (240, 3), (256, 3)])
def test_all_token_tails_of_tiles_shared_by_rows(tile: int, buffers: int) -> None:
    for tokens in [*range(1, 300, 7), 300]:
        problem = Problem(tokens, 136, 192)
        Case.draw(problem, seed=tokens).check(by_rows(problem, tile, buffers=buffers))


# 132 thread blocks compute two or three tiles each, so the chunks of one tile go on with the buffers where the last one's ended.
@pytest.mark.parametrize(
    ("tile", "buffers", "sparse"), [(128, 1, True), (128, 4, True), (176, 1, True), (256, 2, True), (256, 3, True), (256, 3, False)]
)
def test_many_tiles_a_block_shared_by_rows(tile: int, buffers: int, sparse: bool) -> None:
    problem = Problem(5000, 1032, 64, dtype="fp16", out_dtype="fp16", sparse=sparse, epilogue=Epilogue("relu6", bias=True))
    config = by_rows(problem, tile, buffers=buffers)
    case = Case.draw(problem)
    case.check(config)
    first = case.d[:-1].clone()
    for _ in range(5):
        case.d.fill_(float("nan"))
        assert torch.equal(case.run(config), first)


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize("kind", [{"bias": True}, {"gated": True}], ids=lambda kind: "+".join(kind))
def test_many_tiles_a_block_by_either_buffers(kind: dict[str, bool], buffers: int) -> None:
    problem = Problem(5000, 1032, 64, dtype="fp16", out_dtype="fp16", epilogue=Epilogue("relu6", **kind))
    config = tuned(problem, 256, 128, buffers=buffers)
    case = Case.draw(problem)
    case.check(config)
    first = case.d[:-1].clone()
    for _ in range(5):
        case.d.fill_(float("nan"))
        assert torch.equal(case.run(config), first)


@pytest.mark.parametrize("outputs", [8, 120, 128, 136, 248, 256, 264, 504, 512, 520])
@pytest.mark.parametrize("inputs", [8, 32, 56, 64, 72, 120, 128, 136, 320])
def test_row_and_input_edges(outputs: int, inputs: int) -> None:
    problem = Problem(100, outputs, inputs)
    if inputs % 4 == 0:
        for config in (tuned(problem, 256, 64), tuned(problem, 128, 128), by_rows(problem, 128), Config("pipelined")):
            Case.draw(problem, seed=inputs).check(config)


EPILOGUES = [{"bias": True}, {"scale": True, "bias": True, "residual": True}, {"gated": True}, {"gated": True, "scale": True, "bias": True}]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", EPILOGUES, ids=lambda kind: "+".join(kind))
def test_every_epilogue(activation: str, kind: dict[str, bool]) -> None:
    problem = Problem(333, 392, 224, epilogue=Epilogue(activation, **kind))
    shared = [] if problem.epilogue.gated else [by_rows(problem, 256)]
    for config in (tuned(problem, 256, 160), *shared, Config("naive")):
        Case.draw(problem).check(config)


@pytest.mark.parametrize("kind", EPILOGUES, ids=lambda kind: "+".join(kind))
@pytest.mark.parametrize(("dtype", "out"), [("fp16", "fp16"), ("fp16", "fp32"), ("bf16", "fp32")])
def test_epilogues_of_the_other_dtypes_and_forms(kind: dict[str, bool], dtype: str, out: str) -> None:
    problem = Problem(333, 392, 224, dtype=dtype, out_dtype=out, epilogue=Epilogue("silu", **kind))
    dense = dataclasses.replace(problem, sparse=False)
    shared = [] if problem.epilogue.gated else [by_rows(problem, 192)]
    for config in (tuned(problem, 256, 160), tuned(problem, 128, 128), *shared):
        Case.draw(problem).check(config)
    shared = [] if problem.epilogue.gated else [by_rows(dense, 192)]
    for config in (tuned(dense, 128, 128), *shared):
        Case.draw(dense).check(config)


# Tails in tokens that leave chunks and whole halves of a tile outside, rows that end inside and between the two boxes of a warpgroup, one
# tile, many tiles a thread block (5000 tokens), tiles cut along the inputs.
RESIDUALS = [(1, 8, 64), (64, 64, 64), (90, 120, 192), (177, 136, 64), (300, 200, 320), (352, 256, 64), (5000, 1032, 64), (200, 264, 2048)]


@pytest.mark.parametrize(("rows", "tile"), [(256, 64), (256, 160), (256, 176), (128, 128), (128, 256), ("64+64", 128), ("64+64", 256)])
@pytest.mark.parametrize("shape", RESIDUALS, ids=lambda shape: "x".join(map(str, shape)))
def test_residuals(shape: tuple[int, int, int], rows: int | str, tile: int) -> None:
    for dtype, sparse in (("fp16", True), ("bf16", False)):
        problem = Problem(*shape, dtype=dtype, out_dtype=dtype, sparse=sparse, epilogue=Epilogue("relu", bias=True, residual=True))
        # A dense stage is larger: three of them leave room for two buffers of 128 rows by 128 tokens.
        split = shape[2] == 2048
        if isinstance(rows, str):
            config = by_rows(problem, tile, split)
        else:
            config = tuned(problem, rows, tile if sparse or rows == 128 else min(tile, 128), split)
        case = Case.draw(problem, seed=sum(shape))
        case.check(config)
        first = case.d[:-1].clone()
        # In place: D holds the residual.
        kernel, packed = Gemm(problem, config), pack(case.weight, dtype=dtype, sparse=sparse)
        space = torch.zeros(max(16, kernel.workspace_bytes), dtype=torch.uint8, device="cuda")
        for _ in range(5):
            case.d[:-1] = case.extra["residual"]
            d, bias = case.d.data_ptr(), case.extra["bias"].data_ptr()
            stream = torch.cuda.current_stream().cuda_stream
            kernel(case.x.data_ptr(), packed.data.data_ptr(), d, bias=bias, residual=d, workspace=space.data_ptr(), stream=stream)
            torch.cuda.synchronize()
            assert torch.equal(case.d[:-1], first)


@pytest.mark.parametrize("shape", [(16, 6144, 4096), (512, 4096, 3584), (200, 264, 2048), (1, 8, 4096)])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("shared", [False, True], ids=["by_tokens", "by_rows"])
def test_split_inputs_and_their_repeats(shape: tuple[int, int, int], sparse: bool, shared: bool) -> None:
    problem = Problem(*shape, sparse=sparse)
    few = shape[0] <= 64
    config = by_rows(problem, 128 if few else 256, split=True) if shared else tuned(problem, 256, 64 if few else 128, split=True)
    assert Gemm(problem, config).plan.split_blocks > 0
    case = Case.draw(problem)
    case.check(config)
    first = case.d[:-1].clone()
    workspace = torch.zeros(Gemm(problem, config).workspace_bytes, dtype=torch.uint8, device="cuda")
    for _ in range(20):
        case.d.fill_(float("nan"))
        assert torch.equal(case.run(config, workspace), first)


def test_extreme_values_overflow_as_the_oracle() -> None:
    problem = Problem(64, 64, 64, dtype="fp16", out_dtype="fp16")
    case = Case.draw(problem)
    case.x.fill_(60000.0)
    case.weight = prune(torch.ones(64, 64, device="cuda")).half()
    assert torch.isinf(case.run(tuned(problem, 256, 64))).all()
    case.x.fill_(6e-8)
    assert torch.allclose(case.run(tuned(problem, 256, 64)).double(), case.x.double() @ case.weight.double().T, rtol=1e-3, atol=6e-8)


def test_infinities_and_nans_are_skipped_where_the_weight_is_pruned() -> None:
    problem = Problem(40, 128, 64, dtype="fp16", out_dtype="fp32")
    case = Case.draw(problem)
    case.x[3, 5], case.x[7, 9] = float("inf"), float("nan")
    expected = oracle(case.x.cpu().numpy(), case.weight.cpu().numpy())
    for config in (tuned(problem, 256, 64), Config("pipelined")):
        found = case.run(config).cpu().numpy()
        assert (np.isnan(found) == np.isnan(expected)).all()
        assert (np.isinf(found) == np.isinf(expected)).all()
        assert np.isfinite(found).sum() > found.size - 2 * 128


def test_two_streams_at_once() -> None:
    problem = Problem(512, 2048, 2048)
    config = tuned(problem, 256, 128, split=True)
    cases = [Case.draw(problem, seed) for seed in (1, 2)]
    alone = [case.run(config).clone() for case in cases]
    kernels = [Gemm(problem, config) for _ in cases]
    packed = [pack(case.weight, dtype="bf16").data for case in cases]
    spaces = [torch.zeros(kernels[0].workspace_bytes, dtype=torch.uint8, device="cuda") for _ in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    for _ in range(50):
        for i, case in enumerate(cases):
            space, stream = spaces[i].data_ptr(), streams[i].cuda_stream
            kernels[i](case.x.data_ptr(), packed[i].data_ptr(), case.d.data_ptr(), workspace=space, stream=stream)
    torch.cuda.synchronize()
    for case, expected in zip(cases, alone, strict=True):
        assert torch.equal(case.d[:-1], expected)


def test_overlapping_launches_read_what_the_one_before_wrote() -> None:
    problem = Problem(256, 512, 512)
    config = tuned(problem, 256, 64)
    first, second = Case.draw(problem, 1), Case.draw(problem, 2)
    middle = first.run(config).clone()
    second.x = middle
    expected = second.run(config).clone()
    kernel = Gemm(problem, config, overlap=True)
    weights = [pack(case.weight, dtype="bf16").data for case in (first, second)]
    stream = torch.cuda.current_stream().cuda_stream
    for _ in range(50):
        hop = torch.full_like(middle, float("nan"))
        kernel(first.x.data_ptr(), weights[0].data_ptr(), hop.data_ptr(), stream=stream)
        kernel(hop.data_ptr(), weights[1].data_ptr(), second.d.data_ptr(), stream=stream)
        torch.cuda.synchronize()
        assert torch.equal(second.d[:-1], expected)


@pytest.mark.parametrize("library", ["cublaslt", "cusparselt"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_libraries_compute_the_same(library: str, dtype: str) -> None:
    pytest.importorskip("nvmath.bindings")
    problem = Problem(256, 512, 384, dtype=dtype, out_dtype=dtype)
    case = Case.draw(problem)
    prepared = prepare(problem, Tactic(library, library == "cusparselt"))
    adopted = prepared.adopt(case.weight)
    prepared.call(case.x.data_ptr(), prepared.address(adopted), case.d.data_ptr(), torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    exact = case.x.double() @ case.weight.double().T
    torchs = (case.x @ case.weight.T).double()
    assert (case.d[:-1].double() - exact).abs().max() <= 2 * (torchs - exact).abs().max()


def test_the_choice_is_timed_once_and_remembered(tmp_path: object) -> None:
    problem = Problem(2048, 2048, 2048)
    choice = choose(problem, cache_folder=tmp_path)  # type: ignore[arg-type]
    assert choice.times_us[str(choice.tactic)] == min(choice.times_us.values())
    begin = time.perf_counter()
    assert choose(problem, cache_folder=tmp_path) == choice  # type: ignore[arg-type]
    assert time.perf_counter() - begin < 0.2


def test_a_call_costs_the_cpu_little() -> None:
    problem = Problem(16, 64, 64)
    case = Case.draw(problem)
    kernel, packed = Gemm(problem, tuned(problem, 256, 64)), pack(case.weight, dtype="bf16").data
    arguments = (case.x.data_ptr(), packed.data_ptr(), case.d.data_ptr())
    stream = torch.cuda.current_stream().cuda_stream
    times = []
    for _ in range(200):
        begin = time.perf_counter()
        kernel(*arguments, stream=stream)
        times.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
    microseconds = float(np.median(times)) * 1e6
    print(f"launch: {microseconds:.1f} us of CPU time")
    assert microseconds <= 15


def test_bad_calls_are_one_sentence() -> None:
    problem = Problem(16, 64, 2048, epilogue=Epilogue(bias=True))
    case, config = Case.draw(problem), tuned(problem, 256, 64, split=True)
    kernel = Gemm(problem, config)
    x, d = case.x.data_ptr(), case.d.data_ptr()
    with pytest.raises(InputError, match="expected 16-byte aligned device memory"):
        kernel(x, 0, d)
    with pytest.raises(InputError, match="the epilogue adds bias, expected its address, got none; pass bias="):
        kernel(x, x, d)
    with pytest.raises(InputError, match=r"this schedule needs \d+ bytes of workspace, got none; allocate it zeroed once"):
        kernel(x, x, d, bias=x)
    with pytest.raises(InputError, match="expected 16-byte aligned rows; copy it to a fresh tensor"):
        kernel(x + 2, x, d, bias=x, workspace=d)


def test_small_products_for_the_memory_checker() -> None:
    # The reference is computed on the CPU, so that a checker sees no kernels but ours and torch's element-wise ones.
    for problem in (
        Problem(70, 264, 200),
        Problem(5, 8, 2048, sparse=False),
        Problem(70, 136, 96, epilogue=Epilogue("relu", bias=True, residual=True)),
    ):
        configs = [
            tuned(problem, 256, 64),
            tuned(problem, 256, 64, split=True),
            tuned(problem, 128, 128),
            by_rows(problem, 128),
            by_rows(problem, 256, split=True),
            Config("pipelined"),
            Config("naive"),
        ]
        for config in configs:
            case = Case.draw(problem)
            found = case.run(config).cpu().double()
            on_cpu = Case(problem, case.x.cpu(), case.weight.cpu(), {name: t.cpu() for name, t in case.extra.items()}, case.d)
            exact = on_cpu.epilogue(on_cpu.x.double() @ on_cpu.weight.double().T)
            assert torch.allclose(found, exact, rtol=2.0**-7, atol=2.0**-7 * float(exact.abs().max()))


def test_pruning_here_is_the_projects() -> None:
    weight = torch.randn(16, 32)
    assert (prune(weight) != 0).numpy().tolist() == select(weight.numpy()).tolist()
