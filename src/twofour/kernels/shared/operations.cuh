// Element-wise operations in fp32. kernels/pointwise/contract.py numbers them in this order.
#pragma once

#include "values.cuh"

namespace twofour {

enum class Op {
    kAdd, kSub, kMul, kDiv, kMin, kMax, kPow, kNeg, kAbs, kSqrt, kRsqrt, kExp, kLog, kErf, kTanh, kSigmoid, kRelu, kLeakyRelu, kPRelu, kElu,
    kGelu, kGeluTanh, kSilu, kHardswish, kHardsigmoid, kClip, kWhere, kEqual, kLess, kGreater, kNot, kAnd, kOr, kCast, kFloor, kCeil, kSoftplus
};

// erf to 1.5e-7, without branches. Abramowitz and Stegun 1964, formula 7.1.26.
__device__ __forceinline__ float error_function(float x) {
    const float t = __fdividef(1.0f, 1.0f + 0.3275911f * fabsf(x));
    const float polynomial = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    return copysignf(1.0f - polynomial * __expf(-x * x), x);
}

// NOTE: the fast forms are good to about 1e-5, used where the output has 16 bits.
template <bool kFast>
__device__ __forceinline__ float exponential(float x) {
    return kFast ? __expf(x) : expf(x);
}
template <bool kFast>
__device__ __forceinline__ float sigmoid(float x) {
    const float below = 1.0f + exponential<kFast>(-x);
    return kFast ? __fdividef(1.0f, below) : 1.0f / below;
}

template <Op kOp, bool kFast>
__device__ __forceinline__ float operate(float a, float b, float c) {
    if constexpr (kOp == Op::kAdd) return a + b;
    if constexpr (kOp == Op::kSub) return a - b;
    if constexpr (kOp == Op::kMul) return a * b;
    if constexpr (kOp == Op::kDiv) return a / b;
    if constexpr (kOp == Op::kMin) return smaller(a, b);
    if constexpr (kOp == Op::kMax) return larger(a, b);
    if constexpr (kOp == Op::kPow) return powf(a, b);
    if constexpr (kOp == Op::kNeg) return -a;
    if constexpr (kOp == Op::kAbs) return fabsf(a);
    if constexpr (kOp == Op::kSqrt) return sqrtf(a);
    if constexpr (kOp == Op::kRsqrt) return rsqrtf(a);
    if constexpr (kOp == Op::kExp) return exponential<kFast>(a);
    if constexpr (kOp == Op::kLog) return logf(a);
    if constexpr (kOp == Op::kErf) return erff(a);
    if constexpr (kOp == Op::kTanh) return tanhf(a);
    if constexpr (kOp == Op::kSigmoid) return sigmoid<kFast>(a);
    if constexpr (kOp == Op::kRelu) return a < 0.0f ? 0.0f : a;
    if constexpr (kOp == Op::kLeakyRelu || kOp == Op::kPRelu) return a < 0.0f ? a * b : a;
    if constexpr (kOp == Op::kElu) return a < 0.0f ? b * expm1f(a) : a;
    if constexpr (kOp == Op::kGelu) return 0.5f * a * (1.0f + (kFast ? error_function(a * 0.70710678118654752f) : erff(a * 0.70710678118654752f)));
    if constexpr (kOp == Op::kGeluTanh) {
        // x / (1 + exp(-2u)) is 0.5 x (1 + tanh u) without the cancellation
        return a * sigmoid<kFast>(1.59576912160573072f * (a + 0.044715f * a * a * a));
    }
    if constexpr (kOp == Op::kSilu) return a * sigmoid<kFast>(a);
    if constexpr (kOp == Op::kHardswish) return a * smaller(larger(a + 3.0f, 0.0f), 6.0f) * (1.0f / 6.0f);
    if constexpr (kOp == Op::kHardsigmoid) return smaller(larger(a * b + c, 0.0f), 1.0f);
    if constexpr (kOp == Op::kClip) return smaller(larger(a, b), c);
    if constexpr (kOp == Op::kWhere) return a != 0.0f ? b : c;
    if constexpr (kOp == Op::kEqual) return a == b ? 1.0f : 0.0f;
    if constexpr (kOp == Op::kLess) return a < b ? 1.0f : 0.0f;
    if constexpr (kOp == Op::kGreater) return a > b ? 1.0f : 0.0f;
    if constexpr (kOp == Op::kNot) return a == 0.0f ? 1.0f : 0.0f;
    if constexpr (kOp == Op::kAnd) return a != 0.0f && b != 0.0f ? 1.0f : 0.0f;
    if constexpr (kOp == Op::kOr) return a != 0.0f || b != 0.0f ? 1.0f : 0.0f;
    if constexpr (kOp == Op::kFloor) return floorf(a);
    if constexpr (kOp == Op::kCeil) return ceilf(a);
    if constexpr (kOp == Op::kSoftplus) return larger(a, 0.0f) + log1pf(expf(-fabsf(a)));
    return a;
}

}  // namespace twofour
