// PTX of compute capability 9.0 as functions. Sections are those of the PTX ISA 8.7 manual.
#pragma once

namespace twofour {

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;

// An opaque tensor map, encoded on the host (CUDA driver API, section "Tensor Map Object Management").
struct alignas(64) TensorMap {
    uint8 opaque[128];
};

__device__ __forceinline__ uint32 shared_address(const void* pointer) { return static_cast<uint32>(__cvta_generic_to_shared(pointer)); }

// 9.7.13.15.9 mbarrier.init
__device__ __forceinline__ void barrier_init(uint32 barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// 9.7.13.4 fence.mbarrier_init: the async proxy sees initialised barriers
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// 9.7.13.15.11 mbarrier.expect_tx: the current phase waits for that many bytes more
__device__ __forceinline__ void barrier_expect(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// 9.7.13.15.13 mbarrier.arrive
__device__ __forceinline__ void barrier_arrive(uint32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// 9.7.13.15.13 mbarrier.arrive.expect_tx: one arrival, and the phase waits for that many bytes
__device__ __forceinline__ void barrier_arrive_expecting(uint32 barrier, uint32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// 9.7.13.15.16 mbarrier.try_wait: returns once the phase of the given parity has completed
__device__ __forceinline__ void barrier_wait(uint32 barrier, uint32 parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\n mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra finished;\n bra again;\n"
        "finished:\n}" ::"r"(barrier),
        "r"(parity)
        : "memory");
}

// 9.7.9.25.4.1 cp.async.bulk: contiguous bytes to shared memory, completing on a barrier
__device__ __forceinline__ void copy_bulk(uint32 destination, const void* source, uint32 bytes, uint32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(destination), "l"(source),
                 "r"(bytes), "r"(barrier)
                 : "memory");
}

// 9.7.9.25.5.2 cp.async.bulk.tensor: a box of a 2-D tensor map, zeros outside
__device__ __forceinline__ void copy_box(uint32 destination, const TensorMap* map, int inner, int outer, uint32 barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(destination),
                 "l"(map), "r"(inner), "r"(outer), "r"(barrier)
                 : "memory");
}

// 9.7.9.25.5.2 cp.async.bulk.tensor, shared to global: a box, clipped at the tensor's edges
__device__ __forceinline__ void store_box(const TensorMap* map, uint32 source, int inner, int outer) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(source), "r"(inner), "r"(outer)
                 : "memory");
}

// 9.7.9.25.3 cp.async.bulk.commit_group and wait_group.read: the sources of all but kPending groups may be overwritten
__device__ __forceinline__ void store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// 9.7.13.4 fence.proxy.async: the copy engine sees this thread's writes to shared memory
__device__ __forceinline__ void fence_shared_for_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// 9.7.9.26 prefetch.tensormap
__device__ __forceinline__ void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// 9.7.9.8 ld.shared.v4
__device__ __forceinline__ void load_shared(uint32 (&words)[4], uint32 address) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address)
                 : "memory");
}

// 9.7.9.8 ld.shared
__device__ __forceinline__ void load_shared(uint32& word, uint32 address) {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
}

// 9.7.9.8 ld.shared.v2
__device__ __forceinline__ void load_shared(uint32& low, uint32& high, uint32 address) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(low), "=r"(high) : "r"(address) : "memory");
}

// 9.7.9.11 st.shared
__device__ __forceinline__ void store_shared(uint32 address, uint32 word) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory"); }
__device__ __forceinline__ void store_shared(uint32 address, uint32 low, uint32 high) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(low), "r"(high) : "memory");
}

// 9.7.19.5 setmaxnreg
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 9.7.13.1 bar.sync on a named barrier
__device__ __forceinline__ void sync_threads(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

// 9.7.13.12 griddepcontrol: no effect unless the launch allows grids to overlap
__device__ __forceinline__ void wait_for_earlier_grid() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
__device__ __forceinline__ void let_next_grid_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// 9.7.9.8 ld.acquire, 9.7.9.11 st.release, at GPU scope
__device__ __forceinline__ uint32 load_acquire(const uint32* flag) {
    uint32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
__device__ __forceinline__ void store_release(uint32* flag, uint32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// 9.7.9.22 cvt: two floats to a packed pair, `low` in the lower half
template <bool kBf16>
__device__ __forceinline__ uint32 pack_pair(float low, float high) {
    uint32 pair;
    if constexpr (kBf16) {
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    } else {
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    }
    return pair;
}

// 9.7.9.22 cvt: one 16-bit float to fp32
template <bool kBf16>
__device__ __forceinline__ float to_float(uint16 bits) {
    if constexpr (kBf16) {
        return __uint_as_float(static_cast<uint32>(bits) << 16);
    } else {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }
}

}  // namespace twofour
