// Element types of the plain families: groups of neighbouring elements moved in 16-byte pieces, converted to fp32 and back.
#pragma once

#include "ptx_sm90.cuh"

namespace twofour {

using int64 = long long;

enum class Type { kFp16, kBf16, kFp32, kInt64, kInt32, kInt8, kUint8, kBool };

template <Type kType>
constexpr int kSizeOf = kType == Type::kInt64 ? 8 : kType == Type::kFp32 || kType == Type::kInt32 ? 4 : kType == Type::kFp16 || kType == Type::kBf16 ? 2 : 1;

// Exact division of 0 .. 2^31 - 1 by a run-time constant, as a product and a shift.
struct Divisor {
    uint32 multiplier;
    uint32 shift;

    __device__ __forceinline__ int divide(int value) const {
        return static_cast<int>((static_cast<uint64>(static_cast<uint32>(value)) * multiplier) >> shift);
    }
};

// An index that is 64 bits wide only where it must be.
template <bool kWide>
struct Index {
    using type = int;
    __device__ static __forceinline__ int divide(int value, int64, const Divisor& by) { return by.divide(value); }
};
template <>
struct Index<true> {
    using type = int64;
    __device__ static __forceinline__ int64 divide(int64 value, int64 size, const Divisor&) { return value / size; }
};

// Raw bits of kCount neighbouring elements.
template <Type kType, int kCount>
struct Packet {
    static constexpr int kSize = kSizeOf<kType>;
    static constexpr int kBytes = kSize * kCount;
    static constexpr int kWords = (kBytes + 3) / 4;
    uint32 words[kWords];

    __device__ __forceinline__ void load(const void* base, int64 element) {
        const uint8* from = static_cast<const uint8*>(base) + element * kSize;
        if constexpr (kBytes >= 16) {
#pragma unroll
            for (int i = 0; i < kBytes / 16; ++i) {
                const uint4 four = *reinterpret_cast<const uint4*>(from + 16 * i);
                words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
            }
        } else if constexpr (kBytes == 8) {
            const uint2 two = *reinterpret_cast<const uint2*>(from);
            words[0] = two.x, words[1] = two.y;
        } else if constexpr (kBytes == 4) {
            words[0] = *reinterpret_cast<const uint32*>(from);
        } else if constexpr (kBytes == 2) {
            words[0] = *reinterpret_cast<const uint16*>(from);
        } else {
            words[0] = *from;
        }
    }

    __device__ __forceinline__ void store(void* base, int64 element) const {
        uint8* to = static_cast<uint8*>(base) + element * kSize;
        if constexpr (kBytes >= 16) {
#pragma unroll
            for (int i = 0; i < kBytes / 16; ++i) {
                *reinterpret_cast<uint4*>(to + 16 * i) = make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
            }
        } else if constexpr (kBytes == 8) {
            *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
        } else if constexpr (kBytes == 4) {
            *reinterpret_cast<uint32*>(to) = words[0];
        } else if constexpr (kBytes == 2) {
            *reinterpret_cast<uint16*>(to) = static_cast<uint16>(words[0]);
        } else {
            *to = static_cast<uint8>(words[0]);
        }
    }

    // Element i as fp32.
    __device__ __forceinline__ float get(int i) const {
        if constexpr (kType == Type::kInt64) {
            return static_cast<float>(static_cast<int64>(static_cast<uint64>(words[2 * i + 1]) << 32 | words[2 * i]));
        } else if constexpr (kType == Type::kInt32) {
            return static_cast<float>(static_cast<int>(words[i]));
        } else if constexpr (kType == Type::kFp32) {
            return __uint_as_float(words[i]);
        } else if constexpr (kSize == 2) {
            return to_float<kType == Type::kBf16>(static_cast<uint16>(words[i / 2] >> 16 * (i % 2)));
        } else {
            const uint8 byte = static_cast<uint8>(words[i / 4] >> 8 * (i % 4));
            if constexpr (kType == Type::kInt8) return static_cast<float>(static_cast<signed char>(byte));
            if constexpr (kType == Type::kBool) return byte != 0 ? 1.0f : 0.0f;
            return static_cast<float>(byte);
        }
    }

    // All elements from fp32: rounded to nearest even, integers towards zero.
    __device__ __forceinline__ void set(const float (&y)[kCount]) {
        if constexpr (kType == Type::kFp32) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) words[i] = __float_as_uint(y[i]);
        } else if constexpr (kSize == 2) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) words[i] = pack_pair<kType == Type::kBf16>(y[2 * i], 2 * i + 1 < kCount ? y[(2 * i + 1) % kCount] : 0.0f);
        } else if constexpr (kType == Type::kInt64) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const uint64 value = static_cast<uint64>(static_cast<int64>(y[i]));
                words[2 * i] = static_cast<uint32>(value), words[2 * i + 1] = static_cast<uint32>(value >> 32);
            }
        } else if constexpr (kType == Type::kInt32) {
#pragma unroll
            for (int i = 0; i < kCount; ++i) words[i] = static_cast<uint32>(static_cast<int>(y[i]));
        } else {
#pragma unroll
            for (int i = 0; i < kWords; ++i) words[i] = 0;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                const uint32 byte = kType == Type::kBool ? (y[i] != 0.0f) : static_cast<uint32>(static_cast<int>(y[i])) & 255u;
                words[i / 4] |= byte << 8 * (i % 4);
            }
        }
    }
};

// x as kType would hold it.
template <Type kType>
__device__ __forceinline__ float rounded(float x) {
    if constexpr (kType == Type::kFp32) return x;
    if constexpr (kType == Type::kFp16 || kType == Type::kBf16) {
        constexpr bool kBf16 = kType == Type::kBf16;
        return to_float<kBf16>(static_cast<uint16>(pack_pair<kBf16>(x, 0.0f)));
    }
    if constexpr (kType == Type::kBool) return x != 0.0f ? 1.0f : 0.0f;
    return truncf(x);
}

// NOTE: unlike fmaxf and fminf, let NaN through
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }
__device__ __forceinline__ float smaller(float a, float b) { return a < b || a != a ? a : b; }

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

}  // namespace twofour
