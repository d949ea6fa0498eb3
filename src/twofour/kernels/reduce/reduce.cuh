// Sums over an axis and normalisations along the last one, in fp32.
#pragma once

#include "values.cuh"

namespace twofour {

// Laid out like kernels/reduce/launch.py packs it.
struct ReduceParams {
    const void* x;
    void* y;
    const float* scale;  // [length]
    const float* bias;   // [length]
    int64 rows;
    int64 x_pitch;  // elements from line to line of x
    int64 y_pitch;  // elements from row to row of y
    int length;
    int inner;
    int column_blocks;
    float eps;
    float one_over_length;
    Divisor by_column_blocks;
};

enum class Kind { kMean, kSum, kMax, kL2, kSoftmax, kLayernorm, kRmsnorm };

// What is accumulated over the elements of a row: their sum, the sum of their squares, or the largest.
template <Kind kKind>
struct Accumulate {
    static constexpr bool kIsMax = kKind == Kind::kMax || kKind == Kind::kSoftmax;
    __device__ static __forceinline__ float neutral() { return kIsMax ? -infinity() : 0.0f; }
    __device__ static __forceinline__ float join(float a, float b) { return kIsMax ? larger(a, b) : a + b; }
    __device__ static __forceinline__ float term(float x) { return kKind == Kind::kL2 || kKind == Kind::kRmsnorm ? x * x : x; }
};

// What is stored of a finished sum.
template <Kind kKind>
__device__ __forceinline__ float finished(const ReduceParams& p, float total) {
    if constexpr (kKind == Kind::kMean) return total * p.one_over_length;
    if constexpr (kKind == Kind::kL2) return sqrtf(total);
    return total;
}

// Join a value of kThreads neighbouring threads; all of them get the result. More than a warp: the whole block must take part.
template <int kThreads, class J>
__device__ __forceinline__ float join_threads(float value, const J& join) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) value = join(value, __shfl_xor_sync(0xffffffffu, value, distance));
    if constexpr (kThreads > 32) {
        __shared__ float of_warps[kThreads / 32];
        __syncthreads();
        if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
        __syncthreads();
        value = of_warps[0];
#pragma unroll
        for (int warp = 1; warp < kThreads / 32; ++warp) value = join(value, of_warps[warp]);
    }
    return value;
}

template <Type kIn_, Type kOut_, int kVector_, int kThreads_, int kKept_, bool kScale_, bool kBias_>
struct RowChoice {
    static constexpr Type kIn = kIn_;
    static constexpr Type kOut = kOut_;
    static constexpr int kVector = kVector_;
    static constexpr int kThreads = kThreads_;  // that share a row
    static constexpr int kKept = kKept_;        // vectors a thread keeps; 0: the row is read again for each pass
    static constexpr bool kScale = kScale_;
    static constexpr bool kBias = kBias_;
};

// One row: the thread's share of it, kept in registers or read again.
template <class C>
struct Row {
    static constexpr int kHeld = C::kKept > 0 ? C::kKept : 1;
    const ReduceParams& p;
    int64 begin;
    int lane;
    float held[kHeld][C::kVector];

    __device__ __forceinline__ Row(const ReduceParams& params, int64 row, int thread) : p(params), begin(row * params.x_pitch), lane(thread) {
        if constexpr (C::kKept > 0) {
#pragma unroll
            for (int i = 0; i < C::kKept; ++i) {
                const int at = (i * C::kThreads + lane) * C::kVector;
                if (at < p.length) read(at, held[i]);
            }
        }
    }

    __device__ __forceinline__ void read(int at, float (&values)[C::kVector]) const {
        Packet<C::kIn, C::kVector> packet;
        packet.load(p.x, begin + at);
#pragma unroll
        for (int j = 0; j < C::kVector; ++j) values[j] = packet.get(j);
    }

    // Call visit(position, values) for each of the thread's vectors.
    template <class V>
    __device__ __forceinline__ void each(const V& visit) {
        if constexpr (C::kKept > 0) {
#pragma unroll
            for (int i = 0; i < C::kKept; ++i) {
                const int at = (i * C::kThreads + lane) * C::kVector;
                if (at < p.length) visit(at, held[i]);
            }
        } else {
            for (int at = lane * C::kVector; at < p.length; at += C::kThreads * C::kVector) {
                read(at, held[0]);
                visit(at, held[0]);
            }
        }
    }
};

// A row is reduced or normalised by kThreads threads; with fewer than 128, a block holds several rows.
template <Kind kKind, class C>
__device__ __forceinline__ void reduce_rows(const ReduceParams& p) {
    using A = Accumulate<kKind>;
    constexpr int kVector = C::kVector;
    const int lane = threadIdx.x % C::kThreads;
    const int64 rows_a_block = blockDim.x / C::kThreads;
    wait_for_earlier_grid();
    for (int64 row = blockIdx.x * rows_a_block + threadIdx.x / C::kThreads; row < p.rows; row += gridDim.x * rows_a_block) {
        Row<C> line(p, row, lane);
        float total = A::neutral();
        line.each([&](int, const float(&x)[kVector]) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) total = A::join(total, A::term(x[j]));
        });
        total = join_threads<C::kThreads>(total, A::join);

        if constexpr (kKind == Kind::kMean || kKind == Kind::kSum || kKind == Kind::kMax || kKind == Kind::kL2) {
            if (lane == 0) {
                const float y[1] = {finished<kKind>(p, total)};
                Packet<C::kOut, 1> packet;
                packet.set(y);
                packet.store(p.y, row * p.y_pitch);
            }
        } else {
            // y = (x - shift) * factor, times scale, plus bias; softmax: exp(x - shift) * factor
            const auto add = [](float a, float b) { return a + b; };
            float shift = 0.0f, factor;
            if constexpr (kKind == Kind::kSoftmax) {
                shift = total;
                float sum = 0.0f;
                line.each([&](int, float(&x)[kVector]) {
#pragma unroll
                    for (int j = 0; j < kVector; ++j) {
                        const float e = __expf(x[j] - shift);
                        sum += e;
                        if (C::kKept > 0) x[j] = e;
                    }
                });
                factor = 1.0f / join_threads<C::kThreads>(sum, add);
            } else if constexpr (kKind == Kind::kLayernorm) {
                shift = total * p.one_over_length;
                float squares = 0.0f;
                line.each([&](int, const float(&x)[kVector]) {
#pragma unroll
                    for (int j = 0; j < kVector; ++j) squares += (x[j] - shift) * (x[j] - shift);
                });
                factor = rsqrtf(join_threads<C::kThreads>(squares, add) * p.one_over_length + p.eps);
            } else {
                factor = rsqrtf(total * p.one_over_length + p.eps);
            }
            line.each([&](int at, const float(&x)[kVector]) {
                float y[kVector];
                Packet<Type::kFp32, kVector> scale, bias;
                if constexpr (C::kScale) scale.load(p.scale, at);
                if constexpr (C::kBias) bias.load(p.bias, at);
#pragma unroll
                for (int j = 0; j < kVector; ++j) {
                    if constexpr (kKind == Kind::kSoftmax) {
                        y[j] = (C::kKept > 0 ? x[j] : __expf(x[j] - shift)) * factor;
                    } else {
                        y[j] = (x[j] - shift) * factor;
                        if constexpr (C::kScale) y[j] *= scale.get(j);
                        if constexpr (C::kBias) y[j] += bias.get(j);
                    }
                }
                Packet<C::kOut, kVector> packet;
                packet.set(y);
                packet.store(p.y, row * p.y_pitch + at);
            });
        }
    }
    let_next_grid_start();
}

// x [rows, length, inner] reduced over length: kThreads threads side by side along inner, the block's others share length.
template <Kind kKind, Type kIn, Type kOut, int kVector, int kThreads>
__device__ __forceinline__ void reduce_columns(const ReduceParams& p) {
    using A = Accumulate<kKind>;
    constexpr int kBlock = 256, kShares = kBlock / kThreads, kUnroll = 4;
    __shared__ float partial[kShares > 1 ? kShares : 1][kThreads * kVector];
    const int beside = threadIdx.x % kThreads, share = threadIdx.x / kThreads;
    wait_for_earlier_grid();
    for (int64 block = blockIdx.x; block < p.rows * p.column_blocks; block += gridDim.x) {
        const int64 row = block / p.column_blocks;
        const int column = (static_cast<int>(block - row * p.column_blocks) * kThreads + beside) * kVector;
        const bool works = column < p.inner;
        float total[kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) total[j] = A::neutral();
        if (works) {
            // Several lines in flight, then the rest.
            int line = share;
            for (; line + (kUnroll - 1) * kShares < p.length; line += kUnroll * kShares) {
                Packet<kIn, kVector> packets[kUnroll];
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) packets[u].load(p.x, (row * p.length + line + u * kShares) * p.x_pitch + column);
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
                    for (int j = 0; j < kVector; ++j) total[j] = A::join(total[j], A::term(packets[u].get(j)));
                }
            }
            for (; line < p.length; line += kShares) {
                Packet<kIn, kVector> packet;
                packet.load(p.x, (row * p.length + line) * p.x_pitch + column);
#pragma unroll
                for (int j = 0; j < kVector; ++j) total[j] = A::join(total[j], A::term(packet.get(j)));
            }
        }
        // Join the shares in their order.
        if constexpr (kShares > 1) {
#pragma unroll
            for (int j = 0; j < kVector; ++j) partial[share][beside * kVector + j] = total[j];
            __syncthreads();
            if (share == 0) {
                for (int other = 1; other < kShares; ++other) {
#pragma unroll
                    for (int j = 0; j < kVector; ++j) total[j] = A::join(total[j], partial[other][beside * kVector + j]);
                }
            }
            __syncthreads();
        }
        if (share == 0 && works) {
            float y[kVector];
#pragma unroll
            for (int j = 0; j < kVector; ++j) y[j] = finished<kKind>(p, total[j]);
            Packet<kOut, kVector> packet;
            packet.set(y);
            packet.store(p.y, row * p.y_pitch + column);
        }
    }
    let_next_grid_start();
}

}  // namespace twofour
