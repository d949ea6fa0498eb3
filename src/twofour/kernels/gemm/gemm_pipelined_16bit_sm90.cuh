// The step between naive and tuned: one warpgroup a tile of 128 rows by 64 tokens, three stages of bulk copies, products drained every stage.
#pragma once

#include "gemm_common_16bit.cuh"
#include "wgmma_sm90.cuh"

namespace twofour {

template <bool kSparse, bool kBf16, class E>
__device__ __forceinline__ void gemm_pipelined(const GemmParams& p) {
    using A = Block<kSparse>;
    using Instruction = Wgmma<64, kSparse, kBf16>;
    constexpr int kStages = 3, kTokens = 64;
    constexpr int kActivationBytes = kTokens * A::kDepth * 2;
    constexpr int kStageBytes = kActivationBytes + A::kBytes;
    constexpr uint32 kRowBytes = kSparse ? 64 : 128;
    extern __shared__ __align__(1024) uint8 shared[];
    const uint32 stages = shared_address(shared);
    const uint32 full = stages + kStages * kStageBytes;
    const int row_block = blockIdx.x % p.row_tiles, token_tile = blockIdx.x / p.row_tiles;
    const uint8* weight = p.weight + static_cast<long long>(row_block) * p.k_blocks * A::kBytes;

    const auto load = [&](int k) {
        const uint32 stage = stages + k % kStages * kStageBytes, barrier = full + k % kStages * 8;
        barrier_arrive_expecting(barrier, kStageBytes);
        copy_bulk(stage + kActivationBytes, weight + static_cast<long long>(k) * A::kBytes, A::kBytes, barrier);
        copy_box(stage, &p.x, k * A::kDepth, token_tile * kTokens, barrier);
    };

    // Fill all stages but one.
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) barrier_init(full + 8 * i, 1);
        barrier_init_fence();
        for (int k = 0; k < min(kStages - 1, p.k_blocks); ++k) load(k);
    }
    __syncthreads();

    // Refill the stage drained last, then multiply the next one.
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[2][kTokens / 2];
    for (int k = 0; k < p.k_blocks; ++k) {
        if (threadIdx.x == 0 && k + kStages - 1 < p.k_blocks) load(k + kStages - 1);
        const uint32 stage = stages + k % kStages * kStageBytes;
        barrier_wait(full + k % kStages * 8, k / kStages % 2);
        uint32 metadata[4] = {};
        if constexpr (kSparse) load_shared(metadata, stage + kActivationBytes + A::kValueBytes + (warp * 16 + lane / 4 * 2 + lane % 2) * 16);
        const uint64 a = matrix_descriptor(stage + kActivationBytes, 8 * kRowBytes, kSparse ? kSwizzle64 : kSwizzle128);
        const uint64 b = matrix_descriptor(stage, 1024, kSwizzle128);
        wgmma_fence();
#pragma unroll
        for (int s = 0; s < A::kDepth / Instruction::kDepth; ++s) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                Instruction::multiply(sums[m], a + (m * 64 * kRowBytes + s * 32) / 16, b + s * Instruction::kDepth / 8,
                                      metadata[kSparse ? m * 2 + s : 0], k > 0 || s > 0);
            }
        }
        wgmma_commit();
        wgmma_wait<0>();
        hold_accumulators(sums[0]);
        hold_accumulators(sums[1]);
        __syncthreads();
    }

    // A thread holds rows 32 warp + 4 g + {0..3} of tokens 8 j + 2 t + {0, 1}.
    const int row = row_block * A::kRows + warp * 32 + lane / 4 * 4;
    if (row >= p.weight_rows) return;
    RowConstants<E> constants;
    constants.load(p, row);
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int token = token_tile * kTokens + 8 * j + lane % 4 * 2 + e;
            const float four[4] = {sums[0][4 * j + e], sums[0][4 * j + 2 + e], sums[1][4 * j + e], sums[1][4 * j + 2 + e]};
            if (token < p.tokens) finish<E>(p, constants, row, token, four);
        }
    }
}

}  // namespace twofour
