// Blocks of an image's pixels gathered into channels. A thread owns kVector neighbouring channels of one block.
#pragma once

#include "values.cuh"

namespace twofour {

// Laid out like kernels/patches/launch.py packs it.
struct PatchesParams {
    const void* x;
    void* y;       // [batch, out_height, out_width, out_channels]
    int64 groups;  // threads' worth of work
    int64 image_stride;
    int64 row_stride;
    int64 column_stride;
    int64 channel_stride;
    int height;
    int width;
    int out_height;
    int out_width;
    int top;
    int left;
    Divisor by_out_width;
    Divisor by_out_height;
};

template <Type kIn, Type kOut, int kVector, int kChannels, int kBlockHeight, int kBlockWidth, int kGroups, bool kWide>
__device__ __forceinline__ void patches(const PatchesParams& p) {
    using I = typename Index<kWide>::type;
    const I row_stride = static_cast<I>(p.row_stride), column_stride = static_cast<I>(p.column_stride);
    const I channel_stride = static_cast<I>(p.channel_stride), image_stride = static_cast<I>(p.image_stride);
    const int64 step = static_cast<int64>(gridDim.x) * blockDim.x;
    wait_for_earlier_grid();
    for (int64 g = static_cast<int64>(blockIdx.x) * blockDim.x + threadIdx.x; g < p.groups; g += step) {
        const I group = static_cast<I>(g);
        const I pixel = group / kGroups;
        const int first = static_cast<int>(group - pixel * kGroups) * kVector;
        const I line = Index<kWide>::divide(pixel, p.out_width, p.by_out_width);
        const int j = static_cast<int>(pixel - line * p.out_width);
        const I n = Index<kWide>::divide(line, p.out_height, p.by_out_height);
        const int i = static_cast<int>(line - n * p.out_height);
        const int top = i * kBlockHeight - p.top, left = j * kBlockWidth - p.left;
        const I corner = n * image_stride + top * row_stride + left * column_stride;

        float values[kVector];
#pragma unroll
        for (int e = 0; e < kVector; ++e) {
            const int channel = first + e;
            const int place = channel / kChannels, c = channel - place * kChannels;
            const int a = place / kBlockWidth, b = place - a * kBlockWidth;
            const bool inside = a < kBlockHeight && static_cast<unsigned>(top + a) < static_cast<unsigned>(p.height) &&
                                static_cast<unsigned>(left + b) < static_cast<unsigned>(p.width);
            values[e] = 0.0f;
            if (inside) {
                Packet<kIn, 1> one;
                one.load(p.x, corner + a * row_stride + b * column_stride + c * channel_stride);
                values[e] = one.get(0);
            }
        }
        Packet<kOut, kVector> out;
        out.set(values);
        out.store(p.y, g * kVector);
    }
    let_next_grid_start();
}

}  // namespace twofour
