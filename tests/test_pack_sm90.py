"""Packing for Hopper: exact round trip, legal metadata, and the product read back the way the hardware reads a block."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.errors import InputError
from twofour.oracle.gemm import multiplied
from twofour.pattern import select
from twofour.pattern.pack_sm90 import VALUE_BYTES, block_bytes, gate_order, pack, unpack

LEGAL = {0b0100, 0b1000, 0b1001, 0b1100, 0b1101, 0b1110}


def weight_24(rows: int, inputs: int, seed: int, density: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, inputs)).astype(np.float16)
    return np.where(select(weight) & (rng.random(weight.shape) < density), weight, np.float16(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.sampled_from([1.0, 0.6, 0.0]), st.booleans(), st.booleans(), st.integers(0, 99))
def test_unpack_gives_back_what_pack_was_given(eighths: int, octets: int, density: float, sparse: bool, gated: bool, seed: int) -> None:
    weight = weight_24(8 * eighths, 8 * octets, seed, density)
    packed = pack(weight, dtype="fp16", sparse=sparse, gated=gated)
    assert packed.data.shape == (-(-8 * eighths // 128), -(-8 * octets // 64), block_bytes(sparse) // 2)
    assert (unpack(packed) == weight.view(np.int16)).all()


def test_negative_zero_becomes_positive_and_extremes_survive() -> None:
    weight = np.array([[-0.0, 65504.0, -65504.0, 0.0, np.inf, -0.0, -0.0, 6e-8]] * 8, np.float16)
    bits = unpack(pack(weight, dtype="fp16")).view(np.uint16)
    assert (bits == np.where(weight == 0, 0, weight.view(np.uint16))).all()


@pytest.mark.parametrize("sparse", [True, False])
def test_torch_and_numpy_pack_alike(sparse: bool) -> None:
    weight = weight_24(264, 224, 3)
    tensor = pack(torch.from_numpy(weight), dtype="fp16", sparse=sparse, gated=True)
    array = pack(weight, dtype="fp16", sparse=sparse, gated=True)
    assert (tensor.data.numpy() == array.data).all()
    assert (unpack(tensor).numpy() == unpack(array)).all()


def nibbles_of(packed_block: np.ndarray) -> np.ndarray:
    """[128 rows, 16 groups] of one sparse block, read lane by lane: lane bit 0 is the half of 32 inputs, word bits 16-31 are row g + 8."""
    words = packed_block[VALUE_BYTES // 2 :].view(np.uint16).reshape(4, 8, 2, 2, 2, 2)  # warp, g, lane & 1, m, step, h
    out = np.zeros((128, 16), np.uint8)
    for warp, g, half, m, step, h in np.ndindex(words.shape):
        for i in range(4):
            out[32 * warp + 4 * g + 2 * m + h, step * 8 + half * 4 + i] = words[warp, g, half, m, step, h] >> (4 * i) & 15
    return out


@pytest.mark.parametrize("density", [1.0, 0.4, 0.0])
def test_every_nibble_is_legal_and_agrees_with_torch(density: float) -> None:
    from torch.sparse._semi_structured_conversions import (
        _calculate_meta_reordering_scatter_offsets,
        sparse_semi_structured_from_dense_cutlass,
    )

    weight = weight_24(128, 64, 1, density)
    found = nibbles_of(pack(weight, dtype="fp16").data[0, 0])
    assert set(found.ravel().tolist()) <= LEGAL
    if density == 1.0:
        _, reordered = sparse_semi_structured_from_dense_cutlass(torch.from_numpy(weight))
        offsets = _calculate_meta_reordering_scatter_offsets(128, reordered.shape[1], reordered.dtype, "cpu")
        meta = torch.gather(reordered.reshape(-1), 0, offsets).reshape(reordered.shape).numpy().view(np.uint16)
        theirs = np.stack([meta >> (4 * i) & 15 for i in range(4)], -1).reshape(128, 16)
        assert (found == theirs).all()


def product_as_the_hardware_reads(block: np.ndarray, x: np.ndarray, halves: tuple[int, ...] = (0, 1)) -> np.ndarray:
    """[128 weight rows, tokens] from one sparse block and x [tokens, 64]: swizzled value rows, metadata words, accumulator rows.

    A warpgroup of a tile shared by rows multiplies one of the `halves`.
    """
    values = block[: VALUE_BYTES // 2].view(np.float16).astype(np.float64)
    meta = block[VALUE_BYTES // 2 :].view(np.uint32).reshape(4, 16, 4)  # warp, contributing lane, (m, step)
    out = np.zeros((128, x.shape[0]))
    for m, row64 in ((m, row64) for m in halves for row64 in range(64)):
        warp, g, h = row64 // 16, row64 % 8, row64 // 8 % 2
        fragment = 64 * m + row64
        for k in range(32):  # compressed input
            # 64-byte swizzle: address bits 4-5 are exchanged with bits 7-8
            address = fragment * 64 + k * 2
            address ^= (address >> 7 & 3) << 4
            step, group = k // 16, k // 2 % 8
            word = int(meta[warp, g * 2 + group // 4, m * 2 + step]) >> (16 * h)
            nibble = word >> (4 * (group % 4)) & 15
            index = nibble >> 2 if k % 2 else nibble & 3
            out[32 * warp + 4 * g + 2 * m + h] += values[address // 2] * x[:, step * 32 + group * 4 + index]
    return out


def test_a_block_read_as_the_hardware_reads_it_is_the_product() -> None:
    weight, x = weight_24(128, 64, 5, 0.9), np.random.default_rng(6).standard_normal((3, 64))
    found = product_as_the_hardware_reads(pack(weight, dtype="fp16").data[0, 0], x)
    assert np.allclose(found, weight.astype(np.float64) @ x.T, rtol=0, atol=1e-12)


def test_half_a_block_is_two_of_every_four_rows() -> None:
    weight, x = weight_24(128, 64, 7, 0.9), np.random.default_rng(8).standard_normal((2, 64))
    block, rows = pack(weight, dtype="fp16").data[0, 0], np.arange(128)
    for half in (0, 1):
        other = np.array(block)
        # A half is 4096 bytes of values and the half's two words of every lane's four.
        other[(1 - half) * 2048 : (2 - half) * 2048] = 0
        other[VALUE_BYTES // 2 :].reshape(-1, 2, 4)[:, 1 - half] = 0
        found = product_as_the_hardware_reads(other, x, (half,))
        expected = np.where((rows // 2 % 2 == half)[:, None], weight.astype(np.float64) @ x.T, 0)
        assert np.allclose(found, expected, rtol=0, atol=1e-12)


def test_gates_and_ups_alternate_in_pairs() -> None:
    assert gate_order(8).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_the_oracle_multiplies_the_positions_that_packing_keeps() -> None:
    weight = weight_24(128, 64, 9, 0.5)
    nibbles = nibbles_of(pack(weight, dtype="fp16").data[0, 0])
    kept = np.zeros((128, 16, 4), bool)
    np.put_along_axis(kept, (nibbles & 3)[..., None].astype(int), True, -1)
    np.put_along_axis(kept, (nibbles >> 2)[..., None].astype(int), True, -1)
    assert (kept.reshape(128, 64) == multiplied(weight)).all()


def test_a_weight_that_is_not_24_names_layer_group_and_values() -> None:
    weight = weight_24(16, 32, 0)
    weight[5, 8:12] = [1, 2, 0, 4]
    message = (
        r"fc1: expected at most 2 non-zeros in every 4 inputs, got row 5, inputs 8-11 = bit patterns 0x3c00, 0x4000, 0x0, 0x4400; prune"
    )
    with pytest.raises(InputError, match=message.replace("0x0,", "0x0000,")):
        pack(weight, dtype="fp16", layer="fc1")


def test_wrong_dtype_shape_and_odd_gates_are_errors() -> None:
    with pytest.raises(InputError, match=r"weight: expected a 16-bit matrix \[rows, inputs\], got float32 of shape \[8, 8\]; cast"):
        pack(np.zeros((8, 8), np.float32), dtype="fp16")
    with pytest.raises(InputError, match=r"weight: expected a weight \[rows, inputs\] of at least one element, got shape \[0, 8\]"):
        pack(np.zeros((0, 8), np.float16), dtype="fp16")
    with pytest.raises(InputError, match="expected a multiple of 4 rows, got 6"):
        pack(np.zeros((6, 8), np.float16), dtype="fp16", gated=True)
