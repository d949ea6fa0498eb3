// D[tokens, outputs] = epilogue(X . W^T), computed as D^T: W (2:4 or dense, packed) is operand A, X is operand B, tokens are columns.
// One producer warp keeps a ring of stages filled with bulk copies; two warpgroups multiply; thread blocks are persistent.
#pragma once

#include "schedule.cuh"
#include "wgmma_sm90.cuh"

namespace twofour {

template <int kTileRows_, int kTileTokens_, int kStages_, int kChunks_, int kBuffers_, bool kSparse_, bool kBf16_, bool kByRows_ = false>
struct TileChoice {
    static constexpr int kTileRows = kTileRows_;
    static constexpr int kTileTokens = kTileTokens_;
    static constexpr int kStages = kStages_;
    static constexpr int kChunks = kChunks_;  // in which a warpgroup's staged outputs leave
    static constexpr int kBuffers = kBuffers_;  // for staged outputs
    static constexpr bool kSparse = kSparse_;
    static constexpr bool kBf16 = kBf16_;
    static constexpr bool kByRows = kByRows_;  // the warpgroups share 128 rows by rows, 64 each and all tokens

    using A = Block<kSparse>;
    static constexpr int kRowBlocks = kTileRows / A::kRows;
    static constexpr int kHalves = kByRows ? 1 : 2;  // of 64 rows, multiplied by a warpgroup
    static constexpr int kWarpgroupTokens = kTileRows == 256 || kByRows ? kTileTokens : kTileTokens / 2;
    static constexpr int kSums = kWarpgroupTokens / 2;  // accumulators a thread and 64 rows
    static constexpr int kActivationBytes = kTileTokens * A::kDepth * 2;
    static constexpr int kStageBytes = kActivationBytes + kRowBlocks * A::kBytes;
    using Instruction = Wgmma<kWarpgroupTokens, kSparse, kBf16>;

    static_assert(kTileRows == 256 || kTileRows == 128, "a tile has one or two packed blocks of rows");
    static_assert(!kByRows || kTileRows == 128, "two warpgroups share one packed block of rows");
    static_assert(kStageBytes % 1024 == 0, "a swizzled tile starts at a multiple of 1024 bytes");
    static_assert(kTileTokens <= 256, "a tensor-map box has at most 256 rows");
    static_assert(kWarpgroupTokens % (8 * kChunks) == 0, "a stored box starts where the swizzle repeats, every eight tokens");
    static_assert(kStages >= 3, "one stage is multiplied, one drained and one filled at a time");
};

constexpr int kWarpgroup = 128;
constexpr int kThreads = 3 * kWarpgroup;
constexpr int kFlagBytes = 4096;

// Whose turn it is of `count`, and how often all had theirs, modulo two.
struct Turn {
    int index = 0;
    uint32 parity = 0;

    __device__ __forceinline__ void advance(int count) {
        if (++index == count) index = 0, parity ^= 1;
    }
};

struct Ring : Turn {
    uint32 stages;  // shared addresses
    uint32 full;
    uint32 empty;
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
__device__ __forceinline__ void multiply_stage(const Ring& ring, int warpgroup, float (&sums)[T::kHalves][T::kSums],
                                               uint32 (&metadata)[2 * T::kHalves], int accumulate) {
    using A = typename T::A;
    const uint32 stage = ring.stages + ring.index * T::kStageBytes;
    const uint32 weight = stage + T::kActivationBytes + (T::kTileRows == 256 ? warpgroup * A::kBytes : 0);
    const uint32 tokens = stage + (T::kTileRows == 256 || T::kByRows ? 0 : warpgroup * T::kWarpgroupTokens * 128);
    barrier_wait(ring.full + 8 * ring.index, ring.parity);
    if constexpr (T::kSparse) {
        // Lanes 0 and 1 of a quad contribute metadata; the other two read the same words: two of each half of 64 rows.
        const uint32 lane = threadIdx.x % 32;
        const uint32 words = weight + A::kValueBytes + ((threadIdx.x % kWarpgroup) / 32 * 16 + lane / 4 * 2 + lane % 2) * 16;
        if constexpr (T::kByRows) load_shared(metadata[0], metadata[1], words + warpgroup * 8);
        else load_shared(metadata, words);
    }
    constexpr uint32 kRowBytes = T::kSparse ? 64 : 128;
    const uint32 rows = weight + (T::kByRows ? warpgroup * 64 * kRowBytes : 0);
    const uint64 a = matrix_descriptor(rows, 8 * kRowBytes, T::kSparse ? kSwizzle64 : kSwizzle128);
    const uint64 b = matrix_descriptor(tokens, 1024, kSwizzle128);
    constexpr int kSteps = A::kDepth / T::Instruction::kDepth;
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int m = 0; m < T::kHalves; ++m) {
            // Descriptors count 16-byte units: 64 rows further for m, 32 bytes of A and kDepth values of B further for s.
            T::Instruction::multiply(sums[m], a + (m * 64 * kRowBytes + s * 32) / 16, b + s * T::Instruction::kDepth * 2 / 16,
                                     metadata[T::kSparse ? m * 2 + s : 0], s == 0 ? accumulate : 1);
        }
    }
    wgmma_commit();
}

// All products of a unit. Each stage is given back once the next one's products have been issued and its own are done.
template <class T>
__device__ __forceinline__ void multiply_unit(Ring& ring, int warpgroup, int k_blocks, float (&sums)[T::kHalves][T::kSums]) {
    // NOTE: two metadata sets; one set, reloaded while products read it, makes ptxas serialise every wgmma (C7513)
    uint32 even[2 * T::kHalves], odd[2 * T::kHalves];
    uint32 previous = 0;
    const bool gives_back = threadIdx.x % 32 == 0;
    const auto step = [&](uint32(&metadata)[2 * T::kHalves], bool is_first) {
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
#pragma unroll
    for (int m = 0; m < T::kHalves; ++m) hold_accumulators(sums[m]);
    if (gives_back) barrier_arrive(previous);
}

// Where a warpgroup's partial sums of one thread block lie: float4 [sums / 4][128 threads], one half of 64 rows behind the other.
template <class T>
__device__ __forceinline__ float4* partial_sums(const GemmParams& p, int block, int warpgroup) {
    constexpr int kVectors = T::kHalves * T::kSums / 4 * kWarpgroup;
    return reinterpret_cast<float4*>(p.workspace + kFlagBytes) + static_cast<long long>(block * 2 + warpgroup) * kVectors + threadIdx.x % kWarpgroup;
}

template <class T>
__device__ __forceinline__ void write_partial(const GemmParams& p, int warpgroup, const float (&sums)[T::kHalves][T::kSums]) {
    float4* out = partial_sums<T>(p, blockIdx.x, warpgroup);
#pragma unroll
    for (int m = 0; m < T::kHalves; ++m) {
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
__device__ __forceinline__ void add_partials(const GemmParams& p, int warpgroup, int tile, float (&sums)[T::kHalves][T::kSums]) {
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
        for (int m = 0; m < T::kHalves; ++m) {
#pragma unroll
            for (int i = 0; i < T::kSums; i += 4) {
                const float4 part = __ldcg(in);
                in += kWarpgroup;
                sums[m][i] += part.x, sums[m][i + 1] += part.y, sums[m][i + 2] += part.z, sums[m][i + 3] += part.w;
            }
        }
    }
}

// How outputs of 16 bits leave: they are staged in shared memory, and a warp of its own hands them to the copy engine in chunks while the next
// tile is multiplied. With one buffer the warpgroups take turns, which keeps them apart, so that one multiplies while the other stages. With
// two each has a buffer and a warp that stores it: nobody waits at the end of a block's only tile, and where a residual is added, that of the
// next tile arrives there while it is multiplied. Of a tile shared by rows each warpgroup has two of every four neighbouring outputs, so every
// chunk is staged by both; it is stored when both have, and the next chunk takes the next buffer of one chunk.
// NOTE: stored straight from registers, all thread blocks wait for the L2 at the same moment: 2.8 us a tile on the H200, 7 % at 4096 inputs.
template <class T, class E>
struct Staging {
    static constexpr bool kUsed = E::kOutput != Output::kFp32;
    static constexpr bool kLoads = kUsed && E::kResidual;
    static constexpr bool kOwn = kUsed && T::kBuffers == 2 && !T::kByRows;
    static constexpr int kBoxes = E::kGated ? 1 : 2;  // of 64 outputs
    static constexpr int kChunkTokens = T::kWarpgroupTokens / T::kChunks;
    static constexpr int kChunkBytes = kChunkTokens * 128;
    static constexpr int kBoxBytes = T::kByRows ? kChunkBytes : T::kWarpgroupTokens * 128;
    static constexpr int kBufferBytes = kBoxes * kBoxBytes;
    static constexpr int kBytes = kUsed ? T::kBuffers * kBufferBytes : 0;
    static_assert(kOwn || !kLoads || (T::kByRows && T::kBuffers == T::kChunks), "a residual arrives where only its own outputs are staged");
    static_assert(!T::kByRows || !E::kGated, "two warpgroups hold the gates and the ups of a tile shared by rows");

    uint32 buffer;  // shared addresses
    uint32 filled;  // one barrier a buffer
    uint32 free;    // two barriers: it is the first, the second warpgroup's turn; its residual is there. By rows the same of each buffer
};


// First row and token of a warpgroup's part of a tile.
template <class T>
struct Corner {
    int row;
    int token;

    __device__ __forceinline__ Corner(const GemmParams& p, int tile, int warpgroup) {
        const Place place(p, tile);
        row = place.row_tile * T::kTileRows + (T::kTileRows == 256 ? warpgroup * 128 : 0);
        token = place.token_tile * T::kTileTokens + (T::kTileRows == 256 || T::kByRows ? 0 : warpgroup * T::kWarpgroupTokens);
    }
};

template <class T, class E>
__device__ __forceinline__ void store_staged_tiles(const GemmParams& p, const Staging<T, E>& staging) {
    using S = Staging<T, E>;
    WorkList work(p);
    Unit unit;
    uint32 parity = 0;
    while (work.next(p, unit)) {
        if (unit.first_k != 0) continue;
#pragma unroll 1
        for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
            const Corner<T> corner(p, unit.tile, warpgroup);
            const int output = E::kGated ? corner.row / 2 : corner.row;
            barrier_wait(staging.filled, parity);
#pragma unroll 1
            for (int c = 0; c < T::kChunks; ++c) {
                const uint32 chunk = staging.buffer + c * S::kChunkTokens * 128;
                const int token = corner.token + c * S::kChunkTokens;
                if (output < p.outputs) store_box(&p.d_map, chunk, output, token);
                if (S::kBoxes == 2 && output + 64 < p.outputs) store_box(&p.d_map, chunk + S::kBoxBytes, output + 64, token);
                store_commit();
                store_wait_read<0>();
            }
            barrier_arrive(staging.free + 8 * (warpgroup ^ 1));
            parity ^= 1;
        }
    }
}

// The next unit of a thread block that ends in outputs; false behind the last.
__device__ __forceinline__ bool next_stored(WorkList& work, const GemmParams& p, Unit& unit) {
    while (work.next(p, unit)) {
        if (unit.first_k == 0) return true;
    }
    return false;
}

// The same for a warpgroup that owns its buffer. Where a residual is added, that of the next tile takes the place of each chunk that has left.
// NOTE: a buffer is given with the arrival, not with the bytes: there may be none to wait for while what lay there is still leaving.
template <class T, class E>
__device__ __forceinline__ void store_own_tiles(const GemmParams& p, const TensorMap* residual, const Staging<T, E>& staging, int warpgroup) {
    using S = Staging<T, E>;
    const uint32 buffer = staging.buffer + warpgroup * S::kBufferBytes, free = staging.free + 8 * warpgroup;
    const auto load = [&](const Corner<T>& corner, int c) {
        const int token = corner.token + c * S::kChunkTokens;
        // Boxes wholly outside D are not asked for.
        if (token >= p.tokens || corner.row >= p.outputs) return;
        const bool both = corner.row + 64 < p.outputs;
        barrier_expect(free, both ? 2 * S::kChunkBytes : S::kChunkBytes);
        copy_box(buffer + c * S::kChunkBytes, residual, corner.row, token, free);
        if (both) copy_box(buffer + S::kBoxBytes + c * S::kChunkBytes, residual, corner.row + 64, token, free);
    };
    WorkList work(p);
    Unit unit;
    bool more = next_stored(work, p, unit);
    if (S::kLoads && more) {
        const Corner<T> corner(p, unit.tile, warpgroup);
#pragma unroll 1
        for (int c = 0; c < T::kChunks; ++c) load(corner, c);
        barrier_arrive(free);
    }
    uint32 parity = 0;
    while (more) {
        const Corner<T> corner(p, unit.tile, warpgroup);
        const int output = E::kGated ? corner.row / 2 : corner.row;
        more = next_stored(work, p, unit);
        const Corner<T> following(p, unit.tile, warpgroup);
        barrier_wait(staging.filled + 8 * warpgroup, parity);
        parity ^= 1;
#pragma unroll 1
        for (int c = 0; c < T::kChunks; ++c) {
            const uint32 chunk = buffer + c * S::kChunkBytes;
            const int token = corner.token + c * S::kChunkTokens;
            if (output < p.outputs) store_box(&p.d_map, chunk, output, token);
            if (S::kBoxes == 2 && output + 64 < p.outputs) store_box(&p.d_map, chunk + S::kBoxBytes, output + 64, token);
            store_commit();
            if constexpr (S::kLoads) {
                store_wait_read<0>();
                if (more) load(following, c);
            }
        }
        store_wait_read<0>();
        if (more) barrier_arrive(free);
    }
}

// The same for tiles shared by rows, a chunk at a time. Where a residual is added there is a buffer for each chunk of a tile.
template <class T, class E>
__device__ __forceinline__ void store_shared_tiles(const GemmParams& p, const TensorMap* residual, const Staging<T, E>& staging) {
    using S = Staging<T, E>;
    const auto load = [&](const Corner<T>& corner, int c, int index) {
        const uint32 chunk = staging.buffer + index * S::kBufferBytes, free = staging.free + 8 * index;
        const int token = corner.token + c * S::kChunkTokens;
        if (token < p.tokens) {
            const bool both = corner.row + 64 < p.outputs;
            barrier_expect(free, both ? 2 * S::kBoxBytes : S::kBoxBytes);
            copy_box(chunk, residual, corner.row, token, free);
            if (both) copy_box(chunk + S::kBoxBytes, residual, corner.row + 64, token, free);
        }
        barrier_arrive(free);
    };
    WorkList work(p);
    Unit unit;
    bool more = next_stored(work, p, unit);
    if (S::kLoads && more) {
        const Corner<T> corner(p, unit.tile, 0);
#pragma unroll 1
        for (int c = 0; c < T::kChunks; ++c) load(corner, c, c);
    }
    Turn turn;
    while (more) {
        const Corner<T> corner(p, unit.tile, 0);
        more = next_stored(work, p, unit);
        const Corner<T> following(p, unit.tile, 0);
#pragma unroll 1
        for (int c = 0; c < T::kChunks; ++c) {
            const uint32 chunk = staging.buffer + turn.index * S::kBufferBytes;
            const int token = corner.token + c * S::kChunkTokens;
            barrier_wait(staging.filled + 8 * turn.index, turn.parity);
            store_box(&p.d_map, chunk, corner.row, token);
            if (corner.row + 64 < p.outputs) store_box(&p.d_map, chunk + S::kBoxBytes, corner.row + 64, token);
            store_commit();
            store_wait_read<0>();
            if constexpr (!S::kLoads) barrier_arrive(staging.free + 8 * turn.index);
            else if (more) load(following, c, turn.index);
            turn.advance(T::kBuffers);
        }
    }
}

// A thread's four neighbouring rows of its token i: accumulators of column pair i / 2, member i % 2.
struct FourRows {
    float sums[4];
};
template <class T>
__device__ __forceinline__ FourRows four_rows(const float (&sums)[T::kHalves][T::kSums], int i) {
    const int at = i / 2 * 4 + i % 2;
    return {{sums[0][at], sums[0][at + 2], sums[1][at], sums[1][at + 2]}};
}

// Epilogue of a warpgroup's 128 rows: a thread holds rows 32 warp + 4 g + {0..3} of tokens 8 j + 2 t + {0, 1}.
template <class T, class E>
__device__ __forceinline__ void store_tile(const GemmParams& p, const Staging<T, E>& staging, int warpgroup, int tile, uint32 turn,
                                           const float (&sums)[T::kHalves][T::kSums]) {
    using S = Staging<T, E>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32, g = lane / 4, t = lane % 4;
    const Corner<T> corner(p, tile, warpgroup);
    const int row = corner.row + warp * 32 + g * 4;
    const bool is_inside = row < p.weight_rows;
    RowConstants<E> constants;
    constants.load(p, is_inside ? row : 0);
    if constexpr (S::kUsed) {
        // A token is one swizzled row of 128 bytes in a box; two warps share a box, all four when gated.
        const int byte = E::kGated ? warp * 32 + g * 4 : warp % 2 * 64 + g * 8;
        const uint32 buffer = staging.buffer + (S::kOwn ? warpgroup * S::kBufferBytes : 0);
        uint32 at[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            at[e] = buffer + (E::kGated ? 0 : warp / 2 * S::kBoxBytes) + (2 * t + e) * 128 + ((byte / 16) ^ (2 * t + e)) * 16 + byte % 16;
        }
        // Before its first turn a warpgroup finds its own buffer free, the first the common one; the second waits for the first's to have left.
        // Residuals are waited for.
        barrier_wait(staging.free + 8 * warpgroup, S::kLoads ? turn : S::kOwn ? turn ^ 1 : turn ^ warpgroup ^ 1);
#pragma unroll
        for (int i = 0; i < T::kSums / 2; ++i) {
            // NOTE: a point the compiler schedules nothing across; without it, loads and functions of many tokens overlap and registers spill
            if (i % 4 == 0) __syncwarp();
            const uint32 place = at[i % 2] + i / 2 * 1024;
            Finished<E>(constants, place, four_rows<T>(sums, i).sums).store_staged(place);
        }
        fence_shared_for_copies();
        barrier_arrive(staging.filled + (S::kOwn ? 8 * warpgroup : 0));
    } else {
#pragma unroll
        for (int i = 0; i < T::kSums / 2; ++i) {
            if (i % 4 == 0) __syncwarp();
            const int token = corner.token + i / 2 * 8 + 2 * t + i % 2;
            if (is_inside && token < p.tokens) finish<E>(p, constants, row, token, four_rows<T>(sums, i).sums);
        }
    }
}

// A thread's two neighbouring rows of its token i, of a tile shared by rows.
struct TwoRows {
    float sums[2];
};
template <class T>
__device__ __forceinline__ TwoRows two_rows(const float (&sums)[1][T::kSums], int i) {
    const int at = i / 2 * 4 + i % 2;
    return {{sums[0][at], sums[0][at + 2]}};
}

// Epilogue of a warpgroup's half of a tile shared by rows: a thread holds rows 32 warp + 4 g + 2 warpgroup + {0, 1} of tokens 8 j + 2 t + {0, 1}.
template <class T, class E>
__device__ __forceinline__ void store_half(const GemmParams& p, const Staging<T, E>& staging, int warpgroup, int tile, Turn& turn,
                                           const float (&sums)[1][T::kSums]) {
    using S = Staging<T, E>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32, g = lane / 4, t = lane % 4;
    const Corner<T> corner(p, tile, warpgroup);
    const int row = corner.row + warp * 32 + g * 4 + warpgroup * 2;
    const bool is_inside = row < p.weight_rows;
    RowConstants<E, 2> constants;
    constants.load(p, is_inside ? row : 0);
    if constexpr (S::kUsed) {
        // As in `store_tile`. NOTE: a warp's four bytes a thread lie in every second bank, so each store takes two passes
        const int byte = warp % 2 * 64 + g * 8 + warpgroup * 4;
        uint32 at[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            at[e] = staging.buffer + warp / 2 * S::kBoxBytes + (2 * t + e) * 128 + ((byte / 16) ^ (2 * t + e)) * 16 + byte % 16;
        }
        constexpr int kPairs = S::kChunkTokens / 4;  // of rows, a thread and chunk
#pragma unroll
        for (int c = 0; c < T::kChunks; ++c) {
            // A buffer is free before its first turn; residuals are waited for.
            barrier_wait(staging.free + 8 * turn.index, S::kLoads ? turn.parity : turn.parity ^ 1);
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
                // NOTE: as in `store_tile`
                if (i % 4 == 0) __syncwarp();
                const uint32 place = at[i % 2] + turn.index * S::kBufferBytes + i / 2 * 1024;
                Finished<E, 2>(constants, place, two_rows<T>(sums, c * kPairs + i).sums).store_staged(place);
            }
            fence_shared_for_copies();
            barrier_arrive(staging.filled + 8 * turn.index);
            turn.advance(T::kBuffers);
        }
    } else {
#pragma unroll
        for (int i = 0; i < T::kSums / 2; ++i) {
            if (i % 4 == 0) __syncwarp();
            const int token = corner.token + i / 2 * 8 + 2 * t + i % 2;
            if (is_inside && token < p.tokens) finish<E>(p, constants, row, token, two_rows<T>(sums, i).sums);
        }
    }
}

template <class T, class E>
__device__ __forceinline__ void consume(const GemmParams& p, Ring ring, const Staging<T, E>& staging, int warpgroup) {
    WorkList work(p);
    Unit unit;
    float sums[T::kHalves][T::kSums];
    uint32 turn = 0;
    Turn buffer_turn;
    while (work.next(p, unit)) {
        multiply_unit<T>(ring, warpgroup, unit.last_k - unit.first_k, sums);
        if (unit.first_k != 0) {
            write_partial<T>(p, warpgroup, sums);
            continue;
        }
        if (unit.last_k != p.k_blocks) add_partials<T>(p, warpgroup, unit.tile, sums);
        if constexpr (T::kByRows) {
            store_half<T, E>(p, staging, warpgroup, unit.tile, buffer_turn, sums);
        } else {
            store_tile<T, E>(p, staging, warpgroup, unit.tile, turn, sums);
            turn ^= 1;
        }
    }
}

template <class T, class E>
__device__ __forceinline__ void gemm_tuned(const GemmParams& p, const TensorMap* residual = nullptr) {
    extern __shared__ __align__(1024) uint8 shared[];
    constexpr bool kLoads = Staging<T, E>::kLoads;
    Ring ring;
    Staging<T, E> staging;
    ring.stages = shared_address(shared);
    staging.buffer = ring.stages + T::kStages * T::kStageBytes;
    ring.full = staging.buffer + Staging<T, E>::kBytes;
    ring.empty = ring.full + 8 * T::kStages;
    staging.filled = ring.empty + 8 * T::kStages;
    staging.free = staging.filled + 8 * T::kBuffers;
    if (threadIdx.x == 0) {
        prefetch_map(&p.x);
        if constexpr (Staging<T, E>::kUsed) prefetch_map(&p.d_map);
        if constexpr (Staging<T, E>::kLoads) prefetch_map(residual);
        for (int i = 0; i < T::kStages; ++i) {
            barrier_init(ring.full + 8 * i, 1);
            barrier_init(ring.empty + 8 * i, 2 * kWarpgroup / 32);
        }
        for (int i = 0; i < T::kBuffers; ++i) barrier_init(staging.filled + 8 * i, T::kByRows ? 2 * kWarpgroup : kWarpgroup);
        for (int i = 0; i < (T::kByRows ? T::kBuffers : 2); ++i) barrier_init(staging.free + 8 * i, 1);
        barrier_init_fence();
    }
    __syncthreads();
    let_next_grid_start();
    wait_for_earlier_grid();
    const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / kWarpgroup, 0);
    if (warpgroup == 2) {
        give_registers<kLoads ? 40 : 24>();
        if (threadIdx.x == 2 * kWarpgroup) produce<T>(p, ring);
        if constexpr (Staging<T, E>::kUsed && T::kByRows) {
            if (threadIdx.x == 2 * kWarpgroup + 32) store_shared_tiles<T, E>(p, residual, staging);
        } else if constexpr (Staging<T, E>::kOwn) {
            if (threadIdx.x == 2 * kWarpgroup + 32) store_own_tiles<T, E>(p, residual, staging, 0);
            if (threadIdx.x == 2 * kWarpgroup + 64) store_own_tiles<T, E>(p, residual, staging, 1);
        } else if (Staging<T, E>::kUsed && threadIdx.x == 2 * kWarpgroup + 32) {
            store_staged_tiles<T, E>(p, staging);
        }
    } else {
        take_registers<kLoads ? 232 : 240>();
        consume<T, E>(p, ring, staging, warpgroup);
    }
}

}  // namespace twofour
