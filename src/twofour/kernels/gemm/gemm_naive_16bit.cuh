// The packed weight multiplied the obvious way: a thread decodes four neighbouring rows for one token. Checks packing and epilogue on a GPU.
#pragma once

#include "gemm_common_16bit.cuh"

namespace twofour {

// Bits of packed row `row` (in its block) and input `k` (in its block); zero where 2:4 pruned.
template <bool kSparse>
__device__ __forceinline__ uint16 packed_value(const uint8* block, int row, int k) {
    // weight row 32 warp + 4 g + 2 m + h is fragment row 64 m + 16 warp + 8 h + g
    const int warp = row / 32, g = row / 4 % 8, m = row / 2 % 2, h = row % 2;
    const int fragment = 64 * m + 16 * warp + 8 * h + g;
    if constexpr (!kSparse) {
        const int chunk = (k / 8) ^ (fragment % 8);
        return *reinterpret_cast<const uint16*>(block + fragment * 128 + chunk * 16 + k % 8 * 2);
    } else {
        const int step = k / 32, half = k / 16 % 2;
        const uint8* word = block + Block<true>::kValueBytes + (warp * 16 + g * 2 + half) * 16 + (m * 2 + step) * 4 + h * 2;
        const int nibble = *reinterpret_cast<const uint16*>(word) >> (k / 4 % 4 * 4) & 15;
        const int first = nibble & 3, second = nibble >> 2;
        if (k % 4 != first && k % 4 != second) return 0;
        const int kept = k / 4 * 2 + (k % 4 == second);
        const int chunk = (kept / 8) ^ (fragment / 2 % 4);
        return *reinterpret_cast<const uint16*>(block + fragment * 64 + chunk * 16 + kept % 8 * 2);
    }
}

// 256 threads: 8 quads of rows by 32 tokens.
template <bool kSparse, bool kBf16, class E>
__device__ __forceinline__ void gemm_naive(const GemmParams& p) {
    using A = Block<kSparse>;
    const int row = (blockIdx.x % p.row_tiles) * 32 + threadIdx.x % 8 * 4;
    const int token = blockIdx.x / p.row_tiles * 32 + threadIdx.x / 8;
    if (row >= p.weight_rows || token >= p.tokens) return;
    float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    for (int k = 0; k < p.inputs; ++k) {
        const uint8* block = p.weight + (static_cast<long long>(row / A::kRows) * p.k_blocks + k / A::kDepth) * A::kBytes;
        const float x = to_float<kBf16>(p.x_values[static_cast<long long>(token) * p.inputs + k]);
        for (int i = 0; i < 4; ++i) {
            // NOTE: a pruned position is skipped, as the tensor cores skip it: an infinity or NaN there does not reach the output
            const uint16 bits = packed_value<kSparse>(block, row % A::kRows + i, k % A::kDepth);
            if (!kSparse || bits != 0) sums[i] += to_float<kBf16>(bits) * x;
        }
    }
    RowConstants<E> constants;
    constants.load(p, row);
    finish<E>(p, constants, row, token, sums);
}

}  // namespace twofour
