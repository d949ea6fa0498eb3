// A thread owns neighbouring channels of a strip of output columns and walks down the rows of X: a row is read once, and every output row
// that it takes part in is summed at the same time.
#pragma once

#include "depthwise_common.cuh"

namespace twofour {

// A thread's taps: registers, or its own place in shared memory. 9.7.9.8 ld.shared, 9.7.9.11 st.shared
// NOTE: shared memory by volatile text, or the compiler lifts the loads of all taps out of the walk and spills them.
template <int kTaps, int kVector, int kThreads, bool kHeld>
struct Taps {
    float values[kTaps][kVector];

    __device__ __forceinline__ explicit Taps(float*) {}
    __device__ __forceinline__ void put(int tap, const float (&from)[kVector]) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) values[tap][v] = from[v];
    }
    __device__ __forceinline__ void get(int tap, float (&to)[kVector]) const {
#pragma unroll
        for (int v = 0; v < kVector; ++v) to[v] = values[tap][v];
    }
};
template <int kTaps, int kVector, int kThreads>
struct Taps<kTaps, kVector, kThreads, false> {
    uint32 place;

    __device__ __forceinline__ explicit Taps(float* shared) : place(shared_address(shared + kVector * threadIdx.x)) {}
    __device__ __forceinline__ void put(int tap, const float (&from)[kVector]) {
#pragma unroll
        for (int v = 0; v < kVector; v += 2) {
            asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(place + 4 * (kVector * kThreads * tap + v)), "f"(from[v]), "f"(from[v + 1]));
        }
    }
    __device__ __forceinline__ void get(int tap, float (&to)[kVector]) const {
        const uint32 address = place + 4 * kVector * kThreads * tap;
        if constexpr (kVector == 2) {
            asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(to[0]), "=f"(to[1]) : "r"(address));
        } else {
            asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3]) : "r"(address));
        }
    }
};

// kHeld: the taps lie in registers.
template <Type kType, class W, class E, int kVector, int kColumns, bool kHeld, int kThreads, bool kWide>
__device__ __forceinline__ void walk(const DepthwiseParams& p) {
    using Offset = typename Index<kWide>::type;
    using Values = Packet<kType, kVector>;
    constexpr int kTaps = W::kHeight * W::kWidth;
    constexpr int kLive = (W::kHeight + W::kDown - 1) / W::kDown;   // output rows that a row of X takes part in, at most
    constexpr int kTurn = kLive * W::kDown;                         // rows of X after which an output row has the same registers again
    constexpr int kSpan = (kColumns - 1) * W::kAcross + W::kWidth;  // columns of X that a strip reads
    constexpr bool kSkips = W::kHeight > 3;                         // products of a whole row by zero, where a branch costs less
    static_assert(kSpan <= 32, "a strip's columns are bits of a word");
    static_assert(kVector == 2 || kVector == 4, "a pixel's channels are one or two words");

    wait_for_earlier_grid();
    const int64 group = static_cast<int64>(blockIdx.x) * kThreads + threadIdx.x;
    if (group >= p.groups) return;

    // Where the thread works.
    const Offset strips = Index<kWide>::divide(static_cast<Offset>(group), p.channel_groups, p.by_channel_groups);
    const int channel = static_cast<int>(group - static_cast<int64>(strips) * p.channel_groups) * kVector;
    const Offset chunks = Index<kWide>::divide(strips, p.strips, p.by_strips);
    const int column = static_cast<int>(strips - chunks * p.strips) * kColumns;
    const int64 image = Index<kWide>::divide(chunks, p.chunks, p.by_chunks);
    const int row = static_cast<int>(chunks - image * p.chunks) * p.rows;
    const int last = (min(p.rows, p.out_height - row) - 1) * W::kDown;  // the chunk's row of X where its last output row begins
    const int end = last + W::kHeight;
    const int top = row * W::kDown - p.top, left = column * W::kAcross - p.left;
    const int columns = p.out_width - column;
    uint32 inside = 0;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        if (static_cast<unsigned>(left + j) < static_cast<unsigned>(p.width)) inside |= 1u << j;
    }

    // Steps in bytes; pitches are below 2^29.
    const int x_step = 2 * static_cast<int>(p.x_pitch), y_step = 2 * static_cast<int>(p.y_pitch), residual_step = 2 * static_cast<int>(p.residual_pitch);
    const uint8* from = static_cast<const uint8*>(p.x) + 2 * (((image * p.height + top) * p.width + left) * p.x_pitch + channel);
    const int64 pixel = (image * p.out_height + row) * p.out_width + column;
    uint8* to = static_cast<uint8*>(p.y) + 2 * (pixel * p.y_pitch + channel);
    const uint8* addend = static_cast<const uint8*>(p.residual) + (E::kResidual ? 2 * (pixel * p.residual_pitch + channel) : 0);

    // Sends for row i of the chunk's rows of X.
    Values ahead[kSpan];
    const auto fetch = [&](int i) {
        const uint32 here = static_cast<unsigned>(top + i) < static_cast<unsigned>(p.height) ? inside : 0;
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
            if (j % W::kAcross < W::kWidth) load_wanted(ahead[j].words, from + static_cast<int64>(j) * x_step, here & 1u << j);
        }
    };
    fetch(0);

    // Its taps and addends.
    __shared__ alignas(16) float shared[kHeld ? 1 : kTaps * kThreads * kVector];
    Taps<kTaps, kVector, kThreads, kHeld> taps(shared);
#pragma unroll kHeld ? kTaps : 7
    for (int tap = 0; tap < kTaps; ++tap) {
        Values packed;
        packed.load(p.weight, static_cast<int64>(tap) * p.channels + channel);
        float weight[kVector];
#pragma unroll
        for (int v = 0; v < kVector; ++v) weight[v] = packed.get(v);
        taps.put(tap, weight);
    }
    float bias[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) bias[v] = E::kBias ? p.bias[channel + v] : 0.0f;

    float sums[kLive][kColumns][kVector] = {};
    for (int base = 0; base < end; base += kTurn) {
#pragma unroll
        for (int u = 0; u < kTurn; ++u) {
            const int i = base + u;
            if (i >= end) break;
            // Take the row, and send for the next one.
            float in[kSpan][kVector];
            if (u % W::kDown < W::kHeight) {
#pragma unroll
                for (int j = 0; j < kSpan; ++j) {
                    if (j % W::kAcross >= W::kWidth) continue;
#pragma unroll
                    for (int v = 0; v < kVector; ++v) in[j][v] = ahead[j].get(v);
                }
            }
            from += static_cast<int64>(p.width) * x_step;
            if ((u + 1) % W::kDown < W::kHeight && i + 1 < end) fetch(i + 1);

            // Add it to every output row that it takes part in; the first row of X brings the addend.
            const bool present = static_cast<unsigned>(top + i) < static_cast<unsigned>(p.height);
#pragma unroll
            for (int r = 0; r < W::kHeight; ++r) {
                if ((u - r + kTurn * W::kHeight) % W::kDown != 0) continue;
                const int o = (u - r + kTurn * W::kHeight) / W::kDown % kLive;
                if (kSkips && !(present && i >= r && i - r <= last)) {
#pragma unroll
                    for (int q = 0; q < kColumns; ++q) {
#pragma unroll
                        for (int v = 0; v < kVector; ++v) sums[o][q][v] = r == 0 ? bias[v] : sums[o][q][v];
                    }
                    continue;
                }
#pragma unroll
                for (int s = 0; s < W::kWidth; ++s) {
                    float weight[kVector];
                    taps.get(r * W::kWidth + s, weight);
#pragma unroll
                    for (int q = 0; q < kColumns; ++q) {
#pragma unroll
                        for (int v = 0; v < kVector; ++v) {
                            sums[o][q][v] = fmaf(in[q * W::kAcross + s][v], weight[v], r == 0 && s == 0 ? bias[v] : sums[o][q][v]);
                        }
                    }
                }
            }

            // Finish the output row that it was the last one for.
            if ((u + 1 + kTurn * W::kHeight - W::kHeight) % W::kDown == 0 && i >= W::kHeight - 1) {
                const int o = (u + 1 + kTurn * W::kHeight - W::kHeight) / W::kDown % kLive;
#pragma unroll
                for (int q = 0; q < kColumns; ++q) {
                    if (q >= columns) continue;
                    Values residual, result;
                    if constexpr (E::kResidual) residual.load(addend + static_cast<int64>(q) * residual_step, 0);
                    float y[kVector];
#pragma unroll
                    for (int v = 0; v < kVector; ++v) {
                        y[v] = sums[o][q][v];
                        if constexpr (E::kResidual) y[v] += residual.get(v);
                        y[v] = activate<E>(y[v]);
                    }
                    result.set(y);
                    result.store(to + static_cast<int64>(q) * y_step, 0);
                }
                to += static_cast<int64>(p.out_width) * y_step;
                if constexpr (E::kResidual) addend += static_cast<int64>(p.out_width) * residual_step;
            }
        }
    }
    let_next_grid_start();
}

}  // namespace twofour
