// What the three kernels of the family share: parameters, the packed block, the fused epilogue of four (or two) neighbouring rows.
#pragma once

#include "ptx_sm90.cuh"

namespace twofour {

// Exact division of 0 .. 2^31 - 1 by a run-time constant, as a product and a shift.
struct Divisor {
    uint32 multiplier;
    uint32 shift;

    __device__ __forceinline__ int divide(int value) const {
        return static_cast<int>((static_cast<uint64>(static_cast<uint32>(value)) * multiplier) >> shift);
    }
};

// Laid out like kernels/gemm/launch.py packs it.
struct alignas(64) GemmParams {
    TensorMap x;             // activations [tokens, inputs], box 64 inputs by a tile's tokens, 128-byte swizzle
    TensorMap d_map;         // outputs [tokens, outputs], box 64 outputs by a warpgroup's tokens, 128-byte swizzle
    const uint8* weight;     // packed blocks [row_blocks, k_blocks]
    void* d;                 // [tokens, outputs]
    const float* scale;      // [weight_rows]
    const float* bias;       // [weight_rows]
    const void* residual;    // [tokens, outputs]
    uint8* workspace;        // flags, then partial sums
    const uint16* x_values;  // the activations themselves, for the naive kernel
    int tokens;
    int outputs;
    int weight_rows;
    int inputs;
    int k_blocks;
    int row_blocks;
    int row_tiles;
    int token_tiles;
    int group;
    int whole_tiles;
    int split_blocks;
    int share_quotient;   // iterations of all split tiles over split_blocks
    int share_remainder;
    Divisor by_split_blocks;
    Divisor by_k_blocks;
    Divisor by_group_tiles;  // tiles of a whole group
    Divisor by_group;
    Divisor by_last_group;   // row tiles of the last group
};

// Of a tuned product that adds a residual of 16 bits.
struct alignas(64) ResidualGemmParams : GemmParams {
    TensorMap residual_map;  // as d_map
};

enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu, kHardswish, kRelu6 };
enum class Output { kBf16, kFp16, kFp32 };

template <Activation kActivation_, bool kScale_, bool kBias_, bool kResidual_, bool kGated_, Output kOutput_>
struct EpilogueChoice {
    static constexpr Activation kActivation = kActivation_;
    static constexpr bool kScale = kScale_;
    static constexpr bool kBias = kBias_;
    static constexpr bool kResidual = kResidual_;
    static constexpr bool kGated = kGated_;
    static constexpr Output kOutput = kOutput_;
    static_assert(!(kGated && kResidual), "a gated epilogue has no residual");
};

// One packed block: values, then metadata when sparse.
template <bool kSparse>
struct Block {
    static constexpr int kRows = 128;
    static constexpr int kDepth = 64;
    static constexpr int kValueBytes = kSparse ? 8192 : 16384;
    static constexpr int kBytes = kSparse ? kValueBytes + 1024 : kValueBytes;
};

// erf to 1.5e-7, without branches. Abramowitz and Stegun 1964, formula 7.1.26.
__device__ __forceinline__ float error_function(float x) {
    const float t = __fdividef(1.0f, 1.0f + 0.3275911f * fabsf(x));
    const float polynomial = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return copysignf(1.0f - polynomial * __expf(-x * x), x);
}

template <Activation kActivation>
__device__ __forceinline__ float activate(float x) {
    if constexpr (kActivation == Activation::kRelu) return x < 0.0f ? 0.0f : x;  // NOTE: unlike fmaxf, lets NaN through
    if constexpr (kActivation == Activation::kRelu6) return x < 0.0f ? 0.0f : x > 6.0f ? 6.0f : x;
    if constexpr (kActivation == Activation::kGelu) return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f));
    if constexpr (kActivation == Activation::kGeluTanh) {
        // x / (1 + exp(-2u)) is 0.5 x (1 + tanh u) without the cancellation
        const float u = 0.79788456080286536f * (x + 0.044715f * x * x * x);
        return __fdividef(x, 1.0f + __expf(-2.0f * u));
    }
    if constexpr (kActivation == Activation::kSilu) return __fdividef(x, 1.0f + __expf(-x));
    if constexpr (kActivation == Activation::kHardswish) {
        const float ramp = x + 3.0f;
        return x * (ramp < 0.0f ? 0.0f : ramp > 6.0f ? 6.0f : ramp) * (1.0f / 6.0f);
    }
    return x;
}

// scale and bias of a thread's weight rows, loaded once a tile
template <class E, int kRows = 4>
struct RowConstants {
    float scale[kRows];
    float bias[kRows];

    // `row` is the packed row; gated rows alternate two gates, two ups, whose vectors lie `outputs` apart.
    __device__ __forceinline__ void load(const GemmParams& p, int row) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int source = E::kGated ? (row >> 1) + (i & 1) + (i >> 1) * p.outputs : row + i;
            if constexpr (E::kScale) scale[i] = __ldg(p.scale + source);
            if constexpr (E::kBias) bias[i] = __ldg(p.bias + source);
        }
    }

    __device__ __forceinline__ float linear(float sum, int i) const {
        if constexpr (E::kScale) sum *= scale[i];
        if constexpr (E::kBias) sum += bias[i];
        return sum;
    }
};

// Values of D from neighbouring packed rows of one token: as many, or half of them when gated.
template <class E, int kRows = 4>
struct Finished {
    static constexpr int kCount = E::kGated ? kRows / 2 : kRows;
    static_assert(kRows == 4 || (kRows == 2 && !E::kGated), "two rows hold no pair of gates with its pair of ups");
    static constexpr bool kBf16 = E::kOutput == Output::kBf16;
    float y[kCount];

    // Where they lie in D: multiples of `kCount`.
    __device__ static __forceinline__ long long offset(const GemmParams& p, int row, int token) {
        return static_cast<long long>(token) * p.outputs + (E::kGated ? row >> 1 : row);
    }

    // With the residual from global memory.
    __device__ __forceinline__ Finished(const GemmParams& p, const RowConstants<E, kRows>& constants, int row, int token,
                                        const float (&sums)[kRows]) {
        scale_and_add_bias(constants, sums);
        if constexpr (E::kResidual) {
            if (row < p.weight_rows && token < p.tokens) add_residual(p.residual, offset(p, row, token));
        }
        apply_activation(constants, sums);
    }

    // With the residual, of 16 bits, from where the outputs will be staged.
    __device__ __forceinline__ Finished(const RowConstants<E, kRows>& constants, uint32 staged, const float (&sums)[kRows]) {
        scale_and_add_bias(constants, sums);
        if constexpr (E::kResidual && kCount == 4) {
            uint2 r;
            load_shared(r.x, r.y, staged);
            add_packed(r);
        } else if constexpr (E::kResidual) {
            uint32 r;
            load_shared(r, staged);
            add_pair(0, r);
        }
        apply_activation(constants, sums);
    }

    __device__ __forceinline__ void scale_and_add_bias(const RowConstants<E, kRows>& constants, const float (&sums)[kRows]) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) y[i] = constants.linear(sums[i], i);
    }

    __device__ __forceinline__ void apply_activation(const RowConstants<E, kRows>& constants, const float (&sums)[kRows]) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            y[i] = activate<E::kActivation>(y[i]);
            if constexpr (E::kGated) y[i] *= constants.linear(sums[i + 2], i + 2);
        }
    }

    __device__ __forceinline__ void add_residual(const void* residual, long long at) {
        if constexpr (E::kOutput == Output::kFp32 && kCount == 4) {
            const float4 r = *reinterpret_cast<const float4*>(static_cast<const float*>(residual) + at);
            y[0] += r.x, y[1] += r.y, y[2] += r.z, y[3] += r.w;
        } else if constexpr (E::kOutput == Output::kFp32) {
            const float2 r = *reinterpret_cast<const float2*>(static_cast<const float*>(residual) + at);
            y[0] += r.x, y[1] += r.y;
        } else if constexpr (kCount == 4) {
            add_packed(*reinterpret_cast<const uint2*>(static_cast<const uint16*>(residual) + at));
        } else {
            add_pair(0, *reinterpret_cast<const uint32*>(static_cast<const uint16*>(residual) + at));
        }
    }

    __device__ __forceinline__ void add_packed(uint2 r) { add_pair(0, r.x), add_pair(2, r.y); }
    __device__ __forceinline__ void add_pair(int i, uint32 pair) {
        y[i] += to_float<kBf16>(static_cast<uint16>(pair)), y[i + 1] += to_float<kBf16>(static_cast<uint16>(pair >> 16));
    }

    __device__ __forceinline__ void store_global(void* d, long long at) const {
        if constexpr (E::kOutput == Output::kFp32) {
            float* out = static_cast<float*>(d) + at;
            if constexpr (kCount == 2) *reinterpret_cast<float2*>(out) = make_float2(y[0], y[1]);
            else *reinterpret_cast<float4*>(out) = make_float4(y[0], y[1], y[2], y[3]);
        } else {
            uint16* out = static_cast<uint16*>(d) + at;
            if constexpr (kCount == 2) *reinterpret_cast<uint32*>(out) = pack_pair<kBf16>(y[0], y[1]);
            else *reinterpret_cast<uint2*>(out) = make_uint2(pack_pair<kBf16>(y[0], y[1]), pack_pair<kBf16>(y[2], y[3]));
        }
    }

    __device__ __forceinline__ void store_staged(uint32 address) const {
        if constexpr (kCount == 2) store_shared(address, pack_pair<kBf16>(y[0], y[1]));
        else store_shared(address, pack_pair<kBf16>(y[0], y[1]), pack_pair<kBf16>(y[2], y[3]));
    }
};

// Finish neighbouring packed rows of one token and store them: of four 8 bytes (16 as fp32), of two or when gated half of that.
template <class E, int kRows>
__device__ __forceinline__ void finish(const GemmParams& p, const RowConstants<E, kRows>& constants, int row, int token,
                                       const float (&sums)[kRows]) {
    Finished<E, kRows>(p, constants, row, token, sums).store_global(p.d, Finished<E, kRows>::offset(p, row, token));
}

}  // namespace twofour
