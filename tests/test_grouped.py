"""The grouped family without a GPU: its contract, its packing, its kernel emulated against the oracle and compiled clean."""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from grouped_emulation import Block, unpack_weight

from twofour.builder.lower import LayerCall
from twofour.builder.tactics.ways import bias_for, ways_of, weight_for
from twofour.errors import InputError
from twofour.jit.compiler import Compiled, compile_source
from twofour.kernels import families, grouped
from twofour.kernels.conv.contract import ACTIVATIONS, Epilogue, Problem
from twofour.kernels.grouped.contract import SHAPES, UNITS
from twofour.kernels.launchable import kernel_source
from twofour.oracle.conv import conv as oracle_conv

ONES = (1, 1, 1, 1)


def problem(batch: int, size: tuple[int, int], channels: int, depth: int, stride: int = 1, pads: Any = ONES, **more: Any) -> Problem:
    return Problem(batch, *size, channels, channels, (3, 3), (stride, stride), pads, groups=channels // depth, **more)


# Units 8 (whole and shared by two groups), 16, 32, 64; both strides; several images a tile, ragged channels, columns cut, no and uneven
# pads, an image of one pixel, strips that end behind the image, tiles without pixels.
EMULATED = [
    (problem(3, (7, 7), 72, 8), (1, 4, 2), {"images": 3, "strip": 3}),
    (problem(2, (5, 9), 64, 4, 2), (2, 4, 1), {"images": 2, "columns": 5}),
    (problem(1, (3, 50), 64, 8, pads=(0, 2, 1, 0)), (1, 2, 2), {"columns": 20}),
    (problem(5, (6, 5), 80, 16), (2, 2, 2), {"images": 4, "strip": 4}),
    (problem(2, (9, 8), 64, 16, 2, (0, 1, 1, 0)), (1, 4, 2), {"images": 2, "columns": 4}),
    (problem(1, (1, 1), 64, 32), (2, 2, 1), {}),
    (problem(3, (4, 14), 64, 32), (1, 4, 2), {"images": 3, "columns": 14}),
    (problem(2, (5, 6), 128, 64, 2), (2, 2, 1), {"images": 2, "strip": 2}),
    (problem(2, (1, 3), 128, 64, pads=(2, 2, 2, 2)), (1, 2, 1), {"images": 2, "strip": 2}),
]


@pytest.mark.parametrize(("p", "shape", "changes"), EMULATED, ids=lambda v: str(v) if isinstance(v, tuple) else None)
def test_the_kernels_lanes_compute_the_convolution(p: Problem, shape: tuple[int, int, int], changes: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    p = replace(p, epilogue=Epilogue(bias=True))
    # Small whole numbers: fp16 holds them, and every sum is exact.
    x = rng.integers(-4, 5, (p.batch, p.height, p.width, p.inputs)).astype(np.float64)
    weight = rng.integers(-4, 5, (p.outputs, 3, 3, p.inputs // p.groups)).astype(np.float16)
    bias = rng.integers(-4, 5, p.outputs).astype(np.float64)
    warps, tiles, blocks = shape
    start = grouped.Config(warps, tiles, 1, min(p.out_width, 16 * warps * tiles), p.out_height, 2, blocks)
    config = replace(start, **changes)
    launch = grouped.derive(p, config, 3)
    packed = grouped.pack_weight(p, weight)
    assert packed.size == grouped.contract.footprints(p)["weight"].elements
    y = np.full((p.batch, p.out_height, p.out_width, p.outputs), np.nan)
    for number in range(launch.grid):
        Block(p, config, launch, number).run(x, packed.astype(np.float64), bias, y)
    exact = oracle_conv(x, weight, strides=p.strides, pads=p.pads, groups=p.groups, bias=bias)
    assert np.array_equal(y, exact)


@pytest.mark.parametrize("depth", UNITS)
def test_a_packed_weight_holds_every_value_once(depth: int) -> None:
    p = problem(1, (8, 8), 192 - 8 * (depth < 16), depth)
    weight = np.arange(1, p.weight_elems + 1).astype(np.uint16).reshape(p.outputs, 3, 3, depth)
    packed = grouped.pack_weight(p, weight)
    assert np.array_equal(unpack_weight(p, packed), weight)
    assert np.count_nonzero(packed) == np.count_nonzero(weight)


GOOD = problem(2, (14, 14), 128, 32)
REFUSED = [
    (replace(GOOD, kernel=(5, 5), pads=(2, 2, 2, 2)), "a kernel of 5x5 with dilations (1, 1), expected 3x3"),
    (replace(GOOD, dilations=(2, 2), pads=(2, 2, 2, 2)), "a kernel of 3x3 with dilations (2, 2), expected 3x3"),
    (replace(GOOD, strides=(3, 3)), "strides (3, 3), expected 1 or 2"),
    (replace(GOOD, outputs=256), "4 groups of 32 to 64 channels, expected groups of 4, 8, 16, 32, 64 channels"),
    (problem(2, (14, 14), 224, 112), "2 groups of 112 to 112 channels, expected groups of 4"),
    (problem(2, (14, 14), 12, 4), "12 channels, expected a multiple of 8"),
    (replace(GOOD, sparse=True), "a 2:4 weight, expected a dense one"),
    (replace(GOOD, epilogue=Epilogue(residual=True)), "the epilogue adds a residual, expected none"),
    (replace(GOOD, y_pitch=132), "pixels lie 128 and 132 elements apart, expected multiples of 8"),
    (replace(GOOD, height=2**22, width=2**22), "images of 4503599627370496 bytes"),
    (problem(1, (1, 1), 2**26, 64), "4831838208 pieces of 16 bytes of weights, expected at most 2147483647"),
]


@pytest.mark.parametrize(("p", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_convolutions_that_it_cannot_compute_say_why(p: Problem, message: str) -> None:
    assert str(grouped.why_not(p, grouped.Config())).startswith(message)
    assert not grouped.candidates(p)
    with pytest.raises(InputError, match="our grouped kernels cannot compute"):
        grouped.default(p)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tiles": 3}, "1 warps of 3 tiles and 2 blocks, expected one of"),
        ({"columns": 15}, "2 images, 15 columns and 14 rows, expected from 1 to 2, 14 and 14"),
        ({"images": 3}, "3 images, expected at most 2"),
        ({"strip": 0}, "14 columns and 0 rows"),
        ({"stages": 9}, "9 stages, expected 2 to 8"),
    ],
)
def test_configs_that_cannot_run_say_why(change: dict[str, int], message: str) -> None:
    config = grouped.Config(1, 2, 2, 14, 14, 4, 2)
    assert grouped.why_not(GOOD, config) is None
    assert message in str(grouped.why_not(GOOD, replace(config, **change)))
    with pytest.raises(InputError, match="cannot compute"):
        grouped.derive(GOOD, replace(config, **change))


NETWORKS = [
    problem(batch, (size, size), channels, depth, stride)
    for batch in (1, 3, 64, 256)
    for size, channels, depth, stride in (
        (56, 128, 4, 1), (56, 256, 8, 1), (56, 512, 16, 2), (28, 512, 16, 1), (28, 1024, 32, 2), (14, 1024, 32, 1), (14, 2048, 64, 2),
        (7, 2048, 64, 1), (224, 64, 16, 2), (1, 64, 8, 1), (300, 48, 8, 1),
    )
]  # fmt: skip


@pytest.mark.parametrize("p", NETWORKS, ids=lambda p: f"{p.batch}x{p.height}x{p.inputs}g{p.inputs // p.groups}s{p.strides[0]}")
def test_every_layer_in_view_has_candidates_that_fill_the_gpu(p: Problem) -> None:
    found = grouped.candidates(p)
    assert found
    assert found[0] == grouped.default(p)
    for config in grouped.every(p):
        launch = grouped.derive(p, config)
        assert launch.grid == launch.slabs * launch.blocks <= 132 * config.blocks or launch.blocks == 1
        assert launch.blocks <= launch.items
        assert launch.stage_bytes % 1024 == 0
        assert (launch.threads * launch.registers if launch.registers > 168 else 0) <= 2**17
    launch = grouped.derive(p, found[0])
    if p.batch >= 64 and p.height > 1:
        assert launch.grid >= 100 * found[0].blocks or launch.grid >= 100


# ResNeXt-101_32x8d on one H200: side, channels, stride -> warps, tiles and blocks of the fastest config at batch 64 and at 256.
# None: (2, 2, 1) was faster than (2, 4, 1) with nine images and two stages, which eight images, a wave all the same, leave room for three.
FASTEST = {
    (56, 256, 1): ((2, 4, 1), (2, 4, 1)),
    (56, 512, 2): ((2, 4, 1), (2, 4, 1)),
    (28, 512, 1): ((2, 4, 1), (2, 4, 1)),
    (28, 1024, 2): ((2, 4, 1), None),
    (14, 1024, 1): ((2, 4, 1), (2, 4, 1)),
    (14, 2048, 2): ((2, 2, 1), (2, 2, 1)),
    (7, 2048, 1): ((2, 2, 1), (2, 2, 1)),
}


@pytest.mark.parametrize("layer", FASTEST)
def test_the_believed_best_is_the_measured_best(layer: tuple[int, int, int]) -> None:
    size, channels, stride = layer
    for batch, fastest in zip((64, 256), FASTEST[layer], strict=True):
        found = grouped.candidates(problem(batch, (size, size), channels, channels // 32, stride))
        assert len(found) <= 3
        assert (found[0].warps, found[0].tiles, found[0].blocks) == (fastest or (2, 4, 1))
        assert found[0].strip == -(-size // stride)


def test_a_tile_has_no_more_images_than_the_waves_need() -> None:
    p = problem(256, (14, 14), 1024, 32)
    (found,) = (c for c in grouped.candidates(p) if (c.warps, c.tiles, c.blocks) == (2, 4, 1))
    nine = replace(found, images=9)
    assert found.images == 8  # of the nine that fit
    waves = [-(-(launch := grouped.derive(p, c)).items // launch.blocks) for c in (found, nine)]
    assert waves == [4, 4]
    assert grouped.contract.clocks(p, found) < grouped.contract.clocks(p, nine)


def test_the_engine_lists_it_for_grouped_convolutions() -> None:
    p = replace(GOOD, epilogue=Epilogue("relu", bias=True))
    weight = np.random.default_rng(0).standard_normal((128, 3, 3, 32)).astype(np.float32)
    call = LayerCall("c", "Conv", "conv", p, {"x": "x", "d": "y"}, weight, np.ones(128, np.float32), why_not_24="grouped")
    ways, left = ways_of(call)
    assert {way.family for way in ways} == {"grouped"}
    assert str(ways[0]) == "twofour grouped " + " ".join(map(str, vars(grouped.default(p)).values()))
    assert set(left) == {"2:4"}
    packed, bias = weight_for(call, ways[0]), bias_for(call, ways[0])
    assert np.array_equal(packed, grouped.pack_weight(p, weight.astype(np.float16)))
    assert bias is not None
    assert bias.dtype == np.float32
    other = replace(call, problem=replace(p, epilogue=Epilogue(residual=True)))
    assert ways_of(other) == ([], {"2:4": "grouped", "twofour grouped": "the epilogue adds a residual, expected none"})
    one = replace(call, problem=replace(p, groups=1), weight=np.zeros((128, 3, 3, 128), np.float32))
    assert ways_of(one) == ([], {"2:4": "grouped"})
    assert set(families.restated("conv", replace(p, groups=128))) == {"depthwise"}


def cases() -> list[tuple[str, Problem, grouped.Config]]:
    """Every shape, in turn at both strides, in both types, with every activation, with and without bias, its tiles full and not."""
    found = []
    sizes = {8: (256, 8), 16: (512, 16), 32: (1024, 32), 64: (2048, 64)}
    for size, (channels, depth) in sizes.items():
        for shape in SHAPES[size]:
            number = len(found)
            stride, columns = 1 + number % 2, (14, 16)[number // 2 % 2]
            p = problem(64, (columns * stride, columns * stride), channels, depth, stride)
            e = Epilogue(ACTIVATIONS[number % len(ACTIVATIONS)], bias=number % 4 > 0)
            p = replace(p, epilogue=e, dtype=("fp16", "bf16")[number // 4 % 2])
            found.append(("grouped", p, next(c for c in grouped.every(p) if (c.warps, c.tiles, c.blocks) == shape)))
    return found


def build(case: tuple[str, Problem, grouped.Config]) -> Compiled:
    return compile_source(kernel_source(*case, 132))


def test_the_covering_set_compiles_clean() -> None:
    listed = cases()
    assert {p.epilogue.activation for _, p, _ in listed} == set(ACTIVATIONS)
    with ProcessPoolExecutor(2, get_context("spawn")) as workers:
        complaints = [(case, built.complaints) for case, built in zip(listed, workers.map(build, listed), strict=True) if built.complaints]
    assert not complaints, complaints


def test_sizes_are_not_in_the_text() -> None:
    texts = set()
    for batch, size, channels in ((64, 14, 1024), (256, 14, 2048), (64, 56, 1024)):
        p = problem(batch, (size, size), channels, 32)
        config = next(c for c in grouped.every(p) if (c.warps, c.tiles) == (1, 4))
        texts.add(kernel_source("grouped", p, config, 132).text)
    assert len(texts) == 1
