"""Pointwise, pooling, reduction and the library tactics on a GPU, against the float64 oracle (`pytest -m gpu`).

Tolerances follow the roundings: half a unit of the output's type, plus what fp32 arithmetic can lose in as many steps as there are.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from twofour.errors import MissingExtraError, UnsupportedError
from twofour.kernels import attention, conv, gemm, matmul, patches, pointwise, pool, reduce
from twofour.kernels.conv.cudnn import BY_GROUP, UNFUSED
from twofour.kernels.families import bias_dtype, footprints, why_not
from twofour.kernels.gemm.contract import FLAG_BYTES
from twofour.kernels.launchable import launchable
from twofour.oracle.attention import attention as oracle_attention
from twofour.oracle.conv import conv as oracle_conv
from twofour.oracle.gemm import gemm as oracle_gemm
from twofour.oracle.patches import patches as oracle_patches
from twofour.oracle.pointwise import held
from twofour.oracle.pointwise import pointwise as oracle_pointwise
from twofour.oracle.pool import pool as oracle_pool
from twofour.oracle.pool import resize as oracle_resize
from twofour.oracle.reduce import reduce as oracle_reduce

pytestmark = pytest.mark.gpu
DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "int64": torch.int64, "int32": torch.int32}
DTYPE |= {"int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool}
EPS = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 2.0**-24}
TINY = {"fp16": 2.0**-25, "bf16": 2.0**-126, "fp32": 2.0**-126}
FAST = 1e-5  # what the fast exponential and erf forms may lose where the output has 16 bits
Operand = pointwise.Operand


def draw(dtype: str, elements: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    if dtype in ("fp16", "bf16", "fp32"):
        return torch.randn(elements, device="cuda", generator=g).to(DTYPE[dtype])
    low, high = {"bool": (0, 2), "uint8": (0, 256), "int8": (-128, 128)}.get(dtype, (-1000, 1000))
    return torch.randint(low, high, (elements,), device="cuda", generator=g).to(DTYPE[dtype])


def view(flat: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    return torch.as_strided(flat, shape, strides).double().cpu().numpy()


def run(family: str, library: str, problem: Any, operands: dict[str, torch.Tensor], config: Any = None, algorithm: int = 0) -> torch.Tensor:
    """The output, poisoned before, with a guard behind it that must stay."""
    touched = footprints(family, library, problem)["d"]
    guard = 64
    d = torch.full((touched.elements + guard,), 77, device="cuda").to(DTYPE[touched.dtype])
    call = launchable(family, library, problem, config, algorithm)
    workspace = torch.zeros(call.workspace_bytes + FLAG_BYTES, dtype=torch.uint8, device="cuda")
    addresses = {name: t.data_ptr() for name, t in operands.items()} | {"d": d.data_ptr()}
    stream = torch.cuda.current_stream().cuda_stream
    torch.cuda.synchronize()
    call(addresses, workspace.data_ptr(), stream)
    torch.cuda.synchronize()
    first = d.clone()
    call(addresses, workspace.data_ptr(), stream)
    torch.cuda.synchronize()
    assert torch.equal(first.view(torch.uint8), d.view(torch.uint8)), "a second run gave other bits"
    assert (d[-guard:] == torch.full((guard,), 77, device="cuda").to(d.dtype)).all(), "the kernel wrote behind the output"
    return d[:-guard]


def close(found: np.ndarray, exact: np.ndarray, dtype: str, fp32_steps: float, magnitude: Any = None) -> None:
    """Compare within the output's rounding plus `fp32_steps` roundings of fp32 at `magnitude` (the result's own where None)."""
    size = np.abs(exact) if magnitude is None else magnitude
    bound = EPS[dtype] * np.abs(exact) + TINY[dtype] + fp32_steps * 2.0**-24 * (size + TINY[dtype])
    wrong = ~((np.abs(found - exact) <= bound) | (np.isnan(found) & np.isnan(exact)) | (found == exact))
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(wrong))
        raise AssertionError(f"{int(wrong.sum())} of {wrong.size} wrong, first at {list(at)}: got {found[at]}, expected {exact[at]}")


def check_pointwise(problem: pointwise.Problem, steps: float = 4.0, absolute: float = 0.0) -> None:
    data = [draw(o.dtype, footprints("pointwise", "twofour", problem)[f"in{i}"].elements, i) for i, o in enumerate(problem.inputs)]
    inputs = [view(t, problem.shape, o.strides) for t, o in zip(data, problem.inputs, strict=True)]
    exact = oracle_pointwise(inputs, problem.program)
    for config in pointwise.candidates(problem):
        flat = run("pointwise", "twofour", problem, {f"in{i}": t for i, t in enumerate(data)}, config)
        found = view(flat, problem.shape, problem.out_strides)
        if problem.is_raw_copy or problem.out_dtype not in EPS:
            assert np.array_equal(found, held(exact, problem.out_dtype))
        else:
            with np.errstate(all="ignore"):
                wanted = np.where(np.abs(exact) >= 65520, np.copysign(np.inf, exact), exact) if problem.out_dtype == "fp16" else exact
                close(found, wanted, problem.out_dtype, steps, np.abs(exact) + absolute * 2.0**24)


@pytest.mark.parametrize("dtype", list(DTYPE))
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 64), (2, 3, 33, 40)])
def test_copies_of_every_type(dtype: str, shape: tuple[int, ...]) -> None:
    strides = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    check_pointwise(pointwise.copy(shape, strides, dtype, strides))
    check_pointwise(pointwise.copy(shape, strides, dtype, tuple(reversed(tuple(int(np.prod(shape[:i])) for i in range(len(shape)))))[::-1]))
    for out in ("fp16", "fp32", "bf16"):
        check_pointwise(pointwise.copy(shape, strides, dtype, strides, out))


SHARP = {"div", "pow", "rsqrt", "log", "equal"}


@pytest.mark.parametrize("out", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("op", [op for op in pointwise.contract.ARITY if op != "cast"])
def test_every_operation(op: str, out: str) -> None:
    operands = (("in", 0), ("in", 1), ("in", 2))[: pointwise.contract.ARITY[op]]
    program: tuple[Any, ...] = ((op, *operands),)
    if op in ("sqrt", "rsqrt", "log", "pow"):
        program = (("abs", ("in", 0)), (op, ("t", 0), *operands[1:]))
    problem = pointwise.Problem((37, 64), (Operand("fp16", (64, 1)),) * 3, out, (64, 1), program)
    smooth = {"exp", "sigmoid", "gelu", "gelu_tanh", "silu", "erf", "softplus", "elu", "tanh", "pow"}
    check_pointwise(problem, 40.0, (FAST if out != "fp32" else 4e-7) / 40 if op in smooth else 0.0)


@pytest.mark.parametrize(
    ("shape", "strides", "out_strides"),
    [
        ((2, 70, 37), (70 * 37, 1, 70), (70 * 37, 37, 1)),  # a transpose with tails
        ((4, 196, 768), (196 * 768, 1, 196), (196 * 768, 768, 1)),
        ((2, 3, 55, 57), (3 * 55 * 57, 55 * 57, 57, 1), (3 * 55 * 57, 1, 57 * 3, 3)),  # NCHW to NHWC
        ((6, 40), (64, 1), (40, 1)),  # a slice
        ((6, 40), (40, 1), (100, 1)),  # part of a concatenation
        ((6, 40), (0, 1), (40, 1)),
        ((6, 40), (1, 0), (40, 1)),
    ],
)
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "int64", "uint8"])
def test_strided_copies(shape: tuple[int, ...], strides: tuple[int, ...], out_strides: tuple[int, ...], dtype: str) -> None:
    check_pointwise(pointwise.copy(shape, strides, dtype, out_strides))
    check_pointwise(pointwise.copy(shape, strides, dtype, out_strides, "fp16"))


def test_a_chain_with_broadcasts_of_mixed_types() -> None:
    program = (("mul", ("in", 0), ("in", 1)), ("add", ("t", 0), ("in", 2)), ("cast", ("t", 1), ("d", "fp32")), ("relu", ("t", 2)))
    inputs = (Operand("fp16", (3136 * 64, 64, 1)), Operand("fp32", (64, 0, 1)), Operand("bf16", (0, 0, 1)))
    check_pointwise(pointwise.Problem((8, 3136, 64), inputs, "fp16", (3136 * 64, 64, 1), program), 8.0, 4.0 * 2.0**-24)


def test_offsets_beyond_32_bits() -> None:
    # Two images 5 G elements apart: only the first and last rows exist for the reader, the rest is a gap.
    elements = 5 * 2**30 + 4096
    if torch.cuda.mem_get_info()[0] < 3 * elements:
        raise UnsupportedError(f"this test needs {3 * elements:,} bytes of GPU memory, a GPU of the supported kind has more; free some")
    x = torch.zeros(elements, dtype=torch.uint8, device="cuda")
    x[-4096:] = draw("uint8", 4096)
    problem = pointwise.copy((2, 4096), (5 * 2**30, 1), "uint8", (4096, 1))
    found = run("pointwise", "twofour", problem, {"in0": x}, pointwise.default(problem))
    assert torch.equal(found[4096:], x[-4096:])
    assert not found[:4096].any()


POOLS = [
    pool.Problem(3, 56, 55, 64, "max", (3, 3), (2, 2), (1, 1, 1, 1)),
    pool.Problem(2, 13, 12, 24, "average", (3, 3), (2, 2), (1, 1, 1, 1)),
    pool.Problem(2, 13, 12, 9, "average", (2, 3), (2, 2), (0, 1, 1, 1), count_include_pad=True, ceil=(1, 1)),
    pool.Problem(1, 13, 12, 8, "max", (2, 2), dilations=(3, 2), x_pitch=24, y_pitch=16),
    pool.Problem(2, 7, 7, 2048, "average", (7, 7)),
    pool.Problem(1, 1, 1, 1, "max", (1, 1)),
    pool.Problem(1, 29, 31, 20, "max", (13, 13), (1, 1), (6, 6, 6, 6)),
]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("problem", POOLS, ids=lambda p: f"{p.kind}{p.kernel}x{p.channels}")
def test_pooling(problem: pool.Problem, dtype: str) -> None:
    import dataclasses

    p = dataclasses.replace(problem, dtype=dtype)
    x = draw(dtype, footprints("pool", "twofour", p)["x"].elements)
    pitch = p.x_pitch or p.channels
    image = view(x, (p.batch, p.height, p.width, p.channels), (p.height * p.width * pitch, p.width * pitch, pitch, 1))
    exact = oracle_pool(image, p.kind, p.kernel, p.strides, p.pads, p.dilations, count_include_pad=p.count_include_pad, ceil=p.ceil)
    pitch = p.y_pitch or p.channels
    for config in pool.candidates(p):
        flat = run("pool", "twofour", p, {"x": x}, config)
        out = view(flat, exact.shape, (p.out_height * p.out_width * pitch, p.out_width * pitch, pitch, 1))
        close(out, exact, dtype, p.kernel[0] * p.kernel[1] + 2, np.abs(image).max() if p.kind == "average" else 0.0)


def test_not_a_number_passes_through_a_maximum() -> None:
    p = pool.Problem(1, 4, 4, 8, "max", (2, 2), (2, 2))
    x = draw("fp16", 128)
    x[3 * 8] = float("nan")
    assert torch.isnan(run("pool", "twofour", p, {"x": x}, pool.default(p)).view(2, 2, 8)[0, 1, 0])


@pytest.mark.parametrize("kind", ["nearest", "linear"])
@pytest.mark.parametrize("coordinate", pool.contract.COORDINATES)
@pytest.mark.parametrize("size", [(33, 33, 129, 129), (9, 7, 4, 20), (5, 5, 1, 1)])
def test_resizing(kind: str, coordinate: str, size: tuple[int, int, int, int]) -> None:
    p = pool.ResizeProblem(2, size[0], size[1], 24, size[2], size[3], kind, coordinate)
    x = draw("fp16", 2 * size[0] * size[1] * 24)
    image = x.view(2, size[0], size[1], 24).double().cpu().numpy()
    exact = oracle_resize(image, size[2], size[3], kind, coordinate, p.rounding)
    for config in pool.candidates(p):
        found = run("resize", "twofour", p, {"x": x}, config).view(exact.shape).double().cpu().numpy()
        close(found, exact, "fp16", 8.0, np.abs(image).max())


PATCHES = [
    patches.Problem(3, 224, 224, 3, 115, 115, 16, (150528, 224, 1, 50176), (2, 2), 4, 4),
    patches.Problem(2, 33, 31, 3, 35, 33, 8, (3069, 93, 3, 1), (1, 1), 1, 1, "fp16", "fp16"),
    patches.Problem(2, 224, 224, 3, 14, 14, 768, (150528, 224, 1, 50176), (16, 16), out_dtype="bf16"),
    patches.Problem(5, 17, 29, 1, 4, 8, 16, (493, 29, 1, 1), (4, 4), 3, 2, "bf16", "bf16", align=2),
    patches.Problem(2, 9, 9, 4, 20, 20, 8, (324, 9, 1, 81), (1, 2), 30, 0, "fp32", "fp32"),
]


@pytest.mark.parametrize("p", PATCHES, ids=lambda p: f"{p.block[0]}x{p.block[1]}{p.dtype}")
def test_patches(p: patches.Problem) -> None:
    x = draw(p.dtype, p.x_elements)
    image = view(x, (p.batch, p.height, p.width, p.channels), p.x_strides)
    exact = oracle_patches(image, p.out_height, p.out_width, p.out_channels, p.block, p.top, p.left)
    for config in patches.candidates(p):
        found = run("patches", "twofour", p, {"x": x}, config).view(exact.shape).double().cpu().numpy()
        close(found, exact, p.out_dtype, 0.5, np.abs(exact))


ROWS = [1, 7, 8, 33, 197, 768, 1000, 2048, 4099, 16384, 50257]


@pytest.mark.parametrize("length", ROWS)
@pytest.mark.parametrize("kind", reduce.contract.KINDS)
@pytest.mark.parametrize(("dtype", "out"), [("fp16", "fp16"), ("bf16", "fp32"), ("fp32", "fp32")])
def test_rows(kind: str, length: int, dtype: str, out: str) -> None:
    affine = kind in ("layernorm", "rmsnorm")
    p = reduce.Problem(17, length, kind, 1e-5 if affine else 0.0, dtype, out, scale=affine, bias=kind == "layernorm")
    x, scale, bias = draw(dtype, 17 * length), draw("fp32", length, 1), draw("fp32", length, 2)
    values = x.view(17, length, 1).double().cpu().numpy()
    vectors = [v.double().cpu().numpy() if on else None for v, on in ((scale, p.scale), (bias, p.bias))]
    exact = oracle_reduce(values, kind, p.eps, *vectors)
    exact = exact[..., 0] if p.is_normalisation else exact
    operands = {"x": x} | ({"scale": scale} if p.scale else {}) | ({"bias": bias} if p.bias else {})
    # Sums of `length` terms: each addition rounds by 2^-24 of the running sum, at most the sum of magnitudes.
    size: Any = np.abs(values).sum(1) / (length if kind == "mean" else 1) if kind in ("mean", "sum") else np.abs(exact) + 8.0 * affine
    for config in reduce.candidates(p):
        found = run("reduce", "twofour", p, operands, config).view(exact.shape).double().cpu().numpy()
        close(found, exact, out, 40.0 + np.sqrt(length) * (2 if kind in ("mean", "sum") else 1), size)


@pytest.mark.parametrize("kind", reduce.contract.REDUCTIONS)
@pytest.mark.parametrize(("length", "inner", "pitch"), [(49, 2048, None), (3136, 64, None), (5, 3, 7), (300, 264, 512), (1, 8, None)])
def test_columns(kind: str, length: int, inner: int, pitch: int | None) -> None:
    p = reduce.Problem(5, length, kind, 0.0, "fp16", "fp32", inner, x_pitch=pitch)
    x = draw("fp16", footprints("reduce", "twofour", p)["x"].elements)
    step = pitch or inner
    values = view(x, (5, length, inner), (length * step, step, 1))
    exact = oracle_reduce(values, kind)
    size = np.abs(values).sum(1) / (length if kind == "mean" else 1) if kind in ("mean", "sum") else np.abs(exact)
    for config in reduce.candidates(p):
        found = run("reduce", "twofour", p, {"x": x}, config).view(exact.shape).double().cpu().numpy()
        close(found, exact, "fp32", np.sqrt(length) + 8.0, size)


def test_norms_in_slices() -> None:
    p = reduce.Problem(9, 768, "layernorm", 1e-5, scale=True, bias=True, x_pitch=800, y_pitch=776)
    x, scale, bias = draw("fp16", 8 * 800 + 768), draw("fp32", 768, 1), draw("fp32", 768, 2)
    vectors = [v.double().cpu().numpy() for v in (scale, bias)]
    exact = oracle_reduce(view(x, (9, 768, 1), (800, 1, 1)), "layernorm", 1e-5, *vectors)[..., 0]
    flat = run("reduce", "twofour", p, {"x": x, "scale": scale, "bias": bias}, reduce.default(p))
    close(view(flat, (9, 768), (776, 1)), exact, "fp16", 60.0, np.abs(exact) + 8.0)


def library_result(torchs: Callable[[], torch.Tensor], exact: np.ndarray) -> float:
    """Twice the error of torch's operation of the same type: what a library's own rounding may cost."""
    return 2 * float(np.abs(torchs().double().cpu().numpy() - exact).max())


GEMMS = [
    gemm.Epilogue(),
    gemm.Epilogue("relu", bias=True),
    gemm.Epilogue("gelu_tanh", bias=True),
    gemm.Epilogue(bias=True, residual=True),
    gemm.Epilogue("relu", bias=True, residual=True),
]


@pytest.mark.parametrize("library", ["cublaslt", "cusparselt"])
@pytest.mark.parametrize("epilogue", GEMMS, ids=str)
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_products_by_libraries(library: str, epilogue: gemm.Epilogue, dtype: str) -> None:
    p = gemm.Problem(248, 144, 192, dtype, dtype, library == "cusparselt", epilogue)
    reason = why_not("gemm", library, p, None)
    if reason:
        assert "epilogue" in reason
        return
    x, w = draw(dtype, 248 * 192).view(248, 192), draw(dtype, 144 * 192, 1).view(144, 192) * 0.1
    bias, residual = draw(bias_dtype(library, dtype), 144, 2), draw(dtype, 248 * 144, 3).view(248, 144)
    operands = {"x": x}
    if library == "cusparselt":
        from twofour.kernels.gemm.cusparselt import CusparseLt

        groups = w.reshape(-1, 4)
        keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2, dim=1).indices, True)
        w = torch.where(keep, groups, 0).view(144, 192)
        compressed = CusparseLt(p).compress(w.data_ptr())
        size = footprints("gemm", library, p)["weight"].elements
        assert size > 0

        class Held:
            def data_ptr(self) -> int:
                return compressed.pointer

        operands["weight"] = Held()  # type: ignore[assignment]
    else:
        operands["weight"] = w
    extra = {}
    for name, on, t in (("bias", epilogue.bias, bias), ("residual", epilogue.residual, residual)):
        if on:
            operands[name] = t
            extra[name] = t.double().cpu().numpy()
    exact = oracle_gemm(x.double().cpu().numpy(), w.double().cpu().numpy(), sparse=False, activation=epilogue.activation, **extra)
    algorithm: Any = None if library == "cusparselt" else 0
    found = run("gemm", library, p, operands, None, algorithm).view(248, 144).double().cpu().numpy()
    plain = x.double().cpu().numpy() @ w.double().cpu().numpy().T
    # The libraries may round the product, the sum and the result.
    bound = 3 * EPS[dtype] * (np.abs(plain) + np.abs(exact) + 3.0) + library_result(lambda: x @ w.T, plain)
    assert (np.abs(found - exact) <= bound).all(), float((np.abs(found - exact) - bound).max())


@pytest.mark.parametrize(("a", "b"), [(None, None), ((100 * 72, 1, 100), (72 * 64, 1, 72)), (None, (0, 64, 1))])
def test_batched_products(a: Any, b: Any) -> None:
    p = matmul.Problem(6, 100, 64, 72, scale=0.125, a_strides=a, b_strides=b)
    sizes = footprints("matmul", "cublaslt", p)
    x, y = draw("fp16", sizes["a"].elements), draw("fp16", sizes["b"].elements, 1)
    exact = 0.125 * view(x, p.shape("a"), p.strides("a")) @ view(y, p.shape("b"), p.strides("b"))
    found = run("matmul", "cublaslt", p, {"a": x, "b": y}).view(6, 100, 64).double().cpu().numpy()
    assert (np.abs(found - exact) <= 2 * EPS["fp16"] * np.abs(exact) + 72 * 2.0**-24 * 8).all()


CONVS = [
    conv.Problem(2, 15, 13, 64, 96, (3, 3), (2, 2), (1, 1, 1, 1), epilogue=conv.Epilogue("relu", bias=True)),
    conv.Problem(2, 14, 14, 64, 128, epilogue=conv.Epilogue("relu", bias=True, residual=True)),
    conv.Problem(2, 14, 14, 64, 64, (3, 3), (1, 1), (1, 1, 1, 1), groups=4, epilogue=conv.Epilogue("relu", bias=True)),
    conv.Problem(2, 15, 13, 64, 128, (3, 3), (2, 2), (1, 1, 1, 1), groups=2, y_pitch=160, epilogue=conv.Epilogue("relu", True, True)),
    conv.Problem(2, 32, 32, 8, 64, (7, 7), (2, 2), (3, 3, 3, 3), epilogue=conv.Epilogue("relu", bias=True)),
    conv.Problem(2, 14, 14, 64, 64, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), epilogue=conv.Epilogue("silu", bias=True)),
    conv.Problem(2, 14, 14, 64, 64, (3, 3), (1, 1), (1, 1, 1, 1), groups=64, epilogue=conv.Epilogue("relu6", bias=True)),
    conv.Problem(2, 14, 14, 64, 64, (1, 1), x_pitch=128, y_pitch=96, epilogue=conv.Epilogue("hardswish", bias=True)),
]


@pytest.mark.parametrize("algorithm", [0, UNFUSED, BY_GROUP, UNFUSED | BY_GROUP])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("problem", CONVS, ids=lambda p: f"{p.kernel[0]}x{p.kernel[1]}g{p.groups}{p.epilogue.activation}")
def test_convolutions_by_cudnn(problem: conv.Problem, dtype: str, algorithm: int) -> None:
    import dataclasses

    from twofour.kernels.conv.cudnn import is_fusible, one_group

    p = dataclasses.replace(problem, dtype=dtype)
    if (not is_fusible(p) and not algorithm & UNFUSED) or (algorithm & BY_GROUP and one_group(p) is None):
        return
    sizes = footprints("conv", "cudnn", p)
    operands = {n: draw(f.dtype, f.elements, i) for i, (n, f) in enumerate(sizes.items()) if n != "d"}
    operands["weight"] *= 0.1
    n, c, h, w = p.x_strides()
    x = view(operands["x"], (p.batch, p.height, p.width, p.inputs), (n, h, w, c))
    weight = operands["weight"].view(p.outputs, *p.kernel, p.inputs // p.groups).double().cpu().numpy()
    extra = {name: operands[name].double().cpu().numpy() for name in ("bias", "residual") if name in operands}
    if "residual" in extra:
        extra["residual"] = extra["residual"].reshape(p.batch, p.out_height, p.out_width, p.outputs)
    shape = {"strides": p.strides, "pads": p.pads, "dilations": p.dilations, "groups": p.groups}
    exact = oracle_conv(x, weight, **shape, **extra, activation=p.epilogue.activation)
    plain = oracle_conv(x, weight, **shape)
    try:
        flat = run("conv", "cudnn", p, operands, None, algorithm)
    except UnsupportedError as e:
        if algorithm & UNFUSED:
            raise  # a fused graph may have no plan; the unfused one must
        print(f"not fused by this cuDNN: {p}: {e}")
        return
    n, c, h, w = p.y_strides()
    found = view(flat, exact.shape, (n, h, w, c))
    terms = p.kernel[0] * p.kernel[1] * p.inputs // p.groups
    bound = 3 * EPS[dtype] * (np.abs(plain) + np.abs(exact) + 3.0) + terms * 2.0**-24 * np.abs(plain).max()
    assert (np.abs(found - exact) <= bound).all(), float((np.abs(found - exact) - bound).max())


def test_a_cudnn_plan_survives_its_bytes() -> None:
    from twofour.kernels.conv.cudnn import CudnnConv
    from twofour.kernels.cudnn import Handle

    p = CONVS[0]
    handle = Handle(0)
    built = CudnnConv(p, 0, handle=handle)
    again = CudnnConv(p, 0, handle=handle, graph=built.serialized())
    assert again.workspace_bytes == built.workspace_bytes
    operands = {n: draw(f.dtype, f.elements, i) for i, (n, f) in enumerate(footprints("conv", "cudnn", p).items())}
    space, results = torch.zeros(max(16, built.workspace_bytes), dtype=torch.uint8, device="cuda"), []
    for call in (built, again):
        call(**{n: t.data_ptr() for n, t in operands.items()}, workspace=space.data_ptr(), stream=torch.cuda.current_stream().cuda_stream)
        torch.cuda.synchronize()
        results.append(operands["d"].clone())
    assert torch.equal(*results)
    with pytest.raises(UnsupportedError, match="refuses the stored plan"):
        CudnnConv(p, 0, handle=handle, graph=b"rubbish")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_by_cudnn(dtype: str, causal: bool) -> None:
    # Q, K and V as the three parts of one projection, as a vision transformer has them.
    line = 3 * 4 * 64
    strides = (197 * line, 64, line, 1)
    p = attention.Problem(2, 4, 197, 197, 64, 0.125, causal, dtype, strides, strides, strides)
    packed = draw(dtype, 2 * 197 * line)
    parts = [packed[i * 256 :] for i in range(3)]
    q, k, v = (view(t, p.shape("q"), strides) for t in parts)
    exact = oracle_attention(q, k, v, 0.125, causal=causal)
    flat = run("attention", "cudnn", p, dict(zip("qkv", parts, strict=True)))
    found = view(flat, p.shape("o"), p.strides("o"))
    tensors = [torch.as_strided(t, p.shape("q"), strides) for t in parts]
    torchs = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=causal, scale=0.125)
    bound = library_result(lambda: torchs, exact) + 2 * EPS[dtype] * np.abs(exact) + 1e-6
    assert (np.abs(found - exact) <= bound).all(), float((np.abs(found - exact) - bound).max())


def test_the_libraries_are_here() -> None:
    """The tests above count only where every library of the tactics is installed."""
    from twofour.kernels.cudnn import version
    from twofour.kernels.gemm.nvmath import import_bindings

    try:
        print("cudnn", version(), "cublaslt", import_bindings("cublasLt", "cublaslt").get_version())
    except MissingExtraError as e:
        raise AssertionError(str(e)) from e


def test_small_launches_for_the_memory_checker() -> None:
    # References are computed on the CPU, so that a checker sees few kernels but ours.
    for problem in (
        pointwise.copy((2, 70, 37), (70 * 37, 1, 70), "fp16", (70 * 37, 37, 1)),
        pointwise.copy((3, 33), (40, 1), "fp32", (33, 1), "fp16"),
        pointwise.Problem((5, 24), (Operand("fp16", (24, 1)), Operand("fp32", (0, 1))), "fp16", (24, 1), (("add", ("in", 0), ("in", 1)),)),
    ):
        check_pointwise(problem)
    for p in POOLS[:4]:
        run("pool", "twofour", p, {"x": draw(p.dtype, footprints("pool", "twofour", p)["x"].elements)}, pool.default(p))
    for kind in reduce.contract.KINDS:
        for q in (reduce.Problem(5, 197, kind), reduce.Problem(5, 4104, kind)):
            run("reduce", "twofour", q, {"x": draw("fp16", 5 * q.length)}, reduce.default(q))
