"""The depthwise family without a GPU: what it refuses, its packed weight, index arithmetic emulated, a covering set compiled."""

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from twofour.builder.lower import LayerCall
from twofour.builder.tactics.ways import LIBRARIES, bias_for, ways_of, weight_for
from twofour.errors import InputError
from twofour.jit.compiler import Compiled, compile_source
from twofour.kernels import conv, depthwise, families
from twofour.kernels.depthwise.contract import MOST_VALUES, as_depthwise, footprints, modelled_clocks
from twofour.kernels.depthwise.launch import _SIZES, pack_sizes
from twofour.kernels.launchable import kernel_source
from twofour.oracle.conv import conv as oracle_conv

Config, Problem = depthwise.Config, depthwise.Problem


def problem(batch: int, height: int, width: int, channels: int, kernel: tuple[int, int], stride: int = 1, **more: Any) -> Problem:
    """A depthwise convolution whose output is as large as its input where the stride is 1."""
    (kh, kw), pads = kernel, more.pop("pads", None)
    more = {"pads": ((kh - 1) // 2, (kw - 1) // 2, kh // 2, kw // 2) if pads is None else pads, "strides": (stride, stride), **more}
    return Problem(batch, height, width, channels, channels, kernel, groups=channels, **more)


BAD = [
    ({"groups": 8}, {}, "8 groups of 16 inputs, expected a group a channel"),
    ({"outputs": 32}, {}, "32 outputs of 16 inputs, expected one an input"),
    ({"inputs": 12, "outputs": 12, "groups": 12}, {}, "12 channels, expected a multiple of 8"),
    ({"kernel": (9, 3)}, {}, "a kernel of 9x3, expected at most 7x7"),
    ({"strides": (1, 5)}, {}, "strides 1 and 5, expected at most 4"),
    ({"dilations": (2, 1)}, {}, "dilations 2 and 1, expected 1"),
    ({"y_pitch": 20}, {}, "pixels lie 16, 20 elements apart, expected multiples of 8"),
    ({"x_pitch": 2**28}, {}, "expected multiples of 8 up to 268435455"),
    ({"pads": (1, 1, 2**30, 1)}, {}, "expected fewer than 1073741824 along each axis"),
    ({}, {"kernel": "run"}, "kernel 'run', expected one of walk, band"),
    ({}, {"channels": 8}, "channels 8, columns 4, rows 0, images 1: expected 2 or 4, 1 to 8, none below 0, and 1"),
    ({"strides": (1, 4), "kernel": (3, 7)}, {"columns": 8}, "8 columns read 35 of X, expected at most 32"),
    ({"kernel": (7, 7)}, {"columns": 8, "channels": 4}, "a thread holds .* values, expected at most 190"),
    ({"kernel": (7, 7)}, {"columns": 1, "channels": 4}, "leave room for 32 threads a block, expected 64"),
    ({}, {"kernel": "band", "channels": 16, "columns": 12, "rows": 7}, "expected 16 or 32, a multiple of 8, and at least 1 of both"),
    ({}, {"kernel": "band", "channels": 16, "columns": 64, "rows": 21}, "1 images of 3 row blocks of 8 tiles, expected at most 16 of all"),
    (
        {"kernel": (7, 7)},
        {"kernel": "band", "channels": 32, "columns": 8, "rows": 8, "images": 16},
        "a block needs 233424 bytes of shared memory, expected at most 232448",
    ),
    ({"strides": (2, 2)}, {"kernel": "band", "channels": 16, "columns": 8, "rows": 7}, "strides 2 and 2, expected 1 on tensor cores"),
    ({"epilogue": conv.Epilogue(residual=True)}, {"kernel": "band", "channels": 16, "columns": 8, "rows": 7}, "a residual, expected none"),
]


@pytest.mark.parametrize(("change", "config", "message"), BAD)
def test_what_the_family_refuses_is_one_sentence(change: dict[str, Any], config: dict[str, Any], message: str) -> None:
    p = dataclasses.replace(problem(2, 28, 28, 16, (3, 3)), **change)
    reason = depthwise.why_not(p, dataclasses.replace(Config(), **config))
    assert reason is not None
    with pytest.raises(InputError, match=message):
        depthwise.derive(p, dataclasses.replace(Config(), **config))
    if change and not config:
        assert depthwise.candidates(p) == []
        with pytest.raises(InputError, match=f"no kernel of the family computes .*{message}"):
            depthwise.default(p)


def test_a_convolution_is_restated_where_each_channel_is_a_group() -> None:
    p = problem(2, 28, 28, 16, (3, 3))
    assert families.restated("conv", p) == {"depthwise": p}
    assert as_depthwise(dataclasses.replace(p, groups=8)) is None
    assert families.why_not("depthwise", "twofour", p, Config()) is None
    assert "library 'cudnn' is not one of twofour" in str(families.why_not("depthwise", "cudnn", p, None))


@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (5, 2)])
def test_a_packed_weight_lies_tap_by_tap_and_comes_back(kernel: tuple[int, int]) -> None:
    p = problem(1, 8, 8, 16, kernel)
    weight = np.random.default_rng(0).standard_normal((16, *kernel, 1)).astype(np.float16)
    packed = depthwise.pack_weight(p, weight)
    assert packed.size == footprints(p)["weight"].elements
    assert packed.flags.c_contiguous
    assert packed.ravel()[(kernel[0] * kernel[1] - 1) * 16 + 5] == weight[5, -1, -1, 0]
    assert np.array_equal(depthwise.unpack_weight(p, packed), weight)


def test_a_layer_is_computed_by_these_kernels_alone_where_only_ours_may() -> None:
    p = problem(2, 14, 14, 16, (3, 3), dtype="bf16", epilogue=conv.Epilogue("relu6", bias=True))
    weight, bias = np.arange(144, dtype=np.float32).reshape(16, 3, 3, 1), np.arange(16, dtype=np.float32)
    call = LayerCall("c", "Conv", "conv", p, {"x": "x", "d": "y"}, weight, bias, why_not_24="depthwise convolution")
    ways, left = ways_of(call, libraries=LIBRARIES["ours"])
    assert [way.config for way in ways] == list(depthwise.candidates(p))
    assert {(way.family, way.library, way.after) for way in ways} == {("depthwise", "twofour", None)}
    assert left == {"2:4": "depthwise convolution"}
    assert str(ways[0]).startswith("twofour depthwise ")
    packed = weight_for(call, ways[0])
    assert (packed.dtype, packed.shape) == (np.uint16, (3, 3, 16))
    assert np.array_equal(packed.astype(np.uint32) << 16, weight[..., 0].transpose(1, 2, 0).copy().view(np.uint32))
    assert np.array_equal(bias_for(call, ways[0]), bias)
    doubled = dataclasses.replace(call, problem=dataclasses.replace(p, outputs=32))
    assert ways_of(doubled, libraries=LIBRARIES["ours"]) == (
        [],
        {"2:4": "depthwise convolution", "twofour depthwise": "32 outputs of 16 inputs, expected one an input"},
    )


# Odd sizes, strips and chunks with tails, strides beyond the kernel, uneven pads, slices of channels, several images.
SHAPES = [
    problem(2, 5, 6, 8, (3, 3)),
    problem(1, 9, 7, 16, (3, 3), 2, pads=(0, 1, 2, 0), x_pitch=24, y_pitch=32),
    problem(3, 7, 7, 8, (7, 7)),
    problem(1, 17, 9, 24, (5, 5), pads=(2, 3, 1, 4), y_pitch=40),
    problem(2, 6, 11, 8, (1, 1), 3, pads=(0, 0, 0, 0)),
    problem(1, 12, 3, 8, (4, 2), 2, pads=(7, 0, 5, 1)),
    problem(1, 1, 1, 8, (3, 1)),
    problem(2, 16, 20, 8, (2, 7)),
]


class Memory:
    """Host operands of a launch, random; `y` counts how often each element is written."""

    def __init__(self, p: Problem) -> None:
        rng = np.random.default_rng(1)
        sizes = {name: f.elements for name, f in footprints(p).items()}
        self.p, self.x, self.weight = p, rng.standard_normal(sizes["x"]), rng.standard_normal(sizes["weight"])
        self.y, self.writes = np.zeros(sizes["d"]), np.zeros(sizes["d"], int)

    def write(self, at: int, values: np.ndarray) -> None:
        assert 0 <= at <= self.y.size - values.size
        self.y[at : at + values.size] = values
        self.writes[at : at + values.size] += 1

    def read(self, at: int, count: int) -> np.ndarray:
        assert 0 <= at <= self.x.size - count
        return self.x[at : at + count]

    def check(self) -> None:
        """Every output written once, nothing between pixels, each value the oracle's."""
        p = self.p
        pitch = p.x_pitch or p.inputs
        strides = [8 * s for s in (p.height * p.width * pitch, p.width * pitch, pitch, 1)]
        image = as_strided(self.x, (p.batch, p.height, p.width, p.inputs), strides)
        weight = depthwise.unpack_weight(p, self.weight)
        exact = oracle_conv(image, weight, strides=p.strides, pads=p.pads, groups=p.groups)
        pitch = p.y_pitch or p.outputs
        strides = [8 * s for s in (p.out_height * p.out_width * pitch, p.out_width * pitch, pitch, 1)]
        assert np.allclose(as_strided(self.y, exact.shape, strides), exact, atol=1e-12)
        assert (as_strided(self.writes, exact.shape, strides) == 1).all()
        assert self.writes.sum() == exact.size


def sizes_of(p: Problem, launch: depthwise.Launch) -> dict[str, Any]:
    """What the kernel gets, by the names of its struct."""
    names = (
        "groups x_pitch y_pitch residual_pitch height width out_height out_width channels top left rows channel_groups strips chunks batch"
    )
    numbers = _SIZES.unpack(pack_sizes(p, launch))
    found = dict(zip(names.split(), numbers, strict=False))
    return found | {"by_channel_groups": numbers[16:18], "by_strips": numbers[18:20], "by_chunks": numbers[20:22]}


def located(s: dict[str, Any], group: int) -> tuple[int, int, int, int]:
    """Channel group, strip, chunk and group of images, by the kernel's multiplications and shifts."""
    strips = group * s["by_channel_groups"][0] >> s["by_channel_groups"][1]
    chunks = strips * s["by_strips"][0] >> s["by_strips"][1]
    images = chunks * s["by_chunks"][0] >> s["by_chunks"][1]
    return group - strips * s["channel_groups"], strips - chunks * s["strips"], chunks - images * s["chunks"], images


def walk(memory: Memory, config: Config) -> None:
    """`walk` of depthwise_walk.cuh, one thread after the other."""
    p, launch = memory.p, depthwise.derive(memory.p, config)
    s, vector, wide = sizes_of(p, launch), config.channels, config.columns
    (kh, kw), (down, across) = p.kernel, p.strides
    live = -(-kh // down)
    turn, reach = live * down, (wide - 1) * across + kw
    assert launch.grid * launch.threads >= launch.groups > (launch.grid - 1) * launch.threads
    for group in range(launch.groups):
        channel_group, strip, chunk, image = located(s, group)
        channel, column, row = channel_group * vector, strip * wide, chunk * s["rows"]
        last = (min(s["rows"], s["out_height"] - row) - 1) * down
        top, left = row * down - s["top"], column * across - s["left"]
        corner = ((image * s["height"] + top) * s["width"] + left) * s["x_pitch"] + channel
        pixel = (image * s["out_height"] + row) * s["out_width"] + column
        sums = np.full((live, wide, vector), np.nan)
        for i in range(last + kh):
            u = i % turn
            inside = 0 <= top + i < s["height"]
            values = np.zeros((reach, vector))
            for j in range(reach):
                if inside and 0 <= left + j < s["width"] and j % across < kw:
                    values[j] = memory.read(corner + i * s["width"] * s["x_pitch"] + j * s["x_pitch"], vector)
            for r in range(kh):
                if (u - r + turn * kh) % down:
                    continue
                o = (u - r + turn * kh) // down % live
                if r == 0:
                    sums[o] = 0.0
                if kh > 3 and not (inside and r <= i <= last + r):
                    continue
                for t in range(kw):
                    at = (r * kw + t) * s["channels"] + channel
                    sums[o] += values[t : t + (wide - 1) * across + 1 : across] * memory.weight[at : at + vector]
            if (u + 1 + turn * kh - kh) % down == 0 and i >= kh - 1:
                o = (u + 1 + turn * kh - kh) // down % live
                for q in range(min(wide, s["out_width"] - column)):
                    memory.write((pixel + q) * s["y_pitch"] + channel, sums[o][q])
                pixel += s["out_width"]


@pytest.mark.parametrize("p", SHAPES, ids=lambda p: f"{p.kernel[0]}x{p.kernel[1]}s{p.strides[0]}")
def test_the_walk_reaches_what_the_problem_says(p: Problem) -> None:
    for config in (
        Config("walk", 2, 4, 3),
        Config("walk", 4, 2, 0) if p.kernel < (7, 7) else Config("walk", 2, 2, 0),
        Config("walk", 2, 7, 2),
    ):
        memory = Memory(p)
        walk(memory, config)
        memory.check()


def toeplitz(memory: Memory, s: dict[str, Any], channel: int, r: int) -> np.ndarray:
    """B_r of a channel from the words that the lanes hold: lane 4 j + t has k = 2 t, 2 t + 1 and 2 t + 8, 2 t + 9 of column j."""
    kw = memory.p.kernel[1]
    tap_at = lambda tap: memory.weight[(r * kw + tap) * s["channels"] + channel] if 0 <= tap < kw else 0.0  # noqa: E731
    found = np.zeros((16, 8))
    for lane in range(32):
        difference = 2 * (lane % 4) - lane // 4
        is_near = difference >= -1
        tap = difference if is_near else difference + 8
        first = 2 * (lane % 4) + (0 if is_near else 8)
        found[first : first + 2, lane // 4] = tap_at(tap), tap_at(tap + 1)
    return found


def band(memory: Memory, config: Config) -> None:
    """`band` of depthwise_band.cuh, one block after the other; a block's shared memory is pairs of numbers, NaN where nothing was put."""
    p, launch = memory.p, depthwise.derive(memory.p, config)
    s, pieces, kh = sizes_of(p, launch), config.channels, p.kernel[0]
    images, row_blocks, rows, tiles = launch.images, launch.row_blocks, launch.block_rows, launch.tiles
    lines, pairs = row_blocks * rows + kh - 1, 4 * tiles + 4
    plane, positions = images * lines * pairs, images * row_blocks * tiles
    group_words = 8 * plane + 256 // pieces
    taps_bytes = 2 * kh * p.kernel[1] * (pieces + 8)
    assert positions <= 16
    assert launch.shared_bytes == taps_bytes + 4 * pieces // 8 * group_words
    assert plane % 4 == group_words % 4 == taps_bytes % 16 == 0

    def plane_of(channel: int) -> int:
        return channel // 8 * group_words + channel % 8 * plane

    def corner(position: int) -> int:
        position = position if position < positions else 0
        return (position // tiles // row_blocks * lines + position // tiles % row_blocks * rows) * pairs + position % tiles * 4

    for block in range(launch.grid):
        channel_group, strip, chunk, group_of_images = located(s, block)
        first_channel, column, row = channel_group * pieces, strip * 8 * tiles, chunk * row_blocks * rows
        first_image, top, left = group_of_images * images, row - s["top"], column - s["left"]
        words = np.full((pieces // 8 * group_words, 2), np.nan)
        for c in range(0, pieces, 8):
            for word in range(plane):
                line, j = word // pairs, 2 * (word % pairs)
                n, h = first_image + line // lines, top + line % lines
                for half in (0, 1):
                    w, value = left + j + half, np.zeros(8)
                    in_window = j + half < 8 * tiles + p.kernel[1] - 1
                    if first_channel + c < s["channels"] and n < s["batch"] and 0 <= h < s["height"] and in_window and 0 <= w < s["width"]:
                        value = memory.read(((n * s["height"] + h) * s["width"] + w) * s["x_pitch"] + first_channel + c, 8)
                    for v in range(8):
                        words[plane_of(c + v) + word, half] = value[v]
        for c in range(min(pieces, s["channels"] - first_channel)):
            weights = [toeplitz(memory, s, first_channel + c, r) for r in range(kh)]
            sums = np.zeros((rows, 16, 8))
            for i in range(rows + kh - 1):
                starts = [plane_of(c) + corner(m) + i * pairs for m in range(16)]
                assert all(start % 4 == 0 for start in starts)
                values = np.stack([words[start : start + 8].reshape(16) for start in starts])
                for r in range(max(0, i - rows + 1), min(kh, i + 1)):
                    sums[i - r] += values @ weights[r]
            for m in range(positions):
                for o in range(rows):
                    at = plane_of(c) + corner(m) + o * pairs
                    words[at : at + 4] = sums[o, m].reshape(4, 2)
        for c in range(0, min(pieces, s["channels"] - first_channel), 8):
            for word in range(images * row_blocks * rows * 4 * tiles):
                line, j = word // (4 * tiles), 2 * (word % (4 * tiles))
                image, o = line // (row_blocks * rows), line % (row_blocks * rows)
                n, q = first_image + image, column + j
                for half in (0, 1):
                    if n < s["batch"] and row + o < s["out_height"] and q + half < s["out_width"]:
                        found = [words[plane_of(c + v) + (image * lines + o) * pairs + j // 2, half] for v in range(8)]
                        pixel = (n * s["out_height"] + row + o) * s["out_width"] + q + half
                        memory.write(pixel * s["y_pitch"] + first_channel + c, np.array(found))


@pytest.mark.parametrize("p", [p for p in SHAPES if p.strides == (1, 1)], ids=lambda p: f"{p.kernel[0]}x{p.kernel[1]}")
def test_the_band_reaches_what_the_problem_says(p: Problem) -> None:
    for config in (Config("band", 16, 16, 6), Config("band", 16, 8, 7, 2), Config("band", 32, 8, 4, 4)):
        memory = Memory(p)
        band(memory, config)
        memory.check()


LAYERS = [
    (channels, kernel, stride, side)
    for channels, kernel, stride, side in (
        *((32, 3, 1, 112), (96, 3, 2, 112), (144, 3, 1, 56), (384, 3, 1, 14), (960, 3, 1, 7)),
        *((144, 5, 2, 56), (240, 5, 1, 28), (672, 5, 1, 14), (1152, 5, 1, 7), (128, 7, 1, 56), (512, 7, 1, 14), (1024, 7, 1, 7)),
    )
]


@pytest.mark.parametrize("batch", [1, 256])
def test_candidates_are_legal_and_of_both_kernels(batch: int) -> None:
    for channels, kernel, stride, side in LAYERS:
        p = problem(batch, side, side, channels, (kernel, kernel), stride)
        found = depthwise.candidates(p)
        assert len(set(found)) == len(found) >= 3
        assert {c.kernel for c in found} == ({"walk", "band"} if stride == 1 else {"walk"})
        assert all(depthwise.why_not(p, c) is None for c in found)
        clocks = [modelled_clocks(p, c) for c in found]
        assert clocks == sorted(clocks)
        # No layer can be faster than its bytes.
        assert clocks[0] / 1750 > p.num_bytes / 4.27e6


# Of MobileNetV2, EfficientNet-B0 and ConvNeXt-B on one H200: activation, channels, kernel, stride, side -> the fastest at batch 256 and 1.
FASTEST = {
    ("relu6", 32, 3, 1, 112): (Config("walk", 2, 7, 0), None),
    ("relu6", 96, 3, 2, 112): (Config("walk", 2, 7, 28), Config("walk", 4, 4, 1)),
    ("relu6", 144, 3, 1, 56): (Config("walk", 4, 7, 28), None),
    ("relu6", 384, 3, 1, 14): (Config("walk", 4, 7, 0), Config("walk", 2, 4, 1)),
    ("relu6", 576, 3, 2, 14): (Config("walk", 4, 4, 0), Config("walk", 2, 2, 1)),
    ("relu6", 960, 3, 1, 7): (Config("walk", 2, 7, 0), Config("walk", 2, 4, 1)),
    ("silu", 144, 5, 2, 56): (Config("walk", 4, 2, 0), Config("walk", 2, 4, 1)),
    ("silu", 240, 5, 1, 28): (Config("band", 16, 32, 14, 2), None),
    ("silu", 672, 5, 1, 14): (Config("band", 32, 16, 14, 4), Config("walk", 2, 2, 1)),
    ("silu", 1152, 3, 1, 7): (Config("walk", 2, 7, 0), Config("walk", 2, 4, 1)),
    ("none", 128, 7, 1, 56): (Config("band", 32, 56, 14), Config("band", 16, 56, 4)),
    ("none", 512, 7, 1, 14): (Config("band", 16, 16, 14, 4), Config("band", 16, 16, 4)),
    ("none", 1024, 7, 1, 7): (Config("band", 32, 8, 7, 8), Config("walk", 2, 1, 1)),
}


@pytest.mark.parametrize("layer", FASTEST, ids=lambda v: " ".join(map(str, v)))
def test_the_measured_best_is_among_the_candidates(layer: tuple[str, int, int, int, int]) -> None:
    """None: a few percent faster than every candidate, which differs in its rows alone."""
    activation, channels, kernel, stride, side = layer
    for batch, fastest in zip((256, 1), FASTEST[layer], strict=True):
        p = problem(batch, side, side, channels, (kernel, kernel), stride, epilogue=conv.Epilogue(activation, bias=True))
        found = depthwise.candidates(p)
        assert len(found) <= 6
        assert fastest is None or fastest in found


def test_one_image_spreads_over_the_multiprocessors_and_many_walk_far() -> None:
    one, many = (next(c for c in depthwise.candidates(problem(n, 56, 56, 144, (3, 3))) if c.kernel == "walk") for n in (1, 256))
    assert 0 < one.rows < 8
    assert many.rows in (0, 28)
    assert depthwise.derive(problem(1, 56, 56, 144, (3, 3)), one).grid > 100


def test_64_bit_indices_begin_where_32_bits_end() -> None:
    p = problem(2**16, 112, 112, 64, (3, 3), y_pitch=72)
    assert [depthwise.derive(p, Config("walk", 2, 4, rows)).wide for rows in (0, 1)] == [False, True]


COVERING = [
    (problem(2, 56, 56, 64, (3, 3), epilogue=conv.Epilogue("relu6", bias=True)), Config("walk", 4, 7, 0)),
    (problem(2, 56, 56, 64, (3, 3), 2, dtype="bf16", epilogue=conv.Epilogue("gelu", True, True)), Config("walk", 4, 7, 0)),
    (problem(2, 56, 56, 64, (3, 3), epilogue=conv.Epilogue("gelu_tanh", True, True)), Config("walk", 2, 2, 0)),
    (problem(2, 56, 56, 64, (5, 5), 2, epilogue=conv.Epilogue("silu", bias=True)), Config("walk", 2, 7, 0)),
    (problem(2, 56, 56, 64, (7, 7), epilogue=conv.Epilogue("gelu_tanh")), Config("walk", 2, 4, 0)),
    (problem(2**16, 112, 112, 64, (1, 1), 4, epilogue=conv.Epilogue("sigmoid")), Config("walk", 2, 8, 1)),
    (problem(4, 14, 14, 64, (7, 7), epilogue=conv.Epilogue("hardswish", bias=True)), Config("band", 16, 16, 14, 4)),
    (problem(1, 28, 28, 64, (5, 5), dtype="bf16", epilogue=conv.Epilogue("relu")), Config("band", 32, 32, 28)),
]


def build(case: tuple[Problem, Config]) -> Compiled:
    return compile_source(kernel_source("depthwise", *case, 132))


def test_the_covering_set_compiles_clean() -> None:
    with ProcessPoolExecutor(2, get_context("spawn")) as workers:
        complaints = [
            (case, built.complaints) for case, built in zip(COVERING, workers.map(build, COVERING), strict=True) if built.complaints
        ]
    assert not complaints, complaints


def test_sizes_are_not_in_the_text_of_a_walk() -> None:
    made = [problem(n, 20 + n, 30, 8 * n, (3, 3), pads=(n, 1, 1, 0)) for n in (1, 9)]
    assert len({kernel_source("depthwise", p, Config("walk", 2, 4, rows), 132).text for p in made for rows in (0, 2)}) == 1
    assert depthwise.contract.values(made[0], Config("walk", 2, 4)) < MOST_VALUES
