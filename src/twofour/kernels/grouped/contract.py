"""The contract of the grouped family: 3x3 convolutions whose groups have few channels, as many out as in.

    Y[n, p, q, g d + k] = activation(sum_{r, s, c} X[n, p sh + r - top, q sw + s - left, g d + c] W[g d + k, r, s, c] + bias[g d + k])

A problem is one of the convolution family; W comes packed (`pack_weight`). Everything here is a pure function of plain values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.kernels.conv import contract as conv
from twofour.kernels.operands import DTYPE_BYTES, MAX_DIM, Footprint, check_config

Problem = conv.Problem
SLAB = 64  # channels of a thread block
LINE_BYTES = 128  # of a pixel of a slab in shared memory
TAPS = 3  # rows and columns of the kernel
UNITS = {4: 8, 8: 8, 16: 16, 32: 32, 64: 64}  # channels of a group -> channels that are multiplied with each other
ACTIVATIONS = ("none", "relu", "relu6", "sigmoid", "gelu", "gelu_tanh", "silu", "hardswish")
OUT_BUFFERS = 2
MOST_STAGES = 8
SHARED_BYTES = 228 << 10  # of a multiprocessor
BLOCK_SHARED_BYTES = 227 << 10  # the most a block may have
RESERVED_BYTES = 1 << 10  # of a block, by the system
MOST_BOX = 256  # columns or images of a box, a limit of tensor maps
MOST_BYTES = 1 << 40  # from image to image, a limit of tensor maps
MOST_CANDIDATES = 3
# Unit -> (warps that share channels, tiles of 16 pixels of each, blocks a multiprocessor): what the registers hold without spilling.
SHAPES = {
    8: ((1, 4, 2), (2, 4, 1), (1, 2, 2)),
    16: ((2, 2, 2), (1, 4, 2), (2, 4, 1), (1, 2, 3)),
    32: ((2, 4, 1), (1, 4, 2), (2, 2, 1), (1, 2, 2)),
    64: ((2, 2, 1), (1, 2, 1)),
}
MOVING_THREADS, MOVING_REGISTERS = 128, 24
MOST_REGISTERS = 240
# For the model, set by times of ResNeXt-101_32x8d's layers on one H200: bytes a clock that memory gives a multiprocessor; clocks of an
# `mma` in one of its quarters; what a step of products or of copies, whichever is shorter, adds to the longer; clocks a step waits for,
# and of a load that the stages hide between them; what a further block a multiprocessor costs a step.
BYTES_A_CLOCK = 25.9
MMA_CLOCKS = 5.9
BOTH = 0.45
STEP_CLOCKS = 137.0
LOAD_CLOCKS = 1480.0
BLOCK_CLOCKS = 67.0


@dataclass(frozen=True, order=True)
class Config:
    """One way to compute a Problem.

    Attributes:
        warps: that share their channels. tiles: of 16 pixels, a warp. images, columns: of a tile of output, its pixels side by side.
        strip: output rows of an item of work. stages: steps loaded ahead. blocks: thread blocks a multiprocessor.
    """

    warps: int = 1
    tiles: int = 4
    images: int = 1
    columns: int = 1
    strip: int = 1
    stages: int = 4
    blocks: int = 2


@dataclass(frozen=True)
class Launch:
    """Integers that follow.

    Attributes:
        grid, threads, shared_bytes: of the launch. slabs: parts of 64 channels. blocks: thread blocks of one slab.
        column_tiles, strips, items: of one slab. total: tiles of 16 pixels that are multiplied. box_columns: of X.
        box_bytes, stage_bytes: that a step loads, and from stage to stage. registers: of a multiplying thread, 0: as the others.
    """

    grid: int
    threads: int
    shared_bytes: int
    slabs: int
    blocks: int
    column_tiles: int
    strips: int
    items: int
    total: int
    box_columns: int
    box_bytes: int
    stage_bytes: int
    registers: int


def as_grouped(problem: Problem) -> Problem | None:
    """Return a convolution in this family's terms: itself where it has groups of several channels."""
    return problem if 1 < problem.groups < problem.inputs else None


def unit(problem: Problem) -> int:
    """Return how many channels are multiplied with each other: a group, or two of four."""
    return UNITS[problem.inputs // problem.groups]


def eights(unit_channels: int) -> int:
    """Return how many times eight output channels a warp has."""
    return 1 if unit_channels == 8 else 2


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _why_not_problem(p: Problem) -> str | None:
    e = p.epilogue
    depth = p.inputs // p.groups
    if p.kernel != (TAPS, TAPS) or p.dilations != (1, 1):
        return f"a kernel of {p.kernel[0]}x{p.kernel[1]} with dilations {p.dilations}, expected 3x3 with (1, 1)"
    if not set(p.strides) <= {1, 2}:
        return f"strides {p.strides}, expected 1 or 2"
    if p.outputs != p.inputs or p.groups == 1 or depth not in UNITS:
        return f"{p.groups} groups of {depth} to {p.outputs // p.groups} channels, expected groups of {', '.join(map(str, UNITS))} channels"
    if p.inputs % 8:
        return f"{p.inputs} channels, expected a multiple of 8"
    if p.sparse:
        return "a 2:4 weight, expected a dense one"
    if e.residual:
        return "the epilogue adds a residual, expected none"
    pitches = p.x_pitch or p.inputs, p.y_pitch or p.outputs
    if any(pitch % 8 for pitch in pitches):
        return f"pixels lie {pitches[0]} and {pitches[1]} elements apart, expected multiples of 8"
    image = max(p.height * p.width * pitches[0], p.out_height * p.out_width * pitches[1]) * DTYPE_BYTES[p.dtype]
    if image >= MOST_BYTES or max(p.height, p.width, *p.pads) > MAX_DIM // 4:
        return f"images of {image} bytes and {p.height}x{p.width} pixels with pads {p.pads}, expected less than 2^40 bytes and 2^29 pixels"
    if _weight_elems(p) // 8 > MAX_DIM:
        return f"{_weight_elems(p) // 8} pieces of 16 bytes of weights, expected at most {MAX_DIM}"
    return None


def _sizes(p: Problem, c: Config) -> Launch:
    """What follows without the number of multiprocessors: grid and blocks are 0."""
    channels = eights(unit(p))
    slabs, column_tiles, strips = _ceil(p.inputs, SLAB), _ceil(p.out_width, c.columns), _ceil(p.out_height, c.strip)
    items = _ceil(p.batch, c.images) * column_tiles * strips
    box_columns = (c.columns - 1) * p.strides[1] + TAPS
    box_bytes = c.images * p.strides[0] * box_columns * LINE_BYTES
    stage_bytes = _ceil(box_bytes, 1024) * 1024
    multiplying = 32 * SLAB // (8 * channels) * c.warps
    threads = multiplying + MOVING_THREADS
    # A block starts with equal registers a thread; where they do not suffice, the moving threads give theirs to the others.
    start = min(MOST_REGISTERS, 65536 // (c.blocks * threads) // 8 * 8)
    registers = min(MOST_REGISTERS, (start * threads - MOVING_REGISTERS * MOVING_THREADS) // multiplying // 8 * 8)
    registers = 0 if unit(p) == 8 or start == MOST_REGISTERS else registers
    out_bytes = 16 * c.warps * c.tiles * LINE_BYTES
    shared = c.stages * stage_bytes + OUT_BUFFERS * out_bytes + 8 * 2 * (c.stages + OUT_BUFFERS)
    # Only whether a warp has its last tile (of units of 8, its last two) is looked up while the kernel runs.
    total = max(_ceil(c.images * c.columns, 16), c.warps * (c.tiles - (2 if unit(p) == 8 else 1)) + 1)
    total = c.tiles if c.warps == 1 else total
    return Launch(0, threads, shared, slabs, 0, column_tiles, strips, items, total, box_columns, box_bytes, stage_bytes, registers)


def why_not(problem: Problem, config: Config) -> str | None:
    """Return why `config` cannot compute `problem`, or None when it can."""
    reason = _why_not_problem(problem)
    if reason is not None:
        return reason
    p, c = problem, config
    if (c.warps, c.tiles, c.blocks) not in SHAPES[unit(p)]:
        return f"{c.warps} warps of {c.tiles} tiles and {c.blocks} blocks, expected one of {SHAPES[unit(p)]}"
    if min(c.images, c.columns, c.strip) < 1 or c.columns > p.out_width or c.strip > p.out_height:
        return f"{c.images} images, {c.columns} columns and {c.strip} rows, expected from 1 to {p.batch}, {p.out_width} and {p.out_height}"
    if c.images > min(p.batch, MOST_BOX):
        return f"{c.images} images, expected at most {min(p.batch, MOST_BOX)}"
    if c.images * c.columns > 16 * c.warps * c.tiles:
        return f"{c.images} x {c.columns} pixels, expected at most {16 * c.warps * c.tiles}"
    if not 2 <= c.stages <= MOST_STAGES:
        return f"{c.stages} stages, expected 2 to {MOST_STAGES}"
    sizes = _sizes(p, c)
    if sizes.box_columns > MOST_BOX:
        return f"{sizes.box_columns} columns of X, expected at most {MOST_BOX}"
    most = min(BLOCK_SHARED_BYTES, SHARED_BYTES // c.blocks - RESERVED_BYTES)
    if sizes.shared_bytes > most:
        return f"{sizes.shared_bytes} bytes of shared memory, expected at most {most}"
    if sizes.items * sizes.slabs > MAX_DIM // 2:
        return f"{sizes.items * sizes.slabs} items of work, expected at most {MAX_DIM // 2}"
    return None


def derive(problem: Problem, config: Config, num_sms: int = 132) -> Launch:
    """Return the Launch of `config` for `problem`.

    Raises:
        InputError: `why_not` has a reason.
    """
    check_config(problem, config, why_not(problem, config))
    sizes = _sizes(problem, config)
    blocks = _ceil(sizes.items, _waves(sizes, config, num_sms))
    return replace(sizes, grid=blocks * sizes.slabs, blocks=blocks)


def _waves(sizes: Launch, c: Config, num_sms: int) -> int:
    """Items of work of the busiest thread block."""
    return _ceil(sizes.items, max(1, num_sms * c.blocks // sizes.slabs))


def clocks(problem: Problem, config: Config, num_sms: int = 132) -> float:
    """Return the modelled clocks of a legal config: the busiest block's steps, each limited by memory or by tensor cores."""
    p, c = problem, config
    sizes = _sizes(p, c)
    resident = min(c.blocks, max(1.0, sizes.items * sizes.slabs / num_sms))
    memory = (sizes.box_bytes + c.images * c.columns * LINE_BYTES) * resident / BYTES_A_CLOCK
    products = sizes.total * SLAB // 8 * (6 if unit(p) == 8 else TAPS * TAPS * unit(p) // 16)
    tensor = products / 4 * MMA_CLOCKS * resident
    steps = c.strip + (2 if p.strides[0] == 1 else 1)
    waits = STEP_CLOCKS + LOAD_CLOCKS / c.stages + BLOCK_CLOCKS * (resident - 1)
    return _waves(sizes, c, num_sms) * steps * (max(memory, tensor) + BOTH * min(memory, tensor) + waits)


def every(problem: Problem, num_sms: int = 132) -> Sequence[Config]:
    """Return the legal configs of every shape, strips of several heights, the believed best first."""
    if _why_not_problem(problem) is not None:
        return []
    found = {c: clocks(problem, c, num_sms) for c in _all(problem, num_sms) if why_not(problem, c) is None}
    return sorted(found, key=lambda c: (found[c], c))


def _all(p: Problem, num_sms: int) -> Iterator[Config]:
    for warps, tiles, blocks in SHAPES[unit(p)]:
        most = 16 * warps * tiles
        column_tiles = _ceil(p.out_width, most)
        columns = _ceil(p.out_width, column_tiles)
        at_once = max(1, num_sms * blocks // _ceil(p.inputs, SLAB))
        for parts in (1, 2, 3, 4, 7, 14, p.out_height):
            strip = _ceil(p.out_height, min(parts, p.out_height))
            # The fewest images a tile that need no more waves than the most do.
            each = column_tiles * _ceil(p.out_height, strip)
            waves = _ceil(_ceil(p.batch, min(MOST_BOX, max(1, most // columns))) * each, at_once)
            images = _ceil(p.batch, waves * at_once // each)
            for stages in range(MOST_STAGES, 1, -1):
                config = Config(warps, tiles, images, columns, strip, stages, blocks)
                if why_not(p, config) is None:
                    yield config
                    break


def candidates(problem: Problem, num_sms: int = 132) -> Sequence[Config]:
    """Return the legal configs worth timing, the believed best first: one a shape."""
    best: dict[tuple[int, int, int], Config] = {}
    for c in every(problem, num_sms):
        best.setdefault((c.warps, c.tiles, c.blocks), c)
    return list(best.values())[:MOST_CANDIDATES]


def default(problem: Problem, num_sms: int = 132) -> Config:
    """Return the config believed fastest, without timing anything.

    Raises:
        InputError: no config can compute the problem.
    """
    found = every(problem, num_sms)
    if not found:
        raise InputError(f"our grouped kernels cannot compute {problem}: {why_not(problem, Config())}")
    return found[0]


def weight_words(unit_channels: int) -> int:
    """Return the 32-bit words of weights that a lane holds, rounded up to whole 16 bytes."""
    words = TAPS * TAPS * (1 if unit_channels == 8 else unit_channels // 16 * 2 * eights(unit_channels))
    return _ceil(words, 4) * 4


def pack_weight(problem: Problem, bits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the weight in the order in which the kernel's lanes read it, flat, zeros where there is no channel.

    W[o, r, s, c] with o = 64 slab + 8 (N warp + n) + lane / 4 and c = 16 k + 8 half + 2 (lane % 4) + e lies in word
    w = (((3 r + s) K + k) N + n) H + half at [slab, warp, w / 4, lane, w % 4, e]; units of 8 have N = K = H = 1, others N = H = 2.

    Args:
        bits: `[outputs, 3, 3, inputs / groups]`, any 16-bit type.
    """
    p, size = problem, unit(problem)
    depth, slabs, n = p.inputs // p.groups, _ceil(p.inputs, SLAB), eights(size)
    dense = np.zeros((slabs * SLAB, TAPS, TAPS, size), bits.dtype)
    for o in range(p.outputs):
        first = o % size // depth * depth
        dense[o, :, :, first : first + depth] = bits[o]
    halves = 1 if size == 8 else 2
    apart = dense.reshape(slabs, SLAB // (8 * n), n, 8, TAPS, TAPS, size // (8 * halves), halves, 4, 2)
    words = apart.transpose(0, 1, 4, 5, 6, 2, 7, 3, 8, 9).reshape(slabs, SLAB // (8 * n), -1, 32, 2)
    padded = np.zeros((*words.shape[:2], weight_words(size), 32, 2), bits.dtype)
    padded[:, :, : words.shape[2]] = words
    quads = padded.reshape(*words.shape[:2], -1, 4, 32, 2).transpose(0, 1, 2, 4, 3, 5)
    return np.ascontiguousarray(quads).reshape(-1)


def footprints(problem: Problem) -> dict[str, Footprint]:
    """Return what a launch touches: `x`, the packed `weight`, `d`, and `bias` where it is added."""
    return {**conv.footprints(problem), "weight": Footprint(problem.dtype, _weight_elems(problem))}


def _weight_elems(p: Problem) -> int:
    """Elements of the packed weight."""
    return _ceil(p.inputs, SLAB) * SLAB // (8 * eights(unit(p))) * weight_words(unit(p)) * 64
