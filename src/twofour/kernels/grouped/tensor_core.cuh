// Warp-wide PTX of this family. Sections are those of the PTX ISA 8.7 manual.
#pragma once

#include "ptx_sm90.cuh"

namespace twofour {

// 9.7.9.25.5.2 cp.async.bulk.tensor: a box of a 4-D tensor map, zeros outside
__device__ __forceinline__ void copy_box(uint32 destination, const TensorMap* map, int channel, int column, int row, int image, uint32 barrier) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(
                     destination),
                 "l"(map), "r"(channel), "r"(column), "r"(row), "r"(image), "r"(barrier)
                 : "memory");
}

// 9.7.9.25.5.2 cp.async.bulk.tensor, shared to global: a box, clipped at the tensor's edges
__device__ __forceinline__ void store_box(const TensorMap* map, uint32 source, int channel, int column, int row, int image) {
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(source), "r"(channel),
                 "r"(column), "r"(row), "r"(image)
                 : "memory");
}

// 9.7.14.5.15 ldmatrix: four 8 x 8 matrices; lane 8 i + j gives the address of row j of matrix i
__device__ __forceinline__ void load_matrices(uint32 (&words)[4], uint32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// 9.7.14.5.8 mma.m16n8k16: d += a . b
template <bool kBf16>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    if constexpr (kBf16) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// 9.7.14.5.7 mma.m16n8k8: d += a . b
template <bool kBf16>
__device__ __forceinline__ void multiply(float (&d)[4], uint32 a0, uint32 a1, uint32 b) {
    if constexpr (kBf16) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b));
    } else {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b));
    }
}

}  // namespace twofour
