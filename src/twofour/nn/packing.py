"""Packed weights as PyTorch keeps them: checking, packing, the dense form and how long it is remembered."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from twofour.errors import InputError
from twofour.pattern.pack_sm90 import BLOCK_K, BLOCK_ROWS, VALUE_BYTES, PackedWeight, pack, unpack

NAME_OF = {torch.bfloat16: "bf16", torch.float16: "fp16"}
BLOCK_ELEMS = BLOCK_ROWS * BLOCK_K // 2  # kept values of a packed block


def packed_shape(rows: int, inputs: int) -> tuple[int, int, int]:
    """Return the shape of the int16 tensor that holds a 2:4 weight `[rows, inputs]`: row blocks, input blocks, elements of a block."""
    return -(-rows // BLOCK_ROWS), -(-inputs // BLOCK_K), (VALUE_BYTES + 1024) // 2


def packed_zeros(rows: int, inputs: int, device: torch.device | str | None = None) -> Tensor:
    """Return the packed form of zeros: every group names its two lowest positions, nibble 0b0100."""
    packed = torch.zeros(packed_shape(rows, inputs), dtype=torch.int16, device=device)
    packed[..., BLOCK_ELEMS:] = 0x4444
    return packed


def check_dtype(dtype: torch.dtype, layer: str) -> None:
    """Do nothing for bfloat16 and float16.

    Raises:
        InputError: another dtype.
    """
    if dtype not in NAME_OF:
        raise InputError(
            f"{layer}: weight dtype is {dtype}, expected torch.bfloat16 or torch.float16; pass dtype= to round the weight to one"
        )


def violation(weight: Tensor) -> str:
    """Return where a `[rows, inputs]` weight breaks 2:4 first, as `row 3, inputs 8-11 = 0.5, 1.0, -2.0, 0.0`; empty if it obeys."""
    rows, inputs = weight.shape
    nonzero = torch.nn.functional.pad(weight.detach() != 0, (0, -inputs % 4))
    broken = nonzero.view(rows, -1, 4).sum(-1, dtype=torch.int32) > 2
    if not bool(broken.any()):
        return ""
    row, group = (int(i) for i in broken.nonzero()[0])
    four = ", ".join(f"{float(v):.6g}" for v in weight.detach()[row, 4 * group : 4 * group + 4])
    return f"row {row}, inputs {4 * group}-{4 * group + 3} = {four}"


def oddity(weight: Tensor) -> str:
    """Return what a weight is that is no plain strided tensor (quantised, sharded, sparse, not initialised); empty for a plain one."""
    if weight.layout != torch.strided:
        return f"a tensor of layout {weight.layout}"
    return "" if type(weight) in (Tensor, torch.nn.Parameter) else f"a {type(weight).__name__}"


def check_24(weight: Tensor, layer: str) -> None:
    """Do nothing for a matrix that is 2:4 along its inputs.

    Raises:
        InputError: no plain matrix, or a group of four with three or four non-zeros; names layer, row, group and values.
    """
    odd = oddity(weight)
    if odd:
        raise InputError(f"{layer}: the weight is {odd}, expected a plain tensor; make the 2:4 layer before the weight is changed into one")
    if weight.ndim != 2 or weight.numel() == 0:
        raise InputError(f"{layer}: expected a weight [out_features, in_features] of at least one element, got shape {list(weight.shape)}")
    where = violation(weight)
    if where:
        raise InputError(f"{layer}: expected at most 2 non-zeros in every 4 inputs, got {where}; prune it with twofour.prune first")


def pack_weight(weight: Tensor, dtype: torch.dtype, layer: str = "weight") -> Tensor:
    """Return the packed int16 tensor of a 2:4 weight `[rows, inputs]`, rounded to `dtype` first; shape `packed_shape(rows, inputs)`.

    Raises:
        InputError: the weight is not 2:4, or `dtype` is not a 16-bit one.
    """
    check_dtype(dtype, layer)
    check_24(weight, layer)
    # Normal tensors even under inference_mode, so that the version counter tells when a weight changed.
    with torch.inference_mode(False), torch.no_grad():
        packed: Tensor = pack(weight.detach().to(dtype), dtype=NAME_OF[dtype], layer=layer).data
        return packed


def rounded_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias rounded to `dtype` like the weight, in the fp32 that the kernel adds."""
    with torch.inference_mode(False), torch.no_grad():
        return bias.detach().to(dtype).float()


def unpack_weight(packed: Tensor, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Return the dense weight `[rows, inputs]` of a packed one; pruned positions are +0."""
    with torch.inference_mode(False), torch.no_grad():
        bits: Tensor = unpack(PackedWeight(packed, rows, inputs, NAME_OF[dtype], True))
        return bits.view(dtype)


_DENSE: Any = WeakTensorKeyDictionary()


def dense_of(packed: Tensor, rows: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Return `unpack_weight`, remembered as long as `packed` lives unchanged. Do not write into it.

    Nothing is remembered of a tensor without a version counter (made under inference_mode), nor during the capture of a CUDA graph, whose
    memory is only valid while the graph runs.
    """
    if packed.is_inference() or (packed.is_cuda and torch.cuda.is_current_stream_capturing()):
        return unpack_weight(packed, rows, inputs, dtype)
    key = (packed._version, packed.data_ptr(), rows, inputs, dtype)
    found = _DENSE.get(packed)
    if found is None or found[0] != key:
        found = key, unpack_weight(packed, rows, inputs, dtype)
        _DENSE[packed] = found
    return found[1]  # type: ignore[no-any-return]


def convert_packed(packed: Tensor, rows: int, inputs: int, old: torch.dtype, new: torch.dtype, layer: str) -> Tensor:
    """Return the packed weight with its values rounded from `old` to `new`."""
    check_dtype(new, layer)
    if packed.is_meta or old == new:
        return packed
    return pack_weight(unpack_weight(packed, rows, inputs, old), new, layer)


class Repacker:
    """Packs a weight again and again under one mask with a single gather, because only values move when a mask is held.

    Attributes:
        index: int32, of a weight of 2^31 elements and more int64, `[row_blocks * input_blocks * 4096]`: for each multiplied value in packed
            order its position in the flat weight; one past the end, where a zero lies, for a position outside the mask.
        metadata: int16 `[row_blocks, input_blocks, 512]`: which positions are kept, the same for every weight under the mask.
    """

    def __init__(self, mask: Tensor, layer: str = "weight") -> None:
        """Build from a bool `[rows, inputs]` mask on the mask's device.

        Raises:
            InputError: the mask is not 2:4.
        """
        check_24(mask, layer)
        rows, inputs = mask.shape
        row_blocks, k_blocks, _ = packed_shape(rows, inputs)
        device = mask.device
        with torch.inference_mode(False), torch.no_grad():
            packed = pack_weight(mask.to(torch.float16), torch.float16, layer)
            padded = torch.nn.functional.pad(mask, (0, k_blocks * BLOCK_K - inputs, 0, row_blocks * BLOCK_ROWS - rows))
            # The two multiplied positions of each group, in order: non-zeros, then the lowest zeros, as `pack` fills them.
            groups = padded.view(-1, 4).to(torch.int8)
            rank = groups * 8 - torch.arange(4, device=device, dtype=torch.int8)
            kept = rank.topk(2, dim=1).indices.sort(dim=1).values
            first = torch.arange(groups.shape[0], device=device)[:, None] * 4
            place = _in_weight(first + kept, k_blocks * BLOCK_K, rows, inputs)
            # A group with fewer than two non-zeros is filled up with positions outside the mask.
            place = torch.where(groups.gather(1, kept) != 0, place, rows * inputs).view(row_blocks, BLOCK_ROWS, k_blocks, BLOCK_K // 2)
            order = _order_in_block().to(device)
            index = place.permute(0, 2, 1, 3).reshape(row_blocks, k_blocks, BLOCK_ELEMS)[..., order]
            self.index = index.reshape(-1).contiguous()
            self.metadata = packed[..., BLOCK_ELEMS:].clone()


def _in_weight(padded_index: Tensor, padded_inputs: int, rows: int, inputs: int) -> Tensor:
    """Positions in the flat `[rows, inputs]` weight, int32 where they fit; `rows * inputs`, one past its end, for padding."""
    row, column = padded_index // padded_inputs, padded_index % padded_inputs
    inside = (row < rows) & (column < inputs)
    positions = torch.where(inside, row * inputs + column, rows * inputs)
    return positions.to(torch.int32) if rows * inputs < 2**31 else positions


def _order_in_block() -> Tensor:
    """For each kept value of a packed block its place in row-major order; read off by packing numbered values."""
    block = torch.zeros(BLOCK_ROWS, BLOCK_K // 4, 4, dtype=torch.int16)
    block[..., :2] = torch.arange(1, BLOCK_ELEMS + 1, dtype=torch.int16).view(BLOCK_ROWS, BLOCK_K // 4, 2)
    numbered: Tensor = pack(block.view(BLOCK_ROWS, BLOCK_K).view(torch.float16), dtype="fp16").data
    return numbered[0, 0, :BLOCK_ELEMS].long() - 1


def repack(weight: Tensor, index: Tensor, metadata: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what `pack_weight` gives for `weight` under the mask of a `Repacker`; values outside the mask are left out.

    Plain PyTorch operations on whole tensors: safe in a captured graph and under torch.compile.
    """
    flat = torch.nn.functional.pad(weight.to(dtype).reshape(-1), (0, 1))
    values = flat.index_select(0, index).view(torch.int16).view(*metadata.shape[:2], BLOCK_ELEMS)
    return torch.cat([values, metadata], -1)
