"""Problem, Config and Launch: every message, every schedule covers the work exactly once, the model stays legal."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofour.errors import InputError
from twofour.kernels.gemm import Config, Epilogue, Problem, candidates, default, derive, why_not
from twofour.kernels.gemm.contract import (
    MAY_WIN,
    SMEM_BYTES,
    TILE_TOKENS,
    best_buffers,
    modelled_us,
    most_stages,
    share_out,
    shared_by_rows,
    smem_bytes,
    staging_bytes,
    store_chunks,
)
from twofour.kernels.gemm.launch import divisor, pack_sizes

PROBLEM = Problem(512, 6144, 4096)


@given(st.integers(1, 2**20), st.integers(0, 2**31 - 1))
def test_division_by_a_product_and_a_shift_is_exact(value: int, number: int) -> None:
    multiplier, shift = divisor(value)
    assert multiplier < 2**32
    assert number * multiplier >> shift == number // value


def pieces(problem: Problem, config: Config, sms: int) -> list[list[tuple[int, int, int]]]:
    """Per thread block its (tile, first k, last k), as schedule.cuh walks them."""
    launch = derive(problem, config, sms)
    work, blocks = (launch.tiles - launch.whole_tiles) * launch.k_blocks, launch.split_blocks
    out = []
    for block in range(launch.grid):
        mine = []
        if blocks:
            position, end = (min(b, blocks) * work // blocks for b in (block, block + 1))
            while position < end:
                tile, first = divmod(position, launch.k_blocks)
                last = min(launch.k_blocks, first + end - position)
                mine.append((launch.whole_tiles + tile, first, last))
                position += last - first
        mine += [(tile, 0, launch.k_blocks) for tile in range(block, launch.whole_tiles, launch.grid)]
        out.append(mine)
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 200), st.integers(1, 300), st.sampled_from([132, 114, 7]), st.booleans())
def test_every_k_block_of_every_tile_is_computed_once(tokens: int, octets: int, in_octets: int, sms: int, split: bool) -> None:
    problem = Problem(tokens, 8 * octets, 8 * in_octets)
    launch = derive(problem, Config("tuned", 256, 64, 4, split), sms)
    seen = np.zeros((launch.tiles, launch.k_blocks), int)
    for mine in pieces(problem, Config("tuned", 256, 64, 4, split), sms):
        for i, (tile, first, last) in enumerate(mine):
            seen[tile, first:last] += 1
            # A reader of partial sums is its block's last split piece; a writer is the first.
            assert first == 0 or i == 0
    assert (seen == 1).all()
    assert launch.grid <= sms


def test_no_block_waits_for_one_that_waits() -> None:
    # The block with a tile's first piece reads what later blocks wrote as their first piece.
    for mine in pieces(Problem(16, 6144, 4096), Config("tuned", 256, 64, 5, True), 132):
        assert len(mine) == 1


def test_tiles_are_cut_only_where_they_leave_the_gpu_idle() -> None:
    assert share_out(64, 224, 132) == (0, 128)
    assert share_out(132, 64, 132) == (132, 0)
    assert share_out(100, 64, 132) == (100, 0)
    assert share_out(20, 6, 132) == (20, 0)


def test_sizes_are_packed_for_the_kernel_in_its_order() -> None:
    problem, config = Problem(300, 264, 96), Config("tuned", 256, 192, 4, False)
    numbers = np.frombuffer(pack_sizes(problem, derive(problem, config)), np.int32)
    assert numbers[:9].tolist() == [300, 264, 264, 96, 2, 3, 2, 2, 2]
    assert len(numbers) == 23


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 20000), st.integers(1, 4000), st.integers(1, 2000), st.booleans(), st.sampled_from(["bf16", "fp32"]), st.booleans())
def test_candidates_are_legal_few_and_best_first(tokens: int, octets: int, in_octets: int, sparse: bool, out: str, gated: bool) -> None:
    problem = Problem(tokens, 8 * octets, 8 * in_octets, out_dtype=out, sparse=sparse, epilogue=Epilogue("silu", bias=True, gated=gated))
    found = candidates(problem)
    assert 1 <= len(found) <= 8
    assert all(why_not(problem, c) is None and derive(problem, c).smem_bytes <= SMEM_BYTES for c in found)
    assert [modelled_us(problem, c) for c in found] == sorted(modelled_us(problem, c) for c in found)
    assert default(problem) == found[0]
    shared = [c for c in found if c.by_rows]
    assert len(shared) <= (1 if sparse and not gated else 0)
    assert all(modelled_us(problem, c) <= MAY_WIN * min(modelled_us(problem, c) for c in found if not c.by_rows) for c in shared)


REASONS = [
    (Config("tunned"), "kernel 'tunned' is not one of tuned, pipelined, naive; did you mean 'tuned'"),
    (Config(tile_rows=192), "a tile of 192 rows is not built, expected 128 or 256"),
    (Config(tile_tokens=100), "a tile of 100 tokens is not built, expected a multiple of 8 from 64 to 192, or of 16 up to 256"),
    (Config(tile_tokens=256), "a tile of 256 rows and 256 tokens needs more accumulator registers than a thread has, expected at most 192"),
    (Config(tile_rows=128, tile_tokens=136), "halves its tokens between two warpgroups, expected a multiple of 16 from 128, got 136"),
    (Config(stages=2), "a ring of 2 stages cannot keep two in flight, expected at least 3"),
    (Config(stages=6), "6 stages and the staged outputs need"),
    (Config(tile_tokens=64, stages=7), "the barriers of 7 stages take 136 bytes, there are 128; use fewer stages"),
    (Config(tile_tokens=64, stages=7, buffers=2), "the barriers of 7 stages take 144 bytes, there are 128"),
    (Config(tile_tokens=128, by_rows=True), "a tile shared by rows has 128, 64 for each warpgroup, not 256"),
    (Config(tile_rows=128, tile_tokens=136, by_rows=True), "a tile shared by rows has a multiple of 16 tokens from 128, not 136"),
    (Config(tile_rows=128, tile_tokens=112, by_rows=True), "a tile shared by rows has a multiple of 16 tokens from 128, not 112"),
    (
        Config(tile_rows=128, tile_tokens=240, buffers=4, by_rows=True),
        "4 buffers for the staged outputs of a tile shared by rows, expected at least one and at most 3",
    ),
    (Config(tile_rows=128, tile_tokens=128, buffers=0, by_rows=True), "0 buffers for the staged outputs of a tile shared by rows"),
    (Config(tile_rows=128, tile_tokens=128, stages=5, buffers=4, by_rows=True), "the barriers of 5 stages take 144 bytes, there are 128"),
    (Config(tile_rows=128, tile_tokens=256, buffers=4, by_rows=True), "4 stages and the staged outputs need 233600 bytes of shared memory"),
]


@pytest.mark.parametrize(("config", "reason"), REASONS)
def test_why_not_says_why(config: Config, reason: str) -> None:
    assert reason in (why_not(PROBLEM, config) or "")
    with pytest.raises(InputError, match="cannot compute"):
        derive(PROBLEM, config)


def test_why_not_knows_what_an_epilogue_leaves() -> None:
    biased = dataclasses.replace(PROBLEM, epilogue=Epilogue(bias=True))
    assert why_not(biased, Config(tile_tokens=192)) == "this epilogue leaves registers for 184 tokens of a 256-row tile, not 192"
    assert why_not(biased, Config(tile_tokens=184)) is None


def test_the_ladder_takes_every_problem() -> None:
    for kernel in ("naive", "pipelined"):
        assert why_not(PROBLEM, Config(kernel)) is None
        assert derive(PROBLEM, Config(kernel)).grid > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": 0}, "tokens is 0, expected a positive multiple of 1"),
        ({"outputs": 12}, "outputs is 12, expected a positive multiple of 8; pad it when the weight is packed"),
        ({"inputs": 20}, "inputs is 20, expected a positive multiple of 8"),
        ({"tokens": 2**31}, "tokens is 2147483648, expected at most 2147483647; cut the product into several"),
        ({"tokens": 2**26, "outputs": 2**20}, "67108864 tokens by 1048576 weight rows are more than 2147483647 tiles of 32 x 32"),
        ({"outputs": 2**30 + 8, "epilogue": Epilogue(gated=True)}, "tokens by 2147483664 weight rows are more than 2147483647 tiles"),
        ({"dtype": "bf61"}, "dtype 'bf61' is not one of bf16, fp16; did you mean 'bf16'"),
        ({"out_dtype": "int8"}, "out_dtype 'int8' is not one of bf16, fp16, fp32"),
    ],
)
def test_a_bad_problem_is_one_sentence(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(PROBLEM, **arguments)


@pytest.mark.parametrize("sms", [1, 78, 132])
@pytest.mark.parametrize("sizes", [(2**31 - 1, 512, 32), (1, 2**31 - 8, 32), (2**20, 2**20, 2**31 - 8), (1, 8, 2**31 - 8)])
def test_the_numbers_of_the_largest_problems_fit_the_kernels(sizes: tuple[int, int, int], sms: int) -> None:
    problem = Problem(*sizes)
    for config in (*candidates(problem, sms), Config("pipelined"), Config("naive")):
        assert len(pack_sizes(problem, derive(problem, config, sms))) == 4 * 23


def test_a_bad_epilogue_is_one_sentence() -> None:
    with pytest.raises(InputError, match=r"activation 'geru' is not one of .*; did you mean '[gr]elu'"):
        Epilogue("geru")
    with pytest.raises(InputError, match="a gated epilogue cannot add a residual"):
        Epilogue(gated=True, residual=True)


def test_wide_tiles_keep_at_least_three_stages() -> None:
    for sparse in (True, False):
        problem = dataclasses.replace(PROBLEM, sparse=sparse)
        assert most_stages(problem, 256, 192) >= 3


def test_two_buffers_where_a_ring_of_four_stages_is_left_and_always_with_a_residual() -> None:
    plain, residual = PROBLEM, dataclasses.replace(PROBLEM, epilogue=Epilogue(residual=True))
    assert [best_buffers(plain, 256, tokens) for tokens in (104, 128, 192)] == [2, 2, 1]
    assert best_buffers(dataclasses.replace(plain, out_dtype="fp32"), 256, 104) == 1
    assert {config.buffers for config in candidates(residual)} == {2}
    one, two = Config(tile_tokens=128), Config(tile_tokens=128, buffers=2)
    assert staging_bytes(plain, two) == 2 * staging_bytes(plain, one) == staging_bytes(residual, one) == 2 * 128 * 128 * 2
    assert (one.tile, two.tile) == ("256x128x4", "256x128x4x2")


def test_buffers_that_cannot_be_are_refused() -> None:
    assert why_not(Problem(8, 8, 32), Config(buffers=3)) == "3 buffers for staged outputs, expected one or two"
    assert why_not(Problem(8, 8, 32, out_dtype="fp32"), Config(buffers=2)) == "outputs of fp32 are not staged, expected one buffer"


def test_a_tile_shared_by_rows_stages_what_leaves_room_for_four_stages() -> None:
    residual, wide = dataclasses.replace(PROBLEM, epilogue=Epilogue(residual=True)), dataclasses.replace(PROBLEM, out_dtype="fp32")
    assert [shared_by_rows(PROBLEM, t).tile for t in (128, 192, 240, 256)] == [
        "64+64x128x4x4",
        "64+64x192x4x4",
        "64+64x240x4x3",
        "64+64x256x4x3",
    ]
    assert shared_by_rows(residual, 256).tile == "64+64x256x3x4"
    assert shared_by_rows(wide, 256).tile == "64+64x256x5"
    for problem in (PROBLEM, residual, wide, dataclasses.replace(PROBLEM, sparse=False)):
        for tokens in (t for t in TILE_TOKENS if t >= 128 and t % 16 == 0):
            config = shared_by_rows(problem, tokens)
            assert why_not(problem, config) is None
            assert config.warpgroup_tokens == tokens == store_chunks(config) * (tokens // store_chunks(config))
    whole = Config("tuned", 128, 192, 4, buffers=4, by_rows=True)
    assert staging_bytes(PROBLEM, whole) == staging_bytes(PROBLEM, Config("tuned", 128, 192, 4, buffers=2)) == 128 * 192 * 2
    assert smem_bytes(PROBLEM, shared_by_rows(PROBLEM, 256)) == 4 * (256 * 128 + 9216) + 3 * 64 * 256 + 128


def test_a_gated_pair_is_not_shared_by_rows() -> None:
    gated = dataclasses.replace(PROBLEM, epilogue=Epilogue("silu", gated=True))
    reason = "the gates and the ups of a tile shared by rows are in different warpgroups; share it by tokens"
    assert why_not(gated, Config(tile_rows=128, tile_tokens=128, by_rows=True)) == reason
    wide = dataclasses.replace(PROBLEM, out_dtype="fp32")
    assert "expected at least one and at most 1" in (why_not(wide, Config(tile_rows=128, tile_tokens=128, buffers=2, by_rows=True)) or "")


def test_the_model_offers_a_tile_shared_by_rows_where_it_may_win() -> None:
    down, square = Problem(512, 4096, 14336), Problem(2048, 2048, 2048)
    assert [c.tile for c in candidates(down) if c.by_rows] == [c.tile for c in candidates(square) if c.by_rows] == ["64+64x256x4x3"]
    assert not any(c.by_rows for c in candidates(Problem(512, 6144, 4096)))  # 120 tiles of 256 x 104 fill the wave
    assert {"256x128x4x2", "128x256x4"} <= {c.tile for c in candidates(square, limit=4)}


def test_chunks_staged_by_both_warpgroups_are_the_tile_the_copy_engine_stores() -> None:
    # A box is 64 outputs of a chunk of tokens; the copy engine finds 16-byte piece i of token t at i ^ t % 8.
    tokens = 64
    box = np.full((2, tokens * 128 // 4), -1)
    for half, warp in np.ndindex(2, 4):
        lane = np.arange(32)
        g, t = lane // 4, lane % 4
        byte = warp % 2 * 64 + g * 8 + half * 4
        for j, e in np.ndindex(tokens // 8, 2):
            place = (2 * t + e) * 128 + (byte // 16 ^ 2 * t + e) * 16 + byte % 16 + j * 1024
            assert (box[warp // 2, place // 4] == -1).all()
            # Two banks of four are written by a warpgroup, so 32 lanes take two passes, not more.
            assert np.bincount(place // 4 % 32, minlength=32).max() == 2
            box[warp // 2, place // 4] = (8 * j + 2 * t + e) * 128 + 32 * warp + 4 * g + 2 * half  # token and first of two outputs
    for outputs in range(2):
        for token, piece in np.ndindex(tokens, 8):
            words = box[outputs, (token * 128 + (piece ^ token % 8) * 16) // 4 + np.arange(4)]
            assert words.tolist() == [token * 128 + 64 * outputs + 8 * piece + 2 * w for w in range(4)]
