// What the two kernels of the family share: parameters, the window, what follows the convolution, loads that stop at an image's edge.
#pragma once

#include "operations.cuh"

namespace twofour {

// Laid out like kernels/depthwise/launch.py packs it.
struct DepthwiseParams {
    const void* x;         // [batch, height, width, channels], x_pitch elements from pixel to pixel
    const void* weight;    // [kernel height, kernel width, channels]
    const float* bias;     // [channels]
    const void* residual;  // [batch, out_height, out_width, channels], residual_pitch elements from pixel to pixel
    void* y;               // the same, y_pitch elements from pixel to pixel
    int64 groups;          // of work, a thread or a block each: channel groups by strips by chunks of rows by groups of images
    int64 x_pitch;
    int64 y_pitch;
    int64 residual_pitch;
    int height;
    int width;
    int out_height;
    int out_width;
    int channels;
    int top;   // rows of zeros above X
    int left;  // columns of zeros left of X
    int rows;  // of output, in a chunk
    int channel_groups;
    int strips;  // of a row
    int chunks;  // of an image
    int batch;
    Divisor by_channel_groups;
    Divisor by_strips;
    Divisor by_chunks;
};

template <int kHeight_, int kWidth_, int kDown_, int kAcross_>
struct Window {
    static constexpr int kHeight = kHeight_;
    static constexpr int kWidth = kWidth_;
    static constexpr int kDown = kDown_;      // stride
    static constexpr int kAcross = kAcross_;  // stride
};

template <Op kActivation_, bool kBias_, bool kResidual_>
struct Behind {
    static constexpr Op kActivation = kActivation_;
    static constexpr bool kBias = kBias_;
    static constexpr bool kResidual = kResidual_;
};

// Words of global memory, zeros where they are not wanted. 9.7.9.8 ld.global
__device__ __forceinline__ void load_wanted(uint32 (&words)[1], const void* from, uint32 wanted) {
    asm volatile("{\n.reg .pred p;\n setp.ne.u32 p, %2, 0;\n mov.u32 %0, 0;\n @p ld.global.u32 %0, [%1];\n}" : "=&r"(words[0]) : "l"(from), "r"(wanted));
}
__device__ __forceinline__ void load_wanted(uint32 (&words)[2], const void* from, uint32 wanted) {
    asm volatile("{\n.reg .pred p;\n setp.ne.u32 p, %3, 0;\n mov.u32 %0, 0;\n mov.u32 %1, 0;\n @p ld.global.v2.u32 {%0, %1}, [%2];\n}"
                 : "=&r"(words[0]), "=&r"(words[1])
                 : "l"(from), "r"(wanted));
}
__device__ __forceinline__ void load_wanted(uint32 (&words)[4], const void* from, uint32 wanted) {
    asm volatile("{\n.reg .pred p;\n setp.ne.u32 p, %5, 0;\n mov.u32 %0, 0;\n mov.u32 %1, 0;\n mov.u32 %2, 0;\n mov.u32 %3, 0;\n"
                 " @p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "=&r"(words[0]), "=&r"(words[1]), "=&r"(words[2]), "=&r"(words[3])
                 : "l"(from), "r"(wanted));
}

// NOTE: like `operate<Op::kClip>`, lets NaN through, in two instructions
__device__ __forceinline__ float clip_to_six(float x) {
    asm("max.NaN.f32 %0, %0, 0f00000000;\n min.NaN.f32 %0, %0, 0f40C00000;" : "+f"(x));
    return x;
}

template <class E>
__device__ __forceinline__ float activate(float x) {
    if constexpr (E::kActivation == Op::kClip) return clip_to_six(x);
    return operate<E::kActivation, true>(x, 0.0f, 0.0f);
}

}  // namespace twofour
