"""A weight in the order the Hopper kernels read it: blocks of 128 rows by 64 inputs, each one contiguous bulk copy.

A sparse block is 8192 bytes of kept values, in shared-memory swizzled order, then 1024 bytes of lane-ready `wgmma.sp` metadata.
A dense block is 16384 bytes of values. Blocks lie `[row_block, k_block]`. One packed weight serves every tile of the kernel family.

Rows are permuted inside a block so that one thread's accumulator rows are neighbours in the output: weight row
32 warp + 4 g + 2 m + h of a block is fragment row 64 m + 16 warp + 8 h + g, so a thread (warp, g) holds four consecutive rows and stores
them at once, without a transpose.

The functions work on NumPy arrays and on torch tensors of either device alike; values travel as int16 bit patterns.

Source: PTX ISA 8.7, sections 9.7.15.6 (sparse wgmma metadata) and 9.7.15.5.1 (shared-memory swizzles).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from twofour.errors import InputError

BLOCK_ROWS = 128
BLOCK_K = 64
VALUE_BYTES = 8192
METADATA_BYTES = 1024


def block_bytes(sparse: bool) -> int:
    """Return the bytes of one packed block."""
    return VALUE_BYTES + METADATA_BYTES if sparse else 2 * VALUE_BYTES


@dataclass(frozen=True)
class PackedWeight:
    """A weight packed for sm_90a.

    Attributes:
        data: int16 array or tensor `[row_blocks, k_blocks, block_bytes / 2]`, contiguous.
        rows: weight rows, before padding. inputs: input channels, before padding.
        dtype: bf16 or fp16. sparse: 2:4 or dense. gated: rows were interleaved gate, up.
    """

    data: Any
    rows: int
    inputs: int
    dtype: str
    sparse: bool
    gated: bool = False

    def __str__(self) -> str:
        kind = "2:4" if self.sparse else "dense"
        return f"{kind} {self.dtype} weight [{self.rows}, {self.inputs}], {self.nbytes} bytes packed"

    @property
    def nbytes(self) -> int:
        """Bytes of `data`."""
        return int(np.prod(tuple(self.data.shape))) * 2


def _is_torch(array: Any) -> bool:
    return type(array).__module__.startswith("torch")


def _where(condition: Any, yes: Any, no: Any) -> Any:
    if _is_torch(condition):
        import torch

        return torch.where(condition, yes, no)
    return np.where(condition, yes, no)


def _permute(array: Any, *order: int) -> Any:
    return array.permute(*order) if _is_torch(array) else array.transpose(*order)


def _cat(first: Any, second: Any) -> Any:
    if _is_torch(first):
        import torch

        return torch.cat([first, second], -1)
    return np.concatenate([first, second], -1)


def _zeros(like: Any, *shape: int) -> Any:
    return like.new_zeros(shape) if _is_torch(like) else np.zeros(shape, like.dtype)


def _as_int16(array: Any) -> Any:
    if _is_torch(array):
        import torch

        return array.to(torch.int16)
    return array.astype(np.uint16).view(np.int16)


def _bits(weight: Any, layer: str) -> Any:
    """Int16 bit patterns of a 16-bit `[rows, inputs]` weight."""
    size = weight.element_size() if _is_torch(weight) else weight.dtype.itemsize
    if len(weight.shape) != 2 or size != 2:
        raise InputError(
            f"{layer}: expected a 16-bit matrix [rows, inputs], got {weight.dtype} of shape {list(weight.shape)}; cast it to bf16 or fp16"
        )
    if 0 in tuple(weight.shape):
        raise InputError(f"{layer}: expected a weight [rows, inputs] of at least one element, got shape {list(weight.shape)}")
    if _is_torch(weight):
        import torch

        return weight.detach().contiguous().view(torch.int16)
    return np.ascontiguousarray(weight).view(np.int16)


def gate_order(rows: int) -> Any:
    """Return the row order of a gated weight: gate 2f, gate 2f+1, up 2f, up 2f+1 for every pair f; gates are the first half."""
    half = np.arange(rows // 2).reshape(-1, 2)
    return np.concatenate([half, half + rows // 2], 1).reshape(-1)


def _padded(bits: Any, gated: bool) -> Any:
    """Rows reordered when gated, then zero rows and inputs up to whole blocks."""
    rows, inputs = bits.shape
    if gated:
        order = gate_order(rows)
        if _is_torch(bits):
            import torch

            order = torch.from_numpy(order).to(bits.device)
        bits = bits[order]
    padded = _zeros(bits, -(-rows // BLOCK_ROWS) * BLOCK_ROWS, -(-inputs // BLOCK_K) * BLOCK_K)
    padded[:rows, :inputs] = bits
    return padded


def _compress(bits: Any, layer: str) -> tuple[Any, Any]:
    """(kept values `[rows, k/2]`, metadata nibbles `[rows, k/4]` as int32) of bit patterns `[rows, k]`.

    Groups of fewer than two non-zeros keep their lowest zero positions too, as +0, so every nibble is one of the six legal ones.
    """
    rows, k = bits.shape
    groups = bits.reshape(rows, k // 4, 4)
    nonzero = (groups & 0x7FFF) != 0
    count = (nonzero * 1).sum(-1)
    if bool((count > 2).any()):
        where = np.argwhere(np.asarray((count > 2).cpu()) if _is_torch(bits) else count > 2)[0]
        four = [f"{int(v) & 0xFFFF:#06x}" for v in groups[where[0], where[1]]]
        raise InputError(
            f"{layer}: expected at most 2 non-zeros in every 4 inputs, got row {where[0]}, inputs {4 * where[1]}-{4 * where[1] + 3} "
            f"= bit patterns {', '.join(four)}; prune it with twofour.prune first"
        )
    kept = []
    for position in range(4):
        fill = ~nonzero[..., position] & (count < 2)
        kept.append(nonzero[..., position] | fill)
        count = count + fill * 1
    clean = _where(nonzero, groups, groups * 0)
    low = _where(kept[0], clean[..., 0], _where(kept[1], clean[..., 1], clean[..., 2]))
    high = _where(kept[3], clean[..., 3], _where(kept[2], clean[..., 2], clean[..., 1]))
    one = kept[0] * 0 + 1
    first = _where(kept[0], one * 0, _where(kept[1], one, one * 2))
    second = _where(kept[3], one * 3, _where(kept[2], one * 2, one))
    values = _cat(low[..., None], high[..., None]).reshape(rows, k // 2)
    return values, first | second << 2


def _swizzled(blocks: Any, chunks: int) -> Any:
    """`[..., g, chunk, 8]` with 16-byte chunks exchanged as the 64-byte (4 chunks) or 128-byte (8 chunks) swizzle does; its own inverse."""
    g = np.arange(8)[:, None]
    shift = (g >> 1) & 3 if chunks == 4 else g
    chunk = np.arange(chunks)[None] ^ shift
    g = np.broadcast_to(g, chunk.shape).copy()
    if _is_torch(blocks):
        import torch

        return blocks[..., torch.from_numpy(g).to(blocks.device), torch.from_numpy(chunk).to(blocks.device), :]
    return blocks[..., g, chunk, :]


def pack(weight: Any, *, dtype: str, sparse: bool = True, gated: bool = False, layer: str = "weight") -> PackedWeight:
    """Return `weight` in kernel order. Exact: no value is rounded; -0 becomes +0 in a sparse weight.

    Args:
        weight: 16-bit `[rows, inputs]` NumPy array (any 2-byte dtype, read as bits) or torch tensor; 2:4 along inputs if `sparse`.
        dtype: what the bits mean, bf16 or fp16.
        gated: rows are all gates, then all ups; rows a multiple of 4.
        layer: named in errors.

    Raises:
        InputError: not a 16-bit matrix, an empty one, not 2:4, or rows that do not pair up.
    """
    bits = _bits(weight, layer)
    rows, inputs = bits.shape
    if gated and rows % 4:
        raise InputError(f"{layer}: a gated weight holds gate and up rows in pairs, expected a multiple of 4 rows, got {rows}")
    padded = _padded(bits, gated)
    row_blocks, k_blocks = padded.shape[0] // BLOCK_ROWS, padded.shape[1] // BLOCK_K
    if not sparse:
        # [row_block, warp, g, m, h, k_block, chunk, 8] -> [row_block, k_block, m, warp, h, g, chunk, 8]
        split = padded.reshape(row_blocks, 4, 8, 2, 2, k_blocks, 8, 8)
        data = _swizzled(_permute(split, 0, 5, 3, 1, 4, 2, 6, 7), 8).reshape(row_blocks, k_blocks, -1)
        return PackedWeight(_contiguous(data), rows, inputs, dtype, False, gated)
    values, nibbles = _compress(padded, layer)
    split = values.reshape(row_blocks, 4, 8, 2, 2, k_blocks, 4, 8)
    ordered = _swizzled(_permute(split, 0, 5, 3, 1, 4, 2, 6, 7), 4).reshape(row_blocks, k_blocks, -1)
    four = nibbles.reshape(padded.shape[0], -1, 4)
    halves = _as_int16(four[..., 0] | four[..., 1] << 4 | four[..., 2] << 8 | four[..., 3] << 12)
    # [row_block, warp, g, m, h, k_block, step, lane & 1] -> [row_block, k_block, warp, g, lane & 1, m, step, h]
    lanes = _permute(halves.reshape(row_blocks, 4, 8, 2, 2, k_blocks, 2, 2), 0, 5, 1, 2, 7, 3, 6, 4).reshape(row_blocks, k_blocks, -1)
    return PackedWeight(_contiguous(_cat(ordered, lanes)), rows, inputs, dtype, True, gated)


def _contiguous(data: Any) -> Any:
    return data.contiguous() if _is_torch(data) else np.ascontiguousarray(data)


def unpack(packed: PackedWeight) -> Any:
    """Return the int16 bit patterns `[rows, inputs]` that `pack` was given; pruned positions are +0."""
    data = packed.data
    row_blocks, k_blocks = data.shape[:2]
    chunks = 4 if packed.sparse else 8
    body = data[..., : VALUE_BYTES // 2] if packed.sparse else data
    ordered = _swizzled(body.reshape(row_blocks, k_blocks, 2, 4, 2, 8, chunks, 8), chunks)
    values = _permute(ordered, 0, 3, 5, 2, 4, 1, 6, 7).reshape(row_blocks * BLOCK_ROWS, k_blocks * chunks * 8)
    bits = _expand(values, data[..., VALUE_BYTES // 2 :], row_blocks, k_blocks) if packed.sparse else values
    if packed.gated:
        order = gate_order(packed.rows)
        back = np.empty_like(order)
        back[order] = np.arange(packed.rows)
        if _is_torch(bits):
            import torch

            back = torch.from_numpy(back).to(bits.device)
        bits = bits[: packed.rows][back]
    return _contiguous(bits[: packed.rows, : packed.inputs])


def _expand(values: Any, lanes: Any, row_blocks: int, k_blocks: int) -> Any:
    """Bit patterns `[rows, k]` from kept values `[rows, k/2]` and lane-ready metadata."""
    halves = _permute(lanes.reshape(row_blocks, k_blocks, 4, 8, 2, 2, 2, 2), 0, 2, 3, 5, 7, 1, 6, 4).reshape(row_blocks * BLOCK_ROWS, -1)
    rows = values.shape[0]
    bits = _zeros(values, rows, k_blocks * BLOCK_K).reshape(rows, -1, 4)
    pairs = values.reshape(rows, -1, 2)
    for group in range(4):
        nibble = (halves >> (4 * group)) & 15
        for position in range(4):
            low, high = pairs[:, group::4, 0], pairs[:, group::4, 1]
            bits[:, group::4, position] = _where((nibble & 3) == position, low, _where((nibble >> 2) == position, high, low * 0))
    return bits.reshape(rows, -1)
