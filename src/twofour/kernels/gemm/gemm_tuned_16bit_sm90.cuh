// D[tokens, outputs] = epilogue(X . W^T), computed as D^T: W (2:4 or dense, packed) is operand A, X is operand B, tokens are columns.
// One producer warp keeps a ring of stages filled with bulk copies; two warpgroups multiply; thread blocks are persistent.
#pragma once

#include "schedule.cuh"
#include "wgmma_sm90.cuh"

namespace twofour {

template <int kTileRows_, int kTileTokens_, int kStages_, bool kSparse_, bool kBf16_, int kLead_>
struct TileChoice {
    static constexpr int kTileRows = kTileRows_;
    static constexpr int kTileTokens = kTileTokens_;
    static constexpr int kStages = kStages_;
    static constexpr bool kSparse = kSparse_;
    static constexpr bool kBf16 = kBf16_;
    static constexpr int kLead = kLead_;  // stages by which the first warpgroup runs ahead, so that its stores overlap the other's products

    using A = Block<kSparse>;
    static constexpr int kRowBlocks = kTileRows / A::kRows;
    static constexpr int kWarpgroupTokens = kTileRows == 256 ? kTileTokens : kTileTokens / 2;
    static constexpr int kSums = kWarpgroupTokens / 2;  // accumulators a thread and 64 rows
    static constexpr int kActivationBytes = kTileTokens * A::kDepth * 2;
    static constexpr int kStageBytes = kActivationBytes + kRowBlocks * A::kBytes;
    using Instruction = Wgmma<kWarpgroupTokens, kSparse, kBf16>;

    static_assert(kTileRows == 256 || kTileRows == 128, "a tile has one or two packed blocks of rows");
    static_assert(kStageBytes % 1024 == 0, "a swizzled tile starts at a multiple of 1024 bytes");
    static_assert(kTileTokens <= 256, "a tensor-map box has at most 256 rows");
    static_assert(kLead < kStages - 1, "the warpgroup ahead must leave the other a stage to read");
};

constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kFlagBytes = 4096;

struct Ring {
    uint32 stages;  // shared addresses
    uint32 full;
    uint32 empty;
    int index = 0;
    uint32 parity = 0;

    __device__ __forceinline__ void advance(int count) {
        if (++index == count) index = 0, parity ^= 1;
    }
};

template <class T>
__device__ __forceinline__ void produce(const GemmParams& p, Ring ring) {
    using A = typename T::A;
    WorkList work(p);
    Unit unit;
    while (work.next(p, unit)) {
        const Place place(p, unit.tile);
        const int token = place.token_tile * T::kTileTokens;
        // NOTE: a tile that ends behind the last packed block reads its first block twice; the second's sums are never stored
        const int first = place.row_tile * T::kRowBlocks;
        const int block = first * p.k_blocks;
        const int second = first + 1 < p.row_blocks ? block + p.k_blocks : block;
#pragma unroll 1
        for (int k = unit.first_k; k < unit.last_k; ++k) {
            barrier_wait(ring.empty + 8 * ring.index, ring.parity ^ 1);
            const uint32 full = ring.full + 8 * ring.index;
            const uint32 stage = ring.stages + ring.index * T::kStageBytes;
            barrier_arrive_expecting(full, T::kStageBytes);
            copy_bulk(stage + T::kActivationBytes, p.weight + static_cast<uint64>(block + k) * A::kBytes, A::kBytes, full);
            if constexpr (T::kRowBlocks == 2)
                copy_bulk(stage + T::kActivationBytes + A::kBytes, p.weight + static_cast<uint64>(second + k) * A::kBytes, A::kBytes, full);
            copy_box(stage, &p.x, k * A::kDepth, token, full);
            ring.advance(T::kStages);
        }
    }
}

// Wait for a stage and start its products; `metadata` must not be in use by products still in flight.
template <class T>
__device__ __forceinline__ void multiply_stage(const Ring& ring, int warpgroup, float (&sums)[2][T::kSums], uint32 (&metadata)[4], int accumulate) {
    using A = typename T::A;
    const uint32 stage = ring.stages + ring.index * T::kStageBytes;
    const uint32 weight = stage + T::kActivationBytes + (T::kTileRows == 256 ? warpgroup * A::kBytes : 0);
    const uint32 tokens = stage + (T::kTileRows == 256 ? 0 : warpgroup * T::kWarpgroupTokens * 128);
    barrier_wait(ring.full + 8 * ring.index, ring.parity);
    if constexpr (T::kSparse) {
        // Lanes 0 and 1 of a quad contribute metadata; the other two read the same words.
        const uint32 lane = threadIdx.x % 32;
        load_shared(metadata, weight + A::kValueBytes + ((threadIdx.x % kWarpgroup) / 32 * 16 + lane / 4 * 2 + lane % 2) * 16);
    }
    constexpr uint32 kRowBytes = T::kSparse ? 64 : 128;
    const uint64 a = matrix_descriptor(weight, 8 * kRowBytes, T::kSparse ? kSwizzle64 : kSwizzle128);
    const uint64 b = matrix_descriptor(tokens, 1024, kSwizzle128);
    constexpr int kSteps = A::kDepth / T::Instruction::kDepth;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            // Descriptors count 16-byte units: 64 rows further for m, 32 bytes of A and kDepth values of B further for s.
            T::Instruction::multiply(sums[m], a + (m * 64 * kRowBytes + s * 32) / 16, b + s * T::Instruction::kDepth * 2 / 16,
                                     metadata[T::kSparse ? m * 2 + s : 0], s == 0 ? accumulate : 1);
        }
    }
    wgmma_commit();
}

// All products of a unit. Each stage is given back once the next one's products have been issued and its own are done.
template <class T>
__device__ __forceinline__ void multiply_unit(Ring& ring, int warpgroup, int k_blocks, float (&sums)[2][T::kSums]) {
    uint32 even[4], odd[4];  // NOTE: two metadata sets; one set, reloaded while products read it, makes ptxas serialise every wgmma (C7513)
    uint32 previous = 0;
    const bool gives_back = threadIdx.x % 32 == 0;
    const auto step = [&](uint32(&metadata)[4], bool is_first) {
        multiply_stage<T>(ring, warpgroup, sums, metadata, !is_first);
        wgmma_wait<1>();
        if (!is_first && gives_back) barrier_arrive(previous);
        previous = ring.empty + 8 * ring.index;
        ring.advance(T::kStages);
    };
    int k = 0;
    for (; k + 2 <= k_blocks; k += 2) {
        step(even, k == 0);
        step(odd, false);
    }
    if (k < k_blocks) step(even, k == 0);
    wgmma_wait<0>();
    hold_accumulators(sums[0]);
    hold_accumulators(sums[1]);
    if (gives_back) barrier_arrive(previous);
}

// Where a warpgroup's partial sums of one thread block lie: float4 [sums / 4][128 threads], two row halves.
template <class T>
__device__ __forceinline__ float4* partial_sums(const GemmParams& p, int block, int warpgroup) {
    constexpr int kVectors = 2 * T::kSums / 4 * kWarpgroup;
    return reinterpret_cast<float4*>(p.workspace + kFlagBytes) + static_cast<long long>(block * 2 + warpgroup) * kVectors + threadIdx.x % kWarpgroup;
}

template <class T>
__device__ __forceinline__ void write_partial(const GemmParams& p, int warpgroup, const float (&sums)[2][T::kSums]) {
    float4* out = partial_sums<T>(p, blockIdx.x, warpgroup);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int i = 0; i < T::kSums; i += 4) {
            __stcg(out, make_float4(sums[m][i], sums[m][i + 1], sums[m][i + 2], sums[m][i + 3]));
            out += kWarpgroup;
        }
    }
    __threadfence();
    sync_threads(1 + warpgroup, kWarpgroup);
    if (threadIdx.x % kWarpgroup == 0) store_release(reinterpret_cast<uint32*>(p.workspace) + blockIdx.x * 2 + warpgroup, 1);
}

// Add, in order of the inputs, what the following blocks computed of this tile; leaves their flags zero for the next launch.
template <class T>
__device__ __forceinline__ void add_partials(const GemmParams& p, int warpgroup, int tile, float (&sums)[2][T::kSums]) {
    const int tile_end = (tile - p.whole_tiles + 1) * p.k_blocks;
    for (int block = blockIdx.x + 1; block < p.split_blocks && WorkList::share_begin(p, block) < tile_end; ++block) {
        uint32* flag = reinterpret_cast<uint32*>(p.workspace) + block * 2 + warpgroup;
        if (threadIdx.x % kWarpgroup == 0) {
            while (load_acquire(flag) == 0) __nanosleep(40);
            *flag = 0;
        }
        sync_threads(1 + warpgroup, kWarpgroup);
        const float4* in = partial_sums<T>(p, block, warpgroup);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
#pragma unroll
            for (int i = 0; i < T::kSums; i += 4) {
                const float4 part = __ldcg(in);
                in += kWarpgroup;
                sums[m][i] += part.x, sums[m][i + 1] += part.y, sums[m][i + 2] += part.z, sums[m][i + 3] += part.w;
            }
        }
    }
}

// Epilogue of a warpgroup's 128 rows: a thread holds rows 32 warp + 4 g + {0..3} of tokens 8 j + 2 t + {0, 1}.
template <class T, class E>
__device__ __forceinline__ void store_tile(const GemmParams& p, int warpgroup, const Place& place, const float (&sums)[2][T::kSums]) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kWarpgroup / 32;
    const int row = place.row_tile * T::kTileRows + (T::kTileRows == 256 ? warpgroup * 128 : 0) + warp * 32 + lane / 4 * 4;
    const int token = place.token_tile * T::kTileTokens + (T::kTileRows == 256 ? 0 : warpgroup * T::kWarpgroupTokens) + lane % 4 * 2;
    if (row >= p.weight_rows) return;
    RowConstants<E> constants;
    constants.load(p, row);
#pragma unroll
    for (int j = 0; j < T::kWarpgroupTokens / 8; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float four[4] = {sums[0][4 * j + e], sums[0][4 * j + 2 + e], sums[1][4 * j + e], sums[1][4 * j + 2 + e]};
            if (token + 8 * j + e < p.tokens) finish<E>(p, constants, row, token + 8 * j + e, four);
        }
    }
}

template <class T, class E>
__device__ __forceinline__ void consume(const GemmParams& p, Ring ring, int warpgroup) {
    WorkList work(p);
    Unit unit;
    float sums[2][T::kSums];
    bool is_first = true;
    while (work.next(p, unit)) {
        const int k_blocks = unit.last_k - unit.first_k;
        if (is_first && warpgroup == 1 && k_blocks > T::kLead) barrier_wait(ring.full + 8 * T::kLead, 0);
        is_first = false;
        multiply_unit<T>(ring, warpgroup, k_blocks, sums);
        if (unit.first_k != 0) {
            write_partial<T>(p, warpgroup, sums);
            continue;
        }
        if (unit.last_k != p.k_blocks) add_partials<T>(p, warpgroup, unit.tile, sums);
        store_tile<T, E>(p, warpgroup, Place(p, unit.tile), sums);
    }
}

template <class T, class E>
__device__ __forceinline__ void gemm_tuned(const GemmParams& p) {
    extern __shared__ __align__(1024) uint8 shared[];
    Ring ring;
    ring.stages = shared_address(shared);
    ring.full = ring.stages + T::kStages * T::kStageBytes;
    ring.empty = ring.full + 8 * T::kStages;
    if (threadIdx.x == 0) {
        prefetch_map(&p.x);
        for (int i = 0; i < T::kStages; ++i) {
            barrier_init(ring.full + 8 * i, 1);
            barrier_init(ring.empty + 8 * i, 2 * kWarpgroup / 32);
        }
        barrier_init_fence();
    }
    __syncthreads();
    let_next_grid_start();
    wait_for_earlier_grid();
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);
    if (warpgroup == 2) {
        give_registers<24>();
        if (threadIdx.x == 2 * kWarpgroup) produce<T>(p, ring);
    } else {
        take_registers<240>();
        consume<T, E>(p, ring, warpgroup);
    }
}

}  // namespace twofour
