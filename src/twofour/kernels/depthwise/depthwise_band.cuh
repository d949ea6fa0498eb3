// Stride 1 on tensor cores. For one channel and one row r of the window, eight output columns of 16 lines of X are a matrix product:
//     Y[m, j] += sum_k X[m, k] B_r[k, j],  B_r[k, j] = W[r, k - j], zero outside the window,  k = 0 .. 15
// A block brings the lines of some channels into shared memory, each channel's as a plane of its own; a warp computes one channel at a time
// and leaves the result in that channel's plane, from where the block stores it.
// NOTE: zeros of B_r meet X up to 15 columns away, so an infinity or NaN there makes a NaN.
#pragma once

#include "depthwise_common.cuh"

namespace twofour {

// What a block computes: kTiles times 8 output columns of kBlocks times kRows output rows of kImages images. Row m of the product is a
// position: (image, row block, tile), the last one fastest; all rows of a row block have the same row of the product.
template <class W, int kChannels_, int kImages_, int kBlocks_, int kRows_, int kTiles_>
struct Area {
    static constexpr int kChannels = kChannels_;
    static constexpr int kImages = kImages_;
    static constexpr int kBlocks = kBlocks_;
    static constexpr int kRows = kRows_;
    static constexpr int kTiles = kTiles_;
    static constexpr int kThreads = 8 * kChannels;
    static constexpr int kPositions = kImages * kBlocks * kTiles;
    static constexpr int kLines = kBlocks * kRows + W::kHeight - 1;  // of X, of an image
    static constexpr int kPairs = 4 * kTiles + 4;                    // words of a line: pairs of neighbouring columns
    static constexpr int kPlane = kImages * kLines * kPairs;         // words of a channel
    static constexpr int kGroup = 8 * kPlane + 256 / kChannels;      // words of eight channels; a warp moves pieces of as many banks at once
    static constexpr int kTaps = W::kHeight * W::kWidth;
    static constexpr int kTapBytes = 2 * (kChannels + 8);            // of one tap of all channels; eight neighbouring taps lie in other banks
    static_assert(kPositions <= 16, "a product has 16 rows");
    static_assert(W::kWidth <= 9 && W::kDown == 1 && W::kAcross == 1, "eight output columns read 16 columns of X");
    static_assert(kChannels == 16 || kChannels == 32, "a pixel is read in pieces of eight channels");

    __device__ static __forceinline__ int plane(int channel) { return channel / 8 * kGroup + channel % 8 * kPlane; }
    // Word of the first line and column of a position.
    __device__ static __forceinline__ int corner(int position) {
        position = position < kPositions ? position : 0;
        const int line = position / kTiles / kBlocks * kLines + position / kTiles % kBlocks * kRows;
        return line * kPairs + position % kTiles * 4;
    }
};

// 9.7.14.5.15 ldmatrix: four 8x8 matrices of 16-bit elements, lane l gives the address of row l % 8 of matrix l / 8
__device__ __forceinline__ void load_matrices(uint32 (&words)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// 9.7.14.5.14 mma: d[16, 8] += a[16, 16] b[16, 8]
template <bool kBf16>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32 (&a)[4], const uint32 (&b)[2]) {
    if constexpr (kBf16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// The lower and the upper halves of two words.
__device__ __forceinline__ uint32 lower_halves(uint32 a, uint32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ uint32 upper_halves(uint32 a, uint32 b) { return __byte_perm(a, b, 0x7632); }

template <Type kType, class W, class E, class A>
__device__ __forceinline__ void band(const DepthwiseParams& p) {
    constexpr bool kBf16 = kType == Type::kBf16;
    constexpr int kGroups = A::kChannels / 8;             // of eight channels
    constexpr int kSlots = A::kThreads / kGroups;         // pairs of columns that the block moves at a time
    constexpr int kTogether = 8;                          // moves of a thread in flight
    static_assert(A::kTaps <= kSlots, "a thread brings a piece of one tap at most");
    static_assert(!E::kResidual, "the sums are rounded before they meet an image");
    extern __shared__ __align__(16) uint8 memory[];
    uint8* const taps = memory;
    uint32* const planes = reinterpret_cast<uint32*>(memory + A::kTaps * A::kTapBytes);

    wait_for_earlier_grid();
    // Where the block works.
    const int block = static_cast<int>(blockIdx.x);
    const int strips = p.by_channel_groups.divide(block);
    const int first_channel = (block - strips * p.channel_groups) * A::kChannels;
    const int chunks = p.by_strips.divide(strips);
    const int column = (strips - chunks * p.strips) * 8 * A::kTiles;
    const int images = p.by_chunks.divide(chunks);
    const int row = (chunks - images * p.chunks) * A::kBlocks * A::kRows;
    const int first_image = images * A::kImages;
    const int top = row - p.top, left = column - p.left;

    // A thread moves eight channels; of the taps at most one piece, which arrives beside the lines.
    const int group = static_cast<int>(threadIdx.x) % kGroups, slot = static_cast<int>(threadIdx.x) / kGroups;
    const int channel = first_channel + 8 * group;
    uint32 piece[4];
    load_wanted(piece, static_cast<const uint16*>(p.weight) + static_cast<int64>(slot) * p.channels + channel, slot < A::kTaps && channel < p.channels);

    // Bring the lines, each pair of columns split into its channels; zeros outside the images.
    uint32* const own = planes + group * A::kGroup;
    for (int base = slot; base < A::kPlane; base += kSlots * kTogether) {
        uint32 even[kTogether][4], odd[kTogether][4];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int word = base + i * kSlots;
            const int line = word / A::kPairs, j = 2 * (word % A::kPairs);
            const int n = first_image + line / A::kLines, h = top + line % A::kLines, w = left + j;
            const bool here = word < A::kPlane && channel < p.channels && n < p.batch && static_cast<unsigned>(h) < static_cast<unsigned>(p.height);
            const int64 pixel = (static_cast<int64>(n) * p.height + h) * p.width + w;
            const uint16* from = static_cast<const uint16*>(p.x) + pixel * p.x_pitch + channel;
            load_wanted(even[i], from, here && j < 8 * A::kTiles + W::kWidth - 1 && static_cast<unsigned>(w) < static_cast<unsigned>(p.width));
            load_wanted(odd[i], from + p.x_pitch,
                        here && j + 1 < 8 * A::kTiles + W::kWidth - 1 && static_cast<unsigned>(w + 1) < static_cast<unsigned>(p.width));
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int word = base + i * kSlots;
            if (word >= A::kPlane) continue;
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                own[2 * c * A::kPlane + word] = lower_halves(even[i][c], odd[i][c]);
                own[(2 * c + 1) * A::kPlane + word] = upper_halves(even[i][c], odd[i][c]);
            }
        }
    }
    if (slot < A::kTaps) *reinterpret_cast<uint4*>(taps + slot * A::kTapBytes + 16 * group) = make_uint4(piece[0], piece[1], piece[2], piece[3]);
    __syncthreads();

    // Convolve: a warp has one channel at a time.
    const int lane = threadIdx.x % 32;
    // Of B_r the lane holds k = 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of column j = lane / 4: taps from 2 t - j on, or from 2 t + 8 - j on; one of the
    // two pairs lies outside the window.
    const int difference = 2 * (lane % 4) - lane / 4;
    const bool is_near = difference >= -1;
    const int tap = is_near ? difference : difference + 8;
    const uint32 lines = shared_address(planes) + 4 * (A::corner(lane % 16) + 4 * (lane / 16));
    for (int c = threadIdx.x / 32; c < A::kChannels && first_channel + c < p.channels; c += A::kThreads / 32) {
        uint32 weight[W::kHeight][2];
#pragma unroll
        for (int r = 0; r < W::kHeight; ++r) {
            const uint16* from = reinterpret_cast<const uint16*>(taps + (r * W::kWidth) * A::kTapBytes) + c;
            const uint32 low = tap >= 0 && tap < W::kWidth ? from[tap * (A::kTapBytes / 2)] : 0;
            const uint32 high = tap + 1 < W::kWidth ? from[(tap + 1) * (A::kTapBytes / 2)] : 0;
            const uint32 pair = low | high << 16;
            weight[r][0] = is_near ? pair : 0;
            weight[r][1] = is_near ? 0 : pair;
        }
        const float bias = E::kBias ? p.bias[first_channel + c] : 0.0f;
        float sums[A::kRows][4];
#pragma unroll
        for (int o = 0; o < A::kRows; ++o) {
#pragma unroll
            for (int v = 0; v < 4; ++v) sums[o][v] = bias;
        }
#pragma unroll
        for (int i = 0; i < A::kRows + W::kHeight - 1; ++i) {
            // With one row block, all lines of a step are the same row of their images.
            if (A::kBlocks == 1 && static_cast<unsigned>(top + i) >= static_cast<unsigned>(p.height)) continue;
            uint32 values[4];
            load_matrices(values, lines + 4 * (A::plane(c) + i * A::kPairs));
#pragma unroll
            for (int r = 0; r < W::kHeight; ++r) {
                if (i - r >= 0 && i - r < A::kRows) multiply<kBf16>(sums[i - r], values, weight[r]);
            }
        }
        // Every lane has read the plane.
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int position = lane / 4 + 8 * half;
            if (position >= A::kPositions) continue;
            uint32* to = planes + A::plane(c) + A::corner(position) + lane % 4;
#pragma unroll
            for (int o = 0; o < A::kRows; ++o) {
                to[o * A::kPairs] = pack_pair<kBf16>(activate<E>(sums[o][2 * half]), activate<E>(sums[o][2 * half + 1]));
            }
        }
    }
    __syncthreads();

    // Store, each pair of columns put together from its channels.
    constexpr int kOutPairs = 4 * A::kTiles, kOutRows = A::kBlocks * A::kRows;
    if (channel >= p.channels) return;
    for (int word = slot; word < A::kImages * kOutRows * kOutPairs; word += kSlots) {
        const int line = word / kOutPairs, j = 2 * (word % kOutPairs);
        const int image = line / kOutRows, n = first_image + image, o = line % kOutRows, q = column + j;
        if (n >= p.batch || row + o >= p.out_height || q >= p.out_width) continue;
        uint32 pairs[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) pairs[c] = own[c * A::kPlane + (image * A::kLines + o) * A::kPairs + j / 2];
        Packet<kType, 8> even, odd;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            even.words[c] = lower_halves(pairs[2 * c], pairs[2 * c + 1]);
            odd.words[c] = upper_halves(pairs[2 * c], pairs[2 * c + 1]);
        }
        const int64 to = ((static_cast<int64>(n) * p.out_height + row + o) * p.out_width + q) * p.y_pitch + channel;
        even.store(p.y, to);
        if (q + 1 < p.out_width) odd.store(p.y, to + p.y_pitch);
    }
    let_next_grid_start();
}

}  // namespace twofour
