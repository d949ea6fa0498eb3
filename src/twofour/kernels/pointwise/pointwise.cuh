// out[i] = program(in_0[i], in_1[i], ...): a chain of element-wise operations over broadcast operands, fp32 arithmetic.
// The program, the types and the number of axes are compile-time integers; sizes and strides are launch arguments.
#pragma once

#include "operations.cuh"

namespace twofour {

constexpr int kMostInputs = 6;
constexpr int kMostAxes = 8;
constexpr int kTile = 32;

// Laid out like kernels/pointwise/launch.py packs it.
struct PointwiseParams {
    const void* in[kMostInputs];
    void* out;
    int64 groups;                                  // iterations: groups of elements, or squares
    int64 strides[kMostInputs + 1][kMostAxes];     // elements a step along an axis; the output's row is the last
    int64 shape[kMostAxes];                        // iterations along each axis
    int64 turn_size;                               // elements along the axis that is turned
    int64 last_size;                               // elements along the last axis
    Divisor by[kMostAxes];                         // of shape
};

// Instructions of 7 integers: operation, then kind and value of three operands; the last integer is padding.
template <int... kIntegers>
struct Program {
    static constexpr int kWidth = 7;
    static constexpr int kSteps = sizeof...(kIntegers) / kWidth;
    static constexpr int codes[] = {kIntegers..., 0};
};

// Types of the inputs, in order; the last is the output's.
template <int kRank_, unsigned kSpread_, unsigned kTurned_, Type... kTypes>
struct Signature {
    static constexpr int kRank = kRank_;
    static constexpr unsigned kSpread = kSpread_;  // bit i: input i has one value for a whole group
    static constexpr unsigned kTurned = kTurned_;  // bit i: input i is turned in shared memory
    static constexpr int kInputs = sizeof...(kTypes) - 1;
    static constexpr Type types[] = {kTypes...};
    static_assert(kInputs >= 1 && kInputs <= kMostInputs && kRank >= 1 && kRank <= kMostAxes, "inputs and axes within the parameter block");
};

// Operand kPlace of instruction kStep: an input, an earlier value or a constant.
template <class P, int kStep, int kPlace, int kInputs>
__device__ __forceinline__ float operand(const float (&in)[kInputs], const float* values) {
    constexpr int kKind = P::codes[P::kWidth * kStep + 1 + 2 * kPlace];
    constexpr int kValue = P::codes[P::kWidth * kStep + 2 + 2 * kPlace];
    if constexpr (kKind == 0) return in[kValue];
    if constexpr (kKind == 1) return values[kValue];
    return __int_as_float(kValue);
}

template <class P, bool kFast, int kStep, int kInputs>
__device__ __forceinline__ float evaluate_from(const float (&in)[kInputs], float* values) {
    if constexpr (P::kSteps == 0) {
        return in[0];
    } else {
        constexpr Op kOp = static_cast<Op>(P::codes[P::kWidth * kStep]);
        const float a = operand<P, kStep, 0>(in, values);
        if constexpr (kOp == Op::kCast) {
            values[kStep] = rounded<static_cast<Type>(P::codes[P::kWidth * kStep + 4])>(a);
        } else {
            values[kStep] = operate<kOp, kFast>(a, operand<P, kStep, 1>(in, values), operand<P, kStep, 2>(in, values));
        }
        if constexpr (kStep + 1 < P::kSteps) return evaluate_from<P, kFast, kStep + 1>(in, values);
        return values[kStep];
    }
}

template <class P, bool kFast, int kInputs>
__device__ __forceinline__ float evaluate(const float (&in)[kInputs]) {
    float values[P::kSteps + 1];
    return evaluate_from<P, kFast, 0>(in, values);
}

constexpr int kMostWords = 16;  // of eight 64-bit elements

// Load input kInput of one group as raw bits; a spread one loads a single element.
template <class S, int kVector, int kInput, class Offset>
__device__ __forceinline__ void load_inputs(const PointwiseParams& p, const Offset (&offsets)[S::kInputs + 1], uint32 (&words)[S::kInputs][kMostWords]) {
    if constexpr (kInput < S::kInputs) {
        Packet<S::types[kInput], (S::kSpread >> kInput & 1) ? 1 : kVector> packet;
        packet.load(p.in[kInput], offsets[kInput]);
#pragma unroll
        for (int i = 0; i < packet.kWords; ++i) words[kInput][i] = packet.words[i];
        load_inputs<S, kVector, kInput + 1>(p, offsets, words);
    }
}

// Element `element` of every input as fp32.
template <class S, int kVector, int kInput>
__device__ __forceinline__ void convert_inputs(const uint32 (&words)[S::kInputs][kMostWords], int element, float (&in)[S::kInputs]) {
    if constexpr (kInput < S::kInputs) {
        constexpr bool kSpread = S::kSpread >> kInput & 1;
        Packet<S::types[kInput], kSpread ? 1 : kVector> packet;
#pragma unroll
        for (int i = 0; i < packet.kWords; ++i) packet.words[i] = words[kInput][i];
        in[kInput] = packet.get(kSpread ? 0 : element);
        convert_inputs<S, kVector, kInput + 1>(words, element, in);
    }
}

// Coordinates of iteration `group` along every axis.
template <int kRank, bool kWide, class Offset>
__device__ __forceinline__ void locate(const PointwiseParams& p, Offset group, Offset (&place)[kRank]) {
#pragma unroll
    for (int axis = kRank - 1; axis > 0; --axis) {
        const Offset rest = Index<kWide>::divide(group, p.shape[axis], p.by[axis]);
        place[axis] = group - rest * static_cast<Offset>(p.shape[axis]);
        group = rest;
    }
    place[0] = group;
}

template <class P, class S, bool kRaw, int kVector, int kRepeat, bool kWide>
__device__ __forceinline__ void pointwise(const PointwiseParams& p) {
    using Offset = typename Index<kWide>::type;
    constexpr Type kOut = S::types[S::kInputs];
    constexpr bool kFast = kSizeOf<kOut> == 2;
    const Offset groups = static_cast<Offset>(p.groups), step = static_cast<Offset>(gridDim.x) * blockDim.x;
    wait_for_earlier_grid();
    for (int64 base = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; base < p.groups; base += static_cast<int64>(step) * kRepeat) {
        // Put the loads of all repeats in flight.
        uint32 words[kRepeat][S::kInputs][kMostWords];
        Offset out[kRepeat];
#pragma unroll
        for (int r = 0; r < kRepeat; ++r) {
            if (base + static_cast<int64>(r) * step >= p.groups) continue;
            Offset place[S::kRank], offsets[S::kInputs + 1];
            locate<S::kRank, kWide>(p, static_cast<Offset>(base) + r * step, place);
#pragma unroll
            for (int i = 0; i <= S::kInputs; ++i) {
                offsets[i] = 0;
#pragma unroll
                for (int axis = 0; axis < S::kRank; ++axis) {
                    offsets[i] += place[axis] * static_cast<Offset>(p.strides[i == S::kInputs ? kMostInputs : i][axis]);
                }
            }
            out[r] = offsets[S::kInputs];
            load_inputs<S, kVector, 0>(p, offsets, words[r]);
        }
        // Compute and store.
#pragma unroll
        for (int r = 0; r < kRepeat; ++r) {
            if (base + static_cast<int64>(r) * step >= p.groups) continue;
            Packet<kOut, kVector> packet;
            if constexpr (kRaw) {
                constexpr bool kOne = S::kSpread & 1;
                constexpr int kSize = kSizeOf<kOut>;
#pragma unroll
                for (int i = 0; i < packet.kWords; ++i) {
                    packet.words[i] = !kOne ? words[r][0][i] : kSize == 8 ? words[r][0][i % 2] : words[r][0][0] * (kSize == 4 ? 1u : kSize == 2 ? 0x10001u : 0x1010101u);
                }
            } else {
                float y[kVector];
#pragma unroll
                for (int element = 0; element < kVector; ++element) {
                    float in[S::kInputs];
                    convert_inputs<S, kVector, 0>(words[r], element, in);
                    y[element] = evaluate<P, kFast>(in);
                }
                packet.set(y);
            }
            packet.store(p.out, out[r]);
        }
    }
    let_next_grid_start();
}

// Which of the turned inputs input kInput is.
template <class S>
__host__ __device__ constexpr int turned_before(int input) {
    int count = 0;
    for (int i = 0; i < input; ++i) count += S::kTurned >> i & 1;
    return count;
}

// Read a square of every turned input along its own rows.
template <class S, int kInput, class Word, class Offset>
__device__ __forceinline__ void load_squares(const PointwiseParams& p, const Offset (&corner)[S::kInputs + 1], int rows, int columns, Word (*squares)[kTile][kTile + 1]) {
    if constexpr (kInput < S::kInputs) {
        if constexpr (S::kTurned >> kInput & 1) {
            const int row = threadIdx.x % kTile;
#pragma unroll
            for (int column = threadIdx.x / kTile; column < kTile; column += 8) {
                if (row < rows && column < columns) {
                    Packet<S::types[kInput], 1> packet;
                    packet.load(p.in[kInput], corner[kInput] + row + column * static_cast<Offset>(p.strides[kInput][S::kRank - 1]));
                    if constexpr (sizeof(Word) == 8) squares[0][column][row] = static_cast<uint64>(packet.words[1 % packet.kWords]) << 32 | packet.words[0];
                    else if constexpr (sizeof(Word) < 4) squares[0][column][row] = static_cast<Word>(packet.words[0]);
                    else squares[turned_before<S>(kInput)][column][row] = static_cast<Word>(packet.kWords == 2 ? __float_as_uint(packet.get(0)) : packet.words[0]);
                }
            }
        }
        load_squares<S, kInput + 1>(p, corner, rows, columns, squares);
    }
}

// Every input at one place as fp32: turned ones from their square, the others from memory.
template <class S, int kInput, int kAxis, class Offset>
__device__ __forceinline__ void gather(const PointwiseParams& p, const Offset (&corner)[S::kInputs + 1], int row, int column, const uint32 (*squares)[kTile][kTile + 1], float (&in)[S::kInputs]) {
    if constexpr (kInput < S::kInputs) {
        Packet<S::types[kInput], 1> packet;
        if constexpr (S::kTurned >> kInput & 1) {
            const uint32 word = squares[turned_before<S>(kInput)][column][row];
            packet.words[0] = word;
            in[kInput] = packet.kWords == 2 ? __uint_as_float(word) : packet.get(0);
        } else {
            packet.load(p.in[kInput], corner[kInput] + row * static_cast<Offset>(p.strides[kInput][kAxis]) + column * static_cast<Offset>(p.strides[kInput][S::kRank - 1]));
            in[kInput] = packet.get(0);
        }
        gather<S, kInput + 1, kAxis>(p, corner, row, column, squares, in);
    }
}

template <int kBytes>
struct WordOf {
    using type = uint32;
};
template <>
struct WordOf<8> {
    using type = uint64;
};
template <>
struct WordOf<2> {
    using type = uint16;
};
template <>
struct WordOf<1> {
    using type = uint8;
};

// 256 threads turn squares of 32 by 32 elements: rows along kAxis, columns along the last axis.
template <class P, class S, bool kRaw, int kAxis, bool kWide>
__device__ __forceinline__ void pointwise_tiled(const PointwiseParams& p) {
    using Offset = typename Index<kWide>::type;
    constexpr Type kOut = S::types[S::kInputs];
    constexpr int kSquares = turned_before<S>(S::kInputs);
    using Word = typename WordOf<kRaw ? kSizeOf<kOut> : 4>::type;
    __shared__ Word squares[kSquares][kTile][kTile + 1];
    wait_for_earlier_grid();
    for (int64 square = blockIdx.x; square < p.groups; square += gridDim.x) {
        Offset place[S::kRank], corner[S::kInputs + 1];
        locate<S::kRank, kWide>(p, static_cast<Offset>(square), place);
        place[kAxis] *= kTile;
        place[S::kRank - 1] *= kTile;
#pragma unroll
        for (int i = 0; i <= S::kInputs; ++i) {
            corner[i] = 0;
#pragma unroll
            for (int axis = 0; axis < S::kRank; ++axis) corner[i] += place[axis] * static_cast<Offset>(p.strides[i == S::kInputs ? kMostInputs : i][axis]);
        }
        const int rows = static_cast<int>(min(static_cast<int64>(kTile), p.turn_size - place[kAxis]));
        const int columns = static_cast<int>(min(static_cast<int64>(kTile), p.last_size - place[S::kRank - 1]));
        load_squares<S, 0>(p, corner, rows, columns, squares);
        __syncthreads();
        const int column = threadIdx.x % kTile;
#pragma unroll
        for (int row = threadIdx.x / kTile; row < kTile; row += 8) {
            if (row < rows && column < columns) {
                const Offset at = corner[S::kInputs] + row * static_cast<Offset>(p.strides[kMostInputs][kAxis]) + column * static_cast<Offset>(p.strides[kMostInputs][S::kRank - 1]);
                if constexpr (kRaw) {
                    static_cast<Word*>(p.out)[at] = squares[0][column][row];
                } else {
                    float in[S::kInputs];
                    gather<S, 0, kAxis>(p, corner, row, column, squares, in);
                    const float y[1] = {evaluate<P, kSizeOf<kOut> == 2>(in)};
                    Packet<kOut, 1> packet;
                    packet.set(y);
                    packet.store(p.out, at);
                }
            }
        }
        __syncthreads();
    }
    let_next_grid_start();
}

}  // namespace twofour
