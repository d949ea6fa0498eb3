"""grouped.cuh in NumPy, warp by warp and lane by lane: its addresses, swizzle, fragments and turns, on real numbers."""

from typing import Any

import numpy as np

from twofour.kernels.grouped.contract import SLAB, TAPS, Launch, Problem, eights, unit, weight_words
from twofour.kernels.grouped.launch import _SIZES, boxes, pack_sizes

Array = np.ndarray[Any, Any]
LANES = np.arange(32)
NAMES = "channels height out_height top left column_stride images columns box_columns strip strips column_tiles items slabs blocks stages"
NAMES += " stage_bytes box_bytes total"


def unpack_weight(p: Problem, packed: Array) -> Array:
    """The weight `[outputs, 3, 3, inputs / groups]` that `pack_weight` packed, value by value by the formula in its docstring."""
    depth, size, n = p.inputs // p.groups, unit(p), eights(unit(p))
    words = packed.reshape(-1, SLAB // (8 * n), weight_words(size) // 4, 32, 4, 2)
    halves = 1 if size == 8 else 2
    o, r, s, c = np.indices((p.outputs, TAPS, TAPS, depth))
    place = o % size // depth * depth + c  # in its unit
    k, half, rest = place // (8 * halves), place // 8 % halves, place % 8
    word = (((3 * r + s) * (size // (8 * halves)) + k) * n + o // 8 % n) * halves + half
    return np.asarray(words[o // SLAB, o % SLAB // (8 * n), word // 4, o % 8 * 4 + rest // 2, word % 4, rest % 2])


def matrices(shared: Array, addresses: Array) -> Array:
    """`ldmatrix.x4`: `[4 registers, 32 lanes, 2]` of the rows of 8 elements at the lanes' addresses (in elements)."""
    assert (addresses % 8 == 0).all()
    rows = shared[addresses[:, None] + np.arange(8)].reshape(4, 8, 8)
    return np.stack([rows[i][LANES // 4].reshape(32, 4, 2)[LANES, LANES % 4] for i in range(4)])


def product(a: Array, b: Array) -> Array:
    """`mma.m16n8k16` (k8 for one register of B): `[32 lanes, 4]` from fragments `[4 or 2, 32, 2]` and `[2 or 1, 32, 2]`."""
    depth = 8 * len(b)
    left, right = np.zeros((16, depth)), np.zeros((depth, 8))
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(len(a)):
            left[g + 8 * (i % 2), 8 * (i // 2) + 2 * t :][:2] = a[i, lane]
        for i in range(len(b)):
            right[8 * i + 2 * t :, g][:2] = b[i, lane]
    whole = left @ right
    return np.stack([np.concatenate([whole[lane // 4 + 8 * i, lane % 4 * 2 :][:2] for i in (0, 1)]) for lane in range(32)])


def box(image: Array, at: list[int], sizes: list[int]) -> Array:
    """What a tensor map's box holds, `[images, rows, columns, channels]`, zeros outside; `at` and `sizes` innermost first."""
    found = np.zeros(sizes[::-1])
    for n, r, c in np.ndindex(*found.shape[:3]):
        place = at[3] + n, at[2] + r, at[1] + c
        if all(0 <= i < size for i, size in zip(place, image.shape, strict=False)):
            part = image[place][at[0] : at[0] + sizes[0]]
            found[n, r, c, : len(part)] = part
    return found


def swizzled(lines: Array) -> Array:
    """`[lines, 64]` as a 128-byte swizzle puts them into shared memory: piece i of line l at piece i ^ l % 8."""
    place = np.arange(8)[None, :] ^ (np.arange(len(lines))[:, None] % 8)
    return lines.reshape(-1, 8, 8)[np.arange(len(lines))[:, None], place].reshape(-1)


class Block:
    """The thread block `number`."""

    def __init__(self, problem: Problem, config: Any, launch: Launch, number: int) -> None:
        numbers = _SIZES.unpack(pack_sizes(problem, config, launch))
        self.p = dict(zip(NAMES.split(), numbers, strict=False))
        self.problem, self.config = problem, config
        self.x_box, self.y_box = (b for _, _, b in boxes(problem, config, launch))
        self.unit, self.n, self.stride = unit(problem), eights(unit(problem)), problem.strides[0]
        self.k = max(1, self.unit // 16)
        self.sets = 3 if self.stride == 1 else 2
        self.lag = self.sets - 1
        self.steps = self.p["strip"] + self.lag
        self.warps_n = SLAB // (8 * self.n)
        self.slab, self.first = number % self.p["slabs"], number // self.p["slabs"]
        self.total = self.p["total"]

    def line(self, pixel: Array) -> Array:
        p = self.p
        image = pixel // p["columns"]
        inside = image * self.stride * p["box_columns"] + (pixel - image * p["columns"]) * p["column_stride"]
        return np.where(image < p["images"], inside, 0)

    def address(self, line: Array, piece: Array) -> Array:
        """In elements, not bytes."""
        return line * SLAB + ((piece ^ (line & 7)) << 3)

    def run(self, x: Array, weight: Array, bias: Array | None, y: Array) -> None:
        """Compute the block's items: `x` and `y` NHWC, `weight` packed, `bias` a channel each."""
        p, c = self.p, self.config
        words = weight_words(self.unit)
        lanes = weight.reshape(p["slabs"], self.warps_n, words // 4, 32, 4, 2)[self.slab].transpose(0, 1, 3, 2, 4)
        lanes = lanes.reshape(self.warps_n, words, 32, 2)
        sums = np.full((self.warps_n, c.warps, self.sets, c.tiles, self.n, 32, 4), np.nan)
        for item in range(self.first, p["items"], p["blocks"]):
            rest = item // p["strips"]
            group = rest // p["column_tiles"]
            first_row = (item - rest * p["strips"]) * p["strip"]
            column, image = (rest - group * p["column_tiles"]) * p["columns"], group * p["images"]
            for step in range(self.steps):
                row = (first_row + step) * self.stride - p["top"]
                at = [self.slab * SLAB, column * p["column_stride"] - p["left"], row, image]
                staged = swizzled(box(x, at, self.x_box).reshape(-1, SLAB))
                out = np.full(16 * c.warps * c.tiles * SLAB, np.nan)
                for n, m in np.ndindex(self.warps_n, c.warps):
                    self.step(sums[n, m], lanes[n], staged, out, (n, m), (row, step, bias))
                finished = first_row + step - self.lag
                if step >= self.lag and finished < p["out_height"]:
                    self.store(y, out, [self.slab * SLAB, column, finished, image])

    def step(
        self, sums: Array, weight: Array, staged: Array, out: Array, warp: tuple[int, int], now: tuple[int, int, Array | None]
    ) -> None:
        (n, m), (row, step, bias), turn = warp, now, now[1] % self.sets
        for h in range(self.stride):
            if 0 <= row + h < self.p["height"] and (h == 0 or step + 1 < self.steps):
                self.multiply(sums, weight, staged, n, m, turn, h)
            elif h == 0:
                sums[turn] = 0
        if step < self.lag:
            return
        for t in range(self.config.tiles):
            tile = t * self.config.warps + m
            for i in range(self.n if tile < self.total else 0):
                channels = self.slab * SLAB + 8 * (n * self.n + i) + LANES % 4 * 2
                place = self.address(LANES // 4, np.full(32, n * self.n)) + LANES % 4 * 2
                place = (place ^ i << 3) + tile * 16 * SLAB
                values = sums[(turn + 1) % self.sets, t, i].copy()
                if bias is not None:
                    known = np.concatenate([bias, np.zeros(2 * SLAB)])
                    values += np.stack([known[channels], known[channels + 1]] * 2, axis=1)
                for e in range(4):
                    out[place + e // 2 * 8 * SLAB + e % 2] = values[:, e]

    def multiply(self, sums: Array, weight: Array, staged: Array, n: int, m: int, turn: int, h: int) -> None:
        c, skipped, row = self.config, h * self.p["box_columns"], LANES % 16
        met = [r for r in range(TAPS) if self.stride == 1 or r % 2 == h]
        set_of = [(turn + 3 - r) % 3 if self.stride == 1 else (turn + r // 2) % 2 for r in range(TAPS)]
        piece = np.full(32, n) if self.unit == 8 else n * self.n // (self.unit // 8) * (self.unit // 8) + LANES // 16
        for t in range(c.tiles):
            if t * c.warps + m >= self.total:
                continue
            if self.unit == 8:
                line = self.line(16 * (t * c.warps + m) + row) + LANES // 16
                pixels = matrices(staged, self.address(line + skipped, piece))
                pair = self.line(16 * ((t // 2 * 2 + LANES // 16) * c.warps + m) + row)
                third = matrices(staged, self.address(pair + skipped + 2, piece))[2 * (t % 2) :][:2]
                for r in met:
                    before = 0 if r == 0 else sums[set_of[r], t, 0]
                    sums[set_of[r], t, 0] = (
                        before + product(pixels, weight[3 * r : 3 * r + 2]) + product(third, weight[3 * r + 2 : 3 * r + 3])
                    )
                continue
            for s in range(TAPS):
                line = self.line(16 * (t * c.warps + m) + row) + skipped + s
                for k in range(self.k):
                    pixels = matrices(staged, self.address(line, piece) ^ (k << 4))
                    for r in met:
                        for i in range(self.n):
                            word = (((r * TAPS + s) * self.k + k) * self.n + i) * 2
                            before = 0 if r == 0 and s == 0 and k == 0 else sums[set_of[r], t, i]
                            sums[set_of[r], t, i] = before + product(pixels, weight[word : word + 2])

    def store(self, y: Array, out: Array, at: list[int]) -> None:
        lines = out.reshape(-1, 8, 8)
        place = np.arange(8)[None, :] ^ (np.arange(len(lines))[:, None] % 8)
        lines = lines[np.arange(len(lines))[:, None], place].reshape(-1, SLAB)
        for i, (image, column) in enumerate(np.ndindex(self.y_box[3], self.y_box[1])):
            n, q = at[3] + image, at[1] + column
            if n < y.shape[0] and q < y.shape[2]:
                part = y[n, at[2], q, at[0] : at[0] + SLAB]
                assert np.isnan(part).all(), "written twice"
                part[...] = lines[i][: len(part)]
