"""Grouped convolutions on a GPU against the float64 oracle (`pytest -m gpu`), every config of every shape.

A sum of `terms` products of 16-bit values rounds by 2^-24 of its running value at each step, whatever the order; the output then rounds to
16 bits, and an activation's fast form may lose 1e-5.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from twofour.builder.tactics.ways import in_dtype
from twofour.jit.cache import fill_cache
from twofour.jit.driver import num_sms
from twofour.kernels import grouped
from twofour.kernels.conv.contract import ACTIVATIONS, Epilogue, Problem
from twofour.kernels.families import footprints
from twofour.kernels.launchable import kernel_source, launchable
from twofour.oracle.conv import conv as oracle_conv

pytestmark = pytest.mark.gpu
DTYPE = {"fp16": torch.float16, "bf16": torch.bfloat16}
EPS = {"fp16": 2.0**-11, "bf16": 2.0**-8}
TINY = {"fp16": 2.0**-25, "bf16": 2.0**-126}
FAST = 1e-5
POISON, GUARD = 77.0, 64


def problem(
    batch: int, size: tuple[int, int], channels: int, depth: int, stride: int = 1, pads: Any = (1, 1, 1, 1), **more: Any
) -> Problem:
    return Problem(batch, *size, channels, channels, (3, 3), (stride, stride), pads, groups=channels // depth, **more)


def draw(elements: int, dtype: str, seed: int) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(elements, device="cuda", generator=g).to(DTYPE[dtype])


def operands_of(p: Problem) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """The operands on the GPU, and the weight as it was before it was packed."""
    depth = p.inputs // p.groups
    weight = np.random.default_rng(1).standard_normal((p.outputs, 3, 3, depth)) * (9 * depth) ** -0.5
    bits = in_dtype(weight.astype(np.float32), p.dtype)
    packed = torch.from_numpy(grouped.pack_weight(p, bits).view(np.int16)).cuda()
    found = {"x": draw(footprints("grouped", "twofour", p)["x"].elements, p.dtype, 0), "weight": packed}
    if p.epilogue.bias:
        found["bias"] = draw(p.outputs, "fp16", 2).float()
    plain = torch.from_numpy(bits.view(np.int16)).view(DTYPE[p.dtype]).double().numpy()
    return found, plain


def run(p: Problem, config: Any, operands: dict[str, torch.Tensor]) -> torch.Tensor:
    """All of D's memory with its gaps, poisoned before; the second run gives the same bits and nothing behind D is written."""
    elements = footprints("grouped", "twofour", p)["d"].elements
    call = launchable("grouped", "twofour", p, config)
    stream = torch.cuda.current_stream().cuda_stream
    results = []
    for _ in range(2):
        d = torch.full((elements + GUARD,), POISON, device="cuda", dtype=DTYPE[p.dtype])
        torch.cuda.synchronize()
        call({name: t.data_ptr() for name, t in operands.items()} | {"d": d.data_ptr()}, 0, stream)
        torch.cuda.synchronize()
        results.append(d)
    assert torch.equal(results[0].view(torch.int16), results[1].view(torch.int16)), "a second run gave other bits"
    assert (results[0][-GUARD:] == POISON).all(), "the kernel wrote behind the output"
    return results[0][:-GUARD]


def check(p: Problem, config: Any = None) -> None:
    """Compare a config, or every one of the problem's, with the oracle."""
    operands, weight = operands_of(p)
    pitch = p.x_pitch or p.inputs
    flat = torch.nn.functional.pad(operands["x"], (0, pitch - p.inputs)) if pitch > p.inputs else operands["x"]
    x = flat.view(p.batch, p.height, p.width, pitch)[..., : p.inputs].double().cpu().numpy()
    bias = operands["bias"].double().cpu().numpy() if p.epilogue.bias else None
    shape = {"strides": p.strides, "pads": p.pads, "groups": p.groups}
    exact = oracle_conv(x, weight, **shape, bias=bias, activation=p.epilogue.activation)  # type: ignore[arg-type]
    size = oracle_conv(np.abs(x), np.abs(weight), **shape, bias=None if bias is None else np.abs(bias))  # type: ignore[arg-type]
    terms = 9 * p.inputs // p.groups + 1
    smooth = p.epilogue.activation not in ("none", "relu", "relu6")
    # The steepest activation here has a slope of 1.13.
    bound = EPS[p.dtype] * np.abs(exact) + TINY[p.dtype] + 1.13 * terms * 2.0**-24 * size + smooth * FAST * (1 + np.abs(exact))
    wanted, allowed = torch.from_numpy(exact).cuda(), torch.from_numpy(bound).cuda()
    for c in grouped.every(p) if config is None else [config]:
        flat = run(p, c, operands)
        step = p.y_pitch or p.outputs
        whole = torch.nn.functional.pad(flat, (0, step - p.outputs), value=POISON) if step > p.outputs else flat
        image = whole.view(*exact.shape[:3], step)
        assert (image[..., p.outputs :] == POISON).all(), f"{c} wrote between the pixels"
        error = (image[..., : p.outputs].double() - wanted).abs()
        wrong = ~(error <= allowed)
        if wrong.any():
            at = tuple(wrong.nonzero()[0].tolist())
            raise AssertionError(
                f"{c}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {at}: off by {error[at]}, allowed {allowed[at]}"
            )


# The networks' sizes (56, 28, 14, 7), odd ones, one pixel, wider than a tile, batches that no tile divides; channels of part of a slab.
SIZES = [(1, 56, 56), (3, 28, 28), (1, 14, 14), (5, 14, 14), (1, 7, 7), (9, 7, 7), (2, 1, 1), (3, 5, 9), (2, 3, 150), (17, 6, 1)]


DEPTHS = [(64, 4), (72, 8), (128, 16), (96, 32), (128, 64)]


def sized(channels: int, depth: int, stride: int, size: tuple[int, int, int]) -> Problem:
    return problem(size[0], size[1:], channels, depth, stride, epilogue=Epilogue("relu", bias=True))


def padded(depth: int, strides: tuple[int, int], pads: Any) -> Problem:
    return replace(problem(3, (11, 10), 64, depth, pads=pads), strides=strides)


def activated(depth: int, dtype: str, activation: str) -> Problem:
    return problem(2, (9, 9), 64, depth, dtype=dtype, epilogue=Epilogue(activation, bias=activation != "silu"))


def sliced(depth: int, dtype: str) -> Problem:
    return problem(3, (9, 14), 128, depth, dtype=dtype, epilogue=Epilogue(bias=True), x_pitch=200, y_pitch=136)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Most kernels of this file, compiled by several processes; by one worker of several, for all."""
    every = [sized(*depth, stride, size) for depth in DEPTHS for stride in (1, 2) for size in SIZES]
    every += [padded(depth, strides, (1, 1, 1, 1)) for depth in (8, 32) for strides in ((1, 1), (2, 2))]
    every += [sliced(depth, dtype) for depth in (8, 16, 32, 64) for dtype in DTYPE]
    sources = [kernel_source("grouped", p, c, num_sms(0)) for p in every for c in grouped.every(p)]
    alone = [activated(depth, dtype, activation) for depth in (8, 16) for dtype in DTYPE for activation in ACTIVATIONS]
    sources += [kernel_source("grouped", p, grouped.default(p), num_sms(0)) for p in alone]
    with FileLock(tmp_path_factory.getbasetemp().parent / "compiling.lock"):
        fill_cache(sources)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("channels", "depth"), DEPTHS)
def test_every_config_of_every_size(channels: int, depth: int, stride: int, size: tuple[int, int, int]) -> None:
    check(sized(channels, depth, stride, size))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (0, 1, 1, 0), (1, 0, 0, 1), (2, 3, 4, 5)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize("depth", [8, 32])
def test_pads_and_strides(depth: int, strides: tuple[int, int], pads: tuple[int, int, int, int]) -> None:
    check(padded(depth, strides, pads))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", list(DTYPE))
@pytest.mark.parametrize("depth", [8, 16])
def test_activations_and_types(depth: int, dtype: str, activation: str) -> None:
    p = activated(depth, dtype, activation)
    check(p, grouped.default(p))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", list(DTYPE))
@pytest.mark.parametrize("depth", [8, 16, 32, 64])
def test_slices_of_channels(depth: int, dtype: str) -> None:
    check(sliced(depth, dtype))


@pytest.mark.parametrize(("size", "channels", "depth", "stride"), [(56, 256, 8, 1), (28, 512, 16, 1), (14, 1024, 32, 1), (14, 2048, 64, 2)])
def test_layers_of_a_network_by_every_config(size: int, channels: int, depth: int, stride: int) -> None:
    """Several items a thread block, every stage and buffer used many times; against torch, whose fp32 sums err as ours do."""
    p = problem(64, (size, size), channels, depth, stride, epilogue=Epilogue("relu", bias=True))
    operands, weight = operands_of(p)
    x = operands["x"].view(p.batch, size, size, channels).permute(0, 3, 1, 2).float()
    w = torch.from_numpy(weight).cuda().float().permute(0, 3, 1, 2)
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        wanted = torch.nn.functional.conv2d(x, w, operands["bias"], stride, 1, groups=p.groups).relu().permute(0, 2, 3, 1)
        size_of = torch.nn.functional.conv2d(x.abs(), w.abs(), operands["bias"].abs(), stride, 1, groups=p.groups).permute(0, 2, 3, 1)
    finally:
        torch.backends.cudnn.allow_tf32 = before
    bound = EPS[p.dtype] * wanted.abs() + TINY[p.dtype] + 2 * (9 * depth + 1) * 2.0**-24 * size_of
    for config in grouped.every(p):
        error = (run(p, config, operands).view(wanted.shape).float() - wanted).abs()
        assert bool((error <= bound).all()), f"{config}: off by {float((error - bound).max())} more than allowed"


def test_infinities_stay_in_their_block_of_channels() -> None:
    p = problem(1, (8, 8), 64, 16)
    operands, _ = operands_of(p)
    operands["x"].view(8, 8, 64)[4, 4, 20] = float("inf")
    found = run(p, grouped.default(p), operands).view(8, 8, 64).float()
    spoilt = ~torch.isfinite(found)
    assert spoilt[3:6, 3:6, 16:32].all()
    spoilt[3:6, 3:6, 16:32] = False
    assert not spoilt.any()


def test_images_beyond_32_bits() -> None:
    """The last image lies behind 2^32 bytes and 2^31 elements: it is the first one's copy, and so must its output be."""
    p = problem(172, (224, 224), 256, 8, epilogue=Epilogue("relu", bias=True))
    assert p.batch * 224 * 224 * 256 > 2**31
    operands, _ = operands_of(problem(1, (224, 224), 256, 8, epilogue=p.epilogue))
    one = operands["x"]
    operands["x"] = torch.zeros(p.batch * one.numel(), device="cuda", dtype=one.dtype)
    for image in (0, 171):
        operands["x"].view(p.batch, -1)[image] = one
    found = run(p, grouped.default(p), operands).view(p.batch, -1)
    assert torch.equal(found[0], found[171])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[170])


def test_small_launches_for_the_memory_checker() -> None:
    for depth in (8, 16, 32, 64):
        for stride in (1, 2):
            p = problem(3, (9, 7), 128, depth, stride, epilogue=Epilogue("relu", bias=True))
            check(p, grouped.default(p))
