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

// Operand lists: TF_TEN(2) names registers 20 to 29, TF_OUT8(16) binds accumulators 16 to 23.
#define TF_TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9"
#define TF_TEN_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9"
#define TF_LIST_30 TF_TEN_0 ", " TF_TEN(1) ", " TF_TEN(2)
#define TF_LIST_60 TF_LIST_30 ", " TF_TEN(3) ", " TF_TEN(4) ", " TF_TEN(5)
#define TF_LIST_32 TF_LIST_30 ", %30, %31"
#define TF_LIST_64 TF_LIST_60 ", %60, %61, %62, %63"
#define TF_LIST_80 TF_LIST_60 ", " TF_TEN(6) ", " TF_TEN(7)
#define TF_LIST_88 TF_LIST_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define TF_LIST_96 TF_LIST_80 ", " TF_TEN(8) ", %90, %91, %92, %93, %94, %95"
#define TF_OUT8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define TF_OUT_32 TF_OUT8(0), TF_OUT8(8), TF_OUT8(16), TF_OUT8(24)
#define TF_OUT_64 TF_OUT_32, TF_OUT8(32), TF_OUT8(40), TF_OUT8(48), TF_OUT8(56)
#define TF_OUT_80 TF_OUT_64, TF_OUT8(64), TF_OUT8(72)
#define TF_OUT_88 TF_OUT_80, TF_OUT8(80)
#define TF_OUT_96 TF_OUT_88, TF_OUT8(88)

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

// The four numbers are the operand positions behind the accumulators.
TF_DEFINE_WGMMA(64, 32, 32, 33, 34, 35)
TF_DEFINE_WGMMA(128, 64, 64, 65, 66, 67)
TF_DEFINE_WGMMA(160, 80, 80, 81, 82, 83)
TF_DEFINE_WGMMA(176, 88, 88, 89, 90, 91)
TF_DEFINE_WGMMA(192, 96, 96, 97, 98, 99)

}  // namespace twofour
