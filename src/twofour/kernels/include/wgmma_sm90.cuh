// wgmma and wgmma.sp for 16-bit operands: 64 rows by kTokens columns, fp32 accumulators in registers.
// PTX ISA 8.7: 9.7.15.4 (descriptors), 9.7.15.5.2 wgmma.mma_async, 9.7.15.6.3 wgmma.mma_async.sp, 9.7.15.7.1-3 (fence, commit, wait).
#pragma once

#include "ptx_sm90.cuh"

namespace twofour {

enum Swizzle : uint64 { kSwizzle128 = 1, kSwizzle64 = 2 };

// Descriptor of a K-major tile whose rows of one swizzle span lie eight to an atom of `atom_bytes`.
__device__ __forceinline__ uint64 matrix_descriptor(uint32 address, uint32 atom_bytes, Swizzle swizzle) {
    return static_cast<uint64>((address & 0x3FFFF) >> 4) | (uint64{1} << 16) | (static_cast<uint64>(atom_bytes >> 4) << 32) | (uint64{swizzle} << 62);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps reads of the accumulators behind the wait that precedes this.
template <int kCount>
__device__ __forceinline__ void hold_accumulators(float (&accumulators)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(accumulators[i])::"memory");
}

// Operand lists: TF_LIST_n names accumulators 0 to n - 1, TF_OUT_n binds them.
#define TF_NAME10(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define TF_OUT4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define TF_LIST_30 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, " TF_NAME10(1) ", " TF_NAME10(2)
#define TF_LIST_32 TF_LIST_30 ", %30, %31"
#define TF_LIST_36 TF_LIST_32 ", %32, %33, %34, %35"
#define TF_LIST_40 TF_LIST_36 ", %36, %37, %38, %39"
#define TF_LIST_44 TF_LIST_40 ", %40, %41, %42, %43"
#define TF_LIST_48 TF_LIST_44 ", %44, %45, %46, %47"
#define TF_LIST_52 TF_LIST_48 ", %48, %49, %50, %51"
#define TF_LIST_56 TF_LIST_52 ", %52, %53, %54, %55"
#define TF_LIST_60 TF_LIST_56 ", %56, %57, %58, %59"
#define TF_LIST_64 TF_LIST_60 ", %60, %61, %62, %63"
#define TF_LIST_68 TF_LIST_64 ", %64, %65, %66, %67"
#define TF_LIST_72 TF_LIST_68 ", %68, %69, %70, %71"
#define TF_LIST_76 TF_LIST_72 ", %72, %73, %74, %75"
#define TF_LIST_80 TF_LIST_76 ", %76, %77, %78, %79"
#define TF_LIST_84 TF_LIST_80 ", %80, %81, %82, %83"
#define TF_LIST_88 TF_LIST_84 ", %84, %85, %86, %87"
#define TF_LIST_92 TF_LIST_88 ", %88, %89, %90, %91"
#define TF_LIST_96 TF_LIST_92 ", %92, %93, %94, %95"
#define TF_LIST_104 TF_LIST_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define TF_LIST_112 TF_LIST_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define TF_LIST_120 TF_LIST_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define TF_LIST_128 TF_LIST_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define TF_OUT_32 TF_OUT4(0), TF_OUT4(4), TF_OUT4(8), TF_OUT4(12), TF_OUT4(16), TF_OUT4(20), TF_OUT4(24), TF_OUT4(28)
#define TF_OUT_36 TF_OUT_32, TF_OUT4(32)
#define TF_OUT_40 TF_OUT_36, TF_OUT4(36)
#define TF_OUT_44 TF_OUT_40, TF_OUT4(40)
#define TF_OUT_48 TF_OUT_44, TF_OUT4(44)
#define TF_OUT_52 TF_OUT_48, TF_OUT4(48)
#define TF_OUT_56 TF_OUT_52, TF_OUT4(52)
#define TF_OUT_60 TF_OUT_56, TF_OUT4(56)
#define TF_OUT_64 TF_OUT_60, TF_OUT4(60)
#define TF_OUT_68 TF_OUT_64, TF_OUT4(64)
#define TF_OUT_72 TF_OUT_68, TF_OUT4(68)
#define TF_OUT_76 TF_OUT_72, TF_OUT4(72)
#define TF_OUT_80 TF_OUT_76, TF_OUT4(76)
#define TF_OUT_84 TF_OUT_80, TF_OUT4(80)
#define TF_OUT_88 TF_OUT_84, TF_OUT4(84)
#define TF_OUT_92 TF_OUT_88, TF_OUT4(88)
#define TF_OUT_96 TF_OUT_92, TF_OUT4(92)
#define TF_OUT_104 TF_OUT_96, TF_OUT4(96), TF_OUT4(100)
#define TF_OUT_112 TF_OUT_104, TF_OUT4(104), TF_OUT4(108)
#define TF_OUT_120 TF_OUT_112, TF_OUT4(112), TF_OUT4(116)
#define TF_OUT_128 TF_OUT_120, TF_OUT4(120), TF_OUT4(124)

#define TF_WGMMA_SPARSE(N, TYPE, COUNT, A, B, E, P)                                                              \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P ", 0;\n"                                            \
                 "wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." TYPE "." TYPE " {" TF_LIST_##COUNT "}, "   \
                 "%" #A ", %" #B ", %" #E ", 0, add, 1, 1, 0, 0;\n}"                                             \
                 : TF_OUT_##COUNT                                                                                \
                 : "l"(a), "l"(b), "r"(metadata), "r"(accumulate))
#define TF_WGMMA_DENSE(N, TYPE, COUNT, A, B, P)                                                                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" #P ", 0;\n"                                            \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" TF_LIST_##COUNT "}, "      \
                 "%" #A ", %" #B ", add, 1, 1, 0, 0;\n}"                                                         \
                 : TF_OUT_##COUNT                                                                                \
                 : "l"(a), "l"(b), "r"(accumulate))

// d[64, kTokens] = A . B^T (+ d). kDepth inputs are consumed: 32 by the sparse form, 16 by the dense one.
template <int kTokens, bool kSparse, bool kBf16>
struct Wgmma;

#define TF_DEFINE_WGMMA(N, COUNT, A, B, E, F)                                                                     \
    template <bool kBf16>                                                                                        \
    struct Wgmma<N, true, kBf16> {                                                                               \
        static constexpr int kDepth = 32;                                                                        \
        __device__ static __forceinline__ void multiply(float (&d)[COUNT], uint64 a, uint64 b, uint32 metadata, int accumulate) { \
            if constexpr (kBf16) TF_WGMMA_SPARSE(N, "bf16", COUNT, A, B, E, F);                                  \
            else TF_WGMMA_SPARSE(N, "f16", COUNT, A, B, E, F);                                                   \
        }                                                                                                        \
    };                                                                                                           \
    template <bool kBf16>                                                                                        \
    struct Wgmma<N, false, kBf16> {                                                                              \
        static constexpr int kDepth = 16;                                                                        \
        __device__ static __forceinline__ void multiply(float (&d)[COUNT], uint64 a, uint64 b, uint32, int accumulate) { \
            if constexpr (kBf16) TF_WGMMA_DENSE(N, "bf16", COUNT, A, B, E);                                      \
            else TF_WGMMA_DENSE(N, "f16", COUNT, A, B, E);                                                       \
        }                                                                                                        \
    };

// Columns, accumulators, and the four operand positions behind them.
TF_DEFINE_WGMMA(64, 32, 32, 33, 34, 35)
TF_DEFINE_WGMMA(72, 36, 36, 37, 38, 39)
TF_DEFINE_WGMMA(80, 40, 40, 41, 42, 43)
TF_DEFINE_WGMMA(88, 44, 44, 45, 46, 47)
TF_DEFINE_WGMMA(96, 48, 48, 49, 50, 51)
TF_DEFINE_WGMMA(104, 52, 52, 53, 54, 55)
TF_DEFINE_WGMMA(112, 56, 56, 57, 58, 59)
TF_DEFINE_WGMMA(120, 60, 60, 61, 62, 63)
TF_DEFINE_WGMMA(128, 64, 64, 65, 66, 67)
TF_DEFINE_WGMMA(136, 68, 68, 69, 70, 71)
TF_DEFINE_WGMMA(144, 72, 72, 73, 74, 75)
TF_DEFINE_WGMMA(152, 76, 76, 77, 78, 79)
TF_DEFINE_WGMMA(160, 80, 80, 81, 82, 83)
TF_DEFINE_WGMMA(168, 84, 84, 85, 86, 87)
TF_DEFINE_WGMMA(176, 88, 88, 89, 90, 91)
TF_DEFINE_WGMMA(184, 92, 92, 93, 94, 95)
TF_DEFINE_WGMMA(192, 96, 96, 97, 98, 99)
TF_DEFINE_WGMMA(208, 104, 104, 105, 106, 107)
TF_DEFINE_WGMMA(224, 112, 112, 113, 114, 115)
TF_DEFINE_WGMMA(240, 120, 120, 121, 122, 123)
TF_DEFINE_WGMMA(256, 128, 128, 129, 130, 131)

}  // namespace twofour
