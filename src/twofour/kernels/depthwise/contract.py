"""The contract of the depthwise family: convolutions of each channel by itself, asked for like any convolution.

    Y[n, p, q, c] = activation(sum_{r, s} X[n, p sh + r - top, q sw + s - left, c] W[r, s, c] + bias[c] + residual[n, p, q, c])

X and Y are NHWC; the weight lies tap by tap, the channels of one after the other (`pack_weight`). Accumulation in fp32. Everything here
is a pure function of plain values.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import numpy.typing as npt

from twofour.errors import InputError
from twofour.kernels.conv.contract import Problem, footprints
from twofour.kernels.operands import check_config

__all__ = ["Config", "Launch", "Problem", "as_depthwise", "candidates", "default", "derive", "footprints", "pack_weight", "why_not"]

KERNELS = ("walk", "band")
MOST_KERNEL, MOST_STRIDE = 7, 4
MOST_PITCH = 2**28 - 1  # steps from pixel to pixel in bytes are 32-bit integers
MOST_SIDE = 2**30
MOST_GRID = 2**31 - 1
MOST_TIMED = 6

# The walk.
VECTORS = (2, 4)
MOST_SPAN = 32
MOST_THREADS, LEAST_THREADS = 128, 64
MOST_HELD = 54  # taps by channels that a thread keeps in registers
MOST_VALUES = 190  # of a thread in registers, addresses apart; more of them spill
ADDRESSES = 34  # registers for everything else
STATIC_SHARED_BYTES = 48 << 10
REGISTERS = 65536  # of a multiprocessor
MOST_CHUNKS = 64

# The band.
PIECES = (16, 32)  # channels of a block
TILE = 8  # output columns of a product
POSITIONS = 16  # rows of a product
MOST_BLOCK_ROWS = 8
SHARED_BYTES = 227 << 10  # of a multiprocessor, and of a block

# What the model of `candidates` takes, set by times of networks' layers on one H200 at 1.75 GHz; clocks are those of a multiprocessor.
BYTES_A_CLOCK = 2430  # of the memory, for all multiprocessors; what is read once more comes from the L2 at no cost that shows
THIN = 1.56  # how much longer the bytes take where a block reads 16 channels of a pixel
WALK_LATENCY, BAND_LATENCY = 537, 1658  # from a load of memory to its value, of `band` with its place in shared memory
WALK_ISSUED, BAND_ISSUED = 4.0, 3.6  # instructions of warps a clock
ALONE = 1.44  # clocks of an instruction of a warp that none relieves
PRODUCT = 0.5  # clocks of a product of 16 by 8 by 16
SHARED = 0.32  # the part of the clocks of shared memory that other work does not hide
WALK_REST, BAND_REST = 0.29, 0.27  # of everything that a launch is not bound by, the part that adds to what it is bound by


@dataclass(frozen=True, order=True)
class Config:
    """One way to compute a Problem.

    Attributes:
        kernel: `walk`: a thread owns channels of a strip of columns and walks down the rows. `band`: tensor cores, stride 1.
        channels, columns, rows: of output, of a thread of `walk` (rows 0: all of an image's) or of a block of `band`.
        images: of a block of `band`; 1 for `walk`.
    """

    kernel: str = "walk"
    channels: int = 2
    columns: int = 4
    rows: int = 0
    images: int = 1


@dataclass(frozen=True)
class Launch:
    """Integers that follow.

    Attributes:
        groups: of work, a thread of `walk` or a block of `band` each: `channel_groups` by `strips` of a row by `chunks` of an image by
            groups of `images` images. rows: output rows of a chunk.
        held: whether a thread's taps lie in registers. wide: whether indices need 64 bits.
        row_blocks, block_rows, tiles: of the area of a block of `band`: `block_rows` rows in each of `row_blocks`, 8 columns in each tile.
    """

    grid: int
    threads: int
    groups: int
    channel_groups: int
    strips: int
    chunks: int
    rows: int
    images: int = 1
    held: bool = False
    wide: bool = False
    row_blocks: int = 0
    block_rows: int = 0
    tiles: int = 0
    shared_bytes: int = 0


def as_depthwise(problem: Problem) -> Problem | None:
    """Return `problem` where each input channel is a group of its own, else None."""
    return problem if problem.groups == problem.inputs > 1 else None


def why_not(problem: Problem, config: Config) -> str | None:
    """Return why `config` cannot compute `problem`, or None when it can."""
    p, c = problem, config
    if p.groups != p.inputs:
        return f"{p.groups} groups of {p.inputs} inputs, expected a group a channel"
    if p.outputs != p.inputs:
        return f"{p.outputs} outputs of {p.inputs} inputs, expected one an input"
    if p.inputs % 8:
        return f"{p.inputs} channels, expected a multiple of 8"
    if max(p.kernel) > MOST_KERNEL:
        return f"a kernel of {p.kernel[0]}x{p.kernel[1]}, expected at most {MOST_KERNEL}x{MOST_KERNEL}"
    if max(p.strides) > MOST_STRIDE:
        return f"strides {p.strides[0]} and {p.strides[1]}, expected at most {MOST_STRIDE}"
    if p.dilations != (1, 1):
        return f"dilations {p.dilations[0]} and {p.dilations[1]}, expected 1"
    pitches = [p.inputs, *(pitch for pitch in (p.x_pitch, p.y_pitch, p.residual_pitch) if pitch is not None)]
    if any(pitch % 8 or pitch > MOST_PITCH for pitch in pitches):
        return f"pixels lie {', '.join(map(str, pitches))} elements apart, expected multiples of 8 up to {MOST_PITCH}"
    if max(p.height + p.pads[0] + p.pads[2], p.width + p.pads[1] + p.pads[3], p.batch) >= MOST_SIDE:
        return f"{p.batch} images of {p.height}x{p.width} pixels with pads {p.pads}, expected fewer than {MOST_SIDE} along each axis"
    reason = _why_no_band(p, c) if c.kernel == "band" else _why_no_walk(p, c)
    if reason is None and _grid(p, c) > MOST_GRID:
        return f"{_grid(p, c)} blocks, expected at most {MOST_GRID}"
    return reason


def _why_no_walk(p: Problem, c: Config) -> str | None:
    if c.kernel not in KERNELS:
        return f"kernel {c.kernel!r}, expected one of {', '.join(KERNELS)}"
    if c.channels not in VECTORS or not 1 <= c.columns <= 8 or c.rows < 0 or c.images != 1:
        return f"channels {c.channels}, columns {c.columns}, rows {c.rows}, images {c.images}: expected 2 or 4, 1 to 8, none below 0, and 1"
    if span(p, c) > MOST_SPAN:
        return f"{c.columns} columns read {span(p, c)} of X, expected at most {MOST_SPAN}"
    if values(p, c) > MOST_VALUES:
        return f"a thread holds {values(p, c)} values, expected at most {MOST_VALUES}"
    if walk_threads(p, c) < LEAST_THREADS:
        return f"the taps of {c.channels} channels leave room for {walk_threads(p, c)} threads a block, expected {LEAST_THREADS}"
    return None


def _why_no_band(p: Problem, c: Config) -> str | None:
    if p.strides != (1, 1):
        return f"strides {p.strides[0]} and {p.strides[1]}, expected 1 on tensor cores"
    if p.epilogue.residual:
        return "a residual, expected none on tensor cores"
    if c.channels not in PIECES or c.columns < 1 or c.columns % TILE or min(c.rows, c.images) < 1:
        return (
            f"channels {c.channels}, columns {c.columns}, rows {c.rows}, images {c.images}: expected 16 or 32, a multiple of {TILE}, "
            "and at least 1 of both"
        )
    row_blocks, tiles = c.rows // block_rows(c), c.columns // TILE
    if c.images * row_blocks * tiles > POSITIONS:
        return f"{c.images} images of {row_blocks} row blocks of {tiles} tiles, expected at most {POSITIONS} of all"
    needed = band_bytes(p, c)
    return f"a block needs {needed} bytes of shared memory, expected at most {SHARED_BYTES}" if needed > SHARED_BYTES else None


def span(problem: Problem, config: Config) -> int:
    """Return the columns of X that a thread of `walk` reads."""
    return (config.columns - 1) * problem.strides[1] + problem.kernel[1]


def is_held(problem: Problem, config: Config) -> bool:
    """Return whether a thread of `walk` keeps its taps in registers."""
    return problem.kernel[0] * problem.kernel[1] * config.channels <= MOST_HELD


def values(problem: Problem, config: Config) -> int:
    """Return the registers that a thread of `walk` fills with sums, a row of X as it is and as fp32, and taps."""
    taps = problem.kernel[0] * problem.kernel[1] if is_held(problem, config) else 1
    row, live = span(problem, config), ceil_div(problem.kernel[0], problem.strides[0])
    return config.channels * (live * config.columns + row + taps + 1) + row * config.channels // 2


def walk_threads(problem: Problem, config: Config) -> int:
    """Return the threads of a block of `walk`: whole warps whose taps fit."""
    if is_held(problem, config):
        return MOST_THREADS
    taps = 4 * problem.kernel[0] * problem.kernel[1] * config.channels
    return min(MOST_THREADS, STATIC_SHARED_BYTES // taps // 32 * 32)


def block_rows(config: Config) -> int:
    """Return the rows that one row of a product of `band` computes one after the other: the most that divide a block's."""
    return next(rows for rows in range(min(MOST_BLOCK_ROWS, config.rows), 0, -1) if config.rows % rows == 0)


def band_bytes(problem: Problem, config: Config) -> int:
    """Return the shared memory of a block of `band`: taps, and a plane a channel."""
    p, c = problem, config
    plane = c.images * (c.rows + p.kernel[0] - 1) * (c.columns // 2 + 4)
    return 2 * p.kernel[0] * p.kernel[1] * (c.channels + 8) + 4 * (c.channels // 8) * (8 * plane + 256 // c.channels)


def _parts(p: Problem, c: Config) -> tuple[int, int, int, int, int]:
    """Return channel groups, strips, chunks, rows of a chunk, groups of images."""
    rows = min(c.rows or p.out_height, p.out_height) if c.kernel == "walk" else c.rows
    return ceil_div(p.inputs, c.channels), ceil_div(p.out_width, c.columns), ceil_div(p.out_height, rows), rows, ceil_div(p.batch, c.images)


def _groups(p: Problem, c: Config) -> int:
    channel_groups, strips, chunks, _, images = _parts(p, c)
    return images * chunks * strips * channel_groups


def _grid(p: Problem, c: Config) -> int:
    return _groups(p, c) if c.kernel == "band" else ceil_div(_groups(p, c), walk_threads(p, c))


def derive(problem: Problem, config: Config, num_sms: int = 132) -> Launch:
    """Return the Launch of `config` for `problem`.

    Raises:
        InputError: `why_not` has a reason.
    """
    check_config(problem, config, why_not(problem, config))
    p, c = problem, config
    grid, groups = _grid(p, c), _groups(p, c)
    channel_groups, strips, chunks, rows, _ = _parts(p, c)
    if c.kernel == "walk":
        held, wide = is_held(p, c), groups > 2**31 - 1
        return Launch(grid, walk_threads(p, c), groups, channel_groups, strips, chunks, rows, held=held, wide=wide)
    return Launch(
        grid,
        TILE * c.channels,
        groups,
        channel_groups,
        strips,
        chunks,
        rows,
        images=c.images,
        row_blocks=rows // block_rows(c),
        block_rows=block_rows(c),
        tiles=c.columns // TILE,
        shared_bytes=band_bytes(p, c),
    )


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def modelled_clocks(problem: Problem, config: Config, num_sms: int = 132) -> float:
    """Return the clocks of a launch: the longest of what it is bound by, and a part of the rest, which does not quite hide behind it."""
    is_band = config.kernel == "band"
    bounds = _band_bounds(problem, config, num_sms) if is_band else _walk_bounds(problem, config, num_sms)
    rest = BAND_REST if is_band else WALK_REST
    return (1 - rest) * max(bounds) + rest * sum(bounds)


def _finish(p: Problem) -> int:
    """Instructions behind a sum."""
    return 5 if p.epilogue.activation in ("none", "relu", "relu6") else 8


def _walk_bounds(p: Problem, c: Config, num_sms: int) -> tuple[float, ...]:
    """Clocks of memory, of instructions, and of the threads' walks one after the other."""
    rows = _parts(p, c)[3]
    row, taps, threads = span(p, c), p.kernel[0] * p.kernel[1], walk_threads(p, c)
    steps = (rows - 1) * p.strides[0] + p.kernel[0]
    # A step: products, conversion, loads with their addresses and bounds; and a share of finishing an output row.
    step = 156 + c.channels * c.columns * taps / p.strides[0] + row * (c.channels + 5)
    step += c.columns * (c.channels * _finish(p) + 5) / p.strides[0] + (0 if is_held(p, c) else taps / p.strides[0])
    begin = 290 + taps * (c.channels + 2)
    shared = 1024 if is_held(p, c) else 4 * taps * c.channels * threads + 1024
    registers = ceil_div(values(p, c) + ADDRESSES, 8) * 8
    resident = max(1, min(2048 // threads, REGISTERS // registers // threads, SHARED_BYTES // shared)) * threads // 32
    warps = ceil(_groups(p, c) / 32 / num_sms)
    issue = warps * (begin + steps * step) / WALK_ISSUED
    alone = ceil(warps / resident) * (begin + 2 * WALK_LATENCY + steps * max(WALK_LATENCY, ALONE * step))
    return p.num_bytes / BYTES_A_CLOCK, issue, alone


def _band_bounds(p: Problem, c: Config, num_sms: int) -> tuple[float, ...]:
    """Clocks of memory, of instructions, of tensor cores, of shared memory, and of the blocks one after the other."""
    images, each = c.images, block_rows(c)
    lines, pairs, groups = c.rows + p.kernel[0] - 1, c.columns // 2 + 4, c.channels // 8
    read, written = images * lines * pairs * groups / 32, images * c.rows * c.columns / 2 * groups / 32  # moves of a warp
    products = p.kernel[0] * each
    channel = products + lines + 4 * each * _finish(p)
    blocks = _grid(p, c) / num_sms
    issue = blocks * (150 + 186 * read + 42 * written + c.channels * channel) / BAND_ISSUED
    shared = SHARED * blocks * (10 * read + 10 * written + c.channels * 5 * (each + p.kernel[0]) + c.channels * 2 * each)
    resident = max(1, min(SHARED_BYTES // (band_bytes(p, c) + 1024), REGISTERS // (96 * TILE * c.channels)))
    moves = ceil(images * lines * pairs / 64 / 8)
    alone = ceil(blocks / resident) * ((3 + moves) * BAND_LATENCY + 4 * (200 + 73 * (each + p.kernel[0])))
    memory = p.num_bytes / BYTES_A_CLOCK * (THIN if c.channels == 16 else 1)
    return memory, issue, blocks * c.channels * products * PRODUCT, shared, alone


def walks(p: Problem) -> Iterator[list[Config]]:
    """Configs of `walk` that differ in their rows, one list a width."""
    heights = sorted({0, 1, 2, 4, 8, *(ceil_div(p.out_height, n) for n in range(2, min(p.out_height, MOST_CHUNKS) + 1))})
    for vector in VECTORS:
        for columns in (1, 2, 4, 7, 8):
            yield [Config("walk", vector, columns, rows) for rows in heights if rows < p.out_height]


def bands(p: Problem) -> Iterator[list[Config]]:
    """Configs of `band` that differ in their columns and rows, one list a number of channels and of images."""
    columns = sorted({TILE * ceil_div(ceil_div(p.out_width, TILE), n) for n in range(1, 9)})
    most = min(MOST_BLOCK_ROWS, p.out_height)
    rows = sorted({each * n for each in range(max(1, most // 2), most + 1) for n in (1, 2, 4, 8) if each * (n - 1) < p.out_height})
    for channels in PIECES:
        for images in (1, 2, 4, 8, 16):
            if images <= p.batch:
                yield [Config("band", channels, wide, high, images) for wide in columns for high in rows]


def candidates(problem: Problem, num_sms: int = 132) -> Sequence[Config]:
    """Return the legal configs worth timing, the believed best first; the best of either kernel is among them."""
    p = problem

    def rank(config: Config) -> tuple[float, Config]:
        return modelled_clocks(p, config, num_sms), config

    if why_not(p, Config(columns=1)) is not None:
        return []
    found: list[Config] = []
    others: list[Config] = []
    for lists in (walks(p), bands(p)):
        best = sorted((min(legal, key=rank) for group in lists if (legal := [c for c in group if why_not(p, c) is None])), key=rank)
        found += best[:1]
        others += best[1:]
    return sorted(found + sorted(others, key=rank)[: MOST_TIMED - len(found)], key=rank)


def default(problem: Problem, num_sms: int = 132) -> Config:
    """Return the config believed fastest, without timing anything.

    Raises:
        InputError: `why_not` has a reason for every config.
    """
    found = candidates(problem, num_sms)
    if not found:
        raise InputError(f"no kernel of the family computes {problem}: {why_not(problem, Config(columns=1))}")
    return found[0]


def pack_weight(problem: Problem, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a weight `[channels, kernel height, kernel width, 1]` as `[kernel height, kernel width, channels]`."""
    return np.ascontiguousarray(weight.reshape(problem.outputs, *problem.kernel).transpose(1, 2, 0))


def unpack_weight(problem: Problem, packed: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the weight that `pack_weight` packed."""
    return np.ascontiguousarray(packed.reshape(*problem.kernel, problem.outputs).transpose(2, 0, 1))[..., None]
